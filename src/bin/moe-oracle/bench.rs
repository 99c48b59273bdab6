//! `bench`: a layer's time against the floor that memory and arithmetic of this machine set.

mod cpu;
#[cfg(feature = "cuda")]
mod gpu;
mod measure;
mod plot;
mod report;
mod rng;
mod routing;
mod weights;

use crate::failure::{Failure, Out, Outcome};
use crate::place::{Opened, Place};
use crate::presets::{PRESETS, Preset};
use clap::builder::PossibleValuesParser;
use indicatif::{ProgressBar, ProgressStyle};
use moe_oracle::oracle::MoeBackend;
use std::path::PathBuf;
use weights::{FORMATS, Format};

/// Options of `bench`.
#[derive(clap::Args)]
pub struct Args {
    /// The layer: a model's; several, separated by commas
    #[arg(long = "preset", value_delimiter = ',', value_name = "NAME", default_value = "qwen3-30b-a3b",
          value_parser = PossibleValuesParser::new(PRESETS.map(|p| p.name)))]
    presets: Vec<String>,
    /// Weight formats, separated by commas; `all` for every one
    #[arg(long = "scheme", value_delimiter = ',', value_name = "NAME", value_parser = format_names(),
          default_value = "bf16,fp8-block,nvfp4,mxfp4,int8,int4-g128")]
    schemes: Vec<String>,
    /// Tokens per call, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "1,4,16",
          value_parser = clap::value_parser!(u32).range(1..=65536))]
    tokens: Vec<u32>,
    /// Where to run: `cpu`, `cuda` or `cuda:N`
    #[arg(long, default_value = "cpu")]
    device: Place,
    /// This backend instead of the best one
    #[arg(long, default_value = "auto", value_name = "NAME", value_parser = crate::select::backend)]
    backend: MoeBackend,
    /// How unevenly tokens choose experts: the nth most wanted one has a weight of n to the power of -SKEW (Zipf's law), 0 for
    /// all alike
    #[arg(long, default_value_t = 0.0, value_parser = skew)]
    skew: f64,
    /// Threads of the CPU (default: one per core)
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=4096))]
    threads: Option<u16>,
    /// On a GPU, for cuda_mma and cuda_wgmma: up to so many tokens go to the kernels for few tokens, more to the grouped GEMM
    #[arg(long, value_name = "TOKENS")]
    decode_up_to: Option<usize>,
    /// On a GPU, for cuda_mma and cuda_wgmma: tokens of a tile of the grouped GEMM, instead of what suits
    #[arg(long, value_parser = clap::builder::PossibleValuesParser::new(["16", "32", "64", "128"]))]
    tile: Option<String>,
    /// On a GPU, for cuda_wgmma: from so many tokens on calls go to Hopper's own kernels
    #[arg(long, value_name = "TOKENS")]
    wgmma_from: Option<usize>,
    /// On a GPU, for cuda_wgmma: tokens of a tile of those, instead of what suits
    #[arg(long, value_parser = clap::builder::PossibleValuesParser::new(["64", "128", "256"]))]
    wgmma_tile: Option<String>,
    /// On a Hopper GPU, for fp8 with scales per channel or tensor: sums stay in the tensor cores, which is faster and less exact
    #[arg(long)]
    fast_accum: bool,
    /// On a GPU: calls in a row in one graph, at least; more where these read too little to keep the weights cold
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u16).range(1..=1024))]
    calls: u16,
    /// On a GPU: a JSON file of what peers reach and of the GPU's limits, to set beside the rows
    #[arg(long, value_name = "FILE")]
    anchors: Option<PathBuf>,
    /// Write the results as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the ratio to the floor over the tokens as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

fn skew(text: &str) -> Result<f64, String> {
    let skew = text.parse().ok().filter(|s| (0.0..=8.0).contains(s));
    skew.ok_or_else(|| "a number from 0 to 8 is wanted".into())
}

fn format_names() -> PossibleValuesParser {
    PossibleValuesParser::new(FORMATS.iter().map(|f| f.name).chain(["all"]))
}

/// What is to be measured, and how far it has come.
struct Session {
    presets: Vec<&'static Preset>,
    formats: Vec<&'static Format>,
    notes: Vec<String>,
    progress: ProgressBar,
}

impl Session {
    fn new(args: &Args) -> Outcome<Self> {
        let preset =
            |name: &String| Preset::by_name(name).ok_or_else(|| Failure::said(format_args!("`{name}` is no preset")));
        let presets = args.presets.iter().map(preset).collect::<Outcome<Vec<_>>>()?;
        let all = args.schemes.iter().any(|s| s == "all");
        let formats: Vec<_> = FORMATS.iter().filter(|f| all || args.schemes.iter().any(|s| s == f.name)).collect();
        let steps = 1 + presets.len() * formats.len() * (1 + args.tokens.len());
        let progress = ProgressBar::new(steps as u64);
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}") {
            progress.set_style(style);
        }
        Ok(Self { presets, formats, notes: Vec::new(), progress })
    }

    fn say(&self, message: impl Into<std::borrow::Cow<'static, str>>) {
        self.progress.set_message(message);
    }

    fn step(&self, n: u64) {
        self.progress.inc(n);
    }
}

/// Runs the command.
pub fn run(args: Args) -> Outcome {
    let mut session = Session::new(&args)?;
    if args.skew > 0.0 {
        session.notes.push(format!("tokens choose experts by Zipf's law with exponent {}", args.skew));
    }
    if args.fast_accum {
        session
            .notes
            .push("fp8 with scales per channel or tensor leaves its sums in a Hopper GPU's tensor cores".into());
    }
    let report = match args.device.open()? {
        Opened::Cpu => cpu::run(&args, &mut session)?,
        #[cfg(feature = "cuda")]
        Opened::Cuda(stream) => gpu::run(&args, &mut session, &stream)?,
    };
    session.progress.finish_and_clear();

    if let Some(file) = &args.json {
        let text = serde_json::to_string_pretty(&report).map_err(Failure::said)?;
        std::fs::write(file, text + "\n")
            .map_err(|e| Failure::said(format_args!("{} can't be written: {e}", file.display())))?;
    }
    if let Some(file) = &args.plot {
        plot::write(file, &report)?;
    }
    let mut out = Out::new();
    report::print(&mut out, &session.presets, &report, &session.notes)?;
    out.flush()
}
