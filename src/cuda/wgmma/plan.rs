//! What a call's size and the GPU make of the kernels: a tile and a ring. Pure functions.

use crate::cuda::pack::{Codes, Format, StageScales};

/// What kernels/wgmma/kind.cuh calls MOE_KIND.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// 16-bit weights and tokens.
    Half,
    /// e4m3, scales per row and token or tensor.
    Fp8,
    /// e4m3 with scales for every 128 columns.
    Fp8Block,
    /// int8, scales per row and token or tensor.
    Int8,
}

impl Kind {
    /// What serves packed weights, with quantised tokens or without.
    pub fn of(format: Format, quantised: bool) -> Option<Self> {
        match (format.codes, format.scales, quantised) {
            (Codes::Half, _, false) => Some(Kind::Half),
            (Codes::E4m3, StageScales::None, true) => Some(Kind::Fp8),
            (Codes::E4m3, StageScales::F32(1), true) => Some(Kind::Fp8Block),
            (Codes::Int8, StageScales::None, true) => Some(Kind::Int8),
            _ => None,
        }
    }

    /// The fatbins', by the compute type.
    pub fn fatbins(self) -> [&'static str; 2] {
        match self {
            Kind::Half => ["wgmma_half_bf16", "wgmma_half_f16"],
            Kind::Fp8 => ["wgmma_fp8_bf16", "wgmma_fp8_f16"],
            Kind::Fp8Block => ["wgmma_fp8_block_bf16", "wgmma_fp8_block_f16"],
            Kind::Int8 => ["wgmma_int8_bf16", "wgmma_int8_f16"],
        }
    }

    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        if self == Kind::Half { 2 } else { 1 }
    }

    /// Tokens of the largest tile, for whose sums there are registers.
    pub fn largest_tile(self) -> usize {
        match self {
            Kind::Half | Kind::Int8 => 256,
            Kind::Fp8 | Kind::Fp8Block => 128,
        }
    }
}

/// Tiles that the kernels have entries for, smallest first.
pub const TILES: [usize; 3] = [64, 128, 256];
/// Rows of a tile, in slabs.
pub const SLABS: usize = 8;
pub const THREADS: usize = 384;
/// Bytes of a token's row in a stage of K.
pub const STAGE_BYTES: usize = 128;
const MAX_DEPTH: usize = 16;

/// A block's ring in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    /// Stages.
    pub depth: usize,
    /// Bytes of all shared memory.
    pub shared: usize,
}

impl Ring {
    /// As deep as `shared` bytes allow; `None` with fewer than three stages.
    pub fn new(kind: Kind, tile: usize, shared: usize) -> Option<Self> {
        let promoted = matches!(kind, Kind::Fp8 | Kind::Fp8Block);
        let (slab, scales) = if kind == Kind::Fp8Block { (2048 + 64, 4 * tile) } else { (2048, 0) };
        let width = tile / if tile > if promoted { 64 } else { 128 } { 2 } else { 1 };
        let stage = tile * STAGE_BYTES + SLABS * slab + scales;
        let rest = 2 * width * 128 + 8 * tile + 2 * 8 * MAX_DEPTH;
        let depth = (shared.checked_sub(rest)? / stage).min(MAX_DEPTH);
        (depth >= 3).then_some(Self { depth, shared: rest + depth * stage })
    }
}

/// The tile for so many assignments to so many experts: the smallest that most experts' tokens fit.
pub fn tile(kind: Kind, assignments: usize, experts: usize) -> usize {
    let mean = assignments as f64 / experts as f64;
    let most = mean + mean.sqrt();
    let fitting = TILES.into_iter().find(|t| most <= *t as f64);
    fitting.map_or(kind.largest_tile(), |t| t.min(kind.largest_tile()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Kind; 4] = [Kind::Half, Kind::Fp8, Kind::Fp8Block, Kind::Int8];
    const HOPPER: usize = 227 << 10;

    #[test]
    fn every_tile_has_a_ring_on_hopper() {
        for kind in KINDS {
            for tile in TILES.into_iter().filter(|t| *t <= kind.largest_tile()) {
                let ring = Ring::new(kind, tile, HOPPER).unwrap();
                assert!(
                    ring.depth >= 4 && ring.depth <= MAX_DEPTH && ring.shared <= HOPPER,
                    "{kind:?} {tile} {ring:?}"
                );
            }
        }
        assert_eq!(Ring::new(Kind::Half, 256, 99 << 10), None);
    }

    #[test]
    fn tiles_grow_with_the_tokens_of_an_expert() {
        for (kind, tokens, experts, topk, want) in [
            (Kind::Half, 256, 128, 8, 64),
            (Kind::Half, 1024, 128, 8, 128),
            (Kind::Half, 4096, 128, 8, 256),
            (Kind::Fp8Block, 4096, 128, 8, 128),
            (Kind::Int8, 4096, 8, 2, 256),
            (Kind::Int8, 1, 1, 1, 64),
        ] {
            assert_eq!(tile(kind, tokens * topk, experts), want, "{kind:?} {tokens} {experts}");
        }
        for kind in KINDS {
            assert!((0..20_000).map(|t| tile(kind, t, 64)).is_sorted());
        }
    }
}
