//! `cuda_emulation`: the layer from its definition on the GPU, in float32 over canonical weights, which lie there as the
//! checkpoint has them. For every scheme, weight key and activation, and slow; what fast kernels are compared with.

mod arena;
mod matrix;

use super::activation::Activation;
use super::call::Tensors;
use super::launch::{Arg, Launch};
use super::memory::{DeviceBuffer, DevicePtr};
use super::module::Kernel;
use super::{CudaError, Stream};
use crate::config::{ActivationFormat, MoeConfig};
use crate::weights::{MoeWeights, WeightError};
use arena::Arena;
use bytemuck::{Pod, Zeroable};
use matrix::Expert;

/// Threads of a block: eight warps, each for one result at a time.
const THREADS: usize = 256;
/// The most blocks of a launch; warps go on to further results.
const MAX_BLOCKS: usize = 1 << 20;
/// Elements between the projections that one launch makes, 256 MiB: more tokens take further launches.
const MAX_MIDDLE: usize = 1 << 26;

/// Why there is no emulation of a layer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EmulationError {
    /// The weights contradict themselves or the layer.
    #[error(transparent)]
    Weights(#[from] WeightError),
    /// The layer or the GPU.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

/// A layer's experts on a GPU. Activations are never quantised, whatever the layer's key asks.
pub struct Emulation {
    first: Kernel,
    second: Kernel,
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
    _pad: i32,
}

/// As in kernels/emulation.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Call {
    hidden: u64,
    ids: u64,
    weights: u64,
    map: u64,
    middle: u64,
    output: u64,
    first: i64,
    tokens: i64,
}

const _: () = assert!(size_of::<Expert>() == 192 && size_of::<Layer>() == 56 && size_of::<Call>() == 64);

impl Emulation {
    /// Uploads the weights, in the stream's order, and waits for it.
    pub fn new(stream: &Stream, weights: &MoeWeights, config: &MoeConfig) -> Result<Self, EmulationError> {
        let mut layer = layer(config).map_err(CudaError::Argument)?;
        weights.validate()?;
        fits(weights, config)?;
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
        Ok(Self {
            first: kernel("emulation_first")?,
            second: kernel("emulation_second")?,
            layer,
            config: *config,
            _weights: buffer,
            _experts: experts,
        })
    }

    /// Bytes of workspace for up to so many tokens.
    pub fn workspace_bytes(&self, tokens: usize) -> usize {
        tokens.min(self.tokens_at_once()) * self.middle_per_token() * size_of::<f32>()
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
        let mut call = Call {
            hidden: t.hidden.address(),
            ids: t.topk_ids.address(),
            weights: t.topk_weights.address(),
            map: map.map_or(0, |m| m.address()),
            middle: t.workspace.address(),
            output: t.output.address(),
            first: 0,
            tokens: 0,
        };
        for first in (0..tokens).step_by(self.tokens_at_once()) {
            let now = self.tokens_at_once().min(tokens - first);
            (call.first, call.tokens) = (first as i64, now as i64);
            for (kernel, results) in
                [(&self.first, now * self.middle_per_token()), (&self.second, now * self.config.hidden)]
            {
                let blocks = results.div_ceil(THREADS / 32).min(MAX_BLOCKS);
                let mut args = [Arg::new(&self.layer), Arg::new(&call)];
                // SAFETY: the arguments are the two parameters of both entries. The kernels read ids, weights and hidden
                // states of tokens below `tokens` and write output rows of the same, which the check has found in the
                // tensors; middle elements below `now` tokens', which lie in the workspace; map entries below E; and the
                // weights, as laid out for this layer, which `self` holds. The rest is the caller's promise.
                unsafe { Launch::new(blocks as u32, THREADS as u32).run(stream, kernel, &mut args) }?;
            }
        }
        Ok(())
    }

    /// `layer` has refused sizes whose product overflows.
    fn middle_per_token(&self) -> usize {
        self.config.topk * self.config.intermediate
    }

    fn tokens_at_once(&self) -> usize {
        (MAX_MIDDLE / self.middle_per_token()).max(1)
    }
}

/// What the kernels get but for the weights, or why they can't serve the layer.
fn layer(config: &MoeConfig) -> Result<Layer, &'static str> {
    if let Some(problem) = config.problem() {
        return Err(problem);
    }
    if config.format != ActivationFormat::Standard {
        return Err("the emulation on the GPU takes the standard activation format only");
    }
    // The largest layer of one token, 4 GiB between the projections, is far beyond any model.
    if config.topk.checked_mul(config.intermediate).is_none_or(|n| n > 1 << 30) {
        return Err("top-k times the intermediate size is beyond any model (2^30)");
    }
    // `problem` has refused what i32 does not hold.
    let int = |n: usize| n as i32;
    Ok(Layer {
        local: 0,
        hidden: int(config.hidden),
        intermediate: int(config.intermediate),
        experts: int(config.experts),
        local_experts: int(config.local_experts),
        topk: int(config.topk),
        input: config.input as i32,
        weight_on_input: i32::from(config.weight_on_input),
        activation: Activation::of(config.activation),
        _pad: 0,
    })
}

/// Whether valid weights are the layer's.
fn fits(weights: &MoeWeights, config: &MoeConfig) -> Result<(), WeightError> {
    let shape = [
        ("the number of experts", weights.experts.len(), config.local_experts),
        ("the hidden size", weights.hidden(), config.hidden),
        ("the intermediate size", weights.intermediate(), config.intermediate),
        ("gated (0 or 1)", usize::from(weights.gated()), usize::from(config.activation.gated())),
    ];
    match shape.into_iter().find(|(_, have, want)| have != want) {
        Some((what, have, want)) => Err(WeightError {
            tensor: "experts".into(),
            problem: format!("{what} is {have} in the weights and {want} in the layer's configuration"),
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
