//! `run`: one layer of a checkpoint over the hidden states of a file.

use crate::failure::{AnyError as Failure, outln};
use crate::place::Place;
use crate::tensors::{self, Input};
use moe_oracle::checkpoint::Checkpoint;
use moe_oracle::cpu::ThreadPool;
use moe_oracle::layer::{Layer, LayerOptions};
use moe_oracle::oracle::{MoeBackend, Numerics, SelectInputs};
use std::path::PathBuf;

/// Arguments of `run`.
#[derive(clap::Args)]
pub struct Args {
    /// Folder of the checkpoint: config.json and safetensors files.
    #[arg(long)]
    model: PathBuf,
    /// Index of the layer; the first MoE layer without it.
    #[arg(long)]
    layer: Option<usize>,
    /// Safetensors file with `hidden_states` [T, H], and optionally `router_hidden_states`, `topk_ids`, `topk_weights`.
    #[arg(long)]
    input: PathBuf,
    /// File to write: `output`, `topk_ids`, `topk_weights`, and `output_with_shared` where there are shared experts.
    #[arg(long)]
    output: PathBuf,
    /// Backend by name.
    #[arg(long, default_value = "auto")]
    backend: String,
    /// Where to run: `cpu`, `cuda` or `cuda:N`.
    #[arg(long, default_value = "cpu")]
    device: Place,
    /// Threads; 0: one per core.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Leave activations exact even where the backend can quantise them as the checkpoint asks.
    #[arg(long)]
    exact_activations: bool,
    /// Leave sums of e4m3 products in the tensor cores of a Hopper GPU: faster, and less exact.
    #[arg(long)]
    fast_accum: bool,
    /// Safetensors file with a known `output` (and `output_actq*`) [T, H] to compare with.
    #[arg(long)]
    expected: Option<PathBuf>,
    /// Print what was done as JSON.
    #[arg(long)]
    json: bool,
}

/// Looks a backend up by its name.
pub fn backend(name: &str) -> Result<MoeBackend, Failure> {
    MoeBackend::by_name(name).ok_or_else(|| {
        let names: Vec<_> = MoeBackend::ALL.iter().map(|b| b.name()).collect();
        format!("`{name}` is no backend's name; there are: {}", names.join(", ")).into()
    })
}

/// Runs the command.
pub fn run(args: Args) -> Result<(), Failure> {
    let place = args.device.open()?;
    let inputs = SelectInputs::named(backend(&args.backend)?).built_only();
    let options = LayerOptions { platform: place.platform(), inputs, exact_activations: args.exact_activations };
    let checkpoint = Checkpoint::open(&args.model)?;
    let index = match args.layer {
        Some(index) => index,
        None => *checkpoint.layers().first().ok_or("the checkpoint holds no MoE layer")?,
    };
    let mut moe = checkpoint.layer(index)?;
    moe.config.fast_accum = args.fast_accum;
    let (config, family, producer) = (moe.config, moe.family.clone(), moe.producer.clone());
    let input = Input::read(&args.input, config.hidden, config.topk, config.experts)?;
    let layer = Layer::on(moe, &options, place.device())?;
    let pool = ThreadPool::new(args.threads)?;
    let result = layer.run(&input.hidden, input.router_hidden.as_deref(), input.routed, &pool)?;
    tensors::write(&args.output, &result, config.hidden, config.topk)?;

    let compared = match &args.expected {
        None => Vec::new(),
        Some(path) => tensors::compare(path, &result.output, config.hidden)?,
    };

    let (oracle, kernel) = (layer.choice().oracle, layer.choice().kernel);
    let key = |bits| moe_oracle::scheme::QuantKey::from_bits(bits).map(|k| k.name());
    let numerics = match kernel.numerics {
        Numerics::AsKeyed if !args.exact_activations && oracle.activation != 0 => {
            "activations quantised as the key asks"
        }
        Numerics::Mixed if !args.exact_activations && oracle.activation != 0 => {
            "activations exact for few tokens, else quantised as the key asks"
        }
        Numerics::Int8Block => "activations rounded to int8 per 32 values",
        _ => "activations exact",
    };
    let why = match args.backend.as_str() {
        "auto" => "the first of its oracle's backends that supports the layer",
        _ => "asked for by name",
    };
    if args.json {
        let facts = serde_json::json!({
            "family": family, "layer": index, "producer": producer, "scheme": oracle.scheme.name(),
            "oracle": oracle.alias, "weight_key": key(oracle.weight), "activation_key": key(oracle.activation),
            "backend": kernel.name, "why": why, "numerics": numerics, "fast_accum": layer.fast_accum(),
            "platform": options.platform.to_string(),
            "shared_backend": layer.shared_choice().map(|s| s.kernel.name),
            "relative_errors": compared.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
            "tokens": input.tokens, "threads": moe_oracle::cpu::Executor::threads(&pool),
        });
        return outln(&facts.to_string());
    }
    outln(&format!(
        "{family} layer {index}: scheme {} ({producer}), weights {}, activations {}",
        oracle.scheme,
        key(oracle.weight).unwrap_or("not quantised"),
        key(oracle.activation).unwrap_or("not quantised"),
    ))?;
    let sums = match (args.fast_accum, layer.fast_accum()) {
        (_, true) => "; sums of e4m3 products stay in the tensor cores",
        (true, false) => "; --fast-accum changes nothing, since only cuda_wgmma with e4m3 scaled by rows has such sums",
        (false, false) => "",
    };
    outln(&format!("backend {} on {}: {why}; {numerics}{sums}", kernel.name, options.platform))?;
    if let Some(shared) = layer.shared_choice().filter(|s| s.kernel.name != kernel.name) {
        outln(&format!("the shared expert is {}: backend {}", shared.oracle.scheme, shared.kernel.name))?;
    }
    for (name, error) in &compared {
        outln(&format!("relative error against the expected `{name}`: {error:.2e}"))?;
    }
    outln(&format!("{} tokens -> {}", input.tokens, args.output.display()))
}
