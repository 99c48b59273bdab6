//! The command line: what would be chosen, how fast it is, and what this machine offers.

mod bench;
mod doctor;
mod failure;
mod inspect;
mod limits;
mod machine;
mod place;
mod presets;
mod run;
mod select;
mod tensors;

use clap::{Parser, Subcommand};
use failure::{Failure, Outcome};
use std::process::ExitCode;

/// Fused Mixture-of-Experts layers: kernel selection, benchmarks, diagnosis.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run one layer of a checkpoint over hidden states from a file
    Run(run::Args),
    /// Say what the MoE layers of a checkpoint are
    Inspect(inspect::Args),
    /// Choose the backend for a layer, or for every line of a file of layers
    Select(select::Args),
    /// Measure a layer against what this machine's memory and arithmetic allow
    Bench(bench::Args),
    /// Say what this machine offers and what stands in the way
    Doctor(doctor::Args),
}

fn dispatch(command: Command) -> Outcome {
    match command {
        Command::Run(args) => Ok(run::run(args)?),
        Command::Inspect(args) => Ok(inspect::run(args)?),
        Command::Select(args) => select::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Doctor(args) => doctor::run(args),
    }
}

fn main() -> ExitCode {
    match dispatch(Cli::parse().command) {
        // Whoever read the output has seen enough, as with `| head`.
        Ok(()) | Err(Failure::PipeClosed) => ExitCode::SUCCESS,
        Err(Failure::Said(sentence)) => {
            use std::io::Write;
            // A closed stderr leaves nobody to tell.
            let _ = writeln!(std::io::stderr(), "moe-oracle: {sentence}");
            ExitCode::FAILURE
        }
    }
}
