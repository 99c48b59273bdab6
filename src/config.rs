//! The question that an oracle answers: the model's layer and its deployment.

#[doc(inline)]
pub use moe_oracle_simd::{Activation, sigmoid};

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
    /// Sums of e4m3 products may stay in Hopper's tensor cores, where scales are per row and tensor: on an H200 up to 13
    /// percent faster with many tokens (benches/RESULTS.md), and what CUTLASS's "FastAccum" and Triton's kernels do. These
    /// sums keep some 13 bits: results are off by 0.2 to 0.4 percent for weights and tokens of either sign (quantising a
    /// token to e4m3 costs 2 to 3), but where nearly all products have the same sign by 1 percent for 768 columns, 5 for 4096
    /// and 13 for 14336. Otherwise every 128 columns' sums are added up in float32. Of `cuda_wgmma` only; other kernels do not
    /// lose these bits.
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
