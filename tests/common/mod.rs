//! What the tests of whole layers share: random layers, kernels of every backend, and a float64 reference that has
//! nothing in common with the crate's number tables or kernels.
#![allow(dead_code, reason = "every test binary compiles this module and uses a part of it")]

#[cfg(feature = "cuda")]
pub mod gemm;
#[cfg(feature = "cuda")]
pub mod gpu;
#[cfg(feature = "cuda")]
pub mod packed;
pub mod reference;
pub mod skip;
pub mod weights;

use moe_oracle::config::{Activation, InputType, MoeConfig};
use moe_oracle::cpu::{Executor, Experts};
use moe_oracle::kernel::{Batched, MoeKernel, PrepareFinalize, Rows, RowsMut, Standard};
use moe_oracle::oracle::{Bf16, Device, DynOracle, ExpertsKind, KernelInfo, MoeKernelOracle, Numerics, SUPPORT};
use moe_oracle::platform::{CpuIsa, Platform};
use moe_oracle::weights::MoeWeights;

/// Activations with a gate, with the parameters that change their course.
pub const GATED: [Activation; 9] = [
    Activation::SILU,
    Activation::Silu { limit: Some(1.5) },
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::SWIGLU_OAI,
    Activation::SwigluStep { limit: 1.25 },
    Activation::Situ { beta: 2.0, linear_beta: None },
    Activation::Situ { beta: 2.0, linear_beta: Some(1.5) },
    Activation::Relu2,
];
/// Those without.
pub const UNGATED: [Activation; 4] =
    [Activation::SiluNoMul, Activation::GeluNoMul, Activation::GeluTanhNoMul, Activation::Relu2NoMul];

/// splitmix64: reproducible, and the tests need nothing better.
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// In [0, 1).
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 24) as f32
    }

    pub fn range(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.unit()
    }

    /// Nearly normal, with tails that end at 3.4.
    pub fn normal(&mut self) -> f32 {
        (0..4).map(|_| self.unit() - 0.5).sum::<f32>() * 3f32.sqrt()
    }
}

pub type DynKernel<P> = MoeKernel<P, Box<dyn Experts>>;

/// A layer with its weights, before a backend is chosen.
pub struct Layer {
    pub oracle: &'static DynOracle,
    pub config: MoeConfig,
    pub weights: MoeWeights,
}

/// A backend on an instruction set.
#[derive(Clone, Copy)]
pub struct Target {
    pub info: &'static KernelInfo,
    pub platform: Platform,
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} on {}", self.info.name, self.platform)
    }
}

/// Every CPU backend of the layer's scheme that serves it, vectorised ones on each instruction set of this machine.
/// MOE_ORACLE_TEST_BACKENDS names the backends to keep, separated by commas.
pub fn targets(layer: &Layer) -> Vec<Target> {
    let wanted = std::env::var("MOE_ORACLE_TEST_BACKENDS").ok();
    let keep = |name: &str| wanted.as_ref().is_none_or(|w| w.split(',').any(|n| n == name));
    let mut all = Vec::new();
    for (scheme, info) in SUPPORT {
        if *scheme != layer.oracle.scheme || info.device != Device::Cpu || !keep(info.name) {
            continue;
        }
        for isa in CpuIsa::ALL {
            let best = CpuIsa::detect();
            let vectorised = matches!(info.experts, ExpertsKind::Simd | ExpertsKind::SimdInt8);
            let wanted = if vectorised { isa <= best } else { isa == best };
            let platform = Platform::Cpu(isa);
            let serves = layer.oracle.explain(&layer.config, &platform);
            if wanted && serves.iter().any(|c| c.backend == info.name && c.verdict.is_ok()) {
                all.push(Target { info, platform });
            }
        }
    }
    all
}

/// The kernel of a backend for a layer, through the same steps as an engine takes.
pub fn kernel<P: PrepareFinalize>(layer: &Layer, target: Target, map: Option<Vec<i32>>) -> DynKernel<P> {
    let quant = layer.oracle.quant_config(&layer.config, &layer.weights).unwrap();
    let weights = layer.oracle.convert(target.info, &layer.config, &target.platform, layer.weights.clone());
    let weights = weights.unwrap_or_else(|e| panic!("{} {target}: {e}", layer.oracle.alias));
    // `make_kernel` is the same for every oracle: the weights know their kernel.
    Bf16::make_kernel::<P>(weights, quant, &layer.config, map).unwrap()
}

/// The reference that a backend follows.
pub fn followed<'a>(layer: &'a Layer, info: &KernelInfo) -> reference::Reference<'a> {
    let key = moe_oracle::scheme::QuantKey::from_bits(layer.oracle.activation);
    match info.numerics {
        Numerics::WeightOnly => reference::Reference::new(layer, None),
        Numerics::AsKeyed | Numerics::Mixed => reference::Reference::new(layer, key),
        Numerics::Int8Block => reference::Reference::int8_blocks(layer),
    }
}

/// Rounds to what hidden states of that type can hold.
pub fn round_to(ty: InputType, x: &mut [f32]) {
    match ty {
        InputType::Bf16 => x.iter_mut().for_each(|v| *v = half::bf16::from_f32(*v).to_f32()),
        InputType::F16 => x.iter_mut().for_each(|v| *v = half::f16::from_f32(*v).to_f32()),
        InputType::F32 => {}
    }
}

/// Calls `f` with rows of the type and a poisoned output; gives the output back in float32.
pub fn with_rows(ty: InputType, hidden: &[f32], f: impl FnOnce(Rows<'_>, RowsMut<'_>)) -> Vec<f32> {
    match ty {
        InputType::F32 => {
            let mut out = vec![f32::NAN; hidden.len()];
            f(Rows::F32(hidden), RowsMut::F32(&mut out));
            out
        }
        InputType::Bf16 => {
            let x: Vec<_> = hidden.iter().map(|v| half::bf16::from_f32(*v)).collect();
            let mut out = vec![half::bf16::NAN; hidden.len()];
            f(Rows::Bf16(&x), RowsMut::Bf16(&mut out));
            out.into_iter().map(half::bf16::to_f32).collect()
        }
        InputType::F16 => {
            let x: Vec<_> = hidden.iter().map(|v| half::f16::from_f32(*v)).collect();
            let mut out = vec![half::f16::NAN; hidden.len()];
            f(Rows::F16(&x), RowsMut::F16(&mut out));
            out.into_iter().map(half::f16::to_f32).collect()
        }
    }
}

/// A forward call in a workspace of exactly the promised size, filled with 0xFF bytes (NaNs and ids out of range), so
/// that reading what was not written shows.
pub fn forward(
    kernel: &DynKernel<Standard>,
    hidden: &[f32],
    ids: &[i32],
    weights: &[f32],
    pool: &dyn Executor,
) -> Vec<f32> {
    let c = kernel.config();
    let mut workspace = vec![0xff; kernel.workspace_bytes(hidden.len() / c.hidden)];
    let out = with_rows(c.input, hidden, |x, y| kernel.forward(x, ids, weights, y, &mut workspace, pool).unwrap());
    assert!(out.iter().all(|v| !v.is_nan()), "an output element is NaN or was not written");
    out
}

pub fn forward_batched(kernel: &DynKernel<Batched>, hidden: &[f32], counts: &[i32], pool: &dyn Executor) -> Vec<f32> {
    let c = kernel.config();
    let mut workspace = vec![0xff; kernel.workspace_bytes(hidden.len() / c.hidden / c.local_experts)];
    with_rows(c.input, hidden, |x, y| kernel.forward_batched(x, counts, y, &mut workspace, pool).unwrap())
}

/// Which experts tokens go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skew {
    Uniform,
    /// Every token to the first k experts.
    Same,
    /// Expert e in proportion to 1 / (e + 1).
    Zipf,
    /// Uniform, and a third of the ids is -1.
    Holes,
}

/// Random distinct ids and weights per token.
pub fn route(rng: &mut Rng, tokens: usize, config: &MoeConfig, skew: Skew) -> (Vec<i32>, Vec<f32>) {
    let (e, k) = (config.experts, config.topk);
    let mut ids = Vec::with_capacity(tokens * k);
    let harmonic: f32 = (1..=e).map(|i| 1.0 / i as f32).sum();
    for _ in 0..tokens {
        let start = ids.len();
        while ids.len() < start + k {
            let id = match skew {
                Skew::Uniform | Skew::Holes => rng.below(e),
                Skew::Same => ids.len() - start,
                Skew::Zipf => {
                    let mut left = rng.unit() * harmonic;
                    (0..e)
                        .find(|i| {
                            left -= 1.0 / (*i + 1) as f32;
                            left <= 0.0
                        })
                        .unwrap_or(e - 1)
                }
            } as i32;
            if !ids[start..].contains(&id) {
                ids.push(id);
            }
        }
        if skew == Skew::Holes {
            ids[start..].iter_mut().for_each(|id| {
                if rng.below(3) == 0 {
                    *id = -1
                }
            });
        }
    }
    let weights = ids.iter().map(|_| rng.range(0.05, 1.0)).collect();
    (ids, weights)
}

/// No value is half its token's largest: as int8 that lies in the middle between two codes, where float32 and float64
/// disagree.
pub fn hidden(rng: &mut Rng, tokens: usize, config: &MoeConfig) -> Vec<f32> {
    let mut x: Vec<f32> = (0..tokens * config.hidden).map(|_| rng.normal()).collect();
    round_to(config.input, &mut x);
    for row in x.chunks_mut(config.hidden) {
        let largest = row.iter().fold(0.0, |m, v| f32::max(m, v.abs()));
        row.iter_mut().filter(|v| 2.0 * v.abs() == largest).for_each(|v| *v /= 2.0);
    }
    x
}

/// Relative error in the Frobenius norm.
pub fn relative_error(have: &[f32], want: &[f64]) -> f64 {
    assert_eq!(have.len(), want.len());
    let norm: f64 = want.iter().map(|w| w * w).sum::<f64>();
    let diff: f64 = have.iter().zip(want).map(|(h, w)| (f64::from(*h) - w).powi(2)).sum();
    if norm == 0.0 { diff.sqrt() } else { (diff / norm).sqrt() }
}
