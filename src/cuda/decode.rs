//! `cuda_decode`: two launches from expert ids to output, for a handful of tokens at a time (kernels/decode.cu).

use super::call::{BatchedTensors, Tensors};
use super::launch::{Arg, Launch};
use super::memory::{DeviceBuffer, DevicePtr};
use super::module::Kernel;
use super::pack::{Codes, Format, PackedExperts, PackedProjection};
use super::{CudaError, Stream};
use crate::config::{Activation, ActivationFormat, MoeConfig};

/// Tokens of a pair of launches: the columns of a tensor-core product.
const TOKENS: usize = 8;
/// The kernels' limits: of (token, slot) pairs at once, and of slots of a lone token.
const MAX_ITEMS: usize = 128;
const MAX_TOPK: usize = 32;
/// Places of the warps' rings, as kernels/decode.cu has them.
const FIRST_DEPTH: usize = 2;
const SECOND_DEPTH: usize = 3;

/// As `Matrix` in kernels/common/stream.cuh.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Matrix {
    stages: u64,
    factors: u64,
    bias: u64,
    slab_bytes: i32,
    slabs: i32,
    blocks: i32,
    scale_bf16: i32,
}

/// As `DecodeParams` in kernels/decode.cu.
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
    activation: [u32; 4],
    _pad: i32,
}

/// Warps of a block and bytes of its shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    warps: usize,
    shared: usize,
}

/// How a layer is launched; depends on nothing but the layer, so that neither do the results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    first: Shape,
    second: Shape,
}

impl Plan {
    fn new(packed: &PackedExperts, config: &MoeConfig, multiprocessors: usize) -> Self {
        let ring = |depth: usize| depth * (chunk_bytes(packed.format) + 16);
        // The first kernel has blocks enough to fill the GPU whatever their size.
        let first = warps(chunks(&packed.first, packed.format), 8);
        // The second has one per slab of the output: where those are few, they are made larger.
        let most = if packed.second.slabs <= multiprocessors { 16 } else { 8 };
        let second = warps(config.topk * chunks(&packed.second, packed.format), most);
        // Behind the rings, a lone token's rows and their barrier; the same memory later serves to add up.
        let shape = |warps: usize, depth: usize, row: usize| Shape {
            warps,
            shared: (warps * ring(depth) + 16 + 2 * row).max(512 * warps),
        };
        Plan {
            first: shape(first, FIRST_DEPTH, config.hidden),
            second: shape(second, SECOND_DEPTH, config.topk * packed.middle),
        }
    }
}

/// What a warp brings in at once.
fn chunk_bytes(format: Format) -> usize {
    chunk_stages(format) * (2 * format.codes.words() * 512 + 32 * format.scales.registers())
}

fn chunk_stages(format: Format) -> usize {
    match format.codes {
        Codes::E2m1 | Codes::U4 => 2,
        Codes::Half | Codes::E4m3 | Codes::Int8 => 1,
    }
}

fn chunks(p: &PackedProjection, format: Format) -> usize {
    p.blocks.div_ceil(2 * chunk_stages(format))
}

/// A power of two between 4 (128 threads add up) and `most`, no more than there are chunks.
fn warps(chunks: usize, most: usize) -> usize {
    chunks.next_power_of_two().clamp(4, most)
}

/// A projection on the device: what `matrix` points into.
struct Projection {
    _stages: DeviceBuffer,
    _factors: DeviceBuffer,
    _bias: Option<DeviceBuffer>,
    matrix: Matrix,
}

impl Projection {
    fn new(stream: &Stream, p: &PackedProjection, format: Format) -> Result<Self, CudaError> {
        let stages = DeviceBuffer::of(stream, &p.stages)?;
        let factors = DeviceBuffer::of(stream, &p.factors)?;
        let bias = p.bias.as_ref().map(|b| DeviceBuffer::of(stream, b)).transpose()?;
        // The packer refuses slabs beyond 32 bits, and with them more slabs or blocks than that.
        let matrix = Matrix {
            stages: stages.address(),
            factors: factors.address(),
            bias: bias.as_ref().map_or(0, DeviceBuffer::address),
            slab_bytes: p.slab_bytes as i32,
            slabs: p.slabs as i32,
            blocks: p.blocks as i32,
            scale_bf16: i32::from(format.scale_bf16),
        };
        Ok(Self { _stages: stages, _factors: factors, _bias: bias, matrix })
    }
}

/// A layer's experts, packed and on the device, with their kernels.
pub struct Decode {
    first: Projection,
    second: Projection,
    first_one: Kernel,
    first_many: Kernel,
    second_one: Kernel,
    second_many: Kernel,
    first_batched: Kernel,
    second_batched: Kernel,
    plan: Plan,
    config: MoeConfig,
    middle: usize,
}

impl Decode {
    /// Uploads the packed experts and loads the kernels.
    pub fn new(stream: &Stream, packed: &PackedExperts, config: &MoeConfig) -> Result<Self, CudaError> {
        if config.topk > MAX_TOPK {
            return Err(CudaError::Argument("cuda_decode takes a top-k of at most 32"));
        }
        let gpu = stream.gpu();
        let fatbin = packed.format.decode_fatbin().ok_or(CudaError::NoKernel("decode"))?;
        let plan = Plan::new(packed, config, gpu.info().sms as usize);
        let load = |entry, shape: Shape| {
            let kernel = gpu.kernel(fatbin, entry)?;
            kernel.allow_shared(shape.shared)?;
            Ok::<_, CudaError>(kernel)
        };
        Ok(Self {
            first_one: load("moe_decode_first_one", plan.first)?,
            first_many: load("moe_decode_first_many", plan.first)?,
            second_one: load("moe_decode_second_one", plan.second)?,
            second_many: load("moe_decode_second_many", plan.second)?,
            first_batched: load("moe_decode_first_batched", plan.first)?,
            second_batched: load("moe_decode_second_batched", plan.second)?,
            first: Projection::new(stream, &packed.first, packed.format)?,
            second: Projection::new(stream, &packed.second, packed.format)?,
            plan,
            config: *config,
            middle: packed.middle,
        })
    }

    /// Tokens that go through a pair of launches.
    fn group(&self) -> usize {
        TOKENS.min(MAX_ITEMS / self.config.topk)
    }

    /// Bytes of workspace for up to `tokens` tokens, or slots of an expert in the batched format.
    pub fn workspace_bytes(&self, tokens: usize) -> usize {
        let rows = match self.config.format {
            ActivationFormat::Standard => tokens.min(self.group()) * self.config.topk,
            ActivationFormat::Batched => tokens * self.config.local_experts,
        };
        rows * self.middle * 2
    }

    /// What is the same in every call.
    fn params(&self) -> Params {
        let c = &self.config;
        Params {
            first: self.first.matrix,
            second: self.second.matrix,
            topk: c.topk as i32,
            hidden_size: c.hidden as i32,
            middle_stride: self.middle as i32,
            experts: c.experts as i32,
            weight_on_input: i32::from(c.weight_on_input),
            activation: activation(c.activation),
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
        if map.is_some_and(|m| m.len() < c.experts) {
            return Err(CudaError::Argument("the expert map has fewer entries than there are experts"));
        }
        for start in (0..tokens).step_by(self.group()) {
            let n = (tokens - start).min(self.group());
            let at = |base: u64, row: usize, element: usize| base + (start * row * element) as u64;
            let params = Params {
                hidden: at(t.hidden.address(), c.hidden, 2),
                ids: at(t.topk_ids.address(), c.topk, 4),
                weights: at(t.topk_weights.address(), c.topk, 4),
                map: map.map_or(0, |m| m.address()),
                middle: t.workspace.address(),
                output: at(t.output.address(), c.hidden, 2),
                tokens: n as i32,
                ..self.params()
            };
            // With batch invariance, a token's sums must not depend on which experts the others chose.
            let alone = n == 1 && !c.batch_invariant;
            let first = if alone { &self.first_one } else { &self.first_many };
            let lone = n == 1 || c.batch_invariant;
            let (second, rows) = if lone { (&self.second_one, n) } else { (&self.second_many, 1) };
            let grid = [self.first.matrix.slabs as u32, (n * c.topk) as u32, 1];
            // SAFETY: the parameters are those of every entry; lengths were checked, the packed experts live in `self`;
            // the rest is the caller's promise.
            unsafe { launch(stream, first, self.plan.first, grid, &params)? };
            // SAFETY: as above.
            unsafe {
                launch(stream, second, self.plan.second, [self.second.matrix.slabs as u32, rows as u32, 1], &params)?
            };
        }
        Ok(())
    }

    /// Runs the layer in the batched format, `max` slots to an expert; does not wait.
    ///
    /// # Safety
    /// As for [`forward`](Self::forward).
    pub unsafe fn forward_batched(&self, stream: &Stream, t: &BatchedTensors<'_>, max: usize) -> Result<(), CudaError> {
        let c = &self.config;
        t.check(c, max, self.workspace_bytes(max))?;
        let params = Params {
            hidden: t.hidden.address(),
            middle: t.workspace.address(),
            output: t.output.address(),
            counts: t.counts.address(),
            max_tokens: i32::try_from(max).map_err(|_| CudaError::Argument("more than 2^31 - 1 slots"))?,
            ..self.params()
        };
        let grid = |m: &Matrix| [m.slabs as u32, c.local_experts as u32, max.div_ceil(TOKENS) as u32];
        // SAFETY: the parameters are those of every entry; lengths were checked, the packed experts live in `self`; the
        // rest is the caller's promise.
        unsafe {
            launch(stream, &self.first_batched, self.plan.first, grid(&self.first.matrix), &params)?;
            launch(stream, &self.second_batched, self.plan.second, grid(&self.second.matrix), &params)
        }
    }
}

/// # Safety
///
/// As for [`Launch::run`], with `Params` as the kernel's only parameter.
unsafe fn launch(
    stream: &Stream,
    kernel: &Kernel,
    shape: Shape,
    grid: [u32; 3],
    params: &Params,
) -> Result<(), CudaError> {
    let launch = Launch { grid, ..Launch::new(1, 32 * shape.warps as u32) };
    // SAFETY: the caller's promise.
    unsafe { launch.shared(shape.shared as u32).overlap(true).run(stream, kernel, &mut [Arg::new(params)]) }
}

/// As `Activation` in kernels/common/activation.cuh: kind, alpha, beta, limit.
fn activation(a: Activation) -> [u32; 4] {
    let none = f32::INFINITY;
    let (alpha, beta, limit) = match a {
        Activation::Silu { limit } => (0.0, 0.0, limit.unwrap_or(none)),
        Activation::SwigluOai { alpha, beta, limit } => (alpha, beta, limit),
        Activation::SwigluStep { limit } => (0.0, 0.0, limit),
        Activation::Situ { beta, linear_beta } => (linear_beta.unwrap_or(0.0), beta, none),
        _ => (0.0, 0.0, none),
    };
    [a.index() as u32, alpha.to_bits(), beta.to_bits(), limit.to_bits()]
}
