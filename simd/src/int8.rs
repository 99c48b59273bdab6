//! The int8 form of a row of activations, for dot products of bytes.
//!
//! Columns are cut into blocks of [`BLOCK`], within each group of the weights; the last block of a group may be shorter
//! and is padded with zeros to whole steps. A block has a scale s, its largest magnitude over 127 (or the row's: see
//! [`Rounding`]), and x becomes s * q with q the integer nearest to x / s, ties to even, so that |x - s * q| <= s / 2: at
//! most 1/254 of that largest magnitude, beside the rounding of the quotient and of s.
//!
//! A block lies in memory as s (float32), an int32 for the weights' offset, and the q of its columns. That int32 is the
//! sum of all q, times what brings the sums of products with the weights' bytes back to the weights; with zero points it
//! is the bare sum. An s that is not a number makes every product one: the block (or row) held an infinity or a NaN.

use crate::Rounding;
use crate::format::{self, Bytes, Code, Shape};
use crate::isa::Isa;

/// Columns of a block.
pub(crate) const BLOCK: usize = 32;
/// Columns of a step of bytes.
pub(crate) const BYTES_STEP: usize = 4;
/// Bytes of a block before its numbers.
pub(crate) const HEAD: usize = 8;

/// Elements of float32 that the form of a row takes.
pub(crate) fn len(shape: &Shape) -> usize {
    let one = |cols: usize| cols.div_ceil(BLOCK) * HEAD + cols.next_multiple_of(shape.code.step());
    let (cols, group) = (shape.cols, shape.group);
    (cols / group * one(group) + one(cols % group)) / size_of::<f32>()
}

/// What a block's sum is multiplied with.
fn start<I: Isa>(code: Code) -> i32 {
    fn of<I: Isa, F: Bytes>() -> i32 {
        if F::ZERO { 1 } else { bias::<I, F>() - F::OFFSET }
    }
    match code {
        Code::E2m1 => of::<I, format::E2m1>(),
        Code::U4 => of::<I, format::U4>(),
        Code::U4Zero => of::<I, format::U4Zero>(),
        Code::U8ZeroRows => of::<I, format::U8ZeroRows>(),
        _ => of::<I, format::Int8Rows>(),
    }
}

/// What the instruction set takes off the format's bytes.
pub(crate) const fn bias<I: Isa, F: Bytes>() -> i32 {
    if F::BIASED { I::BIAS } else { 0 }
}

/// The form of the row whose column `i` is `x[i]`, or `x[order[i]]`, into `out`, which is [`len`] long.
#[inline(always)]
pub(crate) fn row<I: Isa>(x: &[f32], order: Option<&[u32]>, shape: &Shape, out: &mut [f32]) {
    let (step, start) = (shape.code.step(), start::<I>(shape.code));
    let common = (shape.rounding == Rounding::Int8Row).then(|| scale(x));
    let mut out = bytemuck::cast_slice_mut::<f32, u8>(out);
    for first in (0..x.len()).step_by(shape.group) {
        let end = (first + shape.group).min(x.len());
        for at in (first..end).step_by(BLOCK) {
            let columns = at..end.min(at + BLOCK);
            let (this, rest) = out.split_at_mut(HEAD + columns.len().next_multiple_of(step));
            let mut values = [0f32; BLOCK];
            match order {
                None => values.iter_mut().zip(&x[columns]).for_each(|(v, x)| *v = *x),
                Some(order) => values.iter_mut().zip(&order[columns]).for_each(|(v, c)| *v = x[*c as usize]),
            }
            block(&values, common.unwrap_or_else(|| scale(&values)), start, this);
            out = rest;
        }
    }
}

/// The largest magnitude over 127, a NaN where one is not finite, 0 where that is too small for a normal number.
#[inline(always)]
fn scale(x: &[f32]) -> f32 {
    let largest = x.iter().fold(0, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
    match f32::from_bits(largest) / 127.0 {
        _ if largest >= f32::INFINITY.to_bits() => f32::NAN,
        scale if scale.is_normal() => scale,
        _ => 0.0,
    }
}

/// A block with its scale, as long as `out`.
#[inline(always)]
fn block(values: &[f32; BLOCK], scale: f32, start: i32, out: &mut [u8]) {
    // 1.5 * 2^23: adding it rounds to nearest and leaves the integer in the low bits.
    const MAGIC: f32 = 12_582_912.0;
    let (head, body) = out.split_at_mut(HEAD);
    head[..4].copy_from_slice(&scale.to_ne_bytes());
    if scale.is_nan() || scale == 0.0 {
        head[4..].fill(0);
        body.fill(0);
        return;
    }
    let mut q = [0i32; BLOCK];
    for (q, v) in q.iter_mut().zip(values) {
        *q = (v / scale + MAGIC).to_bits() as i32 - MAGIC.to_bits() as i32;
    }
    head[4..].copy_from_slice(&(start * q.iter().sum::<i32>()).to_ne_bytes());
    let bytes = q.map(|q| q as u8);
    body.copy_from_slice(&bytes[..body.len()]);
}
