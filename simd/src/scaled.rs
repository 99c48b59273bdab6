//! The scaled form of a row of activations, for e4m3 weights.
//!
//! Moving the bits of an e4m3 code into a float32 gives 2^-120 times its value, a subnormal number where the code is
//! one. So that products stay far from the small end of float32, a row is brought to a magnitude close to 2^120 by a
//! power of two: its head. Nothing is rounded but what is below 2^-240 of the row's largest magnitude.
//!
//! In memory: the head, 2^120 over the power, which the sums are to be multiplied by, then the columns.

/// Elements before the columns.
pub const HEAD: usize = 1;

/// 2^e, for an exponent of normal numbers.
#[inline(always)]
fn power(e: i32) -> f32 {
    f32::from_bits(((e + 127) as u32) << 23)
}

/// The form of the row whose column `i` is `x[i]`, or `x[order[i]]`, into `out`, which has [`HEAD`] elements more.
#[inline(always)]
pub(crate) fn row(x: &[f32], order: Option<&[u32]>, out: &mut [f32]) {
    let (head, out) = out.split_at_mut(HEAD);
    let largest = x.iter().fold(0, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
    // |x| < 2^exponent, but for numbers so small or so large that the powers below would not be normal ones. (Where
    // there is an infinity or a NaN, it comes through whatever the power.)
    let exponent = ((largest >> 23) as i32 - 126).clamp(-100, 127);
    head[0] = power(exponent);
    // Two factors, for their product may be beyond float32.
    let (a, b) = (power((120 - exponent) / 2), power(120 - exponent - (120 - exponent) / 2));
    match order {
        None => out.iter_mut().zip(x).for_each(|(to, v)| *to = v * a * b),
        Some(order) => out.iter_mut().zip(order).for_each(|(to, c)| *to = x[*c as usize] * a * b),
    }
}

/// While it lives, this thread computes with subnormal numbers, which weights are here. Engines may have told the
/// processor to take them as zeros.
pub(crate) struct Subnormals {
    #[cfg(target_arch = "x86_64")]
    before: u32,
}

#[cfg(target_arch = "x86_64")]
impl Subnormals {
    /// "Denormals are zeros" and "flush to zero".
    const OFF: u32 = 1 << 6 | 1 << 15;

    #[inline(always)]
    pub(crate) fn on() -> Self {
        let before = mode();
        if before & Self::OFF != 0 {
            // SAFETY: no more than these two bits change.
            unsafe { set_mode(before & !Self::OFF) };
        }
        Self { before }
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for Subnormals {
    #[inline(always)]
    fn drop(&mut self) {
        if self.before & Self::OFF != 0 {
            // SAFETY: as it was.
            unsafe { set_mode(self.before) };
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl Subnormals {
    pub(crate) fn on() -> Self {
        Self {}
    }
}

/// The control register of vector arithmetic.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub fn mode() -> u32 {
    let mut mode = 0u32;
    // SAFETY: every x86-64 processor has it; it writes the four bytes.
    unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut mode, options(nostack, preserves_flags)) };
    mode
}

/// Sets it.
///
/// # Safety
///
/// It is what [`mode`] gave but for "denormals are zeros" and "flush to zero", which change how subnormal numbers are taken
/// and nothing else.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub unsafe fn set_mode(mode: u32) {
    // SAFETY: the register is as the caller promises; arithmetic cannot move across it, for it is between loads and stores
    // that cannot.
    unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const mode, options(nostack, preserves_flags)) };
}
