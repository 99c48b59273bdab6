//! The few vector operations that the kernels are written in, once per instruction set.

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
pub(super) mod portable;

/// A vector of `LANES` float32, the lanes being consecutive rows of a panel.
///
/// # Safety
///
/// For every function: the processor has the instruction set (checked once, in `SimdExperts::new`), and a pointer may
/// be read (or written) for as many bytes as `LANES` elements of the named type take; no alignment is needed.
pub(super) trait Isa: Copy {
    /// Divides 32.
    const LANES: usize;
    /// The vector.
    type V: Copy;
    /// Sixteen bf16 values for 4-bit codes.
    type Lut: Copy;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// a * b + c
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    /// float16 to float32
    unsafe fn f16(p: *const u8) -> Self::V;
    /// bfloat16 to float32
    unsafe fn bf16(p: *const u8) -> Self::V;
    /// signed bytes
    unsafe fn i8(p: *const u8) -> Self::V;
    /// unsigned bytes
    unsafe fn u8(p: *const u8) -> Self::V;
    /// e4m3 values divided by 256: their bits moved into float16, whose exponent bias is larger by 8. Exact for
    /// subnormal codes too, and the conversion ignores the flush-to-zero mode.
    unsafe fn e4m3(p: *const u8) -> Self::V;
    /// 2^(code - 127)
    unsafe fn e8m0(p: *const u8) -> Self::V;
    /// Dwords of two bf16 each: the low halves, the high halves.
    unsafe fn bf16x2(p: *const u8) -> (Self::V, Self::V);
    /// Prepares a table.
    unsafe fn lut(t: &[u16; 16]) -> Self::Lut;
    /// `LANES * 4` bytes of 4-bit codes (`LANES` rows by 8 columns, as `pack::put` lays them) to values, by column.
    unsafe fn nibbles(p: *const u8, lut: Self::Lut) -> [Self::V; 8];
    /// Asks for a cache line. Any address will do.
    unsafe fn prefetch(p: *const u8);
}
