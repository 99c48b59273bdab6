//! A layer on the GPU: the device's counterpart of [`MoeKernel`](crate::kernel::MoeKernel) in the standard format.

use super::call::Tensors;
use super::decode::Decode;
use super::memory::DeviceBuffer;
use super::pack::PackedExperts;
use super::{CudaError, Stream};
use crate::config::{ActivationFormat, MoeConfig};
use crate::kernel;
use crate::oracle::ConvertError;

/// Weights in the layout of a GPU backend, still on the host.
pub enum GpuWeights {
    /// For `cuda_decode`.
    Decode(PackedExperts),
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
}

/// A layer on a GPU, ready to run.
pub struct CudaKernel {
    config: MoeConfig,
    /// Global expert to local, -1 where it lives on another rank.
    map: Option<DeviceBuffer>,
    experts: Decode,
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
        if config.format != ActivationFormat::Standard {
            return Err(ConvertError::Format.into());
        }
        kernel::check_map(map, config)?;
        let GpuWeights::Decode(packed) = weights;
        if packed.experts != config.local_experts {
            let (have, want) = (packed.experts, config.local_experts);
            return Err(ConvertError::Shape { what: "the number of experts", have, want }.into());
        }
        let experts = Decode::new(stream, packed, config)?;
        let map = map.map(|m| DeviceBuffer::of(stream, m)).transpose()?;
        Ok(Self { config: *config, map, experts })
    }

    /// The layer.
    pub fn config(&self) -> &MoeConfig {
        &self.config
    }

    /// Bytes of weights on the device.
    pub fn bytes(&self) -> usize {
        self.experts.bytes()
    }

    /// Bytes that one expert's use must read, as the checkpoint stores them.
    pub fn bytes_per_expert(&self) -> usize {
        self.experts.bytes_per_expert()
    }

    /// Bytes of workspace that [`forward`](Self::forward) needs for up to `tokens` tokens.
    pub fn workspace_bytes(&self, tokens: usize) -> usize {
        self.experts.workspace_bytes(tokens)
    }

    /// Hidden states, ids and weights to the output, on the stream; does not wait, allocate, lock or look at the
    /// environment, and can be captured in a graph.
    ///
    /// # Safety
    /// The tensors must be allocated on this kernel's GPU and stay so until the work is done; nothing that is not ordered
    /// with this call may write what is read here or touch what is written. Output and workspace must not overlap
    /// anything else.
    pub unsafe fn forward(&self, stream: &Stream, t: &Tensors<'_>, tokens: usize) -> Result<(), CudaError> {
        let map = self.map.as_ref().map(DeviceBuffer::ptr::<i32>);
        // SAFETY: the map lives in `self` and has an entry per expert; the rest is the caller's promise.
        unsafe { self.experts.forward(stream, t, tokens, map) }
    }
}
