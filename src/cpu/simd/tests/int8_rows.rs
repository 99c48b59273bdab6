//! int8 activations: the form, products against float64 and the documented bound, and the same bits everywhere.

use super::*;

const ROUNDINGS: [Rounding; 2] = [Rounding::Int8Block, Rounding::Int8Row];

const BYTES_AND_NIBBLES: [Kind; 16] = [
    Kind::Mxfp4,
    Kind::Nvfp4,
    Kind::Tensor(Elem::Int8),
    Kind::Row(Elem::Int8),
    Kind::Group(Elem::U4, 32, false, false),
    Kind::Group(Elem::U4, 96, true, false),
    Kind::Group(Elem::U4, 32, false, true),
    Kind::Group(Elem::U4, 16, true, true),
    Kind::Group(Elem::U4, 0, false, false),
    Kind::Group(Elem::U4, 0, true, false),
    Kind::Group(Elem::U8, 32, false, false),
    Kind::Group(Elem::U8, 96, true, false),
    Kind::Group(Elem::U8, 32, false, true),
    Kind::Group(Elem::U8, 32, true, true),
    Kind::Group(Elem::U8, 0, false, false),
    Kind::Group(Elem::U8, 0, true, false),
];

/// Columns in packed order, and the blocks that share a scale.
fn blocks(m: &WeightMatrix, rounding: Rounding) -> Vec<Vec<usize>> {
    let group = m.group_cols().min(m.cols);
    let mut columns: Vec<usize> = (0..m.cols).collect();
    if let Scales::Group { g_idx: Some(g), .. } = &m.scales {
        columns.sort_by_key(|c| g[*c]);
    }
    match rounding {
        Rounding::None => columns.into_iter().map(|c| vec![c]).collect(),
        Rounding::Int8Row => vec![columns],
        Rounding::Int8Block => columns.chunks(group).flat_map(|g| g.chunks(32).map(<[usize]>::to_vec)).collect(),
    }
}

fn scale(x: &[f64], block: &[usize]) -> f64 {
    block.iter().fold(0.0, |m, c| f64::max(m, x[*c].abs())) / 127.0
}

/// What the values become before they are multiplied with the matrix.
pub(super) fn rounded(m: &WeightMatrix, x: &[f64], rounding: Rounding) -> Vec<f64> {
    let mut y = x.to_vec();
    if rounding != Rounding::None {
        for block in blocks(m, rounding) {
            let s = scale(x, &block);
            block.iter().filter(|_| s > 0.0).for_each(|c| y[*c] = (x[*c] / s).round_ties_even() * s);
        }
    }
    y
}

/// A matrix times a row, as the kernels of an instruction set do it.
fn product(m: &WeightMatrix, x: &[f32], rounding: Rounding, isa: CpuIsa) -> Vec<f32> {
    times_row(m, &pack::shape(m, false, rounding).unwrap(), x, isa)
}

fn times_row(m: &WeightMatrix, shape: &Shape, x: &[f32], isa: CpuIsa) -> Vec<f32> {
    let order = pack::permutation(m);
    let mut row = vec![f32::NAN; shape.form_len()];
    // SAFETY: only detected instruction sets come here.
    unsafe { kernel::form(isa, shape)(x, order.as_deref(), shape, &mut row) };
    let mut y = Vec::new();
    for i in 0..shape.panels() {
        let mut panel = vec![0; shape.panel_bytes()];
        pack::panel(m, shape, None, order.as_deref(), i, &mut panel);
        let mut out = [[f32::NAN; format::PANEL]];
        let x = [row.as_ptr()];
        let mut job = kernel::Job::new(shape, &panel, &x, &mut out);
        // SAFETY: the instruction set was detected, the panel packed for the shape, x its form, out one row.
        unsafe { kernel::kernel(isa, shape)(&mut job) };
        y.extend(out[0]);
    }
    y.truncate(m.rows);
    y
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn products_keep_the_documented_bound(
        kind in 0..BYTES_AND_NIBBLES.len(),
        by_row: bool,
        size in 1usize..6,
        seed: u64,
        loud in 0usize..96,
        magnitude in -60i32..60,
    ) {
        let (mut rng, rounding) = (Rng(seed | 1), ROUNDINGS[usize::from(by_row)]);
        let m = matrix(BYTES_AND_NIBBLES[kind], 40, 96 * size, &mut rng);
        let mut x: Vec<f32> = rng.floats(m.cols);
        // What a block without it would not notice.
        x[loud] *= 50.0;
        x.iter_mut().for_each(|v| *v *= 2f32.powi(magnitude));
        let x64: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
        let (blocks, near) = (blocks(&m, rounding), rounded(&m, &x64, rounding));
        let all: Vec<Vec<f32>> = instruction_sets().map(|isa| product(&m, &x, rounding, isa)).collect();
        prop_assert!(all.iter().all(|y| same(y, &all[0])), "instruction sets differ");
        for (r, have) in all[0].iter().enumerate() {
            let w = |c: usize| f64::from(m.value(r, c));
            let sum = |x: &[f64]| (0..m.cols).map(|c| w(c) * x[c]).sum::<f64>();
            let size: f64 = (0..m.cols).map(|c| (w(c) * x64[c]).abs()).sum();
            let have = f64::from(*have);
            let bound: f64 = blocks
                .iter()
                .map(|b| scale(&x64, b) / 2.0 * b.iter().map(|c| w(*c).abs()).sum::<f64>())
                .sum();
            prop_assert!((have - sum(&x64)).abs() <= bound * 1.00001 + size * 1e-5, "row {r}: {have} {}", sum(&x64));
            // A quotient that float32 rounds to the other side of a tie is one step of one value.
            let flips: f64 = blocks
                .iter()
                .flat_map(|b| b.iter().map(|c| (*c, scale(&x64, b))))
                .filter(|(c, s)| *s > 0.0 && ((x64[*c] / s).fract().abs() - 0.5).abs() < 1e-4)
                .map(|(c, s)| (w(c) * s).abs())
                .sum();
            prop_assert!((have - sum(&near)).abs() <= flips * 1.00001 + size * 1e-5, "row {r}: {have} {}", sum(&near));
        }
    }

    #[test]
    fn random_layers_match_what_rounding_gives(kind in 0..BYTES_AND_NIBBLES.len(), by_row: bool, h in 1usize..4, i in 1usize..4, bias: bool, seed: u64) {
        let rounding = ROUNDINGS[usize::from(by_row)];
        check_rounded(BYTES_AND_NIBBLES[kind], 96 * h, 96 * i, Activation::SILU, bias, seed, rounding);
    }
}

#[test]
fn a_form_is_the_nearest_integers_and_their_sum() {
    let mut rng = Rng(5);
    for (cols, group) in [(70, 70), (96, 16), (64, 20), (1, 1), (33, 32)] {
        let x: Vec<f32> = rng.floats(cols);
        for rounding in ROUNDINGS {
            for (code, step, offset) in
                [(format::Code::U4, 8, 8), (format::Code::E2m1, 8, 12), (format::Code::U8ZeroRows, 4, -1)]
            {
                let shape = Shape { rounding, ..shape(code, cols, group) };
                for isa in instruction_sets() {
                    let mut form = vec![f32::NAN; shape.form_len()];
                    // SAFETY: only detected instruction sets come here.
                    unsafe { kernel::form(isa, &shape)(&x, None, &shape, &mut form) };
                    let mut bytes: &[u8] = bytemuck::cast_slice(&form);
                    for columns in (0..cols).collect::<Vec<_>>().chunks(group).flat_map(|g| g.chunks(32)) {
                        let (this, rest) = bytes.split_at(8 + columns.len().next_multiple_of(step));
                        bytes = rest;
                        let largest = |x: &[f32]| x.iter().fold(0f32, |m, v| m.max(v.abs()));
                        let own = &x[columns[0]..columns[0] + columns.len()];
                        let s = largest(if rounding == Rounding::Int8Row { &x } else { own }) / 127.0;
                        assert_eq!(this[..4], s.to_ne_bytes());
                        let q: Vec<i32> = this[8..].iter().map(|b| i32::from(*b as i8)).collect();
                        for (q, x) in q.iter().zip(own) {
                            assert_eq!(*q as f32, (x / s).round_ties_even());
                        }
                        assert!(q[own.len()..].iter().all(|q| *q == 0), "padding");
                        assert_eq!(this[4..8], (-offset * q.iter().sum::<i32>()).to_ne_bytes());
                    }
                    assert!(bytes.is_empty());
                }
            }
        }
    }
}

#[test]
fn the_largest_products_do_not_overflow() {
    // Every pair of extreme codes and extreme activations, whose sums 16 bits would not hold.
    for (elem, codes) in [(Elem::Int8, [0x80, 0x7f, 0x81]), (Elem::U8, [0, 255, 1]), (Elem::U4, [0, 0xff, 0x0f])] {
        for code in codes {
            for zero in [None, Some(0), Some(15)] {
                let scales = match elem {
                    Elem::Int8 if zero.is_none() => Scales::PerTensor(1.0),
                    Elem::Int8 => continue,
                    _ => Scales::Group {
                        size: 64,
                        ty: HalfType::F16,
                        values: vec![1.0; 32],
                        zero_points: zero.map(|z| vec![z; 32]),
                        g_idx: None,
                    },
                };
                let len = 32 * 64 * WeightElem::Quant(elem).bits() / 8;
                let codes = Bytes::from(vec![code; len]);
                let m = WeightMatrix { rows: 32, cols: 64, elem: WeightElem::Quant(elem), codes, scales };
                for sign in [1.0, -1.0] {
                    let x: Vec<f32> = vec![sign * 127.0; 64];
                    let want: f32 = (0..64).map(|c| m.value(0, c) * x[c]).sum();
                    for isa in instruction_sets() {
                        let y = product(&m, &x, Rounding::Int8Block, isa);
                        assert!(
                            y.iter().all(|y| *y == want),
                            "{elem:?} {code:#x} {zero:?} {}: {} {want}",
                            isa.name(),
                            y[0]
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_spoils_its_row_only() {
    for (i, kind) in BYTES_AND_NIBBLES.into_iter().enumerate() {
        let mut rng = Rng(91 + i as u64);
        let weights = layer(kind, 96, 192, true, true, &mut rng);
        let good = rng.floats(15 * 96);
        let rows = [vec![0, 14], (1..14).collect::<Vec<u32>>(), vec![]];
        for isa in instruction_sets() {
            let experts = SimdExperts::rounding(&weights, Activation::SILU, isa, Rounding::Int8Block).unwrap();
            let want = run(&experts, &good, 96, &rows, &SingleThread);
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = good.clone();
                x[5 * 96 + 70] = bad;
                let got = run(&experts, &x, 96, &rows, &SingleThread);
                assert!(got[5 * 96..6 * 96].iter().all(|y| !y.is_finite()), "{kind:?} {bad} {}", isa.name());
                assert!(same(&got[..5 * 96], &want[..5 * 96]) && same(&got[6 * 96..], &want[6 * 96..]));
            }
            for tiny in [0.0, f32::from_bits(1), f32::MIN_POSITIVE] {
                let y = run(&experts, &vec![tiny; 15 * 96], 96, &rows, &SingleThread);
                assert!(y.iter().all(|y| y.is_finite()), "{kind:?} of {tiny:e}, {}", isa.name());
            }
        }
    }
}

#[test]
fn sizes_that_nothing_divides() {
    for rounding in ROUNDINGS {
        for kind in [Kind::Row(Elem::Int8), Kind::Group(Elem::U8, 0, true, false)] {
            check_rounded(kind, 17, 40, Activation::SILU, true, 21, rounding);
            check_rounded(kind, 41, 33, Activation::GeluTanh, false, 22, rounding);
            check_rounded(kind, 1, 1, Activation::SiluNoMul, false, 23, rounding);
        }
        check_rounded(Kind::Group(Elem::U4, 20, true, true), 40, 60, Activation::SILU, false, 24, rounding);
        check_rounded(Kind::Group(Elem::U4, 44, true, true), 88, 44, Activation::SILU, false, 32, rounding);
        check_rounded(Kind::Group(Elem::U8, 7, true, true), 42, 14, Activation::Gelu, false, 26, rounding);
        check_rounded(Kind::Mxfp4, 2880, 96, Activation::SWIGLU_OAI, true, 1, rounding);
        check_rounded(Kind::Nvfp4, 176, 80, Activation::SWIGLU_OAI, true, 36, rounding);
        check_rounded(Kind::Row(Elem::Int8), 1184, 1184, Activation::SILU, false, 37, rounding);
    }
}

#[test]
fn weights_without_such_kernels_are_refused() {
    let mut rng = Rng(3);
    for kind in [Kind::Bf16, Kind::F16, Kind::Row(Elem::E4m3), Kind::Mxfp8] {
        let weights = layer(kind, 32, 32, true, false, &mut rng);
        let packed = SimdExperts::rounding(&weights, Activation::SILU, CpuIsa::Portable, Rounding::Int8Block);
        assert!(matches!(packed, Err(PackError::Unsupported(_))), "{kind:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// int8 weights with exact activations, which come in parts where there is VNNI.
    #[test]
    fn exact_products_of_int8_weights(
        kind in proptest::sample::select(vec![
            Kind::Row(Elem::Int8), Kind::Group(Elem::U8, 0, false, false), Kind::Group(Elem::U8, 32, false, true)
        ]),
        size in 1usize..6,
        seed: u64,
        loud in 0usize..32,
        positive: bool,
        magnitude in -60i32..60,
    ) {
        let mut rng = Rng(seed | 1);
        let m = matrix(kind, 40, 32 * size, &mut rng);
        let mut x: Vec<f32> = rng.floats(m.cols);
        // Sums of q are largest where all have one sign.
        x.iter_mut().filter(|_| positive).for_each(|v| *v = v.abs());
        x[loud] *= 50.0;
        x.iter_mut().for_each(|v| *v *= 2f32.powi(magnitude));
        for isa in instruction_sets() {
            let shape = pack::shape(&m, false, Rounding::None).unwrap().for_isa(isa, true);
            prop_assert_eq!(shape.code == format::Code::Int8Rows, isa >= CpuIsa::Avx512Vnni);
            if shape.code != format::Code::Int8Rows {
                continue;
            }
            for (r, have) in times_row(&m, &shape, &x, isa).iter().enumerate() {
                let w = |c: usize| f64::from(m.value(r, c));
                let want: f64 = (0..m.cols).map(|c| w(c) * f64::from(x[c])).sum();
                // 2^-20 of each block's largest value, and float32 sums.
                let bound: f64 = (0..m.cols)
                    .map(|c| {
                        let largest = x.iter().fold(0.0, |m, v| f64::max(m, f64::from(v.abs())));
                        w(c).abs() * (largest * 2f64.powi(-20) + f64::from(x[c].abs()) * 1e-6)
                    })
                    .sum();
                prop_assert!((f64::from(*have) - want).abs() <= bound, "row {r}: {have} {want}");
            }
        }
    }
}
