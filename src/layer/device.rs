//! Where a layer's experts run: float32 rows in, float32 rows out, whatever the device.

use crate::config::MoeConfig;
use crate::cpu::{Executor, Experts};
use crate::kernel::{MoeKernel, Rows, RowsMut, Standard};
use crate::layer::{LayerError, RunError};
use crate::oracle::{KernelWeights, QuantConfig};

/// The device of a layer.
#[derive(Clone, Copy)]
pub enum Device<'a> {
    /// This machine's processor.
    Cpu,
    /// A GPU, through a stream on which everything is ordered.
    #[cfg(feature = "cuda")]
    Gpu(&'a std::sync::Arc<crate::cuda::Stream>),
    /// Keeps the lifetime where the feature is off.
    #[cfg(not(feature = "cuda"))]
    #[doc(hidden)]
    Never(std::convert::Infallible, std::marker::PhantomData<&'a ()>),
}

/// The experts of a layer on their device.
pub(super) enum Kernel {
    Cpu(MoeKernel<Standard, Box<dyn Experts>>),
    #[cfg(feature = "cuda")]
    Gpu(std::sync::Arc<crate::cuda::Stream>, crate::cuda::CudaKernel),
}

impl Kernel {
    pub(super) fn new(
        weights: KernelWeights,
        quant: Option<QuantConfig>,
        config: &MoeConfig,
        device: Device<'_>,
    ) -> Result<Self, LayerError> {
        match (weights, device) {
            #[cfg(feature = "cuda")]
            (KernelWeights::Gpu(weights), Device::Gpu(stream)) => {
                Ok(Kernel::Gpu(stream.clone(), crate::cuda::CudaKernel::new(stream, &weights, config, None)?))
            }
            #[cfg(feature = "cuda")]
            (_, Device::Gpu(_)) => Err(LayerError::Device),
            (weights, _) => Ok(Kernel::Cpu(MoeKernel::new(weights.into_experts(config, quant)?, config, None)?)),
        }
    }

    pub(super) fn config(&self) -> &MoeConfig {
        match self {
            Kernel::Cpu(kernel) => kernel.config(),
            #[cfg(feature = "cuda")]
            Kernel::Gpu(_, kernel) => kernel.config(),
        }
    }

    /// As [`Layer::fast_accum`](super::Layer::fast_accum).
    pub(super) fn fast_accum(&self) -> bool {
        match self {
            Kernel::Cpu(_) => false,
            #[cfg(feature = "cuda")]
            Kernel::Gpu(_, kernel) => kernel.fast_accum(),
        }
    }

    /// `hidden` `[T, H]`, ids and weights `[T, k]` to the output `[T, H]`.
    pub(super) fn forward(
        &self,
        hidden: &[f32],
        ids: &[i32],
        weights: &[f32],
        pool: &dyn Executor,
    ) -> Result<Vec<f32>, RunError> {
        match self {
            Kernel::Cpu(kernel) => {
                let mut output = vec![0.0; hidden.len()];
                let mut workspace = vec![0; kernel.workspace_bytes(hidden.len() / kernel.config().hidden)];
                kernel.forward(Rows::F32(hidden), ids, weights, RowsMut::F32(&mut output), &mut workspace, pool)?;
                Ok(output)
            }
            #[cfg(feature = "cuda")]
            Kernel::Gpu(stream, kernel) => gpu(stream, kernel, hidden, ids, weights),
        }
    }
}

/// Through the layer's input type: 16-bit ones round the hidden states on the way in.
#[cfg(feature = "cuda")]
fn gpu(
    stream: &crate::cuda::Stream,
    kernel: &crate::cuda::CudaKernel,
    hidden: &[f32],
    ids: &[i32],
    weights: &[f32],
) -> Result<Vec<f32>, RunError> {
    use crate::config::InputType;
    use crate::cuda::{DeviceBuffer, Tensors};
    let c = kernel.config();
    let tokens = crate::kernel::check_routed(c, hidden.len(), ids, weights)?;
    let x = match c.input {
        InputType::Bf16 => DeviceBuffer::of(stream, &map(hidden, |v| half::bf16::from_f32(*v)))?,
        InputType::F16 => DeviceBuffer::of(stream, &map(hidden, |v| half::f16::from_f32(*v)))?,
        InputType::F32 => DeviceBuffer::of(stream, hidden)?,
    };
    let (ids, weights) = (DeviceBuffer::of(stream, ids)?, DeviceBuffer::of(stream, weights)?);
    let output = DeviceBuffer::alloc(stream.gpu(), x.len())?;
    let workspace = DeviceBuffer::alloc(stream.gpu(), kernel.workspace_bytes(tokens))?;
    let tensors = Tensors {
        hidden: x.ptr(),
        topk_ids: ids.ptr(),
        topk_weights: weights.ptr(),
        output: output.ptr(),
        workspace: workspace.ptr(),
    };
    // SAFETY: every buffer was made on this stream's GPU above, is touched by this stream only, and lives until the
    // download below has waited for the stream.
    let launched = unsafe { kernel.forward(stream, &tensors, tokens) };
    // Waits whether the launch succeeded or not, so that no work outlives the buffers.
    let waited = stream.synchronize();
    launched.and(waited)?;
    Ok(match c.input {
        InputType::Bf16 => map(&download::<half::bf16>(stream, &output)?, |v| v.to_f32()),
        InputType::F16 => map(&download::<half::f16>(stream, &output)?, |v| v.to_f32()),
        InputType::F32 => download(stream, &output)?,
    })
}

#[cfg(feature = "cuda")]
fn map<T, U>(from: &[T], f: impl FnMut(&T) -> U) -> Vec<U> {
    from.iter().map(f).collect()
}

/// A whole buffer.
#[cfg(feature = "cuda")]
fn download<T: bytemuck::Pod>(
    stream: &crate::cuda::Stream,
    from: &crate::cuda::DeviceBuffer,
) -> Result<Vec<T>, crate::cuda::CudaError> {
    let mut to = vec![T::zeroed(); from.len() / size_of::<T>()];
    from.download(stream, 0, &mut to)?;
    Ok(to)
}
