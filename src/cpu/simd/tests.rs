//! Packed experts against float64 over [`WeightMatrix::value`], and bit-equality of batches and thread counts.

mod int8_rows;
mod nibbles;
mod pair_rows;
mod scaled_rows;

use super::*;
use crate::cpu::{Assignment, Experts, ExpertsCall, Segment, SingleThread, ThreadPool, padded};
use crate::scheme::{Elem, Scheme, number};
use crate::weights::{HalfType, Scales, WeightElem};
use bytes::Bytes;
use moe_oracle_simd::{fixed, format, kernel, pairs, scaled};
use proptest::prelude::*;

/// Those of this processor.
fn instruction_sets() -> impl Iterator<Item = CpuIsa> {
    CpuIsa::ALL.into_iter().filter(|isa| *isa <= CpuIsa::detect())
}

/// xorshift64*
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: usize) -> usize {
        ((self.next() >> 33) as usize) % n
    }
    /// In -1 .. 1.
    fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }
    fn scales(&mut self, n: usize, ty: Option<HalfType>) -> Vec<f32> {
        let exact = |x: f32| match ty {
            None => x,
            Some(HalfType::F16) => half::f16::from_f32(x).to_f32(),
            Some(HalfType::Bf16) => half::bf16::from_f32(x).to_f32(),
        };
        (0..n).map(|_| exact(0.001 + 0.01 * self.float().abs())).collect()
    }
}

/// A weight format of the tests.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Bf16,
    F16,
    Tensor(Elem),
    Row(Elem),
    Block(usize),
    Mxfp8,
    Mxfp4,
    Nvfp4,
    /// Element, group (0: the row), zero points, act-order
    Group(Elem, usize, bool, bool),
}

fn matrix(kind: Kind, rows: usize, cols: usize, rng: &mut Rng) -> WeightMatrix {
    let elem = match kind {
        Kind::Bf16 => WeightElem::Bf16,
        Kind::F16 => WeightElem::F16,
        Kind::Tensor(e) | Kind::Row(e) | Kind::Group(e, ..) => WeightElem::Quant(e),
        Kind::Block(_) | Kind::Mxfp8 => WeightElem::Quant(Elem::E4m3),
        Kind::Mxfp4 | Kind::Nvfp4 => WeightElem::Quant(Elem::E2m1),
    };
    let mut codes: Vec<u8> = (0..rows * cols * elem.bits() / 8).map(|_| rng.next() as u8).collect();
    match elem {
        WeightElem::Bf16 => {
            for c in codes.chunks_exact_mut(2) {
                c.copy_from_slice(&half::bf16::from_f32(rng.float() * 0.1).to_le_bytes());
            }
        }
        WeightElem::F16 => {
            for c in codes.chunks_exact_mut(2) {
                c.copy_from_slice(&half::f16::from_f32(rng.float() * 0.1).to_le_bytes());
            }
        }
        WeightElem::Quant(Elem::E4m3) => {
            for c in &mut codes {
                // No NaN, and subnormals often.
                *c = if *c & 0x7f == 0x7f { 1 } else { *c };
                *c = if rng.below(4) == 0 { *c & 0x87 } else { *c };
            }
        }
        _ => {}
    }
    let scales = match kind {
        Kind::Bf16 | Kind::F16 => Scales::None,
        Kind::Tensor(_) => Scales::PerTensor(rng.scales(1, None)[0]),
        Kind::Row(_) => Scales::PerRow(rng.scales(rows, None)),
        Kind::Block(block) => {
            Scales::Block { block, values: rng.scales(rows.div_ceil(block) * cols.div_ceil(block), None) }
        }
        Kind::Mxfp8 | Kind::Mxfp4 => {
            Scales::E8m0((0..rows * cols / 32).map(|_| 115 + rng.below(8) as u8).collect::<Vec<_>>().into())
        }
        Kind::Nvfp4 => Scales::Nvfp4 {
            codes: (0..rows * cols / 16).map(|_| 1 + rng.below(0x70) as u8).collect::<Vec<_>>().into(),
            global: 1e-4,
        },
        Kind::Group(e, size, asymmetric, act_order) => {
            let size = if size == 0 { cols } else { size };
            let groups = rows * cols / size;
            let ty = if rng.below(2) == 0 { HalfType::F16 } else { HalfType::Bf16 };
            // The type must be the same in all experts, so it goes by the shape.
            let ty = if cols.is_multiple_of(64) {
                HalfType::F16
            } else if cols.is_multiple_of(2) {
                HalfType::Bf16
            } else {
                ty
            };
            let max = if e == Elem::U4 { 16 } else { 256 };
            let mut g_idx: Vec<u32> = (0..cols).map(|c| (c / size) as u32).collect();
            for i in (1..cols).rev() {
                g_idx.swap(i, rng.below(i + 1));
            }
            Scales::Group {
                size,
                ty,
                values: rng.scales(groups, Some(ty)),
                zero_points: asymmetric.then(|| (0..groups).map(|_| rng.below(max) as u8).collect()),
                g_idx: act_order.then_some(g_idx),
            }
        }
    };
    WeightMatrix { rows, cols, elem, codes: Bytes::from(codes), scales }
}

fn layer(kind: Kind, hidden: usize, inter: usize, gated: bool, bias: bool, rng: &mut Rng) -> MoeWeights {
    let experts = (0..3)
        .map(|_| ExpertWeights {
            gate: gated.then(|| matrix(kind, inter, hidden, rng)),
            up: matrix(kind, inter, hidden, rng),
            down: matrix(kind, hidden, inter, rng),
            gate_bias: (gated && bias).then(|| rng.floats(inter)),
            up_bias: bias.then(|| rng.floats(inter)),
            down_bias: bias.then(|| rng.floats(hidden)),
            input_scale: None,
            down_input_scale: None,
        })
        .collect();
    MoeWeights { scheme: Scheme::Unquantized, weight_key: None, activation_key: None, experts }
}

fn times(m: &WeightMatrix, x: &[f64], bias: Option<&Vec<f32>>) -> Vec<f64> {
    (0..m.rows)
        .map(|r| {
            let sum: f64 = (0..m.cols).map(|c| f64::from(m.value(r, c)) * x[c]).sum();
            sum + bias.map_or(0.0, |b| f64::from(b[r]))
        })
        .collect()
}

fn expected(e: &ExpertWeights, activation: Activation, x: &[f32], rounding: Rounding) -> Vec<f64> {
    let x: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
    let times = |m: &WeightMatrix, x: &[f64], bias| times(m, &int8_rows::rounded(m, x, rounding), bias);
    let up = times(&e.up, &x, e.up_bias.as_ref());
    let gate = e.gate.as_ref().map_or(vec![0.0; up.len()], |g| times(g, &x, e.gate_bias.as_ref()));
    let mid: Vec<f64> = gate.iter().zip(&up).map(|(&g, &u)| f64::from(activation.apply(g as f32, u as f32))).collect();
    times(&e.down, &mid, e.down_bias.as_ref())
}

/// Runs rows `rows[e]` of `x` on expert e; output rows are input rows.
fn run(
    experts: &SimdExperts,
    x: &[f32],
    hidden: usize,
    rows: &[Vec<u32>],
    pool: &dyn crate::cpu::Executor,
) -> Vec<f32> {
    let stride = padded(hidden);
    let (mut assignments, mut segments) = (Vec::new(), Vec::new());
    for (expert, rows) in rows.iter().enumerate().filter(|(_, r)| !r.is_empty()) {
        segments.push(Segment { expert: expert as u32, start: assignments.len() as u32, len: rows.len() as u32 });
        assignments.extend(rows.iter().map(|&r| Assignment { input_row: r, output_row: r }));
    }
    let mut scratch = vec![f32::NAN; experts.scratch_len(assignments.len())];
    let mut output = vec![f32::NAN; x.len() / stride * hidden];
    let call = ExpertsCall { input: x, input_stride: stride, assignments: &assignments, segments: &segments };
    experts.run(call, &mut scratch, &mut output, pool);
    output
}

fn check(kind: Kind, hidden: usize, inter: usize, activation: Activation, bias: bool, seed: u64) {
    check_rounded(kind, hidden, inter, activation, bias, seed, Rounding::None);
}

/// In the Frobenius norm.
fn relative_error(have: &[f32], want: &[f64]) -> f64 {
    let error: f64 = have.iter().zip(want).map(|(h, w)| (f64::from(*h) - w).powi(2)).sum();
    (error / want.iter().map(|w| w * w).sum::<f64>()).sqrt()
}

fn check_rounded(
    kind: Kind,
    hidden: usize,
    inter: usize,
    activation: Activation,
    bias: bool,
    seed: u64,
    rounding: Rounding,
) {
    let mut rng = Rng(seed | 1);
    let weights = layer(kind, hidden, inter, activation.gated(), bias, &mut rng);
    let stride = padded(hidden);
    let mut x = vec![0f32; 15 * stride];
    for (r, row) in x.chunks_mut(stride).enumerate() {
        row[..hidden].copy_from_slice(&rng.floats(hidden));
        // Where there are kernels for bfloat16, most rows go through them, the others between them do not.
        if r % 3 > 0 {
            row.iter_mut().for_each(|v| *v = half::bf16::from_f32(*v).to_f32());
        }
    }
    let rows = [vec![14], (0..13).collect::<Vec<u32>>(), vec![13]];
    let want: Vec<f64> = (0..15u32)
        .flat_map(|r| {
            let e = rows.iter().position(|v| v.contains(&r)).unwrap();
            expected(&weights.experts[e], activation, &x[r as usize * stride..][..hidden], rounding)
        })
        .collect();
    for isa in CpuIsa::ALL {
        if isa > CpuIsa::detect() {
            continue;
        }
        let what = format!("{kind:?} {hidden} x {inter} {activation:?} {rounding:?} {}", isa.name());
        let experts = SimdExperts::rounding(&weights, activation, isa, rounding).unwrap();
        let got = run(&experts, &x, hidden, &rows, &SingleThread);
        if rounding == Rounding::None {
            let relative = relative_error(&got, &want);
            assert!(relative < 1e-5, "{what}: relative error {relative:e}");
        } else {
            // Where float32 and float64 differ on the side of a rounding boundary, a value is a step apart, which seldom
            // happens to a row; the others agree.
            let rows = got.chunks(hidden).zip(want.chunks(hidden));
            let errors: Vec<f64> = rows.map(|(g, w)| relative_error(g, w)).collect();
            let apart = errors.iter().filter(|e| **e >= 5e-5).count();
            assert!(apart <= 4 && errors.iter().all(|e| *e < 3e-2), "{what}: relative errors {errors:?}");
        }
        for threads in [2, 3] {
            let pool = ThreadPool::new(threads).unwrap();
            assert!(same(&got, &run(&experts, &x, hidden, &rows, &pool)), "{what}: {threads} threads differ");
        }
        for r in 0..13 {
            let alone = run(&experts, &x, hidden, &[vec![], vec![r]], &SingleThread);
            let at = r as usize * hidden..(r as usize + 1) * hidden;
            assert!(same(&alone[at.clone()], &got[at]), "{what}: row {r} alone differs");
        }
        let five = run(&experts, &x, hidden, &[vec![], vec![12, 3, 5, 0, 7]], &SingleThread);
        assert!(same(&five[3 * hidden..4 * hidden], &got[3 * hidden..4 * hidden]), "{what}: a batch of 5 differs");
    }
}

/// For forms, which look at nothing but columns, group and code.
fn shape(code: format::Code, cols: usize, group: usize) -> Shape {
    let scale = format::GroupScale::None;
    Shape { rows: 1, cols, group, code, scale, bias: false, rounding: Rounding::None, pairs: false }
}

fn same(a: &[f32], b: &[f32]) -> bool {
    a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

const KINDS: [Kind; 25] = [
    Kind::Bf16,
    Kind::F16,
    Kind::Tensor(Elem::E4m3),
    Kind::Row(Elem::E4m3),
    Kind::Block(128),
    Kind::Block(32),
    Kind::Block(24),
    Kind::Mxfp8,
    Kind::Mxfp4,
    Kind::Nvfp4,
    Kind::Tensor(Elem::Int8),
    Kind::Row(Elem::Int8),
    Kind::Group(Elem::U4, 32, false, false),
    Kind::Group(Elem::U4, 32, true, false),
    Kind::Group(Elem::U4, 32, false, true),
    Kind::Group(Elem::U4, 32, true, true),
    Kind::Group(Elem::U4, 0, false, false),
    Kind::Group(Elem::U4, 0, true, false),
    Kind::Group(Elem::U8, 32, false, false),
    Kind::Group(Elem::U8, 32, true, false),
    Kind::Group(Elem::U8, 32, false, true),
    Kind::Group(Elem::U8, 32, true, true),
    Kind::Group(Elem::U8, 0, false, false),
    Kind::Group(Elem::U8, 0, true, false),
    Kind::Group(Elem::U4, 16, true, false),
];

#[test]
fn every_format_matches_float64() {
    for (i, kind) in KINDS.into_iter().enumerate() {
        for (hidden, inter) in [(96, 192), (352, 64), (64, 704)] {
            check(kind, hidden, inter, Activation::SILU, false, 77 + i as u64);
        }
        check(kind, 160, 96, Activation::SWIGLU_OAI, true, 5 + i as u64);
        check(kind, 96, 160, Activation::Relu2NoMul, true, 9 + i as u64);
    }
}

#[test]
fn sizes_of_real_models() {
    check(Kind::Mxfp4, 2880, 96, Activation::SWIGLU_OAI, true, 1);
    check(Kind::Block(128), 96, 1408, Activation::SILU, false, 2);
    check(Kind::Group(Elem::U4, 128, true, true), 256, 2688, Activation::SILU, false, 3);
}

/// Of more columns than stay in the first-level cache panels lie two and two, their columns alternating.
#[test]
fn columns_of_several_slabs() {
    for (i, kind) in KINDS.into_iter().enumerate() {
        check(kind, 1184, 96, Activation::SILU, i % 2 == 0, 41 + i as u64);
        check(kind, 64, 1184, Activation::Relu2NoMul, i % 2 == 1, 43 + i as u64);
    }
    for kind in [Kind::Bf16, Kind::Row(Elem::E4m3), Kind::Block(128), Kind::Row(Elem::Int8)] {
        check(kind, 1037, 33, Activation::SILU, true, 44);
        check(kind, 33, 1037, Activation::SiluNoMul, false, 45);
    }
}

#[test]
fn sizes_that_nothing_divides() {
    let whole = [
        Kind::Bf16,
        Kind::F16,
        Kind::Row(Elem::E4m3),
        Kind::Block(16),
        Kind::Block(128),
        Kind::Row(Elem::Int8),
        Kind::Group(Elem::U8, 0, true, false),
    ];
    for kind in whole {
        check(kind, 17, 40, Activation::SILU, true, 21);
        check(kind, 41, 33, Activation::GeluTanh, false, 22);
        check(kind, 1, 1, Activation::SiluNoMul, false, 23);
    }
    // Groups that end within a step.
    check(Kind::Group(Elem::U4, 20, true, true), 40, 60, Activation::SILU, false, 24);
    check(Kind::Group(Elem::U4, 12, false, true), 36, 60, Activation::Silu { limit: Some(1.0) }, false, 25);
    check(Kind::Group(Elem::U8, 7, true, true), 42, 14, Activation::Gelu, false, 26);
}

#[test]
fn every_code_decodes_exactly() {
    // One weight per row and an input of 1: the result of up is the weight itself, then relu2 squares it.
    for isa in CpuIsa::ALL {
        if isa > CpuIsa::detect() {
            continue;
        }
        let codes: Vec<u8> = (0..=255).filter(|c| c & 0x7f != 0x7f).collect();
        let n = codes.len();
        let up = WeightMatrix {
            rows: n,
            cols: 1,
            elem: WeightElem::Quant(Elem::E4m3),
            codes: codes.clone().into(),
            scales: Scales::PerTensor(1.0),
        };
        let shape = pack::shape(&up, false, Rounding::None).unwrap();
        for (panel, codes) in codes.chunks(format::PANEL).enumerate() {
            let mut bytes = vec![0; shape.panel_bytes()];
            pack::panel(&up, &shape, None, None, panel, &mut bytes);
            let mut out = [[0f32; format::PANEL]];
            // The scaled form of 1: 2^119 and what it takes back to 2^120.
            let x = [2f32, 2f32.powi(119)];
            // SAFETY: the instruction set was checked, the panel packed for the shape, x and out have one row.
            unsafe { kernel::kernel(isa, &shape)(&mut kernel::Job::new(&shape, &bytes, &[x.as_ptr()], &mut out)) };
            for (c, y) in codes.iter().zip(&out[0]) {
                assert_eq!(*y, number::E4M3[usize::from(*c)], "code {c:#x} {}", isa.name());
            }
        }
    }
}

#[test]
fn what_cannot_be_packed_is_refused() {
    let mut rng = Rng(3);
    let mut w = layer(Kind::Bf16, 32, 32, true, false, &mut rng);
    assert!(matches!(
        SimdExperts::new(&w, Activation::SiluNoMul, CpuIsa::Portable),
        Err(PackError::Gate { gated: false, .. })
    ));
    w.experts[2].down = matrix(Kind::F16, 32, 32, &mut rng);
    let mixed = SimdExperts::new(&w, Activation::SILU, CpuIsa::Portable);
    assert!(matches!(mixed, Err(PackError::Mixed { expert: 2, tensor: "w2" })));
    let w = layer(Kind::Tensor(Elem::E5m2), 32, 32, true, false, &mut rng);
    assert!(SimdExperts::new(&w, Activation::SILU, CpuIsa::Portable).is_err());
    if CpuIsa::detect() < CpuIsa::Avx512 {
        let w = layer(Kind::Bf16, 32, 32, true, false, &mut rng);
        assert!(matches!(SimdExperts::new(&w, Activation::SILU, CpuIsa::Avx512), Err(PackError::Isa { .. })));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_shapes(kind in 0..KINDS.len(), h in 1usize..5, i in 1usize..5, bias: bool, seed: u64) {
        check(KINDS[kind], 32 * h, 32 * i, Activation::SILU, bias, seed);
    }
}

#[test]
fn many_experts_give_the_same_bits_on_any_number_of_threads() {
    let (hidden, inter, tokens) = (96, 64, 200);
    for (i, kind) in [Kind::Bf16, Kind::Block(128), Kind::Row(Elem::Int8), Kind::Mxfp4].into_iter().enumerate() {
        let mut rng = Rng(501 + i as u64);
        let mut weights = layer(kind, hidden, inter, true, true, &mut rng);
        while weights.experts.len() < 70 {
            weights.experts.extend(layer(kind, hidden, inter, true, true, &mut rng).experts);
        }
        let count = weights.experts.len();
        let x = rng.floats(tokens * padded(hidden));
        // One to five tokens each; and one expert that has half of all.
        let alike: Vec<usize> = (0..tokens).map(|t| if t < count { t } else { t % (count / 2) }).collect();
        let skewed: Vec<usize> = (0..tokens).map(|t| if t % 2 == 0 { 5 } else { t % count }).collect();
        let experts = SimdExperts::new(&weights, Activation::SILU, CpuIsa::detect()).unwrap();
        for of in [alike, skewed] {
            let rows: Vec<Vec<u32>> =
                (0..count).map(|e| (0..tokens as u32).filter(|t| of[*t as usize] == e).collect()).collect();
            let want = run(&experts, &x, hidden, &rows, &SingleThread);
            for (t, e) in of.iter().enumerate().step_by(17) {
                let want_row = expected(
                    &weights.experts[*e],
                    Activation::SILU,
                    &x[t * padded(hidden)..][..hidden],
                    Rounding::None,
                );
                let error = relative_error(&want[t * hidden..][..hidden], &want_row);
                assert!(error < 1e-5, "{kind:?} token {t}: {error:e}");
            }
            for threads in [2, 3, 4] {
                let pool = ThreadPool::new(threads).unwrap();
                assert!(same(&want, &run(&experts, &x, hidden, &rows, &pool)), "{kind:?}: {threads} threads differ");
            }
        }
    }
}
