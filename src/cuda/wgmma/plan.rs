//! Which kernels serve a layer, and the ring that the GPU has room for. Pure functions.

use crate::config::Activation;
use crate::cuda::pack::{Codes, Format, StageScales};
use crate::cuda::permute::ROW_BYTES;
use crate::scheme::*;

/// What kernels/wgmma/kind.cuh calls MOE_KIND.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// 16-bit weights and tokens.
    Half,
    /// e4m3, scales per row and token or tensor.
    Fp8,
    /// The same, with sums that stay in the tensor cores.
    Fp8Fast,
    /// e4m3 with scales for every 128 columns.
    Fp8Block,
    /// int8, scales per row and token or tensor.
    Int8,
}

impl Kind {
    /// What multiplies packed weights and tokens quantised to a key, or not quantised. A scale of weights or of tokens that
    /// changes along a row needs sums by 128 columns, and with those every row its own scales. `fast` as in
    /// [`MoeConfig`](crate::config::MoeConfig).
    pub fn of(format: Format, key: Option<QuantKey>, fast: bool) -> Option<Self> {
        const FP8_ROW: [QuantKey; 2] = [FP8_DYNAMIC_TOKEN_SYM, FP8_DYNAMIC_TENSOR_SYM];
        const INT8: [QuantKey; 3] = [INT8_DYNAMIC_TOKEN_SYM, INT8_DYNAMIC_TENSOR_SYM, INT8_STATIC_TENSOR_SYM];
        match (format.codes, format.scales, key) {
            (Codes::Half, _, None) => Some(Kind::Half),
            (Codes::E4m3, StageScales::None, Some(k)) if FP8_ROW.contains(&k) || k == FP8_STATIC_TENSOR_SYM => {
                Some(if fast { Kind::Fp8Fast } else { Kind::Fp8 })
            }
            (Codes::E4m3, StageScales::F32(1), Some(k)) if FP8_ROW.contains(&k) || k == FP8_DYNAMIC_128_SYM => {
                Some(Kind::Fp8Block)
            }
            (Codes::Int8, StageScales::None, Some(k)) if INT8.contains(&k) => Some(Kind::Int8),
            _ => None,
        }
    }

    /// The fatbins', by the compute type.
    pub fn fatbins(self) -> [&'static str; 2] {
        match self {
            Kind::Half => ["wgmma_half_bf16", "wgmma_half_f16"],
            Kind::Fp8 => ["wgmma_fp8_bf16", "wgmma_fp8_f16"],
            Kind::Fp8Fast => ["wgmma_fp8_fast_bf16", "wgmma_fp8_fast_f16"],
            Kind::Fp8Block => ["wgmma_fp8_block_bf16", "wgmma_fp8_block_f16"],
            Kind::Int8 => ["wgmma_int8_bf16", "wgmma_int8_f16"],
        }
    }

    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        if self == Kind::Half { 2 } else { 1 }
    }
}

/// Tiles that the kernels have entries for, smallest first.
pub const TILES: [usize; 3] = [64, 128, 256];
/// Rows of a block's tile, in slabs.
pub const SLABS: usize = 4 * MATH_GROUPS;
const MATH_GROUPS: usize = 2;
/// Blocks of a cluster, which have neighbouring rows and the same tokens.
pub const CLUSTER: usize = 2;
/// A warpgroup that fills the ring and finds out what is needed besides, and those that multiply.
pub const THREADS: usize = 128 * (1 + MATH_GROUPS);
const MAX_DEPTH: usize = 16;
/// Tokens whose results go out at once.
const PIECE: usize = 32;
/// Tasks that are known ahead, and those whose facts are.
const TASKS: usize = 4;
const FACTS: usize = 2;

/// The tile whose kernel finds the scales of what it makes. That costs every task the wait for the other block of its cluster,
/// more than a kernel in between where results are many.
const REQUANTISING_TILE: usize = TILES[0];

/// Whether a tile's kernel quantises what it makes: by scales that it finds, of the one key that it does that for, or by stored
/// ones.
pub fn requantises(kind: Kind, key: Option<QuantKey>, activation: Activation, tile: usize) -> bool {
    let served = match kind {
        Kind::Half => false,
        Kind::Fp8Block => key == Some(FP8_DYNAMIC_128_SYM) && tile == REQUANTISING_TILE,
        Kind::Fp8 | Kind::Fp8Fast => key == Some(FP8_STATIC_TENSOR_SYM),
        Kind::Int8 => key == Some(INT8_STATIC_TENSOR_SYM),
    };
    served && matches!(activation, Activation::Silu { .. })
}

/// Stages of 128 bytes of a row that a place of the ring holds.
fn span(tile: usize) -> usize {
    if tile <= 64 { 2 } else { 1 }
}

/// A block's ring in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    /// Places.
    pub depth: usize,
    /// Bytes of all shared memory.
    pub shared: usize,
}

impl Ring {
    /// As deep as `shared` bytes allow; `None` with fewer than three places.
    pub fn new(kind: Kind, tile: usize, shared: usize) -> Option<Self> {
        let (slab, scales) = if kind == Kind::Fp8Block { (2048 + 64, 4 * tile) } else { (2048, 0) };
        let place = span(tile) * (tile * ROW_BYTES + SLABS * slab + scales);
        let staged = MATH_GROUPS * 2 * PIECE * 128;
        let divisor = if matches!(kind, Kind::Half | Kind::Fp8Block) { 0 } else { 16 };
        let facts = FACTS * (8 * (tile + 16 * SLABS) + divisor);
        // Of a task's tokens, from every warpgroup of the cluster.
        let quantises = kind == Kind::Fp8Block && tile == REQUANTISING_TILE;
        let largest = if quantises { FACTS * 2 * tile * MATH_GROUPS * CLUSTER } else { 0 };
        let rest = staged + facts + largest + 16 * TASKS + 8 * (2 * MAX_DEPTH + 2 * TASKS + 3 * FACTS);
        let depth = (shared.checked_sub(rest)? / place).min(MAX_DEPTH);
        (depth >= 3).then_some(Self { depth, shared: rest + depth * place })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Kind; 5] = [Kind::Half, Kind::Fp8, Kind::Fp8Fast, Kind::Fp8Block, Kind::Int8];
    const HOPPER: usize = 227 << 10;

    #[test]
    fn kinds_take_the_keys_that_their_kernels_scale_by() {
        use crate::cuda::pack::Compute;
        let format = |codes, scales| Format { codes, scales, compute: Compute::Bf16, scale_bf16: false };
        let of = |codes, scales, key| Kind::of(format(codes, scales), key, false);
        let fast = |codes, scales, key| Kind::of(format(codes, scales), key, true);
        let (none, block) = (StageScales::None, StageScales::F32(1));
        assert_eq!(of(Codes::Half, none, None), Some(Kind::Half));
        assert_eq!(of(Codes::Half, none, Some(FP8_DYNAMIC_TOKEN_SYM)), None);
        for (key, rows, blocks) in [
            (FP8_DYNAMIC_TOKEN_SYM, true, true),
            (FP8_DYNAMIC_TENSOR_SYM, true, true),
            (FP8_STATIC_TENSOR_SYM, true, false),
            (FP8_DYNAMIC_128_SYM, false, true),
            (MXFP8_DYNAMIC, false, false),
            (INT8_DYNAMIC_TOKEN_SYM, false, false),
        ] {
            assert_eq!(of(Codes::E4m3, none, Some(key)), rows.then_some(Kind::Fp8), "{key}");
            assert_eq!(fast(Codes::E4m3, none, Some(key)), rows.then_some(Kind::Fp8Fast), "{key}");
            assert_eq!(of(Codes::E4m3, block, Some(key)), blocks.then_some(Kind::Fp8Block), "{key}");
            assert_eq!(fast(Codes::E4m3, block, Some(key)), blocks.then_some(Kind::Fp8Block), "{key}");
        }
        assert_eq!(of(Codes::E4m3, StageScales::F32(2), Some(FP8_DYNAMIC_128_SYM)), None);
        assert_eq!(of(Codes::E4m3, block, None), None);
        for of in [&of as &dyn Fn(_, _, _) -> _, &fast] {
            assert_eq!(of(Codes::Int8, none, Some(INT8_STATIC_TENSOR_SYM)), Some(Kind::Int8));
        }
        assert_eq!(of(Codes::Int8, none, Some(FP8_DYNAMIC_TOKEN_SYM)), None);
    }

    #[test]
    fn results_are_quantised_at_once_where_there_is_code_for_it() {
        use crate::config::Activation;
        let of = |kind, key, activation| TILES.map(|tile| requantises(kind, Some(key), activation, tile));
        let (every, none) = ([true; TILES.len()], [false; TILES.len()]);
        for kind in KINDS {
            for limit in [None, Some(7.0)] {
                let silu = Activation::Silu { limit };
                let found = if kind == Kind::Fp8Block { [true, false, false] } else { none };
                assert_eq!(of(kind, FP8_DYNAMIC_128_SYM, silu), found);
                let fp8 = matches!(kind, Kind::Fp8 | Kind::Fp8Fast);
                assert_eq!(of(kind, FP8_STATIC_TENSOR_SYM, silu), if fp8 { every } else { none });
                assert_eq!(of(kind, INT8_STATIC_TENSOR_SYM, silu), if kind == Kind::Int8 { every } else { none });
                assert_eq!(of(kind, FP8_DYNAMIC_TOKEN_SYM, silu), none);
            }
            for key in [FP8_DYNAMIC_128_SYM, FP8_STATIC_TENSOR_SYM, INT8_STATIC_TENSOR_SYM] {
                assert_eq!(of(kind, key, Activation::GeluTanh), none);
                assert_eq!(of(kind, key, Activation::Relu2NoMul), none);
            }
        }
    }

    #[test]
    fn a_build_for_hopper_has_the_kernels() {
        use crate::cuda::{FATBINS, NOT_BUILT};
        let for_hopper = |f: &crate::cuda::Fatbin| f.name == "permute" && f.archs.contains(&"90a");
        if let Some(why) =
            NOT_BUILT.or((!FATBINS.iter().any(for_hopper)).then_some("90a is not among the architectures"))
        {
            return println!("skipped: {why}");
        }
        for name in KINDS.iter().flat_map(|k| k.fatbins()) {
            assert!(FATBINS.iter().any(|f| f.name == name), "{name} is not in the table");
        }
    }

    #[test]
    fn warpgroups_share_out_the_registers_that_a_block_is_launched_with() {
        let source = include_str!("../../../kernels/wgmma.cu");
        let registers = 65536 / THREADS as u32 / 8 * 8;
        assert!(source.contains(&format!("kProducer = 3 * {registers} - 2 * kMath<kN>;")), "{registers}");
        for f in crate::cuda::FATBINS.iter().filter(|f| f.name.starts_with("wgmma_")) {
            assert!(f.resources.iter().all(|r| r.registers == registers), "{:?}", f.resources);
        }
    }

    #[test]
    fn every_tile_has_a_ring_on_hopper() {
        for kind in KINDS {
            for tile in TILES {
                let ring = Ring::new(kind, tile, HOPPER).unwrap();
                assert!(
                    ring.depth >= 4 && ring.depth <= MAX_DEPTH && ring.shared <= HOPPER,
                    "{kind:?} {tile} {ring:?}"
                );
            }
        }
        assert_eq!(Ring::new(Kind::Half, 128, 99 << 10), None);
    }

    #[test]
    fn the_kernels_have_the_same_numbers() {
        let task = include_str!("../../../kernels/wgmma/task.cuh");
        for text in [
            "kWarpgroup = 128, kMathGroups = 2,",
            "kSlabs = 4 * kMathGroups, kRows = 16 * kSlabs;",
            "kCluster = 2;",
            "kMaxDepth = 16;",
            "kPiece = 32;",
            "kTasks = 4, kFacts = 2;",
            "kTaskBytes = 16;",
            "kStaged = 2 * kPiece * 128;",
            "kFactBytes = 8 * (kN + kRows) + (kStoredScales ? 16 : 0);",
            "kRequantises = kBlockScales && kN <= 64;",
            "kLargest = kRequantises ? 2 * kN * kMathGroups * kCluster : 0;",
            "kSpan = kN <= 64 ? 2 : 1;",
        ] {
            assert!(task.contains(text), "{text}");
        }
        let kind = include_str!("../../../kernels/wgmma/kind.cuh");
        assert!(kind.contains("kRowBytes = 128,") && kind.contains("kScaleBytes = kBlockScales ? 64 : 0"));
        assert!(kind.contains("kStoredScales = !kHalf && !kBlockScales;"));
        let entries = include_str!("../../../kernels/wgmma.cu");
        for tile in TILES {
            assert!(entries.contains(&format!("MOE_ENTRY({tile})")), "{tile}");
        }
    }
}
