//! Sixteen lanes with AVX-512 F and BW, and with VNNI and VBMI where there are those.
// Every function here is unsafe under the one contract stated at `Isa`.
#![allow(unsafe_op_in_unsafe_fn)]

use super::{E2M1_BYTES, Isa, anew};
use std::arch::x86_64::*;

/// 512-bit vectors; whether the processor has VNNI too, and VBMI.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const VNNI: bool, const VBMI: bool = false>;

impl<const VNNI: bool, const VBMI: bool> Isa for Avx512<VNNI, VBMI> {
    const LANES: usize = 16;
    type V = __m512;
    type Bytes = __m512i;
    type Products = __m512i;
    type Ints = __m512i;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        _mm512_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn each<const AT: usize>(p: *const f32) -> __m512 {
        _mm512_castsi512_ps(each::<AT>(p))
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        _mm512_loadu_ps(p)
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        _mm512_storeu_ps(p, v)
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        _mm512_sub_ps(a, b)
    }
    #[inline(always)]
    unsafe fn f16(p: *const u8) -> __m512 {
        _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))
    }
    #[inline(always)]
    unsafe fn bf16(p: *const u8) -> __m512 {
        _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())), 16))
    }
    #[inline(always)]
    unsafe fn i8(p: *const u8) -> __m512 {
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())))
    }
    #[inline(always)]
    unsafe fn u8(p: *const u8) -> __m512 {
        _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())))
    }
    #[inline(always)]
    unsafe fn e4m3(p: *const u8) -> __m512 {
        let wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast())), 7);
        _mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16(0xbf80_u16 as i16)))
    }
    #[inline(always)]
    unsafe fn e8m0(p: *const u8) -> __m512 {
        let bits = _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())), 23);
        // Code 0 is 2^-127, a subnormal.
        _mm512_castsi512_ps(_mm512_max_epi32(bits, _mm512_set1_epi32(0x0040_0000)))
    }
    #[inline(always)]
    unsafe fn bf16x2(p: *const u8) -> (__m512, __m512) {
        halves(_mm512_loadu_si512(p.cast()))
    }
    #[inline(always)]
    unsafe fn e4m3x4(p: *const u8) -> [__m512; 4] {
        let b = _mm512_loadu_si512(p.cast());
        // In every 16 bits: the sign where it was, exponent and mantissa in the low bits of bf16's.
        let odd = _mm512_srai_epi16(b, 4);
        let even = _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 4);
        [float(_mm512_slli_epi32(even, 16)), float(_mm512_slli_epi32(odd, 16)), float(even), float(odd)]
    }
    #[inline(always)]
    unsafe fn nibbles<const HIGH: bool>(p: *const u8) -> __m512i {
        let bytes = _mm512_loadu_si512(p.cast());
        let bytes = if HIGH { _mm512_srli_epi16(bytes, 4) } else { bytes };
        _mm512_and_si512(bytes, _mm512_set1_epi8(0xf))
    }
    #[inline(always)]
    unsafe fn e2m1<const HIGH: bool>(p: *const u8) -> __m512i {
        if VBMI {
            // Six bits of each byte are looked at, with the table four times: no need to clear the upper two.
            let codes = _mm512_loadu_si512(p.cast());
            let codes = if HIGH { _mm512_srli_epi16(codes, 4) } else { codes };
            return _mm512_permutexvar_epi8(codes, table(&E2M1_BYTES));
        }
        let codes = Self::nibbles::<HIGH>(p);
        _mm512_shuffle_epi8(table(&E2M1_BYTES), codes)
    }
    #[inline(always)]
    unsafe fn four(p: *const u8) -> __m512i {
        _mm512_set1_epi32(p.cast::<i32>().read_unaligned())
    }
    #[inline(always)]
    unsafe fn no_products() -> __m512i {
        _mm512_setzero_si512()
    }
    const WIDE_SUMS: bool = VNNI;
    #[inline(always)]
    unsafe fn products(p: *const u8) -> __m512i {
        if VNNI { Self::four(p) } else { Self::no_products() }
    }
    #[inline(always)]
    unsafe fn add_products(sums: __m512i, unsigned: __m512i, signed: __m512i) -> __m512i {
        match VNNI {
            true => _mm512_dpbusd_epi32(sums, unsigned, signed),
            false => _mm512_add_epi16(sums, _mm512_maddubs_epi16(unsigned, signed)),
        }
    }
    #[inline(always)]
    unsafe fn total([p2, p1, p0]: [__m512i; 3]) -> __m512i {
        if VNNI {
            let high = _mm512_add_epi32(_mm512_slli_epi32::<7>(p2), p1);
            return _mm512_add_epi32(_mm512_slli_epi32::<7>(high), p0);
        }
        let p2 = _mm512_madd_epi16(p2, _mm512_set1_epi16(1 << 14));
        let p1 = _mm512_madd_epi16(p1, _mm512_set1_epi16(1 << 7));
        let p0 = _mm512_madd_epi16(p0, _mm512_set1_epi16(1));
        _mm512_add_epi32(p2, _mm512_add_epi32(p1, p0))
    }
    const BIAS: i32 = if VNNI { 0 } else { 128 };
    const DEPTH: usize = if VNNI { 1 } else { 4 };
    #[inline(always)]
    unsafe fn bytes(p: *const u8) -> __m512i {
        let codes = _mm512_loadu_si512(p.cast());
        if VNNI { codes } else { _mm512_xor_si512(codes, _mm512_set1_epi8(-128)) }
    }
    #[inline(always)]
    unsafe fn dot<const N: usize>(mut sum: __m512i, w: [__m512i; N], x: [__m512i; N], small: bool) -> __m512i {
        let ones = _mm512_set1_epi16(1);
        if !VNNI && small {
            // 16 bits hold 8 products of 24 and 127.
            let mut s = _mm512_maddubs_epi16(w[0], x[0]);
            for i in 1..N {
                s = _mm512_add_epi16(s, _mm512_maddubs_epi16(w[i], x[i]));
            }
            return _mm512_add_epi32(sum, _mm512_madd_epi16(s, ones));
        }
        for i in 0..N {
            if VNNI {
                sum = _mm512_dpbusd_epi32(sum, w[i], x[i]);
            } else {
                // |w| times x with w's sign: 16 bits hold twice 128 * 127.
                let negative = _mm512_movepi8_mask(w[i]);
                let x = _mm512_mask_sub_epi8(x[i], negative, _mm512_setzero_si512(), x[i]);
                let s = _mm512_maddubs_epi16(_mm512_abs_epi8(w[i]), x);
                sum = _mm512_add_epi32(sum, _mm512_madd_epi16(s, ones));
            }
        }
        sum
    }
    #[inline(always)]
    unsafe fn splat_int(x: i32) -> __m512i {
        _mm512_set1_epi32(x)
    }
    #[inline(always)]
    unsafe fn u8_int(p: *const u8) -> __m512i {
        _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()))
    }
    #[inline(always)]
    unsafe fn corrected(total: __m512i, zero: __m512i, sum: __m512i) -> __m512i {
        _mm512_sub_epi32(total, _mm512_mullo_epi32(zero, sum))
    }
    #[inline(always)]
    unsafe fn to_float(x: __m512i) -> __m512 {
        _mm512_cvtepi32_ps(x)
    }
    #[inline(always)]
    fn anew(p: *const u8) -> *const u8 {
        anew(p)
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(p.cast())
    }
}

/// Element `AT` in every lane. Of such a load, where floats are wanted, compilers make `vbroadcastss`, which on Zen 4 keeps a
/// shuffling unit busy for as long as a permutation does; this one is but a load.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn each<const AT: usize>(p: *const f32) -> __m512i {
    let v;
    // SAFETY: it reads the four bytes of that element, which the caller promises, and does nothing else.
    std::arch::asm!(
        "vpbroadcastd {v}, dword ptr [{p} + {at}]",
        v = lateout(zmm_reg) v,
        p = in(reg) p,
        at = const 4 * AT,
        options(pure, readonly, nostack, preserves_flags)
    );
    v
}

/// Sixteen bytes to look up, in every 128 bits. (Not a closure: one that is not inlined calls intrinsics as functions.)
#[inline(always)]
unsafe fn table(t: &[u8; 16]) -> __m512i {
    _mm512_broadcast_i32x4(_mm_loadu_si128(t.as_ptr().cast()))
}

/// Dwords of two bf16 to float32.
#[inline(always)]
unsafe fn halves(v: __m512i) -> (__m512, __m512) {
    let high = _mm512_and_si512(v, _mm512_set1_epi32(0xffff_0000_u32 as i32));
    (_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)), _mm512_castsi512_ps(high))
}

/// Of the high half of every dword, the bits that an e4m3 code's are moved to.
#[inline(always)]
unsafe fn float(v: __m512i) -> __m512 {
    _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(0x87f0_0000_u32 as i32)))
}
