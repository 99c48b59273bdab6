//! The micro-kernel of int8 activations: dot products of bytes, a float operation or three per block. And that of int8
//! weights with exact activations where there is VNNI: three such products, one with each part of the fixed-point form.
//!
//! A code becomes a byte c, its weight being c - z for a zero point z that is the same for all columns of a block. A
//! row's share of a block is then s * (sum of c * q - z * sum of q), where the bracket is computed exactly: |c|, |z| and
//! |q| are below 256, 256 and 128, so that sums over 32 columns stay below 2^21. Of parts (64 at most) the three sums are
//! exact, too, and come together in float32.
//!
//! The integers are exact, and the few float operations per block are the same everywhere and, with int8 activations,
//! never fused: these results do not depend on the instruction set. None depends on which tokens are computed together.

use crate::fixed::{PARTS, WIDE_HEAD};
use crate::format::{Bytes, GroupScale, PANEL, STEP_BYTES, Shape};
use crate::int8::{BLOCK, HEAD, bias};
use crate::isa::Isa;
use crate::kernel::{Job, NEAR, PREFETCH, finish};
use crate::slab::{self, Tile};
use std::marker::PhantomData;

/// Columns of half a block.
const HALF: usize = BLOCK / 2;

/// Panels times the int8 forms `job.x` (`P` is 1) or the wide fixed-point ones ([`PARTS`]).
///
/// # Safety
///
/// As for [`crate::kernel::PanelFn`].
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)]
pub(crate) unsafe fn panel<I: Isa, F: Bytes, const P: usize>(job: &mut Job<'_>) {
    // Scales that are read often have code of their own, without a choice per block.
    match job.shape.scale {
        GroupScale::E8m0 if F::SMALL_GROUPS => tokens::<I, F, P>(job, GroupScale::E8m0),
        GroupScale::E4m3 if F::SMALL_GROUPS => tokens::<I, F, P>(job, GroupScale::E4m3),
        GroupScale::None if !F::SMALL_GROUPS => tokens::<I, F, P>(job, GroupScale::None),
        scale => tokens::<I, F, P>(job, scale),
    }
}

/// The same; `scale` is that of the shape.
///
/// # Safety
///
/// As for [`panel`].
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)]
unsafe fn tokens<I: Isa, F: Bytes, const P: usize>(job: &mut Job<'_>, scale: GroupScale) {
    let tokens = job.x.len();
    let mut t = 0;
    while t < tokens {
        let left = tokens - t;
        if I::LANES == 16 {
            // Twelve sums of integers and twelve of floats in 32 registers; tiles of nearly the same size.
            let m = left.div_ceil(left.div_ceil(if P == 1 { 6 } else { 3 }));
            match m {
                1 => tile::<I, F, P, 1, 2>(job, t, 0, scale),
                2 => tile::<I, F, P, 2, 2>(job, t, 0, scale),
                m if m == 3 || P > 1 => tile::<I, F, P, 3, 2>(job, t, 0, scale),
                4 => tile::<I, F, P, 4, 2>(job, t, 0, scale),
                5 => tile::<I, F, P, 5, 2>(job, t, 0, scale),
                _ => tile::<I, F, P, 6, 2>(job, t, 0, scale),
            }
            t += m;
            continue;
        }
        let m = left.div_ceil(left.div_ceil(4));
        match m {
            // All rows at once: the panel is read in one go.
            1 => tile::<I, F, P, 1, 4>(job, t, 0, scale),
            _ => {
                for row in (0..PANEL).step_by(I::LANES) {
                    match m {
                        2 => tile::<I, F, P, 2, 1>(job, t, row, scale),
                        3 => tile::<I, F, P, 3, 1>(job, t, row, scale),
                        _ => tile::<I, F, P, 4, 1>(job, t, row, scale),
                    }
                }
            }
        }
        t += m;
    }
}

/// `V` vectors of rows from `row` on for `M` tokens.
struct Rows<I, F, const P: usize, const M: usize, const V: usize> {
    row: usize,
    x: [*const u8; M],
    /// That of the shape.
    scale: GroupScale,
    /// Whether to ask for memory ahead, for several tokens.
    fetch: bool,
    kind: PhantomData<(I, F)>,
}

impl<I: Isa, F: Bytes, const P: usize, const M: usize, const V: usize> Tile<M> for Rows<I, F, P, M, V> {
    type Sums = [[I::V; V]; M];

    #[inline(always)]
    fn rows(&self) -> [*const u8; M] {
        self.x
    }

    #[inline(always)]
    #[allow(unsafe_op_in_unsafe_fn)]
    unsafe fn none(&self) -> Self::Sums {
        [[I::splat(0.0); V]; M]
    }

    #[inline(always)]
    #[allow(unsafe_op_in_unsafe_fn, clippy::needless_range_loop)]
    unsafe fn slab(
        &self,
        shape: &Shape,
        columns: usize,
        at: &mut *const u8,
        from: &mut [*const u8; M],
        sum_of: &mut Self::Sums,
    ) {
        let (step, row, scale, fetch) = (4 * F::FOURS, self.row, self.scale, self.fetch);
        let (mut p, mut x, mut acc) = (*at, *from, *sum_of);
        let mut k = 0;
        while k < columns {
            let len = shape.group.min(columns - k);
            let scales = p;
            let zeros = p.add(scale.bytes());
            p = if F::ZERO { zeros.add(PANEL) } else { zeros };
            let mut left = len;
            while left > 0 {
                let steps = BLOCK.min(left).div_ceil(step);
                // Whole blocks are unrolled, and half ones: groups of 16.
                let at = p.add(4 * row);
                let sums = match (steps * step, fetch) {
                    (BLOCK, true) => block::<I, F, P, M, V, BLOCK, true>(BLOCK, at, &x),
                    (BLOCK, false) => block::<I, F, P, M, V, BLOCK, false>(BLOCK, at, &x),
                    (HALF, true) => block::<I, F, P, M, V, HALF, true>(HALF, at, &x),
                    (HALF, false) => block::<I, F, P, M, V, HALF, false>(HALF, at, &x),
                    (columns, _) => block::<I, F, P, M, V, 0, false>(columns, at, &x),
                };
                for v in 0..V {
                    let lane = row + v * I::LANES;
                    let weight = if scale == GroupScale::None { I::splat(1.0) } else { scale.load::<I>(scales, lane) };
                    for m in 0..M {
                        let sum = match F::ZERO {
                            true => {
                                let q = I::splat_int(x[m].add(4).cast::<i32>().read());
                                I::corrected(sums[m][v][0], I::u8_int(zeros.add(lane)), q)
                            }
                            false => sums[m][v][0],
                        };
                        let mut y = I::to_float(sum);
                        for part in 1..P {
                            y = I::fma(y, I::splat(128.0), I::to_float(sums[m][v][part]));
                        }
                        let y = if scale == GroupScale::None { y } else { I::mul(y, weight) };
                        acc[m][v] = I::add(acc[m][v], I::mul(y, I::each::<0>(x[m].cast())));
                    }
                }
                p = p.add(steps * STEP_BYTES);
                for x in &mut x {
                    *x = x.add(head::<P>() + steps * step * P);
                }
                left = left.saturating_sub(BLOCK);
            }
            k += len;
        }
        (*at, *from, *sum_of) = (p, x, acc);
    }

    #[inline(always)]
    #[allow(unsafe_op_in_unsafe_fn, clippy::needless_range_loop)]
    unsafe fn finish(&self, shape: &Shape, head: *const u8, sums: &Self::Sums, out: &mut [[f32; PANEL]]) {
        for v in 0..V {
            for m in 0..M {
                finish::<I>(shape, head, self.row + v * I::LANES, sums[m][v], &mut out[m]);
            }
        }
    }
}

/// `V` vectors of rows from `row` on for tokens `t .. t + M`.
///
/// # Safety
///
/// As for [`panel`]; the tokens exist and `row + V * LANES <= 32`.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)]
unsafe fn tile<I: Isa, F: Bytes, const P: usize, const M: usize, const V: usize>(
    job: &mut Job<'_>,
    t: usize,
    row: usize,
    scale: GroupScale,
) {
    let x = std::array::from_fn(|m| job.x[t + m].cast());
    // With few tokens so few instructions are left that the processor itself has enough loads under way; asking for more
    // only takes their places. (A lone token has a distance of its own.) Otherwise the first tile asks for what comes, for
    // all.
    let fetch = M > if F::BIASED && P == 1 { 3 } else { 1 } && t == 0 && row == 0;
    slab::panels(job, t, &Rows::<I, F, P, M, V> { row, x, scale, fetch, kind: PhantomData })
}

/// The sums of products of a block of `columns` (`COLUMNS`, unless that is 0), the weights' offset taken off unless it is
/// that of zero points.
///
/// # Safety
///
/// As for [`tile`]; `p` is the codes of the first row in the block's first step, each of `x` the block's form.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn, clippy::needless_range_loop)]
unsafe fn block<
    I: Isa,
    F: Bytes,
    const P: usize,
    const M: usize,
    const V: usize,
    const COLUMNS: usize,
    const FETCH: bool,
>(
    columns: usize,
    p: *const u8,
    x: &[*const u8; M],
) -> [[[I::Ints; P]; V]; M] {
    let fours = if COLUMNS == 0 { columns } else { COLUMNS } / 4;
    let mut sums = [[[I::splat_int(0); P]; V]; M];
    for m in 0..M {
        for part in 0..P {
            let start = x[m].add(4 + 4 * part).cast::<i32>().read();
            let start = I::splat_int(if F::ZERO { start * bias::<I, F>() } else { start });
            for v in 0..V {
                sums[m][v][part] = start;
            }
        }
    }
    let mut four = 0;
    if I::DEPTH == 4 && !F::BIASED {
        while four + 4 <= fours {
            if FETCH {
                for line in 0..4 / F::FOURS * STEP_BYTES / 64 {
                    I::prefetch(p.wrapping_add(PREFETCH + four / F::FOURS * STEP_BYTES + 64 * line));
                }
            }
            some::<I, F, P, M, V, 4>(four, p, x, &mut sums);
            four += 4;
        }
    }
    while four < fours {
        if FETCH && four % F::FOURS == 0 {
            let step = p.wrapping_add(PREFETCH + four / F::FOURS * STEP_BYTES);
            I::prefetch(step);
            I::prefetch(step.wrapping_add(64));
        }
        if M == 1 && !FETCH && four % F::FOURS == 0 {
            let ahead = if F::BIASED { NEAR } else { PREFETCH };
            let step = p.wrapping_add(ahead + four / F::FOURS * STEP_BYTES);
            I::prefetch(step);
            I::prefetch(step.wrapping_add(64));
        }
        some::<I, F, P, M, V, 1>(four, p, x, &mut sums);
        four += 1;
    }
    sums
}

/// Adds the products of `4 * N` columns from `4 * four` on.
///
/// # Safety
///
/// As for [`block`], which has these columns.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn, clippy::needless_range_loop)]
unsafe fn some<I: Isa, F: Bytes, const P: usize, const M: usize, const V: usize, const N: usize>(
    four: usize,
    p: *const u8,
    x: &[*const u8; M],
    sums: &mut [[[I::Ints; P]; V]; M],
) {
    // No closure: one that is not inlined calls every intrinsic as a function.
    let mut w = [[codes::<I, F>(p, four); N]; V];
    for v in 0..V {
        for n in 0..N {
            w[v][n] = codes::<I, F>(p.add(4 * v * I::LANES), four + n);
        }
    }
    for m in 0..M {
        for part in 0..P {
            let mut q = [I::four(x[m].add(head::<P>() + 4 * (P * four + part))); N];
            for n in 1..N {
                q[n] = I::four(x[m].add(head::<P>() + 4 * (P * (four + n) + part)));
            }
            for v in 0..V {
                sums[m][v][part] = I::dot(sums[m][v][part], w[v], q, !F::BIASED);
            }
        }
    }
}

/// Bytes of a form's block before its numbers.
const fn head<const P: usize>() -> usize {
    if P == PARTS { WIDE_HEAD } else { HEAD }
}

/// Four columns of `LANES` rows of a block.
///
/// # Safety
///
/// As for [`some`].
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)]
unsafe fn codes<I: Isa, F: Bytes>(p: *const u8, four: usize) -> I::Bytes {
    F::decode::<I>(p.add(four / F::FOURS * STEP_BYTES), four % F::FOURS)
}
