//! A slab: its codes and scales, in the places where the kernels' lanes read them.

use super::format::{Codes, Compute, Format, StageScales};
use super::{BLOCK, SLAB};
use crate::scheme::{Elem, number};
use crate::weights::{Scales, WeightElem, WeightMatrix};

/// The rows of a slab; padding has no source.
pub(super) type Rows<'a> = [Option<(&'a WeightMatrix, usize)>; SLAB];

/// Writes a slab of so many blocks.
pub(super) fn slab(format: Format, rows: &Rows<'_>, blocks: usize, out: &mut [u8]) {
    let stage_bytes = 2 * format.block_bytes() + format.scale_bytes();
    let tops = rows.map(|row| row.map_or(0, |(m, row)| top(m, row)));
    for (stage, out) in out.chunks_mut(stage_bytes).enumerate() {
        let here = (blocks - 2 * stage).min(2);
        let (codes, scales) = out.split_at_mut(here * format.block_bytes());
        for (b, out) in codes.chunks_exact_mut(format.block_bytes()).enumerate() {
            block(format, rows, (2 * stage + b) * BLOCK, out);
        }
        stage_scales(format, rows, &tops, stage, scales);
    }
}

/// The first of the four columns that lane 4 g + t has of a step.
pub(super) fn first_column(scales: StageScales, step: usize, t: usize) -> usize {
    match scales {
        StageScales::E4m3 => 16 * step + 4 * t,
        _ => 32 * (step / 2) + 8 * t + 4 * (step % 2),
    }
}

/// The codes of 64 columns from `start` on.
fn block(format: Format, rows: &Rows<'_>, start: usize, out: &mut [u8]) {
    for lane in 0..32 {
        let (g, t) = (lane / 4, lane % 4);
        for step in 0..4 {
            let column = start + first_column(format.scales, step, t);
            // Register i of the step: row g or g + 8, columns 0 1 or 2 3.
            let code = |i: usize, half: usize| raw(format, rows[g + 8 * (i % 2)], column + 2 * (i / 2) + half);
            let at = |word: usize, byte: usize| word * 512 + lane * 16 + byte;
            match format.codes {
                Codes::Half => {
                    for i in 0..4 {
                        let pair = u32::from(code(i, 0)) | u32::from(code(i, 1)) << 16;
                        out[at(step, 4 * i)..][..4].copy_from_slice(&pair.to_le_bytes());
                    }
                }
                Codes::E4m3 | Codes::Int8 => {
                    for i in 0..4 {
                        for half in 0..2 {
                            out[at(step / 2, 8 * (step % 2) + 4 * (i / 2) + 2 * half + i % 2)] = code(i, half) as u8;
                        }
                    }
                }
                Codes::U4 | Codes::E2m1 => {
                    let mut word = 0;
                    for i in 0..4 {
                        for half in 0..2 {
                            word |= nibble(format, i, code(i, half)).rotate_left(16 * half as u32);
                        }
                    }
                    out[at(0, 4 * step)..][..4].copy_from_slice(&word.to_le_bytes());
                }
            }
        }
    }
}

/// A 4-bit code where register `i` looks for it: its 16 bits, and some of the other half's above them.
fn nibble(format: Format, i: usize, code: u16) -> u32 {
    let code = u32::from(code);
    if format.codes == Codes::U4 {
        return code << (4 * i);
    }
    let (sign, rest) = (code >> 3, code & 7);
    match (format.compute, i) {
        (Compute::Bf16, 0) => sign << 15 | rest << 6,
        (Compute::Bf16, 1) => sign << 21 | rest << 12,
        (Compute::Bf16, 2) => sign << 9 | rest,
        (Compute::Bf16, _) => sign << 19 | (rest >> 2) << 4 | (rest & 3) << 10,
        (Compute::F16, 0) => sign << 15 | rest << 9,
        (Compute::F16, i) => sign << (11 + i) | rest << (9 - 3 * i),
    }
}

/// The code of an element as the format stores it; padding has the code of zero.
fn raw(format: Format, row: Option<(&WeightMatrix, usize)>, column: usize) -> u16 {
    let zero = if format.codes == Codes::U4 { 8 } else { 0 };
    let Some((m, row)) = row.filter(|(m, _)| column < m.cols) else { return zero };
    // A group whose scale is zero: kernels that sum in units of the scale need codes of zero.
    if format.codes != Codes::Half && scaled_by_zero(m, row, column) {
        return match &m.scales {
            Scales::Group { size, zero_points: Some(z), .. } => {
                let z = u16::from(z[row * (m.cols / size) + column / size]);
                if m.elem == WeightElem::Quant(Elem::U8) { (z ^ 0x80) & 0xff } else { z }
            }
            _ => zero,
        };
    }
    let at = row * m.cols + column;
    let code16 = || u16::from_le_bytes([m.codes[2 * at], m.codes[2 * at + 1]]);
    match (format.codes, m.elem, format.compute) {
        (Codes::Half, WeightElem::Bf16, Compute::Bf16) | (Codes::Half, WeightElem::F16, Compute::F16) => code16(),
        (Codes::Half, _, Compute::Bf16) => half::bf16::from_f32(m.value(row, column)).to_bits(),
        (Codes::Half, _, Compute::F16) => half::f16::from_f32(m.value(row, column)).to_bits(),
        (Codes::U4 | Codes::E2m1, ..) => u16::from(number::nibble(&m.codes, at)),
        (Codes::Int8, WeightElem::Quant(Elem::U8), _) => u16::from(m.codes[at] ^ 0x80),
        _ => u16::from(m.codes[at]),
    }
}

fn scaled_by_zero(m: &WeightMatrix, row: usize, column: usize) -> bool {
    match &m.scales {
        Scales::Block { block, values } => values[row / block * m.cols.div_ceil(*block) + column / block] == 0.0,
        Scales::Group { size, values, .. } => values[row * (m.cols / size) + column / size] == 0.0,
        _ => false,
    }
}

/// The largest e8m0 code of a row. Codes are stored so that it is 128, which stands for 2, and none is 0; the row's factor
/// has the rest.
pub(super) fn top(m: &WeightMatrix, row: usize) -> u8 {
    let Scales::E8m0(codes) = &m.scales else { return 0 };
    let groups = m.cols / 32;
    codes[row * groups..][..groups].iter().copied().max().unwrap_or(127)
}

/// The scales of a stage: for each lane group g a word with those of rows g and g + 8.
fn stage_scales(format: Format, rows: &Rows<'_>, tops: &[u8; SLAB], stage: usize, out: &mut [u8]) {
    let (groups, registers) = (format.scales.groups(), format.scales.registers());
    if groups == 0 {
        return;
    }
    let width = 2 * BLOCK / groups;
    for (g, word) in out.chunks_exact_mut(4 * registers).enumerate() {
        for half in 0..2 {
            let Some((m, row)) = rows[g + 8 * half] else { continue };
            let top = tops[g + 8 * half];
            for i in 0..groups {
                let column = 2 * BLOCK * stage + i * width;
                if column < m.cols {
                    put(format.scales, m, (row, top), column, (i, half), word);
                }
            }
        }
    }
}

/// One scale (and zero point) into the word: of the row's group at `column`, which is the stage's group `i`.
/// `top` is the row's largest e8m0 code; `half` says which of the word's two rows it is.
fn put(
    scales: StageScales,
    m: &WeightMatrix,
    (row, top): (usize, u8),
    column: usize,
    (i, half): (usize, usize),
    word: &mut [u8],
) {
    match (&m.scales, scales) {
        (Scales::Block { block, values }, _) => {
            let s = values[row / block * m.cols.div_ceil(*block) + column / block];
            word[8 * i + 4 * half..][..4].copy_from_slice(&s.to_le_bytes());
        }
        (Scales::E8m0(codes), _) => {
            // What lies more than 2^127 below the row's largest counts as that.
            let code = i32::from(codes[row * (m.cols / 32) + column / 32]) - i32::from(top) + 128;
            word[4 * half + i] = code.max(1) as u8;
        }
        (Scales::Nvfp4 { codes, .. }, _) => word[8 * half + i] = codes[row * (m.cols / 16) + column / 16],
        (Scales::Group { size, ty, values, zero_points, .. }, StageScales::Half(_, zero)) => {
            let at = row * (m.cols / size) + column / size;
            let stride = if zero { 8 } else { 4 };
            let bits = match ty {
                crate::weights::HalfType::Bf16 => half::bf16::from_f32(values[at]).to_bits(),
                crate::weights::HalfType::F16 => half::f16::from_f32(values[at]).to_bits(),
            };
            word[stride * i + 2 * half..][..2].copy_from_slice(&bits.to_le_bytes());
            if let Some(z) = zero_points {
                // Of 8-bit codes the kernel sees 128 less, and so of their zero points.
                let less = if m.elem == WeightElem::Quant(Elem::U8) { 128.0 } else { 0.0 };
                let z = half::f16::from_f32(f32::from(z[at]) - less).to_bits();
                word[stride * i + 4 + 2 * half..][..2].copy_from_slice(&z.to_le_bytes());
            }
        }
        _ => {}
    }
}
