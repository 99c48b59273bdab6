//! The micro-kernel of bfloat16 dot products: weights that bfloat16 holds exactly times rows that it holds exactly, two
//! columns an instruction, with float32 sums. Rows that it does not hold go to the kernel of the set below.
//!
//! A float32 sum takes two products at once, even and odd pairs of columns having a sum each where a step has several.
//! The order depends on nothing but the matrix: any tile of tokens gives the same bits.

use crate::format::{GroupScale, PANEL, STEP_BYTES};
use crate::isa::PairDots;
use crate::kernel::{CHUNK, Job, PREFETCH, PanelFn, finish};
use crate::pair_format::Pairs;
use crate::pairs::HEAD;
use std::ops::Range;

/// Vectors of a panel's rows.
const V: usize = 2;

/// A panel times the rows `job.x`, in the form of `pairs`; `plain` is the kernel for those that are none.
///
/// # Safety
///
/// As for [`PanelFn`]; `plain` may be called for the shape with its plain form.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)]
pub(crate) unsafe fn panel<I: PairDots, F: Pairs>(job: &mut Job<'_>, plain: PanelFn) {
    const { assert!(V * I::LANES == PANEL) };
    // Scales that are read often have code of their own, without a choice per group.
    match job.shape.scale {
        GroupScale::E8m0 if F::SMALL_GROUPS => runs::<I, F>(job, plain, GroupScale::E8m0),
        GroupScale::E4m3 if F::SMALL_GROUPS => runs::<I, F>(job, plain, GroupScale::E4m3),
        scale => runs::<I, F>(job, plain, scale),
    }
}

/// The same; `scale` is that of the shape. Neighbours of a kind are computed together.
///
/// # Safety
///
/// As for [`panel`].
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)]
unsafe fn runs<I: PairDots, F: Pairs>(job: &mut Job<'_>, plain: PanelFn, scale: GroupScale) {
    let is_pairs = |x: &*const f32| x.read() != 0.0;
    let mut t = 0;
    while t < job.x.len() {
        let pairs = is_pairs(&job.x[t]);
        let end = t + job.x[t..].iter().take_while(|x| is_pairs(x) == pairs).count();
        if pairs {
            tokens::<I, F>(job, t, end, scale);
        } else {
            let mut x = [std::ptr::null(); CHUNK];
            for (to, from) in x.iter_mut().zip(&job.x[t..end]) {
                *to = from.add(HEAD);
            }
            plain(&mut Job { shape: job.shape, panel: job.panel, x: &x[..end - t], out: &mut job.out[t..end] });
        }
        t = end;
    }
}

/// Tokens `t .. end`, which are pairs.
///
/// # Safety
///
/// As for [`panel`]; the tokens exist.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)]
unsafe fn tokens<I: PairDots, F: Pairs>(job: &mut Job<'_>, mut t: usize, end: usize, scale: GroupScale) {
    let mut fetch = true;
    while t < end {
        // Up to 24 sums in 32 registers; tiles of nearly the same size.
        let m = (end - t).div_ceil((end - t).div_ceil(6));
        match m {
            1 => tile::<I, F, 1>(job, t, scale, fetch),
            2 => tile::<I, F, 2>(job, t, scale, fetch),
            3 => tile::<I, F, 3>(job, t, scale, fetch),
            4 => tile::<I, F, 4>(job, t, scale, fetch),
            5 => tile::<I, F, 5>(job, t, scale, fetch),
            _ => tile::<I, F, 6>(job, t, scale, fetch),
        }
        fetch = false;
        t += m;
    }
}

/// Panels one after the other times a lone row, if it is in pairs and groups are usual ones; false if nothing was done. In one
/// loop, for between calls and where branches are mispredicted the processor runs out of loads that are under way.
///
/// # Safety
///
/// As for [`PanelFn`].
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)]
pub(crate) unsafe fn lone<I: PairDots, F: Pairs>(job: &mut Job<'_>) -> bool {
    let (cols, group) = (job.shape.cols, job.shape.group);
    if job.x.len() != 1 || job.x[0].read() == 0.0 || !cols.is_multiple_of(group) || !group.is_multiple_of(F::STEP) {
        return false;
    }
    match (job.shape.scale, group / F::STEP) {
        (GroupScale::E8m0, 4) if F::SMALL_GROUPS => groups::<I, F, 4>(job, GroupScale::E8m0),
        (GroupScale::E4m3, 2) if F::SMALL_GROUPS => groups::<I, F, 2>(job, GroupScale::E4m3),
        (scale, steps) if steps % 4 == 0 => groups::<I, F, 0>(job, scale),
        _ => return false,
    }
    true
}

/// What [`tile`] computes, of whole groups of `STEPS` steps or, where that is 0, of steps by fours.
///
/// # Safety
///
/// As for [`lone`].
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn, clippy::needless_range_loop)]
unsafe fn groups<I: PairDots, F: Pairs, const STEPS: usize>(job: &mut Job<'_>, scale: GroupScale) {
    let shape = job.shape;
    let zero = I::splat(0.0);
    let head = job.x[0].read();
    let start = job.x[0].add(HEAD);
    let mut p = job.panel.as_ptr();
    let count = if STEPS == 0 { shape.cols / shape.group } else { shape.cols / (STEPS * F::STEP) };
    let fours = shape.group / (4 * F::STEP);
    for out in job.out.iter_mut() {
        let base = p;
        p = p.add(shape.head());
        let mut x = [start];
        let mut acc = [zero; V];
        for _ in 0..count {
            let scales = p;
            p = p.add(scale.bytes());
            let mut sums = [[[zero; V]; 1]; 2];
            for _ in 0..if STEPS == 0 { fours } else { 1 } {
                for _ in 0..if STEPS == 0 { 4 } else { STEPS } {
                    let ahead = p.wrapping_add(F::AHEAD);
                    I::prefetch(ahead);
                    I::prefetch(ahead.wrapping_add(64));
                    step::<I, F, 1>(p, &x, &mut sums);
                    p = p.add(STEP_BYTES);
                    x[0] = x[0].add(F::STEP / 2);
                }
            }
            for v in 0..V {
                let s = if scale == GroupScale::None { I::splat(1.0) } else { scale.load::<I>(scales, v * I::LANES) };
                let sum = if F::STEP == 2 { sums[0][0][v] } else { I::add(sums[0][0][v], sums[1][0][v]) };
                acc[v] = I::fma(sum, s, acc[v]);
            }
        }
        for v in 0..V {
            finish::<I>(shape, base, v * I::LANES, I::mul(acc[v], I::splat(head)), out);
        }
    }
}

/// All rows for tokens `t .. t + M`.
///
/// # Safety
///
/// As for [`tokens`].
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn, clippy::needless_range_loop)]
unsafe fn tile<I: PairDots, F: Pairs, const M: usize>(job: &mut Job<'_>, t: usize, scale: GroupScale, fetch: bool) {
    let shape = job.shape;
    let zero = I::splat(0.0);
    let base = job.panel.as_ptr();
    let mut p = base.add(shape.head());
    let mut x: [*const f32; M] = std::array::from_fn(|m| job.x[t + m].add(HEAD));
    // Results of single groups are added up in memory: the registers are the group's.
    let mut acc = [[zero; V]; M];
    let mut k = 0;
    while k < shape.cols {
        let len = shape.group.min(shape.cols - k);
        let scales = p;
        p = p.add(scale.bytes());
        let mut sums = [[[zero; V]; M]; 2];
        for _ in 0..len.div_ceil(F::STEP) {
            if fetch {
                let ahead = p.wrapping_add(if M > 1 { PREFETCH } else { F::AHEAD });
                I::prefetch(ahead);
                I::prefetch(ahead.wrapping_add(64));
            }
            step::<I, F, M>(p, &x, &mut sums);
            p = p.add(STEP_BYTES);
            for x in &mut x {
                *x = x.add(F::STEP / 2);
            }
        }
        for v in 0..V {
            let s = if scale == GroupScale::None { I::splat(1.0) } else { scale.load::<I>(scales, v * I::LANES) };
            for m in 0..M {
                let sum = if F::STEP == 2 { sums[0][m][v] } else { I::add(sums[0][m][v], sums[1][m][v]) };
                acc[m][v] = I::fma(sum, s, acc[m][v]);
            }
        }
        k += len;
    }
    for v in 0..V {
        for m in 0..M {
            let y = I::mul(acc[m][v], I::splat(job.x[t + m].read()));
            finish::<I>(shape, base, v * I::LANES, y, &mut job.out[t + m]);
        }
    }
}

/// Adds a step's products to the sums over even and over odd pairs.
///
/// # Safety
///
/// As for [`tile`]; `p` is a step and each of `x` can be read for its pairs.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn, clippy::needless_range_loop)]
unsafe fn step<I: PairDots, F: Pairs, const M: usize>(
    p: *const u8,
    x: &[*const f32; M],
    sums: &mut [[[I::V; V]; M]; 2],
) {
    let mut w = [F::decode::<I>(p); V];
    for v in 0..V {
        if v > 0 {
            w[v] = F::decode::<I>(p.add(4 * v * I::LANES));
        }
        // A single token uses each value once, right here, before it could leave its register.
        if M == 1 {
            pairs::<I, F, M>(&w, v..v + 1, x, sums);
        }
    }
    if M > 1 {
        pairs::<I, F, M>(&w, 0..V, x, sums);
    }
}

/// Adds the products of the step's pairs, of these vectors of rows.
///
/// # Safety
///
/// As for [`step`].
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)]
unsafe fn pairs<I: PairDots, F: Pairs, const M: usize>(
    w: &[[I::Pairs; 4]; V],
    rows: Range<usize>,
    x: &[*const f32; M],
    sums: &mut [[[I::V; V]; M]; 2],
) {
    pair::<I, F, M, 0>(w, rows.clone(), x, sums);
    pair::<I, F, M, 1>(w, rows.clone(), x, sums);
    pair::<I, F, M, 2>(w, rows.clone(), x, sums);
    pair::<I, F, M, 3>(w, rows, x, sums);
}

/// The same of pair `K`, if a step has so many.
///
/// # Safety
///
/// As for [`step`].
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn, clippy::needless_range_loop)]
unsafe fn pair<I: PairDots, F: Pairs, const M: usize, const K: usize>(
    w: &[[I::Pairs; 4]; V],
    rows: Range<usize>,
    x: &[*const f32; M],
    sums: &mut [[[I::V; V]; M]; 2],
) {
    if K >= F::STEP / 2 {
        return;
    }
    for m in 0..M {
        let x = I::pair::<K>(x[m]);
        for v in rows.clone() {
            sums[K % 2][m][v] = I::dot_pairs(sums[K % 2][m][v], w[v][K], x);
        }
    }
}
