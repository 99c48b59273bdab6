//! How a command ends when it does not succeed.

use std::io::{BufWriter, ErrorKind, StdoutLock, Write};

/// Why a command stopped.
#[derive(Debug)]
pub enum Failure {
    /// One sentence for stderr; exit status 1.
    Said(String),
    /// The reader of stdout went away: a quiet end.
    PipeClosed,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::Said(sentence) => f.write_str(sentence),
            Failure::PipeClosed => f.write_str("the reader of the output went away"),
        }
    }
}

/// What every command returns.
pub type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    /// A failure with this sentence.
    pub fn said(sentence: impl std::fmt::Display) -> Self {
        Failure::Said(sentence.to_string())
    }
}

/// Buffered stdout whose errors are [`Failure`]s. `println!` would panic on a closed pipe.
pub struct Out(BufWriter<StdoutLock<'static>>);

impl Out {
    /// Locks stdout.
    pub fn new() -> Self {
        Self(BufWriter::with_capacity(1 << 16, std::io::stdout().lock()))
    }

    /// One line.
    pub fn line(&mut self, line: impl std::fmt::Display) -> Outcome {
        writeln!(self.0, "{line}").map_err(Self::failure)
    }

    /// One value as one line of JSON.
    pub fn json(&mut self, value: &impl serde::Serialize) -> Outcome {
        serde_json::to_writer(&mut self.0, value).map_err(|e| Self::failure(e.into()))?;
        self.0.write_all(b"\n").map_err(Self::failure)
    }

    /// What is still buffered. Without it, an error of the last write would get lost in `drop`.
    pub fn flush(&mut self) -> Outcome {
        self.0.flush().map_err(Self::failure)
    }

    fn failure(e: std::io::Error) -> Failure {
        match e.kind() {
            ErrorKind::BrokenPipe => Failure::PipeClosed,
            _ => Failure::said(format_args!("stdout can't be written: {e}")),
        }
    }
}

/// Any error of a library call, for commands that pass many kinds on with `?`.
pub type AnyError = Box<dyn std::error::Error>;

impl From<AnyError> for Failure {
    fn from(e: AnyError) -> Self {
        match e.downcast_ref::<std::io::Error>() {
            Some(io) if io.kind() == ErrorKind::BrokenPipe => Failure::PipeClosed,
            _ => Failure::said(e),
        }
    }
}

/// One line to stdout at once.
pub fn outln(line: &str) -> Result<(), AnyError> {
    Ok(writeln!(std::io::stdout(), "{line}")?)
}
