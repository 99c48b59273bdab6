//! From canonical weights to panels.

use super::{PackError, Rounding, codes};
use crate::scheme::Elem;
use crate::weights::{HalfType, Scales, WeightElem, WeightMatrix};
use moe_oracle_simd::format::{Code, GroupScale, PANEL, STEP_BYTES, Shape};

/// The largest zero point of 4-bit weights for which sums stay within 32 bits (see `nibble`). Checkpoints have 16 at
/// most.
const MAX_ZERO_4BIT: u8 = 31;

/// How a matrix will be packed.
pub(super) fn shape(m: &WeightMatrix, bias: bool, rounding: Rounding) -> Result<Shape, PackError> {
    let unsupported = |what: String| Err(PackError::Unsupported(what));
    let zero_points = matches!(&m.scales, Scales::Group { zero_points: Some(_), .. });
    let code = match m.elem {
        WeightElem::Bf16 => Code::Bf16,
        WeightElem::F16 => Code::F16,
        WeightElem::Quant(Elem::E4m3) => Code::E4m3,
        WeightElem::Quant(Elem::Int8) => Code::Int8,
        WeightElem::Quant(Elem::E2m1) => Code::E2m1,
        WeightElem::Quant(Elem::U8) if zero_points => Code::U8Zero,
        WeightElem::Quant(Elem::U8) => Code::Int8,
        WeightElem::Quant(Elem::U4) if zero_points => Code::U4Zero,
        WeightElem::Quant(Elem::U4) => Code::U4,
        WeightElem::Quant(e) => return unsupported(format!("{e:?} weights")),
    };
    let code = match code {
        _ if rounding == Rounding::None => code,
        Code::Int8 => Code::Int8Rows,
        Code::U8Zero => Code::U8ZeroRows,
        Code::E2m1 | Code::U4 | Code::U4Zero => code,
        _ => return unsupported(format!("{:?} weights with int8 activations", m.elem)),
    };
    if zero_points != code.zero_points() {
        return unsupported(format!("zero points for {:?} weights", m.elem));
    }
    if code == Code::U4Zero
        && let Scales::Group { zero_points: Some(z), .. } = &m.scales
        && let Some(z) = z.iter().find(|z| **z > MAX_ZERO_4BIT)
    {
        return unsupported(format!("4-bit weights with a zero point of {z}: the largest is {MAX_ZERO_4BIT}"));
    }
    let offset = matches!(m.elem, WeightElem::Quant(Elem::U4 | Elem::U8));
    let scale = match &m.scales {
        Scales::None | Scales::PerTensor(_) | Scales::PerRow(_) => GroupScale::None,
        Scales::Block { block, .. } if block % PANEL == 0 => GroupScale::Shared,
        Scales::Block { .. } => GroupScale::F32,
        Scales::E8m0(_) | Scales::Nvfp4 { .. } if offset => {
            return unsupported(format!("{:?} weights with scales of an MX format", m.elem));
        }
        Scales::E8m0(_) => GroupScale::E8m0,
        Scales::Nvfp4 { .. } => GroupScale::E4m3,
        Scales::Group { size, .. } if *size == m.cols => GroupScale::None,
        Scales::Group { ty: HalfType::F16, .. } => GroupScale::F16,
        Scales::Group { ty: HalfType::Bf16, .. } => GroupScale::Bf16,
    };
    // Where nothing changes along K, nothing but sums knows of groups, which then are no larger than a slab.
    let same = scale == GroupScale::None && !code.zero_points();
    let group = if same { code.slab() } else { m.group_cols() }.min(m.cols);
    Ok(Shape { rows: m.rows, cols: m.cols, group, code, scale, bias, rounding, pairs: false })
}

/// The columns in the order in which they are packed, where that is not their own.
pub(super) fn permutation(m: &WeightMatrix) -> Option<Vec<u32>> {
    let Scales::Group { g_idx: Some(g), .. } = &m.scales else { return None };
    if g.is_sorted() {
        return None;
    }
    let mut order: Vec<u32> = (0..m.cols as u32).collect();
    order.sort_by_key(|&c| g[c as usize]);
    Some(order)
}

/// What multiplies a row's sum at last.
fn factor(m: &WeightMatrix, shape: &Shape, row: usize) -> f32 {
    let base = match &m.scales {
        Scales::PerTensor(s) => *s,
        Scales::PerRow(s) => s[row],
        Scales::Nvfp4 { global, .. } => *global,
        Scales::Group { values, .. } if shape.scale == GroupScale::None => values[row],
        _ => 1.0,
    };
    let scales = if shape.scale == GroupScale::E4m3 { 256.0 } else { 1.0 };
    let codes = if shape.code == Code::E2m1 { 0.5 } else { 1.0 };
    base * scales * codes
}

/// Writes the scale of `row` (`lane` of the panel) in group `g` to the group's scales.
fn put_scale(m: &WeightMatrix, shape: &Shape, row: usize, g: usize, lane: usize, out: &mut [u8]) {
    let groups = m.cols.div_ceil(shape.group);
    match (&m.scales, shape.scale) {
        (Scales::Block { block, values }, GroupScale::Shared) => {
            // Every lane writes the same: a panel does not cross blocks.
            out[..4].copy_from_slice(&values[row / block * groups + g].to_le_bytes());
        }
        (Scales::Block { block, values }, _) => {
            out[4 * lane..][..4].copy_from_slice(&values[row / block * groups + g].to_le_bytes());
        }
        (Scales::E8m0(codes) | Scales::Nvfp4 { codes, .. }, _) => out[lane] = codes[row * groups + g],
        (Scales::Group { values, .. }, GroupScale::F16) => {
            let s = half::f16::from_f32(values[row * groups + g]);
            out[2 * lane..][..2].copy_from_slice(&s.to_le_bytes());
        }
        (Scales::Group { values, .. }, GroupScale::Bf16) => {
            let s = half::bf16::from_f32(values[row * groups + g]);
            out[2 * lane..][..2].copy_from_slice(&s.to_le_bytes());
        }
        _ => {}
    }
}

/// One projection of an expert.
pub(super) struct Source<'a> {
    pub(super) matrix: &'a WeightMatrix,
    pub(super) bias: Option<&'a [f32]>,
    /// Columns in the order in which they are packed, where that is not their own.
    pub(super) order: Option<&'a [u32]>,
}

/// Packs one panel or two of the shape, each the `index`th of a source, one after the other into `out` or, if there are two,
/// their parts alternating. `room` has as many bytes as `out`.
pub(super) fn panels(of: &[(&Source<'_>, usize)], shape: &Shape, room: &mut [u8], out: &mut [u8]) {
    room.fill(0);
    let bytes = room.len() / of.len();
    for ((source, index), to) in of.iter().zip(room.chunks_exact_mut(bytes)) {
        panel(source.matrix, shape, source.bias, source.order, *index, to);
    }
    let mut rest = out;
    for part in shape.slabs() {
        for panel in room.chunks_exact(bytes) {
            let (to, tail) = std::mem::take(&mut rest).split_at_mut(part.len());
            to.copy_from_slice(&panel[part.clone()]);
            rest = tail;
        }
    }
}

/// Packs panel `index` into `out`, which is `shape.panel_bytes()` long and zero.
pub(super) fn panel(
    m: &WeightMatrix,
    shape: &Shape,
    bias: Option<&[f32]>,
    order: Option<&[u32]>,
    index: usize,
    out: &mut [u8],
) {
    let first = index * PANEL;
    let rows = PANEL.min(m.rows - first);
    for lane in 0..rows {
        out[4 * lane..][..4].copy_from_slice(&factor(m, shape, first + lane).to_le_bytes());
        if let Some(b) = bias {
            out[4 * (PANEL + lane)..][..4].copy_from_slice(&b[first + lane].to_le_bytes());
        }
    }
    let mut at = shape.head();
    for g in 0..m.cols.div_ceil(shape.group) {
        let start = g * shape.group;
        let end = (start + shape.group).min(m.cols);
        let scales = &mut out[at..at + shape.scale.bytes()];
        for lane in 0..rows {
            put_scale(m, shape, first + lane, g, lane, scales);
        }
        at += shape.scale.bytes();
        if let Scales::Group { zero_points: Some(z), size, .. } = &m.scales {
            for lane in 0..rows {
                out[at + lane] = z[(first + lane) * (m.cols / size) + g];
            }
            at += PANEL;
        }
        let bytes = (end - start).div_ceil(shape.code.step()) * STEP_BYTES;
        codes::pack(m, shape.code, first, rows, start..end, order, &mut out[at..at + bytes]);
        at += bytes;
    }
}
