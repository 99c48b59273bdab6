//! The few vector operations that the kernels are written in, once per instruction set.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512_bf16;
pub(crate) mod portable;

/// A vector of `LANES` float32, the lanes being consecutive rows of a panel.
///
/// # Safety
///
/// For every function: the processor has the instruction set (checked once, in `SimdExperts::new`), and a pointer may
/// be read (or written) for as many bytes as `LANES` elements of the named type take; no alignment is needed.
pub(crate) trait Isa: Copy {
    /// Divides 32.
    const LANES: usize;
    /// The vector.
    type V: Copy;
    /// Bytes of `LANES` rows by 4 columns, row by row.
    type Bytes: Copy;
    /// Sums of products of such bytes, in 16 bits at least, one or more per row.
    type Products: Copy;
    /// An int32 per row.
    type Ints: Copy;

    unsafe fn splat(x: f32) -> Self::V;
    /// Element `AT`, in every lane.
    #[inline(always)]
    unsafe fn each<const AT: usize>(p: *const f32) -> Self::V {
        // SAFETY: as the caller promises.
        unsafe { Self::splat(p.add(AT).read()) }
    }
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
    /// `LANES` rows of 4 e4m3 codes each to 2^-120 times their values, by column: the codes' bits moved into float32,
    /// whose exponent bias is larger by 120.
    unsafe fn e4m3x4(p: *const u8) -> [Self::V; 4];
    /// The low or the high halves of `LANES * 4` bytes.
    unsafe fn nibbles<const HIGH: bool>(p: *const u8) -> Self::Bytes;
    /// The same of e2m1 codes, to [`E2M1_BYTES`].
    unsafe fn e2m1<const HIGH: bool>(p: *const u8) -> Self::Bytes;
    /// Four signed bytes, for every row.
    unsafe fn four(p: *const u8) -> Self::Bytes;
    /// Nothing summed yet.
    unsafe fn no_products() -> Self::Products;
    /// Whether sums of products have 32 bits, one per row, so that they can begin with any number.
    const WIDE_SUMS: bool = false;
    /// The int32 at `p` in every sum, if these have so many bits; otherwise 0.
    #[inline(always)]
    unsafe fn products(_p: *const u8) -> Self::Products {
        // SAFETY: as the caller promises.
        unsafe { Self::no_products() }
    }
    /// Adds the products of unsigned bytes and signed ones. The caller sees to it that 16 bits hold two products of a
    /// row, and half of all that are ever summed of it.
    unsafe fn add_products(sums: Self::Products, unsigned: Self::Bytes, signed: Self::Bytes) -> Self::Products;
    /// 2^14, 2^7 and 1 times the sums of each row. The caller sees to it that 32 bits hold any partial sum.
    unsafe fn total(parts: [Self::Products; 3]) -> Self::Ints;
    /// What [`bytes`](Self::bytes) takes off each code: [`dot`](Self::dot) wants unsigned bytes or signed ones.
    const BIAS: i32;
    /// Steps of 4 columns that `dot` is best given at once, of small bytes.
    const DEPTH: usize;
    /// Unsigned bytes of `LANES` rows by 4 columns, less [`BIAS`](Self::BIAS).
    unsafe fn bytes(p: *const u8) -> Self::Bytes;
    /// Adds the products of `N` times 4 columns to each row's sum. Of `w`, bytes are `small`: unsigned and at most 24, or
    /// what [`bytes`](Self::bytes) gave; `N` is 4 at most. Of `x`, they are signed and none is -128. The caller sees to it
    /// that 32 bits hold any partial sum.
    unsafe fn dot<const N: usize>(sum: Self::Ints, w: [Self::Bytes; N], x: [Self::Bytes; N], small: bool)
    -> Self::Ints;
    unsafe fn splat_int(x: i32) -> Self::Ints;
    /// unsigned bytes
    unsafe fn u8_int(p: *const u8) -> Self::Ints;
    /// total - zero * sum, which 32 bits hold, as does the product.
    unsafe fn corrected(total: Self::Ints, zero: Self::Ints, sum: Self::Ints) -> Self::Ints;
    /// Rounded to nearest.
    unsafe fn to_float(x: Self::Ints) -> Self::V;
    /// The same pointer, of which the compiler knows nothing: it will not keep in registers (or spill) what it read
    /// through other copies.
    fn anew(p: *const u8) -> *const u8;
    /// Asks for a cache line. Any address will do.
    unsafe fn prefetch(p: *const u8);
}

/// Dot products of pairs of bfloat16, for sets that have them.
///
/// # Safety
///
/// As for [`Isa`].
#[cfg(target_arch = "x86_64")]
pub(crate) trait PairDots: Isa {
    /// Two bfloat16 per row.
    type Pairs: Copy;

    /// Pair `AT`, for every row.
    unsafe fn pair<const AT: usize>(p: *const f32) -> Self::Pairs;
    /// Adds both products of each row, in float32, subnormal numbers being zeros.
    unsafe fn dot_pairs(sum: Self::V, w: Self::Pairs, x: Self::Pairs) -> Self::V;
    /// `LANES` rows of 2 columns.
    unsafe fn bf16_pairs(p: *const u8) -> Self::Pairs;
    /// `LANES` rows of 4 e4m3 codes each to their values, two columns at a time.
    unsafe fn e4m3_pairs(p: *const u8) -> [Self::Pairs; 2];
    /// `LANES` rows of 8 e2m1 codes each, their 4 bytes being those of two bit halves of columns k and k + 4, to twice
    /// their values: columns 0 and 2, 4 and 6, 1 and 3, 5 and 7.
    unsafe fn e2m1_pairs(p: *const u8) -> [Self::Pairs; 4];
    /// The same of 4-bit integers to their values, the code - 8.
    unsafe fn u4_pairs(p: *const u8) -> [Self::Pairs; 4];
}

/// [`Isa::anew`]
#[cfg(target_arch = "x86_64")]
#[inline(always)]
#[allow(clippy::pointers_in_nomem_asm_block)] // nothing is read through it there
fn anew(mut p: *const u8) -> *const u8 {
    // SAFETY: there is no instruction in it.
    unsafe { std::arch::asm!("/* {0} */", inout(reg) p, options(nomem, nostack, preserves_flags)) };
    p
}

/// Twice the value of each e2m1 code, plus 12.
pub(crate) static E2M1_BYTES: [u8; 16] = {
    let mut t = [0; 16];
    let mut i = 0;
    while i < 16 {
        t[i] = (2.0 * crate::number::E2M1[i] + 12.0) as u8;
        i += 1;
    }
    t
};

/// The low and the high byte of the bfloat16 of each e4m3 code without its sign.
#[cfg(target_arch = "x86_64")]
static E4M3_PAIRS: [[u8; 128]; 2] = {
    let mut t = [[0; 128]; 2];
    let mut i = 0;
    while i < 128 {
        // Exact: no e4m3 has more mantissa bits than a bfloat16, whose exponents reach further, too.
        let bits = crate::number::E4M3[i].to_bits();
        t[0][i] = (bits >> 16) as u8;
        t[1][i] = (bits >> 24) as u8;
        i += 1;
    }
    t
};

/// Sixteen values as bfloat16, which must hold them, two times over.
#[cfg(target_arch = "x86_64")]
const fn twice(values: [f32; 16]) -> [u16; 32] {
    let mut t = [0; 32];
    let mut i = 0;
    while i < 32 {
        t[i] = (values[i % 16].to_bits() >> 16) as u16;
        i += 1;
    }
    t
}

/// Twice the value of each e2m1 code.
#[cfg(target_arch = "x86_64")]
static E2M1_PAIRS: [u16; 32] = {
    let mut values = crate::number::E2M1;
    let mut i = 0;
    while i < 16 {
        values[i] *= 2.0;
        i += 1;
    }
    twice(values)
};

/// i - 8 for each 4-bit code i.
#[cfg(target_arch = "x86_64")]
static U4_PAIRS: [u16; 32] = twice([-8., -7., -6., -5., -4., -3., -2., -1., 0., 1., 2., 3., 4., 5., 6., 7.]);
