//! Hopper's grouped GEMM for many tokens (kernels/wgmma.cu), around the same plan and sum as the one for all GPUs. Where
//! the layer's keys quantise activations, they are multiplied so.
//!
//! Tokens go to the rows of all their experts, as they are or quantised, in the order in which the products take columns
//! (kernels/common/order.cuh), so that what the blocks of a cluster share can be copied to all of them at once.

mod cost;
mod plan;

use super::activation::Activation;
use super::call::{BatchedTensors, Pass, Tensors};
use super::launch::{Arg, Launch};
use super::memory::{DeviceBuffer, DevicePtr};
use super::module::Kernel;
use super::operands::{Operands, OrderedPlanes};
use super::pack::{BLOCK, PackedExperts};
use super::permute::{Permute, Plan, ROW_BYTES, Source, Sum, TILE_BYTES, max_rows, max_tiles, scratch_bytes};
use super::projection::Matrix;
use super::{CudaError, FATBINS, Stream, quantize};
use crate::config::{ActivationFormat, MoeConfig};
use crate::scheme::QuantKey;
use cost::{Layer, Load, Projection};
pub(super) use plan::TILES;
use plan::{CLUSTER, Kind, Ring, SLABS, THREADS};

/// By the place in `TILES`.
const ENTRIES: [&str; TILES.len()] = ["moe_wgmma_64", "moe_wgmma_128", "moe_wgmma_256"];
/// (token, slot) pairs that go through one pass.
const MAX_ASSIGNMENTS: usize = 1 << 18;

/// Planes of a row at most, so that sums of int8 products stay below 2^31.
const MAX_PLANES: usize = 1 << 10;
/// Up to so many rounds of tasks, of those that clusters ask for, the largest ones come first.
const ROUNDS: usize = 4;
/// Experts' rows begin at multiples of this: what of a plane is exchanged.
const ALIGN: usize = 8;

/// As `GemmParams` in kernels/wgmma/task.cuh.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct GemmParams {
    weights: Matrix,
    x: u64,
    scales: u64,
    rows: u64,
    routing: u64,
    tiles: u64,
    out: u64,
    count: i32,
    scale_step: i32,
    out_columns: i32,
    row_tiles: i32,
    max_tiles: i32,
    depth: i32,
    kind: i32,
    scale: f32,
    activation: Activation,
    out_scales: u64,
    taken: u64,
    stored: u64,
    stored_step: i64,
}

// The kernels assert the same.
const _: () = assert!(size_of::<GemmParams>() == 168);

/// `Kind` in kernels/wgmma/task.cuh.
const FIRST: i32 = 0;
const SECOND: i32 = 1;

/// How rows become operands of a projection.
struct Input {
    /// Where they are quantised.
    quantizer: Option<Operands>,
    /// A stored scale that all rows share, and where it is on the device (or 0).
    stored: (f32, u64),
    /// Planes that a row's columns fill.
    planes: usize,
    /// Scales of a row.
    scales: usize,
}

impl Input {
    fn codes(&self, rows: usize) -> usize {
        rows * self.planes * ROW_BYTES
    }

    /// Planes of so many rows.
    fn to(&self, rows: usize) -> OrderedPlanes {
        OrderedPlanes { count: self.planes, rows, places: 0, copies: 0, present: 0, stored: self.stored.1 }
    }

    fn bytes(&self, rows: usize) -> Option<usize> {
        let scales = (rows * self.scales * 4).next_multiple_of(128);
        rows.checked_mul(self.planes * ROW_BYTES)?.checked_add(scales)
    }

    /// Where the scales are behind the operands of so many rows at `x`, or 0.
    fn scales_at(&self, x: u64, rows: usize) -> u64 {
        if self.scales == 0 { 0 } else { x + self.codes(rows) as u64 }
    }
}

/// The stored scales of both projections' inputs.
enum StoredScales {
    /// Of all experts: `[2]`, and where they are.
    Shared([f32; 2], DeviceBuffer),
    /// `[2][local experts]`
    ByExpert(DeviceBuffer),
}

impl StoredScales {
    /// `None` where one is missing or can't be divided by.
    fn of(stream: &Stream, packed: &PackedExperts) -> Result<Option<Self>, CudaError> {
        let usable = |s: &f32| s.is_normal() && *s > 0.0;
        let [Some(first), Some(second)] = &packed.expert_input_scales else { return Ok(None) };
        if !first.iter().chain(second).all(usable) {
            return Ok(None);
        }
        Ok(Some(match packed.input_scales {
            [Some(first), Some(second)] => Self::Shared([first, second], DeviceBuffer::of(stream, &[first, second])?),
            _ => Self::ByExpert(DeviceBuffer::of(stream, &[&first[..], &second[..]].concat())?),
        }))
    }
}

/// What a call works on: device addresses.
#[derive(Clone, Copy)]
struct Call {
    source: Source,
    hidden: u64,
    /// Routing weights that multiply the input, or 0.
    routing: u64,
    workspace: u64,
    /// `[assignments, hidden]`
    out: u64,
    /// Tokens, or slots of all experts, and how many assignments each is.
    sources: usize,
    copies: usize,
    /// Tokens, or slots of an expert.
    size: usize,
}

/// A layer's kernels. The packed projections belong to another: see [`new`](Wgmma::new).
pub(super) struct Wgmma {
    /// By the place in `TILES`.
    kernels: [Option<(Kernel, Ring)>; TILES.len()],
    permute: Permute,
    matrices: [Matrix; 2],
    inputs: [Input; 2],
    /// Whether the first projection's smallest tile makes the second one's operands, without a kernel in between.
    requantises: [bool; TILES.len()],
    stored: Option<StoredScales>,
    /// What undoes the packed factors' power of two.
    unlift: f32,
    /// Columns of the activation's result.
    middle: usize,
    blocks: u32,
    kind: Kind,
    bytes_per_expert: usize,
    /// From how many tokens (or slots of an expert) on each of `TILES` is taken.
    tiles_from: [usize; TILES.len()],
    /// By projection and tile: whether clusters ask for tasks.
    asks: [[bool; TILES.len()]; 2],
    config: MoeConfig,
    /// Tokens of a tile, instead of what suits a call's size.
    pub tile: Option<usize>,
}

impl Wgmma {
    /// Loads the kernels; `None` where none of them serves the layer or the GPU. `matrices` are as for
    /// [`Mma::new`](super::mma::Mma::new).
    pub fn new(
        stream: &Stream,
        packed: &PackedExperts,
        activation: Option<QuantKey>,
        matrices: [Matrix; 2],
        config: &MoeConfig,
    ) -> Result<Option<Self>, CudaError> {
        let gpu = stream.gpu();
        let (format, info) = (packed.format, gpu.info());
        let Some(kind) = Kind::of(format, activation, config.fast_accum) else { return Ok(None) };
        // A stored scale is the input's after the routing weight, which here multiplies sums.
        let stored = activation.is_some_and(quantize::stored);
        let scales = !(stored && config.weight_on_input);
        let planes = |columns: usize| (columns * kind.bytes()).div_ceil(ROW_BYTES);
        let short = planes(packed.hidden.max(packed.middle)) <= MAX_PLANES;
        let fatbin = kind.fatbins()[format.compute as usize];
        let built = FATBINS.iter().any(|f| f.name == fatbin && f.runs_on(info.capability));
        let clusters = info.sms as usize / CLUSTER;
        if info.capability != 90 || clusters == 0 || !scales || !short || !built {
            return Ok(None);
        }
        let stored = match stored {
            true => match StoredScales::of(stream, packed)? {
                None => return Ok(None),
                some => some,
            },
            false => None,
        };
        let mut kernels = [const { None }; TILES.len()];
        for ((place, tile), entry) in kernels.iter_mut().zip(TILES).zip(ENTRIES) {
            if let Some(ring) = Ring::new(kind, tile, info.shared_per_block) {
                let kernel = gpu.kernel(fatbin, entry)?;
                kernel.allow_shared(ring.shared)?;
                *place = Some((kernel, ring));
            }
        }
        if kernels.iter().all(Option::is_none) {
            return Ok(None);
        }
        let by_expert = matches!(stored, Some(StoredScales::ByExpert(_)));
        let input = |columns: usize, n: usize| -> Result<Input, CudaError> {
            let quantizer =
                activation.map(|key| Operands::new(gpu, key, config.input, columns, by_expert)).transpose()?;
            Ok(Input {
                scales: quantizer.as_ref().map_or(0, |q| q.scales),
                stored: match &stored {
                    Some(StoredScales::Shared(scales, buffer)) => (scales[n], buffer.address() + 4 * n as u64),
                    _ => (1.0, 0),
                },
                planes: planes(columns),
                quantizer,
            })
        };
        let layer = Layer {
            kind,
            projections: matrices.map(|m| Projection {
                row_tiles: row_tiles(&m),
                stages: (m.blocks as usize * BLOCK * kind.bytes()).div_ceil(ROW_BYTES),
            }),
            local_experts: config.local_experts,
            clusters,
            row: 2 * (packed.hidden + packed.middle),
        };
        let (chance, batched) =
            (config.topk as f64 / config.experts as f64, config.format == ActivationFormat::Batched);
        // Slots may be full, and too small a tile costs more than one too large.
        let load = |tokens: usize| Load { tokens, chance: if batched { 1.0 } else { chance } };
        Ok(Some(Self {
            tiles_from: layer.tiles_from(load),
            asks: layer.asks(),
            kernels,
            permute: Permute::new(gpu, config)?,
            matrices,
            inputs: [input(packed.hidden, 0)?, input(packed.middle, 1)?],
            requantises: TILES.map(|tile| plan::requantises(kind, activation, config.activation, tile)),
            stored,
            unlift: 1.0 / format.lift(),
            middle: packed.middle,
            blocks: (clusters * CLUSTER) as u32,
            kind,
            bytes_per_expert: packed.bytes_per_expert,
            config: *config,
            tile: None,
        }))
    }

    /// Whether sums stay in the tensor cores.
    pub fn fast_accum(&self) -> bool {
        self.kind == Kind::Fp8Fast
    }

    /// From how many tokens on, or slots of an expert, these kernels are faster than all others.
    pub fn pays_from(&self) -> usize {
        cost::pays_from(&self.config, self.kind, self.bytes_per_expert)
    }

    /// Tokens that go through one pass.
    fn group(&self) -> usize {
        MAX_ASSIGNMENTS / self.config.topk
    }

    /// Bytes of workspace for up to `tokens` tokens, or slots of an expert in the batched format.
    pub fn workspace_bytes(&self, tokens: usize) -> usize {
        Parts::new(self, tokens).map_or(usize::MAX, |p| p.all)
    }

    /// The kernel for so many tokens, or slots of an expert, and the place of its tile: of the wanted one, or the largest below
    /// it that this GPU runs.
    fn kernel(&self, size: usize) -> Result<(usize, &Kernel, Ring), CudaError> {
        let wanted = match self.tile {
            Some(wanted) => TILES.iter().rposition(|t| *t <= wanted),
            None => self.tiles_from.iter().rposition(|from| *from <= size),
        };
        let fitting = self.kernels.iter().enumerate().take(wanted.unwrap_or(0) + 1).rev();
        let found = { fitting }.find_map(|(place, k)| k.as_ref().map(|(kernel, ring)| (place, kernel, *ring)));
        found.ok_or(CudaError::NoKernel("wgmma"))
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
        for pass in t.passes(c, tokens, self.group(), map) {
            let Pass { tokens, ids, weights, map, workspace, .. } = pass;
            let rows = workspace + parts.rows as u64;
            let call = Call {
                source: Source::Ids { ids, map, rows, assignments: tokens * c.topk },
                hidden: pass.hidden,
                routing: if c.weight_on_input { weights } else { 0 },
                workspace,
                out: workspace + parts.results as u64,
                sources: tokens,
                copies: c.topk,
                size: tokens,
            };
            let sum = Sum { results: call.out, ids, weights, map, output: pass.output };
            // SAFETY: lengths were checked, the parts of the workspace hold what a pass of `group` tokens makes, the
            // packed experts stay (`new`); the rest is the caller's promise.
            unsafe {
                self.gemms(stream, call, &parts)?;
                self.permute.combine(stream, sum, tokens)?;
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
            source: Source::Counts { counts: t.counts.address(), max, rows: workspace + parts.rows as u64 },
            hidden: t.hidden.address(),
            routing: 0,
            workspace,
            // Each result goes to the slot that its token came from.
            out: t.output.address(),
            sources: max * c.local_experts,
            copies: 1,
            size: max,
        };
        // SAFETY: as above.
        unsafe { self.gemms(stream, call, &parts) }
    }

    /// The plan, the tokens as operands in its order, and both projections.
    ///
    /// # Safety
    /// The call's addresses must be device memory as the kernels want them for so many sources, the workspace of these parts.
    unsafe fn gemms(&self, stream: &Stream, call: Call, parts: &Parts) -> Result<(), CudaError> {
        let c = &self.config;
        let assignments = call.sources * call.copies;
        let (place, kernel, ring) = self.kernel(call.size)?;
        let tile = TILES[place];
        let tiles = max_tiles(assignments, c.local_experts, tile);
        let count = max_rows(assignments, c.local_experts, ALIGN);
        let at = |part: usize| call.workspace + part as u64;
        let (list, rows, places, x, middle, second) =
            (at(0), at(parts.rows), at(parts.places), at(parts.x), at(parts.middle), at(parts.second));
        let taken = |n: usize| if self.asks[n][place] { at(parts.taken) + 4 * n as u64 } else { 0 };
        // Of few rounds a large task in the last one is a large part.
        let few = |n: usize| row_tiles(&self.matrices[n]) * tiles <= ROUNDS * self.blocks as usize / CLUSTER;
        let largest_first = (0..2).any(|n| self.asks[n][place] && few(n));
        // Empty slots are left out.
        let present = if matches!(call.source, Source::Counts { .. }) { places } else { 0 };
        let [first, down] = &self.inputs;
        let quantised = first.quantizer.is_some();
        let requantises = self.requantises[place];
        // The scales of the second projection's input.
        let results_stored = match &self.stored {
            Some(StoredScales::ByExpert(all)) => (all.address() + 4 * c.local_experts as u64, 1),
            _ => (down.stored.1, 0),
        };
        let common = GemmParams {
            rows,
            tiles: list,
            count: count as i32,
            max_tiles: tiles as i32,
            depth: ring.depth as i32,
            activation: Activation::of(c.activation),
            ..bytemuck::Zeroable::zeroed()
        };
        let gate_up = GemmParams {
            weights: self.matrices[0],
            routing: call.routing,
            out: if quantised && !requantises { middle } else { second },
            out_columns: if quantised { self.middle } else { down.planes * ROW_BYTES / 2 } as i32,
            kind: FIRST,
            out_scales: if requantises && self.stored.is_none() { down.scales_at(second, count) } else { 0 },
            taken: taken(0),
            stored: if requantises { results_stored.0 } else { 0 },
            stored_step: results_stored.1,
            ..self.with_input(common, first, x)
        };
        let down_params = GemmParams {
            weights: self.matrices[1],
            out: call.out,
            out_columns: c.hidden as i32,
            kind: SECOND,
            taken: taken(1),
            ..self.with_input(common, down, second)
        };
        let (stored, scales) = match &self.stored {
            Some(StoredScales::ByExpert(stored)) => (stored.address(), [gate_up.scales, down_params.scales]),
            _ => (0, [0; 2]),
        };
        // SAFETY: the caller's promise; the parts have room for all rows. The first projection's scales, which the plan writes,
        // lie behind its scratch: that is 4 KiB for 512 rows, whose codes are 64 KiB at least.
        unsafe {
            let taken = at(parts.taken);
            let plan = Plan {
                tiles: list,
                tile,
                max_tiles: tiles,
                align: ALIGN,
                places,
                stored,
                scales,
                taken,
                largest_first,
                scratch: x,
            };
            self.permute.plan(stream, call.source, plan)?;
            let to = OrderedPlanes { places, copies: call.copies, present, ..first.to(count) };
            match &first.quantizer {
                None => self.permute.spread(stream, call.hidden, x, to, call.sources)?,
                Some(q) => q.run(stream, call.hidden, x, gate_up.scales, to, call.sources)?,
            }
            self.gemm(stream, kernel, ring, gate_up)?;
            if let Some(q) = down.quantizer.as_ref().filter(|_| !requantises) {
                let to = OrderedPlanes { present: rows, ..down.to(count) };
                q.run(stream, middle, second, down_params.scales, to, count)?;
            }
            self.gemm(stream, kernel, ring, down_params)
        }
    }

    fn with_input(&self, common: GemmParams, input: &Input, x: u64) -> GemmParams {
        GemmParams {
            x,
            scales: input.scales_at(x, common.count as usize),
            scale_step: if input.scales > 1 { common.count } else { 0 },
            scale: self.unlift * input.stored.0,
            ..common
        }
    }

    /// # Safety
    /// As for [`gemms`](Self::gemms).
    unsafe fn gemm(&self, stream: &Stream, kernel: &Kernel, ring: Ring, params: GemmParams) -> Result<(), CudaError> {
        let row_tiles = row_tiles(&params.weights);
        let tasks = row_tiles.checked_mul(params.max_tiles as usize).filter(|n| *n <= i32::MAX as usize / 4);
        let blocks = self.blocks.min((tasks.ok_or(TOO_LARGE)? * CLUSTER) as u32);
        let params = GemmParams { row_tiles: row_tiles as i32, ..params };
        let launch = Launch::new(blocks, THREADS as u32).shared(ring.shared as u32).overlap(true);
        // SAFETY: the kernel's only parameter; the rest is the caller's promise.
        unsafe { launch.run(stream, kernel, &mut [Arg::new(&params)]) }
    }
}

/// Tasks of a cluster for a tile of tokens.
fn row_tiles(matrix: &Matrix) -> usize {
    (matrix.slabs as usize).div_ceil(SLABS * CLUSTER)
}

const TOO_LARGE: CudaError = CudaError::Argument("the call is too large for the GPU's 32-bit counts: split the batch");

/// Where the parts of a workspace lie, in bytes; the list of tiles comes first.
struct Parts {
    /// Two counters of tasks that clusters asked for.
    taken: usize,
    rows: usize,
    /// The row of each assignment.
    places: usize,
    /// The tokens as operands.
    x: usize,
    /// The activation's results, where they are to be quantised yet.
    middle: usize,
    /// The second projection's operands.
    second: usize,
    /// The experts' results, in the place of what the second projection does not read.
    results: usize,
    all: usize,
}

impl Parts {
    fn new(wgmma: &Wgmma, tokens: usize) -> Option<Self> {
        let c = &wgmma.config;
        let batched = c.format == ActivationFormat::Batched;
        let assignments = match batched {
            // An expert's tiles are counted in 15 bits.
            true if tokens > TILES[0] << 15 => return None,
            true => tokens.checked_mul(c.local_experts)?,
            false => tokens.min(wgmma.group()) * c.topk,
        };
        i32::try_from(max_rows(assignments, c.local_experts, ALIGN)).ok()?;
        let count = max_rows(assignments, c.local_experts, ALIGN);
        let [first, down] = &wgmma.inputs;
        let quantised = first.quantizer.is_some();
        let aligned = |n: usize| n.next_multiple_of(128);
        let results = if batched { 0 } else { assignments.checked_mul(c.hidden * 2)? };
        let taken = max_tiles(assignments, c.local_experts, TILES[0]) * TILE_BYTES;
        let rows = aligned(taken + 8);
        let places = aligned(rows + count * 4);
        let x = aligned(places + assignments * 4);
        let scratch = if batched { 0 } else { scratch_bytes(assignments, c.local_experts) };
        let after_x = aligned(x + first.bytes(count)?.max(scratch));
        let between = if quantised { count.checked_mul(wgmma.middle * 2)? } else { 0 };
        let second = aligned(after_x + between).max(aligned(x + results));
        Some(Self { taken, rows, places, x, middle: after_x, second, results: x, all: second + down.bytes(count)? })
    }
}
