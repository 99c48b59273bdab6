//! `select --jsonl`: a decision per line. A bad line spoils itself, never the run.

use super::{CandidateRow, layer, names_that_work, usual};
use crate::failure::{Failure, Out, Outcome};
use moe_oracle::config::{All2All, MoeConfig, Parallel, Routing};
use moe_oracle::oracle::{MoeBackend, SelectInputs, find};
use moe_oracle::platform::Platform;
use moe_oracle::scheme::{QuantKey, Scheme};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

/// A line. Fields that are not here (the decision of another engine, say) are skipped; absent and null mean the same.
#[derive(Deserialize)]
struct Line {
    #[serde(default)]
    id: Value,
    scheme: String,
    platform: String,
    hidden: usize,
    intermediate: usize,
    intermediate_size_per_partition: Option<usize>,
    num_experts: usize,
    topk: usize,
    activation: Option<String>,
    is_act_and_mul: Option<bool>,
    has_bias: Option<bool>,
    in_dtype: Option<String>,
    routing_method: Option<String>,
    moe_config_extra: Option<Extra>,
    weight_key: Option<String>,
    activation_key: Option<String>,
    activation_format: Option<String>,
    tp: Option<usize>,
    dp: Option<usize>,
    ep: Option<usize>,
    use_ep: Option<bool>,
    all2all_backend: Option<String>,
    lora: Option<bool>,
    requested_backend: Option<String>,
}

/// Parameters of the layer beyond its sizes.
#[derive(Default, Deserialize)]
struct Extra {
    swiglu_limit: Option<f32>,
    swiglu_alpha: Option<f32>,
    swiglu_beta: Option<f32>,
    situ_beta: Option<f32>,
    situ_linear_beta: Option<f32>,
}

#[derive(Serialize)]
struct Decision {
    id: Value,
    backend: Option<&'static str>,
    /// Whether this build carries the backend's kernels.
    built: Option<bool>,
    error: Option<String>,
    candidates: Vec<CandidateRow>,
}

impl Decision {
    fn error(id: Value, error: String) -> Self {
        Self { id, backend: None, built: None, error: Some(error), candidates: Vec::new() }
    }
}

/// Answers every line of the file on stdout, in order.
pub fn run(path: &Path, built_only: bool) -> Outcome {
    let failed = |e: std::io::Error| Failure::said(format_args!("{} can't be read: {e}", path.display()));
    let mut input: Box<dyn BufRead> = if path == Path::new("-") {
        Box::new(std::io::stdin().lock())
    } else {
        Box::new(BufReader::with_capacity(1 << 16, File::open(path).map_err(failed)?))
    };
    let mut out = Out::new();
    let mut line = Vec::new();
    loop {
        line.clear();
        // Bytes, not a String: a line that is not UTF-8 is an error of that line only.
        if input.read_until(b'\n', &mut line).map_err(failed)? == 0 {
            return out.flush();
        }
        if !line.trim_ascii().is_empty() {
            out.json(&decide(&line, built_only))?;
        }
    }
}

fn decide(line: &[u8], built_only: bool) -> Decision {
    match serde_json::from_slice::<Line>(line) {
        Ok(mut line) => {
            let id = line.id.take();
            answer(&line, built_only)
                .map_or_else(|e| Decision::error(id.clone(), e), |d| Decision { id: id.clone(), ..d })
        }
        Err(e) => match serde_json::from_slice::<Value>(line) {
            Ok(mut value) => {
                let id = value.get_mut("id").map_or(Value::Null, Value::take);
                Decision::error(id, format!("the line does not describe a layer: {e}"))
            }
            Err(e) => Decision::error(Value::Null, format!("the line is not JSON: {e}")),
        },
    }
}

/// A key by name: `Ok(None)` where not quantised, `Err` where the name has no constant here.
fn key(name: &Option<String>) -> Result<Option<QuantKey>, ()> {
    name.as_deref().map_or(Ok(None), |n| QuantKey::by_name(n).map(Some).ok_or(()))
}

fn answer(line: &Line, built_only: bool) -> Result<Decision, String> {
    let scheme = Scheme::by_name(&line.scheme).ok_or_else(|| {
        format!("`{}` is no scheme; there are {}", line.scheme, Scheme::ALL.map(Scheme::name).join(", "))
    })?;
    let platform = Platform::by_name(&line.platform).ok_or_else(|| format!("`{}` is no platform", line.platform))?;
    let config = config(line)?;
    let name = line.requested_backend.as_deref().unwrap_or("auto");
    let asked = MoeBackend::by_name(name).ok_or_else(|| {
        format!("`{name}` is no backend of this scheme; the names that work: {}", names_that_work(scheme))
    })?;
    let keys = (key(&line.weight_key), key(&line.activation_key));
    let oracle = match keys {
        (Ok(w), Ok(a)) => find(scheme, w, a),
        _ => None,
    };
    let Some(oracle) = oracle else {
        // The backends of a scheme are the same whatever its keys, so that any of its oracles can list them.
        const WHY: &str = "no kernel for this pair of keys";
        let all = usual(scheme).map(|o| o.explain(&config, &platform)).unwrap_or_default();
        let refused = |backend| CandidateRow { backend, supported: false, reason: Some(WHY.into()) };
        let candidates = all.iter().map(|c| refused(c.backend)).collect();
        return Ok(Decision { id: Value::Null, backend: None, built: None, error: Some(WHY.into()), candidates });
    };
    let inputs = SelectInputs { backend: asked, built_only };
    let choice = oracle.select(&config, &platform, &inputs);
    Ok(Decision {
        id: Value::Null,
        backend: choice.ok().map(|k| k.name),
        built: choice.ok().map(|k| k.built()),
        error: choice.err().map(|e| e.to_string()),
        candidates: oracle.explain_for(&config, &platform, &inputs).into_iter().map(CandidateRow::from).collect(),
    })
}

fn config(line: &Line) -> Result<MoeConfig, String> {
    let (tp, dp, ep) = (line.tp.unwrap_or(1), line.dp.unwrap_or(1), line.ep.unwrap_or(1));
    if tp == 0 || dp == 0 || ep == 0 {
        return Err("tp, dp and ep must be at least 1".into());
    }
    // A rank with padded shards has the share that the line names; else shards are even, the last one filled up.
    let intermediate = line.intermediate_size_per_partition.unwrap_or(line.intermediate.div_ceil(tp));
    let mut config = MoeConfig::new(line.num_experts, line.topk, line.hidden, intermediate);
    if line.use_ep.unwrap_or(false) {
        config.local_experts = line.num_experts.div_ceil(ep);
    }
    let extra = line.moe_config_extra.as_ref();
    let name = line.activation.as_deref().unwrap_or("silu");
    // Situ's own beta is apart from swiglu's: a file may carry both.
    let situ = name == "situ";
    let parameters = layer::Parameters {
        limit: extra.and_then(|e| e.swiglu_limit),
        alpha: extra.and_then(|e| e.swiglu_alpha),
        beta: extra.and_then(|e| if situ { e.situ_beta } else { e.swiglu_beta }),
        linear_beta: extra.and_then(|e| e.situ_linear_beta),
    };
    config.activation = layer::activation(name, parameters)?;
    if let Some(gated) = line.is_act_and_mul
        && gated != config.activation.gated()
    {
        return Err(format!("is_act_and_mul is {gated}, which contradicts the activation `{name}`"));
    }
    config.bias = line.has_bias.unwrap_or(false);
    config.input = layer::input_type(line.in_dtype.as_deref().unwrap_or("bfloat16"))?;
    config.routing = Routing::new(layer::routing(line.routing_method.as_deref().unwrap_or("RenormalizeNaive"))?);
    config.format = line.activation_format.as_deref().map_or(Ok(config.format), layer::format)?;
    let mori = line.all2all_backend.as_deref().is_some_and(|n| n.starts_with("mori"));
    config.parallel = Parallel { tp, dp, ep, all2all: if mori { All2All::Mori } else { All2All::ByCaller } };
    config.lora = line.lora.unwrap_or(false);
    Ok(config)
}
