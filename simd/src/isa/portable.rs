//! Eight lanes in plain Rust.
// Every function here is unsafe under the one contract stated at `Isa`.
#![allow(unsafe_op_in_unsafe_fn)]

use super::{E2M1_BYTES, Isa};
use crate::math;
use crate::number::{E4M3, E8M0};

/// Whatever the compiler makes of arrays.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

const N: usize = 8;

#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> [f32; N] {
    std::array::from_fn(f)
}

#[inline(always)]
unsafe fn u16_at(p: *const u8, i: usize) -> u16 {
    u16::from_le_bytes(p.add(2 * i).cast::<[u8; 2]>().read())
}

impl Isa for Portable {
    const LANES: usize = N;
    type V = [f32; N];
    // Widened, and a sum for every column of four: what compilers vectorise without special instructions.
    type Bytes = [i16; 4 * N];
    type Products = [i16; 4 * N];
    type Ints = [i32; N];

    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; N] {
        [x; N]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> [f32; N] {
        p.cast::<[f32; N]>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: [f32; N]) {
        p.cast::<[f32; N]>().write_unaligned(v)
    }
    #[inline(always)]
    unsafe fn fma(a: [f32; N], b: [f32; N], c: [f32; N]) -> [f32; N] {
        // Not mul_add: without the instruction that is a library call per lane.
        each(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; N], b: [f32; N]) -> [f32; N] {
        each(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn add(a: [f32; N], b: [f32; N]) -> [f32; N] {
        each(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: [f32; N], b: [f32; N]) -> [f32; N] {
        each(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn f16(p: *const u8) -> [f32; N] {
        each(|i| math::f16(u16_at(p, i)))
    }
    #[inline(always)]
    unsafe fn bf16(p: *const u8) -> [f32; N] {
        each(|i| f32::from_bits(u32::from(u16_at(p, i)) << 16))
    }
    #[inline(always)]
    unsafe fn i8(p: *const u8) -> [f32; N] {
        each(|i| f32::from(p.add(i).read() as i8))
    }
    #[inline(always)]
    unsafe fn u8(p: *const u8) -> [f32; N] {
        each(|i| f32::from(p.add(i).read()))
    }
    #[inline(always)]
    unsafe fn e4m3(p: *const u8) -> [f32; N] {
        each(|i| E4M3[p.add(i).read() as usize] * (1.0 / 256.0))
    }
    #[inline(always)]
    unsafe fn e8m0(p: *const u8) -> [f32; N] {
        each(|i| E8M0[p.add(i).read() as usize])
    }
    #[inline(always)]
    unsafe fn bf16x2(p: *const u8) -> ([f32; N], [f32; N]) {
        (
            each(|i| f32::from_bits(u32::from(u16_at(p, 2 * i)) << 16)),
            each(|i| f32::from_bits(u32::from(u16_at(p, 2 * i + 1)) << 16)),
        )
    }
    #[inline(always)]
    unsafe fn e4m3x4(p: *const u8) -> [[f32; N]; 4] {
        std::array::from_fn(|k| each(|i| E4M3[p.add(4 * i + k).read() as usize] * f32::from_bits(7 << 23)))
    }
    #[inline(always)]
    unsafe fn nibbles<const HIGH: bool>(p: *const u8) -> [i16; 4 * N] {
        let bytes = p.cast::<[u8; 4 * N]>().read();
        std::array::from_fn(|i| i16::from(if HIGH { bytes[i] >> 4 } else { bytes[i] & 0xf }))
    }
    #[inline(always)]
    unsafe fn e2m1<const HIGH: bool>(p: *const u8) -> [i16; 4 * N] {
        let codes = Self::nibbles::<HIGH>(p);
        codes.map(|c| i16::from(E2M1_BYTES[usize::from(c as u8 & 0xf)]))
    }
    #[inline(always)]
    unsafe fn four(p: *const u8) -> [i16; 4 * N] {
        let x = p.cast::<[i8; 4]>().read();
        std::array::from_fn(|i| i16::from(x[i % 4]))
    }
    #[inline(always)]
    unsafe fn no_products() -> [i16; 4 * N] {
        [0; 4 * N]
    }
    #[inline(always)]
    unsafe fn add_products(sums: [i16; 4 * N], unsigned: [i16; 4 * N], signed: [i16; 4 * N]) -> [i16; 4 * N] {
        std::array::from_fn(|i| sums[i].wrapping_add(unsigned[i].wrapping_mul(signed[i])))
    }
    #[inline(always)]
    unsafe fn total([p2, p1, p0]: [[i16; 4 * N]; 3]) -> [i32; N] {
        let sum = |p: &[i16; 4 * N], i: usize| p[4 * i..4 * i + 4].iter().map(|s| i32::from(*s)).sum::<i32>();
        std::array::from_fn(|i| (sum(&p2, i) << 14) + (sum(&p1, i) << 7) + sum(&p0, i))
    }
    const BIAS: i32 = 128;
    const DEPTH: usize = 1;
    #[inline(always)]
    unsafe fn bytes(p: *const u8) -> [i16; 4 * N] {
        p.cast::<[u8; 4 * N]>().read().map(|c| i16::from(c) - 128)
    }
    #[inline(always)]
    unsafe fn dot<const S: usize>(mut sum: [i32; N], w: [[i16; 4 * N]; S], x: [[i16; 4 * N]; S], _: bool) -> [i32; N] {
        for (w, x) in w.iter().zip(&x) {
            let product = |i: usize| i32::from(w[i]) * i32::from(x[i]);
            sum = std::array::from_fn(|i| {
                sum[i] + product(4 * i) + product(4 * i + 1) + product(4 * i + 2) + product(4 * i + 3)
            });
        }
        sum
    }
    #[inline(always)]
    unsafe fn splat_int(x: i32) -> [i32; N] {
        [x; N]
    }
    #[inline(always)]
    unsafe fn u8_int(p: *const u8) -> [i32; N] {
        std::array::from_fn(|i| i32::from(p.add(i).read()))
    }
    #[inline(always)]
    unsafe fn corrected(total: [i32; N], zero: [i32; N], sum: [i32; N]) -> [i32; N] {
        std::array::from_fn(|i| total[i] - zero[i] * sum[i])
    }
    #[inline(always)]
    unsafe fn to_float(x: [i32; N]) -> [f32; N] {
        each(|i| x[i] as f32)
    }
    #[inline(always)]
    fn anew(p: *const u8) -> *const u8 {
        p
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
}
