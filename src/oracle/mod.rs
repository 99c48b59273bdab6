//! The oracles: for each quantisation scheme a zero-sized type that knows its backends, chooses among them, converts
//! weights to the chosen one's layout and makes the kernel.
//!
//! Everything per (scheme, backend) comes from `table.toml` in this folder.

mod convert;
mod dynamic;
mod select;

pub(crate) use convert::check_sizes;
pub use convert::{ConvertError, KernelWeights, NO_CUDA, QuantConfig, QuantConfigError};
#[cfg(feature = "cuda")]
pub(crate) use convert::{check_input_scales, check_shape};
pub use dynamic::{Candidate, DynOracle, find};
pub use select::*;

use crate::config::MoeConfig;
use crate::cpu::Experts;
use crate::kernel::{MoeKernel, PrepareFinalize};
use crate::platform::Platform;
use crate::scheme::*;
use crate::weights::MoeWeights;
use dynamic::Vtable;
use select::named;

/// What every backend enum offers.
pub trait BackendEnum: Copy + Eq + std::fmt::Debug + Send + Sync + 'static {
    /// All variants, best first on their device.
    const ALL: &'static [Self];
    /// `cpu_simd`
    fn name(self) -> &'static str;
}

/// The contract of vLLM's base class for kernel oracles, for one scheme with its quant keys.
pub trait MoeKernelOracle: Copy + Default + Send + Sync + 'static {
    /// The backend enum.
    type Backend: BackendEnum;
    /// What selection asks beside the layer and the platform.
    type Config: Copy + Default;
    /// The scheme.
    const SCHEME: Scheme;
    /// What the weights are.
    const WEIGHT_KEY: Option<QuantKey>;
    /// What the scheme asks of the activations.
    const ACTIVATION_KEY: Option<QuantKey>;

    /// Every backend, best first for this platform.
    fn priority_backends(config: &MoeConfig, platform: &Platform) -> &'static [Self::Backend];

    /// A backend's row of the table.
    fn kernel(backend: Self::Backend) -> &'static KernelInfo;

    /// The backend that a user-facing name means; `None` where it leaves the choice to us.
    fn map_backend(name: MoeBackend) -> Result<Option<Self::Backend>, SelectError>;

    /// The first backend that supports the layer, or every candidate's reason. Allocates nothing.
    fn select_backend(
        config: &MoeConfig,
        platform: &Platform,
        inputs: &Self::Config,
    ) -> Result<Selection<Self::Backend>, SelectError>;

    /// Packs canonical weights into the backend's layout. The reference keeps them as they are.
    fn convert_to_kernel_format(
        backend: Self::Backend,
        config: &MoeConfig,
        platform: &Platform,
        weights: MoeWeights,
    ) -> Result<KernelWeights, ConvertError> {
        convert::check(config, &weights, Self::SCHEME, Self::WEIGHT_KEY)?;
        convert::convert(Self::kernel(backend), config, platform, weights, Self::ACTIVATION_KEY)
    }

    /// What the kernel needs to know of scales and activations; the unquantized oracle has none, which is an error.
    fn make_quant_config(config: &MoeConfig, weights: &MoeWeights) -> Result<QuantConfig, QuantConfigError> {
        convert::quant_config(config, weights, Self::SCHEME, Self::WEIGHT_KEY, Self::ACTIVATION_KEY)
    }

    /// Joins prepare/finalize and experts. `quant` is `None` for unquantized weights; `expert_map[global]` is the local
    /// expert or -1 and must be given where this rank holds only some of the experts.
    fn make_kernel<P: PrepareFinalize>(
        weights: KernelWeights,
        quant: Option<QuantConfig>,
        config: &MoeConfig,
        expert_map: Option<Vec<i32>>,
    ) -> Result<MoeKernel<P, Box<dyn Experts>>, ConvertError> {
        MoeKernel::new(weights.into_experts(config, quant)?, config, expert_map)
    }
}

moe_oracle_macros::oracle_table!("src/oracle/table.toml");

impl MoeBackend {
    /// The name's value.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|b| b.name() == name)
    }
}

static_assertions::assert_eq_size!(Fp8Block, ());
static_assertions::assert_eq_size!(Nvfp4W4A4, ());
static_assertions::assert_impl_all!(Fp8Block: Send, Sync, Copy);
static_assertions::assert_impl_all!(IntWna16CpuSimd<0, 0>: Send, Sync, Copy);
