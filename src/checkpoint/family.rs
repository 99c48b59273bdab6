//! Model families: what `config.json` says about a layer, with the key names and defaults of transformers.

use super::CheckpointError;
use super::json::Object;
use crate::config::{Activation, InputType, MoeConfig, Routing, RoutingMethod};
use serde_json::Value;

/// Families with the same names of tensors and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    /// w1, w3, w2
    Mixtral,
    /// qwen2_moe, qwen3_moe and those after them; some with a gated shared expert
    Qwen,
    /// deepseek_v2
    DeepSeekV2,
    /// deepseek_v3, kimi_k2, glm4_moe
    DeepSeekV3,
    /// Fused and transposed, routing weight on the input.
    Llama4,
    /// Fused and interleaved, with biases.
    GptOss,
    /// Fused, router of its own.
    Gemma4,
    /// Not gated, DeepSeek's router.
    NemotronH,
}

/// What is the same for every layer of a model.
#[derive(Clone, Debug)]
pub(super) struct Model {
    /// Names and layouts.
    pub family: Family,
    /// As the config has it.
    pub model_type: String,
    /// Everything but biases, which the tensors tell.
    pub config: MoeConfig,
    /// Intermediate size of the shared expert, where there is one.
    pub shared: Option<usize>,
    /// The shared expert's output has a gate.
    pub shared_gate: bool,
    /// gemma4's epsilon.
    pub router_eps: Option<f32>,
}

/// Largest dimension that is believed; beyond any model and far from overflowing.
const MAX_SIZE: usize = 1 << 24;
/// Largest number of experts that is believed.
const MAX_EXPERTS: usize = 1 << 16;

/// The first of several names for one number; where several are present they must agree.
fn alias(o: Object, keys: &[&str], max: usize) -> Result<usize, CheckpointError> {
    let mut found: Option<(&str, usize)> = None;
    for key in keys {
        let Some(n) = o.count(key, max)? else { continue };
        match found {
            Some((other, m)) if m != n => {
                return Err(o.error(key, &format!("is {n}, but {other} is {m}")));
            }
            _ => found = found.or(Some((key, n))),
        }
    }
    let (key, n) = o.required(&keys.join(" or "), found)?;
    if n == 0 { Err(o.error(key, "is zero")) } else { Ok(n) }
}

impl Model {
    /// Reads a `config.json`; everything but its quantisation.
    pub fn new(config: &Value) -> Result<Self, CheckpointError> {
        let root = Object::new(config, "config.json")?;
        let model_type = root.required("model_type", root.str("model_type")?)?;
        let mut qwen_norm = None;
        let family = match model_type {
            "mixtral" => Family::Mixtral,
            "qwen2_moe" | "qwen3_moe" => {
                // Both leave the weights as they are unless told otherwise.
                qwen_norm = Some(false);
                Family::Qwen
            }
            "qwen3_next" | "qwen3_5_moe" | "qwen3_5_moe_text" => {
                qwen_norm = Some(true);
                Family::Qwen
            }
            "deepseek_v2" => Family::DeepSeekV2,
            "deepseek_v3" | "kimi_k2" | "glm4_moe" => Family::DeepSeekV3,
            "llama4" | "llama4_text" => Family::Llama4,
            "gpt_oss" => Family::GptOss,
            "gemma4" | "gemma4_text" => Family::Gemma4,
            "nemotron_h" => Family::NemotronH,
            other => return Err(CheckpointError::Unsupported(format!("model_type {other:?}"))),
        };
        let o = root.object("text_config")?.unwrap_or(root);

        let experts = alias(o, &["num_local_experts", "num_experts", "n_routed_experts"], MAX_EXPERTS)?;
        let topk = alias(o, &["num_experts_per_tok", "top_k_experts", "experts_per_token"], experts)?;
        let hidden = alias(o, &["hidden_size"], MAX_SIZE)?;
        let intermediate = match o.get("moe_intermediate_size") {
            Some(_) => alias(o, &["moe_intermediate_size"], MAX_SIZE)?,
            None => alias(o, &["intermediate_size"], MAX_SIZE)?,
        };
        let mut c = MoeConfig::new(experts, topk, hidden, intermediate);
        c.activation = activation(family, o)?;
        c.input = match o.str("dtype")?.or(o.str("torch_dtype")?).or(root.str("dtype")?).or(root.str("torch_dtype")?) {
            None | Some("bfloat16") => InputType::Bf16,
            Some("float16") => InputType::F16,
            Some("float32") => InputType::F32,
            Some(other) => return Err(o.error("dtype", &format!("is {other:?}"))),
        };
        c.weight_on_input = family == Family::Llama4;
        c.routing = match family {
            Family::Mixtral | Family::Gemma4 => Routing::new(RoutingMethod::RenormalizeNaive),
            Family::Qwen => match o.bool("norm_topk_prob")?.or(qwen_norm) {
                Some(true) => Routing::new(RoutingMethod::RenormalizeNaive),
                _ => Routing::new(RoutingMethod::Default),
            },
            Family::Llama4 => Routing::new(RoutingMethod::Llama4),
            Family::GptOss => Routing::new(RoutingMethod::Renormalize),
            Family::DeepSeekV2 | Family::DeepSeekV3 | Family::NemotronH => deepseek_routing(family, model_type, o)?,
        };
        if family == Family::NemotronH && o.get("moe_latent_size").is_some() {
            return Err(CheckpointError::Unsupported("nemotron_h with moe_latent_size".into()));
        }
        if let Some(problem) = c.problem() {
            return Err(CheckpointError::Config(format!("config.json: {problem}")));
        }
        let shared_key = |key: &str| Ok(o.count(key, MAX_SIZE)?.filter(|&n| n > 0));
        let shared = match family {
            Family::Qwen => shared_key("shared_expert_intermediate_size")?,
            Family::Llama4 => Some(alias(o, &["intermediate_size"], MAX_SIZE)?),
            Family::DeepSeekV2 | Family::DeepSeekV3 => match shared_key("n_shared_experts")? {
                Some(n) => match n.checked_mul(intermediate).filter(|&i| i <= MAX_SIZE) {
                    Some(i) => Some(i),
                    None => return Err(o.error("n_shared_experts", &format!("is {n}, beyond any model"))),
                },
                None => None,
            },
            Family::NemotronH => match shared_key("n_shared_experts")? {
                Some(_) => Some(alias(o, &["moe_shared_expert_intermediate_size"], MAX_SIZE)?),
                None => None,
            },
            Family::Mixtral | Family::GptOss | Family::Gemma4 => None,
        };
        let router_eps = match family {
            Family::Gemma4 => Some(o.required("rms_norm_eps", o.float("rms_norm_eps")?)?),
            _ => None,
        };
        Ok(Self {
            family,
            model_type: model_type.to_owned(),
            config: c,
            shared,
            shared_gate: family == Family::Qwen && shared.is_some(),
            router_eps,
        })
    }
}

fn activation(family: Family, o: Object) -> Result<Activation, CheckpointError> {
    if family == Family::GptOss {
        return Ok(Activation::SwigluOai {
            alpha: o.float("swiglu_alpha")?.unwrap_or(1.702),
            beta: 1.0,
            limit: o.float("swiglu_limit")?.unwrap_or(7.0),
        });
    }
    let key = match family {
        Family::Gemma4 => "hidden_activation",
        Family::NemotronH => "mlp_hidden_act",
        _ => "hidden_act",
    };
    let name = o.required(key, o.str(key)?)?;
    match (name, family == Family::NemotronH) {
        ("silu" | "swish", false) => Ok(Activation::SILU),
        ("gelu", false) => Ok(Activation::Gelu),
        ("gelu_pytorch_tanh", false) => Ok(Activation::GeluTanh),
        ("relu2", false) => Ok(Activation::Relu2),
        ("silu" | "swish", true) => Ok(Activation::SiluNoMul),
        ("gelu", true) => Ok(Activation::GeluNoMul),
        ("gelu_pytorch_tanh", true) => Ok(Activation::GeluTanhNoMul),
        ("relu2", true) => Ok(Activation::Relu2NoMul),
        _ => Err(CheckpointError::Unsupported(format!("{key} {name:?}"))),
    }
}

/// DeepSeek's router and its descendants. Defaults are those of transformers' config classes; DeepSeek-V3 itself and
/// kimi_k2 always write the keys, and there a missing one is an error.
fn deepseek_routing(family: Family, model_type: &str, o: Object) -> Result<Routing, CheckpointError> {
    let strict = matches!(model_type, "deepseek_v3" | "kimi_k2");
    let scoring = o.str("scoring_func")?.unwrap_or(if family == Family::DeepSeekV2 { "softmax" } else { "sigmoid" });
    let method = o.str("topk_method")?;
    let groups = o.count("n_group", MAX_EXPERTS)?;
    let topk_groups = o.count("topk_group", MAX_EXPERTS)?;
    let normalize = o.bool("norm_topk_prob")?;
    let scaling = o.float("routed_scaling_factor")?;
    if strict {
        o.required("n_group", groups)?;
        o.required("topk_group", topk_groups)?;
        o.required("norm_topk_prob", normalize)?;
        o.required("routed_scaling_factor", scaling)?;
    }
    let normalize = normalize.unwrap_or(family != Family::DeepSeekV2);
    let scaling = scaling.unwrap_or(1.0);
    let unsupported = |why: String| {
        Err(CheckpointError::Unsupported(format!("{model_type} with scoring_func {scoring:?} and {why}")))
    };
    match (scoring, method) {
        ("sigmoid", None | Some("noaux_tc")) => Ok(Routing {
            method: RoutingMethod::DeepSeekV3,
            groups: groups.unwrap_or(1),
            topk_groups: topk_groups.unwrap_or(1),
            normalize,
            scaling,
        }),
        // Of the others, transformers' code applies a sigmoid whatever the config says: a softmax would be a guess.
        ("softmax", None | Some("greedy" | "group_limited_greedy")) if family == Family::DeepSeekV2 => {
            let grouped = method == Some("group_limited_greedy") && groups.unwrap_or(1) != 1;
            if grouped {
                return unsupported("topk_method \"group_limited_greedy\" over several groups".into());
            }
            // DeepSeek's own code scales only what it does not normalise, others scale both: only 1 is unambiguous.
            if normalize && scaling != 1.0 {
                return unsupported(format!("norm_topk_prob, scaled by {scaling}"));
            }
            let method = if normalize { RoutingMethod::RenormalizeNaive } else { RoutingMethod::Default };
            Ok(Routing { scaling, ..Routing::new(method) })
        }
        _ => unsupported(format!("topk_method {:?}", method.unwrap_or("absent"))),
    }
}
