//! What AVX-512 BF16 and VBMI add to sixteen lanes.
// Every function here is unsafe under the one contract stated at `Isa`.
#![allow(unsafe_op_in_unsafe_fn)]

use super::avx512::{Avx512, each};
use super::{E2M1_PAIRS, E4M3_PAIRS, PairDots, U4_PAIRS};
use std::arch::x86_64::*;

impl PairDots for Avx512<true, true> {
    type Pairs = __m512i;

    #[inline(always)]
    unsafe fn pair<const AT: usize>(p: *const f32) -> __m512i {
        each::<AT>(p)
    }
    #[inline(always)]
    unsafe fn dot_pairs(sum: __m512, w: __m512i, x: __m512i) -> __m512 {
        _mm512_dpbf16_ps(sum, bf16(w), bf16(x))
    }
    #[inline(always)]
    unsafe fn bf16_pairs(p: *const u8) -> __m512i {
        _mm512_loadu_si512(p.cast())
    }
    #[inline(always)]
    unsafe fn e4m3_pairs(p: *const u8) -> [__m512i; 2] {
        // In every 128 bits, 4 rows: their first two columns, then the others, as the interleaving below wants them.
        let order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
        let codes = _mm512_shuffle_epi8(_mm512_loadu_si512(p.cast()), order);
        let [low, high] = &E4M3_PAIRS;
        let low = _mm512_permutex2var_epi8(load(&low[..64]), codes, load(&low[64..]));
        let high = _mm512_permutex2var_epi8(load(&high[..64]), codes, load(&high[64..]));
        // high | codes & 0x80
        let high = _mm512_ternarylogic_epi32::<0xf8>(high, codes, _mm512_set1_epi8(-128));
        [_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)]
    }
    #[inline(always)]
    unsafe fn e2m1_pairs(p: *const u8) -> [__m512i; 4] {
        nibbles(p, &E2M1_PAIRS)
    }
    #[inline(always)]
    unsafe fn u4_pairs(p: *const u8) -> [__m512i; 4] {
        nibbles(p, &U4_PAIRS)
    }
}

#[inline(always)]
unsafe fn bf16(v: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits, of which any are good.
    std::mem::transmute(v)
}

#[inline(always)]
unsafe fn load(bytes: &[u8]) -> __m512i {
    debug_assert_eq!(bytes.len(), 64);
    _mm512_loadu_si512(bytes.as_ptr().cast())
}

/// Looks up every 4 bits of each 16, lowest first. The instruction takes 5 bits: the table says the same twice.
#[inline(always)]
unsafe fn nibbles(p: *const u8, table: &[u16; 32]) -> [__m512i; 4] {
    let codes = _mm512_loadu_si512(p.cast());
    let table = _mm512_loadu_si512(table.as_ptr().cast());
    [
        _mm512_permutexvar_epi16(codes, table),
        _mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(codes), table),
        _mm512_permutexvar_epi16(_mm512_srli_epi16::<8>(codes), table),
        _mm512_permutexvar_epi16(_mm512_srli_epi16::<12>(codes), table),
    ]
}
