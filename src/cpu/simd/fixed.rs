//! The fixed-point form of a row of activations, for the integer dot products of 4-bit weights.
//!
//! Columns are cut into blocks of [`BLOCK`], within each group of the weights; the last block of a group may be shorter
//! and is padded with zeros to whole steps. A block has a scale, a power of two for which x = scale * q with
//! |q| <= 2^20, so that q is off by at most half a unit: 2^-20 of the block's largest magnitude, or less. q is split into
//! three signed parts, q = 2^14 * p2 + 2^7 * p1 + p0, each from -64 to 64.
//!
//! A block lies in memory as its scale (float32), the sum of its q (int32) and, per 4 columns, 4 bytes of p2, of p1 and
//! of p0. With a scale that is not a number the block makes every product one: it held an infinity or a NaN.

use super::format::STEP_4BIT;

/// Columns of a block. 32 keep sums of products within 16 bits; see `nibble`.
pub(super) const BLOCK: usize = 32;
/// Bytes of a block before its parts.
pub(super) const HEAD: usize = 8;
/// Parts of a number.
pub(super) const PARTS: usize = 3;

/// Elements of float32 that the form of a row takes.
pub(super) fn len(cols: usize, group: usize) -> usize {
    let one = |cols: usize| cols.div_ceil(BLOCK) * HEAD + cols.next_multiple_of(STEP_4BIT) * PARTS;
    (cols / group * one(group) + one(cols % group)) / size_of::<f32>()
}

/// The form of the row whose column `i` is `x[i]`, or `x[order[i]]`, for weights with such groups, into `out`, which is
/// [`len`] long.
#[inline(always)]
pub(super) fn row(x: &[f32], order: Option<&[u32]>, group: usize, out: &mut [f32]) {
    let mut out = bytemuck::cast_slice_mut::<f32, u8>(out);
    for start in (0..x.len()).step_by(group) {
        let end = (start + group).min(x.len());
        for at in (start..end).step_by(BLOCK) {
            let n = BLOCK.min(end - at);
            let mut values = [0f32; BLOCK];
            match order {
                None => values[..n].copy_from_slice(&x[at..at + n]),
                Some(order) => values.iter_mut().zip(&order[at..at + n]).for_each(|(v, c)| *v = x[*c as usize]),
            }
            let (this, rest) = out.split_at_mut(HEAD + n.next_multiple_of(STEP_4BIT) * PARTS);
            block(&values, this);
            out = rest;
        }
    }
}

/// One block; columns beyond those that `out` has room for are zero.
#[inline(always)]
fn block(x: &[f32; BLOCK], out: &mut [u8]) {
    // 1.5 * 2^23: adding it rounds to nearest and leaves the integer in the low bits.
    const MAGIC: f32 = 12_582_912.0;
    let largest = x.iter().fold(0, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
    let finite = largest < 0x7f80_0000;
    // |x| < 2^(e - 126), e being the exponent's bits. The scale is 2^(e - 146), but no smaller than a normal number.
    let exponent = if finite { (largest >> 23).max(20) - 19 } else { 127 };
    let scale = if finite { f32::from_bits(exponent << 23) } else { f32::NAN };
    let inverse = f32::from_bits((254 - exponent) << 23);
    let mut parts = [[0i8; BLOCK]; PARTS];
    let mut sum = 0;
    for i in 0..BLOCK {
        let v = if finite { x[i] } else { 0.0 };
        let q = (v * inverse + MAGIC).to_bits() as i32 - MAGIC.to_bits() as i32;
        sum += q;
        let p0 = ((q + 64) & 127) - 64;
        let high = (q - p0) >> 7;
        let p1 = ((high + 64) & 127) - 64;
        parts[0][i] = ((high - p1) >> 7) as i8;
        parts[1][i] = p1 as i8;
        parts[2][i] = p0 as i8;
    }
    let (head, body) = out.split_at_mut(HEAD);
    head[..4].copy_from_slice(&scale.to_ne_bytes());
    head[4..].copy_from_slice(&i32::to_ne_bytes(sum));
    for (k, four) in body.chunks_exact_mut(4 * PARTS).enumerate() {
        for (part, four) in parts.iter().zip(four.chunks_exact_mut(4)) {
            four.copy_from_slice(bytemuck::cast_slice(&part[4 * k..4 * k + 4]));
        }
    }
}
