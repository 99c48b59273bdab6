//! The grouped GEMM for any number of tokens: sort by expert, lay the tokens out in that order, gate and up with the
//! activation, down, sum over a token's experts (kernels/permute.cu, kernels/mma.cu).
//!
//! Weights are unpacked to 16 bits and activations stay exact, but for int8 weights whose activation key is int8, too: there
//! the inputs of both projections become codes (kernels/tokens8.cu), which are multiplied as they are.

mod int8;
mod shape;

pub use shape::Tile;

use super::activation::Activation;
use super::call::{BatchedTensors, Pass, Tensors};
use super::launch::{Arg, Launch};
use super::memory::DevicePtr;
use super::module::Kernel;
use super::pack::{BLOCK, Codes, Compute, Format, PackedExperts, StageScales};
use super::permute::{Permute, Plan, Planes, ROW_BYTES, Source, Sum, TILE_BYTES, max_tiles, scratch_bytes};
use super::projection::Matrix;
use super::{CudaError, Stream};
use crate::config::{ActivationFormat, MoeConfig};
use crate::scheme::QuantKey;
use int8::Tokens8;
use shape::{Operands, Ring, WARPS};

/// (token, slot) pairs that go through one pass.
const MAX_ASSIGNMENTS: usize = 1 << 18;

/// As `ScaleLayout` in kernels/common/dequant.cuh.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct ScaleLayout {
    groups: i32,
    stride: i32,
    zero: i32,
    bf16: i32,
}

/// As `GemmParams` in kernels/mma/task.cuh.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct GemmParams {
    weights: Matrix,
    x: u64,
    rows: u64,
    routing: u64,
    units: u64,
    tops: u64,
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
const _: () = assert!(size_of::<GemmParams>() == 152);

/// `Kind` in kernels/mma/task.cuh.
const FIRST: i32 = 0;
const SECOND: i32 = 1;
const BATCHED: i32 = 2;

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
    workspace: u64,
    out: u64,
    last: i32,
    /// Tokens, or slots of all experts.
    tokens: usize,
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
    operands: Operands,
    /// Where tokens are multiplied as int8.
    int8: Option<Tokens8>,
    config: MoeConfig,
    x: Planes,
    middle: Planes,
    /// Columns of the activation's result, whole blocks.
    middle_columns: usize,
    /// Instead of the one that suits a call's size.
    pub tile: Option<Tile>,
}

impl Mma {
    /// Loads the kernels. `matrices` are the packed experts' projections on the device, gate and up first, and must stay
    /// there as long as this is used. The inputs of both become codes of the `activation` key where kernels multiply those.
    pub fn new(
        stream: &Stream,
        packed: &PackedExperts,
        matrices: [Matrix; 2],
        activation: Option<QuantKey>,
        config: &MoeConfig,
    ) -> Result<Self, CudaError> {
        let gpu = stream.gpu();
        let format = packed.format;
        let int8 = activation.map_or(Ok(None), |key| Tokens8::new(stream, packed, key, config))?;
        let (fatbin, operands) = match &int8 {
            Some(_) => (Some(int8::fatbin(format.compute)), Operands::whole(format)),
            None => (format.mma_fatbin(), Operands::of(format)),
        };
        let fatbin = fatbin.ok_or(CudaError::NoKernel("mma"))?;
        let mut kernels = [const { None }; 4];
        for (place, tile) in kernels.iter_mut().zip(Tile::ALL) {
            if let Some(ring) = Ring::new(operands, tile, gpu.info().shared_per_block) {
                let kernel = gpu.kernel(fatbin, tile.entry())?;
                kernel.allow_shared(ring.shared)?;
                *place = Some((kernel, ring));
            }
        }
        if kernels[0].is_none() {
            return Err(CudaError::Argument("this GPU has too little shared memory for cuda_mma"));
        }
        // A plane's row is a block's columns in 16 bits, or those of two as int8.
        let (each, lift) = if int8.is_some() { (2, false) } else { (1, lifts(format)) };
        let planes = |blocks: usize| Planes { count: blocks.div_ceil(each), lift };
        Ok(Self {
            kernels,
            permute: Permute::new(gpu, config)?,
            matrices: matrices.map(|m| Matrix { blocks: (m.blocks as usize).div_ceil(each) as i32, ..m }),
            scales: ScaleLayout {
                groups: format.scales.groups() as i32,
                stride: 4 * format.scales.registers() as i32,
                zero: i32::from(format.scales.zeros()),
                bf16: i32::from(format.scale_bf16),
            },
            operands,
            int8,
            config: *config,
            x: planes(packed.first.blocks),
            middle: planes(packed.second.blocks),
            middle_columns: packed.second.blocks * BLOCK,
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

    /// Whether there is a kernel for a tile: the GPU has room for it, and the format one of so many tokens.
    pub fn has(&self, tile: Tile) -> bool {
        self.kernels[tile as usize].is_some()
    }

    /// The kernel for so many assignments: of the wanted tile, or the largest below it that this GPU runs.
    fn kernel(&self, assignments: usize, experts: usize) -> Result<(Tile, &Kernel, Ring), CudaError> {
        let wanted = self.tile.unwrap_or_else(|| Tile::of(self.operands, assignments, experts));
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
        for pass in t.passes(c, tokens, self.group(), map) {
            let Pass { tokens, ids, weights, map, workspace, .. } = pass;
            let assignments = tokens * c.topk;
            let rows = workspace + parts.rows as u64;
            let call = Call {
                source: Source::Ids { ids, map, rows, assignments },
                hidden: pass.hidden,
                rows,
                routing: if c.weight_on_input { weights } else { 0 },
                workspace,
                // When results are written, the tokens have been read.
                out: workspace + parts.x as u64,
                last: SECOND,
                tokens,
                assignments,
            };
            let sum = Sum { results: call.out, ids, weights, map, output: pass.output };
            // SAFETY: lengths were checked, the parts of the workspace hold what a pass of `group` tokens makes, the
            // packed experts stay (`new`); the rest is the caller's promise.
            unsafe {
                self.gemms(stream, call, &parts, c.experts)?;
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
        let call = Call {
            source: Source::Counts { counts: t.counts.address(), max, rows: 0 },
            hidden: t.hidden.address(),
            rows: 0,
            routing: 0,
            workspace: t.workspace.address(),
            out: t.output.address(),
            last: BATCHED,
            tokens: max * c.local_experts,
            assignments: max * c.local_experts,
        };
        // SAFETY: as above.
        unsafe { self.gemms(stream, call, &parts, c.local_experts) }
    }

    /// The plan, the tokens in its order, and both projections. The assignments are to one of `experts` experts each.
    ///
    /// # Safety
    /// The call's addresses must be device memory as the kernels want them for so many assignments, the workspace of these
    /// parts.
    unsafe fn gemms(&self, stream: &Stream, call: Call, parts: &Parts, experts: usize) -> Result<(), CudaError> {
        let c = &self.config;
        let (tile, kernel, ring) = self.kernel(call.assignments, experts)?;
        let at = |offset: usize| call.workspace + offset as u64;
        let (x, middle, tiles) = (at(parts.x), at(parts.middle), at(0));
        let places = if self.int8.is_some() { at(parts.places) } else { 0 };
        let max_tiles = max_tiles(call.assignments, c.local_experts, tile.tokens());
        // The tokens' place is free until they are laid out.
        let plan = Plan {
            tiles,
            tile: tile.tokens(),
            max_tiles,
            align: 1,
            places,
            stored: 0,
            scales: [0; 2],
            taken: 0,
            largest_first: false,
            scratch: x,
        };
        // SAFETY: the list of tiles has room for the smallest tile's, which are the most; the rest is the caller's promise.
        unsafe {
            self.permute.plan(stream, call.source, plan)?;
            match &self.int8 {
                Some(int8) => int8.tokens(stream, &call, self.x, parts)?,
                None => self.permute.lay_out(stream, call.source, call.hidden, x, self.x, call.assignments)?,
            }
        }
        let [first, second] = self.matrices;
        let common = GemmParams {
            rows: call.rows,
            tiles,
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
            x,
            routing: call.routing,
            units: at(parts.units[0]),
            tops: at(parts.tops),
            out: if self.int8.is_some() { at(parts.floats) } else { middle },
            out_columns: self.middle_columns as i32,
            kind: FIRST,
            ..common
        };
        let second = GemmParams {
            weights: second,
            x: middle,
            units: at(parts.units[1]),
            out: call.out,
            out_columns: c.hidden as i32,
            kind: call.last,
            ..common
        };
        let gemm = |params: GemmParams| {
            let row_tiles = (params.weights.slabs as usize).div_ceil(tile.slabs(self.operands));
            let blocks = row_tiles.checked_mul(max_tiles).and_then(|b| i32::try_from(b).ok()).ok_or(TOO_LARGE)?;
            let params = GemmParams { row_tiles: row_tiles as i32, ..params };
            let launch = Launch::new(blocks as u32, 32 * WARPS as u32).shared(ring.shared as u32).overlap(true);
            // SAFETY: the kernel's only parameter; the rest is the caller's promise.
            unsafe { launch.run(stream, kernel, &mut [Arg::new(&params)]) }
        };
        gemm(first)?;
        if let Some(int8) = &self.int8 {
            // SAFETY: the first projection's results are there; the rest is the caller's promise.
            unsafe { int8.middle(stream, &call, self.middle, self.middle_columns, parts)? };
        }
        gemm(second)
    }
}

const TOO_LARGE: CudaError = CudaError::Argument("the call is too large for the GPU's 32-bit counts: split the batch");

/// Where the parts of a workspace lie, in bytes; the list of tiles comes first. What int8 alone has is empty elsewhere.
struct Parts {
    rows: usize,
    /// int8: where each assignment is among the sorted.
    places: usize,
    /// int8: what codes stand for in each row of the planes, of both projections; one behind the other.
    units: [usize; 2],
    /// Tokens in the plan's order, then the experts' results.
    x: usize,
    /// int8: the activation's results in float32, and the largest of every 64.
    floats: usize,
    tops: usize,
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
        let mut all = max_tiles(assignments, c.local_experts, Tile::T16.tokens()) * TILE_BYTES;
        // Bulk copies start at 16 bytes, but memory is read in lines.
        let mut part = |bytes: usize| {
            let at = all.checked_next_multiple_of(128)?;
            all = at.checked_add(bytes)?;
            Some(at)
        };
        let int8 = |bytes: usize| if mma.int8.is_some() { assignments.checked_mul(bytes) } else { Some(0) };
        let rows = part(if batched { 0 } else { assignments * 4 })?;
        let places = part(if batched { 0 } else { int8(4)? })?;
        let units = part(int8(8)?)?;
        let results = if batched { 0 } else { assignments.checked_mul(c.hidden * 2)? };
        let scratch = if batched { 0 } else { scratch_bytes(assignments, c.local_experts) };
        let x = part(mma.x.bytes(assignments)?.max(results).max(scratch))?;
        let floats = part(int8(4 * mma.middle_columns)?)?;
        let tops = part(int8(4 * mma.middle_columns / BLOCK)?)?;
        let middle = part(mma.middle.bytes(assignments)?)?;
        Some(Self { rows, places, units: [units, units + 4 * assignments], x, floats, tops, middle, all })
    }
}

#[cfg(test)]
mod tests {
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
}
