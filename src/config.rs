//! The question that an oracle answers: the model's layer and its deployment.

/// The number type of hidden states.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InputType {
    /// bfloat16
    Bf16,
    /// float16
    F16,
    /// float32
    F32,
}

impl InputType {
    /// All three; the types that a kernel takes are a bit each in this order.
    pub const ALL: [Self; 3] = [InputType::Bf16, InputType::F16, InputType::F32];

    /// As the table writes it.
    pub const fn name(self) -> &'static str {
        match self {
            InputType::Bf16 => "bf16",
            InputType::F16 => "f16",
            InputType::F32 => "float32",
        }
    }

    /// The names of [`ALL`](Self::ALL).
    pub const NAMES: [&str; 3] = [Self::ALL[0].name(), Self::ALL[1].name(), Self::ALL[2].name()];

    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            InputType::Bf16 | InputType::F16 => 2,
            InputType::F32 => 4,
        }
    }
}

/// The function between the two GEMMs: g is the gate, u the up projection, x the only one where not gated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `g * sigmoid(g) * u`; with a limit L `silu(min(g, L)) * clamp(u, -L, L)`
    Silu {
        /// L
        limit: Option<f32>,
    },
    /// exact gelu (erf) of g, times u
    Gelu,
    /// tanh approximation of gelu of g, times u
    GeluTanh,
    /// `g' = min(g, limit)`, `u' = clamp(u, -limit, limit)`: `g' * sigmoid(alpha * g') * (u' + beta)`. gpt-oss has
    /// 1.702, 1 and 7 with w13's rows interleaved on disk; canonical weights are always uninterleaved.
    SwigluOai {
        /// slope inside the sigmoid
        alpha: f32,
        /// added to u
        beta: f32,
        /// clamp of both
        limit: f32,
    },
    /// `min(silu(g), limit) * clamp(u, -limit, limit)`
    SwigluStep {
        /// clamp of both, 7 in the models that have it
        limit: f32,
    },
    /// `b * tanh(g / b) * sigmoid(g) * (lb * tanh(u / lb) if lb, else u)`
    Situ {
        /// b
        beta: f32,
        /// lb
        linear_beta: Option<f32>,
    },
    /// `max(g, 0)^2 * u`
    Relu2,
    /// `x * sigmoid(x)`
    SiluNoMul,
    /// exact gelu
    GeluNoMul,
    /// tanh approximation of gelu
    GeluTanhNoMul,
    /// `max(x, 0)^2`
    Relu2NoMul,
}

impl Activation {
    /// Plain silu.
    pub const SILU: Self = Activation::Silu { limit: None };
    /// gpt-oss's.
    pub const SWIGLU_OAI: Self = Activation::SwigluOai { alpha: 1.702, beta: 1.0, limit: 7.0 };

    /// One of each kind, with the parameters of the models that have it. The table's rows name them, and say which of
    /// them a kernel computes by a bit each in this order.
    pub const ALL: [Self; 11] = [
        Activation::SILU,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::SWIGLU_OAI,
        Activation::SwigluStep { limit: 7.0 },
        Activation::Situ { beta: 1.0, linear_beta: None },
        Activation::Relu2,
        Activation::SiluNoMul,
        Activation::GeluNoMul,
        Activation::GeluTanhNoMul,
        Activation::Relu2NoMul,
    ];

    /// The names of [`ALL`](Self::ALL).
    pub const NAMES: [&str; Self::ALL.len()] = {
        let mut names = [""; Self::ALL.len()];
        let mut i = 0;
        while i < names.len() {
            names[i] = Self::ALL[i].name();
            i += 1;
        }
        names
    };

    /// The place of its kind in [`ALL`](Self::ALL).
    pub const fn index(self) -> usize {
        match self {
            Activation::Silu { .. } => 0,
            Activation::Gelu => 1,
            Activation::GeluTanh => 2,
            Activation::SwigluOai { .. } => 3,
            Activation::SwigluStep { .. } => 4,
            Activation::Situ { .. } => 5,
            Activation::Relu2 => 6,
            Activation::SiluNoMul => 7,
            Activation::GeluNoMul => 8,
            Activation::GeluTanhNoMul => 9,
            Activation::Relu2NoMul => 10,
        }
    }

    /// The one of [`ALL`](Self::ALL) with this name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|a| a.name() == name)
    }

    /// Whether it takes a gate.
    pub const fn gated(self) -> bool {
        !matches!(
            self,
            Activation::SiluNoMul | Activation::GeluNoMul | Activation::GeluTanhNoMul | Activation::Relu2NoMul
        )
    }

    /// The field's name for it.
    pub const fn name(self) -> &'static str {
        match self {
            Activation::Silu { .. } => "silu",
            Activation::Gelu => "gelu",
            Activation::GeluTanh => "gelu_tanh",
            Activation::SwigluOai { .. } => "swigluoai",
            Activation::SwigluStep { .. } => "swiglustep",
            Activation::Situ { .. } => "situ",
            Activation::Relu2 => "relu2",
            Activation::SiluNoMul => "silu_no_mul",
            Activation::GeluNoMul => "gelu_no_mul",
            Activation::GeluTanhNoMul => "gelu_tanh_no_mul",
            Activation::Relu2NoMul => "relu2_no_mul",
        }
    }

    /// The activation itself for one element, in float32. For ungated ones `gate` is not looked at.
    #[inline(always)]
    pub fn apply(self, gate: f32, up: f32) -> f32 {
        match self {
            Activation::Silu { limit: None } => gate * sigmoid(gate) * up,
            Activation::Silu { limit: Some(l) } => {
                let g = gate.min(l);
                g * sigmoid(g) * up.clamp(-l, l)
            }
            Activation::Gelu => gelu(gate) * up,
            Activation::GeluTanh => gelu_tanh(gate) * up,
            Activation::SwigluOai { alpha, beta, limit } => {
                let g = gate.min(limit);
                g * sigmoid(alpha * g) * (up.clamp(-limit, limit) + beta)
            }
            Activation::SwigluStep { limit } => (gate * sigmoid(gate)).min(limit) * up.clamp(-limit, limit),
            Activation::Situ { beta, linear_beta } => {
                let u = linear_beta.map_or(up, |lb| lb * libm::tanhf(up / lb));
                beta * libm::tanhf(gate / beta) * sigmoid(gate) * u
            }
            Activation::Relu2 => gate.max(0.0) * gate.max(0.0) * up,
            Activation::SiluNoMul => up * sigmoid(up),
            Activation::GeluNoMul => gelu(up),
            Activation::GeluTanhNoMul => gelu_tanh(up),
            Activation::Relu2NoMul => up.max(0.0) * up.max(0.0),
        }
    }

    /// Parameters that make no sense: limits and betas must be positive and finite.
    pub const fn valid(self) -> bool {
        const fn pos(x: f32) -> bool {
            x > 0.0 && x < f32::INFINITY
        }
        match self {
            Activation::Silu { limit: Some(l) } | Activation::SwigluStep { limit: l } => pos(l),
            Activation::SwigluOai { alpha, beta, limit } => pos(limit) && alpha.is_finite() && beta.is_finite(),
            Activation::Situ { beta, linear_beta } => {
                pos(beta)
                    && match linear_beta {
                        Some(b) => pos(b),
                        None => true,
                    }
            }
            _ => true,
        }
    }
}

/// `1 / (1 + e^-x)`
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2))
}

fn gelu_tanh(x: f32) -> f32 {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    0.5 * x * (1.0 + libm::tanhf(SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)))
}

/// How logits become expert ids and weights. All in float32; equal scores: the lowest expert index first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RoutingMethod {
    /// softmax, top-k
    Default,
    /// top-k, softmax over the k
    Renormalize,
    /// softmax, top-k, divided by their sum
    RenormalizeNaive,
    /// top-k of the raw logits, which are the weights
    TopK,
    /// sigmoid, top-k
    Sigmoid,
    /// sigmoid, top-k, divided by their sum
    SigmoidRenorm,
    /// top-1 (or k) of the logits, then sigmoid
    Llama4,
    /// sigmoid; chosen by score + bias inside the best groups; weights without bias, normalised, scaled
    DeepSeekV3,
    /// sigmoid; chosen by score + bias; weights without bias, normalised, scaled
    MiniMax2,
    /// sqrt(softplus); chosen by score + bias; weights without bias, normalised, scaled
    DeepseekV4,
    /// The caller brings ids and weights.
    Custom,
    /// The caller brings ids and weights.
    Simulated,
    /// The caller brings ids and weights.
    Unspecified,
}

impl RoutingMethod {
    /// Every method with its name.
    pub const ALL: [(&'static str, RoutingMethod); 13] = [
        ("Default", RoutingMethod::Default),
        ("Renormalize", RoutingMethod::Renormalize),
        ("RenormalizeNaive", RoutingMethod::RenormalizeNaive),
        ("TopK", RoutingMethod::TopK),
        ("Sigmoid", RoutingMethod::Sigmoid),
        ("SigmoidRenorm", RoutingMethod::SigmoidRenorm),
        ("Llama4", RoutingMethod::Llama4),
        ("DeepSeekV3", RoutingMethod::DeepSeekV3),
        ("MiniMax2", RoutingMethod::MiniMax2),
        ("DeepseekV4", RoutingMethod::DeepseekV4),
        ("Custom", RoutingMethod::Custom),
        ("Simulated", RoutingMethod::Simulated),
        ("Unspecified", RoutingMethod::Unspecified),
    ];

    /// Whether [`forward_router`](crate::kernel::MoeKernel::forward_router) can do it: the others are the caller's.
    pub const fn routes_inside(self) -> bool {
        !matches!(self, RoutingMethod::Custom | RoutingMethod::Simulated | RoutingMethod::Unspecified)
    }
}

/// Routing of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Routing {
    /// The method.
    pub method: RoutingMethod,
    /// DeepSeekV3: number of expert groups; 1 where there are none.
    pub groups: usize,
    /// DeepSeekV3: groups kept.
    pub topk_groups: usize,
    /// DeepSeekV3, MiniMax2, DeepseekV4: divide the chosen weights by their sum.
    pub normalize: bool,
    /// Multiplies every weight at last.
    pub scaling: f32,
}

impl Routing {
    /// The method with one group and no scaling.
    pub const fn new(method: RoutingMethod) -> Self {
        Self { method, groups: 1, topk_groups: 1, normalize: true, scaling: 1.0 }
    }
}

/// How tokens lie in memory when the experts see them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ActivationFormat {
    /// `[T, H]` with ids and weights per token.
    Standard,
    /// `[E, max_tokens, H]` with a count per expert: already dispatched, combined by the caller.
    Batched,
}

impl ActivationFormat {
    /// Both; a kernel's formats are a bit each in this order.
    pub const ALL: [Self; 2] = [ActivationFormat::Standard, ActivationFormat::Batched];

    /// As the table and the command line write it.
    pub const fn name(self) -> &'static str {
        match self {
            ActivationFormat::Standard => "standard",
            ActivationFormat::Batched => "batched",
        }
    }

    /// The names of [`ALL`](Self::ALL).
    pub const NAMES: [&str; 2] = [Self::ALL[0].name(), Self::ALL[1].name()];

    /// The format of that name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|f| f.name() == name)
    }
}

/// What carries tokens between ranks before and after the layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum All2All {
    /// None, or one whose tokens arrive in one of our two formats; the transport is the caller's.
    ByCaller,
    /// mori, which exists only with AITER on ROCm.
    Mori,
}

/// Ranks and how they share the layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parallel {
    /// Tensor-parallel size; `intermediate` of [`MoeConfig`] is already this rank's share.
    pub tp: usize,
    /// Data-parallel size.
    pub dp: usize,
    /// Expert-parallel size; with more than 1 an expert map says which experts live here.
    pub ep: usize,
    /// The transport.
    pub all2all: All2All,
}

impl Parallel {
    /// One rank.
    pub const SINGLE: Self = Self { tp: 1, dp: 1, ep: 1, all2all: All2All::ByCaller };
}

/// A Mixture-of-Experts layer and its deployment. Plain data, so that selection can run in `const` context.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MoeConfig {
    /// E, over all ranks
    pub experts: usize,
    /// E on this rank
    pub local_experts: usize,
    /// k
    pub topk: usize,
    /// H
    pub hidden: usize,
    /// I on this rank
    pub intermediate: usize,
    /// The function between the GEMMs; says whether there is a gate.
    pub activation: Activation,
    /// Biases on the GEMMs.
    pub bias: bool,
    /// The router.
    pub routing: Routing,
    /// Hidden states in and out.
    pub input: InputType,
    /// The routing weight multiplies the expert's input instead of its output (Llama 4).
    pub weight_on_input: bool,
    /// Ranks.
    pub parallel: Parallel,
    /// How tokens arrive.
    pub format: ActivationFormat,
    /// A token's result must not depend on the other tokens of its batch.
    pub batch_invariant: bool,
    /// Sums of e4m3 products may stay in Hopper's tensor cores, where scales are per row and tensor: up to 1.3 times as fast
    /// for many tokens, and what CUTLASS's "FastAccum" and Triton's kernels do. These sums keep some 13 bits: results are off
    /// by 0.2 to 0.4 percent for weights and tokens of either sign (quantising a token to e4m3 costs 2 to 3), but where nearly
    /// all products have the same sign by 1 percent for 768 columns, 5 for 4096 and 13 for 14336. Otherwise every 128 columns'
    /// sums are added up in float32. Of `cuda_wgmma` only; other kernels do not lose these bits.
    pub fast_accum: bool,
    /// LoRA adapters on the experts.
    pub lora: bool,
}

impl MoeConfig {
    /// A gated silu layer on one rank with softmax routing and bf16 hidden states; change fields from there.
    pub const fn new(experts: usize, topk: usize, hidden: usize, intermediate: usize) -> Self {
        Self {
            experts,
            local_experts: experts,
            topk,
            hidden,
            intermediate,
            activation: Activation::SILU,
            bias: false,
            routing: Routing::new(RoutingMethod::RenormalizeNaive),
            input: InputType::Bf16,
            weight_on_input: false,
            parallel: Parallel::SINGLE,
            format: ActivationFormat::Standard,
            batch_invariant: false,
            fast_accum: false,
            lora: false,
        }
    }

    /// Why no kernel whatever could serve this, if so: zero sizes, top-k beyond the experts, senseless groups.
    pub const fn problem(&self) -> Option<&'static str> {
        if self.experts == 0 || self.hidden == 0 || self.intermediate == 0 {
            return Some("experts, hidden and intermediate must be at least 1");
        }
        if self.topk == 0 || self.topk > self.experts {
            return Some("top-k must be between 1 and the number of experts");
        }
        if self.local_experts == 0 || self.local_experts > self.experts {
            return Some("the rank's experts must be between 1 and all experts");
        }
        if self.experts > i32::MAX as usize || self.hidden > 1 << 24 || self.intermediate > 1 << 24 {
            return Some("a dimension is beyond any model (2^24 columns, 2^31 experts)");
        }
        let r = &self.routing;
        if r.groups == 0 || r.topk_groups == 0 || r.topk_groups > r.groups || !self.experts.is_multiple_of(r.groups) {
            return Some("the routing groups must divide the experts, and some of them must be kept");
        }
        if self.topk > self.experts / r.groups * r.topk_groups {
            return Some("the kept routing groups hold fewer experts than top-k");
        }
        if !r.scaling.is_finite() {
            return Some("the routing scale must be finite");
        }
        if !self.activation.valid() {
            return Some("the activation's limit and betas must be positive and finite");
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_stands_once_in_its_list_and_at_its_index() {
        for (i, a) in Activation::ALL.into_iter().enumerate() {
            assert_eq!((a.index(), Activation::by_name(a.name())), (i, Some(a)));
            assert!(a.valid(), "{a:?}");
        }
        for (i, f) in ActivationFormat::ALL.into_iter().enumerate() {
            assert_eq!((f as usize, ActivationFormat::by_name(f.name())), (i, Some(f)));
        }
        for (i, t) in InputType::ALL.into_iter().enumerate() {
            assert_eq!((t as usize, t.name()), (i, InputType::NAMES[i]));
        }
    }
}
