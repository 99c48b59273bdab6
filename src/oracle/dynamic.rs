//! From keys that are only known at run time (a checkpoint's) to the monomorphised oracle.

use super::*;

/// An oracle with its keys, behind function pointers.
#[derive(Clone, Copy)]
pub struct DynOracle {
    /// The scheme.
    pub scheme: Scheme,
    /// The oracle's alias, `Fp8Block`.
    pub alias: &'static str,
    /// Weight key bits, 0 where not quantised.
    pub weight: u64,
    /// Activation key bits, 0 where not quantised.
    pub activation: u64,
    pub(super) vtable: Vtable,
}

/// A backend with the verdict on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Its name.
    pub backend: &'static str,
    /// Whether it would serve.
    pub verdict: Result<(), Unsupported>,
}

#[derive(Clone, Copy)]
pub(super) struct Vtable {
    select: fn(&MoeConfig, &Platform, &SelectInputs) -> Result<&'static KernelInfo, SelectError>,
    explain: fn(&MoeConfig, &Platform, &SelectInputs, &mut dyn FnMut(Candidate)),
    convert: fn(&'static str, &MoeConfig, &Platform, MoeWeights) -> Result<KernelWeights, ConvertError>,
    quant: fn(&MoeConfig, &MoeWeights) -> Result<QuantConfig, QuantConfigError>,
}

impl Vtable {
    pub(super) const fn of<O: MoeKernelOracle<Config = SelectInputs>>() -> Self {
        Self {
            select: |config, platform, inputs| O::select_backend(config, platform, inputs).map(|s| s.kernel),
            explain: |config, platform, inputs, sink| {
                let (w, a) = (key_bits(O::WEIGHT_KEY), key_bits(O::ACTIVATION_KEY));
                for backend in O::priority_backends(config, platform) {
                    let verdict = supports(O::kernel(*backend), config, platform, inputs, w, a);
                    sink(Candidate { backend: backend.name(), verdict });
                }
            },
            convert: |name, config, platform, weights| {
                let backend = O::Backend::ALL.iter().find(|b| b.name() == name);
                let backend = *backend.ok_or(ConvertError::NoSuchBackend { name, scheme: O::SCHEME })?;
                O::convert_to_kernel_format(backend, config, platform, weights)
            },
            quant: |config, weights| O::make_quant_config(config, weights),
        }
    }
}

/// The oracle of a scheme with these keys, if the pair is legal.
pub fn find(scheme: Scheme, weight: Option<QuantKey>, activation: Option<QuantKey>) -> Option<&'static DynOracle> {
    let (w, a) = (key_bits(weight), key_bits(activation));
    ORACLES.iter().find(|o| o.scheme == scheme && o.weight == w && o.activation == a)
}

impl DynOracle {
    /// [`MoeKernelOracle::select_backend`]
    pub fn select(
        &self,
        config: &MoeConfig,
        platform: &Platform,
        inputs: &SelectInputs,
    ) -> Result<&'static KernelInfo, SelectError> {
        (self.vtable.select)(config, platform, inputs)
    }

    /// Every candidate with the verdict on it, best first.
    pub fn explain(&self, config: &MoeConfig, platform: &Platform) -> Vec<Candidate> {
        self.explain_for(config, platform, &SelectInputs::AUTO)
    }

    /// The same, asked as `inputs` say; the backend's name among them changes no verdict.
    pub fn explain_for(&self, config: &MoeConfig, platform: &Platform, inputs: &SelectInputs) -> Vec<Candidate> {
        let mut all = Vec::new();
        (self.vtable.explain)(config, platform, inputs, &mut |c| all.push(c));
        all
    }

    /// [`MoeKernelOracle::convert_to_kernel_format`] for a selected kernel.
    pub fn convert(
        &self,
        kernel: &'static KernelInfo,
        config: &MoeConfig,
        platform: &Platform,
        weights: MoeWeights,
    ) -> Result<KernelWeights, ConvertError> {
        (self.vtable.convert)(kernel.name, config, platform, weights)
    }

    /// [`MoeKernelOracle::make_quant_config`]; `Ok(None)` for unquantized weights.
    pub fn quant_config(
        &self,
        config: &MoeConfig,
        weights: &MoeWeights,
    ) -> Result<Option<QuantConfig>, QuantConfigError> {
        match (self.vtable.quant)(config, weights) {
            Err(QuantConfigError::Unquantized) => Ok(None),
            other => other.map(Some),
        }
    }
}
