//! From the names that engines use to the crate's own types.

use moe_oracle::config::{Activation, InputType, RoutingMethod};

/// Every activation by name.
pub const ACTIVATIONS: [&str; 12] = [
    "silu",
    "gelu",
    "gelu_tanh",
    "swigluoai",
    "swigluoai_uninterleave",
    "swiglustep",
    "situ",
    "relu2",
    "silu_no_mul",
    "gelu_no_mul",
    "gelu_tanh_no_mul",
    "relu2_no_mul",
];

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
    Ok(match name {
        "silu" => Activation::Silu { limit: p.limit },
        "gelu" => Activation::Gelu,
        "gelu_tanh" => Activation::GeluTanh,
        // Interleaving is a matter of the checkpoint's layout; canonical weights are uninterleaved either way.
        "swigluoai" | "swigluoai_uninterleave" => Activation::SwigluOai {
            alpha: p.alpha.unwrap_or(1.702),
            beta: p.beta.unwrap_or(1.0),
            limit: p.limit.unwrap_or(7.0),
        },
        "swiglustep" => Activation::SwigluStep { limit: p.limit.unwrap_or(7.0) },
        "situ" => Activation::Situ { beta: p.beta.unwrap_or(1.0), linear_beta: p.linear_beta },
        "relu2" => Activation::Relu2,
        "silu_no_mul" => Activation::SiluNoMul,
        "gelu_no_mul" => Activation::GeluNoMul,
        "gelu_tanh_no_mul" => Activation::GeluTanhNoMul,
        "relu2_no_mul" => Activation::Relu2NoMul,
        _ => return Err(format!("`{name}` is no activation; there are {}", ACTIVATIONS.join(", "))),
    })
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
