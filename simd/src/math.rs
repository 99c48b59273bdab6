//! Activations over the 32 rows of a panel and what they need, in plain Rust that the compiler vectorises.

use crate::Activation;
use crate::format::PANEL;

/// e^x with about 1e-7 relative error, without branches: arguments beyond +-87 give the value at that end, so that
/// `1 / (1 + e^x)` is never NaN or infinite.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves the integer in the low mantissa bits
    const LN2_HI: f32 = 0.693_359_4; // few bits, so that its product with the integer is exact
    const LN2_LO: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 87.0);
    let shifted = x * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = (x - n * LN2_HI) - n * LN2_LO;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let e = (p * r * r + r) + 1.0;
    e * f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000))
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The activation of every row. Each result depends on its own gate and up only.
#[inline(always)]
pub fn activate(a: Activation, gate: &[f32; PANEL], up: &[f32; PANEL], out: &mut [f32; PANEL]) {
    match a {
        Activation::Silu { limit: None } => {
            for i in 0..PANEL {
                out[i] = gate[i] * sigmoid(gate[i]) * up[i];
            }
        }
        Activation::Silu { limit: Some(l) } => {
            for i in 0..PANEL {
                let g = gate[i].min(l);
                out[i] = g * sigmoid(g) * up[i].max(-l).min(l);
            }
        }
        Activation::SwigluOai { alpha, beta, limit } => {
            for i in 0..PANEL {
                let g = gate[i].min(limit);
                out[i] = g * sigmoid(alpha * g) * (up[i].max(-limit).min(limit) + beta);
            }
        }
        Activation::SiluNoMul => {
            for i in 0..PANEL {
                out[i] = up[i] * sigmoid(up[i]);
            }
        }
        _ => {
            for i in 0..PANEL {
                out[i] = a.apply(gate[i], up[i]);
            }
        }
    }
}

/// float16 to float32. By integers and a conversion that has no subnormal numbers, which a thread may take as zeros.
#[inline(always)]
pub fn f16(bits: u16) -> f32 {
    let (sign, size) = ((u32::from(bits) & 0x8000) << 16, u32::from(bits) & 0x7fff);
    let magnitude = match size {
        0..0x400 => (size as f32 * f32::from_bits((127 - 24) << 23)).to_bits(),
        0x400..0x7c00 => (size << 13) + ((127 - 15) << 23),
        0x7c00 => f32::INFINITY.to_bits(),
        _ => 0x7fc0_0000 | size << 13,
    };
    f32::from_bits(sign | magnitude)
}
