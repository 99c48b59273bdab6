//! Activation quantisation as the keys say, on the values themselves: rounds each to what its code would mean.

use crate::scheme::{Elem, Extent, QuantKey, ScaleType, number};

/// Replaces a row (one token's input of a GEMM) by its quantised values.
///
/// `stored` is the stored scale that static keys need (value = code * stored; for nvfp4 the second level).
/// A "dynamic per tensor" scale is taken per token, so that a token's result does not depend on its batch.
/// Rounding of scales: fp8 and int8 amax / largest code; mxfp8 the exponent `ceil(log2(amax / 448))` (vLLM);
/// mxfp4 and mxfp6 `floor(log2(amax))` less the format's largest exponent (OCP MX v1.0).
pub fn quantize_row(key: QuantKey, stored: Option<f32>, row: &mut [f32]) {
    let group = match key.scale.group.cols {
        Extent::Len(n) => n as usize,
        Extent::All | Extent::Any => row.len().max(1),
    };
    let stored = stored.unwrap_or(1.0);
    let second = match key.scale2 {
        None => 1.0,
        Some(s) if s.dynamic => amax(row) / (6.0 * 448.0),
        Some(_) => stored,
    };
    for block in row.chunks_mut(group) {
        let scale = match key.scale.ty {
            _ if !key.scale.dynamic => stored,
            ScaleType::F32 | ScaleType::Half => amax(block) / largest(key.elem),
            ScaleType::E8m0 => power_of_two_scale(key.elem, amax(block)),
            ScaleType::E4m3 => number::round_e4m3(amax(block) / largest(key.elem) / second) * second,
        };
        // An all-zero block, or one so small that its scale rounds to zero.
        if scale == 0.0 || !scale.is_normal() {
            block.fill(0.0);
            continue;
        }
        for x in block {
            *x = round(key.elem, *x / scale) * scale;
        }
    }
}

fn amax(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |m, v| m.max(v.abs()))
}

fn largest(elem: Elem) -> f32 {
    match elem {
        Elem::E4m3 => 448.0,
        Elem::E5m2 => 57344.0,
        Elem::E2m1 => 6.0,
        Elem::E3m2 => 28.0,
        Elem::E2m3 => 7.5,
        Elem::Int8 | Elem::U8 => 127.0,
        Elem::U4 => 7.0,
    }
}

fn power_of_two_scale(elem: Elem, amax: f32) -> f32 {
    if amax == 0.0 {
        return 0.0;
    }
    let exp = match elem {
        Elem::E4m3 => {
            let ratio = amax / 448.0;
            let floor = libm::ilogbf(ratio);
            floor + i32::from(ratio > libm::ldexpf(1.0, floor))
        }
        Elem::E2m1 | Elem::E2m3 => libm::ilogbf(amax) - 2,
        _ => libm::ilogbf(amax) - 4,
    };
    libm::ldexpf(1.0, exp.clamp(-126, 127))
}

fn round(elem: Elem, x: f32) -> f32 {
    match elem {
        Elem::E4m3 => number::round_e4m3(x),
        Elem::E2m1 => number::round_e2m1(x),
        Elem::E3m2 => number::round_e3m2(x),
        Elem::E2m3 => number::round_e2m3(x),
        _ => x.round_ties_even().clamp(-128.0, 127.0),
    }
}
