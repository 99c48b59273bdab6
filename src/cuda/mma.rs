//! The grouped GEMM for any number of tokens: sort by expert, lay the tokens out in that order, gate and up with the
//! activation, down, sum over a token's experts (kernels/permute.cu, kernels/mma.cu).

use super::activation::Activation;
use super::call::{BatchedTensors, Tensors};
use super::launch::{Arg, Launch};
use super::memory::DevicePtr;
use super::module::Kernel;
use super::pack::{Codes, Compute, Format, PackedExperts, StageScales};
use super::permute::{Permute, Planes, ROW_BYTES, Source, Sum, TILE_BYTES, max_tiles};
use super::projection::Matrix;
use super::{CudaError, Stream};
use crate::config::{ActivationFormat, MoeConfig};

/// Places of a ring at most, and where the first begins; kernels/mma/task.cuh has the same.
const MAX_DEPTH: usize = 8;
const RING_AT: usize = 32 * MAX_DEPTH;
/// Warps of a block.
const WARPS: usize = 4;
/// (token, slot) pairs that go through one pass.
const MAX_ASSIGNMENTS: usize = 1 << 18;
/// What a block's shared memory costs beside what it asks for; also what a multiprocessor has beyond a block's most.
const RESERVED: usize = 1 << 10;

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

    const fn entry(self) -> &'static str {
        ["moe_mma_16", "moe_mma_32", "moe_mma_64", "moe_mma_128"][self as usize]
    }

    /// Whether a warp takes 64 rows; kernels/mma/task.cuh has the same, and what follows.
    const fn wide(self, format: Format) -> bool {
        match self {
            Tile::T16 | Tile::T32 => false,
            Tile::T64 => !matches!((format.codes, format.scales), (Codes::Half, _) | (_, StageScales::Half(..))),
            Tile::T128 => true,
        }
    }

    /// Slabs of a block.
    const fn slabs(self, format: Format) -> usize {
        if matches!(self, Tile::T64) && self.wide(format) { 16 } else { 8 }
    }

    /// Floats of a token's results in shared memory.
    const fn pitch(self, format: Format) -> usize {
        16 * self.slabs(format) + 4
    }

    /// Blocks that a multiprocessor's registers hold.
    const fn resident(self, format: Format) -> usize {
        match self {
            Tile::T16 => 6,
            Tile::T32 => 4,
            _ if self.wide(format) => 2,
            _ => 3,
        }
    }

    /// The tile for so many assignments to so many experts: the smallest that most experts' tokens fit, so that their
    /// weights are read and unpacked once. The largest pays only where smaller ones have warps of few rows and most of its
    /// columns hold tokens (benches/RESULTS.md has the times).
    fn of(format: Format, assignments: usize, experts: usize) -> Self {
        let mean = assignments as f64 / experts as f64;
        // One standard deviation more than the mean.
        let most = mean + mean.sqrt();
        let full = if format.codes == Codes::Half { 256.0 } else { 512.0 };
        let largest = if !Tile::T64.wide(format) && mean >= full { Tile::T128 } else { Tile::T64 };
        Tile::ALL.into_iter().find(|t| most <= t.tokens() as f64).map_or(largest, |t| t.min(largest))
    }
}

/// As `ScaleLayout` in kernels/common/dequant.cuh.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct ScaleLayout {
    groups: i32,
    stride: i32,
    zero: i32,
    bf16: i32,
}

/// As `GemmParams` in kernels/mma.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct GemmParams {
    weights: Matrix,
    x: u64,
    rows: u64,
    routing: u64,
    tiles: u64,
    out: u64,
    plane: i64,
    out_columns: i32,
    row_tiles: i32,
    depth: i16,
    weights_depth: i16,
    kind: i32,
    scales: ScaleLayout,
    activation: Activation,
}

// The kernels assert the same.
const _: () = assert!(size_of::<GemmParams>() == 136);

/// `Kind` in kernels/mma.cu.
const FIRST: i32 = 0;
const SECOND: i32 = 1;
const BATCHED: i32 = 2;

/// A block's shared memory: a ring of stages, or, for many tokens, rings of token blocks and of weight stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ring {
    depth: usize,
    weights_depth: usize,
    shared: usize,
}

impl Ring {
    /// As many blocks to a multiprocessor as its registers and memory hold with rings deep enough; one more stage in flight
    /// is worth more than one more block. `shared` bytes are what a block may have.
    fn new(format: Format, tile: Tile, shared: usize) -> Option<Self> {
        let blocks = blocks(format);
        let tokens = tile.tokens() * ROW_BYTES;
        let weights = tile.slabs(format) * (blocks * format.block_bytes() + format.scale_bytes());
        let results = 4 * tile.pitch(format) * tile.tokens();
        let fit = |least: usize| {
            (1..=tile.resident(format)).rev().find_map(|resident| {
                let each = ((shared + RESERVED) / resident).saturating_sub(RESERVED).min(shared);
                let room = each.checked_sub(RING_AT)?;
                let (depth, weights_depth, used) = if tile.wide(format) {
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
        if tile.wide(format) { fit(2) } else { fit(3).or_else(|| fit(2)) }
    }
}

/// Blocks of 64 columns that a stage has.
fn blocks(format: Format) -> usize {
    if format.codes == Codes::Half { 1 } else { 2 }
}

/// `kLift` in kernels/common/dequant.cuh.
fn lifts(format: Format) -> bool {
    matches!(
        (format.codes, format.compute, format.scales),
        (Codes::E4m3, Compute::Bf16, StageScales::None | StageScales::F32(_))
    )
}

/// What a call works on: device addresses.
#[derive(Clone, Copy)]
struct Call {
    source: Source,
    hidden: u64,
    /// Sorted assignments, or 0.
    rows: u64,
    /// Routing weights that multiply the input, or 0.
    routing: u64,
    tiles: u64,
    /// Tokens in the plan's order.
    x: u64,
    middle: u64,
    out: u64,
    last: i32,
    /// Rows of the planes.
    assignments: usize,
}

/// A layer's kernels. The packed projections belong to another: see [`new`](Mma::new).
pub(super) struct Mma {
    /// By tile, as far as a block's shared memory allows.
    kernels: [Option<(Kernel, Ring)>; 4],
    permute: Permute,
    matrices: [Matrix; 2],
    scales: ScaleLayout,
    format: Format,
    config: MoeConfig,
    x: Planes,
    middle: Planes,
    /// Instead of the one that suits a call's size.
    pub tile: Option<Tile>,
}

impl Mma {
    /// Loads the kernels. `matrices` are the packed experts' projections on the device, gate and up first, and must stay
    /// there as long as this is used.
    pub fn new(
        stream: &Stream,
        packed: &PackedExperts,
        matrices: [Matrix; 2],
        config: &MoeConfig,
    ) -> Result<Self, CudaError> {
        let gpu = stream.gpu();
        let format = packed.format;
        let fatbin = format.mma_fatbin().ok_or(CudaError::NoKernel("mma"))?;
        let mut kernels = [const { None }; 4];
        for (place, tile) in kernels.iter_mut().zip(Tile::ALL) {
            if let Some(ring) = Ring::new(format, tile, gpu.info().shared_per_block) {
                let kernel = gpu.kernel(fatbin, tile.entry())?;
                kernel.allow_shared(ring.shared)?;
                *place = Some((kernel, ring));
            }
        }
        if kernels[0].is_none() {
            return Err(CudaError::Argument("this GPU has too little shared memory for cuda_mma"));
        }
        let planes = |blocks: usize| Planes { count: blocks, lift: lifts(format) };
        Ok(Self {
            kernels,
            permute: Permute::new(gpu, config)?,
            matrices,
            scales: ScaleLayout {
                groups: format.scales.groups() as i32,
                stride: 4 * format.scales.registers() as i32,
                zero: i32::from(format.scales.zeros()),
                bf16: i32::from(format.scale_bf16),
            },
            format,
            config: *config,
            x: planes(packed.first.blocks),
            middle: planes(packed.second.blocks),
            tile: None,
        })
    }

    /// Tokens that go through one pass.
    fn group(&self) -> usize {
        MAX_ASSIGNMENTS / self.config.topk
    }

    /// Bytes of workspace for up to `tokens` tokens, or slots of an expert in the batched format.
    pub fn workspace_bytes(&self, tokens: usize) -> usize {
        Parts::new(self, tokens).map_or(usize::MAX, |p| p.all)
    }

    /// The kernel for so many assignments: of the wanted tile, or the largest below it that this GPU runs.
    fn kernel(&self, assignments: usize, experts: usize) -> Result<(Tile, &Kernel, Ring), CudaError> {
        let wanted = self.tile.unwrap_or_else(|| Tile::of(self.format, assignments, experts));
        let fitting = Tile::ALL.into_iter().zip(&self.kernels).rev().filter(|(t, _)| *t <= wanted);
        let found = fitting.into_iter().find_map(|(tile, k)| k.as_ref().map(|(kernel, ring)| (tile, kernel, *ring)));
        found.ok_or(CudaError::NoKernel("mma"))
    }

    /// Runs the layer; does not wait.
    ///
    /// # Safety
    /// As for [`CudaKernel::forward`](super::CudaKernel::forward); the map has an entry per expert.
    pub unsafe fn forward(
        &self,
        stream: &Stream,
        t: &Tensors<'_>,
        tokens: usize,
        map: Option<DevicePtr<'_, i32>>,
    ) -> Result<(), CudaError> {
        let c = &self.config;
        let parts = Parts::new(self, tokens).ok_or(TOO_LARGE)?;
        t.check(c, tokens, parts.all)?;
        for start in (0..tokens).step_by(self.group()) {
            let n = (tokens - start).min(self.group());
            let assignments = n * c.topk;
            let at = |base: u64, row: usize, element: usize| base + (start * row * element) as u64;
            let (ids, weights) = (at(t.topk_ids.address(), c.topk, 4), at(t.topk_weights.address(), c.topk, 4));
            let workspace = t.workspace.address();
            let map = map.map_or(0, |m| m.address());
            let rows = workspace + parts.rows as u64;
            let call = Call {
                source: Source::Ids { ids, map, rows, assignments },
                hidden: at(t.hidden.address(), c.hidden, 2),
                rows,
                routing: if c.weight_on_input { weights } else { 0 },
                tiles: workspace,
                x: workspace + parts.x as u64,
                middle: workspace + parts.middle as u64,
                // When results are written, the tokens have been read.
                out: workspace + parts.x as u64,
                last: SECOND,
                assignments,
            };
            let sum = Sum { results: call.out, ids, weights, map, output: at(t.output.address(), c.hidden, 2) };
            // SAFETY: lengths were checked, the parts of the workspace hold what a pass of `group` tokens makes, the
            // packed experts stay (`new`); the rest is the caller's promise.
            unsafe {
                self.gemms(stream, call, c.experts)?;
                self.permute.combine(stream, sum, n)?;
            }
        }
        Ok(())
    }

    /// Runs the layer in the batched format, `max` slots to an expert; does not wait.
    ///
    /// # Safety
    /// As for [`forward`](Self::forward).
    pub unsafe fn forward_batched(&self, stream: &Stream, t: &BatchedTensors<'_>, max: usize) -> Result<(), CudaError> {
        let c = &self.config;
        let parts = Parts::new(self, max).ok_or(TOO_LARGE)?;
        t.check(c, max, parts.all)?;
        let workspace = t.workspace.address();
        let call = Call {
            source: Source::Counts { counts: t.counts.address(), max },
            hidden: t.hidden.address(),
            rows: 0,
            routing: 0,
            tiles: workspace,
            x: workspace + parts.x as u64,
            middle: workspace + parts.middle as u64,
            out: t.output.address(),
            last: BATCHED,
            assignments: max * c.local_experts,
        };
        // SAFETY: as above.
        unsafe { self.gemms(stream, call, c.local_experts) }
    }

    /// The plan, the tokens in its order, and both projections. The assignments are to one of `experts` experts each.
    ///
    /// # Safety
    /// The call's addresses must be device memory as the kernels want them for so many assignments.
    unsafe fn gemms(&self, stream: &Stream, call: Call, experts: usize) -> Result<(), CudaError> {
        let c = &self.config;
        let (tile, kernel, ring) = self.kernel(call.assignments, experts)?;
        let tiles = max_tiles(call.assignments, c.local_experts, tile.tokens());
        // SAFETY: the list of tiles has room for the smallest tile's, which are the most; the rest is the caller's promise.
        unsafe {
            self.permute.plan(stream, call.source, call.tiles, tile.tokens(), tiles)?;
            self.permute.lay_out(stream, call.source, call.hidden, call.x, self.x, call.assignments)?;
        }
        let [first, second] = self.matrices;
        let common = GemmParams {
            rows: call.rows,
            tiles: call.tiles,
            // Those of both have rows of as many bytes.
            plane: (call.assignments * ROW_BYTES) as i64,
            depth: ring.depth as i16,
            weights_depth: ring.weights_depth as i16,
            scales: self.scales,
            activation: Activation::of(c.activation),
            ..bytemuck::Zeroable::zeroed()
        };
        let first = GemmParams {
            weights: first,
            x: call.x,
            routing: call.routing,
            out: call.middle,
            out_columns: self.middle.columns() as i32,
            kind: FIRST,
            ..common
        };
        let second = GemmParams {
            weights: second,
            x: call.middle,
            out: call.out,
            out_columns: c.hidden as i32,
            kind: call.last,
            ..common
        };
        for params in [first, second] {
            let row_tiles = (params.weights.slabs as usize).div_ceil(tile.slabs(self.format));
            let blocks = row_tiles.checked_mul(tiles).and_then(|b| i32::try_from(b).ok()).ok_or(TOO_LARGE)?;
            let params = GemmParams { row_tiles: row_tiles as i32, ..params };
            let launch = Launch::new(blocks as u32, 32 * WARPS as u32).shared(ring.shared as u32).overlap(true);
            // SAFETY: the kernel's only parameter; the rest is the caller's promise.
            unsafe { launch.run(stream, kernel, &mut [Arg::new(&params)])? };
        }
        Ok(())
    }
}

const TOO_LARGE: CudaError = CudaError::Argument("the call is too large for the GPU's 32-bit counts: split the batch");

/// Where the parts of a workspace lie, in bytes; the list of tiles comes first.
struct Parts {
    rows: usize,
    /// Tokens in the plan's order, then the experts' results.
    x: usize,
    middle: usize,
    all: usize,
}

impl Parts {
    /// For `tokens` tokens, or slots of an expert; `None` where the kernels' 32-bit counts do not reach.
    fn new(mma: &Mma, tokens: usize) -> Option<Self> {
        let c = &mma.config;
        let batched = c.format == ActivationFormat::Batched;
        let assignments = match batched {
            // An expert's tiles are counted in 15 bits.
            true if tokens > 16 << 15 => return None,
            true => tokens.checked_mul(c.local_experts).filter(|n| *n <= i32::MAX as usize)?,
            false => tokens.min(mma.group()) * c.topk,
        };
        let rows = max_tiles(assignments, c.local_experts, Tile::T16.tokens()) * TILE_BYTES;
        // Bulk copies start at 16 bytes, but memory is read in lines.
        let x = (rows + if batched { 0 } else { assignments * 4 }).next_multiple_of(128);
        let results = if batched { 0 } else { assignments.checked_mul(c.hidden * 2)? };
        let middle = (x + mma.x.bytes(assignments)?.max(results)).next_multiple_of(128);
        Some(Self { rows, x, middle, all: middle + mma.middle.bytes(assignments)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: usize = 227 << 10;
    const ADA: usize = 99 << 10;

    fn format(codes: Codes, scales: StageScales) -> Format {
        Format { codes, scales, compute: Compute::Bf16, scale_bf16: false }
    }

    #[test]
    fn the_kernels_have_the_same_numbers() {
        let source = concat!(include_str!("../../kernels/mma.cu"), include_str!("../../kernels/mma/task.cuh"));
        for text in [
            "kWide = kN > 64 || (kN == 64 && Q::kWords < 4 && Format::kScale != Scale::kHalf);",
            "kResident = kN == 16 ? 6 : kN == 32 ? 4 : kWide ? 2 : 3;",
            "kWarps = 4, kThreads = 32 * kWarps;",
            "kWarpColumns = kN == 128 ? 2 : 1;",
            "kWarpSlabs = kWide ? 4 : 2;",
            "kSlabs = kWarps / kWarpColumns * kWarpSlabs;",
            "kPitch = 16 * kSlabs + 4;",
            "kMaxDepth = 8, kBarriers = 8 * kMaxDepth, kRingAt = 4 * kBarriers;",
            "kBlocks = Q::kWords == 4 ? 1 : 2;",
        ] {
            assert!(source.contains(text), "{text}");
        }
        for tile in Tile::ALL {
            let entry = format!("MOE_ENTRY({})", tile.tokens());
            assert!(source.contains(&entry), "{entry}");
            assert_eq!(tile.entry(), format!("moe_mma_{}", tile.tokens()));
        }
    }

    #[test]
    fn every_ring_fits_and_is_deep_enough() {
        for f in [
            format(Codes::Half, StageScales::None),
            format(Codes::E4m3, StageScales::F32(4)),
            format(Codes::E4m3, StageScales::E8m0),
            format(Codes::E2m1, StageScales::E4m3),
            format(Codes::U4, StageScales::Half(4, true)),
        ] {
            for tile in Tile::ALL {
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
    fn no_kernel_has_static_shared_memory_beside_its_ring() {
        use crate::cuda::{FATBINS, NOT_BUILT};
        if let Some(why) = NOT_BUILT {
            return println!("skipped: {why}");
        }
        for r in FATBINS.iter().filter(|f| f.name.starts_with("mma_")).flat_map(|f| f.resources) {
            assert_eq!(r.shared_bytes, 0, "{} on {}", r.kernel, r.arch);
        }
    }

    #[test]
    fn tiles_grow_with_the_tokens_of_an_expert() {
        let (half, int4) = (format(Codes::Half, StageScales::None), format(Codes::U4, StageScales::Half(1, false)));
        let fp8 = format(Codes::E4m3, StageScales::None);
        for (format, tokens, experts, topk, want) in [
            (int4, 9, 128, 8, Tile::T16),
            (int4, 64, 128, 8, Tile::T16),
            (int4, 256, 128, 8, Tile::T32),
            (int4, 1024, 128, 8, Tile::T64),
            (int4, 4096, 128, 8, Tile::T64),
            (int4, 4096, 8, 2, Tile::T128),
            (fp8, 4096, 8, 2, Tile::T64),
            (half, 1024, 128, 8, Tile::T64),
            (half, 4096, 128, 8, Tile::T128),
            (int4, 64, 8, 2, Tile::T32),
            (half, 1, 1, 1, Tile::T16),
        ] {
            assert_eq!(Tile::of(format, tokens * topk, experts), want, "{format:?} {tokens} {experts}");
        }
        let tiles: Vec<Tile> = (0..20_000).map(|t| Tile::of(half, t, 64)).collect();
        assert!(tiles.is_sorted());
    }
}
