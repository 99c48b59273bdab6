//! From canonical weights to a kernel's: checks, packing, quant config.

use super::select::{Device, ExpertsKind, KernelInfo, Numerics};
use crate::config::MoeConfig;
use crate::cpu::Experts;
use crate::cpu::reference::ReferenceExperts;
use crate::cpu::simd::{PackError, Rounding, SimdExperts};
use crate::platform::Platform;
use crate::scheme::{Extent, QuantKey, Scheme};
use crate::weights::{MoeWeights, WeightError};

/// Weights in the layout of a backend.
pub enum KernelWeights {
    /// As read, for the reference.
    Canonical {
        /// The weights.
        weights: MoeWeights,
        /// What the kernel does with the activation key.
        numerics: Numerics,
    },
    /// Packed for the vectorised CPU kernels.
    Simd(SimdExperts),
    /// Packed for a GPU.
    #[cfg(feature = "cuda")]
    Gpu(crate::cuda::GpuWeights),
}

/// Weights that can't become a kernel.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// The weights contradict themselves.
    #[error(transparent)]
    Weights(#[from] WeightError),
    /// The packer refused.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// They are of another scheme or key.
    #[error("the weights are {have}, the oracle was asked for {want}")]
    Scheme {
        /// What came.
        have: String,
        /// What was expected.
        want: String,
    },
    /// They have another shape than the layer.
    #[error("{what} is {have} in the weights and {want} in the layer's configuration")]
    Shape {
        /// Which dimension.
        what: &'static str,
        /// In the weights.
        have: usize,
        /// In the configuration.
        want: usize,
    },
    /// A name that this scheme does not have.
    #[error("`{name}` is no backend of the {scheme} oracle")]
    NoSuchBackend {
        /// The name.
        name: &'static str,
        /// The scheme.
        scheme: Scheme,
    },
    /// A backend that this build leaves out.
    #[error("the backend `{name}` is not in this build: {why}")]
    NotBuilt {
        /// Its name.
        name: &'static str,
        /// The reason.
        why: &'static str,
    },
    /// A CPU backend for a GPU, or the other way round.
    #[error("the backend `{0}` does not run on this platform")]
    Platform(&'static str),
    /// A layer for a GPU where one for the CPU was asked for.
    #[error("these weights are packed for a GPU: make a cuda::CudaKernel of them")]
    ForGpu,
    /// The GPU packer refused.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    GpuPack(#[from] crate::cuda::pack::GpuPackError),
    /// A layer that nothing could serve.
    #[error("{0}")]
    Config(&'static str),
    /// The expert map does not fit.
    #[error("the expert map {0}")]
    ExpertMap(String),
    /// Prepare/finalize of the other activation format.
    #[error("the kernel was made for the other activation format than the layer's configuration names")]
    Format,
}

/// What a quantised kernel needs beside weights and layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QuantConfig {
    /// What the weights are.
    pub weight: QuantKey,
    /// What the activations become before each GEMM, if anything.
    pub activation: Option<QuantKey>,
}

/// No quant config.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum QuantConfigError {
    /// The scheme has none.
    #[error("the unquantized oracle has no quantisation config")]
    Unquantized,
    /// A stored activation scale that the key needs is missing or senseless.
    #[error("expert {expert} has no usable input scale, which {key} activations need")]
    InputScale {
        /// The local expert.
        expert: usize,
        /// The activation key.
        key: QuantKey,
    },
}

pub(super) fn check(
    config: &MoeConfig,
    weights: &MoeWeights,
    scheme: Scheme,
    key: Option<QuantKey>,
) -> Result<(), ConvertError> {
    // A loader may hand a scheme's weights to another oracle that lists their key (mxfp8 to fp8): the key decides.
    if weights.weight_key != key {
        let name = |s: Scheme, k: Option<QuantKey>| format!("{s} ({})", k.map_or("unquantised", QuantKey::name));
        return Err(ConvertError::Scheme { have: name(weights.scheme, weights.weight_key), want: name(scheme, key) });
    }
    weights.validate()?;
    check_shape(config, weights)
}

/// Whether valid weights are of the layer's shape.
pub(crate) fn check_shape(config: &MoeConfig, weights: &MoeWeights) -> Result<(), ConvertError> {
    check_sizes(config, [weights.experts.len(), weights.hidden(), weights.intermediate()], Some(weights.gated()))
}

/// Whether local experts, hidden and intermediate size are the layer's, and the gate where it is known.
pub(crate) fn check_sizes(config: &MoeConfig, sizes: [usize; 3], gated: Option<bool>) -> Result<(), ConvertError> {
    let want = config.activation.gated();
    let [experts, hidden, intermediate] = sizes;
    let pairs = [
        ("the number of experts", experts, config.local_experts),
        ("the hidden size", hidden, config.hidden),
        ("the intermediate size", intermediate, config.intermediate),
        ("gated (0 or 1)", usize::from(gated.unwrap_or(want)), usize::from(want)),
    ];
    match pairs.into_iter().find(|(_, have, want)| have != want) {
        Some((what, have, want)) => Err(ConvertError::Shape { what, have, want }),
        None => Ok(()),
    }
}

pub(super) fn convert(
    kernel: &'static KernelInfo,
    config: &MoeConfig,
    platform: &Platform,
    weights: MoeWeights,
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables))] activation: Option<QuantKey>,
) -> Result<KernelWeights, ConvertError> {
    match (kernel.experts, platform) {
        (ExpertsKind::Reference, _) => Ok(KernelWeights::Canonical { weights, numerics: kernel.numerics }),
        (ExpertsKind::Simd, Platform::Cpu(isa)) => {
            Ok(KernelWeights::Simd(SimdExperts::new(&weights, config.activation, *isa)?))
        }
        (ExpertsKind::SimdInt8, Platform::Cpu(isa)) => {
            // As keyed there are only keys with a scale per token: the table's rows list no others.
            let as_keyed = kernel.numerics == Numerics::AsKeyed;
            let rounding = if as_keyed { Rounding::Int8Row } else { Rounding::Int8Block };
            Ok(KernelWeights::Simd(SimdExperts::rounding(&weights, config.activation, *isa, rounding)?))
        }
        #[cfg(feature = "cuda")]
        (ExpertsKind::Decode | ExpertsKind::Mma | ExpertsKind::Wgmma, Platform::Cuda(_)) => {
            use crate::cuda::{GpuWeights, pack::PackedExperts};
            if let Some(why) = NO_CUDA {
                return Err(ConvertError::NotBuilt { name: kernel.name, why });
            }
            let packed = PackedExperts::new(&weights, config)?;
            let quantises = matches!(kernel.numerics, Numerics::AsKeyed | Numerics::Mixed);
            let few_tokens_only = kernel.experts == ExpertsKind::Decode;
            Ok(KernelWeights::Gpu(match few_tokens_only {
                true => GpuWeights::Decode(packed),
                false => GpuWeights::Mma {
                    packed,
                    activation: activation.filter(|_| quantises),
                    hopper: kernel.experts == ExpertsKind::Wgmma,
                },
            }))
        }
        #[cfg(feature = "cuda")]
        (ExpertsKind::Emulation, Platform::Cuda(_)) if NO_CUDA.is_none() => {
            let activation = activation.filter(|_| kernel.numerics == Numerics::AsKeyed);
            Ok(KernelWeights::Gpu(crate::cuda::GpuWeights::Emulation { weights, activation }))
        }
        (_, Platform::Cuda(_)) if kernel.device != Device::Cpu => {
            Err(ConvertError::NotBuilt { name: kernel.name, why: NO_CUDA.unwrap_or("it has no packer") })
        }
        _ => Err(ConvertError::Platform(kernel.name)),
    }
}

/// Why this build has no GPU kernels, if it has none.
pub const NO_CUDA: Option<&str> = {
    #[cfg(feature = "cuda")]
    {
        crate::cuda::NOT_BUILT
    }
    #[cfg(not(feature = "cuda"))]
    {
        Some("the feature `cuda` is off")
    }
};

pub(super) fn quant_config(
    _config: &MoeConfig,
    weights: &MoeWeights,
    _scheme: Scheme,
    weight: Option<QuantKey>,
    activation: Option<QuantKey>,
) -> Result<QuantConfig, QuantConfigError> {
    let Some(weight) = weight else { return Err(QuantConfigError::Unquantized) };
    if let Some(key) = activation {
        check_input_scales(weights, key)?;
    }
    Ok(QuantConfig { weight, activation })
}

/// Whether every expert has the stored scales that an activation key needs.
pub(crate) fn check_input_scales(weights: &MoeWeights, key: QuantKey) -> Result<(), QuantConfigError> {
    let stored = |s: &crate::scheme::ScaleDesc| !s.dynamic && s.group.rows == Extent::All;
    if !stored(&key.scale) && !key.scale2.as_ref().is_some_and(stored) {
        return Ok(());
    }
    let usable = |s: Option<f32>| s.is_some_and(|s| s.is_finite() && s > 0.0);
    match weights.experts.iter().position(|e| !usable(e.input_scale) || !usable(e.down_input_scale)) {
        Some(expert) => Err(QuantConfigError::InputScale { expert, key }),
        None => Ok(()),
    }
}

impl KernelWeights {
    /// The experts that these weights make.
    pub fn into_experts(
        self,
        config: &MoeConfig,
        quant: Option<QuantConfig>,
    ) -> Result<Box<dyn Experts>, ConvertError> {
        Ok(match self {
            KernelWeights::Canonical { weights, numerics } => {
                let key = match numerics {
                    Numerics::AsKeyed | Numerics::Mixed => quant.and_then(|q| q.activation),
                    Numerics::WeightOnly | Numerics::Int8Block => None,
                };
                Box::new(ReferenceExperts::new(&weights, config.activation, key)?)
            }
            KernelWeights::Simd(experts) => Box::new(experts),
            #[cfg(feature = "cuda")]
            KernelWeights::Gpu(_) => return Err(ConvertError::ForGpu),
        })
    }

    /// For exact activations whatever the key asks, where the backend can do both.
    pub fn with_exact_activations(mut self) -> Self {
        match &mut self {
            KernelWeights::Canonical { numerics, .. } => *numerics = Numerics::WeightOnly,
            #[cfg(feature = "cuda")]
            KernelWeights::Gpu(
                crate::cuda::GpuWeights::Emulation { activation, .. } | crate::cuda::GpuWeights::Mma { activation, .. },
            ) => *activation = None,
            _ => {}
        }
        self
    }
}
