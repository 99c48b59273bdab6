//! The command line.

mod inspect;
mod run;
mod tensors;

use clap::{Parser, Subcommand};
use std::io::Write;

/// What ends a command with status 1: one sentence.
pub type Failure = Box<dyn std::error::Error>;

/// Prints a line to stdout; a reader that has gone away is an error to return, not a panic.
pub fn outln(line: &str) -> Result<(), Failure> {
    Ok(writeln!(std::io::stdout(), "{line}")?)
}

#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run one layer of a checkpoint over hidden states from a file.
    Run(run::Args),
    /// Say what the MoE layers of a checkpoint are.
    Inspect(inspect::Args),
}

fn main() -> std::process::ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) => run::run(args),
        Command::Inspect(args) => inspect::run(args),
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("moe-oracle: {e}");
            std::process::ExitCode::FAILURE
        }
    }
}
