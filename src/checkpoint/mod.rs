//! Reading Hugging Face checkpoints: one Mixture-of-Experts layer as [`MoeWeights`] with its router and shared expert.
//!
//! Where the formats come from: tensor names, config keys and their defaults are those of the model families in
//! transformers (`family`); quantised tensors are those of DeepSeek's and transformers' fp8 (`quant`), of
//! compressed-tensors, NVIDIA ModelOpt, GPTQ (AutoGPTQ, GPTQModel), AutoAWQ and OpenAI's gpt-oss. The files are
//! safetensors (`file`). Nothing is guessed: a scale that the format needs and the file lacks is an error.

mod experts;
mod family;
mod file;
mod json;
#[cfg(test)]
mod made;
mod pattern;
mod quant;
#[cfg(test)]
mod tests;

use crate::config::MoeConfig;
use crate::weights::MoeWeights;
use std::path::{Path, PathBuf};

/// Why a checkpoint cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file cannot be read at all.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not what its name says.
    #[error("{path}: {problem}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The config is incomplete or contradicts itself.
    #[error("{0}")]
    Config(String),
    /// A tensor is missing, or is not what the config says.
    #[error("tensor {name} {problem}")]
    Tensor {
        /// Its name in the checkpoint.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A model family, quantisation method or layout that has no reader.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// The layer is not in the files, or has no experts.
    #[error("layer {0} has no experts in these files")]
    NoSuchLayer(usize),
}

impl CheckpointError {
    fn tensor(name: &str, problem: impl Into<String>) -> Self {
        CheckpointError::Tensor { name: name.to_owned(), problem: problem.into() }
    }

    fn io(path: &Path, source: std::io::Error) -> Self {
        CheckpointError::Io { path: path.to_owned(), source }
    }
}

/// The norm in front of gemma4's router: `x / sqrt(mean(x^2) + eps) * scale * factor`.
#[derive(Clone, Debug, PartialEq)]
pub struct RouterNorm {
    /// Added to the mean square.
    pub eps: f32,
    /// `[H]`
    pub scale: Vec<f32>,
    /// `H^-0.5`
    pub factor: f32,
}

/// A layer's router.
#[derive(Clone, Debug, PartialEq)]
pub struct RouterWeights {
    /// `[E, H]`, row-major
    pub weight: Vec<f32>,
    /// `[E]`, added to the logits
    pub bias: Option<Vec<f32>>,
    /// `[E]`, added to the scores for the choice only (DeepSeek-V3)
    pub correction_bias: Option<Vec<f32>>,
    /// Applied to the hidden states first (gemma4).
    pub input_norm: Option<RouterNorm>,
    /// `[E]`, multiplies the final weight of an expert (gemma4)
    pub expert_scale: Option<Vec<f32>>,
}

/// The expert that every token takes.
#[derive(Clone, Debug)]
pub struct SharedExpert {
    /// One expert, with its own intermediate size and its own scheme.
    pub weights: MoeWeights,
    /// `[H]`: the output is multiplied by `sigmoid(x . gate)` (qwen2_moe)
    pub gate: Option<Vec<f32>>,
}

/// One layer, ready to be packed.
#[derive(Clone, Debug)]
pub struct MoeLayer {
    /// Its index in the model.
    pub index: usize,
    /// The config's `model_type`.
    pub family: String,
    /// What wrote the experts' tensors: `plain`, `fp8`, `compressed-tensors float-quantized`, `modelopt NVFP4`, ...
    pub producer: String,
    /// Sizes, activation and routing.
    pub config: MoeConfig,
    /// The routed experts.
    pub weights: MoeWeights,
    /// The router.
    pub router: RouterWeights,
    /// The shared expert, for families that have one.
    pub shared: Option<SharedExpert>,
}

/// An open checkpoint: configs parsed, files mapped.
///
/// The files stay mapped as long as the checkpoint or any weights from it live. Cutting or rewriting them meanwhile
/// changes the weights or ends the process (SIGBUS), as with every memory-mapped loader; replacing a file by renaming
/// another one over it is harmless.
#[derive(Debug)]
pub struct Checkpoint {
    model: family::Model,
    quant: quant::QuantConfig,
    tensors: file::Tensors,
    layers: Vec<usize>,
    /// For each of `layers`: the beginning of its tensors' names, up to `experts.`.
    bases: Vec<String>,
}

impl Checkpoint {
    /// Reads the configs of a directory and maps its safetensors files.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let read = |name: &str| {
            let path = dir.join(name);
            std::fs::read(&path).map_err(|e| CheckpointError::io(&path, e))
        };
        let config = json::parse(&read("config.json")?, "config.json")?;
        let model = family::Model::new(&config)?;
        let quant = match quant::in_config(&config)? {
            Some(value) => quant::QuantConfig::new(value, "quantization_config")?,
            None if dir.join("hf_quant_config.json").exists() => {
                let value = json::parse(&read("hf_quant_config.json")?, "hf_quant_config.json")?;
                quant::QuantConfig::modelopt(&value, "hf_quant_config.json")?
            }
            None if dir.join("quantize_config.json").exists() => {
                let value = json::parse(&read("quantize_config.json")?, "quantize_config.json")?;
                quant::QuantConfig::gptq(&value, "quantize_config.json")?
            }
            None => quant::QuantConfig::default(),
        };
        let tensors = file::Tensors::open(dir)?;
        let (layers, bases) = experts::find_layers(&tensors)?.into_iter().unzip();
        Ok(Self { model, quant, tensors, layers, bases })
    }

    /// The indices of the layers whose experts are in the files, ascending.
    pub fn layers(&self) -> &[usize] {
        &self.layers
    }

    /// Reads one layer. Bytes stay mapped wherever the file's layout is the canonical one.
    pub fn layer(&self, index: usize) -> Result<MoeLayer, CheckpointError> {
        let at = self.layers.binary_search(&index).map_err(|_| CheckpointError::NoSuchLayer(index))?;
        experts::Reader { model: &self.model, quant: &self.quant, tensors: &self.tensors, base: &self.bases[at] }
            .layer(index)
    }
}
