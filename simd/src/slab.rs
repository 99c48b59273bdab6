//! The way through panels: two at a time, whose columns alternate in memory a slab at a time. Of a row of activations only what
//! meets a slab is read again and again, and stays in the first-level cache beside it; what meets a whole panel, between 2 and
//! 12 KB, is driven out of there by the panel, and what then comes from the second level, between weights that come from
//! memory, holds those up.

use crate::format::{PANEL, Shape};
use crate::kernel::Job;

/// Panels times the forms of `M` tokens, a slab at a time.
///
/// # Safety
///
/// For every function: as for [`crate::kernel::PanelFn`], the job being the one that the tile was made of.
pub(crate) trait Tile<const M: usize> {
    /// What is kept of a panel from one slab to the next.
    type Sums: Copy;

    /// Where the tokens' forms start.
    fn rows(&self) -> [*const u8; M];

    /// Nothing summed yet.
    unsafe fn none(&self) -> Self::Sums;

    /// Adds the products of a slab of `columns`, at `p`, with forms from `x` on; moves both past it.
    unsafe fn slab(
        &self,
        shape: &Shape,
        columns: usize,
        p: &mut *const u8,
        x: &mut [*const u8; M],
        sums: &mut Self::Sums,
    );

    /// The results of a panel whose head is at `head`, one row of `out` for each token.
    unsafe fn finish(&self, shape: &Shape, head: *const u8, sums: &Self::Sums, out: &mut [[f32; PANEL]]);
}

/// All panels of the job times tokens `t .. t + M`.
///
/// # Safety
///
/// As for [`Tile`]; these tokens exist.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)]
pub(crate) unsafe fn panels<T: Tile<M>, const M: usize>(job: &mut Job<'_>, t: usize, tile: &T) {
    let (shape, slab) = (job.shape, job.shape.slab());
    // Whole panels follow one another.
    let most = if slab < shape.cols { 2 } else { 1 };
    let mut p = job.panel.as_ptr();
    let mut left = job.panels;
    let mut at = t;
    while left > 0 {
        let two = left.min(most);
        let (mut heads, mut sums) = ([p; 2], [tile.none(); 2]);
        let mut x = tile.rows();
        let mut k = 0;
        while k < shape.cols {
            let columns = slab.min(shape.cols - k);
            let start = x;
            for i in 0..two {
                if k == 0 {
                    heads[i] = p;
                    p = p.add(shape.head());
                }
                x = start;
                let mut sum = sums[i];
                tile.slab(shape, columns, &mut p, &mut x, &mut sum);
                sums[i] = sum;
                // At once, while its registers hold them.
                if k + columns == shape.cols {
                    tile.finish(shape, heads[i], &sum, &mut job.out[at + i * job.each..][..M]);
                }
            }
            k += columns;
        }
        at += two * job.each;
        left -= two;
    }
}
