//! `cuda_decode`: two launches from expert ids to output, for a handful of tokens at a time (kernels/decode.cu).

use super::activation::Activation;
use super::call::{BatchedTensors, Tensors};
use super::launch::{Arg, Launch};
use super::memory::DevicePtr;
use super::module::Kernel;
use super::pack::{Codes, Format, PackedExperts};
use super::projection::{Matrix, Projection};
use super::{CudaError, Stream};
use crate::config::{ActivationFormat, MoeConfig};

/// Tokens of a pair of launches: the columns of a tensor-core product.
const TOKENS: usize = 8;
/// The kernels' limits: of (token, slot) pairs at once, and of slots of a lone token.
const MAX_ITEMS: usize = 128;
const MAX_TOPK: usize = 32;
/// Places of the warps' rings, as kernels/decode.cu has them.
const FIRST_DEPTH: usize = 2;
const SECOND_DEPTH: usize = 3;
/// More than any of the kernels has of static shared memory.
const STATIC_SHARED: usize = 11 << 10;

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
    activation: Activation,
    _pad: i32,
}

// The kernels assert the same.
const _: () = assert!(size_of::<Params>() == 184);

/// Warps of a block and bytes of its shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    warps: usize,
    shared: usize,
    /// With a lone token's rows, if they fit.
    shared_lone: Option<usize>,
}

/// How a layer is launched on a GPU; depends on no call, so that neither do the sums' orders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    first: Shape,
    second: Shape,
}

/// What a plan depends on.
#[derive(Clone, Copy)]
struct Sizes {
    format: Format,
    topk: usize,
    /// Bytes of a hidden state.
    hidden: usize,
    /// Bytes of an assignment's activations.
    middle: usize,
    first_blocks: usize,
    second_blocks: usize,
    second_slabs: usize,
}

impl Plan {
    /// `shared` bytes are what a block may have.
    fn new(s: Sizes, multiprocessors: usize, shared: usize) -> Self {
        let (per_chunk, chunk_bytes) = chunk(s.format);
        let shape = |chunks: usize, most: usize, depth: usize, lone: usize| {
            let ring = depth * (chunk_bytes + 16);
            // A power of two from 4 on (128 threads add up), no more than there are chunks.
            let mut warps = chunks.next_power_of_two().clamp(4, most);
            while warps > 4 && warps * ring > shared {
                warps /= 2;
            }
            // The rings serve to add up, too: 512 bytes a warp, which they always have.
            let rings = warps * ring;
            // Behind them, a lone token's rows and their barrier.
            Shape { warps, shared: rings, shared_lone: Some(rings + 16 + lone).filter(|all| *all <= shared) }
        };
        // The first kernel has blocks enough to fill the GPU whatever their size. The second has one per slab of the
        // output: where those are few, they are made larger.
        let most = if s.second_slabs <= multiprocessors { 16 } else { 8 };
        Plan {
            first: shape(s.first_blocks.div_ceil(per_chunk), 8, FIRST_DEPTH, s.hidden),
            second: shape(s.topk * s.second_blocks.div_ceil(per_chunk), most, SECOND_DEPTH, s.topk * s.middle),
        }
    }
}

/// Blocks and bytes of what a warp brings in at once.
fn chunk(format: Format) -> (usize, usize) {
    let stages = match format.codes {
        Codes::E2m1 | Codes::U4 => 2,
        Codes::Half | Codes::E4m3 | Codes::Int8 => 1,
    };
    (2 * stages, stages * (2 * format.codes.words() * 512 + 32 * format.scales.registers()))
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
        let sizes = Sizes {
            format: packed.format,
            topk: config.topk,
            hidden: 2 * config.hidden,
            middle: 2 * packed.middle,
            first_blocks: packed.first.blocks,
            second_blocks: packed.second.blocks,
            second_slabs: packed.second.slabs,
        };
        let info = gpu.info();
        let plan = Plan::new(sizes, info.sms as usize, info.shared_per_block.saturating_sub(STATIC_SHARED));
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

    /// Where the packed projections lie, gate and up first; they stay there as long as `self`.
    pub(super) fn matrices(&self) -> [Matrix; 2] {
        [self.first.matrix, self.second.matrix]
    }

    /// Tokens that go through a pair of launches.
    fn group(&self) -> usize {
        // With batch invariance, a token's sums must not depend on which experts the others chose: the second kernel
        // takes each alone, which needs room for its rows.
        if self.config.batch_invariant && self.plan.second.shared_lone.is_none() {
            return 1;
        }
        TOKENS.min(MAX_ITEMS / self.config.topk)
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
            let Plan { first, second } = self.plan;
            let (kernel, shared) = match first.shared_lone {
                Some(shared) if n == 1 && !c.batch_invariant => (&self.first_one, shared),
                _ => (&self.first_many, first.shared),
            };
            let grid = [self.first.matrix.slabs as u32, (n * c.topk) as u32, 1];
            // SAFETY: the parameters are those of every entry; lengths were checked, the packed experts live in `self`;
            // the rest is the caller's promise.
            unsafe { launch(stream, kernel, first.warps, shared, grid, &params)? };
            let (kernel, shared, rows) = match second.shared_lone {
                Some(shared) if n == 1 || c.batch_invariant => (&self.second_one, shared, n),
                _ => (&self.second_many, second.shared, 1),
            };
            let grid = [self.second.matrix.slabs as u32, rows as u32, 1];
            // SAFETY: as above.
            unsafe { launch(stream, kernel, second.warps, shared, grid, &params)? };
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
            ..self.params()
        };
        let Plan { first, second } = self.plan;
        let grid = |m: &Matrix| [m.slabs as u32, c.local_experts as u32, max.div_ceil(TOKENS) as u32];
        // SAFETY: the parameters are those of every entry; lengths were checked, the packed experts live in `self`; the
        // rest is the caller's promise.
        unsafe {
            launch(stream, &self.first_batched, first.warps, first.shared, grid(&self.first.matrix), &params)?;
            launch(stream, &self.second_batched, second.warps, second.shared, grid(&self.second.matrix), &params)
        }
    }
}

/// # Safety
///
/// As for [`Launch::run`], with `Params` as the kernel's only parameter.
unsafe fn launch(
    stream: &Stream,
    kernel: &Kernel,
    warps: usize,
    shared: usize,
    grid: [u32; 3],
    params: &Params,
) -> Result<(), CudaError> {
    let launch = Launch { grid, ..Launch::new(1, 32 * warps as u32) };
    // SAFETY: the caller's promise.
    unsafe { launch.shared(shared as u32).overlap(true).run(stream, kernel, &mut [Arg::new(params)]) }
}

#[cfg(test)]
mod tests {
    use super::super::pack::{Compute, StageScales};
    use super::*;

    const H200: usize = (227 << 10) - STATIC_SHARED;
    const ADA: usize = (99 << 10) - STATIC_SHARED;

    fn sizes(codes: Codes, scales: StageScales, (h, i, k): (usize, usize, usize)) -> Sizes {
        Sizes {
            format: Format { codes, scales, compute: Compute::Bf16, scale_bf16: false },
            topk: k,
            hidden: 2 * h,
            middle: 2 * i,
            first_blocks: h.div_ceil(64),
            second_blocks: i.div_ceil(64),
            second_slabs: h.div_ceil(16),
        }
    }

    #[test]
    fn every_plan_fits_the_gpu_and_fills_its_blocks() {
        let formats = [
            (Codes::Half, StageScales::None),
            (Codes::E4m3, StageScales::F32(4)),
            (Codes::U4, StageScales::Half(4, true)),
        ];
        let layers = [(2048, 768, 8), (4096, 14336, 2), (7168, 256, 8), (2880, 2880, 4), (5120, 8192, 1), (96, 32, 10)];
        for (codes, scales) in formats {
            for layer in layers {
                for (sms, shared) in [(132, H200), (128, ADA)] {
                    let plan = Plan::new(sizes(codes, scales, layer), sms, shared);
                    for (shape, most) in [(plan.first, 8), (plan.second, 16)] {
                        assert!(shape.shared <= shared && shape.shared >= 512 * shape.warps, "{layer:?} {shape:?}");
                        assert!(shape.shared_lone.is_none_or(|s| s <= shared), "{layer:?} {shape:?}");
                        assert!(shape.warps.is_power_of_two() && (4..=most).contains(&shape.warps), "{shape:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn rows_that_do_not_fit_are_left_to_the_kernel_for_many() {
        let wide = sizes(Codes::Half, StageScales::None, (4096, 14336, 8));
        assert_eq!(Plan::new(wide, 132, H200).second.shared_lone, None);
        let narrow = sizes(Codes::Half, StageScales::None, (2048, 768, 8));
        assert!(Plan::new(narrow, 132, H200).second.shared_lone.is_some());
    }

    #[test]
    fn the_kernels_have_the_same_numbers() {
        let decode = include_str!("../../kernels/decode.cu");
        for (name, value) in [
            ("kColumns", TOKENS),
            ("kMaxItems", MAX_ITEMS),
            ("kFirstDepth", FIRST_DEPTH),
            ("kSecondDepth", SECOND_DEPTH),
        ] {
            assert!(decode.contains(&format!("constexpr int {name} = {value};")), "{name}");
        }
        // What `chunk` says of codes of one word.
        assert!(include_str!("../../kernels/common/stream.cuh").contains("kStages = Q::kWords == 1 ? 2 : 1,"));
    }

    #[test]
    fn few_slabs_get_large_blocks() {
        let qwen = sizes(Codes::U4, StageScales::Half(1, false), (2048, 768, 8));
        assert_eq!(Plan::new(qwen, 132, H200).second.warps, 16);
        let deepseek = sizes(Codes::U4, StageScales::Half(1, false), (7168, 256, 8));
        assert_eq!(Plan::new(deepseek, 132, H200).second.warps, 8);
    }
}
