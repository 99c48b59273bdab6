//! `inspect`: what the MoE layers of a checkpoint are, and which backend would serve them where.

use crate::failure::{AnyError as Failure, outln};
use moe_oracle::checkpoint::{Checkpoint, MoeLayer};
use moe_oracle::layer::{LayerOptions, choose};
use moe_oracle::oracle::SelectInputs;
use moe_oracle::platform::Platform;
use serde_json::{Value, json};
use std::path::PathBuf;

/// Arguments of `inspect`.
#[derive(clap::Args)]
pub struct Args {
    /// Folder of the checkpoint.
    dir: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

const PLATFORMS: [&str; 6] = ["cpu", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120"];

fn bytes(layer: &MoeLayer) -> usize {
    layer.weights.experts.iter().map(|e| e.bytes()).sum()
}

fn facts(layer: &MoeLayer) -> Value {
    let (c, w) = (&layer.config, &layer.weights);
    let backends: serde_json::Map<String, Value> = PLATFORMS
        .iter()
        .filter_map(|name| Some((name, Platform::by_name(name)?)))
        .map(|(name, platform)| {
            let options = LayerOptions { platform, inputs: SelectInputs::AUTO, exact_activations: false };
            let verdict = match choose(w, c, &options) {
                Ok(choice) => json!({ "backend": choice.kernel.name, "reason": null }),
                Err(e) => json!({ "backend": null, "reason": e.to_string() }),
            };
            (name.to_string(), verdict)
        })
        .collect();
    json!({
        "layer": layer.index, "family": layer.family, "producer": layer.producer, "scheme": w.scheme.name(),
        "weight_key": w.weight_key.map(|k| k.name()), "activation_key": w.activation_key.map(|k| k.name()),
        "experts": c.experts, "topk": c.topk, "hidden": c.hidden, "intermediate": c.intermediate,
        "activation": c.activation.name(), "gated": c.activation.gated(), "bias": c.bias,
        "routing": format!("{:?}", c.routing.method), "routing_scaling": c.routing.scaling,
        "weight_on_input": c.weight_on_input,
        "shared_expert_intermediate": layer.shared.as_ref().map(|s| s.weights.intermediate()),
        "expert_bytes": bytes(layer), "backends": backends,
    })
}

/// Runs the command.
pub fn run(args: Args) -> Result<(), Failure> {
    let checkpoint = Checkpoint::open(&args.dir)?;
    let bar = indicatif::ProgressBar::new(checkpoint.layers().len() as u64);
    let mut all = Vec::new();
    for index in checkpoint.layers() {
        all.push(facts(&checkpoint.layer(*index)?));
        bar.inc(1);
    }
    bar.finish_and_clear();
    if args.json {
        return outln(&json!({ "layers": all }).to_string());
    }
    if all.is_empty() {
        return Err("the checkpoint holds no MoE layer".into());
    }
    for f in &all {
        let text = |key: &str| f[key].as_str().unwrap_or("not quantised").to_owned();
        outln(&format!("layer {}: {} ({}), scheme {}", f["layer"], text("family"), text("producer"), text("scheme")))?;
        outln(&format!("  weights {}, activations {}", text("weight_key"), text("activation_key")))?;
        outln(&format!(
            "  {} experts, top-{}, hidden {}, intermediate {}, {} bytes of experts",
            f["experts"], f["topk"], f["hidden"], f["intermediate"], f["expert_bytes"]
        ))?;
        outln(&format!(
            "  activation {}, biases {}, routing {}, shared expert {}",
            text("activation"),
            f["bias"],
            text("routing"),
            match &f["shared_expert_intermediate"] {
                Value::Null => "none".to_owned(),
                size => format!("of intermediate {size}"),
            }
        ))?;
        for name in PLATFORMS {
            let b = &f["backends"][name];
            let said = b["backend"].as_str().or(b["reason"].as_str()).unwrap_or_default();
            outln(&format!("  {name}: {said}"))?;
        }
    }
    Ok(())
}
