//! What the targets share: checkpoints to start from, edits, and the reading that must survive them.
//!
//! A fuzzer that starts from bytes never gets past the first check. So an input is a list of edits of a checkpoint that
//! can be read, and most edits leave a file that is still consistent in itself.

pub mod base;
pub mod config;
pub mod tensors;

use moe_oracle::checkpoint::Checkpoint;
use moe_oracle::cpu::SingleThread;
use moe_oracle::layer::{Layer, LayerOptions};
use moe_oracle::oracle::SelectInputs;
use moe_oracle::platform::Platform;
use std::error::Error;
use std::path::Path;

/// Reads every layer, packs it and runs it on two tokens. Stops at the first error.
pub fn read_and_run(dir: &Path) -> Result<(), Box<dyn Error>> {
    let checkpoint = Checkpoint::open(dir)?;
    let options = LayerOptions { platform: Platform::cpu(), inputs: SelectInputs::AUTO, exact_activations: false };
    for &index in checkpoint.layers() {
        let layer = checkpoint.layer(index)?;
        let hidden = vec![0.5; 2 * layer.config.hidden];
        let layer = Layer::new(layer, &options)?;
        let answer = layer.run(&hidden, None, None, &SingleThread);
        assert!(answer.is_ok(), "a layer that was made refuses rows of its own size: {}", answer.unwrap_err());
    }
    Ok(())
}

/// Errors are welcome; panics, hangs and wild accesses are what the fuzzer looks for.
pub fn survive(dir: &Path) {
    if let Err(e) = read_and_run(dir) {
        assert!(!e.to_string().trim().is_empty(), "an error says nothing");
    }
}
