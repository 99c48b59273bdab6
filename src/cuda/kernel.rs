//! A layer on the GPU: the device's counterpart of [`MoeKernel`](crate::kernel::MoeKernel).

use super::call::{BatchedTensors, Tensors};
use super::decode::Decode;
use super::emulation::{Emulation, EmulationError};
use super::memory::DeviceBuffer;
use super::mma::{Mma, Tile};
use super::pack::{Compute, PackedExperts};
use super::wgmma::{self, Wgmma};
use super::{CudaError, Stream};
use crate::config::{ActivationFormat, InputType, MoeConfig};
use crate::kernel;
use crate::oracle::{self, ConvertError};
use crate::scheme::QuantKey;
use crate::weights::{ExpertWeights, MoeWeights};

/// Weights in the layout of a GPU backend, still on the host.
pub enum GpuWeights {
    /// For `cuda_decode`.
    Decode(PackedExperts),
    /// For `cuda_mma` and `cuda_wgmma`.
    Mma {
        /// The weights.
        packed: PackedExperts,
        /// What the input of each GEMM is quantised to where the kernels multiply it so; `None`: activations stay exact.
        activation: Option<QuantKey>,
        /// With Hopper's own kernels for many tokens, where they serve the layer: `cuda_wgmma`.
        hopper: bool,
    },
    /// For `cuda_emulation`.
    Emulation {
        /// As read.
        weights: MoeWeights,
        /// What the input of each GEMM is quantised to; `None`: activations stay exact.
        activation: Option<QuantKey>,
    },
}

impl GpuWeights {
    /// Bytes that one expert's use must read, as the checkpoint stores them.
    pub fn bytes_per_expert(&self) -> usize {
        match self {
            GpuWeights::Decode(packed) | GpuWeights::Mma { packed, .. } => packed.bytes_per_expert,
            GpuWeights::Emulation { weights, .. } => weights.experts.first().map_or(0, ExpertWeights::bytes),
        }
    }
}

/// What computes.
enum Experts {
    Decode(Decode),
    /// The grouped GEMM reads the packed experts that the kernels for few tokens own.
    Mma(Mma, Decode, Option<Wgmma>, Families),
    Emulation(Emulation),
}

/// Which of the kernels of `cuda_mma` and `cuda_wgmma` serve how many tokens: a plan that depends on nothing but a call's
/// size, which an engine may replace by what it has measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Families {
    /// Up to so many tokens (or slots of an expert, in the batched format) go to the kernels for few tokens, the others
    /// to the grouped GEMM; 0 for the grouped GEMM always.
    pub decode_up_to: usize,
    /// The grouped GEMM's tile, instead of the one that suits a call's size.
    pub tile: Option<Tile>,
    /// From so many tokens (or slots) on `cuda_wgmma` goes to Hopper's own kernels; `usize::MAX` for never.
    pub wgmma_from: usize,
    /// Their tile: 64, 128 or 256 tokens, instead of the one that suits a call's size.
    pub wgmma_tile: Option<usize>,
}

impl Families {
    /// Whether one family serves any number of tokens.
    const fn one_for_all(&self) -> bool {
        self.decode_up_to == 0 && (self.wgmma_from <= 1 || self.wgmma_from == usize::MAX)
    }

    /// What suits a layer of any format without Hopper's own kernels; a [`CudaKernel`] begins with what suits its own. With
    /// batch invariance one family has to serve all sizes.
    pub const fn of(config: &MoeConfig) -> Self {
        Self {
            decode_up_to: if config.batch_invariant { 0 } else { 8 },
            tile: None,
            wgmma_from: usize::MAX,
            wgmma_tile: None,
        }
    }
}

/// A layer that can't be put on the GPU.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GpuLayerError {
    /// The parts do not fit together.
    #[error(transparent)]
    Convert(#[from] ConvertError),
    /// The driver, the device or the build.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// The emulation refused the weights.
    #[error(transparent)]
    Emulation(#[from] EmulationError),
}

/// A layer on a GPU, ready to run.
pub struct CudaKernel {
    config: MoeConfig,
    /// Global expert to local, -1 where it lives on another rank.
    map: Option<DeviceBuffer>,
    experts: Experts,
    bytes_per_expert: usize,
}

/// Packed weights are for one type of hidden states, which those of a call, given as bytes, do not show.
fn check_input(packed: Compute, input: InputType) -> Result<(), CudaError> {
    match (packed, input) {
        (Compute::Bf16, InputType::Bf16) | (Compute::F16, InputType::F16) => Ok(()),
        _ => Err(CudaError::Argument("the weights were packed for another type of hidden states than the layer's")),
    }
}

impl CudaKernel {
    /// Uploads the weights and loads the kernels. `map[global]` is a local expert or -1; required where
    /// `local_experts` is less than `experts`.
    pub fn new(
        stream: &Stream,
        weights: &GpuWeights,
        config: &MoeConfig,
        map: Option<&[i32]>,
    ) -> Result<Self, GpuLayerError> {
        if let Some(problem) = config.problem() {
            return Err(ConvertError::Config(problem).into());
        }
        if config.format == ActivationFormat::Standard || map.is_some() {
            kernel::check_map(map, config)?;
        }
        if let GpuWeights::Decode(packed) | GpuWeights::Mma { packed, .. } = weights {
            check_input(packed.format.compute, config.input)?;
            oracle::check_sizes(config, [packed.experts, packed.hidden, packed.intermediate], Some(packed.gated))?;
        }
        let experts = match weights {
            GpuWeights::Decode(packed) => Experts::Decode(Decode::new(stream, packed, config)?),
            GpuWeights::Mma { packed, activation, hopper } => {
                let decode = Decode::new(stream, packed, config)?;
                // The projections stay where they are as long as `decode`, which goes together with this.
                let mma = Mma::new(stream, packed, decode.matrices(), *activation, config)?;
                let wgmma = match hopper {
                    true => Wgmma::new(stream, packed, *activation, decode.matrices(), config)?,
                    false => None,
                };
                let mut families = Families::of(config);
                if !config.batch_invariant {
                    families.wgmma_from = wgmma.as_ref().map_or(usize::MAX, Wgmma::pays_from);
                    if config.format == ActivationFormat::Standard {
                        families.decode_up_to = decode.pays_up_to().min(families.wgmma_from - 1);
                    }
                }
                Experts::Mma(mma, decode, wgmma, families)
            }
            GpuWeights::Emulation { weights, activation } => {
                Experts::Emulation(Emulation::new(stream, weights, *activation, config)?)
            }
        };
        let map = map.map(|m| DeviceBuffer::of(stream, m)).transpose()?;
        Ok(Self { config: *config, map, experts, bytes_per_expert: weights.bytes_per_expert() })
    }

    /// The layer.
    pub fn config(&self) -> &MoeConfig {
        &self.config
    }

    /// Bytes that one expert's use must read, as the checkpoint stores them.
    pub fn bytes_per_expert(&self) -> usize {
        self.bytes_per_expert
    }

    /// Whether sums stay in the tensor cores, as [`MoeConfig::fast_accum`] allows: for numbers of tokens that `cuda_wgmma`
    /// serves with e4m3 scales per row and tensor.
    pub fn fast_accum(&self) -> bool {
        matches!(&self.experts, Experts::Mma(_, _, Some(wgmma), _) if wgmma.fast_accum())
    }

    /// Which kernels serve how many tokens, where there is a choice.
    pub fn families(&self) -> Option<Families> {
        match &self.experts {
            Experts::Mma(.., families) => Some(*families),
            Experts::Decode(_) | Experts::Emulation(_) => None,
        }
    }

    /// Replaces that choice. Refused where there is none, for a tile that the layer has no kernel for (of 128 tokens there is
    /// one for bf16, f16 and int8 alone), and where a batch-invariant layer would change families with
    /// the number of tokens.
    pub fn set_families(&mut self, families: Families) -> Result<(), CudaError> {
        match &mut self.experts {
            Experts::Mma(..) if self.config.batch_invariant && !families.one_for_all() => {
                Err(CudaError::Argument("a batch-invariant layer must use the grouped GEMM for any number of tokens"))
            }
            Experts::Mma(..) if families.wgmma_tile.is_some_and(|t| !wgmma::TILES.contains(&t)) => {
                Err(CudaError::Argument("a tile of cuda_wgmma has 64, 128 or 256 tokens"))
            }
            Experts::Mma(mma, ..) if families.tile.is_some_and(|t| !mma.has(t)) => {
                Err(CudaError::Argument("cuda_mma has no kernel for that tile here: take a smaller one"))
            }
            Experts::Mma(mma, _, wgmma, have) => {
                mma.tile = families.tile;
                wgmma.iter_mut().for_each(|w| w.tile = families.wgmma_tile);
                *have = families;
                Ok(())
            }
            _ => Err(CudaError::Argument("only cuda_mma has a choice of kernels")),
        }
    }

    /// Bytes of workspace that a call needs for up to `tokens` tokens, or slots of an expert in the batched format.
    pub fn workspace_bytes(&self, tokens: usize) -> usize {
        match &self.experts {
            Experts::Decode(experts) => experts.workspace_bytes(tokens),
            Experts::Mma(mma, decode, wgmma, families) => {
                // For fewer tokens, too: those may go to another family.
                let few = decode.workspace_bytes(tokens.min(families.decode_up_to));
                if tokens <= families.decode_up_to {
                    return few;
                }
                match wgmma {
                    Some(wgmma) if tokens >= families.wgmma_from => {
                        let some = mma.workspace_bytes(families.wgmma_from.saturating_sub(1));
                        few.max(some).max(wgmma.workspace_bytes(tokens))
                    }
                    _ => few.max(mma.workspace_bytes(tokens)),
                }
            }
            Experts::Emulation(experts) => experts.workspace_bytes(tokens),
        }
    }

    /// Hidden states, ids and weights to the output, on the stream; does not wait, allocate, lock or look at the
    /// environment, and can be captured in a graph.
    ///
    /// # Safety
    /// The tensors must be allocated on this kernel's GPU and stay so until the work is done; nothing that is not ordered
    /// with this call may write what is read here or touch what is written. Output and workspace must not overlap
    /// anything else.
    pub unsafe fn forward(&self, stream: &Stream, t: &Tensors<'_>, tokens: usize) -> Result<(), CudaError> {
        if self.config.format != ActivationFormat::Standard {
            return Err(CudaError::Argument("this layer was made for the batched format: call forward_batched"));
        }
        let map = self.map.as_ref().map(DeviceBuffer::ptr::<i32>);
        // SAFETY: the map lives in `self` and has an entry per expert; the rest is the caller's promise.
        unsafe {
            match &self.experts {
                Experts::Decode(experts) => experts.forward(stream, t, tokens, map),
                Experts::Mma(_, decode, _, f) if tokens <= f.decode_up_to => decode.forward(stream, t, tokens, map),
                Experts::Mma(_, _, Some(wgmma), f) if tokens >= f.wgmma_from => wgmma.forward(stream, t, tokens, map),
                Experts::Mma(mma, ..) => mma.forward(stream, t, tokens, map),
                Experts::Emulation(experts) => experts.forward(stream, t, tokens, map),
            }
        }
    }

    /// The batched format: `max` slots to an expert, of which the first `counts[e]` hold tokens; results stay per expert,
    /// without routing weights. Slots beyond the counts are neither read nor written. Otherwise as
    /// [`forward`](Self::forward).
    ///
    /// # Safety
    /// As for [`forward`](Self::forward).
    pub unsafe fn forward_batched(&self, stream: &Stream, t: &BatchedTensors<'_>, max: usize) -> Result<(), CudaError> {
        if self.config.format != ActivationFormat::Batched {
            return Err(CudaError::Argument("this layer was made for the standard format: call forward"));
        }
        // SAFETY: the caller's promise.
        unsafe {
            match &self.experts {
                Experts::Decode(experts) => experts.forward_batched(stream, t, max),
                Experts::Mma(_, decode, _, f) if max <= f.decode_up_to => decode.forward_batched(stream, t, max),
                Experts::Mma(_, _, Some(wgmma), f) if max >= f.wgmma_from => wgmma.forward_batched(stream, t, max),
                Experts::Mma(mma, ..) => mma.forward_batched(stream, t, max),
                Experts::Emulation(experts) => experts.forward_batched(stream, t, max),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_packed_for_another_input_type_are_refused() {
        for (packed, own) in [(Compute::Bf16, InputType::Bf16), (Compute::F16, InputType::F16)] {
            for input in InputType::ALL {
                assert_eq!(check_input(packed, input).is_ok(), input == own, "{packed:?} {input:?}");
            }
        }
    }
}
