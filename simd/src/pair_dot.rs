//! The micro-kernel of bfloat16 dot products: weights that bfloat16 holds exactly times rows that it holds exactly, two
//! columns an instruction, with float32 sums. Rows that it does not hold go to the kernel of the set below.
//!
//! A float32 sum takes two products at once, even and odd pairs of columns having a sum each where a step has several.
//! The order depends on nothing but the matrix: any tile of tokens gives the same bits.

use crate::format::{GroupScale, PANEL, STEP_BYTES, Shape};
use crate::isa::PairDots;
use crate::kernel::{CHUNK, Job, PREFETCH, PanelFn, finish};
use crate::pair_format::Pairs;
use crate::pairs::HEAD;
use crate::slab::{self, Tile};
use std::marker::PhantomData;
use std::ops::Range;

/// Vectors of a panel's rows.
const V: usize = 2;

/// Panels times the rows `job.x`, in the form of `pairs`; `plain` is the kernel for those that are none.
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
            plain(&mut job.tokens(t, &x[..end - t]));
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
    let whole = if group.is_multiple_of(4 * F::STEP) { 4 * F::STEP } else { group };
    if job.x.len() != 1 || job.x[0].read() == 0.0 || !cols.is_multiple_of(whole) || !group.is_multiple_of(F::STEP) {
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
#[allow(unsafe_op_in_unsafe_fn)]
unsafe fn groups<I: PairDots, F: Pairs, const STEPS: usize>(job: &mut Job<'_>, scale: GroupScale) {
    slab::panels(job, 0, &Groups::<I, F, STEPS>(Rows::of(job, 0, scale, true)))
}

/// See [`groups`].
struct Groups<I, F, const STEPS: usize>(Rows<I, F, 1>);

impl<I: PairDots, F: Pairs, const STEPS: usize> Tile<1> for Groups<I, F, STEPS> {
    type Sums = [[I::V; V]; 1];

    #[inline(always)]
    fn rows(&self) -> [*const u8; 1] {
        self.0.rows()
    }

    #[inline(always)]
    unsafe fn none(&self) -> Self::Sums {
        // SAFETY: as the caller promises.
        unsafe { self.0.none() }
    }

    #[inline(always)]
    #[allow(unsafe_op_in_unsafe_fn, clippy::needless_range_loop)]
    unsafe fn slab(
        &self,
        shape: &Shape,
        columns: usize,
        at: &mut *const u8,
        from: &mut [*const u8; 1],
        sum_of: &mut Self::Sums,
    ) {
        let (mut p, mut x, mut acc, scale) = (*at, [from[0].cast::<f32>()], *sum_of, self.0.scale);
        let zero = I::splat(0.0);
        let group = if STEPS == 0 { shape.group } else { STEPS * F::STEP };
        let mut k = 0;
        while k < columns {
            let scales = p;
            p = p.add(scale.bytes());
            let mut sums = [[[zero; V]; 1]; 2];
            // The last group may have fewer, by fours, too.
            let len = if STEPS == 0 { group.min(columns - k) } else { group };
            for _ in (0..len).step_by(if STEPS == 0 { 4 * F::STEP } else { group }) {
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
                acc[0][v] = I::fma(sum, s, acc[0][v]);
            }
            k += len;
        }
        (*at, from[0], *sum_of) = (p, x[0].cast(), acc);
    }

    #[inline(always)]
    unsafe fn finish(&self, shape: &Shape, head: *const u8, acc: &Self::Sums, out: &mut [[f32; PANEL]]) {
        // SAFETY: as the caller promises.
        unsafe { self.0.finish(shape, head, acc, out) }
    }
}

/// All rows for tokens `t .. t + M`.
///
/// # Safety
///
/// As for [`tokens`].
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)]
unsafe fn tile<I: PairDots, F: Pairs, const M: usize>(job: &mut Job<'_>, t: usize, scale: GroupScale, fetch: bool) {
    slab::panels(job, t, &Rows::<I, F, M>::of(job, t, scale, fetch))
}

/// See [`tile`].
struct Rows<I, F, const M: usize> {
    /// The tokens' pairs, behind their heads.
    x: [*const u8; M],
    heads: [f32; M],
    /// That of the shape.
    scale: GroupScale,
    /// Whether to ask for memory ahead.
    fetch: bool,
    kind: PhantomData<(I, F)>,
}

impl<I: PairDots, F: Pairs, const M: usize> Rows<I, F, M> {
    /// Tokens `t .. t + M`.
    ///
    /// # Safety
    ///
    /// As for [`tokens`].
    #[inline(always)]
    #[allow(unsafe_op_in_unsafe_fn)]
    unsafe fn of(job: &Job<'_>, t: usize, scale: GroupScale, fetch: bool) -> Self {
        let (mut x, mut heads) = ([std::ptr::null(); M], [0f32; M]);
        for m in 0..M {
            heads[m] = job.x[t + m].read();
            x[m] = job.x[t + m].add(HEAD).cast();
        }
        Self { x, heads, scale, fetch, kind: PhantomData }
    }
}

impl<I: PairDots, F: Pairs, const M: usize> Tile<M> for Rows<I, F, M> {
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
        acc: &mut Self::Sums,
    ) {
        let (mut p, mut x, scale) = (*at, from.map(|x| x.cast::<f32>()), self.scale);
        let mut k = 0;
        while k < columns {
            let len = shape.group.min(columns - k);
            let scales = p;
            p = p.add(scale.bytes());
            let mut sums = [[[I::splat(0.0); V]; M]; 2];
            for _ in 0..len.div_ceil(F::STEP) {
                if self.fetch {
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
            // Results of single groups are added up in memory: the registers are the group's.
            for v in 0..V {
                let s = if scale == GroupScale::None { I::splat(1.0) } else { scale.load::<I>(scales, v * I::LANES) };
                for m in 0..M {
                    let sum = if F::STEP == 2 { sums[0][m][v] } else { I::add(sums[0][m][v], sums[1][m][v]) };
                    acc[m][v] = I::fma(sum, s, acc[m][v]);
                }
            }
            k += len;
        }
        *at = p;
        *from = x.map(|x| x.cast());
    }

    #[inline(always)]
    #[allow(unsafe_op_in_unsafe_fn, clippy::needless_range_loop)]
    unsafe fn finish(&self, shape: &Shape, head: *const u8, acc: &Self::Sums, out: &mut [[f32; PANEL]]) {
        for v in 0..V {
            for m in 0..M {
                let y = I::mul(acc[m][v], I::splat(self.heads[m]));
                finish::<I>(shape, head, v * I::LANES, y, &mut out[m]);
            }
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
