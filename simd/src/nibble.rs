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

use crate::fixed::{BLOCK, HEAD, PARTS};
use crate::format::{GroupScale, Nibbles, PANEL, STEP_4BIT, STEP_BYTES, Shape};
use crate::isa::Isa;
use crate::kernel::{Job, PREFETCH, finish};
use crate::slab::{self, Tile};
use std::marker::PhantomData;

/// Panels times the fixed-point forms `job.x`.
///
/// # Safety
///
/// As for [`crate::kernel::PanelFn`].
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)]
pub(crate) unsafe fn panel<I: Isa, F: Nibbles>(job: &mut Job<'_>) {
    // Scales that are read often have code of their own, without a choice per group.
    match job.shape.scale {
        GroupScale::E8m0 if F::SMALL_GROUPS => tokens::<I, F>(job, GroupScale::E8m0),
        GroupScale::E4m3 if F::SMALL_GROUPS => tokens::<I, F>(job, GroupScale::E4m3),
        scale => tokens::<I, F>(job, scale),
    }
}

/// The same; `scale` is that of the shape.
///
/// # Safety
///
/// As for [`panel`].
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)]
unsafe fn tokens<I: Isa, F: Nibbles>(job: &mut Job<'_>, scale: GroupScale) {
    let tokens = job.x.len();
    let mut t = 0;
    while t + 2 <= tokens {
        // Twelve sums and what feeds them fit 32 registers, but not 16.
        if I::LANES != 16 {
            tile::<I, F, 2, 1>(job, t, scale);
        } else if !whole::<I, F, 2>(job, t) {
            tile::<I, F, 2, 2>(job, t, scale);
        }
        t += 2;
    }
    if t < tokens && !whole::<I, F, 1>(job, t) {
        tile::<I, F, 1, 2>(job, t, scale);
    }
}

/// What [`tile`] computes for tokens `t .. t + M`, with sums in registers, if there are sixteen lanes and groups are usual ones;
/// false if nothing was done.
///
/// # Safety
///
/// As for [`panel`]; the tokens exist.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)]
unsafe fn whole<I: Isa, F: Nibbles, const M: usize>(job: &mut Job<'_>, t: usize) -> bool {
    let (cols, group) = (job.shape.cols, job.shape.group);
    if I::LANES != 16 || !cols.is_multiple_of(BLOCK.min(group)) {
        return false;
    }
    match (job.shape.scale, group) {
        (GroupScale::E8m0, 32) if F::SMALL_GROUPS => groups::<I, F, M, 4>(job, t, GroupScale::E8m0),
        (GroupScale::E4m3, 16) if F::SMALL_GROUPS => groups::<I, F, M, 2>(job, t, GroupScale::E4m3),
        (scale, _) if group.is_multiple_of(BLOCK) => groups::<I, F, M, 0>(job, t, scale),
        _ => return false,
    }
    true
}

/// The same of groups that are a block of `STEPS` steps or, where that is 0, whole blocks.
///
/// # Safety
///
/// As for [`whole`].
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)]
unsafe fn groups<I: Isa, F: Nibbles, const M: usize, const STEPS: usize>(
    job: &mut Job<'_>,
    t: usize,
    scale: GroupScale,
) {
    let x = std::array::from_fn(|m| job.x[t + m].cast());
    slab::panels(job, t, &Groups::<I, F, M, STEPS> { x, scale, kind: PhantomData })
}

/// Whole groups for `M` tokens, see [`groups`].
struct Groups<I, F, const M: usize, const STEPS: usize> {
    x: [*const u8; M],
    /// That of the shape.
    scale: GroupScale,
    kind: PhantomData<(I, F)>,
}

impl<I: Isa, F: Nibbles, const M: usize, const STEPS: usize> Tile<M> for Groups<I, F, M, STEPS> {
    type Sums = [[I::V; 2]; M];

    #[inline(always)]
    fn rows(&self) -> [*const u8; M] {
        self.x
    }

    #[inline(always)]
    #[allow(unsafe_op_in_unsafe_fn)]
    unsafe fn none(&self) -> Self::Sums {
        [[I::splat(0.0); 2]; M]
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
        let (mut p, mut x, mut acc, scale) = (*at, *from, *sum_of, self.scale);
        let group = if STEPS == 0 { shape.group } else { STEPS * STEP_4BIT };
        let mut k = 0;
        while k < columns {
            let scales = p;
            let zeros = p.add(scale.bytes());
            p = if F::ZERO { zeros.add(PANEL) } else { zeros };
            let mut sum = [[I::splat(0.0); 2]; M];
            if STEPS > 0 {
                sum = block::<I, F, M, STEPS>(&mut p, &mut x, zeros);
            } else {
                // The last group may have fewer blocks.
                for _ in (0..group.min(columns - k)).step_by(BLOCK) {
                    let y = block::<I, F, M, { BLOCK / STEP_4BIT }>(&mut p, &mut x, zeros);
                    for m in 0..M {
                        for v in 0..2 {
                            // A lone block is its group's sum, and 0 more changes no bit of what it adds.
                            sum[m][v] = I::add(sum[m][v], y[m][v]);
                        }
                    }
                }
            }
            for v in 0..2 {
                let s = scale.load::<I>(scales, v * I::LANES);
                for m in 0..M {
                    acc[m][v] = I::add(acc[m][v], I::mul(sum[m][v], s));
                }
            }
            k += group;
        }
        (*at, *from, *sum_of) = (p, x, acc);
    }

    #[inline(always)]
    #[allow(unsafe_op_in_unsafe_fn, clippy::needless_range_loop)]
    unsafe fn finish(&self, shape: &Shape, head: *const u8, sums: &Self::Sums, out: &mut [[f32; PANEL]]) {
        for v in 0..2 {
            for m in 0..M {
                finish::<I>(shape, head, v * I::LANES, sums[m][v], &mut out[m]);
            }
        }
    }
}

/// The shares of a block of `STEPS` steps, of all rows, and past it.
///
/// # Safety
///
/// As for [`whole`]; `p` is the block's first step, `x` its forms, `zeros` its group's zero points.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn, clippy::needless_range_loop)]
unsafe fn block<I: Isa, F: Nibbles, const M: usize, const STEPS: usize>(
    p: &mut *const u8,
    x: &mut [*const u8; M],
    zeros: *const u8,
) -> [[I::V; 2]; M] {
    let sums = dot::<I, F, M, 2>(STEPS, *p, x);
    let mut y = [[I::splat(0.0); 2]; M];
    for m in 0..M {
        let scale = I::each::<0>(x[m].cast());
        for v in 0..2 {
            let total = total::<I, F>(sums[m][v], zeros.wrapping_add(v * I::LANES), x[m]);
            y[m][v] = I::mul(I::to_float(total), scale);
        }
        x[m] = x[m].add(HEAD + STEPS * STEP_4BIT * PARTS);
    }
    *p = p.add(STEPS * STEP_BYTES);
    y
}

/// All rows for tokens `t .. t + M`, `V` vectors of rows at a time, block by block, so that a slab is read in one go.
///
/// # Safety
///
/// As for [`panel`]; the tokens exist and `V * LANES` divides 32.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)]
unsafe fn tile<I: Isa, F: Nibbles, const M: usize, const V: usize>(job: &mut Job<'_>, t: usize, scale: GroupScale) {
    let x = std::array::from_fn(|m| job.x[t + m].cast());
    slab::panels(job, t, &Blocks::<I, F, M, V> { x, scale, kind: PhantomData })
}

/// See [`tile`].
struct Blocks<I, F, const M: usize, const V: usize> {
    x: [*const u8; M],
    /// That of the shape.
    scale: GroupScale,
    kind: PhantomData<(I, F)>,
}

impl<I: Isa, F: Nibbles, const M: usize, const V: usize> Tile<M> for Blocks<I, F, M, V> {
    type Sums = Sums<M>;

    #[inline(always)]
    fn rows(&self) -> [*const u8; M] {
        self.x
    }

    #[inline(always)]
    unsafe fn none(&self) -> Sums<M> {
        Sums([[0f32; PANEL]; M])
    }

    #[inline(always)]
    #[allow(unsafe_op_in_unsafe_fn)]
    unsafe fn slab(&self, shape: &Shape, columns: usize, p: &mut *const u8, x: &mut [*const u8; M], acc: &mut Sums<M>) {
        let scale = self.scale;
        // Of the group: in memory like those of the panel, since the registers are the block's.
        let mut sum = Sums([[0f32; PANEL]; M]);
        let mut k = 0;
        while k < columns {
            let len = shape.group.min(columns - k);
            let scales = *p;
            let zeros = p.add(scale.bytes());
            *p = if F::ZERO { zeros.add(PANEL) } else { zeros };
            let mut left = len;
            while left > 0 {
                let steps = BLOCK.min(left).div_ceil(STEP_4BIT);
                let mut at = Place { p: *p, x, scale, scales, zeros, sum: &mut sum.0, acc: &mut acc.0 };
                // The common sizes are unrolled.
                match (steps, left == len, left <= BLOCK) {
                    (4, true, true) => at.rows::<I, F, V, 4, SINGLE>(4),
                    (2, true, true) => at.rows::<I, F, V, 2, SINGLE>(2),
                    (_, true, true) => at.rows::<I, F, V, 0, SINGLE>(steps),
                    (_, _, false) => at.rows::<I, F, V, 4, INNER>(4),
                    (4, ..) => at.rows::<I, F, V, 4, LAST>(4),
                    (..) => at.rows::<I, F, V, 0, LAST>(steps),
                }
                *p = p.add(steps * STEP_BYTES);
                for x in x.iter_mut() {
                    *x = x.add(HEAD + steps * STEP_4BIT * PARTS);
                }
                left = left.saturating_sub(BLOCK);
            }
            k += len;
        }
    }

    #[inline(always)]
    #[allow(unsafe_op_in_unsafe_fn, clippy::needless_range_loop)]
    unsafe fn finish(&self, shape: &Shape, head: *const u8, acc: &Sums<M>, out: &mut [[f32; PANEL]]) {
        for m in 0..M {
            for at in (0..PANEL).step_by(I::LANES) {
                finish::<I>(shape, head, at, I::load(acc.0[m].as_ptr().add(at)), &mut out[m]);
            }
        }
    }
}

/// Sums per row, aligned: what crosses cache lines is not forwarded from a store to the next load.
#[repr(align(64))]
#[derive(Clone, Copy)]
struct Sums<const M: usize>([[f32; PANEL]; M]);

/// A block that is its whole group.
const SINGLE: u8 = 0;
/// One of several, which others follow.
const INNER: u8 = 1;
/// The last of several.
const LAST: u8 = 2;

/// A block, and the sums that its shares go to.
struct Place<'a, const M: usize> {
    /// Its first step.
    p: *const u8,
    /// The forms of the same block.
    x: &'a [*const u8; M],
    scale: GroupScale,
    /// The group's scales.
    scales: *const u8,
    /// The group's zero points, where the format has some.
    zeros: *const u8,
    /// Of the group so far, 0 between groups.
    sum: &'a mut [[f32; PANEL]; M],
    /// Of the panel.
    acc: &'a mut [[f32; PANEL]; M],
}

impl<const M: usize> Place<'_, M> {
    /// Adds the shares of the block, which has `steps` steps (`STEPS`, unless that is 0).
    ///
    /// # Safety
    ///
    /// As for [`tile`].
    #[inline(always)]
    #[allow(unsafe_op_in_unsafe_fn, clippy::needless_range_loop)]
    unsafe fn rows<I: Isa, F: Nibbles, const V: usize, const STEPS: usize, const WHERE: u8>(&mut self, steps: usize) {
        let steps = if STEPS == 0 { steps } else { STEPS };
        let mut row = 0;
        while row < PANEL {
            // Otherwise the compiler expands the few numbers of `x` to vectors once for all rows, and has no room.
            let mut x = *self.x;
            for x in &mut x {
                *x = I::anew(*x);
            }
            let sums = dot::<I, F, M, V>(steps, self.p.add(4 * row), &x);
            let mut y = [[I::splat(0.0); V]; M];
            for m in 0..M {
                let scale = I::each::<0>(x[m].cast());
                for v in 0..V {
                    let total = total::<I, F>(sums[m][v], self.zeros.wrapping_add(row + v * I::LANES), x[m]);
                    y[m][v] = I::mul(I::to_float(total), scale);
                }
            }
            for v in 0..V {
                let at = row + v * I::LANES;
                let s = if WHERE == INNER { I::splat(1.0) } else { self.scale.load::<I>(self.scales, at) };
                for m in 0..M {
                    let (sum, acc) = (self.sum[m].as_mut_ptr().add(at), self.acc[m].as_mut_ptr().add(at));
                    let y = if WHERE == SINGLE { y[m][v] } else { I::add(I::load(sum), y[m][v]) };
                    if WHERE == INNER {
                        I::store(sum, y);
                    } else {
                        I::store(acc, I::add(I::load(acc), I::mul(y, s)));
                    }
                    if WHERE == LAST {
                        I::store(sum, I::splat(0.0));
                    }
                }
            }
            row += V * I::LANES;
        }
    }
}

/// The sum of each row's products, the weights' offset taken off.
///
/// # Safety
///
/// As for [`dot`], which gave `sums` of the block whose form is at `x`; `zeros` are these rows' zero points, where the format has
/// some.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)]
unsafe fn total<I: Isa, F: Nibbles>(sums: [I::Products; PARTS], zeros: *const u8, x: *const u8) -> I::Ints {
    let total = I::total(sums);
    let sum = x.add(4).cast::<i32>();
    match F::ZERO {
        true => I::corrected(total, I::u8_int(zeros), I::splat_int(sum.read())),
        false if I::WIDE_SUMS => total,
        false => I::corrected(total, I::splat_int(1), I::splat_int(-sum.read())),
    }
}

/// The sums of products of a block. Where they may, they begin with what takes off the weights' offset.
///
/// # Safety
///
/// As for [`tile`]; `p` is the codes of the first row in the block's first step, each of `x` the block's form.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn, clippy::needless_range_loop)]
unsafe fn dot<I: Isa, F: Nibbles, const M: usize, const V: usize>(
    steps: usize,
    p: *const u8,
    x: &[*const u8; M],
) -> [[[I::Products; PARTS]; V]; M] {
    // For a lone token codes are read once for their low and once for their high halves, by the instructions that take them apart:
    // one less, and (as with plain loads) memory comes a little faster so.
    let again = if M == 1 && I::LANES == 16 { I::anew(p) } else { p };
    let mut sums = [[[I::no_products(); PARTS]; V]; M];
    if I::WIDE_SUMS && !F::ZERO {
        for m in 0..M {
            for v in 0..V {
                sums[m][v][PARTS - 1] = I::products(x[m].add(4));
            }
        }
    }
    for step in 0..steps {
        let p = p.add(step * STEP_BYTES);
        // With eight lanes several tokens would ask for lines twice. Of many tokens every tile asks, though the first would do:
        // a choice between tiles costs a quarter of the speed.
        if M == 1 || I::LANES == 16 {
            for line in (0..4 * V * I::LANES).step_by(64) {
                I::prefetch(p.wrapping_add(PREFETCH + line));
            }
        }
        for half in 0..2 {
            // No closure: one that is not inlined calls every intrinsic as a function.
            let p = if half == 0 { p } else { again.add(step * STEP_BYTES) };
            let mut codes = [half_step::<I, F>(p, half); V];
            for v in 1..V {
                codes[v] = half_step::<I, F>(p.add(4 * v * I::LANES), half);
            }
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
    sums
}

/// Four columns of `LANES` rows.
///
/// # Safety
///
/// As for [`dot`]; `p` is the first of these rows in a step.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)]
unsafe fn half_step<I: Isa, F: Nibbles>(p: *const u8, half: usize) -> I::Bytes {
    if half == 0 { F::decode::<I, false>(p) } else { F::decode::<I, true>(p) }
}
