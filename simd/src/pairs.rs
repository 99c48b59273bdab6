//! The form of a row of activations for dot products of bfloat16: exact, for rows whose values all are bfloat16 numbers,
//! as hidden states mostly are. What else a row may hold goes to the kernels of the other instruction sets, in their form.
//!
//! In memory: the head, then per group of the weights, padded with zeros to whole steps, dwords of two columns each, in
//! the order in which a step's codes become pairs. Values are divided by a power of two, the head, which leaves the
//! largest below 1: the instruction takes subnormal numbers as zeros and gives none, so that values (and their products
//! with weights of usual size) below 2^-126 of the largest are lost, and with them nothing that a float32 sum would show.
//!
//! A head of 0 says that the row is no such one: its form as `Shape::plain_form` says follows.

use crate::format::Shape;
#[cfg(target_arch = "x86_64")]
use crate::pair_format::Pairs;

/// Elements of float32 before what follows.
pub(crate) const HEAD: usize = 1;

/// Elements of float32 that the pairs of a row take.
pub fn len(shape: &Shape) -> usize {
    let (cols, group, step) = (shape.cols, shape.group, shape.code.step());
    (cols / group * group.next_multiple_of(step) + (cols % group).next_multiple_of(step)).div_ceil(2)
}

/// The pairs of the row whose column `i` is `x[i]`, or `x[order[i]]`, into `out`, which has [`HEAD`] and [`len`] elements
/// at least. If some value is no bfloat16 it writes nothing but a head of 0, and returns false.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn row<F: Pairs>(x: &[f32], order: Option<&[u32]>, group: usize, out: &mut [f32]) -> bool {
    let (head, out) = out.split_at_mut(HEAD);
    let (mut largest, mut all) = (0, 0);
    for bits in x.iter().map(|v| v.to_bits()) {
        largest = largest.max(bits & 0x7fff_ffff);
        all |= bits;
    }
    if all & 0xffff != 0 {
        head[0] = 0.0;
        return false;
    }
    // |x| < 2^exponent, but for the largest numbers there are. (Where there is an infinity or a NaN, it comes through
    // whatever the power.) Both powers are normal numbers.
    let exponent = ((largest >> 23) as i32 - 126).clamp(-126, 126);
    let power = |e: i32| f32::from_bits(((e + 127) as u32) << 23);
    head[0] = power(exponent);
    let factor = power(-exponent);
    let mut out = bytemuck::cast_slice_mut::<f32, u32>(out).chunks_exact_mut(F::STEP / 2);
    for start in (0..x.len()).step_by(group) {
        let end = (start + group).min(x.len());
        for (at, out) in (start..end).step_by(F::STEP).zip(&mut out) {
            let columns = at..end.min(at + F::STEP);
            let mut values = [0f32; 8];
            match order {
                // Without this a step's few columns are copied by a call.
                None if columns.len() == F::STEP => values[..F::STEP].copy_from_slice(&x[columns]),
                None => values.iter_mut().zip(&x[columns]).for_each(|(v, x)| *v = *x),
                Some(order) => values.iter_mut().zip(&order[columns]).for_each(|(v, c)| *v = x[*c as usize]),
            }
            let bits = values.map(|v| (v * factor).to_bits());
            for (out, [low, high]) in out.iter_mut().zip(F::ORDER) {
                *out = bits[low] >> 16 | (bits[high] & 0xffff_0000);
            }
        }
    }
    true
}
