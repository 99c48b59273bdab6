//! Decoding of the packed formats to pairs of bfloat16.

use crate::format::{Bf16, E2m1, E4m3, STEP_4BIT, U4};
use crate::isa::PairDots;
use crate::kernel::{NEAR, PREFETCH};

/// Decoding of codes to pairs of bfloat16 that are their weights (or a multiple of them) exactly.
pub(crate) trait Pairs {
    /// Columns of a step.
    const STEP: usize;
    /// Those of each pair, the first `STEP / 2` of these.
    const ORDER: [[usize; 2]; 4];
    /// See [`crate::format::Nibbles::SMALL_GROUPS`].
    const SMALL_GROUPS: bool;
    /// How far ahead a lone token asks for memory.
    const AHEAD: usize = if Self::STEP == 2 { NEAR } else { PREFETCH };

    /// The first `STEP / 2` are the pairs of `LANES` rows.
    ///
    /// # Safety
    ///
    /// As for [`crate::isa::Isa`]; `p` is the first of these rows in a step.
    unsafe fn decode<I: PairDots>(p: *const u8) -> [I::Pairs; 4];
}

/// As columns follow one another.
const IN_ORDER: [[usize; 2]; 4] = [[0, 1], [2, 3], [4, 5], [6, 7]];
/// As [`PairDots::u4_pairs`] gives them.
const OF_NIBBLES: [[usize; 2]; 4] = [[0, 2], [4, 6], [1, 3], [5, 7]];

macro_rules! pairs {
    ($name:ident, $step:expr, $order:expr, $small:literal, |$p:ident| $body:expr) => {
        impl Pairs for $name {
            const STEP: usize = $step;
            const ORDER: [[usize; 2]; 4] = $order;
            const SMALL_GROUPS: bool = $small;

            #[inline(always)]
            #[allow(unsafe_op_in_unsafe_fn)]
            unsafe fn decode<I: PairDots>($p: *const u8) -> [I::Pairs; 4] {
                $body
            }
        }
    };
}

pairs!(Bf16, 2, IN_ORDER, false, |p| [I::bf16_pairs(p); 4]);
pairs!(E4m3, 4, IN_ORDER, false, |p| {
    let [a, b] = I::e4m3_pairs(p);
    [a, b, a, b]
});
pairs!(E2m1, STEP_4BIT, OF_NIBBLES, true, |p| I::e2m1_pairs(p));
pairs!(U4, STEP_4BIT, OF_NIBBLES, false, |p| I::u4_pairs(p));
