//! Canonical matrices as the kernels see them.

use super::arena::Arena;
use crate::scheme::Elem;
use crate::weights::{ExpertWeights, MoeWeights, Scales, WeightElem, WeightError, WeightMatrix};
use bytemuck::{Pod, Zeroable};

/// The scale of 16-bit weights, which have none.
static ONE: [f32; 1] = [1.0];

/// As in kernels/emulation.cu: addresses are 0 for what is absent.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Matrix {
    codes: u64,
    scales: u64,
    zeros: u64,
    groups: u64,
    global: f32,
    middle: f32,
    elem: i32,
    scale: i32,
    scale_rows: i32,
    scale_cols: i32,
}

/// As in kernels/emulation.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Expert {
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    gate_bias: u64,
    up_bias: u64,
    down_bias: u64,
    input_scale: f32,
    down_input_scale: f32,
}

impl Expert {
    /// Every expert of valid weights, whose data goes into the arena.
    pub fn all<'a>(weights: &'a MoeWeights, arena: &mut Arena<'a>) -> Result<Vec<Self>, WeightError> {
        let one = |(i, e)| Expert::new(i, e, arena);
        weights.experts.iter().enumerate().map(one).collect()
    }

    fn new<'a>(index: usize, e: &'a ExpertWeights, arena: &mut Arena<'a>) -> Result<Self, WeightError> {
        let named = |m: Result<Matrix, String>, name| {
            m.map_err(|problem| WeightError { tensor: format!("experts.{index}.{name}"), problem })
        };
        let gate = e.gate.as_ref().map_or(Ok(Matrix::zeroed()), |m| Matrix::new(m, arena));
        Ok(Self {
            gate: named(gate, "w1")?,
            up: named(Matrix::new(&e.up, arena), "w3")?,
            down: named(Matrix::new(&e.down, arena), "w2")?,
            gate_bias: arena.put(e.gate_bias.as_deref()),
            up_bias: arena.put(e.up_bias.as_deref()),
            down_bias: arena.put(e.down_bias.as_deref()),
            // Keys without stored scales do not look at them.
            input_scale: e.input_scale.unwrap_or(1.0),
            down_input_scale: e.down_input_scale.unwrap_or(1.0),
        })
    }
}

impl Matrix {
    fn new<'a>(m: &'a WeightMatrix, arena: &mut Arena<'a>) -> Result<Self, String> {
        // The orders of `enum Elem` and `enum ScaleType` in kernels/emulation.cu.
        let (elem, middle) = match m.elem {
            WeightElem::Bf16 => (0, 0.0),
            WeightElem::F16 => (1, 0.0),
            WeightElem::Quant(Elem::E4m3) => (2, 0.0),
            WeightElem::Quant(Elem::E2m1) => (3, 0.0),
            WeightElem::Quant(Elem::Int8) => (4, 0.0),
            WeightElem::Quant(Elem::U4) => (5, 8.0),
            WeightElem::Quant(Elem::U8) => (6, 128.0),
            WeightElem::Quant(e) => return Err(format!("holds {e:?} weights, which no kernel reads")),
        };
        if middle > 0.0 && matches!(m.scales, Scales::E8m0(_) | Scales::Nvfp4 { .. }) {
            return Err(format!("holds {:?} weights with scales of an MX format", m.elem));
        }
        let codes = arena.put(Some(&m.codes[..]));
        let (scale, scales) = match &m.scales {
            Scales::None => (0, arena.put(Some(&ONE[..]))),
            Scales::PerTensor(s) => (0, arena.put(Some(std::slice::from_ref(s)))),
            Scales::PerRow(v) | Scales::Block { values: v, .. } | Scales::Group { values: v, .. } => {
                (0, arena.put(Some(&v[..])))
            }
            Scales::E8m0(codes) => (1, arena.put(Some(&codes[..]))),
            Scales::Nvfp4 { codes, .. } => (2, arena.put(Some(&codes[..]))),
        };
        let (zeros, groups) = match &m.scales {
            Scales::Group { zero_points, g_idx, .. } => (zero_points.as_deref(), g_idx.as_deref()),
            _ => (None, None),
        };
        let (scale_rows, scale_cols) = match &m.scales {
            Scales::None | Scales::PerTensor(_) => (m.rows, m.cols),
            // A block larger than the matrix is one block.
            Scales::Block { block, .. } => ((*block).min(m.rows), (*block).min(m.cols)),
            _ => (1, m.group_cols()),
        };
        Ok(Self {
            codes,
            scales,
            zeros: arena.put(zeros),
            groups: arena.put(groups),
            global: if let Scales::Nvfp4 { global, .. } = &m.scales { *global } else { 1.0 },
            middle,
            elem,
            scale,
            // The layer's sizes, and so these, are at most 2^24.
            scale_rows: scale_rows as i32,
            scale_cols: scale_cols as i32,
        })
    }
}
