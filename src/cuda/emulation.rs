//! `cuda_emulation`: the layer from its definition on the GPU, in float32 over canonical weights, which lie there as the
//! checkpoint has them, and with activations quantised as their key says. For every scheme, key pair and activation, and
//! slow; what fast kernels are compared with.

mod arena;
mod matrix;

use super::activation::Activation;
use super::call::{BatchedTensors, Tensors};
use super::launch::{Arg, Launch};
use super::memory::{DeviceBuffer, DevicePtr};
use super::module::Kernel;
use super::{CudaError, Stream, quantize};
use crate::config::{ActivationFormat, MoeConfig};
use crate::oracle::{self, ConvertError, QuantConfigError};
use crate::scheme::QuantKey;
use crate::weights::{MoeWeights, WeightError};
use arena::Arena;
use bytemuck::{Pod, Zeroable};
use matrix::Expert;

/// Threads of a block: eight warps, each for one result at a time.
const THREADS: usize = 256;
/// The most blocks of a launch; warps go on to further results.
const MAX_BLOCKS: usize = 1 << 20;
/// Elements that a launch leaves in the workspace, 256 MiB: more tokens take further launches.
const MAX_SCRATCH: usize = 1 << 26;

/// Why there is no emulation of a layer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EmulationError {
    /// The weights contradict themselves.
    #[error(transparent)]
    Weights(#[from] WeightError),
    /// They are of another layer.
    #[error(transparent)]
    Convert(#[from] ConvertError),
    /// A stored activation scale is missing.
    #[error(transparent)]
    Scales(#[from] QuantConfigError),
    /// The layer or the GPU.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

/// A layer's experts on a GPU.
pub struct Emulation {
    first: Kernel,
    second: Kernel,
    /// What quantises the input of each.
    quantizers: Option<[Kernel; 2]>,
    layer: Layer,
    config: MoeConfig,
    /// What `layer` points into.
    _weights: DeviceBuffer,
    _experts: DeviceBuffer,
}

/// As in kernels/emulation.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Layer {
    local: u64,
    hidden: i32,
    intermediate: i32,
    experts: i32,
    local_experts: i32,
    topk: i32,
    /// By its place in `InputType::ALL`.
    input: i32,
    weight_on_input: i32,
    activation: Activation,
    /// By its place in the list of kernels/common/quantize.cuh, -1 for none.
    key: i32,
}

/// As in kernels/emulation.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Call {
    hidden: u64,
    ids: u64,
    weights: u64,
    map: u64,
    counts: u64,
    middle: u64,
    quantized: u64,
    output: u64,
    first: i64,
    tokens: i64,
    max: i64,
}

const _: () = assert!(size_of::<Expert>() == 200 && size_of::<Layer>() == 56 && size_of::<Call>() == 88);

impl Emulation {
    /// Uploads the weights, in the stream's order, and waits for it. With an `activation` key the input of each GEMM is
    /// quantised as it says; without, never.
    pub fn new(
        stream: &Stream,
        weights: &MoeWeights,
        activation: Option<QuantKey>,
        config: &MoeConfig,
    ) -> Result<Self, EmulationError> {
        let mut layer = layer(config).map_err(CudaError::Argument)?;
        weights.validate()?;
        oracle::check_shape(config, weights)?;
        if let Some(key) = activation {
            layer.key = quantize::index(key)? as i32;
            oracle::check_input_scales(weights, key)?;
        }
        // Once for the size alone.
        let mut arena = Arena::at(0);
        Expert::all(weights, &mut arena)?;
        let buffer = DeviceBuffer::alloc(stream.gpu(), arena.len())?;
        let mut arena = Arena::at(buffer.address());
        let experts = Expert::all(weights, &mut arena)?;
        for (offset, bytes) in arena.pieces() {
            buffer.upload(stream, *offset, bytes)?;
        }
        let experts = DeviceBuffer::of(stream, &experts)?;
        layer.local = experts.address();
        let kernel = |entry| stream.gpu().kernel("emulation", entry);
        let quantizers = match activation {
            Some(_) => Some([kernel("emulation_input")?, kernel("emulation_middle")?]),
            None => None,
        };
        Ok(Self {
            quantizers,
            first: kernel("emulation_first")?,
            second: kernel("emulation_second")?,
            layer,
            config: *config,
            _weights: buffer,
            _experts: experts,
        })
    }

    /// Bytes of workspace for up to so many tokens, or slots of an expert in the batched format.
    pub fn workspace_bytes(&self, tokens: usize) -> usize {
        let rows = match self.config.format {
            ActivationFormat::Standard => tokens,
            ActivationFormat::Batched => tokens.saturating_mul(self.config.local_experts),
        };
        rows.min(self.rows_at_once()) * self.scratch_per_row() * size_of::<f32>()
    }

    /// Runs the layer on the stream; does not wait. `map` says which local expert each of the E experts is, -1 for one
    /// of another rank; it is needed where the rank does not hold them all. Ids that name no local expert, -1 among
    /// them, add nothing.
    ///
    /// # Safety
    /// The tensors and the map must be allocated on this GPU and stay so until the work is done; nothing unordered may
    /// write what is read here or touch output and workspace, which must not overlap anything else. `self` must live
    /// until the work is done.
    pub unsafe fn forward(
        &self,
        stream: &Stream,
        t: &Tensors<'_>,
        tokens: usize,
        map: Option<DevicePtr<'_, i32>>,
    ) -> Result<(), CudaError> {
        t.check(&self.config, tokens, self.workspace_bytes(tokens))?;
        match map {
            Some(map) if map.len() < self.config.experts => {
                return Err(CudaError::Argument("the expert map is shorter than the number of experts"));
            }
            None if self.config.local_experts < self.config.experts => {
                return Err(CudaError::Argument("the expert map is missing: this rank holds only some of the experts"));
            }
            _ => {}
        }
        let call = Call {
            hidden: t.hidden.address(),
            ids: t.topk_ids.address(),
            weights: t.topk_weights.address(),
            map: map.map_or(0, |m| m.address()),
            middle: t.workspace.address(),
            output: t.output.address(),
            ..Call::zeroed()
        };
        // SAFETY: the check has found ids, weights, hidden states and output rows of all tokens and the workspace, and the map
        // has an entry per expert; the rest is the caller's promise.
        unsafe { self.run(stream, call, tokens) }
    }

    /// The batched format: `max` slots to an expert, of which the first `counts[e]` hold tokens. Otherwise as
    /// [`forward`](Self::forward).
    ///
    /// # Safety
    /// As for [`forward`](Self::forward).
    pub unsafe fn forward_batched(&self, stream: &Stream, t: &BatchedTensors<'_>, max: usize) -> Result<(), CudaError> {
        t.check(&self.config, max, self.workspace_bytes(max))?;
        let call = Call {
            hidden: t.hidden.address(),
            counts: t.counts.address(),
            middle: t.workspace.address(),
            output: t.output.address(),
            max: max as i64,
            ..Call::zeroed()
        };
        // SAFETY: the check has found hidden states and output rows of all slots, a count per local expert, and the workspace;
        // the rest is the caller's promise.
        unsafe { self.run(stream, call, max * self.config.local_experts) }
    }

    /// The launches for so many rows: tokens, or slots of all experts.
    ///
    /// # Safety
    /// As for [`forward`](Self::forward); what `call` points to holds all rows, but `middle`, which holds what
    /// [`rows_at_once`](Self::rows_at_once) need. It says which format it is of by `weights` and `counts`.
    unsafe fn run(&self, stream: &Stream, mut call: Call, rows: usize) -> Result<(), CudaError> {
        for first in (0..rows).step_by(self.rows_at_once()) {
            let now = self.rows_at_once().min(rows - first);
            (call.first, call.tokens) = (first as i64, now as i64);
            let MoeConfig { hidden, intermediate, .. } = self.config;
            let topk = self.layer.topk as usize;
            call.quantized = call.middle + (now * topk * intermediate * size_of::<f32>()) as u64;
            let [input, middle] =
                self.quantizers.as_ref().map_or([None; 2], |[input, middle]| [Some(input), Some(middle)]);
            for (kernel, results) in [
                (input, now * topk),
                (Some(&self.first), now * topk * intermediate),
                (middle, now * topk),
                (Some(&self.second), now * hidden),
            ] {
                let Some(kernel) = kernel else { continue };
                let blocks = results.div_ceil(THREADS / 32).min(MAX_BLOCKS);
                let mut args = [Arg::new(&self.layer), Arg::new(&call)];
                // SAFETY: the arguments are the two parameters of all four entries. The kernels read ids, weights and
                // hidden states, or counts, of rows below `rows` and write output rows of the same, which is what `call`
                // holds; middle and quantised elements below `now` rows', which lie in the workspace one after the
                // other; map entries below E; and the weights, as laid out for this layer, which `self` holds. The rest
                // is the caller's promise.
                unsafe { Launch::new(blocks as u32, THREADS as u32).run(stream, kernel, &mut args) }?;
            }
        }
        Ok(())
    }

    /// Elements; `layer` has refused sizes whose product overflows.
    fn scratch_per_row(&self) -> usize {
        let quantized = if self.quantizers.is_some() { self.config.hidden } else { 0 };
        self.layer.topk as usize * (self.config.intermediate + quantized)
    }

    fn rows_at_once(&self) -> usize {
        (MAX_SCRATCH / self.scratch_per_row()).max(1)
    }
}

/// What the kernels get but for the weights, or why they can't serve the layer.
fn layer(config: &MoeConfig) -> Result<Layer, &'static str> {
    if let Some(problem) = config.problem() {
        return Err(problem);
    }
    // The largest layer of one token, 4 GiB of scratch, is far beyond any model.
    if config.topk.checked_mul(config.intermediate + config.hidden).is_none_or(|n| n > 1 << 30) {
        return Err("top-k times the sum of hidden and intermediate size is beyond any model (2^30)");
    }
    // `problem` has refused what i32 does not hold.
    let int = |n: usize| n as i32;
    Ok(Layer {
        local: 0,
        hidden: int(config.hidden),
        intermediate: int(config.intermediate),
        experts: int(config.experts),
        local_experts: int(config.local_experts),
        // A slot of the batched format has one expert.
        topk: if config.format == ActivationFormat::Batched { 1 } else { int(config.topk) },
        input: config.input as i32,
        weight_on_input: i32::from(config.weight_on_input),
        activation: Activation::of(config.activation),
        key: -1,
    })
}

#[cfg(test)]
mod tests;
