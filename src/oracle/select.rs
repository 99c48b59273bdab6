//! Selection: what a kernel is, whether it can serve a layer, and why not. All of it runs in const context.

use crate::config::{Activation, ActivationFormat, All2All, InputType, MoeConfig};
use crate::oracle::MoeBackend;
use crate::platform::Platform;
use crate::scheme::Scheme;

/// What a kernel runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// Any CPU.
    Cpu,
    /// NVIDIA from this compute capability up (80 is 8.0).
    Cuda {
        /// The smallest.
        min: u16,
        /// The largest.
        max: u16,
    },
}

/// What a kernel does with an activation key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numerics {
    /// Activations stay exact, which is more precise than the key asks for.
    WeightOnly,
    /// The input of each GEMM is quantised as the key says.
    AsKeyed,
    /// Few tokens keep exact activations; where a call has more, its kernels quantise as the key says.
    Mixed,
    /// The input of each GEMM is rounded to int8 per 32 values at most, whatever the key asks: see
    /// [`crate::cpu::simd::Rounding`].
    Int8Block,
}

/// The Rust type behind a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertsKind {
    /// [`crate::cpu::simd::SimdExperts`]
    Simd,
    /// The same with int8 activations.
    SimdInt8,
    /// [`crate::cpu::reference::ReferenceExperts`]
    Reference,
    /// CUDA kernels for few tokens.
    Decode,
    /// CUDA kernels for any number of tokens: a grouped GEMM, and those for few tokens.
    Mma,
    /// The same, with Hopper's own kernels for more tokens.
    Wgmma,
    /// CUDA kernels that compute from the definition over canonical weights.
    Emulation,
}

/// A row of the table.
#[derive(Debug)]
pub struct KernelInfo {
    /// `cpu_simd`
    pub name: &'static str,
    /// Where it runs.
    pub device: Device,
    /// What it does with activation keys.
    pub numerics: Numerics,
    /// What computes.
    pub experts: ExpertsKind,
    /// Whether it serves only callers that name it.
    pub by_name_only: bool,
    /// (weight, activation) keys it serves.
    pub pairs: &'static [(u64, u64)],
    /// A bit for each place of [`Activation::ALL`]: see [`computes`](Self::computes).
    pub activations: u32,
    /// A bit for each place of [`ActivationFormat::ALL`]: see [`takes`](Self::takes).
    pub formats: u32,
    /// A bit for each place of [`InputType::ALL`]: see [`reads`](Self::reads).
    pub inputs: u32,
}

/// What a caller asks of a selection beside the layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SelectInputs {
    /// The backend by name.
    pub backend: MoeBackend,
    /// Count backends whose kernels are not in this build as refused, instead of judging by the table alone.
    pub built_only: bool,
}

impl SelectInputs {
    /// Ours to choose.
    pub const AUTO: Self = Self { backend: MoeBackend::Auto, built_only: false };

    /// This backend or none.
    pub const fn named(backend: MoeBackend) -> Self {
        Self { backend, ..Self::AUTO }
    }

    /// Only what this build can run.
    pub const fn built_only(self) -> Self {
        Self { built_only: true, ..self }
    }
}

/// Why a kernel can't serve a layer.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Unsupported {
    /// Wrong hardware.
    #[error("it runs on {needs}, not on {platform}")]
    Device {
        /// What it needs.
        needs: &'static str,
        /// What there is.
        platform: Platform,
    },
    /// The GPU is older than the kernel.
    #[error("it needs compute capability {min}, {platform} is older")]
    Capability {
        /// What it needs.
        min: u16,
        /// What there is.
        platform: Platform,
    },
    /// The GPU is newer than the only ones that run the kernel.
    #[error("it is for compute capability {max} only, {platform} is newer")]
    NewerCapability {
        /// What it is for at most.
        max: u16,
        /// What there is.
        platform: Platform,
    },
    /// No kernel for these keys.
    #[error("it has no kernel for this pair of weight and activation keys")]
    QuantScheme,
    /// The activation function.
    #[error("it does not compute the activation {0}")]
    Activation(&'static str),
    /// Standard or batched.
    #[error("it does not take the {0} activation format")]
    Format(&'static str),
    /// Sizes that nothing could serve.
    #[error("{0}")]
    Shape(&'static str),
    /// The type of hidden states.
    #[error("it does not take {0} hidden states")]
    Input(&'static str),
    /// Its kernels were left out of this build.
    #[error("its kernels are not in this build: {0}")]
    NotBuilt(&'static str),
    /// LoRA.
    #[error("LoRA adapters on experts are not supported by any kernel of this crate")]
    Lora,
    /// A transport that we can't work behind.
    #[error("the mori transport exists only together with AITER on ROCm")]
    Transport,
    /// The name stands for other hardware.
    #[error("`{}` stands for another vendor's hardware, for which this crate has no kernels", .0.name())]
    NameOfOtherHardware(MoeBackend),
    /// The name means nothing for this scheme.
    #[error("`{}` is no backend of this scheme; the names that work: {works}", name.name())]
    UnknownName {
        /// What was asked.
        name: MoeBackend,
        /// What works.
        works: &'static str,
    },
}

/// A chosen backend.
#[derive(Clone, Copy, Debug)]
pub struct Selection<B> {
    /// The variant of the scheme's enum.
    pub backend: B,
    /// Its row of the table.
    pub kernel: &'static KernelInfo,
}

/// A candidate and why it was refused.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rejection {
    /// The backend; empty where the request itself failed.
    pub backend: &'static str,
    /// Why.
    pub why: Unsupported,
}

/// The most candidates that an error lists; the table has fewer per scheme.
const MAX: usize = 12;

/// No backend serves the layer: the reason for every candidate. Holds no heap memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SelectError {
    /// The oracle that was asked.
    pub scheme: Scheme,
    rejections: [Option<Rejection>; MAX],
}

impl SelectError {
    /// No candidate yet.
    pub const fn none(scheme: Scheme) -> Self {
        Self { scheme, rejections: [None; MAX] }
    }

    /// The request itself can't be served.
    pub const fn of_name(scheme: Scheme, why: Unsupported) -> Self {
        Self::none(scheme).with("", why)
    }

    /// One more candidate.
    pub const fn with(mut self, backend: &'static str, why: Unsupported) -> Self {
        let mut i = 0;
        while i < MAX {
            if self.rejections[i].is_none() {
                self.rejections[i] = Some(Rejection { backend, why });
                break;
            }
            i += 1;
        }
        self
    }

    /// The candidates in order of priority.
    pub fn rejections(&self) -> impl Iterator<Item = &Rejection> {
        self.rejections.iter().flatten()
    }
}

impl std::fmt::Display for SelectError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "no backend of the {} oracle serves this layer:", self.scheme)?;
        for (i, r) in self.rejections().enumerate() {
            let (sep, colon) = (if i > 0 { ";" } else { "" }, if r.backend.is_empty() { "" } else { ": " });
            write!(f, "{sep} {}{colon}{}", r.backend, r.why)?;
        }
        Ok(())
    }
}

impl std::error::Error for SelectError {}

/// Whether a pair of keys is in a list.
pub const fn pair_in(pairs: &[(u64, u64)], w: u64, a: u64) -> bool {
    let mut i = 0;
    while i < pairs.len() {
        if pairs[i].0 == w && pairs[i].1 == a {
            return true;
        }
        i += 1;
    }
    false
}

/// A bit for each of `names` by its place in `all`. The table's names come here while the crate is compiled, so that one
/// that the crate does not know stops the build.
pub(super) const fn named(names: &[&str], all: &[&str]) -> u32 {
    let mut bits = 0;
    let mut i = 0;
    while i < names.len() {
        let mut place = 0;
        while place < all.len() && !same(all[place], names[i]) {
            place += 1;
        }
        assert!(
            place < all.len(),
            "the table names an activation, an activation format or an input type that the crate does not know"
        );
        bits |= 1 << place;
        i += 1;
    }
    bits
}

const fn same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut i = 0;
    while i < a.len() && i < b.len() && a[i] == b[i] {
        i += 1;
    }
    i == a.len() && i == b.len()
}

impl KernelInfo {
    /// Whether this build carries it. A GPU may still be of an architecture that the build left out.
    pub const fn built(&self) -> bool {
        matches!(self.device, Device::Cpu) || super::NO_CUDA.is_none()
    }

    /// Whether it computes this activation, whatever its parameters.
    pub const fn computes(&self, activation: Activation) -> bool {
        self.activations & 1 << activation.index() != 0
    }

    /// Whether it takes tokens in this format.
    pub const fn takes(&self, format: ActivationFormat) -> bool {
        self.formats & 1 << format as u32 != 0
    }

    /// Whether it reads and writes hidden states of this type.
    pub const fn reads(&self, input: InputType) -> bool {
        self.inputs & 1 << input as u32 != 0
    }
}

/// Whether a kernel serves a layer on a platform with these keys; else the first reason against it.
pub const fn supports(
    kernel: &KernelInfo,
    config: &MoeConfig,
    platform: &Platform,
    inputs: &SelectInputs,
    w: u64,
    a: u64,
) -> Result<(), Unsupported> {
    if let Some(problem) = config.problem() {
        return Err(Unsupported::Shape(problem));
    }
    match (kernel.device, *platform) {
        (Device::Cpu, Platform::Cpu(_)) => {}
        (Device::Cuda { min, max }, Platform::Cuda(cc)) => {
            if cc < min {
                return Err(Unsupported::Capability { min, platform: *platform });
            }
            if cc > max {
                return Err(Unsupported::NewerCapability { max, platform: *platform });
            }
        }
        (Device::Cpu, _) => return Err(Unsupported::Device { needs: "the CPU", platform: *platform }),
        (Device::Cuda { .. }, _) => return Err(Unsupported::Device { needs: "NVIDIA GPUs", platform: *platform }),
    }
    if !pair_in(kernel.pairs, w, a) {
        return Err(Unsupported::QuantScheme);
    }
    if config.lora {
        return Err(Unsupported::Lora);
    }
    if !kernel.computes(config.activation) {
        return Err(Unsupported::Activation(config.activation.name()));
    }
    if !kernel.takes(config.format) {
        return Err(Unsupported::Format(config.format.name()));
    }
    if matches!(config.parallel.all2all, All2All::Mori) {
        return Err(Unsupported::Transport);
    }
    if !kernel.reads(config.input) {
        return Err(Unsupported::Input(config.input.name()));
    }
    if let Device::Cuda { .. } = kernel.device {
        if !config.hidden.is_multiple_of(8) {
            return Err(Unsupported::Shape("it needs a hidden size that is a multiple of 8"));
        }
        if matches!(kernel.experts, ExpertsKind::Decode | ExpertsKind::Mma | ExpertsKind::Wgmma) && config.topk > 32 {
            return Err(Unsupported::Shape("it needs a top-k of at most 32"));
        }
        if matches!(kernel.experts, ExpertsKind::Mma | ExpertsKind::Wgmma) && config.local_experts > 1024 {
            return Err(Unsupported::Shape("it takes at most 1024 experts on a rank"));
        }
        if let (true, Some(why)) = (inputs.built_only, super::NO_CUDA) {
            return Err(Unsupported::NotBuilt(why));
        }
    }
    Ok(())
}
