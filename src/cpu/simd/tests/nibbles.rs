//! Integer products of 4-bit weights with activations in fixed point.

use super::*;

const FOUR_BIT: [Kind; 6] = [
    Kind::Mxfp4,
    Kind::Nvfp4,
    Kind::Group(Elem::U4, 32, false, false),
    Kind::Group(Elem::U4, 96, true, false),
    Kind::Group(Elem::U4, 16, true, true),
    Kind::Group(Elem::U4, 0, false, false),
];

/// The form of a row, read back as its module documents it: values, and the scale of each one's block. `offset` is that of the
/// weights.
fn read_back(form: &[f32], cols: usize, group: usize, offset: i32) -> Vec<(f64, f64)> {
    let mut bytes = bytemuck::cast_slice::<f32, u8>(form);
    let mut values = Vec::new();
    while values.len() < cols {
        let n = fixed::BLOCK.min(group - values.len() % group).min(cols - values.len());
        let (block, rest) = bytes.split_at(8 + 3 * n.next_multiple_of(8));
        bytes = rest;
        let scale = f32::from_ne_bytes(block[..4].try_into().unwrap());
        let mut sum = 0;
        for k in 0..n.next_multiple_of(8) {
            let part = |i: usize| i32::from(block[8 + k / 4 * 12 + 4 * i + k % 4] as i8);
            assert!((0..3).all(|i| part(i).abs() <= 64));
            let q = (part(0) << 14) + (part(1) << 7) + part(2);
            assert!(q.abs() <= 1 << 20);
            sum += q;
            if k < n {
                values.push((f64::from(scale) * f64::from(q), f64::from(scale)));
            } else {
                assert_eq!(q, 0, "padding");
            }
        }
        assert_eq!(-offset * sum, i32::from_ne_bytes(block[4..8].try_into().unwrap()));
    }
    assert!(bytes.is_empty());
    values
}

fn form(x: &[f32], order: Option<&[u32]>, (code, group): (format::Code, usize), isa: CpuIsa) -> Vec<f32> {
    let shape = shape(code, x.len(), group);
    let mut out = vec![f32::NAN; shape.form_len()];
    // SAFETY: only detected instruction sets come here.
    unsafe { kernel::form(isa, &shape)(x, order, &shape, &mut out) };
    out
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn fixed_point_keeps_twenty_bits(
        x in proptest::collection::vec(proptest::num::f32::NORMAL | proptest::num::f32::SUBNORMAL | proptest::num::f32::ZERO, 1..150),
        group in 1usize..150,
        narrow: bool,
    ) {
        // Magnitudes of one row usually lie close together.
        let narrowed = |v: &f32| f32::from_bits(v.to_bits() & 0x81ff_ffff | 0x3e00_0000);
        let x: Vec<f32> = if narrow { x.iter().map(narrowed).collect() } else { x };
        let order: Vec<u32> = (0..x.len() as u32).rev().collect();
        for (code, factor) in [(format::Code::U4, 8), (format::Code::U4Zero, -1)] {
            read_back(&form(&x, None, (code, group), CpuIsa::Portable), x.len(), group, factor);
        }
        let (shape, offset) = ((format::Code::E2m1, group), 12);
        let want = form(&x, None, shape, CpuIsa::Portable);
        for isa in instruction_sets() {
            let bits = |form: &[f32]| form.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&want), bits(&form(&x, None, shape, isa)));
            let reversed: Vec<f32> = x.iter().rev().copied().collect();
            prop_assert_eq!(bits(&form(&reversed, None, shape, isa)), bits(&form(&x, Some(&order), shape, isa)));
        }
        for (i, (value, scale)) in read_back(&want, x.len(), group, offset).into_iter().enumerate() {
            let start = i - i % group;
            let start = start + (i - start) / fixed::BLOCK * fixed::BLOCK;
            let end = (start + fixed::BLOCK).min(i - i % group + group).min(x.len());
            let largest = x[start..end].iter().fold(0.0, |m, v| f64::max(m, f64::from(v.abs())));
            let bound = (largest * 2f64.powi(-20)).max(2f64.powi(-127));
            prop_assert!((f64::from(x[i]) - value).abs() <= bound, "{} became {value}, scale {scale}", x[i]);
        }
    }
}

#[test]
fn what_is_not_finite_spoils_its_row_only() {
    for (i, kind) in FOUR_BIT.into_iter().enumerate() {
        let mut rng = Rng(91 + i as u64);
        let weights = layer(kind, 96, 192, true, true, &mut rng);
        let good = rng.floats(15 * 96);
        let rows = [vec![0, 14], (1..14).collect::<Vec<u32>>(), vec![]];
        for isa in instruction_sets() {
            let experts = SimdExperts::new(&weights, Activation::SILU, isa).unwrap();
            let want = run(&experts, &good, 96, &rows, &SingleThread);
            for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = good.clone();
                x[5 * 96 + 70] = bad;
                let got = run(&experts, &x, 96, &rows, &SingleThread);
                assert!(got[5 * 96..6 * 96].iter().all(|y| !y.is_finite()), "{kind:?} {bad} {}", isa.name());
                assert!(same(&got[..5 * 96], &want[..5 * 96]) && same(&got[6 * 96..], &want[6 * 96..]));
            }
            let zero = run(&experts, &vec![0.0; 15 * 96], 96, &rows, &SingleThread);
            assert!(zero.iter().all(|y| y.is_finite()), "{kind:?} of zeros, {}", isa.name());
        }
    }
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    for (i, kind) in FOUR_BIT.into_iter().enumerate() {
        let mut rng = Rng(191 + i as u64);
        let weights = layer(kind, 288, 192, true, true, &mut rng);
        let x = rng.floats(15 * 288);
        let rows = [vec![0, 14], (1..14).collect::<Vec<u32>>(), vec![]];
        let all: Vec<_> = instruction_sets()
            .map(|isa| run(&SimdExperts::new(&weights, Activation::SILU, isa).unwrap(), &x, 288, &rows, &SingleThread))
            .collect();
        assert!(all.iter().all(|y| same(y, &all[0])), "{kind:?}");
    }
}

#[test]
fn columns_that_blocks_do_not_divide() {
    check(Kind::Group(Elem::U4, 0, true, false), 44, 20, Activation::SILU, true, 31);
    check(Kind::Group(Elem::U4, 44, true, true), 88, 44, Activation::SILU, false, 32);
    check(Kind::Group(Elem::U4, 0, false, false), 20, 44, Activation::SILU, false, 33);
    check(Kind::Group(Elem::U4, 6, true, false), 18, 42, Activation::SILU, false, 34);
    check(Kind::Group(Elem::U4, 0, true, false), 2880, 34, Activation::SILU, false, 35);
    check(Kind::Nvfp4, 176, 80, Activation::SWIGLU_OAI, true, 36);
}

#[test]
fn four_bit_zero_points_have_a_limit() {
    let mut rng = Rng(7);
    let mut m = matrix(Kind::Group(Elem::U4, 32, true, false), 40, 64, &mut rng);
    for (zero, good) in [(16, true), (31, true), (32, false), (255, false)] {
        let Scales::Group { zero_points: Some(z), .. } = &mut m.scales else { unreachable!() };
        z.fill(zero);
        let shape = pack::shape(&m, false, Rounding::None);
        assert_eq!(shape.is_ok(), good, "{zero}");
        let Ok(shape) = shape else { continue };
        // The largest sums there are: every product as far from 0 as it can be, all of one sign.
        m.codes = vec![0; 40 * 32].into();
        let x = [f32::MAX / 1e10; 64];
        let mut bytes = vec![0; shape.panel_bytes()];
        pack::panel(&m, &shape, None, None, 0, &mut bytes);
        for isa in instruction_sets() {
            let (x, mut out) = (form(&x, None, (shape.code, shape.group), isa), [[0f32; format::PANEL]]);
            let x = [x.as_ptr()];
            let mut job = kernel::Job::new(&shape, &bytes, &x, &mut out);
            // SAFETY: the instruction set was detected, the panel packed for the shape, x its form, out one row.
            unsafe { kernel::kernel(isa, &shape)(&mut job) };
            for (r, y) in out[0].iter().enumerate() {
                let want: f64 = (0..64).map(|c| f64::from(m.value(r, c)) * f64::from(f32::MAX / 1e10)).sum();
                assert!((f64::from(*y) / want - 1.0).abs() < 1e-6, "{zero} {}: {y} {want}", isa.name());
            }
        }
    }
}
