//! The micro-kernel of bfloat16 dot products: weights that bfloat16 holds exactly times rows that it holds exactly, two
//! columns an instruction, with float32 sums. Rows that it does not hold go to the kernel of the set below.
//!
//! A float32 sum takes two products at once, even and odd pairs of columns having a sum each where a step has several.
//! The order depends on nothing but the matrix: any tile of tokens gives the same bits.

use crate::format::{GroupScale, PANEL, STEP_BYTES};
use crate::isa::PairDots;
use crate::kernel::{CHUNK, Job, PREFETCH, PanelFn};
use crate::pair_format::Pairs;
use crate::pairs::HEAD;

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
        let at = v * I::LANES;
        let factor = I::load(base.cast::<f32>().add(at));
        for m in 0..M {
            let mut y = I::mul(I::mul(acc[m][v], I::splat(job.x[t + m].read())), factor);
            if shape.bias {
                y = I::add(y, I::load(base.cast::<f32>().add(PANEL + at)));
            }
            I::store(job.out[t + m].as_mut_ptr().add(at), y);
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
    for v in 1..V {
        w[v] = F::decode::<I>(p.add(4 * v * I::LANES));
    }
    for k in 0..F::STEP / 2 {
        for m in 0..M {
            let x = I::pair(x[m].add(k));
            for v in 0..V {
                sums[k % 2][m][v] = I::dot_pairs(sums[k % 2][m][v], w[v][k], x);
            }
        }
    }
}
