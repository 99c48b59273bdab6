//! Unpacks as the kernels do, bit by bit, and compares with the values that went in.

use super::codes::first_column;
use super::*;
use crate::config::{Activation, InputType};
use crate::scheme::{Elem, number};
use crate::weights::{HalfType, WeightElem};

/// Numbers without a pattern.
fn bytes(seed: u64, n: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 32) as u8
    };
    (0..n).map(|_| next()).collect()
}

fn matrix(elem: WeightElem, rows: usize, cols: usize, scales: Scales, seed: u64) -> WeightMatrix {
    let mut codes = bytes(seed, rows * cols * elem.bits() / 8);
    match elem {
        WeightElem::Quant(Elem::E4m3) => codes.iter_mut().filter(|c| **c & 0x7f == 0x7f).for_each(|c| *c = 1),
        // Finite ones.
        WeightElem::Bf16 | WeightElem::F16 => codes.iter_mut().skip(1).step_by(2).for_each(|c| *c &= 0xb9),
        _ => {}
    }
    WeightMatrix { rows, cols, elem, codes: codes.into(), scales }
}

fn group(size: usize, ty: HalfType, zero: bool, rows: usize, cols: usize, seed: u64) -> Scales {
    let n = rows * (cols / size);
    let values = bytes(seed, n).iter().map(|b| (f32::from(*b) - 100.0) / 64.0).collect();
    let zero_points = zero.then(|| bytes(seed + 1, n).iter().map(|b| b & 15).collect());
    Scales::Group { size, ty, values, zero_points, g_idx: None }
}

/// The value of row `row` of slab `slab`, as a lane of the kernel sees it.
fn unpack(p: &PackedProjection, format: Format, slab: usize, row: usize, column: usize) -> f64 {
    let data = &p.stages[slab * p.slab_bytes..][..p.slab_bytes];
    let (stage, b) = (column / 128, column / 64 % 2);
    let blocks = (p.blocks - 2 * stage).min(2);
    let data = &data[stage * (2 * format.block_bytes() + format.scale_bytes())..];
    let (g, high) = (row % 8, row / 8);
    let find = |s: usize, t: usize| (0..4).find(|j| first_column(format.scales, s, t) + j == column % 64);
    let (step, t, j) =
        (0..4).flat_map(|s| (0..4).map(move |t| (s, t))).find_map(|(s, t)| Some((s, t, find(s, t)?))).unwrap();
    let (register, half) = (high + 2 * (j / 2), j % 2);
    let at = |word: usize, byte: usize| b * format.block_bytes() + word * 512 + (4 * g + t) * 16 + byte;
    let word = |at: usize| u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
    let bits16 = |v: u32| (v >> (16 * half)) as u16;
    let bf16 = |bits: u16| f64::from(half::bf16::from_bits(bits).to_f32());
    let value = match format.codes {
        Codes::Half => {
            let bits = bits16(word(at(step, 4 * register)));
            match format.compute {
                Compute::Bf16 => bf16(bits),
                Compute::F16 => f64::from(half::f16::from_bits(bits).to_f32()),
            }
        }
        Codes::E4m3 => {
            let v = word(at(step / 2, 8 * (step % 2) + 4 * (register / 2)));
            let v = if register % 2 == 0 {
                v << 8 & 0x8000_8000 | v << 4 & 0x07f0_07f0
            } else {
                v & 0x8000_8000 | v >> 4 & 0x07f0_07f0
            };
            bf16(bits16(v)) * 2f64.powi(120)
        }
        Codes::Int8 => {
            let v = word(at(step / 2, 8 * (step % 2) + 4 * (register / 2))) >> (8 * (register % 2));
            bf16(bits16(v & 0x007f_007f | 0x4300_4300)) - bf16(bits16(v & 0x0080_0080 | 0x4300_4300))
        }
        Codes::U4 => bf16(bits16(word(at(0, 4 * step)) >> (4 * register) & 0x000f_000f | 0x4300_4300)) - 128.0,
        Codes::E2m1 => {
            let v = word(at(0, 4 * step));
            let turned = v.rotate_right(6);
            match format.compute {
                Compute::Bf16 => {
                    let v = match register {
                        0 => v & 0x81c0_81c0,
                        1 => turned & 0x81c0_81c0,
                        2 => v << 6 & 0x81c0_81c0,
                        _ => turned << 2 & 0x80c0_80c0 | v << 4 & 0x0100_0100,
                    };
                    bf16(bits16(v)) * 2f64.powi(126)
                }
                Compute::F16 => {
                    let v = match register {
                        0 => v & 0x8e00_8e00,
                        1 => v << 3 & 0x8e00_8e00,
                        2 => v << 6 & 0x0e00_0e00 | v << 2 & 0x8000_8000,
                        _ => v << 9 & 0x0e00_0e00 | v << 1 & 0x8000_8000,
                    };
                    f64::from(half::f16::from_bits(bits16(v)).to_f32()) * 2f64.powi(14)
                }
            }
        }
    };
    let scales = &data[blocks * format.block_bytes() + g * 4 * format.scales.registers()..];
    let i = column % 128 * format.scales.groups() / 128;
    let f16_at = |at: usize, bf: bool| {
        let bits = u16::from_le_bytes([scales[at], scales[at + 1]]);
        if bf { bf16(bits) } else { f64::from(half::f16::from_bits(bits).to_f32()) }
    };
    let default_zero = if format.codes == Codes::U4 { 8.0 } else { 0.0 };
    let (scale, zero) = match format.scales {
        StageScales::None => (1.0, 0.0),
        StageScales::F32(_) => {
            (f64::from(f32::from_le_bytes(scales[8 * i + 4 * high..][..4].try_into().unwrap())), 0.0)
        }
        StageScales::Half(_, false) => (f16_at(4 * i + 2 * high, format.scale_bf16), default_zero),
        StageScales::Half(_, true) => {
            (f16_at(8 * i + 2 * high, format.scale_bf16), f16_at(8 * i + 4 + 2 * high, false))
        }
        StageScales::E8m0 => (f64::from(number::E8M0[scales[4 * high + i] as usize]), 0.0),
        StageScales::E4m3 => (f64::from(number::E4M3[scales[8 * high + i] as usize]), 0.0),
    };
    let factor = f64::from(p.factors[slab * SLAB + row]) / f64::from(format.lift());
    (value - zero) * scale * factor
}

/// Packs an expert of I = 24, H = 200 (or what the groups divide) and checks every value of both projections.
fn check(
    elem: WeightElem,
    scales: impl Fn(usize, usize, u64) -> Scales,
    gated: bool,
    want: Codes,
    sizes: (usize, usize),
) {
    check_for(InputType::Bf16, elem, &scales, gated, want, sizes);
    // Whose codes lie elsewhere.
    if want == Codes::E2m1 {
        check_for(InputType::F16, elem, &scales, gated, want, sizes);
    }
}

fn check_for(
    input: InputType,
    elem: WeightElem,
    scales: &impl Fn(usize, usize, u64) -> Scales,
    gated: bool,
    want: Codes,
    sizes: (usize, usize),
) {
    let (hidden, intermediate) = sizes;
    let m = |rows, cols, seed| matrix(elem, rows, cols, scales(rows, cols, seed), seed);
    let expert = ExpertWeights {
        gate: gated.then(|| m(intermediate, hidden, 1)),
        up: m(intermediate, hidden, 2),
        down: m(hidden, intermediate, 3),
        gate_bias: None,
        up_bias: Some(vec![1.5; intermediate]),
        down_bias: None,
        input_scale: None,
        down_input_scale: None,
    };
    let experts = vec![expert.clone(), expert];
    let weights = MoeWeights { scheme: crate::scheme::Scheme::Int8, weight_key: None, activation_key: None, experts };
    let activation = if gated { Activation::SILU } else { Activation::Relu2NoMul };
    let config = MoeConfig { activation, input, ..MoeConfig::new(2, 1, hidden, intermediate) };
    let packed = PackedExperts::new(&weights, &config).unwrap();
    assert_eq!(packed.format.codes, want);
    let e = &weights.experts[1];
    let near = |have: f64, want: f32| {
        // 16-bit storage of what no other format holds rounds; everything else is exact up to float32 products.
        let bound = if want.abs() < 1e-30 {
            1e-30
        } else {
            f64::from(want.abs()) * if packed.format.codes == Codes::Half { 4e-3 } else { 1e-6 }
        };
        assert!((have - f64::from(want)).abs() <= bound, "{:?}: {have} for {want}", packed.format);
    };
    for row in 0..intermediate {
        for column in 0..hidden {
            if let Some(gate) = &e.gate {
                let slab = packed.first.slabs + row / 8;
                near(unpack(&packed.first, packed.format, slab, row % 8, column), gate.value(row, column));
                near(unpack(&packed.first, packed.format, slab, 8 + row % 8, column), e.up.value(row, column));
            } else {
                let slab = packed.first.slabs + row / 16;
                near(unpack(&packed.first, packed.format, slab, row % 16, column), e.up.value(row, column));
            }
            let slab = packed.second.slabs + column / 16;
            near(unpack(&packed.second, packed.format, slab, column % 16, row), e.down.value(column, row));
        }
    }
    let bias = packed.first.bias.as_ref().unwrap();
    assert_eq!(bias[if gated { 8 } else { 0 }], 1.5);
    assert!(!gated || bias[0] == 0.0);
}

#[test]
fn what_is_packed_is_what_the_kernels_read() {
    use HalfType::{Bf16, F16};
    let q = WeightElem::Quant;
    for gated in [true, false] {
        let row =
            |rows: usize, _, seed| Scales::PerRow(bytes(seed, rows).iter().map(|b| f32::from(*b) / 50.0).collect());
        check(WeightElem::Bf16, |_, _, _| Scales::None, gated, Codes::Half, (200, 24));
        check(q(Elem::E4m3), row, gated, Codes::E4m3, (200, 24));
        check(q(Elem::Int8), row, gated, Codes::Int8, (200, 24));
        check(q(Elem::Int8), |_, _, _| Scales::PerTensor(0.5), gated, Codes::Int8, (200, 24));
        for block in [128, 64, 32] {
            let scales = |rows: usize, cols: usize, seed| Scales::Block {
                block,
                values: bytes(seed, rows.div_ceil(block) * cols.div_ceil(block))
                    .iter()
                    .map(|b| f32::from(*b) / 9.0)
                    .collect(),
            };
            check(q(Elem::E4m3), scales, gated, Codes::E4m3, (296, 136));
        }
        let e8m0 = |rows: usize, cols: usize, seed| {
            Scales::E8m0(bytes(seed, rows * cols / 32).iter().map(|b| 90 + b % 60).collect::<Vec<_>>().into())
        };
        check(q(Elem::E4m3), e8m0, gated, Codes::E4m3, (224, 96));
        check(q(Elem::E2m1), e8m0, gated, Codes::E2m1, (224, 96));
        let nvfp4 = |rows: usize, cols: usize, seed| Scales::Nvfp4 {
            codes: bytes(seed, rows * cols / 16).iter().map(|b| b % 0x7f).collect::<Vec<_>>().into(),
            global: 0.01,
        };
        check(q(Elem::E2m1), nvfp4, gated, Codes::E2m1, (208, 48));
        for (elem, codes) in [(Elem::U4, Codes::U4), (Elem::U8, Codes::Int8)] {
            for ty in [Bf16, F16] {
                for zero in [false, true] {
                    for size in [32, 64, 128, 256] {
                        check(q(elem), |r, c, seed| group(size, ty, zero, r, c, seed), gated, codes, (256, 256));
                    }
                    check(q(elem), |r, c, seed| group(c, ty, zero, r, c, seed), gated, codes, (200, 24));
                    // Groups of 16 have no format of their own.
                    check(q(elem), |r, c, seed| group(16, ty, zero, r, c, seed), gated, Codes::Half, (208, 48));
                }
            }
        }
    }
}

#[test]
fn what_the_kernels_cannot_take_is_refused() {
    let m = |rows, cols| matrix(WeightElem::Bf16, rows, cols, Scales::None, 1);
    let expert = |hidden| ExpertWeights {
        gate: None,
        up: m(8, hidden),
        down: m(hidden, 8),
        gate_bias: None,
        up_bias: None,
        down_bias: None,
        input_scale: None,
        down_input_scale: None,
    };
    let weights = |hidden| MoeWeights {
        scheme: crate::scheme::Scheme::Unquantized,
        weight_key: None,
        activation_key: None,
        experts: vec![expert(hidden)],
    };
    let config =
        |input, hidden| MoeConfig { activation: Activation::Relu2NoMul, input, ..MoeConfig::new(1, 1, hidden, 8) };
    let why = |input, hidden| PackedExperts::new(&weights(hidden), &config(input, hidden)).err().unwrap().to_string();
    assert!(why(InputType::F32, 16).contains("float32"));
    assert!(why(InputType::Bf16, 12).contains("multiple of 8"));
}
