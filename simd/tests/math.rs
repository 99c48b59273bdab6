//! What kernels compute beside products: the exponential, and float16 without instructions for it.

use moe_oracle_simd::{Activation, format, math};

#[test]
fn exponential_is_accurate_and_never_nan() {
    for i in -870_000..=870_000 {
        let x = i as f32 * 1e-4;
        let want = f64::from(x).exp();
        assert!(((f64::from(math::exp(x)) - want) / want).abs() < 2e-7, "{x}");
    }
    for x in [f32::INFINITY, f32::MAX, 1e5, 88.8] {
        let mut out = [f32::NAN; format::PANEL];
        math::activate(Activation::SILU, &[-x.min(f32::MAX); 32], &[1.0; 32], &mut out);
        assert!(out[0].abs() <= 1e-30 * x.min(f32::MAX), "{x} {}", out[0]);
        math::activate(Activation::SILU, &[x; 32], &[1.0; 32], &mut out);
        assert_eq!(out[0], x);
    }
}

#[test]
fn every_float16_becomes_its_value() {
    for bits in 0..=u16::MAX {
        let (have, want) = (math::f16(bits), half::f16::from_bits(bits).to_f32());
        assert_eq!(have.to_bits(), want.to_bits(), "{bits:#x}");
    }
}
