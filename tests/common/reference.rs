//! The layer in float64, from the definitions: number formats through the `microfloat` crate, activations and
//! activation quantisation written again.

use super::Layer;
use microfloat::{f4e2m1fn, f6e2m3fn, f6e3m2fn, f8e4m3fn, f8e8m0fnu};
use moe_oracle::config::Activation;
use moe_oracle::scheme::{Elem, Extent, QuantKey, ScaleType};
use moe_oracle::weights::{ExpertWeights, Scales, WeightElem, WeightMatrix};
use std::collections::HashMap;

fn e4m3(code: u8) -> f64 {
    f8e4m3fn::from_bits(code).to_f64()
}

fn e8m0(code: u8) -> f64 {
    f8e8m0fnu::from_bits(code).to_f64()
}

/// The whole matrix, `[rows, cols]`.
pub fn dequantize(m: &WeightMatrix) -> Vec<f64> {
    let mut out = Vec::with_capacity(m.rows * m.cols);
    for row in 0..m.rows {
        for col in 0..m.cols {
            let at = row * m.cols + col;
            let half = || u16::from_le_bytes([m.codes[2 * at], m.codes[2 * at + 1]]);
            let four = || if at.is_multiple_of(2) { m.codes[at / 2] & 15 } else { m.codes[at / 2] >> 4 };
            let (code, middle) = match m.elem {
                WeightElem::Bf16 => (half::bf16::from_bits(half()).to_f64(), 0.0),
                WeightElem::F16 => (half::f16::from_bits(half()).to_f64(), 0.0),
                WeightElem::Quant(Elem::E4m3) => (e4m3(m.codes[at]), 0.0),
                WeightElem::Quant(Elem::E2m1) => (f4e2m1fn::from_bits(four()).to_f64(), 0.0),
                WeightElem::Quant(Elem::Int8) => (f64::from(m.codes[at] as i8), 0.0),
                WeightElem::Quant(Elem::U4) => (f64::from(four()), 8.0),
                WeightElem::Quant(Elem::U8) => (f64::from(m.codes[at]), 128.0),
                other => panic!("no weights of {other:?}"),
            };
            out.push(match &m.scales {
                Scales::None => code,
                Scales::PerTensor(s) => (code - middle) * f64::from(*s),
                Scales::PerRow(s) => (code - middle) * f64::from(s[row]),
                Scales::Block { block, values } => {
                    let per_row = m.cols.div_ceil(*block);
                    (code - middle) * f64::from(values[(row / block) * per_row + col / block])
                }
                Scales::E8m0(codes) => code * e8m0(codes[row * (m.cols / 32) + col / 32]),
                Scales::Nvfp4 { codes, global } => {
                    code * e4m3(codes[row * (m.cols / 16) + col / 16]) * f64::from(*global)
                }
                Scales::Group { size, values, zero_points, g_idx, .. } => {
                    let group = match g_idx {
                        Some(g) => g[col] as usize,
                        None => col / size,
                    };
                    let at = row * (m.cols / size) + group;
                    let zero = zero_points.as_ref().map_or(middle, |z| f64::from(z[at]));
                    (code - zero) * f64::from(values[at])
                }
            });
        }
    }
    out
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + libm::erf(x / 2f64.sqrt()))
}

fn gelu_tanh(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
}

pub fn activate(a: Activation, g: f64, u: f64) -> f64 {
    match a {
        Activation::Silu { limit: None } => g * sigmoid(g) * u,
        Activation::Silu { limit: Some(l) } => {
            let (l, g) = (f64::from(l), g.min(f64::from(l)));
            g * sigmoid(g) * u.clamp(-l, l)
        }
        Activation::Gelu => gelu(g) * u,
        Activation::GeluTanh => gelu_tanh(g) * u,
        Activation::SwigluOai { alpha, beta, limit } => {
            let l = f64::from(limit);
            let (g, u) = (g.min(l), u.clamp(-l, l));
            g * sigmoid(f64::from(alpha) * g) * (u + f64::from(beta))
        }
        Activation::SwigluStep { limit } => {
            let l = f64::from(limit);
            (g * sigmoid(g)).min(l) * u.clamp(-l, l)
        }
        Activation::Situ { beta, linear_beta } => {
            let b = f64::from(beta);
            let u = linear_beta.map_or(u, |lb| f64::from(lb) * (u / f64::from(lb)).tanh());
            b * (g / b).tanh() * sigmoid(g) * u
        }
        Activation::Relu2 => g.max(0.0).powi(2) * u,
        Activation::SiluNoMul => u * sigmoid(u),
        Activation::GeluNoMul => gelu(u),
        Activation::GeluTanhNoMul => gelu_tanh(u),
        Activation::Relu2NoMul => u.max(0.0).powi(2),
    }
}

fn max_abs(x: &[f64]) -> f64 {
    x.iter().fold(0.0, |m, v| f64::max(m, v.abs()))
}

/// The nearest value that the element has, saturating.
fn nearest(elem: Elem, x: f64) -> f64 {
    match elem {
        Elem::E4m3 => f8e4m3fn::from_f64(x.clamp(-448.0, 448.0)).to_f64(),
        Elem::E2m1 => f4e2m1fn::from_f64(x.clamp(-6.0, 6.0)).to_f64(),
        Elem::E3m2 => f6e3m2fn::from_f64(x.clamp(-28.0, 28.0)).to_f64(),
        Elem::E2m3 => f6e2m3fn::from_f64(x.clamp(-7.5, 7.5)).to_f64(),
        Elem::Int8 => x.round_ties_even().clamp(-128.0, 127.0),
        other => panic!("no activations of {other:?}"),
    }
}

/// `floor(log2(x))`, exactly.
fn floor_log2(x: f64) -> i32 {
    libm::frexp(x).1 - 1
}

/// `ceil(log2(x))`, exactly.
fn ceil_log2(x: f64) -> i32 {
    let (fraction, exp) = libm::frexp(x);
    if fraction == 0.5 { exp - 1 } else { exp }
}

/// Activation quantisation by the rules that `quantize_row` documents.
pub fn quantize(key: QuantKey, stored: Option<f32>, row: &mut [f64]) {
    let stored = stored.map_or(1.0, f64::from);
    let group = match key.scale.group.cols {
        Extent::Len(n) => n as usize,
        _ => row.len(),
    };
    let largest = match key.elem {
        Elem::E4m3 => 448.0,
        Elem::E2m1 => 6.0,
        Elem::Int8 => 127.0,
        _ => f64::NAN,
    };
    let second = match key.scale2 {
        Some(s) if s.dynamic => max_abs(row) / (6.0 * 448.0),
        _ => stored,
    };
    for block in row.chunks_mut(group) {
        let amax = max_abs(block);
        if amax == 0.0 {
            continue;
        }
        let scale = match (key.scale.dynamic, key.scale.ty, key.elem) {
            (false, ..) => stored,
            (true, ScaleType::F32, _) => amax / largest,
            (true, ScaleType::E4m3, _) => nearest(Elem::E4m3, amax / 6.0 / second) * second,
            (true, ScaleType::E8m0, Elem::E4m3) => 2f64.powi(ceil_log2(amax / 448.0)),
            (true, ScaleType::E8m0, Elem::E2m1 | Elem::E2m3) => 2f64.powi(floor_log2(amax) - 2),
            (true, ScaleType::E8m0, Elem::E3m2) => 2f64.powi(floor_log2(amax) - 4),
            other => panic!("no activations with {other:?}"),
        };
        for x in block {
            *x = if scale == 0.0 { 0.0 } else { nearest(key.elem, *x / scale) * scale };
        }
    }
}

struct Expert<'a> {
    gate: Option<Vec<f64>>,
    up: Vec<f64>,
    down: Vec<f64>,
    weights: &'a ExpertWeights,
}

/// int8 per 32 values, in the order in which the matrix groups its columns and cut anew in each of its groups.
fn int8_blocks(m: &WeightMatrix, row: &mut [f64]) {
    let mut columns: Vec<usize> = (0..m.cols).collect();
    if let Scales::Group { g_idx: Some(g), .. } = &m.scales {
        columns.sort_by_key(|c| g[*c]);
    }
    for block in columns.chunks(m.group_cols().min(m.cols)).flat_map(|group| group.chunks(32)) {
        let scale = block.iter().fold(0.0, |m, c| f64::max(m, row[*c].abs())) / 127.0;
        for c in block {
            row[*c] = if scale == 0.0 { 0.0 } else { nearest(Elem::Int8, row[*c] / scale) * scale };
        }
    }
}

/// The layer's experts, each dequantised on first use.
pub struct Reference<'a> {
    layer: &'a Layer,
    key: Option<QuantKey>,
    int8_blocks: bool,
    experts: HashMap<usize, Expert<'a>>,
}

fn gemv(w: &[f64], bias: &Option<Vec<f32>>, x: &[f64]) -> Vec<f64> {
    let bias = |i: usize| bias.as_ref().map_or(0.0, |b| f64::from(b[i]));
    w.chunks(x.len()).enumerate().map(|(i, w)| bias(i) + w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>()).collect()
}

impl<'a> Reference<'a> {
    /// `key`: what the input of each GEMM is quantised to.
    pub fn new(layer: &'a Layer, key: Option<QuantKey>) -> Self {
        Self { layer, key, int8_blocks: false, experts: HashMap::new() }
    }

    /// The input of each GEMM is rounded to int8 per 32 values.
    pub fn int8_blocks(layer: &'a Layer) -> Self {
        Self { int8_blocks: true, ..Self::new(layer, None) }
    }

    /// One row through one local expert.
    pub fn expert(&mut self, local: usize, x: &[f64]) -> Vec<f64> {
        let weights = &self.layer.weights.experts[local];
        let e = self.experts.entry(local).or_insert_with(|| Expert {
            gate: weights.gate.as_ref().map(dequantize),
            up: dequantize(&weights.up),
            down: dequantize(&weights.down),
            weights,
        });
        let mut x = x.to_vec();
        if let Some(key) = self.key {
            quantize(key, e.weights.input_scale, &mut x);
        }
        // Each projection has blocks of its own.
        let read = |m: &WeightMatrix, x: &[f64]| {
            let mut x = x.to_vec();
            if self.int8_blocks {
                int8_blocks(m, &mut x);
            }
            x
        };
        let up = gemv(&e.up, &e.weights.up_bias, &read(&weights.up, &x));
        let gate = match (&e.gate, &weights.gate) {
            (Some(g), Some(m)) => gemv(g, &e.weights.gate_bias, &read(m, &x)),
            _ => vec![0.0; up.len()],
        };
        let mut h: Vec<f64> =
            gate.iter().zip(&up).map(|(g, u)| activate(self.layer.config.activation, *g, *u)).collect();
        if let Some(key) = self.key {
            quantize(key, e.weights.down_input_scale, &mut h);
        }
        gemv(&e.down, &e.weights.down_bias, &read(&weights.down, &h))
    }

    /// The standard format; `map` as in `make_kernel`.
    pub fn forward(&mut self, hidden: &[f32], ids: &[i32], weights: &[f32], map: Option<&[i32]>) -> Vec<f64> {
        let c = self.layer.config;
        let mut out = vec![0.0; hidden.len()];
        for (t, (x, out)) in hidden.chunks(c.hidden).zip(out.chunks_mut(c.hidden)).enumerate() {
            for slot in t * c.topk..(t + 1) * c.topk {
                let local = match (ids[slot], map) {
                    (-1, _) => -1,
                    (id, Some(map)) => map[id as usize],
                    (id, None) => id,
                };
                if local < 0 {
                    continue;
                }
                let w = f64::from(weights[slot]);
                let (before, after) = if c.weight_on_input { (w, 1.0) } else { (1.0, w) };
                let row: Vec<f64> = x.iter().map(|v| f64::from(*v) * before).collect();
                let y = self.expert(local as usize, &row);
                out.iter_mut().zip(y).for_each(|(o, y)| *o += after * y);
            }
        }
        out
    }
}
