//! How a block of the grouped GEMM shares a matrix and an expert's tokens, and what its shared memory holds.

use crate::cuda::pack::{Codes, Format, StageScales};
use crate::cuda::permute::ROW_BYTES;

/// Places of a ring at most, and where the first begins; kernels/mma/task.cuh has the same.
const MAX_DEPTH: usize = 8;
const RING_AT: usize = 32 * MAX_DEPTH;
/// What a thread keeps in shared memory where warps have rows of their own; kernels/mma/own_rows.cuh has the same.
const KEPT: usize = 16 + 4 * 8;
/// Warps of a block.
pub(super) const WARPS: usize = 4;
/// What a block's shared memory costs beside what it asks for; also what a multiprocessor has beyond a block's most.
const RESERVED: usize = 1 << 10;

/// How a matrix's slab comes to a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Operands {
    /// Bytes of a block's codes.
    block_bytes: usize,
    /// Blocks of a stage.
    blocks: usize,
    /// Bytes of a stage's scales, and the most that formats with such scales have.
    scale_bytes: usize,
    most_scale_bytes: usize,
    /// Whether warps take 64 rows for 64 tokens.
    wide: bool,
}

impl Operands {
    /// Unpacked to 16 bits; kernels/mma/task.cuh has the same.
    pub fn of(format: Format) -> Self {
        let unpacked = format.codes != Codes::Half;
        Self {
            block_bytes: format.block_bytes(),
            blocks: if unpacked { 2 } else { 1 },
            scale_bytes: format.scale_bytes(),
            most_scale_bytes: match format.scales {
                StageScales::None => 0,
                StageScales::E8m0 => 64,
                StageScales::E4m3 => 128,
                StageScales::F32(_) | StageScales::Half(..) => 256,
            },
            wide: unpacked && !matches!((format.codes, format.scales), (Codes::Int8, StageScales::Half(..))),
        }
    }

    /// int8 codes that are multiplied as they are: a block has the columns of two.
    pub fn whole(format: Format) -> Self {
        Self { block_bytes: 2 * format.block_bytes(), blocks: 1, scale_bytes: 0, most_scale_bytes: 0, wide: false }
    }
}

/// How many tokens of one expert a block of the grouped GEMM takes at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tile {
    /// 16
    T16,
    /// 32
    T32,
    /// 64
    T64,
    /// 128
    T128,
}

impl Tile {
    /// Smallest first.
    pub const ALL: [Tile; 4] = [Tile::T16, Tile::T32, Tile::T64, Tile::T128];

    /// Tokens.
    pub const fn tokens(self) -> usize {
        16 << self as usize
    }

    pub(super) const fn entry(self) -> &'static str {
        ["moe_mma_16", "moe_mma_32", "moe_mma_64", "moe_mma_128"][self as usize]
    }

    /// Whether a warp takes 64 rows; kernels/mma/task.cuh has the same, and what follows.
    const fn wide(self, operands: Operands) -> bool {
        match self {
            Tile::T16 | Tile::T32 => false,
            Tile::T64 => operands.wide,
            Tile::T128 => true,
        }
    }

    /// Slabs of a block.
    pub(super) const fn slabs(self, operands: Operands) -> usize {
        if matches!(self, Tile::T64) && self.wide(operands) { 16 } else { 8 }
    }

    /// Floats of a token's results in shared memory.
    const fn pitch(self, operands: Operands) -> usize {
        16 * self.slabs(operands) + 4
    }

    /// Blocks that a multiprocessor's registers hold.
    const fn resident(self, operands: Operands) -> usize {
        match self {
            Tile::T16 => 6,
            Tile::T32 => 4,
            _ if self.wide(operands) => 2,
            _ => 3,
        }
    }

    /// The tile for so many assignments to so many experts: the smallest that most experts' tokens fit, so that their
    /// weights are read and unpacked once. The largest pays only where nothing is unpacked and most of its columns hold
    /// tokens (benches/RESULTS.md has the times).
    pub(super) fn of(operands: Operands, assignments: usize, experts: usize) -> Self {
        let mean = assignments as f64 / experts as f64;
        // One standard deviation more than the mean.
        let most = mean + mean.sqrt();
        let full = if operands.blocks == 1 { 256.0 } else { 512.0 };
        let largest = if !operands.wide && mean >= full { Tile::T128 } else { Tile::T64 };
        Tile::ALL.into_iter().find(|t| most <= t.tokens() as f64).map_or(largest, |t| t.min(largest))
    }
}

/// A block's shared memory: a ring of stages; where warps have rows of their own, two stages of tokens and scales and one of
/// weights; with tiles of 128, rings of token blocks and of weight stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ring {
    pub depth: usize,
    pub weights_depth: usize,
    pub shared: usize,
}

impl Ring {
    /// As many blocks to a multiprocessor as its registers and memory hold with rings deep enough; one more stage in flight
    /// is worth more than one more block. `shared` bytes are what a block may have. `None` where they do not suffice, or there is
    /// no such kernel: that of 128 tokens, where those of 64 have warps with rows of their own.
    pub fn new(operands: Operands, tile: Tile, shared: usize) -> Option<Self> {
        if matches!(tile, Tile::T128) && operands.wide {
            return None;
        }
        let blocks = operands.blocks;
        let tokens = tile.tokens() * ROW_BYTES;
        let weights = tile.slabs(operands) * (blocks * operands.block_bytes + operands.scale_bytes);
        let results = 4 * tile.pitch(operands) * tile.tokens();
        if matches!(tile, Tile::T64) && tile.wide(operands) {
            let weights = tile.slabs(operands) * (blocks * operands.block_bytes + 2 * operands.most_scale_bytes);
            let used = 2 * blocks * tokens + weights + 32 * WARPS * KEPT;
            let all = RING_AT + used.max(results);
            return (all <= shared).then_some(Ring { depth: 2, weights_depth: 1, shared: all });
        }
        let fit = |least: usize| {
            (1..=tile.resident(operands)).rev().find_map(|resident| {
                let each = ((shared + RESERVED) / resident).saturating_sub(RESERVED).min(shared);
                let room = each.checked_sub(RING_AT)?;
                let (depth, weights_depth, used) = if tile.wide(operands) {
                    // A stage of weights is sent for no later than the tokens of its first block.
                    let with = |weights_depth: usize| {
                        let left = room.checked_sub(weights_depth * weights)?;
                        let depth = (left / tokens).min(blocks * (weights_depth - 1) + 1).min(MAX_DEPTH);
                        Some((depth, weights_depth, depth * tokens + weights_depth * weights))
                    };
                    (2..=MAX_DEPTH).rev().filter_map(with).max_by_key(|r| r.0)?
                } else {
                    let place = blocks * tokens + weights;
                    let depth = (room / place).min(MAX_DEPTH);
                    (depth, depth, depth * place)
                };
                let shared = RING_AT + used.max(results);
                (depth.min(weights_depth) >= least && shared <= each).then_some(Ring { depth, weights_depth, shared })
            })
        };
        if tile.wide(operands) { fit(2) } else { fit(3).or_else(|| fit(2)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::pack::Compute;

    const H200: usize = 227 << 10;
    const ADA: usize = 99 << 10;

    fn operands(codes: Codes, scales: StageScales) -> Operands {
        Operands::of(Format { codes, scales, compute: Compute::Bf16, scale_bf16: false })
    }

    fn whole() -> Operands {
        let scales = StageScales::None;
        Operands::whole(Format { codes: Codes::Int8, scales, compute: Compute::Bf16, scale_bf16: false })
    }

    #[test]
    fn the_kernels_have_the_same_numbers() {
        let source = concat!(include_str!("../../../kernels/mma.cu"), include_str!("../../../kernels/mma/task.cuh"));
        for text in [
            "kOwnRows = kN == 64 && Q::kWords < (Format::kScale == Scale::kHalf ? 2 : 4);",
            "kWide = kN > 64 || kOwnRows;",
            "kResident = kN == 16 ? 6 : kN == 32 ? 4 : kWide ? 2 : 3;",
            "kWarps = 4, kThreads = 32 * kWarps;",
            "kWarpColumns = kN == 128 ? 2 : 1;",
            "kWarpSlabs = kWide ? 4 : 2;",
            "kSlabs = kWarps / kWarpColumns * kWarpSlabs;",
            "kPitch = 16 * kSlabs + 4;",
            "kMaxDepth = 8, kBarriers = 8 * kMaxDepth, kRingAt = 4 * kBarriers;",
            "kBlocks = Q::kWords == 4 ? 1 : 2;",
            "kScale == Scale::kNone   ? 0",
            "kScale == Scale::kE8m0 ? 64",
            "kScale == Scale::kE4m3 ? 128",
            ": 256;",
        ] {
            assert!(source.contains(text), "{text}");
        }
        assert!(source.contains("if constexpr (kN == 128 && Shape<64>::kOwnRows) {"));
        for tile in Tile::ALL {
            let entry = format!("MOE_ENTRY({})", tile.tokens());
            assert!(source.contains(&entry), "{entry}");
            assert_eq!(tile.entry(), format!("moe_mma_{}", tile.tokens()));
        }
    }

    #[test]
    fn every_ring_fits_and_is_deep_enough() {
        for f in [
            operands(Codes::Half, StageScales::None),
            operands(Codes::E4m3, StageScales::F32(4)),
            operands(Codes::E4m3, StageScales::E8m0),
            operands(Codes::E2m1, StageScales::E4m3),
            operands(Codes::U4, StageScales::Half(4, true)),
            whole(),
        ] {
            assert_eq!(Ring::new(f, Tile::T128, H200).is_none(), f.wide, "{f:?}");
            for tile in Tile::ALL.into_iter().filter(|t| *t < Tile::T128 || !f.wide) {
                let ring = Ring::new(f, tile, H200).unwrap();
                assert!((2..=MAX_DEPTH).contains(&ring.depth), "{f:?} {tile:?} {ring:?}");
                assert!(
                    ring.shared <= H200 && ring.shared >= 4 * tile.pitch(f) * tile.tokens(),
                    "{f:?} {tile:?} {ring:?}"
                );
            }
            // The smallest tile fits everywhere, so that every layer has a kernel.
            assert!(Ring::new(f, Tile::T16, ADA).is_some_and(|r| r.shared <= ADA));
        }
    }

    #[test]
    fn tiles_grow_with_the_tokens_of_an_expert() {
        let (half, int4) = (operands(Codes::Half, StageScales::None), operands(Codes::U4, StageScales::Half(1, false)));
        let fp8 = operands(Codes::E4m3, StageScales::None);
        for (operands, tokens, experts, topk, want) in [
            (int4, 9, 128, 8, Tile::T16),
            (int4, 64, 128, 8, Tile::T16),
            (int4, 256, 128, 8, Tile::T32),
            (int4, 1024, 128, 8, Tile::T64),
            (int4, 4096, 128, 8, Tile::T64),
            (int4, 4096, 8, 2, Tile::T64),
            (fp8, 4096, 8, 2, Tile::T64),
            (half, 1024, 128, 8, Tile::T64),
            (half, 4096, 128, 8, Tile::T128),
            (int4, 64, 8, 2, Tile::T32),
            (half, 1, 1, 1, Tile::T16),
        ] {
            assert_eq!(Tile::of(operands, tokens * topk, experts), want, "{operands:?} {tokens} {experts}");
        }
        let tiles: Vec<Tile> = (0..20_000).map(|t| Tile::of(half, t, 64)).collect();
        assert!(tiles.is_sorted());
    }
}
