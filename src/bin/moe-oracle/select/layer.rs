//! From the names that engines use to the crate's own types.

use moe_oracle::config::{Activation, ActivationFormat, InputType, RoutingMethod};

/// Another engine's name for a swigluoai whose checkpoint is interleaved. That is a matter of the checkpoint's layout;
/// canonical weights are uninterleaved either way.
const UNINTERLEAVED: &str = "swigluoai_uninterleave";

/// Every name of an activation.
pub fn activations() -> impl Iterator<Item = &'static str> {
    Activation::NAMES.into_iter().chain([UNINTERLEAVED])
}

/// Numbers that an activation may come with.
#[derive(Clone, Copy, Default)]
pub struct Parameters {
    /// Clamp of gate and up.
    pub limit: Option<f32>,
    /// Slope inside swigluoai's sigmoid.
    pub alpha: Option<f32>,
    /// Added to up by swigluoai; the scale of situ.
    pub beta: Option<f32>,
    /// The scale of situ's up projection.
    pub linear_beta: Option<f32>,
}

/// The activation of that name; parameters that did not come take the values of the models that have it.
pub fn activation(name: &str, p: Parameters) -> Result<Activation, String> {
    let usual = Activation::by_name(if name == UNINTERLEAVED { Activation::SWIGLU_OAI.name() } else { name });
    let usual = usual.ok_or_else(|| {
        format!("`{name}` is no activation; there are {}", activations().collect::<Vec<_>>().join(", "))
    })?;
    Ok(match usual {
        Activation::Silu { limit } => Activation::Silu { limit: p.limit.or(limit) },
        Activation::SwigluOai { alpha, beta, limit } => Activation::SwigluOai {
            alpha: p.alpha.unwrap_or(alpha),
            beta: p.beta.unwrap_or(beta),
            limit: p.limit.unwrap_or(limit),
        },
        Activation::SwigluStep { limit } => Activation::SwigluStep { limit: p.limit.unwrap_or(limit) },
        Activation::Situ { beta, linear_beta } => {
            Activation::Situ { beta: p.beta.unwrap_or(beta), linear_beta: p.linear_beta.or(linear_beta) }
        }
        other => other,
    })
}

/// The activation format of that name.
pub fn format(name: &str) -> Result<ActivationFormat, String> {
    let known = ActivationFormat::NAMES.join(" and ");
    ActivationFormat::by_name(name).ok_or_else(|| format!("`{name}` is no activation format; there are {known}"))
}

/// The hidden states' type by its torch name.
pub fn input_type(name: &str) -> Result<InputType, String> {
    match name {
        "bfloat16" => Ok(InputType::Bf16),
        "float16" => Ok(InputType::F16),
        "float32" => Ok(InputType::F32),
        _ => Err(format!("`{name}` is no type of hidden states; there are bfloat16, float16, float32")),
    }
}

/// The routing method of that name.
pub fn routing(name: &str) -> Result<RoutingMethod, String> {
    let all = RoutingMethod::ALL;
    all.iter()
        .find(|m| m.0 == name)
        .map(|m| m.1)
        .ok_or_else(|| format!("`{name}` is no routing method; there are {}", all.map(|m| m.0).join(", ")))
}
