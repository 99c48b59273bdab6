//! Rows of bfloat16 times weights that bfloat16 holds, where there are dot products of such.

use super::*;

/// Weights that are multiplied so.
const KINDS: [Kind; 10] = [
    Kind::Bf16,
    Kind::Row(Elem::E4m3),
    Kind::Block(128),
    Kind::Block(16),
    Kind::Mxfp8,
    Kind::Mxfp4,
    Kind::Nvfp4,
    Kind::Group(Elem::U4, 32, false, false),
    Kind::Group(Elem::U4, 96, false, true),
    Kind::Group(Elem::U4, 0, false, false),
];

fn isas() -> impl Iterator<Item = CpuIsa> {
    instruction_sets().filter(|isa| *isa >= CpuIsa::Avx512Bf16)
}

fn rounded(x: &[f32]) -> Vec<f32> {
    x.iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect()
}

fn shape_of(m: &WeightMatrix, isa: CpuIsa) -> Shape {
    let shape = pack::shape(m, false, Rounding::None).unwrap().for_isa(isa, true);
    assert!(shape.pairs);
    shape
}

fn form(shape: &Shape, x: &[f32], order: Option<&[u32]>, isa: CpuIsa) -> Vec<f32> {
    let mut out = vec![f32::NAN; shape.form_len()];
    // SAFETY: only detected instruction sets come here.
    unsafe { kernel::form(isa, shape)(x, order, shape, &mut out) };
    out
}

/// A matrix of up to 32 rows times `x`.
fn product(m: &WeightMatrix, x: &[f32], isa: CpuIsa) -> Vec<f32> {
    let (shape, order) = (shape_of(m, isa), pack::permutation(m));
    let mut bytes = vec![0; shape.panel_bytes()];
    pack::panel(m, &shape, None, order.as_deref(), 0, &mut bytes);
    let (x, mut out) = (form(&shape, x, order.as_deref(), isa), [[0f32; format::PANEL]]);
    let x = [x.as_ptr()];
    let mut job = kernel::Job::new(&shape, &bytes, &x, &mut out);
    // SAFETY: the instruction set was detected, the panel packed for the shape, x its form, out one row.
    unsafe { kernel::kernel(isa, &shape)(&mut job) };
    out[0][..m.rows].to_vec()
}

#[test]
fn a_row_of_bfloat16_becomes_pairs_of_the_same_values() {
    for isa in isas() {
        for (code, order) in [
            (format::Code::Bf16, [0, 1, 2, 3, 4, 5, 6, 7]),
            (format::Code::E4m3, [0, 1, 2, 3, 4, 5, 6, 7]),
            (format::Code::U4, [0, 2, 4, 6, 1, 3, 5, 7]),
        ] {
            for (cols, group) in [(70, 70), (96, 16), (64, 20), (1, 1), (33, 32)] {
                for magnitude in [-120, -60, 0, 60, 126] {
                    let shape = Shape { pairs: true, ..shape(code, cols, group) };
                    let mut rng = Rng(cols as u64);
                    let x = rounded(&rng.floats(cols).iter().map(|v| v * 2f32.powi(magnitude)).collect::<Vec<_>>());
                    let reversed: Vec<f32> = x.iter().rev().copied().collect();
                    let permutation: Vec<u32> = (0..cols as u32).rev().collect();
                    let row = form(&shape, &x, None, isa);
                    let used = 1 + pairs::len(&shape);
                    assert!(same(&row[..used], &form(&shape, &reversed, Some(&permutation), isa)[..used]));
                    let halves: &[half::bf16] = bytemuck::cast_slice(&row[1..used]);
                    let mut steps = halves.chunks(code.step());
                    for columns in (0..cols).collect::<Vec<_>>().chunks(group).flat_map(|g| g.chunks(code.step())) {
                        for (half, place) in steps.next().unwrap().iter().zip(order) {
                            let want = columns.get(place).map_or(0.0, |c| f64::from(x[*c]));
                            assert_eq!(f64::from(half.to_f32()) * f64::from(row[0]), want);
                            assert!(half.to_f32().abs() < 1.0);
                        }
                    }
                    assert!(steps.next().is_none());
                }
            }
        }
    }
}

#[test]
fn other_rows_keep_their_form() {
    for isa in isas() {
        for code in [format::Code::Bf16, format::Code::E4m3, format::Code::U4] {
            let plain = shape(code, 70, 32);
            let shape = Shape { pairs: true, ..plain };
            let mut x = rounded(&Rng(9).floats(70));
            x[69] = 1.0 + 1.0 / 256.0;
            let row = form(&shape, &x, None, isa);
            assert_eq!(row[0], 0.0);
            match plain.form() {
                format::Form::Plain => assert!(same(&row[1..71], &x)),
                _ => {
                    let want = form(&plain, &x, None, isa);
                    assert!(row[1..].iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits()));
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn products_are_exact_but_for_the_sums(kind in 0..KINDS.len(), size in 1usize..6, seed: u64, magnitude in -100i32..100) {
        let mut rng = Rng(seed | 1);
        let m = matrix(KINDS[kind], 32, 96 * size, &mut rng);
        let x: Vec<f32> = rng.floats(m.cols).iter().map(|v| v * 2f32.powi(magnitude)).collect();
        let x = rounded(&x);
        for isa in isas() {
            for (r, have) in product(&m, &x, isa).iter().enumerate() {
                let terms: Vec<f64> = (0..m.cols).map(|c| f64::from(m.value(r, c)) * f64::from(x[c])).collect();
                let (want, size): (f64, f64) = (terms.iter().sum(), terms.iter().map(|t| t.abs()).sum());
                prop_assert!((f64::from(*have) - want).abs() <= size * 1e-6, "row {r}: {have} {want}, of {size}");
            }
        }
    }
}

#[test]
fn every_code_is_multiplied_exactly() {
    let exactly = |elem: WeightElem, codes: Vec<u8>, cols: usize, scales: Scales| {
        let rows = codes.len() * 8 / elem.bits() / cols;
        let m = WeightMatrix { rows, cols, elem, codes: codes.into(), scales };
        for isa in isas() {
            for column in 0..cols {
                let x: Vec<f32> = (0..cols).map(|c| f32::from(u8::from(c == column))).collect();
                for (r, have) in product(&m, &x, isa).iter().enumerate() {
                    assert_eq!(*have, m.value(r, column), "{elem:?} row {r} column {column}");
                }
            }
        }
    };
    // Without the two that are no numbers.
    for codes in (0..=255u8).map(|c| if c & 0x7f == 0x7f { 0 } else { c }).collect::<Vec<_>>().chunks(32) {
        exactly(WeightElem::Quant(Elem::E4m3), codes.to_vec(), 1, Scales::PerTensor(1.0));
    }
    let codes: Vec<u8> = (0..16 * 32 / 2).map(|i| (((i * 2) % 16) | (((i * 2 + 1) % 16) << 4)) as u8).collect();
    let scales = |size: usize| Scales::Group {
        size,
        ty: HalfType::F16,
        values: vec![1.0; 16 * 32 / size],
        zero_points: None,
        g_idx: None,
    };
    exactly(WeightElem::Quant(Elem::U4), codes.clone(), 32, scales(16));
    let one = Scales::E8m0(vec![127; 16].into());
    exactly(WeightElem::Quant(Elem::E2m1), codes, 32, one);
}

#[test]
fn powers_of_two_go_through_exactly() {
    for (i, kind) in KINDS.into_iter().enumerate() {
        let mut rng = Rng(5 + i as u64);
        let m = matrix(kind, 32, 192, &mut rng);
        let x = rounded(&rng.floats(192));
        for isa in isas() {
            let want = product(&m, &x, isa);
            for e in [-90, -60, -20, 20, 60, 90] {
                let scale = 2f32.powi(e);
                let got = product(&m, &x.iter().map(|x| x * scale).collect::<Vec<_>>(), isa);
                assert!(got.iter().zip(&want).all(|(g, w)| *g == w * scale), "2^{e} {kind:?}");
            }
        }
    }
}

#[test]
fn what_is_not_finite_spoils_its_row_only() {
    for (i, kind) in KINDS.into_iter().enumerate() {
        let mut rng = Rng(91 + i as u64);
        let weights = layer(kind, 96, 192, true, true, &mut rng);
        let good = rounded(&rng.floats(15 * 96));
        let rows = [vec![0, 14], (1..14).collect::<Vec<u32>>(), vec![]];
        for isa in isas() {
            let experts = SimdExperts::new(&weights, Activation::SILU, isa).unwrap();
            let want = run(&experts, &good, 96, &rows, &SingleThread);
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = good.clone();
                x[5 * 96 + 70] = bad;
                let got = run(&experts, &x, 96, &rows, &SingleThread);
                assert!(got[5 * 96..6 * 96].iter().all(|y| !y.is_finite()), "{kind:?} {bad}");
                assert!(same(&got[..5 * 96], &want[..5 * 96]) && same(&got[6 * 96..], &want[6 * 96..]));
            }
            for tiny in [0.0, f32::MIN_POSITIVE] {
                let y = run(&experts, &vec![tiny; 15 * 96], 96, &rows, &SingleThread);
                assert!(y.iter().all(|y| y.is_finite()), "{kind:?} of {tiny:e}");
            }
        }
    }
}

#[test]
fn what_is_no_number_among_weights_comes_through() {
    for isa in isas() {
        let mut m = matrix(Kind::Row(Elem::E4m3), 32, 64, &mut Rng(3));
        let mut codes = m.codes.to_vec();
        (codes[64 * 3 + 5], codes[64 * 4 + 6]) = (0x7f, 0xff);
        m.codes = codes.into();
        let y = product(&m, &rounded(&Rng(4).floats(64)), isa);
        assert!(y.iter().enumerate().all(|(r, y)| y.is_nan() == (r == 3 || r == 4)));
    }
}
