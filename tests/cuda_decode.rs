//! `cuda_decode` against the float64 reference, on the GPU of this machine.
#![cfg(feature = "cuda")]

mod common;

use common::packed::{self, as_stored, oracle};
use common::reference::Reference;
use common::*;
use moe_oracle::config::*;
use moe_oracle::oracle::{ExpertsKind, ORACLES};

const KIND: ExpertsKind = ExpertsKind::Decode;

fn config(e: usize, k: usize, h: usize, i: usize) -> MoeConfig {
    MoeConfig::new(e, k, h, i)
}

/// Compares with the reference: eager, and the same bits again from a graph.
fn check(stream: &moe_oracle::cuda::Stream, layer: &Layer, rng: &mut Rng, tokens: usize, skew: Skew) {
    let kernel = gpu::kernel(stream, layer, KIND, None);
    packed::check(stream, &kernel, layer, rng, tokens, skew, packed::bound(layer.config.input));
}

#[test]
fn every_oracle_is_near_float64() {
    let Some(stream) = gpu::stream() else { return };
    for (n, oracle) in ORACLES.iter().enumerate() {
        for (m, (h, i)) in [(2880, 32), (64, 1408), (704, 96), (96, 352), (192, 192)].into_iter().enumerate() {
            for input in [InputType::Bf16, InputType::F16] {
                let mut rng = Rng((n * 100 + m) as u64);
                let bias = (n + m) % 3 == 0;
                let activation = if m % 2 == 0 { Activation::SILU } else { Activation::Relu2NoMul };
                let c = MoeConfig { input, bias, activation, ..config(4, 2, h, i) };
                let layer = weights::layer(&mut rng, oracle, c);
                for tokens in [1, 7] {
                    check(&stream, &layer, &mut rng, tokens, Skew::Uniform);
                }
            }
        }
    }
}

#[test]
fn every_activation_with_biases() {
    let Some(stream) = gpu::stream() else { return };
    let situ = Activation::Situ { beta: 2.0, linear_beta: Some(1.5) };
    let more = [Activation::Silu { limit: Some(1.5) }, Activation::SwigluStep { limit: 1.25 }, situ];
    for (n, activation) in Activation::ALL.into_iter().chain(more).enumerate() {
        for alias in ["Bf16", "Mxfp4W4A16", "Int4Asym"] {
            let mut rng = Rng(1000 + n as u64);
            let c = MoeConfig { activation, bias: true, ..config(5, 3, 96, 192) };
            let layer = weights::layer(&mut rng, oracle(alias), c);
            check(&stream, &layer, &mut rng, 1, Skew::Zipf);
            check(&stream, &layer, &mut rng, 7, Skew::Zipf);
        }
    }
}

#[test]
fn every_skew_and_number_of_tokens() {
    let Some(stream) = gpu::stream() else { return };
    for (e, k) in [(512, 10), (16, 8), (1, 1), (40, 32)] {
        for alias in ["Bf16", "Nvfp4W4A16", "Fp8Block", "Int8ChannelWeightOnly"] {
            for (weight_on_input, skew) in
                [(false, Skew::Uniform), (true, Skew::Same), (false, Skew::Zipf), (true, Skew::Holes)]
            {
                let mut rng = Rng(3000);
                let c = MoeConfig { weight_on_input, ..config(e, k, 96, 32) };
                let layer = weights::layer(&mut rng, oracle(alias), c);
                for tokens in [0, 1, 2, 3, 4, 8, 9, 33] {
                    check(&stream, &layer, &mut rng, tokens, skew);
                }
            }
        }
    }
}

#[test]
fn a_token_may_name_an_expert_twice() {
    let Some(stream) = gpu::stream() else { return };
    let mut rng = Rng(3500);
    let layer = weights::layer(&mut rng, oracle("Bf16"), config(4, 3, 64, 64));
    let kernel = gpu::kernel(&stream, &layer, KIND, None);
    for (tokens, ids) in [(1, vec![2, 2, 1]), (3, vec![2, 2, 1, 1, 2, 2, 2, 2, 2])] {
        let x = hidden(&mut rng, tokens, &layer.config);
        let weights: Vec<f32> = ids.iter().map(|_| rng.range(0.1, 1.0)).collect();
        let want = Reference::new(&layer, None).forward(&x, &ids, &weights, None);
        let error = relative_error(&gpu::forward(&stream, &kernel, &x, &ids, &weights), &want);
        assert!(error < 4e-3, "{ids:?}: {error:e}");
    }
}

#[test]
fn expert_parallel_ranks_add_up() {
    let Some(stream) = gpu::stream() else { return };
    for alias in ["Bf16", "Fp8Block", "Int4"] {
        let mut rng = Rng(5000);
        let whole = weights::layer(&mut rng, oracle(alias), config(10, 4, 96, 96));
        for tokens in [1, 7] {
            let x = hidden(&mut rng, tokens, &whole.config);
            let (ids, weights) = route(&mut rng, tokens, &whole.config, Skew::Uniform);
            let want = Reference::new(&whole, None).forward(&x, &ids, &weights, None);
            let mut sum = vec![0f32; x.len()];
            for rank in 0..3 {
                let mine: Vec<usize> = (0..10).filter(|e| e % 3 == rank).collect();
                let map: Vec<i32> =
                    (0..10).map(|e| mine.iter().position(|m| *m == e).map_or(-1, |l| l as i32)).collect();
                let parallel = Parallel { ep: 3, ..Parallel::SINGLE };
                let config = MoeConfig { local_experts: mine.len(), parallel, ..whole.config };
                let mut part = whole.weights.clone();
                part.experts = mine.iter().map(|e| whole.weights.experts[*e].clone()).collect();
                let layer = Layer { oracle: whole.oracle, config, weights: part };
                let kernel = gpu::kernel(&stream, &layer, KIND, Some(&map));
                let y = gpu::forward(&stream, &kernel, &x, &ids, &weights);
                sum.iter_mut().zip(y).for_each(|(s, y)| *s += y);
            }
            let error = relative_error(&sum, &want);
            assert!(error < 6e-3, "{alias}, {tokens} tokens: {error:e}");
        }
    }
}

#[test]
fn with_batch_invariance_a_token_is_alone() {
    let Some(stream) = gpu::stream() else { return };
    for (n, oracle) in ORACLES.iter().enumerate() {
        let mut rng = Rng(4000 + n as u64);
        let c = MoeConfig { batch_invariant: true, ..config(6, 3, 192, 96) };
        let layer = weights::layer(&mut rng, oracle, c);
        let kernel = gpu::kernel(&stream, &layer, KIND, None);
        let x = hidden(&mut rng, 13, &layer.config);
        let (ids, weights) = route(&mut rng, 13, &layer.config, Skew::Zipf);
        let all = gpu::forward(&stream, &kernel, &x, &ids, &weights);
        for t in 0..13 {
            let (row, slots) = (t * 192..(t + 1) * 192, t * 3..(t + 1) * 3);
            let alone = gpu::forward(&stream, &kernel, &x[row.clone()], &ids[slots.clone()], &weights[slots]);
            assert_eq!(all[row], alone, "{}, token {t}", oracle.alias);
        }
    }
}

#[test]
fn a_poisoned_token_leaves_its_neighbours_alone() {
    let Some(stream) = gpu::stream() else { return };
    let mut rng = Rng(6000);
    let layer = weights::layer(&mut rng, oracle("Mxfp4W4A16"), config(4, 2, 96, 96));
    let kernel = gpu::kernel(&stream, &layer, KIND, None);
    let (tokens, h) = (5, 96);
    let mut x = hidden(&mut rng, tokens, &layer.config);
    let (ids, weights) = route(&mut rng, tokens, &layer.config, Skew::Same);
    let want = Reference::new(&layer, None).forward(&x, &ids, &weights, None);
    x[2 * h + 7] = f32::INFINITY;
    let call = gpu::Call::new(&stream, &kernel, &x, &ids, &weights);
    call.launch(&stream, &kernel);
    let y = gpu::values(layer.config.input, &call.output_bits(&stream));
    assert!(y[2 * h..3 * h].iter().any(|v| !v.is_finite()), "an infinity was swallowed");
    for t in [0, 1, 3, 4] {
        let error = relative_error(&y[t * h..(t + 1) * h], &want[t * h..(t + 1) * h]);
        assert!(error < 6e-3, "token {t}: {error:e}");
    }
}

#[test]
fn the_batched_format_gives_what_the_standard_one_gives() {
    let Some(stream) = gpu::stream() else { return };
    for alias in ["Bf16", "Fp8Block", "Mxfp4W4A16", "Int4G32Asym", "Nvfp4W4A16", "Int8Channel"] {
        let mut rng = Rng(6000);
        let layer = weights::layer(&mut rng, oracle(alias), MoeConfig { bias: true, ..config(5, 1, 96, 192) });
        let batched = MoeConfig { format: ActivationFormat::Batched, ..layer.config };
        let batched = Layer { oracle: layer.oracle, config: batched, weights: layer.weights.clone() };
        let (max, counts) = (19, [3, 0, 19, 1, 9]);
        let x = hidden(&mut rng, 5 * max, &layer.config);
        let kernel = gpu::kernel(&stream, &batched, KIND, None);
        let y = gpu::forward_batched(&stream, &kernel, &x, &counts, max);
        let stored = as_stored(&layer);
        let mut reference = Reference::new(&stored, None);
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
