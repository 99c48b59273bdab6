//! The fixed-point form of a row of activations, for the integer dot products of 4-bit weights and, where there is VNNI,
//! of int8 ones.
//!
//! Columns are cut into blocks of [`BLOCK`], within each group of the weights; the last block of a group may be shorter
//! and is padded with zeros to whole steps. A block has a scale, a power of two for which x = scale * q with
//! |q| <= 2^20, so that q is off by at most half a unit: 2^-20 of the block's largest magnitude, or less. q is split into
//! three signed parts, q = 2^14 * p2 + 2^7 * p1 + p0, each from -64 to 64.
//!
//! A block lies in memory as its scale (float32), the sum of its q (int32) and, per 4 columns, 4 bytes of p2, of p1 and
//! of p0. The sum is times what takes off the weights' offset: -12 for e2m1, -8 for 4-bit integers without zero points; with
//! these it is the bare sum. For int8 weights (`WIDE` below) it is that of each of p2, p1 and p0, times -128. With a scale
//! that is not a number the block makes every product one: it held an infinity or a NaN.

use crate::format::{self, Bytes, Code, Int8Rows, Nibbles, STEP_4BIT, Shape};
use crate::int8::BYTES_STEP;
use std::ops::Range;

/// Columns of a block. 32 keep sums of products within 16 bits; see `nibble`.
pub const BLOCK: usize = 32;
/// Bytes of a block before its parts.
pub(crate) const HEAD: usize = 8;
/// The same for int8 weights.
pub(crate) const WIDE_HEAD: usize = 16;
/// Parts of a number.
pub(crate) const PARTS: usize = 3;

/// Elements of float32 that the form of a row takes.
pub(crate) fn len<const WIDE: bool>(cols: usize, group: usize) -> usize {
    let (head, step) = sizes::<WIDE>();
    let one = |cols: usize| cols.div_ceil(BLOCK) * head + cols.next_multiple_of(step) * PARTS;
    (cols / group * one(group) + one(cols % group)) / size_of::<f32>()
}

/// Bytes of a block's head and columns of a step.
const fn sizes<const WIDE: bool>() -> (usize, usize) {
    if WIDE { (WIDE_HEAD, BYTES_STEP) } else { (HEAD, STEP_4BIT) }
}

/// What a block's sum is multiplied with.
fn start(code: Code) -> i32 {
    match code {
        Code::E2m1 => -<format::E2m1 as Nibbles>::OFFSET,
        Code::U4 => -<format::U4 as Nibbles>::OFFSET,
        Code::Int8Rows => -<Int8Rows as Bytes>::OFFSET,
        // Zero points differ from row to row.
        _ => 1,
    }
}

/// The form of the row whose column `i` is `x[i]`, or `x[order[i]]`, into `out`, which is [`len`] long.
#[inline(always)]
pub(crate) fn row<const WIDE: bool>(x: &[f32], order: Option<&[u32]>, shape: &Shape, out: &mut [f32]) {
    let ((head, step), start_of, group) = (sizes::<WIDE>(), start(shape.code), shape.group);
    let mut out = bytemuck::cast_slice_mut::<f32, u8>(out);
    for start in (0..x.len()).step_by(group) {
        let end = (start + group).min(x.len());
        for at in (start..end).step_by(BLOCK) {
            let n = BLOCK.min(end - at);
            let (this, rest) = out.split_at_mut(head + n.next_multiple_of(step) * PARTS);
            block::<WIDE>(x, order, at..at + n, start_of, this);
            out = rest;
        }
    }
}

/// The block of these columns, padded with zeros as `out` is long. Loops run over whole steps, their number unknown to
/// the compiler, which vectorises them for that.
#[inline(always)]
fn block<const WIDE: bool>(x: &[f32], order: Option<&[u32]>, columns: Range<usize>, start: i32, out: &mut [u8]) {
    // 1.5 * 2^23: adding it rounds to nearest and leaves the integer in the low bits.
    const MAGIC: f32 = 12_582_912.0;
    let (head, body) = out.split_at_mut(sizes::<WIDE>().0);
    let n = body.len() / PARTS;
    let (mut values, mut parts) = ([0f32; BLOCK], [[0i8; BLOCK]; PARTS]);
    match order {
        None => values.iter_mut().zip(&x[columns]).for_each(|(v, x)| *v = *x),
        Some(order) => values.iter_mut().zip(&order[columns]).for_each(|(v, c)| *v = x[*c as usize]),
    }
    let values = &values[..n];
    let largest = values.iter().fold(0, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
    if largest >= f32::INFINITY.to_bits() {
        head[..4].copy_from_slice(&f32::NAN.to_ne_bytes());
        head[4..].fill(0);
        body.fill(0);
        return;
    }
    // |x| < 2^(e - 126), e being the exponent's bits. The scale is 2^(e - 146), but no smaller than a normal number.
    let exponent = (largest >> 23).max(20) - 19;
    let inverse = f32::from_bits((254 - exponent) << 23);
    let [p2, p1, p0] = &mut parts;
    let mut sum = 0;
    for (((v, p2), p1), p0) in values.iter().zip(p2).zip(p1).zip(p0) {
        let q = (v * inverse + MAGIC).to_bits() as i32 - MAGIC.to_bits() as i32;
        sum += q;
        // The lowest part is what is left of q by rounding to a multiple of 2^7, and so on.
        let high = (q + 64) >> 7;
        let top = (high + 64) >> 7;
        (*p2, *p1, *p0) = (top as i8, (high - (top << 7)) as i8, (q - (high << 7)) as i8);
    }
    head[..4].copy_from_slice(&f32::from_bits(exponent << 23).to_ne_bytes());
    if WIDE {
        for (part, head) in parts.iter().zip(head[4..].chunks_exact_mut(4)) {
            let sum: i32 = part.iter().map(|p| i32::from(*p)).sum();
            head.copy_from_slice(&(start * sum).to_ne_bytes());
        }
    } else {
        head[4..].copy_from_slice(&i32::to_ne_bytes(start * sum));
    }
    for (k, four) in body.chunks_exact_mut(4 * PARTS).enumerate() {
        for (part, four) in parts.iter().zip(four.chunks_exact_mut(4)) {
            four.copy_from_slice(bytemuck::cast_slice(&part[4 * k..4 * k + 4]));
        }
    }
}
