//! Eight lanes with AVX2, FMA and F16C.
// Every function here is unsafe under the one contract stated at `Isa`.
#![allow(unsafe_op_in_unsafe_fn)]

use super::{E2M1_BYTES, Isa, anew};
use std::arch::x86_64::*;

/// 256-bit vectors.
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

impl Isa for Avx2 {
    const LANES: usize = 8;
    type V = __m256;
    type Bytes = __m256i;
    type Products = __m256i;
    type Ints = __m256i;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        _mm256_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m256 {
        _mm256_loadu_ps(p)
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m256) {
        _mm256_storeu_ps(p, v)
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        _mm256_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        _mm256_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        _mm256_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        _mm256_sub_ps(a, b)
    }
    #[inline(always)]
    unsafe fn f16(p: *const u8) -> __m256 {
        _mm256_cvtph_ps(_mm_loadu_si128(p.cast()))
    }
    #[inline(always)]
    unsafe fn bf16(p: *const u8) -> __m256 {
        _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())), 16))
    }
    #[inline(always)]
    unsafe fn i8(p: *const u8) -> __m256 {
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())))
    }
    #[inline(always)]
    unsafe fn u8(p: *const u8) -> __m256 {
        _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())))
    }
    #[inline(always)]
    unsafe fn e4m3(p: *const u8) -> __m256 {
        let wide = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64(p.cast())), 7);
        _mm256_cvtph_ps(_mm_and_si128(wide, _mm_set1_epi16(0xbf80_u16 as i16)))
    }
    #[inline(always)]
    unsafe fn e8m0(p: *const u8) -> __m256 {
        let bits = _mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())), 23);
        // Code 0 is 2^-127, a subnormal.
        _mm256_castsi256_ps(_mm256_max_epi32(bits, _mm256_set1_epi32(0x0040_0000)))
    }
    #[inline(always)]
    unsafe fn bf16x2(p: *const u8) -> (__m256, __m256) {
        halves(_mm256_loadu_si256(p.cast()))
    }
    #[inline(always)]
    unsafe fn e4m3x4(p: *const u8) -> [__m256; 4] {
        let b = _mm256_loadu_si256(p.cast());
        // In every 16 bits: the sign where it was, exponent and mantissa in the low bits of bf16's.
        let odd = _mm256_srai_epi16(b, 4);
        let even = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 4);
        [float(_mm256_slli_epi32(even, 16)), float(_mm256_slli_epi32(odd, 16)), float(even), float(odd)]
    }
    #[inline(always)]
    unsafe fn nibbles<const HIGH: bool>(p: *const u8) -> __m256i {
        let bytes = _mm256_loadu_si256(p.cast());
        let bytes = if HIGH { _mm256_srli_epi16(bytes, 4) } else { bytes };
        _mm256_and_si256(bytes, _mm256_set1_epi8(0xf))
    }
    #[inline(always)]
    unsafe fn e2m1<const HIGH: bool>(p: *const u8) -> __m256i {
        let codes = Self::nibbles::<HIGH>(p);
        _mm256_shuffle_epi8(table(&E2M1_BYTES), codes)
    }
    #[inline(always)]
    unsafe fn four(p: *const u8) -> __m256i {
        _mm256_set1_epi32(p.cast::<i32>().read_unaligned())
    }
    #[inline(always)]
    unsafe fn no_products() -> __m256i {
        _mm256_setzero_si256()
    }
    #[inline(always)]
    unsafe fn add_products(sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
        _mm256_add_epi16(sums, _mm256_maddubs_epi16(unsigned, signed))
    }
    #[inline(always)]
    unsafe fn total([p2, p1, p0]: [__m256i; 3]) -> __m256i {
        let p2 = _mm256_madd_epi16(p2, _mm256_set1_epi16(1 << 14));
        let p1 = _mm256_madd_epi16(p1, _mm256_set1_epi16(1 << 7));
        let p0 = _mm256_madd_epi16(p0, _mm256_set1_epi16(1));
        _mm256_add_epi32(p2, _mm256_add_epi32(p1, p0))
    }
    const BIAS: i32 = 128;
    const DEPTH: usize = 4;
    #[inline(always)]
    unsafe fn bytes(p: *const u8) -> __m256i {
        _mm256_xor_si256(_mm256_loadu_si256(p.cast()), _mm256_set1_epi8(-128))
    }
    #[inline(always)]
    unsafe fn dot<const N: usize>(mut sum: __m256i, w: [__m256i; N], x: [__m256i; N], small: bool) -> __m256i {
        let ones = _mm256_set1_epi16(1);
        if small {
            // 16 bits hold 8 products of 24 and 127.
            let mut s = _mm256_maddubs_epi16(w[0], x[0]);
            for i in 1..N {
                s = _mm256_add_epi16(s, _mm256_maddubs_epi16(w[i], x[i]));
            }
            return _mm256_add_epi32(sum, _mm256_madd_epi16(s, ones));
        }
        for i in 0..N {
            // |w| times x with w's sign: 16 bits hold twice 128 * 127.
            let s = _mm256_maddubs_epi16(_mm256_abs_epi8(w[i]), _mm256_sign_epi8(x[i], w[i]));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(s, ones));
        }
        sum
    }
    #[inline(always)]
    unsafe fn splat_int(x: i32) -> __m256i {
        _mm256_set1_epi32(x)
    }
    #[inline(always)]
    unsafe fn u8_int(p: *const u8) -> __m256i {
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()))
    }
    #[inline(always)]
    unsafe fn corrected(total: __m256i, zero: __m256i, sum: __m256i) -> __m256i {
        _mm256_sub_epi32(total, _mm256_mullo_epi32(zero, sum))
    }
    #[inline(always)]
    unsafe fn to_float(x: __m256i) -> __m256 {
        _mm256_cvtepi32_ps(x)
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

/// Sixteen bytes to look up, in every 128 bits. (Not a closure: one that is not inlined calls intrinsics as functions.)
#[inline(always)]
unsafe fn table(t: &[u8; 16]) -> __m256i {
    _mm256_broadcastsi128_si256(_mm_loadu_si128(t.as_ptr().cast()))
}

/// Dwords of two bf16 to float32.
#[inline(always)]
unsafe fn halves(v: __m256i) -> (__m256, __m256) {
    let high = _mm256_and_si256(v, _mm256_set1_epi32(0xffff_0000_u32 as i32));
    (_mm256_castsi256_ps(_mm256_slli_epi32(v, 16)), _mm256_castsi256_ps(high))
}

/// Of the high half of every dword, the bits that an e4m3 code's are moved to.
#[inline(always)]
unsafe fn float(v: __m256i) -> __m256 {
    _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(0x87f0_0000_u32 as i32)))
}
