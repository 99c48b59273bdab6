//! Exact conversions from the small number formats to float32, and the rounding ones back.
//!
//! Sources: OCP 8-bit floating point and OCP MX v1.0. Rounding is to nearest, ties to even, saturating: what the
//! quantisers of vLLM and compressed-tensors do.

/// A table of all 256 codes, filled at compile time.
macro_rules! table {
    ($f:ident) => {{
        let mut t = [0f32; 256];
        let mut i = 0;
        while i < 256 {
            t[i] = $f(i as u8);
            i += 1;
        }
        t
    }};
}

/// 2^e for any e that float32 can hold, subnormals included.
const fn exp2i(e: i32) -> f32 {
    if e < -126 { f32::from_bits(1 << (e + 149)) } else { f32::from_bits(((e + 127) as u32) << 23) }
}

const fn minifloat(code: u32, exp_bits: u32, man_bits: u32, bias: i32) -> f32 {
    let man = code & ((1 << man_bits) - 1);
    let exp = (code >> man_bits & ((1 << exp_bits) - 1)) as i32;
    let sign = if code >> (man_bits + exp_bits) & 1 == 1 { -1.0 } else { 1.0 };
    let (man, exp) = if exp == 0 { (man, 1) } else { (man | 1 << man_bits, exp) };
    sign * man as f32 * exp2i(exp - bias - man_bits as i32)
}

const fn e4m3_value(code: u8) -> f32 {
    if code & 0x7f == 0x7f { f32::NAN } else { minifloat(code as u32, 4, 3, 7) }
}

const fn e5m2_value(code: u8) -> f32 {
    match code & 0x7f {
        0x7c => {
            if code >> 7 == 1 {
                f32::NEG_INFINITY
            } else {
                f32::INFINITY
            }
        }
        0x7d..=0x7f => f32::NAN,
        _ => minifloat(code as u32, 5, 2, 15),
    }
}

const fn e8m0_value(code: u8) -> f32 {
    if code == 255 { f32::NAN } else { exp2i(code as i32 - 127) }
}

/// e4m3fn codes to float32; 0x7f and 0xff are NaN.
pub static E4M3: [f32; 256] = table!(e4m3_value);
/// e5m2 codes to float32, infinities and NaNs as IEEE has them.
pub static E5M2: [f32; 256] = table!(e5m2_value);
/// e8m0 codes to float32: `2^(code - 127)`, 255 is NaN.
pub static E8M0: [f32; 256] = table!(e8m0_value);
/// e2m1 codes to float32; code 8 is minus zero.
pub const E2M1: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The nibble at `index` of a packed array, low nibble first.
#[inline]
pub fn nibble(packed: &[u8], index: usize) -> u8 {
    packed[index / 2] >> (4 * (index % 2)) & 0xf
}

/// Rounds to the nearest value of a sign-magnitude minifloat (ties to even), saturating at `max`.
fn round_minifloat(x: f32, man_bits: i32, min_exp: i32, max: f32) -> f32 {
    if x.is_nan() {
        return x;
    }
    let a = x.abs().min(max);
    // The exponent of the value, no smaller than that of the subnormals.
    let exp = ((a.to_bits() >> 23) as i32 - 127).max(min_exp);
    let step = exp2i(exp - man_bits);
    ((a / step).round_ties_even() * step).min(max).copysign(x)
}

/// The nearest e4m3fn value (ties to even, saturating at 448).
pub fn round_e4m3(x: f32) -> f32 {
    round_minifloat(x, 3, -6, 448.0)
}

/// The nearest e2m1 value (ties to even, saturating at 6).
pub fn round_e2m1(x: f32) -> f32 {
    round_minifloat(x, 1, 0, 6.0)
}

/// The nearest e3m2 value (ties to even, saturating at 28).
pub fn round_e3m2(x: f32) -> f32 {
    round_minifloat(x, 2, -2, 28.0)
}

/// The nearest e2m3 value (ties to even, saturating at 7.5).
pub fn round_e2m3(x: f32) -> f32 {
    round_minifloat(x, 3, 0, 7.5)
}
