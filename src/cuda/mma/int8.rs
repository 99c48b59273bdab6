//! Tokens as int8 codes for the grouped GEMM: the inputs of both projections, quantised as the key says
//! (kernels/tokens8.cu).

use super::{Call, Parts, TOO_LARGE};
use crate::config::MoeConfig;
use crate::cuda::launch::{Arg, Launch};
use crate::cuda::memory::DeviceBuffer;
use crate::cuda::module::Kernel;
use crate::cuda::pack::{BLOCK, Codes, Compute, PackedExperts, StageScales};
use crate::cuda::permute::{Planes, ROW_BYTES, Source};
use crate::cuda::{CudaError, Stream, quantize};
use crate::scheme::{INT8_DYNAMIC_TENSOR_SYM, INT8_DYNAMIC_TOKEN_SYM, INT8_STATIC_TENSOR_SYM, QuantKey};

/// Blocks of 64 columns whose products of int8 codes a 32-bit sum holds, whatever they are.
const MAX_BLOCKS: usize = ((1 << 31) - 1) / (BLOCK << 14);
/// Threads of a block that has a token.
const TOKEN_THREADS: u32 = 128;
/// Warps of a block of the other kernel, and the 16-byte chunks of a row that each takes.
const MIDDLE_WARPS: usize = 8;
const MIDDLE_CHUNKS: usize = 32 * 4;

/// As in kernels/tokens8.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct TokensParams {
    x: u64,
    ids: u64,
    map: u64,
    places: u64,
    weights: u64,
    counts: u64,
    stored: u64,
    planes: u64,
    units: u64,
    hidden: i32,
    planes_count: i32,
    rows: i32,
    topk: i32,
    experts: i32,
    local_experts: i32,
    max_tokens: i32,
    _end: i32,
}

/// As in kernels/tokens8.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct MiddleParams {
    x: u64,
    tops: u64,
    sorted: u64,
    counts: u64,
    planes: u64,
    units: u64,
    rows: i32,
    columns: i32,
    planes_count: i32,
    max_tokens: i32,
}

// The kernels assert the same.
const _: () = assert!(size_of::<TokensParams>() == 104 && size_of::<MiddleParams>() == 64);

/// The grouped GEMM over codes.
pub(super) fn fatbin(compute: Compute) -> &'static str {
    ["mma_w8a8_bf16", "mma_w8a8_f16"][compute as usize]
}

/// The kernels, and the scales of a key that has them stored.
pub(super) struct Tokens8 {
    tokens: Kernel,
    middle: Kernel,
    /// `[2][local experts]`
    stored: Option<DeviceBuffer>,
    config: MoeConfig,
}

impl Tokens8 {
    /// `None` where weights or key are none that are multiplied as codes.
    pub fn new(
        stream: &Stream,
        packed: &PackedExperts,
        key: QuantKey,
        config: &MoeConfig,
    ) -> Result<Option<Self>, CudaError> {
        let keys = [INT8_DYNAMIC_TOKEN_SYM, INT8_DYNAMIC_TENSOR_SYM, INT8_STATIC_TENSOR_SYM];
        let whole = (packed.format.codes, packed.format.scales) == (Codes::Int8, StageScales::None);
        if !whole || !keys.contains(&key) || packed.first.blocks.max(packed.second.blocks) > MAX_BLOCKS {
            return Ok(None);
        }
        let stored = if quantize::stored(key) {
            let usable = |s: &&Vec<f32>| s.iter().all(|s| s.is_finite() && *s > 0.0);
            let of = |i: usize| packed.expert_input_scales[i].as_ref().filter(usable);
            let (Some(first), Some(second)) = (of(0), of(1)) else {
                return Err(CudaError::Argument("an expert has no usable input scale, which the activation key needs"));
            };
            Some(DeviceBuffer::of(stream, &[&first[..], &second[..]].concat())?)
        } else {
            None
        };
        let (tokens, middle) = match (&stored, packed.format.compute) {
            (None, Compute::Bf16) => ("tokens8_token_bf16", "middle8_token"),
            (None, Compute::F16) => ("tokens8_token_f16", "middle8_token"),
            (Some(_), Compute::Bf16) => ("tokens8_tensor_bf16", "middle8_tensor"),
            (Some(_), Compute::F16) => ("tokens8_tensor_f16", "middle8_tensor"),
        };
        let kernel = |entry| stream.gpu().kernel("tokens8", entry);
        Ok(Some(Self { tokens: kernel(tokens)?, middle: kernel(middle)?, stored, config: *config }))
    }

    /// Writes the codes of the call's tokens in the plan's order, and what they stand for.
    ///
    /// # Safety
    /// The plan must have been made on the stream. The call's addresses must be device memory for so many tokens and
    /// assignments, the workspace of these parts, and as [`Launch::run`] wants them.
    pub unsafe fn tokens(&self, stream: &Stream, call: &Call, planes: Planes, parts: &Parts) -> Result<(), CudaError> {
        let c = &self.config;
        let common = TokensParams {
            x: call.hidden,
            weights: call.routing,
            stored: self.stored.as_ref().map_or(0, DeviceBuffer::address),
            planes: call.workspace + parts.x as u64,
            units: call.workspace + parts.units[0] as u64,
            hidden: c.hidden as i32,
            planes_count: planes.count as i32,
            rows: call.assignments as i32,
            experts: c.experts as i32,
            local_experts: c.local_experts as i32,
            ..bytemuck::Zeroable::zeroed()
        };
        let params = match call.source {
            Source::Ids { ids, map, .. } => {
                let places = call.workspace + parts.places as u64;
                TokensParams { ids, map, places, topk: c.topk as i32, ..common }
            }
            Source::Counts { counts, max, .. } => TokensParams { counts, max_tokens: max as i32, topk: 1, ..common },
        };
        let launch = Launch::new(grid(call.tokens)?, TOKEN_THREADS).overlap(true);
        // SAFETY: the only parameter of every `tokens8_` entry; the rest is the caller's promise.
        unsafe { launch.run(stream, &self.tokens, &mut [Arg::new(&params)]) }
    }

    /// The same for the first projection's results, of so many columns.
    ///
    /// # Safety
    /// As for [`tokens`](Self::tokens), which must have run; the first projection, too.
    pub unsafe fn middle(
        &self,
        stream: &Stream,
        call: &Call,
        planes: Planes,
        columns: usize,
        parts: &Parts,
    ) -> Result<(), CudaError> {
        let common = MiddleParams {
            x: call.workspace + parts.floats as u64,
            tops: call.workspace + parts.tops as u64,
            planes: call.workspace + parts.middle as u64,
            units: call.workspace + parts.units[1] as u64,
            rows: call.assignments as i32,
            columns: columns as i32,
            planes_count: planes.count as i32,
            ..bytemuck::Zeroable::zeroed()
        };
        let params = match call.source {
            Source::Ids { rows, .. } => MiddleParams { sorted: rows, ..common },
            Source::Counts { counts, max, .. } => MiddleParams { counts, max_tokens: max as i32, ..common },
        };
        let parts_of_row = (ROW_BYTES / 16 * planes.count).div_ceil(MIDDLE_CHUNKS);
        let blocks = grid((call.assignments * parts_of_row).div_ceil(MIDDLE_WARPS))?;
        let launch = Launch::new(blocks, 32 * MIDDLE_WARPS as u32).overlap(true);
        // SAFETY: the only parameter of every `middle8_` entry; the rest is the caller's promise.
        unsafe { launch.run(stream, &self.middle, &mut [Arg::new(&params)]) }
    }
}

fn grid(blocks: usize) -> Result<u32, CudaError> {
    i32::try_from(blocks).map(|b| b as u32).map_err(|_| TOO_LARGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_have_the_same_numbers() {
        let source = include_str!("../../../kernels/tokens8.cu");
        for text in ["kTokenThreads = 128,", "kMiddleWarps = 8, kEach = 4;", "kMaxTopk = 32;"] {
            assert!(source.contains(text), "{text}");
        }
        assert_eq!((TOKEN_THREADS, MIDDLE_WARPS, MIDDLE_CHUNKS), (128, 8, 32 * 4));
        assert_eq!(crate::cuda::permute::MAX_TOPK, 32);
    }

    #[test]
    fn no_sum_overflows() {
        let largest = 128i64 * 128 * (MAX_BLOCKS * BLOCK) as i64;
        assert!(largest <= i64::from(i32::MAX) && largest + (128 * 128 * BLOCK) as i64 > i64::from(i32::MAX));
    }

    #[test]
    fn the_build_has_the_kernels() {
        use crate::cuda::{FATBINS, NOT_BUILT};
        if let Some(why) = NOT_BUILT {
            return println!("skipped: {why}");
        }
        for name in [fatbin(Compute::Bf16), fatbin(Compute::F16), "tokens8"] {
            assert!(FATBINS.iter().any(|f| f.name == name), "{name} is not in the table");
        }
    }
}
