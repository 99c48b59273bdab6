//! What tests of the kernels over packed weights share.

use super::reference::Reference;
use super::{Layer, Rng, Skew, gpu, hidden, relative_error, route, weights};
use moe_oracle::config::{Activation, ActivationFormat, InputType, MoeConfig, Parallel};
use moe_oracle::cuda::pack::{Codes, PackedExperts};
use moe_oracle::cuda::{CudaKernel, Stream};
use moe_oracle::oracle::{DynOracle, ORACLES};
use moe_oracle::scheme::QuantKey;
use moe_oracle::weights::{Scales, WeightElem, WeightMatrix};

pub fn oracle(alias: &str) -> &'static DynOracle {
    ORACLES.iter().find(|o| o.alias == alias).unwrap()
}

/// As tests/layers.rs has it for these input types, the activation's result being rounded to 16 bits as the output is.
pub fn bound(input: InputType) -> f64 {
    if input == InputType::F16 { 6e-4 } else { 4e-3 }
}

/// The layer with the weights that the GPU has: those that no packed format holds (permuted columns, scales of two
/// types, another 16-bit type than the layer's) are rounded to the layer's 16-bit type when they are packed.
pub fn as_stored(layer: &Layer) -> Layer {
    let mut weights = layer.weights.clone();
    if PackedExperts::new(&weights, &layer.config).unwrap().format().codes == Codes::Half {
        let f16 = layer.config.input == InputType::F16;
        let bits = |v: f32| if f16 { half::f16::from_f32(v).to_bits() } else { half::bf16::from_f32(v).to_bits() };
        let matrices = weights.experts.iter_mut().flat_map(|e| e.gate.iter_mut().chain([&mut e.up, &mut e.down]));
        for m in matrices {
            let all = (0..m.rows).flat_map(|r| (0..m.cols).map(move |c| (r, c)));
            let codes: Vec<u8> = all.flat_map(|(r, c)| bits(m.value(r, c)).to_le_bytes()).collect();
            *m = WeightMatrix {
                rows: m.rows,
                cols: m.cols,
                elem: if f16 { WeightElem::F16 } else { WeightElem::Bf16 },
                codes: codes.into(),
                scales: Scales::None,
            };
        }
    }
    Layer { oracle: layer.oracle, config: layer.config, weights }
}

/// Compares a call with the reference of exact activations: eager, and the same bits again from a graph. Gives the bits.
pub fn check(
    stream: &Stream,
    kernel: &CudaKernel,
    layer: &Layer,
    rng: &mut Rng,
    tokens: usize,
    skew: Skew,
    bound: f64,
) -> Vec<u16> {
    check_keyed(stream, kernel, layer, None, rng, tokens, skew, bound)
}

/// The same with the reference that quantises activations to a key.
#[expect(clippy::too_many_arguments, reason = "a call and what it is compared with")]
pub fn check_keyed(
    stream: &Stream,
    kernel: &CudaKernel,
    layer: &Layer,
    key: Option<QuantKey>,
    rng: &mut Rng,
    tokens: usize,
    skew: Skew,
    bound: f64,
) -> Vec<u16> {
    let x = hidden(rng, tokens, &layer.config);
    let (ids, weights) = route(rng, tokens, &layer.config, skew);
    let call = gpu::Call::new(stream, kernel, &x, &ids, &weights);
    call.launch(stream, kernel);
    let bits = call.output_bits(stream);
    let have = gpu::values(layer.config.input, &bits);
    let want = Reference::new(&as_stored(layer), key).forward(&x, &ids, &weights, None);
    let error = relative_error(&have, &want);
    assert!(error < bound, "{}: {error:e}, {tokens} tokens, {skew:?}, {:?}", layer.oracle.alias, layer.config);
    assert!(have.iter().all(|v| !v.is_nan()), "{}: not all written", layer.oracle.alias);
    assert_eq!(call.replay(stream, kernel), bits, "{}: a graph's replay differs", layer.oracle.alias);
    bits
}

/// Of `tokens` tokens in one call, those of `which` have the bits that they have alone.
pub fn tokens_are_alone(
    stream: &Stream,
    kernel: &CudaKernel,
    layer: &Layer,
    rng: &mut Rng,
    tokens: usize,
    which: &[usize],
) {
    let MoeConfig { hidden: h, topk: k, .. } = layer.config;
    let x = hidden(rng, tokens, &layer.config);
    let (ids, weights) = route(rng, tokens, &layer.config, Skew::Zipf);
    let all = gpu::forward(stream, kernel, &x, &ids, &weights);
    for &t in which {
        let (row, slots) = (t * h..(t + 1) * h, t * k..(t + 1) * k);
        let alone = gpu::forward(stream, kernel, &x[row.clone()], &ids[slots.clone()], &weights[slots]);
        assert_eq!(all[row], alone, "{}, token {t}", layer.oracle.alias);
    }
}

/// Layers of every oracle and odd sizes, numbered, for `check`.
pub fn every_oracle(mut check: impl FnMut(usize, &Layer, &mut Rng)) {
    for (n, oracle) in ORACLES.iter().enumerate() {
        for (m, (h, i)) in [(2880, 32), (64, 1408), (704, 96), (96, 352), (192, 192)].into_iter().enumerate() {
            for input in [InputType::Bf16, InputType::F16] {
                let mut rng = Rng((n * 100 + m) as u64);
                let bias = (n + m) % 3 == 0;
                let activation = if m % 2 == 0 { Activation::SILU } else { Activation::Relu2NoMul };
                let c = MoeConfig { input, bias, activation, ..MoeConfig::new(4, 2, h, i) };
                let layer = weights::layer(&mut rng, oracle, c);
                check(n + m, &layer, &mut rng);
            }
        }
    }
}

/// Layers of every activation, with biases.
pub fn every_activation(mut check: impl FnMut(&Layer, &mut Rng)) {
    let situ = Activation::Situ { beta: 2.0, linear_beta: Some(1.5) };
    let more = [Activation::Silu { limit: Some(1.5) }, Activation::SwigluStep { limit: 1.25 }, situ];
    for (n, activation) in Activation::ALL.into_iter().chain(more).enumerate() {
        for alias in ["Bf16", "Mxfp4W4A16", "Int4Asym"] {
            let mut rng = Rng(1000 + n as u64);
            let c = MoeConfig { activation, bias: true, ..MoeConfig::new(5, 3, 96, 192) };
            let layer = weights::layer(&mut rng, oracle(alias), c);
            check(&layer, &mut rng);
        }
    }
}

/// Layers of many, few and one expert, each with every kind of routing.
pub fn every_skew(mut check: impl FnMut(&Layer, &mut Rng, Skew)) {
    for (e, k) in [(512, 10), (16, 8), (1, 1), (40, 32)] {
        for alias in ["Bf16", "Nvfp4W4A16", "Fp8Block", "Int8ChannelWeightOnly"] {
            for (weight_on_input, skew) in
                [(false, Skew::Uniform), (true, Skew::Same), (false, Skew::Zipf), (true, Skew::Holes)]
            {
                let mut rng = Rng(3000);
                let c = MoeConfig { weight_on_input, ..MoeConfig::new(e, k, 96, 32) };
                let layer = weights::layer(&mut rng, oracle(alias), c);
                check(&layer, &mut rng, skew);
            }
        }
    }
}

/// Makes a layer's kernel, for the experts of a map if there is one.
pub type Make<'a> = &'a dyn Fn(&Layer, Option<&[i32]>) -> CudaKernel;

pub fn a_token_names_an_expert_twice(stream: &Stream, make: Make) {
    let mut rng = Rng(3500);
    let layer = weights::layer(&mut rng, oracle("Bf16"), MoeConfig::new(4, 3, 64, 64));
    let kernel = make(&layer, None);
    for (tokens, ids) in [(1, vec![2, 2, 1]), (3, vec![2, 2, 1, 1, 2, 2, 2, 2, 2])] {
        let x = hidden(&mut rng, tokens, &layer.config);
        let weights: Vec<f32> = ids.iter().map(|_| rng.range(0.1, 1.0)).collect();
        let want = Reference::new(&layer, None).forward(&x, &ids, &weights, None);
        let error = relative_error(&gpu::forward(stream, &kernel, &x, &ids, &weights), &want);
        assert!(error < 4e-3, "{ids:?}: {error:e}");
    }
}

/// Three ranks with every third expert each.
pub fn ranks_add_up(stream: &Stream, make: Make, tokens: usize) {
    ranks_of_add_up(stream, make, tokens, &["Bf16", "Fp8Block", "Int4"].map(|alias| (alias, None, 6e-3)));
}

/// The same for these oracles, each with what its activations are quantised to and a bound.
pub fn ranks_of_add_up(stream: &Stream, make: Make, tokens: usize, cases: &[(&str, Option<QuantKey>, f64)]) {
    for &(alias, key, bound) in cases {
        let mut rng = Rng(5000);
        let whole = weights::layer(&mut rng, oracle(alias), MoeConfig::new(10, 4, 96, 96));
        let x = hidden(&mut rng, tokens, &whole.config);
        let (ids, weights) = route(&mut rng, tokens, &whole.config, Skew::Uniform);
        let want = Reference::new(&whole, key).forward(&x, &ids, &weights, None);
        let mut sum = vec![0f32; x.len()];
        for rank in 0..3 {
            let mine: Vec<usize> = (0..10).filter(|e| e % 3 == rank).collect();
            let map: Vec<i32> = (0..10).map(|e| mine.iter().position(|m| *m == e).map_or(-1, |l| l as i32)).collect();
            let parallel = Parallel { ep: 3, ..Parallel::SINGLE };
            let config = MoeConfig { local_experts: mine.len(), parallel, ..whole.config };
            let mut part = whole.weights.clone();
            part.experts = mine.iter().map(|e| whole.weights.experts[*e].clone()).collect();
            let layer = Layer { oracle: whole.oracle, config, weights: part };
            let y = gpu::forward(stream, &make(&layer, Some(&map)), &x, &ids, &weights);
            sum.iter_mut().zip(y).for_each(|(s, y)| *s += y);
        }
        let error = relative_error(&sum, &want);
        assert!(error < bound, "{alias}, {tokens} tokens: {error:e}");
    }
}

pub fn a_poisoned_token_harms_no_other(stream: &Stream, make: Make) {
    let mut rng = Rng(6000);
    let layer = weights::layer(&mut rng, oracle("Mxfp4W4A16"), MoeConfig::new(4, 2, 96, 96));
    let kernel = make(&layer, None);
    let (tokens, h) = (5, 96);
    let mut x = hidden(&mut rng, tokens, &layer.config);
    let (ids, weights) = route(&mut rng, tokens, &layer.config, Skew::Same);
    let want = Reference::new(&layer, None).forward(&x, &ids, &weights, None);
    x[2 * h + 7] = f32::INFINITY;
    let call = gpu::Call::new(stream, &kernel, &x, &ids, &weights);
    call.launch(stream, &kernel);
    let y = gpu::values(layer.config.input, &call.output_bits(stream));
    assert!(y[2 * h..3 * h].iter().any(|v| !v.is_finite()), "an infinity was swallowed");
    for t in [0, 1, 3, 4] {
        let error = relative_error(&y[t * h..(t + 1) * h], &want[t * h..(t + 1) * h]);
        assert!(error < 6e-3, "token {t}: {error:e}");
    }
}

/// Formats that the batched activation format is tried with.
pub const BATCHED: [&str; 6] = ["Bf16", "Fp8Block", "Mxfp4W4A16", "Int4G32Asym", "Nvfp4W4A16", "Int8ChannelWeightOnly"];

/// Five experts with so many tokens in `max` slots each. The input of each GEMM becomes what `key` says.
pub fn the_batched_format_agrees(
    stream: &Stream,
    make: Make,
    aliases: &[&str],
    key: impl Fn(&Layer) -> Option<QuantKey>,
    max: usize,
    counts: [i32; 5],
) {
    for alias in aliases {
        let mut rng = Rng(6000);
        let config = MoeConfig { bias: true, ..MoeConfig::new(5, 1, 96, 192) };
        let layer = weights::layer(&mut rng, oracle(alias), config);
        let batched = MoeConfig { format: ActivationFormat::Batched, ..layer.config };
        let batched = Layer { oracle: layer.oracle, config: batched, weights: layer.weights.clone() };
        let x = hidden(&mut rng, 5 * max, &layer.config);
        let y = gpu::forward_batched(stream, &make(&batched, None), &x, &counts, max);
        let stored = as_stored(&layer);
        let mut reference = Reference::new(&stored, key(&layer));
        for (row, y) in y.chunks(96).enumerate() {
            let (expert, slot) = (row / max, row % max);
            if slot < counts[expert] as usize {
                let want = reference.forward(&x[row * 96..][..96], &[expert as i32], &[1.0], None);
                let error = relative_error(y, &want);
                assert!(error < 6e-3, "{alias}, expert {expert}, slot {slot}: {error:e}");
            } else {
                assert!(y.iter().all(|v| v.is_nan()), "{alias}: wrote an empty slot");
            }
        }
    }
}
