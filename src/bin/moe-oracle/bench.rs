//! `bench`: a layer's time against the floor that memory and arithmetic of this machine set.

mod measure;
mod plot;
mod report;
mod rng;
mod weights;

use crate::failure::{Failure, Out, Outcome};
use crate::limits::Limits;
use crate::machine;
use crate::presets::{PRESETS, Preset};
use clap::builder::PossibleValuesParser;
use indicatif::{ProgressBar, ProgressStyle};
use moe_oracle::cpu::ThreadPool;
use moe_oracle::oracle::{MoeBackend, SelectInputs};
use moe_oracle::platform::{CpuIsa, Platform};
use report::{Machine, Report};
use std::path::PathBuf;
use weights::{FORMATS, Format};

/// Options of `bench`.
#[derive(clap::Args)]
pub struct Args {
    /// The layer: a model's
    #[arg(long, default_value = "qwen3-30b-a3b", value_parser = PossibleValuesParser::new(PRESETS.map(|p| p.name)))]
    preset: String,
    /// Weight formats, separated by commas; `all` for every one
    #[arg(long = "scheme", value_delimiter = ',', value_name = "NAME", value_parser = format_names(),
          default_value = "bf16,fp8-block,nvfp4,mxfp4,int8,int4-g128")]
    schemes: Vec<String>,
    /// Tokens per call, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "1,4,16",
          value_parser = clap::value_parser!(u32).range(1..=65536))]
    tokens: Vec<u32>,
    /// Where to run; this build has kernels for `cpu` only
    #[arg(long, default_value = "cpu")]
    device: String,
    /// This backend instead of the best one
    #[arg(long, default_value = "auto", value_name = "NAME", value_parser = crate::select::backend)]
    backend: MoeBackend,
    /// Threads (default: one per core)
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=4096))]
    threads: Option<u16>,
    /// Write the results as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the ratio to the floor over the tokens as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

fn format_names() -> PossibleValuesParser {
    PossibleValuesParser::new(FORMATS.iter().map(|f| f.name).chain(["all"]))
}

/// Runs the command.
pub fn run(args: Args) -> Outcome {
    if args.device != "cpu" {
        return Err(Failure::said("cuda kernels are not in this build"));
    }
    let Some(preset) = Preset::by_name(&args.preset) else {
        return Err(Failure::said(format_args!("`{}` is no preset", args.preset)));
    };
    let all = args.schemes.iter().any(|s| s == "all");
    let formats: Vec<_> = FORMATS.iter().filter(|f| all || args.schemes.iter().any(|s| s == f.name)).collect();
    let threads = args.threads.map_or_else(machine::cores, usize::from);
    let pool =
        ThreadPool::new(threads).map_err(|e| Failure::said(format_args!("{threads} threads can't be started: {e}")))?;

    let progress = ProgressBar::new((1 + formats.len() * (1 + args.tokens.len())) as u64);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}") {
        progress.set_style(style);
    }
    progress.set_message("limits of the machine");
    let limits = Limits::measure(threads)?;
    progress.inc(1);

    let mut report = Report {
        machine: Machine { cpu: machine::cpu_model(), cores: machine::cores(), isa: CpuIsa::detect().name() },
        limits,
        rows: Vec::new(),
    };
    let mut notes = Vec::new();
    for format in formats {
        format_rows(&args, preset, format, &pool, &progress, &mut report, &mut notes)?;
    }
    progress.finish_and_clear();

    if let Some(file) = &args.json {
        let text = serde_json::to_string_pretty(&report).map_err(Failure::said)?;
        std::fs::write(file, text + "\n")
            .map_err(|e| Failure::said(format_args!("{} can't be written: {e}", file.display())))?;
    }
    if let Some(file) = &args.plot {
        plot::write(file, &report)?;
    }
    let mut out = Out::new();
    report::print(&mut out, preset, &report, &notes)?;
    out.flush()
}

/// Measures one weight format with every number of tokens.
fn format_rows(
    args: &Args,
    preset: &'static Preset,
    format: &Format,
    pool: &ThreadPool,
    progress: &ProgressBar,
    report: &mut Report,
    notes: &mut Vec<String>,
) -> Outcome {
    let platform = Platform::cpu();
    let config = preset.config();
    let oracle = format.oracle()?;
    let kernel = oracle.select(&config, &platform, &SelectInputs::named(args.backend)).map_err(Failure::said)?;
    progress.set_message(format!("{}: packing {}", preset.name, format.name));
    let weights = weights::make(preset, format, kernel.experts, notes)?;
    let expert_bytes = weights::expert_bytes(&weights);
    let quant = oracle.quant_config(&config, &weights).map_err(Failure::said)?;
    let packed = oracle.convert(kernel, &config, &platform, weights).map_err(Failure::said)?;
    let layer = measure::Layer::new(packed, quant, &config)?;
    progress.inc(1);
    for tokens in &args.tokens {
        let tokens = *tokens as usize;
        progress.set_message(format!("{}: {} with {tokens} tokens", preset.name, format.name));
        let timed = layer.time(tokens, pool)?;
        report.rows.push(report::Row::new(preset, format, oracle, kernel.name, &report.limits, expert_bytes, timed));
        progress.inc(1);
    }
    Ok(())
}
