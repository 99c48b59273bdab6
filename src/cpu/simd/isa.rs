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
    /// `LANES * 4` bytes of 4-bit codes (`LANES` rows by 8 columns, as `pack::codes` lays them) to values, by column:
    /// the four of the low nibbles or the four of the high ones.
    unsafe fn nibbles<const HIGH: bool>(p: *const u8, lut: Self::Lut) -> [Self::V; 4];
    /// `LANES * 4` bytes of e4m3 codes (`LANES` rows by 4 columns, laid out as 4-bit pairs are) to values, by column.
    unsafe fn e4m3x4(p: *const u8) -> [Self::V; 4];
    /// Asks for a cache line. Any address will do.
    unsafe fn prefetch(p: *const u8);
}

/// The two bytes of e4m3 codes as bf16, from table look-ups: exact for subnormals too, whatever the flush-to-zero mode,
/// and cheaper than converting through float16. Codes below 16 (subnormals and the lowest exponent) are looked up by
/// their low nibble; for all others that look-up gives 0 and arithmetic gives the bytes.
#[cfg(target_arch = "x86_64")]
pub(super) struct E4m3Bytes {
    /// By high nibble: sign and upper exponent bits, the sign alone for codes below 16.
    high: [u8; 16],
    /// By low nibble, for codes below 16: the high byte.
    small_high: [u8; 16],
    /// By low nibble, for codes below 16: the low byte, xor what arithmetic makes of it.
    small_low: [u8; 16],
}

#[cfg(target_arch = "x86_64")]
pub(super) static E4M3_BYTES: E4m3Bytes = {
    let mut t = E4m3Bytes { high: [0; 16], small_high: [0; 16], small_low: [0; 16] };
    let mut i = 0;
    while i < 16 {
        let exponent = if i & 7 == 0 { 0 } else { 60 + (i as u8 & 7) };
        t.high[i] = (i as u8 & 8) << 4 | exponent;
        let bits = crate::scheme::number::E4M3[i].to_bits() >> 16;
        t.small_high[i] = (bits >> 8) as u8;
        t.small_low[i] = bits as u8 ^ (i as u8) << 4;
        i += 1;
    }
    t
};
