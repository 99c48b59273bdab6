//! The scaled form of activations that e4m3 weights are multiplied with.

use super::*;

fn form(x: &[f32], order: Option<&[u32]>, isa: CpuIsa) -> Vec<f32> {
    let mut out = vec![f32::NAN; scaled::HEAD + x.len()];
    let shape = shape(format::Code::E4m3, x.len(), x.len());
    // SAFETY: only detected instruction sets come here.
    unsafe { kernel::form(isa, &shape)(x, order, &shape, &mut out) };
    out
}

/// Rows of an e4m3 matrix, half of its codes subnormal, times `x`.
fn product(isa: CpuIsa, x: &[f32]) -> Vec<f32> {
    let mut rng = Rng(17);
    let mut m = matrix(Kind::Row(Elem::E4m3), 32, x.len(), &mut rng);
    m.codes = m.codes.iter().map(|c| if c & 1 == 0 { c & 0x87 } else { *c }).collect::<Vec<_>>().into();
    let shape = pack::shape(&m, false, Rounding::None).unwrap();
    let mut bytes = vec![0; shape.panel_bytes()];
    pack::panel(&m, &shape, None, None, 0, &mut bytes);
    let (x, mut out) = (form(x, None, isa), [[0f32; format::PANEL]]);
    let x = [x.as_ptr()];
    let mut job = kernel::Job::new(&shape, &bytes, &x, &mut out);
    // SAFETY: the instruction set was detected, the panel packed for the shape, x its form, out one row.
    unsafe { kernel::kernel(isa, &shape)(&mut job) };
    out[0].to_vec()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_scaled_row_is_exact(
        x in proptest::collection::vec(proptest::num::f32::NORMAL | proptest::num::f32::SUBNORMAL | proptest::num::f32::ZERO, 1..70),
    ) {
        let order: Vec<u32> = (0..x.len() as u32).rev().collect();
        let largest = x.iter().fold(0.0, |m, v| f64::max(m, f64::from(v.abs())));
        for isa in instruction_sets() {
            let row = form(&x, None, isa);
            for (have, want) in row[1..].iter().zip(&x) {
                let have = f64::from(*have) * f64::from(row[0]);
                let want = f64::from(*want) * 2f64.powi(120);
                prop_assert!((have - want).abs() <= largest * 2f64.powi(-120), "{have:e} {want:e}");
            }
            let mut back = form(&x, Some(&order), isa);
            back[1..].reverse();
            prop_assert!(same(&row, &back));
        }
    }
}

#[test]
fn powers_of_two_go_through_exactly() {
    let x = Rng(5).floats(100);
    for isa in instruction_sets() {
        let want = product(isa, &x);
        assert!(want.iter().all(|y| y.is_normal()));
        for e in [-100, -60, -20, 20, 60, 110] {
            let scale = 2f32.powi(e);
            let got = product(isa, &x.iter().map(|x| x * scale).collect::<Vec<_>>());
            assert!(got.iter().zip(&want).all(|(g, w)| *g == w * scale), "2^{e} {}", isa.name());
        }
    }
}

#[test]
fn what_is_not_finite_comes_through() {
    for isa in instruction_sets() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = Rng(5).floats(100);
            x[70] = bad;
            assert!(product(isa, &x).iter().all(|y| !y.is_finite()), "{bad} {}", isa.name());
        }
        assert!(product(isa, &[0.0; 100]).iter().all(|y| *y == 0.0));
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn flushing_subnormals_changes_nothing() {
    let x = Rng(6).floats(100);
    for isa in instruction_sets() {
        let want = product(isa, &x);
        let mode = scaled::mode();
        // SAFETY: these are the two bits that may be set.
        unsafe { scaled::set_mode(mode | 0x8040) };
        let got = product(isa, &x);
        let after = scaled::mode();
        // SAFETY: as it was.
        unsafe { scaled::set_mode(mode) };
        // The lowest bits tell what has happened so far.
        assert_eq!(after & 0x8040, 0x8040, "the caller's mode is back");
        assert!(same(&want, &got), "{}", isa.name());
    }
}
