//! What surrounds a grouped GEMM: the plan of its tiles, the tokens in the plan's order, and the sum over a token's experts
//! (kernels/permute.cu).

use super::launch::{Arg, Launch};
use super::module::Kernel;
use super::operands::OrderedPlanes;
use super::{CudaError, Gpu, Stream};
use crate::config::{InputType, MoeConfig};

/// Local experts at most: one per thread of the plan's block.
pub(super) const MAX_EXPERTS: usize = 1024;
/// Slots of a token at most.
pub(super) const MAX_TOPK: usize = 32;
/// Bytes of an entry of the list of tiles.
pub(super) const TILE_BYTES: usize = 16;
/// Threads of the plan's only block, and of a block of the sum.
const PLAN_THREADS: u32 = 1024;
const COMBINE_THREADS: usize = 256;
/// Assignments that a block sorts alone, and with others at least. More blocks than `PARTS` read each other's counts for longer
/// than they save.
const ALONE: usize = 1024;
const PART: usize = 512;
const PARTS: usize = 64;
const SPREAD_THREADS: usize = 256;
/// Slots of the batched format that a block takes.
const SPREAD_SLOTS: usize = 8;
const TOO_LARGE: CudaError = CudaError::Argument("the call is too large for a grid of the GPU: split the batch");
/// Warps of a block that lays tokens out, and the 16-byte chunks of a row that each copies.
const LAY_OUT_WARPS: usize = 8;
const LAY_OUT_CHUNKS: usize = 32 * 4;

/// As `PlanParams` in kernels/permute.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct PlanParams {
    ids: u64,
    map: u64,
    counts: u64,
    rows: u64,
    tiles: u64,
    places: u64,
    parts: u64,
    stored: u64,
    scales: [u64; 2],
    taken: u64,
    assignments: i32,
    experts: i32,
    local_experts: i32,
    max_tokens: i32,
    tile: i32,
    max_tiles: i32,
    part: i32,
    align: i32,
    rows_count: i32,
    largest_first: i32,
}

/// As `LayOutParams` in kernels/permute.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct LayOutParams {
    x: u64,
    rows: u64,
    counts: u64,
    planes: u64,
    count: i32,
    topk: i32,
    max_tokens: i32,
    eights: i32,
    planes_count: i32,
    lift: i32,
}

/// As `SpreadParams` in kernels/permute.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct SpreadParams {
    x: u64,
    places: u64,
    planes: u64,
    rows: i32,
    topk: i32,
    eights: i32,
    planes_count: i32,
    tokens: i32,
    unused: i32,
}

/// As `CombineParams` in kernels/permute.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct CombineParams {
    results: u64,
    ids: u64,
    weights: u64,
    map: u64,
    output: u64,
    topk: i32,
    experts: i32,
    local_experts: i32,
    hidden: i32,
}

// The kernels assert the same.
const _: () = assert!(
    size_of::<SpreadParams>() == 48
        && size_of::<PlanParams>() == 128
        && size_of::<CombineParams>() == 56
        && size_of::<LayOutParams>() == 56
);

/// The most tiles of at most `tile` assignments that so many assignments to so many experts make.
pub(super) fn max_tiles(assignments: usize, experts: usize, tile: usize) -> usize {
    // Every expert leaves at most one tile unfilled.
    assignments / tile + experts.min(assignments)
}

/// The most rows that so many assignments to so many experts have, where each expert's begin at a multiple of `align`; itself
/// such a multiple.
pub(super) fn max_rows(assignments: usize, experts: usize, align: usize) -> usize {
    (assignments + (align - 1) * experts.min(assignments)).next_multiple_of(align)
}

/// What is sorted: ids of a call, or the counts of the batched format.
#[derive(Clone, Copy)]
pub(super) enum Source {
    /// `[assignments]` global ids; the map or 0; where the sorted assignments go, as many as [`max_rows`] says.
    Ids { ids: u64, map: u64, rows: u64, assignments: usize },
    /// `[local experts]` token counts of at most `max` slots each; where the slots with tokens go together, as for ids, or 0
    /// where they stay as they lie.
    Counts { counts: u64, max: usize, rows: u64 },
}

/// What is planned.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    /// `[max_tiles]` entries, written
    pub tiles: u64,
    /// Assignments of a tile at most.
    pub tile: usize,
    /// No less than [`max_tiles`] says.
    pub max_tiles: usize,
    /// An expert's rows begin at a multiple of this.
    pub align: usize,
    /// `[assignments]`, or slots, written with the sorted ones: the row of each, or -1; or 0
    pub places: u64,
    /// Stored scales by expert: `[2][local experts]` f32, and where those of each row go, for both projections; or 0.
    pub stored: u64,
    pub scales: [u64; 2],
    /// Two counters of 32 bits that are made zero, or 0.
    pub taken: u64,
    /// Whether experts with larger tiles come first in the list, which takes time where experts are many.
    pub largest_first: bool,
    /// [`scratch_bytes`] of the assignments, that nothing else uses before the plan is made.
    pub scratch: u64,
}

/// How many of so many assignments a block sorts.
fn part(assignments: usize) -> usize {
    if assignments <= ALONE { ALONE } else { assignments.div_ceil(PARTS).max(PART) }
}

/// Blocks that share the sorting of so many assignments.
fn parts(assignments: usize) -> usize {
    assignments.div_ceil(part(assignments)).max(1)
}

/// Bytes that the plan of so many assignments to so many local experts works with.
pub(super) fn scratch_bytes(assignments: usize, experts: usize) -> usize {
    if parts(assignments) > 1 { parts(assignments) * experts * 4 } else { 0 }
}

/// Bytes of a token's row in a plane, which holds 64 columns, or 128 of int8.
pub(super) const ROW_BYTES: usize = 128;

/// How tokens lie for the grouped GEMM: `[planes][rows][ROW_BYTES]`, see kernels/common/planes.cuh.
#[derive(Clone, Copy)]
pub(super) struct Planes {
    pub count: usize,
    /// Multiplied by 2^80.
    pub lift: bool,
}

impl Planes {
    /// Bytes for so many rows.
    pub fn bytes(self, rows: usize) -> Option<usize> {
        rows.checked_mul(self.count * ROW_BYTES)
    }
}

/// The kernels.
pub(super) struct Permute {
    count: Kernel,
    plan: Kernel,
    lay_out: Kernel,
    spread: Kernel,
    spread_slots: Kernel,
    combine: Kernel,
    config: MoeConfig,
}

/// Addresses of a sum's operands.
#[derive(Clone, Copy)]
pub(super) struct Sum {
    /// `[tokens * topk, hidden]`, 16-bit
    pub results: u64,
    /// `[tokens, topk]`
    pub ids: u64,
    /// `[tokens, topk]`
    pub weights: u64,
    /// `[experts]` or 0
    pub map: u64,
    /// `[tokens, hidden]`, 16-bit, written
    pub output: u64,
}

impl Permute {
    pub fn new(gpu: &Gpu, config: &MoeConfig) -> Result<Self, CudaError> {
        if config.local_experts > MAX_EXPERTS || config.topk > MAX_TOPK {
            return Err(CudaError::Argument("cuda_mma takes at most 1024 local experts and a top-k of at most 32"));
        }
        let combine = if config.input == InputType::F16 { "moe_combine_f16" } else { "moe_combine_bf16" };
        let kernel = |entry| gpu.kernel("permute", entry);
        Ok(Self {
            count: kernel("moe_count")?,
            plan: kernel("moe_plan")?,
            lay_out: kernel("moe_lay_out")?,
            spread: kernel("moe_spread")?,
            spread_slots: kernel("moe_spread_slots")?,
            combine: kernel(combine)?,
            config: *config,
        })
    }

    /// Writes the tiles and the sorted assignments.
    ///
    /// # Safety
    /// The addresses must be device memory of the sizes that [`Source`] and [`Plan`] name, and as [`Launch::run`] wants them.
    /// All counts must fit 32 bits.
    pub unsafe fn plan(&self, stream: &Stream, source: Source, plan: Plan) -> Result<(), CudaError> {
        let c = &self.config;
        let common = PlanParams {
            tiles: plan.tiles,
            places: plan.places,
            stored: plan.stored,
            scales: plan.scales,
            taken: plan.taken,
            experts: c.experts as i32,
            local_experts: c.local_experts as i32,
            tile: plan.tile as i32,
            max_tiles: plan.max_tiles as i32,
            align: plan.align as i32,
            largest_first: i32::from(plan.largest_first),
            ..bytemuck::Zeroable::zeroed()
        };
        let params = match source {
            Source::Ids { ids, map, rows, assignments } => {
                let several = parts(assignments) > 1;
                let scratch = if several { plan.scratch } else { 0 };
                let rows_count = max_rows(assignments, c.local_experts, plan.align) as i32;
                PlanParams { ids, map, rows, parts: scratch, assignments: assignments as i32, rows_count, ..common }
            }
            Source::Counts { counts, max, rows } => {
                let slots = if rows == 0 { 0 } else { max * c.local_experts };
                let rows_count = max_rows(slots, c.local_experts, plan.align) as i32;
                let assignments = slots as i32;
                PlanParams { counts, max_tokens: max as i32, rows, assignments, rows_count, ..common }
            }
        };
        let assignments = params.assignments as usize;
        let params = PlanParams { part: part(assignments) as i32, ..params };
        let blocks = parts(assignments);
        let launch = Launch::new(blocks as u32, PLAN_THREADS).overlap(true);
        // SAFETY: the parameter of both kernels; the rest is the caller's promise.
        unsafe {
            if params.parts != 0 {
                launch.run(stream, &self.count, &mut [Arg::new(&params)])?;
            }
            launch.run(stream, &self.plan, &mut [Arg::new(&params)])
        }
    }

    /// Lays out the tokens `x` (`[tokens, hidden]`, 16-bit) in the plan's order, in planes of `rows` rows.
    ///
    /// # Safety
    /// As for [`plan`](Self::plan), which must have run on the stream with the same source; `x` must hold the tokens and
    /// `to` the planes, both aligned to 16 bytes.
    pub unsafe fn lay_out(
        &self,
        stream: &Stream,
        source: Source,
        x: u64,
        to: u64,
        planes: Planes,
        rows: usize,
    ) -> Result<(), CudaError> {
        let c = &self.config;
        let common = LayOutParams {
            x,
            planes: to,
            count: rows as i32,
            topk: c.topk as i32,
            eights: (c.hidden / 8) as i32,
            planes_count: planes.count as i32,
            lift: i32::from(planes.lift),
            ..bytemuck::Zeroable::zeroed()
        };
        let params = match source {
            Source::Ids { rows, .. } => LayOutParams { rows, ..common },
            Source::Counts { counts, max, .. } => LayOutParams { counts, max_tokens: max as i32, ..common },
        };
        let parts = (ROW_BYTES / 16 * planes.count).div_ceil(LAY_OUT_CHUNKS);
        let blocks = u32::try_from((rows * parts).div_ceil(LAY_OUT_WARPS)).ok().filter(|b| *b <= i32::MAX as u32);
        let blocks = blocks.ok_or(TOO_LARGE)?;
        let launch = Launch::new(blocks, 32 * LAY_OUT_WARPS as u32).overlap(true);
        // SAFETY: the kernel's only parameter; the rest is the caller's promise.
        unsafe { launch.run(stream, &self.lay_out, &mut [Arg::new(&params)]) }
    }

    /// Copies 16-bit tokens `x` (`[tokens, hidden]`) to the rows of their experts in the planes at `planes`; the places are
    /// the plan's. Where those present are named, the tokens are slots, and empty ones are not read.
    ///
    /// # Safety
    /// The addresses must be device memory of these sizes, aligned to 16 bytes, and as [`Launch::run`] wants them.
    pub unsafe fn spread(
        &self,
        stream: &Stream,
        x: u64,
        planes: u64,
        to: OrderedPlanes,
        tokens: usize,
    ) -> Result<(), CudaError> {
        let params = SpreadParams {
            x,
            places: to.places,
            planes,
            rows: to.rows as i32,
            topk: to.copies as i32,
            eights: (self.config.hidden / 8) as i32,
            planes_count: to.count as i32,
            tokens: tokens as i32,
            unused: 0,
        };
        let (kernel, blocks) = match to.present {
            0 => (&self.spread, tokens),
            _ => (&self.spread_slots, tokens.div_ceil(SPREAD_SLOTS)),
        };
        let parts = (ROW_BYTES / 16 * to.count).div_ceil(SPREAD_THREADS);
        let launch = Launch { grid: [blocks as u32, parts as u32, 1], ..Launch::new(1, SPREAD_THREADS as u32) };
        // SAFETY: the parameter of both kernels; the rest is the caller's promise.
        unsafe { launch.overlap(true).run(stream, kernel, &mut [Arg::new(&params)]) }
    }

    /// Sums the slots' results of so many tokens.
    ///
    /// # Safety
    /// The addresses must be device memory of the sizes that [`Sum`] names, aligned to 16 bytes where 16-bit, and as
    /// [`Launch::run`] wants them.
    pub unsafe fn combine(&self, stream: &Stream, sum: Sum, tokens: usize) -> Result<(), CudaError> {
        let c = &self.config;
        let params = CombineParams {
            results: sum.results,
            ids: sum.ids,
            // Already multiplied in.
            weights: if c.weight_on_input { 0 } else { sum.weights },
            map: sum.map,
            output: sum.output,
            topk: c.topk as i32,
            experts: c.experts as i32,
            local_experts: c.local_experts as i32,
            hidden: c.hidden as i32,
        };
        let parts = (c.hidden / 8).div_ceil(COMBINE_THREADS).max(1);
        let launch = Launch { grid: [tokens as u32, parts as u32, 1], ..Launch::new(1, COMBINE_THREADS as u32) };
        // SAFETY: the parameter of either entry; the rest is the caller's promise.
        unsafe { launch.overlap(true).run(stream, &self.combine, &mut [Arg::new(&params)]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_kernels_have_the_same_numbers() {
        let source = include_str!("../../kernels/permute.cu");
        for text in [
            "kThreads = 1024;",
            "kMaxExperts = kThreads;",
            "kCombineThreads = 256;",
            "kSpreadThreads = 256;",
            "kSlots = 8;",
            "kMaxTopk = 32;",
            "kLayOutWarps = 8, kEach = 4;",
        ] {
            assert!(source.contains(text), "{text}");
        }
        assert_eq!((PLAN_THREADS as usize, COMBINE_THREADS, MAX_TOPK), (MAX_EXPERTS, 256, 32));
    }

    proptest! {
        #[test]
        fn every_assignment_is_of_a_part(assignments in 0usize..1 << 20) {
            let (part, parts) = (part(assignments), parts(assignments));
            prop_assert!(part * parts >= assignments && part * (parts - 1) <= assignments && parts <= PARTS);
            prop_assert_eq!(parts == 1, assignments <= ALONE);
        }

        #[test]
        fn the_list_of_tiles_is_long_enough(counts in prop::collection::vec(0usize..300, 1..40), tile in 1usize..130) {
            let tiles: usize = counts.iter().map(|c| c.div_ceil(tile)).sum();
            prop_assert!(tiles <= max_tiles(counts.iter().sum(), counts.len(), tile));
        }

        #[test]
        fn the_list_of_rows_is_long_enough(counts in prop::collection::vec(0usize..300, 1..40), align in 1usize..17) {
            let rows: usize = counts.iter().map(|c| c.next_multiple_of(align)).sum();
            let most = max_rows(counts.iter().sum(), counts.len(), align);
            prop_assert!(rows <= most && most.is_multiple_of(align));
        }
    }
}
