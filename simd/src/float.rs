//! The micro-kernel of float32 products: panels, decoded to float32, times the rows of some tokens.
//!
//! Lanes are rows of the panel and K runs sequentially, so that each output is two chains of multiply-adds (even and odd
//! columns) in an order that depends on nothing but the matrix: any tile of tokens gives the same bits.

use crate::format::{Format, GroupScale, PANEL, STEP_BYTES, Shape};
use crate::isa::Isa;
use crate::kernel::{Job, PREFETCH, finish};
use crate::scaled;
use crate::slab::{self, Tile};
use std::marker::PhantomData;
use std::ops::Range;

/// `V` vectors of rows from `row` on for `M` tokens.
struct Rows<I, F, const M: usize, const V: usize> {
    row: usize,
    /// The tokens' rows, behind their heads.
    x: [*const u8; M],
    heads: [f32; M],
    /// Whether to ask for memory ahead.
    fetch: bool,
    kind: PhantomData<(I, F)>,
}

impl<I: Isa, F: Format, const M: usize, const V: usize> Rows<I, F, M, V> {
    /// A whole step, and past it.
    ///
    /// # Safety
    ///
    /// As for [`step`].
    #[inline(always)]
    #[allow(unsafe_op_in_unsafe_fn)]
    unsafe fn step(
        &self,
        fetch: bool,
        p: &mut *const u8,
        zeros: &[I::V; V],
        x: &mut [*const f32; M],
        sums: &mut [[[I::V; V]; M]; 2],
    ) {
        if fetch {
            let ahead = p.wrapping_add(if M > 1 { PREFETCH } else { F::AHEAD });
            I::prefetch(ahead);
            I::prefetch(ahead.wrapping_add(64));
        }
        step::<I, F, M, V>(*p, self.row, zeros, x, sums);
        *p = p.add(STEP_BYTES);
        for x in x {
            *x = x.add(F::STEP);
        }
    }
}

impl<I: Isa, F: Format, const M: usize, const V: usize> Tile<M> for Rows<I, F, M, V> {
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
        let (group, scale, row, zero) = (shape.group, shape.scale, self.row, I::splat(0.0));
        let mut p = *at;
        let mut x = from.map(|x| x.cast::<f32>());
        let mut k = 0;
        while k < columns {
            let len = group.min(columns - k);
            let scales = p;
            p = p.add(scale.bytes());
            let mut zeros = [zero; V];
            if F::ZERO {
                for v in 0..V {
                    zeros[v] = I::u8(p.add(row + v * I::LANES));
                }
                p = p.add(PANEL);
            }
            let mut sums = [[[zero; V]; M]; 2];
            let mut steps = len / F::STEP;
            // Of few tokens a step is short: four without a branch between them keep more loads under way.
            while M <= 2 && I::LANES == 16 && self.fetch && steps >= 4 {
                for _ in 0..4 {
                    self.step(true, &mut p, &zeros, &mut x, &mut sums);
                }
                steps -= 4;
            }
            for _ in 0..steps {
                self.step(self.fetch, &mut p, &zeros, &mut x, &mut sums);
            }
            let rest = len % F::STEP;
            if rest > 0 {
                // The step's other columns meet zeros: they are neither this group's nor, at the end, there at all.
                let mut tail = [[0f32; 4]; M];
                let mut tail_x = [std::ptr::null::<f32>(); M];
                for m in 0..M {
                    for i in 0..rest {
                        tail[m][i] = x[m].add(i).read();
                    }
                    tail_x[m] = tail[m].as_ptr();
                    x[m] = x[m].add(rest);
                }
                step::<I, F, M, V>(p, row, &zeros, &tail_x, &mut sums);
                p = p.add(STEP_BYTES);
            }
            k += len;
            // Results of single groups are added up in memory: the registers are the group's.
            for v in 0..V {
                let s =
                    if scale == GroupScale::None { I::splat(1.0) } else { scale.load::<I>(scales, row + v * I::LANES) };
                for m in 0..M {
                    acc[m][v] = I::fma(I::add(sums[0][m][v], sums[1][m][v]), s, acc[m][v]);
                }
            }
        }
        *at = p;
        *from = x.map(|x| x.cast());
    }

    #[inline(always)]
    #[allow(unsafe_op_in_unsafe_fn, clippy::needless_range_loop)]
    unsafe fn finish(&self, shape: &Shape, head: *const u8, acc: &Self::Sums, out: &mut [[f32; PANEL]]) {
        for v in 0..V {
            for m in 0..M {
                let y = if F::SCALED { I::mul(acc[m][v], I::splat(self.heads[m])) } else { acc[m][v] };
                finish::<I>(shape, head, self.row + v * I::LANES, y, &mut out[m]);
            }
        }
    }
}

/// # Safety
///
/// As for [`crate::kernel::PanelFn`]; tokens `t .. t + M` exist and `row + V * LANES <= 32`.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn, clippy::needless_range_loop)]
unsafe fn tile<I: Isa, F: Format, const M: usize, const V: usize>(job: &mut Job<'_>, t: usize, row: usize) {
    let (mut x, mut heads) = ([std::ptr::null(); M], [1f32; M]);
    for m in 0..M {
        x[m] = job.x[t + m].cast::<u8>();
        if F::SCALED {
            heads[m] = job.x[t + m].read();
            x[m] = job.x[t + m].add(scaled::HEAD).cast();
        }
    }
    slab::panels(job, t, &Rows::<I, F, M, V> { row, x, heads, fetch: t == 0, kind: PhantomData })
}

/// Adds a step to the sums: with sixteen lanes those over even and those over odd columns, for two chains of dependent
/// operations hide more latency than one; with fewer lanes, whose vectors are more and registers fewer, to the first.
/// Each output sees the same operations in the same order whatever M and V are.
///
/// # Safety
///
/// As for [`tile`]; `p` is a step and each of `x` can be read for `STEP` elements.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn, clippy::needless_range_loop)]
unsafe fn step<I: Isa, F: Format, const M: usize, const V: usize>(
    p: *const u8,
    row: usize,
    zeros: &[I::V; V],
    x: &[*const f32; M],
    sums: &mut [[[I::V; V]; M]; 2],
) {
    let mut w = [[zeros[0]; 4]; V];
    for v in 0..V {
        F::decode::<I>(p, row + v * I::LANES, &mut w[v]);
        if F::ZERO {
            for k in 0..F::STEP {
                w[v][k] = I::sub(w[v][k], zeros[v]);
            }
        }
        // A single token uses each value once, right here, before it could leave its register.
        if M == 1 {
            columns::<I, F, M, V>(&w, v..v + 1, x, sums);
        }
    }
    if M > 1 {
        columns::<I, F, M, V>(&w, 0..V, x, sums);
    }
}

/// Adds the products of the step's columns, of these vectors of rows.
///
/// # Safety
///
/// As for [`step`].
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)]
unsafe fn columns<I: Isa, F: Format, const M: usize, const V: usize>(
    w: &[[I::V; 4]; V],
    rows: Range<usize>,
    x: &[*const f32; M],
    sums: &mut [[[I::V; V]; M]; 2],
) {
    column::<I, F, M, V, 0>(w, rows.clone(), x, sums);
    column::<I, F, M, V, 1>(w, rows.clone(), x, sums);
    column::<I, F, M, V, 2>(w, rows.clone(), x, sums);
    column::<I, F, M, V, 3>(w, rows, x, sums);
}

/// The same of column `K`, if a step has so many.
///
/// # Safety
///
/// As for [`step`].
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn, clippy::needless_range_loop)]
unsafe fn column<I: Isa, F: Format, const M: usize, const V: usize, const K: usize>(
    w: &[[I::V; 4]; V],
    rows: Range<usize>,
    x: &[*const f32; M],
    sums: &mut [[[I::V; V]; M]; 2],
) {
    if K >= F::STEP {
        return;
    }
    let chain = if I::LANES == 16 { K % 2 } else { 0 };
    for m in 0..M {
        let x = I::each::<K>(x[m]);
        for v in rows.clone() {
            sums[chain][m][v] = I::fma(w[v][K], x, sums[chain][m][v]);
        }
    }
}

/// Panels times the rows `job.x`.
///
/// # Safety
///
/// As for [`crate::kernel::PanelFn`].
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)]
pub(crate) unsafe fn panel<I: Isa, F: Format>(job: &mut Job<'_>) {
    let tokens = job.x.len();
    let mut t = 0;
    if I::LANES == 16 {
        // Up to 24 sums in 32 registers.
        while t < tokens {
            // Tiles of nearly the same size: few tokens for a weight leave the arithmetic idle while it is decoded.
            let m = (tokens - t).div_ceil((tokens - t).div_ceil(6));
            match m {
                1 => tile::<I, F, 1, 2>(job, t, 0),
                2 => tile::<I, F, 2, 2>(job, t, 0),
                3 => tile::<I, F, 3, 2>(job, t, 0),
                4 => tile::<I, F, 4, 2>(job, t, 0),
                5 => tile::<I, F, 5, 2>(job, t, 0),
                _ => tile::<I, F, 6, 2>(job, t, 0),
            }
            t += m;
        }
        return;
    }
    while t < tokens {
        let m = (tokens - t).min(4);
        if m == 1 {
            // All rows at once: the panel is read in one go.
            tile::<I, F, 1, 4>(job, t, 0);
        }
        let mut row = 0;
        while m > 1 && row < PANEL {
            match m {
                2 => tile::<I, F, 2, 2>(job, t, row),
                3 => tile::<I, F, 3, 2>(job, t, row),
                _ => tile::<I, F, 4, 2>(job, t, row),
            }
            row += 2 * I::LANES;
        }
        t += m;
    }
}
