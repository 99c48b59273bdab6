//! Our number tables and rounding against the `microfloat` crate, and activation quantisation against float64.

mod common;

use common::{Rng, reference};
use microfloat::{f4e2m1fn, f6e2m3fn, f6e3m2fn, f8e4m3fn, f8e5m2, f8e8m0fnu};
use moe_oracle::cpu::quantize_row;
use moe_oracle::scheme::number::{self, E2M1, E4M3, E5M2, E8M0};
use moe_oracle::scheme::*;

/// NaN equals NaN, and minus zero is not zero.
fn same(a: f32, b: f32) -> bool {
    a.is_nan() && b.is_nan() || a.to_bits() == b.to_bits()
}

#[test]
fn every_code_means_what_microfloat_says() {
    for code in 0..=255u8 {
        let tables = [
            ("e4m3", E4M3[code as usize], f8e4m3fn::from_bits(code).to_f32()),
            ("e5m2", E5M2[code as usize], f8e5m2::from_bits(code).to_f32()),
            ("e8m0", E8M0[code as usize], f8e8m0fnu::from_bits(code).to_f32()),
        ];
        for (name, ours, theirs) in tables {
            assert!(same(ours, theirs), "{name} {code:#04x}: {ours} and {theirs}");
        }
    }
    for code in 0..16u8 {
        assert!(same(E2M1[code as usize], f4e2m1fn::from_bits(code).to_f32()), "e2m1 {code}");
        assert_eq!(number::nibble(&[code, code << 4], 0), code);
        assert_eq!(number::nibble(&[code, code << 4], 3), code);
    }
}

/// A rounding of ours with the same of theirs, the format's values and the largest of them.
struct Rounding {
    name: &'static str,
    ours: fn(f32) -> f32,
    theirs: fn(f32) -> f32,
    values: Vec<f32>,
}

fn roundings() -> [Rounding; 4] {
    let sorted = |values: Vec<f32>| {
        let mut v: Vec<f32> = values.into_iter().filter(|v| v.is_finite()).collect();
        v.sort_by(f32::total_cmp);
        v
    };
    [
        Rounding {
            name: "e4m3",
            ours: number::round_e4m3,
            theirs: |x| f8e4m3fn::from_f32(x).to_f32(),
            values: sorted((0..=255).map(|c| f8e4m3fn::from_bits(c).to_f32()).collect()),
        },
        Rounding {
            name: "e2m1",
            ours: number::round_e2m1,
            theirs: |x| f4e2m1fn::from_f32(x).to_f32(),
            values: sorted((0..16).map(|c| f4e2m1fn::from_bits(c).to_f32()).collect()),
        },
        Rounding {
            name: "e3m2",
            ours: number::round_e3m2,
            theirs: |x| f6e3m2fn::from_f32(x).to_f32(),
            values: sorted((0..64).map(|c| f6e3m2fn::from_bits(c).to_f32()).collect()),
        },
        Rounding {
            name: "e2m3",
            ours: number::round_e2m3,
            theirs: |x| f6e2m3fn::from_f32(x).to_f32(),
            values: sorted((0..64).map(|c| f6e2m3fn::from_bits(c).to_f32()).collect()),
        },
    ]
}

#[test]
fn rounding_agrees_with_microfloat_on_random_values_and_every_tie() {
    for r in roundings() {
        let largest = *r.values.last().unwrap();
        let check = |x: f32| {
            let (ours, theirs) = ((r.ours)(x), (r.theirs)(x));
            assert!(same(ours, theirs), "{} of {x:e}: {ours} and {theirs}", r.name);
        };
        for pair in r.values.windows(2) {
            // Exact in float32: neighbours differ by one step of a few mantissa bits.
            let tie = (pair[0] + pair[1]) / 2.0;
            [pair[0], pair[1], tie, tie.next_up(), tie.next_down()].into_iter().for_each(check);
        }
        let mut rng = Rng(1);
        for _ in 0..200_000 {
            // Uniform, and uniform in the exponent down to float32's subnormals.
            check(rng.range(-largest, largest));
            let small = f32::from_bits((rng.bits() as u32) & 0x7fff_ffff);
            if small <= largest {
                check(small);
                check(-small);
            }
        }
        for (x, want) in [(1e30, largest), (f32::INFINITY, largest), (-1e30, -largest), (f32::NEG_INFINITY, -largest)] {
            assert_eq!((r.ours)(x), want, "{} saturates", r.name);
        }
        assert!((r.ours)(f32::NAN).is_nan());
    }
}

#[test]
fn activation_quantisation_follows_its_rules_for_every_key() {
    let keys: Vec<_> = moe_oracle::oracle::ORACLES.iter().filter_map(|o| QuantKey::from_bits(o.activation)).collect();
    let mut rng = Rng(2);
    for key in keys {
        let (mut total, mut flips) = (0, 0);
        for len in [2880, 1408, 704, 352, 192, 96, 1] {
            for magnitude in [1e-4, 1.0, 50.0] {
                let mut row: Vec<f32> = (0..len).map(|_| magnitude * rng.normal()).collect();
                // A group of zeros, as padding and relu2 make them.
                row.iter_mut().skip(32).take(32).for_each(|x| *x = 0.0);
                let largest = if key.scale2.is_some() { 2688.0 } else { 127.0 };
                let stored = Some(2.5 * magnitude / largest);
                let mut want: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
                reference::quantize(key, stored, &mut want);
                quantize_row(key, stored, &mut row);
                for (have, want) in row.iter().zip(want) {
                    total += 1;
                    flips += usize::from((f64::from(*have) - want).abs() > 1e-6 * want.abs());
                }
            }
        }
        // A quotient that float32 rounds onto a tie goes the other way once in a while.
        assert!(flips * 2000 <= total, "{key}: {flips} of {total} values differ");
    }
}

#[test]
fn rows_of_zeros_stay_zero() {
    for key in NAMED_KEYS.iter().map(|k| k.2).filter(|k| k.scale.dynamic) {
        let mut row = [0.0; 100];
        quantize_row(key, Some(1.0), &mut row);
        assert_eq!(row, [0.0; 100], "{key}");
    }
}
