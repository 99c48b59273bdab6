//! Random canonical weights of any key pair.

use super::{Layer, Rng};
use moe_oracle::config::MoeConfig;
use moe_oracle::oracle::DynOracle;
use moe_oracle::scheme::{Elem, Extent, QuantKey, ScaleType};
use moe_oracle::weights::{ExpertWeights, HalfType, MoeWeights, Scales, WeightElem, WeightMatrix};

/// A matrix whose product with a vector of unit variance has about unit variance.
///
/// The bits of `style` choose what a key leaves open: half type, group size, act-order.
pub fn matrix(rng: &mut Rng, key: Option<QuantKey>, rows: usize, cols: usize, style: usize) -> WeightMatrix {
    let norm = 1.0 / (cols as f32).sqrt();
    let n = rows * cols;
    let Some(key) = key else {
        let bf16 = style & 1 == 0;
        let code = |rng: &mut Rng| {
            let v = rng.normal() * norm;
            if bf16 { half::bf16::from_f32(v).to_bits() } else { half::f16::from_f32(v).to_bits() }
        };
        let codes: Vec<u8> = (0..n).flat_map(|_| code(rng).to_le_bytes()).collect();
        let elem = if bf16 { WeightElem::Bf16 } else { WeightElem::F16 };
        return WeightMatrix { rows, cols, elem, codes: codes.into(), scales: Scales::None };
    };
    let (bytes, rms) = match key.elem {
        // All codes but the NaNs 0x7f and 0xff.
        Elem::E4m3 => ((0..n).map(|_| (rng.below(2) << 7 | rng.below(0x7f)) as u8).collect(), 130.0),
        Elem::E2m1 => (random_bytes(rng, n / 2), 2.9),
        Elem::U4 => (random_bytes(rng, n / 2), 4.6),
        Elem::Int8 | Elem::U8 => (random_bytes(rng, n), 74.0),
        other => panic!("no weights of {other:?}"),
    };
    let unit = norm / rms;
    let scales = scales(rng, key, rows, cols, unit, style);
    WeightMatrix { rows, cols, elem: WeightElem::Quant(key.elem), codes: Vec::into(bytes), scales }
}

fn random_bytes(rng: &mut Rng, n: usize) -> Vec<u8> {
    (0..n).map(|_| rng.bits() as u8).collect()
}

fn scales(rng: &mut Rng, key: QuantKey, rows: usize, cols: usize, unit: f32, style: usize) -> Scales {
    let some = |rng: &mut Rng, n: usize| (0..n).map(|_| unit * rng.range(0.5, 1.5)).collect::<Vec<f32>>();
    let group = key.scale.group;
    match (key.scale.ty, group.rows, group.cols) {
        (ScaleType::F32, Extent::All, Extent::All) => Scales::PerTensor(unit * rng.range(0.5, 1.5)),
        (ScaleType::F32, Extent::Len(1), Extent::All) => Scales::PerRow(some(rng, rows)),
        (ScaleType::F32, Extent::Len(b), Extent::Len(c)) if b == c => {
            let block = b as usize;
            Scales::Block { block, values: some(rng, rows.div_ceil(block) * cols.div_ceil(block)) }
        }
        (ScaleType::E8m0, Extent::Len(1), Extent::Len(32)) => {
            let middle = 127 + unit.log2().round() as i32;
            let code = |rng: &mut Rng| (middle - 1 + rng.below(3) as i32) as u8;
            Scales::E8m0((0..rows * cols / 32).map(|_| code(rng)).collect::<Vec<_>>().into())
        }
        (ScaleType::E4m3, Extent::Len(1), Extent::Len(16)) => {
            // 0x08 (the smallest normal) to 0x7e (448); the large ones decide the magnitude.
            let codes = (0..rows * cols / 16).map(|_| (8 + rng.below(0x77)) as u8).collect::<Vec<_>>();
            Scales::Nvfp4 { codes: codes.into(), global: unit / 130.0 * rng.range(0.5, 1.5) }
        }
        (ScaleType::Half, Extent::Len(1), len) => {
            let size = match len {
                Extent::Len(n) => n as usize,
                _ => *[32, 64, 128, cols]
                    .iter()
                    .filter(|s| cols.is_multiple_of(**s))
                    .nth(style >> 1 & 1)
                    .unwrap_or(&cols),
            };
            let ty = if style & 1 == 0 { HalfType::Bf16 } else { HalfType::F16 };
            let n = rows * cols / size;
            let mut values = some(rng, n);
            for v in &mut values {
                *v = match ty {
                    HalfType::Bf16 => half::bf16::from_f32(*v).to_f32(),
                    HalfType::F16 => half::f16::from_f32(*v).to_f32(),
                };
            }
            let limit = if key.elem == Elem::U4 { 16 } else { 256 };
            let zero_points = (!key.symmetric).then(|| (0..n).map(|_| rng.below(limit) as u8).collect());
            let act_order = matches!(len, Extent::Any) && size < cols && style >> 2 == 0;
            let g_idx = act_order.then(|| permuted_groups(rng, cols, size));
            Scales::Group { size, ty, values, zero_points, g_idx }
        }
        other => panic!("no weights with scales {other:?}"),
    }
}

fn permuted_groups(rng: &mut Rng, cols: usize, size: usize) -> Vec<u32> {
    let mut g: Vec<u32> = (0..cols).map(|c| (c / size) as u32).collect();
    for i in (1..cols).rev() {
        g.swap(i, rng.below(i + 1));
    }
    g
}

/// Weights that fit a configuration, with a stored scale for each GEMM's input whatever the activation key is.
pub fn layer(rng: &mut Rng, oracle: &'static DynOracle, config: MoeConfig) -> Layer {
    let weight_key = QuantKey::from_bits(oracle.weight);
    let activation_key = QuantKey::from_bits(oracle.activation);
    let (h, i, gated) = (config.hidden, config.intermediate, config.activation.gated());
    // About three standard deviations reach the largest code: some values saturate.
    let largest = match activation_key {
        Some(k) if k.scale2.is_some() => 6.0 * 448.0,
        Some(k) if k.elem == Elem::Int8 => 127.0,
        _ => 448.0,
    };
    let bias = |rng: &mut Rng, n: usize| config.bias.then(|| (0..n).map(|_| 0.3 * rng.normal()).collect::<Vec<f32>>());
    // A producer stores a projection in the same way in every expert of a layer.
    let styles = [rng.below(8), rng.below(8), rng.below(8)];
    let experts = (0..config.local_experts).map(|_| ExpertWeights {
        gate: gated.then(|| matrix(rng, weight_key, i, h, styles[0])),
        up: matrix(rng, weight_key, i, h, styles[1]),
        down: matrix(rng, weight_key, h, i, styles[2]),
        gate_bias: bias(rng, i).filter(|_| gated),
        up_bias: bias(rng, i),
        down_bias: bias(rng, h),
        input_scale: Some(rng.range(2.5, 3.5) / largest),
        down_input_scale: Some(rng.range(1.5, 3.5) / largest),
    });
    let weights = MoeWeights { scheme: oracle.scheme, weight_key, activation_key, experts: experts.collect() };
    weights.validate().unwrap_or_else(|e| panic!("{}: {e}", oracle.alias));
    Layer { oracle, config, weights }
}
