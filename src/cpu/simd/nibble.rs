//! The micro-kernel of 4-bit weights: integer dot products with the fixed-point form of activations.
//!
//! A code becomes an unsigned byte c, its weight being c - z for a zero point z that is the same for all columns of a
//! block. A row's share of a block is then scale * (sum of c * q - z * sum of q), where the bracket is computed exactly:
//!
//! * c is at most 24 and a part of q at most 64, so that a pair of products is at most 3072 and eight pairs (32 columns)
//!   24576, which 16 bits hold;
//! * z is at most 31 and |q| at most 2^20, so that sums over 32 columns are at most 24 * 32 * 2^20 < 2^30 and
//!   31 * 32 * 2^20 < 2^30, which 32 bits hold, as they hold the difference.
//!
//! The integers are exact, and the few float operations per block are the same everywhere and never fused: results do
//! not depend on the instruction set, nor on which tokens are computed together.

use super::fixed::{BLOCK, HEAD, PARTS};
use super::format::{Nibbles, PANEL, STEP_4BIT, STEP_BYTES};
use super::isa::Isa;
use super::kernel::{Job, PREFETCH};

/// A panel times the fixed-point forms `job.x`.
///
/// # Safety
///
/// As for [`super::kernel::PanelFn`].
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)]
pub(super) unsafe fn panel<I: Isa, F: Nibbles>(job: &mut Job<'_>) {
    let tokens = job.x.len();
    let mut t = 0;
    while t + 2 <= tokens {
        // Twelve sums and what feeds them fit 32 registers, but not 16.
        if I::LANES == 16 {
            tile::<I, F, 2, 2>(job, t);
        } else {
            tile::<I, F, 2, 1>(job, t);
        }
        t += 2;
    }
    if t < tokens {
        tile::<I, F, 1, 2>(job, t);
    }
}

/// All rows for tokens `t .. t + M`, `V` vectors of rows at a time, block by block, so that the panel is read in one go.
///
/// # Safety
///
/// As for [`panel`]; the tokens exist and `V * LANES` divides 32.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn, clippy::needless_range_loop)]
unsafe fn tile<I: Isa, F: Nibbles, const M: usize, const V: usize>(job: &mut Job<'_>, t: usize) {
    let shape = job.shape;
    let (cols, group, scale) = (shape.cols, shape.group, shape.scale);
    let base = job.panel.as_ptr();
    let mut p = base.add(shape.head());
    let mut x: [*const u8; M] = std::array::from_fn(|m| job.x[t + m].cast());
    // Of the panel and of the group: in memory, since the registers are the block's.
    let (mut acc, mut sum) = ([[0f32; PANEL]; M], [[0f32; PANEL]; M]);
    let mut k = 0;
    while k < cols {
        let len = group.min(cols - k);
        let scales = p;
        let zeros = p.add(scale.bytes());
        p = if F::ZERO { zeros.add(PANEL) } else { zeros };
        let mut done = 0;
        while done < len {
            let steps = BLOCK.min(len - done).div_ceil(STEP_4BIT);
            let (first, last) = (done == 0, len - done <= BLOCK);
            let mut row = 0;
            while row < PANEL {
                let mut zero = [I::splat_int(F::OFFSET); V];
                if F::ZERO {
                    for v in 0..V {
                        zero[v] = I::u8_int(zeros.add(row + v * I::LANES));
                    }
                }
                let codes = p.add(4 * row);
                let y = match steps {
                    1 => block::<I, F, M, V, 1>(codes, &x, zero),
                    2 => block::<I, F, M, V, 2>(codes, &x, zero),
                    3 => block::<I, F, M, V, 3>(codes, &x, zero),
                    _ => block::<I, F, M, V, 4>(codes, &x, zero),
                };
                for v in 0..V {
                    let at = row + v * I::LANES;
                    let s = if last { scale.load::<I>(scales, at) } else { I::splat(1.0) };
                    for m in 0..M {
                        let (sum, acc) = (sum[m].as_mut_ptr().add(at), acc[m].as_mut_ptr().add(at));
                        let y = if first { y[m][v] } else { I::add(I::load(sum), y[m][v]) };
                        if last {
                            I::store(acc, I::add(I::load(acc), I::mul(y, s)));
                        } else {
                            I::store(sum, y);
                        }
                    }
                }
                row += V * I::LANES;
            }
            p = p.add(steps * STEP_BYTES);
            for x in &mut x {
                *x = x.add(HEAD + steps * STEP_4BIT * PARTS);
            }
            done += BLOCK;
        }
        k += len;
    }
    for m in 0..M {
        for at in (0..PANEL).step_by(I::LANES) {
            let factor = I::load(base.cast::<f32>().add(at));
            let mut y = I::mul(I::load(acc[m].as_ptr().add(at)), factor);
            if shape.bias {
                y = I::add(y, I::load(base.cast::<f32>().add(PANEL + at)));
            }
            I::store(job.out[t + m].as_mut_ptr().add(at), y);
        }
    }
}

/// The shares of a block of `STEPS` steps.
///
/// # Safety
///
/// As for [`tile`]; `p` is the first step's codes of the first row, each of `x` a block of so many steps.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn, clippy::needless_range_loop)]
unsafe fn block<I: Isa, F: Nibbles, const M: usize, const V: usize, const STEPS: usize>(
    p: *const u8,
    x: &[*const u8; M],
    zero: [I::Ints; V],
) -> [[I::V; V]; M] {
    let mut sums = [[[I::no_products(); PARTS]; V]; M];
    for step in 0..STEPS {
        let p = p.add(step * STEP_BYTES);
        if M == 1 {
            for line in (0..4 * V * I::LANES).step_by(64) {
                I::prefetch(p.wrapping_add(PREFETCH + line));
            }
        }
        for half in 0..2 {
            let codes: [I::Bytes; V] = std::array::from_fn(|v| {
                let p = p.add(4 * v * I::LANES);
                F::decode::<I>(if half == 0 { I::nibbles::<false>(p) } else { I::nibbles::<true>(p) })
            });
            for m in 0..M {
                for part in 0..PARTS {
                    let four = I::four(x[m].add(HEAD + ((2 * step + half) * PARTS + part) * 4));
                    for v in 0..V {
                        sums[m][v][part] = I::add_products(sums[m][v][part], codes[v], four);
                    }
                }
            }
        }
    }
    let mut y = [[I::splat(0.0); V]; M];
    for m in 0..M {
        let scale = I::splat(x[m].cast::<f32>().read());
        let sum = I::splat_int(x[m].add(4).cast::<i32>().read());
        for v in 0..V {
            y[m][v] = I::mul(I::to_float(I::corrected(I::total(sums[m][v]), zero[v], sum)), scale);
        }
    }
    y
}
