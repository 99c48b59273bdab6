//! Eight lanes in plain Rust.
// Every function here is unsafe under the one contract stated at `Isa`.
#![allow(unsafe_op_in_unsafe_fn)]

use super::Isa;
use crate::scheme::number::{E4M3, E8M0};

/// Whatever the compiler makes of arrays.
#[derive(Clone, Copy)]
pub(in super::super) struct Portable;

const N: usize = 8;

#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> [f32; N] {
    std::array::from_fn(f)
}

#[inline(always)]
unsafe fn u16_at(p: *const u8, i: usize) -> u16 {
    u16::from_le_bytes(p.add(2 * i).cast::<[u8; 2]>().read())
}

/// Where column `k` of row `i` lies, 4 columns being a step (or half of one).
#[inline(always)]
fn pair_byte(i: usize, k: usize) -> usize {
    i / 4 * 16 + (k & 2) * 4 + i % 4 * 2 + (k & 1)
}

impl Isa for Portable {
    const LANES: usize = N;
    type V = [f32; N];
    type Lut = [f32; 16];

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
        each(|i| half::f16::from_bits(u16_at(p, i)).to_f32())
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
    unsafe fn lut(t: &[u16; 16]) -> [f32; 16] {
        std::array::from_fn(|i| f32::from_bits(u32::from(t[i]) << 16))
    }
    #[inline(always)]
    unsafe fn nibbles<const HIGH: bool>(p: *const u8, lut: [f32; 16]) -> [[f32; N]; 4] {
        std::array::from_fn(|k| {
            each(|i| {
                let byte = p.add(pair_byte(i, k)).read();
                lut[usize::from(if HIGH { byte >> 4 } else { byte & 0xf })]
            })
        })
    }
    #[inline(always)]
    unsafe fn e4m3x4(p: *const u8) -> [[f32; N]; 4] {
        std::array::from_fn(|k| each(|i| E4M3[p.add(pair_byte(i, k)).read() as usize]))
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
}
