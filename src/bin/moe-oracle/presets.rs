//! Layers of known models, with the sizes of their published configurations.

use moe_oracle::config::{Activation, MoeConfig};

/// A layer to measure.
#[derive(Clone, Copy, Debug)]
pub struct Preset {
    /// What `--preset` takes.
    pub name: &'static str,
    /// Where the sizes are from: a model's `config.json` on the Hugging Face hub.
    pub source: &'static str,
    /// H
    pub hidden: usize,
    /// I on one rank
    pub intermediate: usize,
    /// E
    pub experts: usize,
    /// k
    pub topk: usize,
    /// Between the GEMMs.
    pub activation: Activation,
    /// Biases on the GEMMs.
    pub bias: bool,
}

impl Preset {
    const fn silu(name: &'static str, source: &'static str, sizes: [usize; 4]) -> Self {
        let [hidden, intermediate, experts, topk] = sizes;
        Self { name, source, hidden, intermediate, experts, topk, activation: Activation::SILU, bias: false }
    }

    const fn gpt_oss(name: &'static str, source: &'static str, experts: usize) -> Self {
        let plain = Self::silu(name, source, [2880, 2880, experts, 4]);
        Self { activation: Activation::SWIGLU_OAI, bias: true, ..plain }
    }

    /// The layer's configuration.
    pub fn config(&self) -> MoeConfig {
        let mut config = MoeConfig::new(self.experts, self.topk, self.hidden, self.intermediate);
        config.activation = self.activation;
        config.bias = self.bias;
        config
    }

    /// The preset of that name.
    pub fn by_name(name: &str) -> Option<&'static Preset> {
        PRESETS.iter().find(|p| p.name == name)
    }
}

/// All of them.
pub const PRESETS: [Preset; 12] = [
    Preset::silu("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", [2048, 768, 128, 8]),
    Preset::silu("qwen3-235b-a22b", "Qwen/Qwen3-235B-A22B", [4096, 1536, 128, 8]),
    Preset::silu("mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1", [4096, 14336, 8, 2]),
    Preset::gpt_oss("gpt-oss-20b", "openai/gpt-oss-20b", 32),
    Preset::gpt_oss("gpt-oss-120b", "openai/gpt-oss-120b", 128),
    Preset::silu("deepseek-v3", "deepseek-ai/DeepSeek-V3", [7168, 2048, 256, 8]),
    Preset::silu("deepseek-v3-tp8", "deepseek-ai/DeepSeek-V3, one of 8 tensor-parallel ranks", [7168, 256, 256, 8]),
    Preset::silu("kimi-k2", "moonshotai/Kimi-K2-Instruct", [7168, 2048, 384, 8]),
    Preset::silu("glm-4.5-air", "zai-org/GLM-4.5-Air", [4096, 1408, 128, 8]),
    Preset {
        activation: Activation::Relu2NoMul,
        ..Preset::silu("nemotron-3-nano", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B", [2688, 1856, 128, 6])
    },
    Preset::silu("qwen3-next", "Qwen/Qwen3-Next-80B-A3B-Instruct", [2048, 512, 512, 10]),
    Preset::silu("tiny", "no model: small enough for tests", [256, 128, 8, 2]),
];
