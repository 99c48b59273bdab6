//! `select`: which backend would serve a layer, and why.

mod jsonl;
mod layer;
mod matrix;

use crate::failure::{Failure, Out, Outcome};
use clap::builder::PossibleValuesParser;
use moe_oracle::config::{ActivationFormat, MoeConfig};
use moe_oracle::oracle::{
    Bf16, Candidate, DynOracle, Fp8Block, Int4, Int8Channel, MoeBackend, Mxfp4W4A16, Mxfp8W8A8, Nvfp4W4A4, ORACLES,
    SelectError, SelectInputs,
};
use moe_oracle::platform::Platform;
use moe_oracle::scheme::{NAMED_KEYS, QuantKey, Scheme, key_bits};
use std::path::PathBuf;

/// Options of `select`.
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("question").required(true).args(["scheme", "jsonl", "matrix"]))]
pub struct Args {
    /// The quantisation scheme
    #[arg(long, value_parser = PossibleValuesParser::new(Scheme::ALL.map(Scheme::name)))]
    scheme: Option<String>,
    /// Answer every line of this file (`-` for stdin) with a line of JSON
    #[arg(long, value_name = "FILE")]
    jsonl: Option<PathBuf>,
    /// Print what is supported, as the README has it
    #[arg(long)]
    matrix: bool,
    /// Refuse backends whose kernels are not in this build, instead of judging by the table alone
    #[arg(long)]
    built_only: bool,
    /// What the weights are, by name here or in vLLM; `none` for 16-bit ones
    #[arg(long, value_name = "NAME", value_parser = key)]
    weight_key: Option<Key>,
    /// What the scheme asks of the activations; `none` for nothing
    #[arg(long, value_name = "NAME", value_parser = key)]
    activation_key: Option<Key>,
    /// cpu, cpu_avx2, cpu_avx512, sm_90, ... (default: this machine's CPU)
    #[arg(long, default_value = "cpu", value_parser = platform)]
    platform: Platform,
    /// Experts
    #[arg(long, default_value_t = 128)]
    experts: usize,
    /// Experts of a token
    #[arg(long, default_value_t = 8)]
    topk: usize,
    /// Hidden size
    #[arg(long, default_value_t = 2048)]
    hidden: usize,
    /// Intermediate size of an expert
    #[arg(long, default_value_t = 768)]
    intermediate: usize,
    /// The function between the two GEMMs
    #[arg(long, default_value = "silu", value_parser = PossibleValuesParser::new(layer::activations()))]
    activation: String,
    /// The GEMMs have biases
    #[arg(long)]
    bias: bool,
    /// LoRA adapters on the experts
    #[arg(long)]
    lora: bool,
    /// How tokens arrive
    #[arg(long, default_value = "standard", value_parser = PossibleValuesParser::new(ActivationFormat::NAMES))]
    format: String,
    /// This backend or none
    #[arg(long, default_value = "auto", value_name = "NAME", value_parser = backend)]
    backend: MoeBackend,
    /// List each candidate with its verdict
    #[arg(long)]
    explain: bool,
    /// Answer in JSON
    #[arg(long)]
    json: bool,
}

/// A key of the command line; the inner `None` is `none`.
#[derive(Clone, Copy)]
struct Key(Option<QuantKey>);

fn key(name: &str) -> Result<Key, String> {
    if name == "none" {
        return Ok(Key(None));
    }
    let known = || NAMED_KEYS.iter().map(|k| k.0).collect::<Vec<_>>().join(", ");
    QuantKey::by_name(name).map(|k| Key(Some(k))).ok_or_else(|| format!("no such key; there are none, {}", known()))
}

fn platform(name: &str) -> Result<Platform, String> {
    Platform::by_name(name)
        .ok_or_else(|| "no such platform; try cpu, cpu_portable, cpu_avx2, cpu_avx512, sm_90, rocm or xpu".into())
}

/// A backend's user-facing name.
pub fn backend(name: &str) -> Result<MoeBackend, String> {
    let known = || MoeBackend::ALL.iter().map(|b| b.name()).collect::<Vec<_>>().join(", ");
    MoeBackend::by_name(name).ok_or_else(|| format!("no such backend; the names are {}", known()))
}

/// The names that a scheme's oracle takes.
fn names_that_work(scheme: Scheme) -> &'static str {
    match scheme {
        Scheme::Unquantized => Bf16::NAMES,
        Scheme::Fp8 => Fp8Block::NAMES,
        Scheme::Nvfp4 => Nvfp4W4A4::NAMES,
        Scheme::Mxfp4 => Mxfp4W4A16::NAMES,
        Scheme::Mxfp8 => Mxfp8W8A8::NAMES,
        Scheme::Int8 => Int8Channel::NAMES,
        Scheme::IntWna16 => Int4::NAMES,
    }
}

/// The first oracle of a scheme: its pair of keys is the scheme's usual one.
fn usual(scheme: Scheme) -> Option<&'static DynOracle> {
    ORACLES.iter().find(|o| o.scheme == scheme)
}

fn key_name(bits: u64) -> &'static str {
    QuantKey::from_bits(bits).map_or("none", QuantKey::name)
}

/// The verdict on one candidate, as JSON has it.
#[derive(serde::Serialize)]
struct CandidateRow {
    backend: &'static str,
    supported: bool,
    reason: Option<String>,
}

impl From<Candidate> for CandidateRow {
    fn from(c: Candidate) -> Self {
        Self { backend: c.backend, supported: c.verdict.is_ok(), reason: c.verdict.err().map(|e| e.to_string()) }
    }
}

#[derive(serde::Serialize)]
struct Answer {
    scheme: &'static str,
    weight_key: Option<&'static str>,
    activation_key: Option<&'static str>,
    platform: String,
    backend: Option<&'static str>,
    /// Whether this build carries the backend's kernels.
    built: Option<bool>,
    error: Option<String>,
    candidates: Vec<CandidateRow>,
}

/// Runs the command.
pub fn run(args: Args) -> Outcome {
    if args.matrix {
        return matrix::run();
    }
    match (&args.jsonl, args.scheme.as_deref().and_then(Scheme::by_name)) {
        (Some(file), _) => jsonl::run(file, args.built_only),
        (None, Some(scheme)) => one(&args, scheme),
        (None, None) => Err(Failure::said("--scheme, --jsonl or --matrix is needed")),
    }
}

/// The first oracle whose keys are the given ones, where they are given.
fn oracle(args: &Args, scheme: Scheme) -> Outcome<&'static DynOracle> {
    let fits = |given: Option<Key>, bits: u64| given.is_none_or(|k| key_bits(k.0) == bits);
    let found = ORACLES
        .iter()
        .find(|o| o.scheme == scheme && fits(args.weight_key, o.weight) && fits(args.activation_key, o.activation));
    found.ok_or_else(|| {
        let pairs = ORACLES.iter().filter(|o| o.scheme == scheme);
        let pairs: Vec<_> = pairs.map(|o| format!("{} with {}", key_name(o.weight), key_name(o.activation))).collect();
        Failure::said(format_args!(
            "the {scheme} oracle has no kernel for this pair of keys; it has (weights with activations) {}",
            pairs.join(", ")
        ))
    })
}

fn one(args: &Args, scheme: Scheme) -> Outcome {
    let oracle = oracle(args, scheme)?;
    let mut config = MoeConfig::new(args.experts, args.topk, args.hidden, args.intermediate);
    config.activation = layer::activation(&args.activation, layer::Parameters::default()).map_err(Failure::Said)?;
    config.bias = args.bias;
    config.lora = args.lora;
    config.format = layer::format(&args.format).map_err(Failure::Said)?;
    let inputs = SelectInputs { backend: args.backend, built_only: args.built_only };
    let choice = oracle.select(&config, &args.platform, &inputs);
    let candidates = oracle.explain_for(&config, &args.platform, &inputs);
    let mut out = Out::new();
    if args.json {
        let key = |bits| QuantKey::from_bits(bits).map(QuantKey::name);
        out.json(&Answer {
            scheme: scheme.name(),
            weight_key: key(oracle.weight),
            activation_key: key(oracle.activation),
            platform: args.platform.to_string(),
            backend: choice.ok().map(|k| k.name),
            built: choice.ok().map(|k| k.built()),
            error: choice.err().map(|e| e.to_string()),
            candidates: candidates.iter().map(|c| CandidateRow::from(*c)).collect(),
        })?;
    } else {
        let (w, a) = (key_name(oracle.weight), key_name(oracle.activation));
        out.line(format_args!("oracle    {scheme} ({}): weights {w}, activations {a}", oracle.alias))?;
        out.line(format_args!("platform  {}", args.platform))?;
        if let Ok(kernel) = choice {
            out.line(format_args!("backend   {}", kernel.name))?;
            if let (false, Some(why)) = (kernel.built(), moe_oracle::oracle::NO_CUDA) {
                out.line(format_args!("build     without its kernels: {why}"))?;
            }
            out.line(format_args!("why       {}", why(kernel.name, args.backend, &candidates)))?;
        }
        if args.explain {
            for c in &candidates {
                match c.verdict {
                    Ok(()) => out.line(format_args!("candidate {}: serves this layer", c.backend))?,
                    Err(reason) => out.line(format_args!("candidate {}: {reason}", c.backend))?,
                }
            }
        }
    }
    out.flush()?;
    choice.map(|_| ()).map_err(|e: SelectError| Failure::said(e))
}

/// Why this backend and no other.
fn why(chosen: &str, asked: MoeBackend, candidates: &[Candidate]) -> String {
    let before: Vec<_> = candidates.iter().take_while(|c| c.backend != chosen).collect();
    let refused: Vec<_> =
        before.iter().filter_map(|c| c.verdict.err().map(|e| format!("{}: {e}", c.backend))).collect();
    if refused.len() < before.len() {
        // A better one would serve, so that only the request explains the choice.
        return format!("`{}` was asked for", asked.name());
    }
    match refused.is_empty() {
        true => format!("best of {} candidates on this platform, and it serves this layer", candidates.len()),
        false => format!("the better ones refuse ({})", refused.join("; ")),
    }
}
