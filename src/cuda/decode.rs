//! `cuda_decode`: two launches from expert ids to output, for a handful of tokens at a time (kernels/decode.cu).

mod plan;
#[cfg(test)]
mod tests;

use super::activation::Activation;
use super::call::{BatchedTensors, Tensors};
use super::launch::{Arg, Launch};
use super::memory::DevicePtr;
use super::module::Kernel;
use super::pack::{Codes, PackedExperts};
use super::projection::{Matrix, Projection};
use super::{CudaError, Stream};
use crate::config::{ActivationFormat, MoeConfig};
pub(super) use plan::TOKENS;
use plan::{Limits, Plan, Shape, Sizes};

/// The kernels' limits: of (token, slot) pairs at once, of slots of a lone token, and of experts.
const MAX_ITEMS: usize = 128;
const MAX_TOPK: usize = 32;
const MAX_EXPERTS: usize = 1 << 24;

/// As `DecodeParams` in kernels/decode/params.cuh.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    first: Matrix,
    second: Matrix,
    hidden: u64,
    ids: u64,
    weights: u64,
    map: u64,
    middle: u64,
    output: u64,
    counts: u64,
    max_tokens: i32,
    tokens: i32,
    topk: i32,
    hidden_size: i32,
    middle_stride: i32,
    experts: i32,
    weight_on_input: i32,
    activation: Activation,
    first_depth: i32,
    second_depth: i32,
    first_split: i32,
    second_split: i32,
    spread: i32,
    release: i32,
    second_each: i32,
    second_parts: i32,
    _pad: i32,
}

// The kernels assert the same.
const _: () = assert!(size_of::<Params>() == 216);

/// A layer's experts, packed and on the device, with their kernels.
pub struct Decode {
    first: Projection,
    second: Projection,
    first_kernels: Kernels,
    second_kernels: Kernels,
    /// For 1 to 8 tokens, or as many as there may be in one launch.
    plans: Vec<Plan>,
    batched: Plan,
    config: MoeConfig,
    codes: Codes,
    middle: usize,
}

/// The entries of one of the two kernels.
struct Kernels {
    one: Kernel,
    near: Kernel,
    far: Kernel,
    /// Of the second one, where there are clusters: of several tokens, of a lone one.
    shared: Option<[Kernel; 2]>,
}

impl Decode {
    /// Up to how many tokens these kernels are faster than a grouped GEMM's.
    pub(super) fn pays_up_to(&self) -> usize {
        plan::pays_up_to(self.codes, self.config.experts, self.config.topk)
    }

    /// Uploads the packed experts and loads the kernels.
    pub fn new(stream: &Stream, packed: &PackedExperts, config: &MoeConfig) -> Result<Self, CudaError> {
        if config.topk > MAX_TOPK {
            return Err(CudaError::Argument("cuda_decode takes a top-k of at most 32"));
        }
        if config.experts >= MAX_EXPERTS {
            return Err(CudaError::Argument("cuda_decode takes fewer than 2^24 experts"));
        }
        let gpu = stream.gpu();
        let fatbin = packed.format.decode_fatbin().ok_or(CudaError::NoKernel("decode"))?;
        let sizes = Sizes {
            format: packed.format,
            topk: config.topk,
            first_blocks: packed.first.blocks,
            first_slabs: packed.first.slabs,
            second_blocks: packed.second.blocks,
            second_slabs: packed.second.slabs,
        };
        let info = gpu.info();
        // Not where the driver translated code for older GPUs, which has no clusters.
        let clusters = gpu.kernel(fatbin, "moe_decode_first_one")?.compiled_for() >= 90;
        let limits = Limits { multiprocessors: info.sms as usize, shared: info.shared_per_block, clusters };
        let too_small = CudaError::Argument("this GPU's blocks have too little shared memory for cuda_decode");
        let most = TOKENS.min(MAX_ITEMS / config.topk.max(1));
        let plans: Option<Vec<_>> = (1..=most).map(|n| Plan::new(sizes, limits, n)).collect();
        let (Some(plans), Some(batched)) = (plans, Plan::batched(sizes, limits)) else { return Err(too_small) };
        let shared = |near, of: fn(&Plan) -> Shape| {
            let shapes = plans.iter().chain([&batched]).map(of).filter(|s| s.near == near);
            shapes.map(|s| s.shared).max().unwrap_or(0)
        };
        let load = |entry, shared: usize| {
            let kernel = gpu.kernel(fatbin, entry)?;
            kernel.allow_shared(shared)?;
            Ok::<_, CudaError>(kernel)
        };
        let (near, far) = (shared(true, |p| p.first), shared(false, |p| p.first));
        let first_kernels = Kernels {
            one: load("moe_decode_first_one", near)?,
            near: load("moe_decode_first_near", near)?,
            far: load("moe_decode_first_far", far)?,
            shared: None,
        };
        let (near, far) = (shared(true, |p| p.second), shared(false, |p| p.second));
        let second_kernels = Kernels {
            one: load("moe_decode_second_one", near)?,
            near: load("moe_decode_second_near", near)?,
            far: load("moe_decode_second_far", far)?,
            shared: if clusters {
                Some([load("moe_decode_second_shared", near)?, load("moe_decode_second_lone", near)?])
            } else {
                None
            },
        };
        Ok(Self {
            first: Projection::new(stream, &packed.first, packed.format)?,
            second: Projection::new(stream, &packed.second, packed.format)?,
            first_kernels,
            second_kernels,
            plans,
            batched,
            config: *config,
            codes: packed.format.codes,
            middle: packed.middle,
        })
    }

    /// Where the packed projections lie, gate and up first; they stay there as long as `self`.
    pub(super) fn matrices(&self) -> [Matrix; 2] {
        [self.first.matrix, self.second.matrix]
    }

    /// Tokens that go through a pair of launches.
    fn group(&self) -> usize {
        // With batch invariance, a token's sums must not depend on which experts the others chose: the second kernel
        // takes each alone, which needs room for its rows.
        if self.config.batch_invariant && !self.plans[0].second.near {
            return 1;
        }
        self.plans.len()
    }

    /// Bytes of workspace for up to `tokens` tokens, or slots of an expert in the batched format.
    pub fn workspace_bytes(&self, tokens: usize) -> usize {
        let rows = match self.config.format {
            ActivationFormat::Standard => tokens.min(self.group()) * self.config.topk,
            ActivationFormat::Batched => tokens.saturating_mul(self.config.local_experts),
        };
        rows.saturating_mul(self.middle * 2)
    }

    /// What is the same in every call.
    fn params(&self, plan: &Plan, second: &Shape) -> Params {
        let first = &plan.first;
        let c = &self.config;
        Params {
            first_depth: first.depth as i32,
            second_depth: second.depth as i32,
            first_split: first.split as i32,
            second_split: second.split as i32,
            spread: i32::from(plan.spread),
            release: plan.release as i32,
            second_each: second.sharing.map_or(1, |s| s.each) as i32,
            second_parts: second.sharing.map_or(0, |s| s.parts) as i32,
            first: self.first.matrix,
            second: self.second.matrix,
            topk: c.topk as i32,
            hidden_size: c.hidden as i32,
            middle_stride: self.middle as i32,
            experts: c.experts as i32,
            weight_on_input: i32::from(c.weight_on_input),
            activation: Activation::of(c.activation),
            ..bytemuck::Zeroable::zeroed()
        }
    }

    /// Runs the layer; does not wait.
    ///
    /// # Safety
    /// The tensors and the map (one entry per global expert) must be allocated on this GPU and stay so until the work is
    /// done; nothing unordered may write what is read here or touch what is written. Outputs and workspace must not
    /// overlap anything else.
    pub unsafe fn forward(
        &self,
        stream: &Stream,
        t: &Tensors<'_>,
        tokens: usize,
        map: Option<DevicePtr<'_, i32>>,
    ) -> Result<(), CudaError> {
        let c = &self.config;
        t.check(c, tokens, self.workspace_bytes(tokens))?;
        for pass in t.passes(c, tokens, self.group(), map) {
            let n = pass.tokens;
            // With batch invariance, the first kernel's shape is that of the most tokens whatever their number, and each
            // token is alone in the second.
            let alone = c.batch_invariant;
            let plan = &self.plans[if alone { self.group() } else { n } - 1];
            let second = if alone { &self.plans[0].second } else { &plan.second };
            let params = Params {
                hidden: pass.hidden,
                ids: pass.ids,
                weights: pass.weights,
                map: pass.map,
                middle: pass.workspace,
                output: pass.output,
                tokens: n as i32,
                ..self.params(plan, second)
            };
            let kernel = self.first_kernels.of(&plan.first, n == 1 && !alone);
            let units = self.first.matrix.slabs as usize * n * c.topk;
            let blocks = plan.first_blocks.min(units);
            // SAFETY: the parameters are those of every entry; lengths were checked, the packed experts live in `self`;
            // the rest is the caller's promise.
            unsafe { launch(stream, kernel, &plan.first, [blocks as u32, 1, 1], &params)? };
            let kernel = self.second_kernels.of(second, n == 1 || alone);
            let rows = if alone { n } else { 1 };
            // SAFETY: as above.
            unsafe { launch(stream, kernel, second, [self.second_blocks(second), rows as u32, 1], &params)? };
        }
        Ok(())
    }

    /// Runs the layer in the batched format, `max` slots to an expert; does not wait.
    ///
    /// # Safety
    /// As for [`forward`](Self::forward).
    pub unsafe fn forward_batched(&self, stream: &Stream, t: &BatchedTensors<'_>, max: usize) -> Result<(), CudaError> {
        let c = &self.config;
        // The kernels count rows in 32 bits, and a grid has so many layers of blocks.
        if max.saturating_mul(c.local_experts) > i32::MAX as usize || max > 65_535 * TOKENS {
            return Err(CudaError::Argument("the batched format on the GPU takes at most 524280 slots, 2^31 in all"));
        }
        t.check(c, max, self.workspace_bytes(max))?;
        let params = Params {
            hidden: t.hidden.address(),
            middle: t.workspace.address(),
            output: t.output.address(),
            counts: t.counts.address(),
            max_tokens: max as i32,
            ..self.params(&self.batched, &self.batched.second)
        };
        let Plan { first, second, .. } = &self.batched;
        let grid = |blocks: u32| [blocks, c.local_experts as u32, max.div_ceil(TOKENS) as u32];
        let blocks = (self.first.matrix.slabs as usize).div_ceil(first.groups()) as u32;
        // SAFETY: the parameters are those of every entry; lengths were checked, the packed experts live in `self`; the
        // rest is the caller's promise.
        unsafe {
            launch(stream, &self.first_kernels.far, first, grid(blocks), &params)?;
            launch(stream, &self.second_kernels.far, second, grid(self.second_blocks(second)), &params)
        }
    }

    /// Blocks that share the slabs of the output.
    fn second_blocks(&self, shape: &Shape) -> u32 {
        let slabs = self.second.matrix.slabs as usize;
        match shape.sharing {
            Some(s) => (slabs.div_ceil(s.each) << s.parts) as u32,
            None => slabs.div_ceil(shape.groups()) as u32,
        }
    }
}

impl Kernels {
    /// The entry for a shape; `lone` if there is one token only.
    fn of(&self, shape: &Shape, lone: bool) -> &Kernel {
        match (shape.near, lone, &self.shared) {
            (true, _, Some(shared)) if shape.sharing.is_some() => &shared[usize::from(lone)],
            (true, true, _) => &self.one,
            (true, false, _) => &self.near,
            (false, _, _) => &self.far,
        }
    }
}

/// # Safety
///
/// As for [`Launch::run`], with `Params` as the kernel's only parameter.
unsafe fn launch(
    stream: &Stream,
    kernel: &Kernel,
    shape: &Shape,
    grid: [u32; 3],
    params: &Params,
) -> Result<(), CudaError> {
    let cluster = [shape.sharing.map_or(1, |s| 1 << s.parts), 1, 1];
    let launch = Launch { grid, cluster, ..Launch::new(1, 32 * shape.warps as u32) };
    // SAFETY: the caller's promise.
    unsafe { launch.shared(shape.shared as u32).overlap(true).run(stream, kernel, &mut [Arg::new(params)]) }
}
