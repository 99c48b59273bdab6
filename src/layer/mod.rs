//! A layer of a checkpoint, from its tensors to its output: the whole path in one type. Engines that bring their own
//! router, workspace or static selection use [`crate::oracle`] and [`crate::kernel`] directly.

mod device;

pub use device::Device;

use device::Kernel;

use crate::checkpoint::{MoeLayer, RouterWeights, SharedExpert};
use crate::config::{MoeConfig, Routing, RoutingMethod, sigmoid};
use crate::cpu::Executor;
use crate::kernel::{ForwardError, routing};
use crate::oracle::{
    self, ConvertError, DynOracle, ExpertsKind, KernelInfo, MoeBackend, QuantConfigError, SelectError, SelectInputs,
};
use crate::platform::Platform;
use crate::scheme::{QuantKey, Scheme};
use crate::weights::MoeWeights;

/// A layer that can't be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// Keys that no oracle pairs.
    #[error("the {scheme} oracle has no kernel for {weight} weights with {activation} activations")]
    Keys {
        /// The scheme.
        scheme: Scheme,
        /// Name of the weight key.
        weight: &'static str,
        /// Name of the activation key.
        activation: &'static str,
    },
    /// No backend.
    #[error(transparent)]
    Select(#[from] SelectError),
    /// Weights that can't be packed.
    #[error(transparent)]
    Convert(#[from] ConvertError),
    /// Missing scales.
    #[error(transparent)]
    Quant(#[from] QuantConfigError),
    /// Exact activations of a backend that rounds them.
    #[error("the backend `{0}` rounds activations: for exact ones ask for another, such as cpu_simd")]
    Rounds(&'static str),
    /// A backend for the CPU, and a GPU to run it.
    #[cfg(feature = "cuda")]
    #[error(
        "the backend that was chosen runs on the CPU, not on the GPU given: select for the GPU's platform, or for Device::Cpu"
    )]
    Device,
    /// The GPU's part.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Gpu(#[from] crate::cuda::GpuLayerError),
}

/// A layer that can't be run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The arguments do not fit the layer.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// The GPU's part.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] crate::cuda::CudaError),
}

/// What was chosen for a set of experts.
#[derive(Clone, Copy)]
pub struct Choice {
    /// The oracle.
    pub oracle: &'static DynOracle,
    /// Its backend.
    pub kernel: &'static KernelInfo,
}

/// How a layer is made.
#[derive(Clone, Copy, Debug)]
pub struct LayerOptions {
    /// Where it runs.
    pub platform: Platform,
    /// The backend asked for. A shared expert of another scheme, which may have no backend of that name, then gets its best.
    pub inputs: SelectInputs,
    /// Leave activations exact even where the backend could quantise them as the checkpoint asks.
    pub exact_activations: bool,
}

struct Shared {
    choice: Choice,
    kernel: Kernel,
    gate: Option<Vec<f32>>,
}

/// A layer with its router and shared expert.
pub struct Layer {
    kernel: Kernel,
    choice: Choice,
    router: RouterWeights,
    shared: Option<Shared>,
}

/// A layer's answer; `[T, ..]` row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerOutput {
    /// `[T, H]`, the routed experts
    pub output: Vec<f32>,
    /// `[T, k]`
    pub topk_ids: Vec<i32>,
    /// `[T, k]`
    pub topk_weights: Vec<f32>,
    /// `[T, H]`, with the shared expert added, where there is one
    pub output_with_shared: Option<Vec<f32>>,
}

/// The oracle for these weights and its choice.
pub fn choose(weights: &MoeWeights, config: &MoeConfig, options: &LayerOptions) -> Result<Choice, LayerError> {
    let (scheme, w, a) = (weights.scheme, weights.weight_key, weights.activation_key);
    let name = |k: Option<QuantKey>| k.map_or("unquantised", QuantKey::name);
    let oracle = oracle::find(scheme, w, a).ok_or(LayerError::Keys { scheme, weight: name(w), activation: name(a) })?;
    Ok(Choice { oracle, kernel: oracle.select(config, &options.platform, &options.inputs)? })
}

fn make(
    weights: MoeWeights,
    config: &MoeConfig,
    options: &LayerOptions,
    device: Device<'_>,
) -> Result<(Choice, Kernel), LayerError> {
    let choice = choose(&weights, config, options)?;
    if options.exact_activations && choice.kernel.experts == ExpertsKind::SimdInt8 {
        return Err(LayerError::Rounds(choice.kernel.name));
    }
    let quant = choice.oracle.quant_config(config, &weights)?;
    let packed = choice.oracle.convert(choice.kernel, config, &options.platform, weights)?;
    let packed = if options.exact_activations { packed.with_exact_activations() } else { packed };
    Ok((choice, Kernel::new(packed, quant, config, device)?))
}

impl Shared {
    fn new(
        shared: SharedExpert,
        layer: &MoeConfig,
        routed: Scheme,
        options: &LayerOptions,
        device: Device<'_>,
    ) -> Result<Self, LayerError> {
        let w = &shared.weights;
        let config = MoeConfig {
            activation: layer.activation,
            input: layer.input,
            bias: w.experts.iter().any(|e| e.up_bias.is_some() || e.down_bias.is_some()),
            routing: Routing::new(RoutingMethod::Custom),
            ..MoeConfig::new(1, 1, w.hidden(), w.intermediate())
        };
        let mut options = *options;
        if let (true, Err(LayerError::Select(e))) = (w.scheme != routed, choose(w, &config, &options)) {
            // The name is of the routed experts' scheme only.
            if e.rejections().all(|r| r.backend.is_empty()) {
                options.inputs.backend = MoeBackend::Auto;
            }
        }
        let (choice, kernel) = make(shared.weights, &config, &options, device)?;
        Ok(Self { choice, kernel, gate: shared.gate })
    }

    /// The shared expert is a layer of one expert that every token takes, with the gate for its routing weight.
    fn run(&self, hidden: &[f32], pool: &dyn Executor) -> Result<Vec<f32>, RunError> {
        let h = self.kernel.config().hidden;
        let weight = |x: &[f32]| self.gate.as_ref().map_or(1.0, |g| sigmoid(dot(x, g)));
        let weights: Vec<f32> = hidden.chunks(h).map(weight).collect();
        self.kernel.forward(hidden, &vec![0; weights.len()], &weights, pool)
    }
}

impl Layer {
    /// Selects, packs and joins a checkpoint's layer, for the CPU.
    pub fn new(layer: MoeLayer, options: &LayerOptions) -> Result<Self, LayerError> {
        Self::on(layer, options, Device::Cpu)
    }

    /// The same for a device, which must be of `options.platform`.
    pub fn on(layer: MoeLayer, options: &LayerOptions, device: Device<'_>) -> Result<Self, LayerError> {
        let shared = layer.shared.map(|s| Shared::new(s, &layer.config, layer.weights.scheme, options, device));
        let shared = shared.transpose()?;
        let (choice, kernel) = make(layer.weights, &layer.config, options, device)?;
        Ok(Self { kernel, choice, router: layer.router, shared })
    }

    /// What was chosen for the routed experts.
    pub fn choice(&self) -> Choice {
        self.choice
    }

    /// What was chosen for the shared expert, where there is one.
    pub fn shared_choice(&self) -> Option<Choice> {
        self.shared.as_ref().map(|s| s.choice)
    }

    /// The layer.
    pub fn config(&self) -> &MoeConfig {
        self.kernel.config()
    }

    /// Whether sums stay in the tensor cores, as [`MoeConfig::fast_accum`] allows: for numbers of tokens that `cuda_wgmma`
    /// serves with e4m3 scales per row and tensor.
    pub fn fast_accum(&self) -> bool {
        self.kernel.fast_accum()
    }

    /// The router: `hidden` `[T, H]` to ids and weights `[T, k]`, best first.
    pub fn route(&self, hidden: &[f32]) -> (Vec<i32>, Vec<f32>) {
        let c = self.kernel.config();
        let tokens = hidden.len() / c.hidden;
        let (mut ids, mut weights) = (vec![0; tokens * c.topk], vec![0.0; tokens * c.topk]);
        let mut scratch = vec![0.0; routing::scratch_len(c.experts)];
        let rows = hidden.chunks_exact(c.hidden).zip(ids.chunks_mut(c.topk)).zip(weights.chunks_mut(c.topk));
        for ((x, ids), weights) in rows {
            let logits = self.router.logits(x);
            let bias = self.router.correction_bias.as_deref();
            routing::route_token(&c.routing, &logits, bias, &mut scratch, ids, weights);
            if let Some(scale) = &self.router.expert_scale {
                weights.iter_mut().zip(ids.iter()).for_each(|(w, id)| *w *= scale[*id as usize]);
            }
        }
        (ids, weights)
    }

    /// Runs the layer on float32 rows `[T, H]`. `router_hidden` is what the router sees where a family separates the
    /// two; `routed` replaces the router by the caller's ids and weights `[T, k]`.
    pub fn run(
        &self,
        hidden: &[f32],
        router_hidden: Option<&[f32]>,
        routed: Option<(Vec<i32>, Vec<f32>)>,
        pool: &dyn Executor,
    ) -> Result<LayerOutput, RunError> {
        let router_hidden = router_hidden.unwrap_or(hidden);
        if router_hidden.len() != hidden.len() {
            let (have, want) = (router_hidden.len(), hidden.len());
            return Err(ForwardError::Length { what: "router_hidden_states", have, want }.into());
        }
        let (topk_ids, topk_weights) = routed.unwrap_or_else(|| self.route(router_hidden));
        let output = self.kernel.forward(hidden, &topk_ids, &topk_weights, pool)?;
        let shared = self.shared.as_ref().map(|s| s.run(hidden, pool)).transpose()?;
        let output_with_shared = shared.map(|mut s| {
            s.iter_mut().zip(&output).for_each(|(s, y)| *s += y);
            s
        });
        Ok(LayerOutput { output, topk_ids, topk_weights, output_with_shared })
    }
}

impl RouterWeights {
    /// The logits of one token, `[E]`.
    pub fn logits(&self, x: &[f32]) -> Vec<f32> {
        let normed = self.input_norm.as_ref().map(|n| {
            let mean_square = x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32;
            let inverse = 1.0 / (mean_square + n.eps).sqrt();
            x.iter().zip(&n.scale).map(|(v, s)| v * inverse * s * n.factor).collect::<Vec<f32>>()
        });
        let x = normed.as_deref().unwrap_or(x);
        let logit = |(e, row): (usize, &[f32])| dot(row, x) + self.bias.as_ref().map_or(0.0, |b| b[e]);
        self.weight.chunks_exact(x.len()).enumerate().map(logit).collect()
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
