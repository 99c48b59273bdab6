//! Whole layers: every oracle on every CPU backend against the float64 reference, and the promises that an engine
//! builds on (independence of the batch, of threads and of the workspace's content).

mod common;

use common::reference::Reference;
use common::*;
use moe_oracle::checkpoint::{Checkpoint, SharedExpert};
use moe_oracle::config::*;
use moe_oracle::cpu::{SingleThread, ThreadPool};
use moe_oracle::kernel::{Batched, ForwardError, Rows, RowsMut, Standard, routing};
use moe_oracle::layer::{Layer as CheckpointLayer, LayerError, LayerOptions};
use moe_oracle::oracle::{DynOracle, MoeBackend, Numerics, ORACLES, SelectInputs};
use moe_oracle::platform::Platform;
use proptest::prelude::{any, prop};
use proptest::test_runner::{Config, TestRunner};

fn oracle(alias: &str) -> &'static DynOracle {
    ORACLES.iter().find(|o| o.alias == alias).unwrap()
}

fn config(e: usize, k: usize, h: usize, i: usize) -> MoeConfig {
    MoeConfig { input: InputType::F32, ..MoeConfig::new(e, k, h, i) }
}

/// How far a backend may be from float64. Where activations are quantised, float32 and float64 disagree now and then
/// on which side of a rounding boundary a value lies, and each time costs one quantisation step of one element.
fn bound(layer: &Layer, target: Target) -> f64 {
    let exact = match target.info.numerics {
        Numerics::WeightOnly => true,
        Numerics::AsKeyed | Numerics::Mixed => layer.oracle.activation == 0,
        Numerics::Int8Block => false,
    };
    let out = match layer.config.input {
        InputType::F32 => 0.0,
        InputType::F16 => 6e-4,
        InputType::Bf16 => 4e-3,
    };
    out + if exact { 2e-5 } else { 5e-3 }
}

/// Compares every backend with the reference on one batch.
fn check(layer: &Layer, rng: &mut Rng, tokens: usize, skew: Skew) {
    let x = hidden(rng, tokens, &layer.config);
    let (ids, weights) = route(rng, tokens, &layer.config, skew);
    for target in targets(layer) {
        let kernel = kernel::<Standard>(layer, target, None);
        let have = forward(&kernel, &x, &ids, &weights, &SingleThread);
        let want = followed(layer, target.info).forward(&x, &ids, &weights, None);
        let (error, bound) = (relative_error(&have, &want), bound(layer, target));
        assert!(error < bound, "{} {target}, {tokens} tokens, {:?}: {error:e}", layer.oracle.alias, layer.config);
    }
}

#[test]
fn every_oracle_on_every_backend_is_near_float64() {
    for (n, oracle) in ORACLES.iter().enumerate() {
        for (m, (h, i)) in [(2880, 32), (64, 1408), (704, 96), (96, 352), (192, 192)].into_iter().enumerate() {
            let mut rng = Rng((n * 100 + m) as u64);
            let activation = if m % 2 == 0 { GATED[(n + m) % GATED.len()] } else { UNGATED[(n + m) % UNGATED.len()] };
            let bias = (n + m) % 3 == 0;
            let layer = weights::layer(&mut rng, oracle, MoeConfig { activation, bias, ..config(4, 2, h, i) });
            check(&layer, &mut rng, 7, Skew::Uniform);
        }
    }
}

#[test]
fn every_activation_with_biases() {
    for (n, activation) in GATED.into_iter().chain(UNGATED).enumerate() {
        for alias in ["Bf16", "Fp8Channel", "Mxfp4W4A16", "Int4Asym"] {
            let mut rng = Rng(1000 + n as u64);
            let c = MoeConfig { activation, bias: true, ..config(5, 3, 96, 192) };
            check(&weights::layer(&mut rng, oracle(alias), c), &mut rng, 7, Skew::Zipf);
        }
    }
}

#[test]
fn every_input_type_and_the_weight_on_the_input() {
    for alias in ["Bf16", "Fp8Block", "Nvfp4W4A4", "Int8Tensor", "Int4"] {
        for input in [InputType::Bf16, InputType::F16, InputType::F32] {
            for (weight_on_input, topk) in [(false, 4), (true, 1), (true, 4)] {
                let mut rng = Rng(2000);
                let c = MoeConfig { input, weight_on_input, ..config(8, topk, 192, 352) };
                check(&weights::layer(&mut rng, oracle(alias), c), &mut rng, 7, Skew::Uniform);
            }
        }
    }
}

/// What `cpu_simd_a8` gives up: a percent or so of the output's norm, less than what 4-bit weights themselves cost.
#[test]
fn int8_activations_stay_close_to_exact_ones() {
    let mut seen = 0;
    for (n, oracle) in ORACLES.iter().enumerate() {
        let mut rng = Rng(9000 + n as u64);
        let layer = weights::layer(&mut rng, oracle, config(4, 2, 704, 352));
        let x = hidden(&mut rng, 33, &layer.config);
        let (ids, weights) = route(&mut rng, 33, &layer.config, Skew::Uniform);
        for target in targets(&layer) {
            if target.info.numerics == Numerics::Int8Block {
                let have = forward(&kernel::<Standard>(&layer, target, None), &x, &ids, &weights, &SingleThread);
                let error = relative_error(&have, &Reference::new(&layer, None).forward(&x, &ids, &weights, None));
                assert!((1e-3..1.5e-2).contains(&error), "{} {target}: {error:e}", oracle.alias);
                seen += 1;
            }
        }
    }
    assert!(seen > 0 || std::env::var_os("MOE_ORACLE_TEST_BACKENDS").is_some());
}

#[test]
fn many_experts_many_tokens_and_every_skew() {
    for (e, k) in [(512, 10), (16, 8), (1, 1)] {
        for alias in ["Bf16", "Mxfp4W4A16", "Fp8ChannelWeightOnly"] {
            let mut rng = Rng(3000);
            let layer = weights::layer(&mut rng, oracle(alias), config(e, k, 96, 32));
            for skew in [Skew::Uniform, Skew::Same, Skew::Zipf, Skew::Holes] {
                for tokens in [0, 1, 33] {
                    check(&layer, &mut rng, tokens, skew);
                }
            }
        }
    }
    // 1100 tokens are more than go through the experts at once.
    for tokens in [1000, 1100] {
        let mut rng = Rng(3001);
        let layer = weights::layer(&mut rng, oracle("Int8ChannelWeightOnly"), config(32, 4, 32, 32));
        check(&layer, &mut rng, tokens, Skew::Zipf);
    }
}

#[test]
fn threads_and_batches_change_no_bit() {
    let pools: Vec<_> = (1..=3).map(|n| ThreadPool::new(n).unwrap()).collect();
    for (n, oracle) in ORACLES.iter().enumerate() {
        let mut rng = Rng(4000 + n as u64);
        let layer = weights::layer(&mut rng, oracle, config(6, 3, 192, 96));
        let (h, k) = (layer.config.hidden, layer.config.topk);
        let mut x = hidden(&mut rng, 33, &layer.config);
        // A loud neighbour would show in everybody's result if a dynamic tensor scale were shared.
        x[5 * h..6 * h].iter_mut().for_each(|v| *v *= 100.0);
        let (ids, weights) = route(&mut rng, 33, &layer.config, Skew::Zipf);
        for target in targets(&layer) {
            let kernel = kernel::<Standard>(&layer, target, None);
            let all = forward(&kernel, &x, &ids, &weights, &SingleThread);
            for pool in &pools {
                assert_eq!(all, forward(&kernel, &x, &ids, &weights, pool), "{} {target}", oracle.alias);
            }
            for t in 0..33 {
                let (row, slots) = (t * h..(t + 1) * h, t * k..(t + 1) * k);
                let alone = forward(&kernel, &x[row.clone()], &ids[slots.clone()], &weights[slots], &SingleThread);
                assert_eq!(all[row], alone, "{} {target}, token {t}", oracle.alias);
            }
        }
    }
}

#[test]
fn partial_outputs_of_expert_parallel_ranks_add_up() {
    for alias in ["Bf16", "Fp8Block", "Int4"] {
        let mut rng = Rng(5000);
        let whole = weights::layer(&mut rng, oracle(alias), config(10, 4, 96, 96));
        let x = hidden(&mut rng, 33, &whole.config);
        let (ids, weights) = route(&mut rng, 33, &whole.config, Skew::Uniform);
        for target in targets(&whole) {
            let want = forward(&kernel::<Standard>(&whole, target, None), &x, &ids, &weights, &SingleThread);
            let mut sum = vec![0f64; x.len()];
            // Experts are dealt out to three ranks, so that local order and global order differ in stride.
            for rank in 0..3 {
                let mine: Vec<usize> = (0..10).filter(|e| e % 3 == rank).collect();
                let map = (0..10).map(|e| mine.iter().position(|m| *m == e).map_or(-1, |l| l as i32)).collect();
                let parallel = Parallel { ep: 3, ..Parallel::SINGLE };
                let config = MoeConfig { local_experts: mine.len(), parallel, ..whole.config };
                let mut part = whole.weights.clone();
                part.experts = mine.iter().map(|e| whole.weights.experts[*e].clone()).collect();
                let layer = Layer { oracle: whole.oracle, config, weights: part };
                let kernel = kernel::<Standard>(&layer, target, Some(map));
                let y = forward(&kernel, &x, &ids, &weights, &SingleThread);
                sum.iter_mut().zip(y).for_each(|(s, y)| *s += f64::from(y));
            }
            let error = relative_error(&want, &sum);
            assert!(error < 1e-6, "{alias} {target}: {error:e}");
        }
    }
}

#[test]
fn the_batched_format_gives_what_the_standard_one_gives() {
    for alias in ["Bf16", "Fp8Block", "Fp8TensorDynamic", "Mxfp4W4A4", "Int4"] {
        let mut rng = Rng(6000);
        let layer = weights::layer(&mut rng, oracle(alias), config(4, 1, 96, 192));
        let batched = MoeConfig { format: ActivationFormat::Batched, ..layer.config };
        let batched = Layer { oracle: layer.oracle, config: batched, weights: layer.weights.clone() };
        let (max, counts) = (7, [3, 0, 7, 1]);
        let x = hidden(&mut rng, 4 * max, &layer.config);
        for target in targets(&batched) {
            let y = forward_batched(&kernel::<Batched>(&batched, target, None), &x, &counts, &SingleThread);
            let standard = kernel::<Standard>(&layer, target, None);
            for (row, y) in y.chunks(96).enumerate() {
                let (expert, slot) = (row / max, row % max);
                if slot < counts[expert] as usize {
                    let x = &x[row * 96..][..96];
                    assert_eq!(y, forward(&standard, x, &[expert as i32], &[1.0], &SingleThread), "{alias} {target}");
                } else {
                    assert!(y.iter().all(|v| v.is_nan()), "{alias} {target}: wrote an empty slot");
                }
            }
        }
    }
}

#[test]
fn the_monolithic_entry_is_routing_and_then_the_modular_one() {
    for (_, method) in RoutingMethod::ALL {
        let mut rng = Rng(7000);
        let routing = Routing { groups: 4, topk_groups: 2, scaling: 2.5, ..Routing::new(method) };
        let layer = weights::layer(&mut rng, oracle("Fp8Block"), MoeConfig { routing, ..config(16, 4, 96, 96) });
        let x = hidden(&mut rng, 33, &layer.config);
        let logits: Vec<f32> = (0..33 * 16).map(|_| 2.0 * rng.normal()).collect();
        let bias: Vec<f32> = (0..16).map(|_| 0.2 * rng.normal()).collect();
        for target in targets(&layer) {
            let kernel = kernel::<Standard>(&layer, target, None);
            let mut workspace = vec![0xff; kernel.router_workspace_bytes(33)];
            let mut out = vec![f32::NAN; x.len()];
            let result = kernel.forward_router(
                Rows::F32(&x),
                &logits,
                Some(&bias),
                RowsMut::F32(&mut out),
                &mut workspace,
                &SingleThread,
            );
            if !method.routes_inside() {
                assert_eq!(result, Err(ForwardError::Routing));
                continue;
            }
            result.unwrap();
            let (mut ids, mut weights) = (vec![0; 33 * 4], vec![0.0; 33 * 4]);
            let mut scratch = vec![f32::NAN; routing::scratch_len(16)];
            for (t, l) in logits.chunks(16).enumerate() {
                let slots = t * 4..t * 4 + 4;
                let (ids, weights) = (&mut ids[slots.clone()], &mut weights[slots]);
                routing::route_token(&layer.config.routing, l, Some(&bias), &mut scratch, ids, weights);
            }
            assert_eq!(out, forward(&kernel, &x, &ids, &weights, &SingleThread), "{method:?} {target}");
        }
    }
}

#[test]
fn wrong_arguments_are_errors_and_nothing_is_written() {
    let mut rng = Rng(8000);
    let layer = weights::layer(&mut rng, oracle("Bf16"), config(4, 2, 32, 32));
    for target in targets(&layer) {
        let kernel = kernel::<Standard>(&layer, target, None);
        let need = kernel.workspace_bytes(3);
        let call = |x: usize, ids: &[i32], weights: usize, out: usize, workspace: usize| {
            let (x, w, mut y) = (vec![1.0; x], vec![1.0; weights], vec![7.0; out]);
            let mut workspace = vec![0u8; workspace];
            let result = kernel.forward(Rows::F32(&x), ids, &w, RowsMut::F32(&mut y), &mut workspace, &SingleThread);
            assert!(result.is_ok() || y.iter().all(|v| *v == 7.0));
            result.err()
        };
        let length = |what, have, want| Some(ForwardError::Length { what, have, want });
        let ids = [0, 1, 2, 3, -1, 0];
        assert_eq!(call(96, &ids, 6, 96, need), None);
        assert_eq!(call(95, &ids, 6, 96, need), length("hidden_states", 95, 64));
        assert_eq!(call(96, &ids, 6, 95, need), length("output", 95, 96));
        assert_eq!(call(96, &ids[1..], 6, 96, need), length("topk_ids", 5, 6));
        assert_eq!(call(96, &ids, 7, 96, need), length("topk_weights", 7, 6));
        assert_eq!(call(96, &ids, 6, 96, need - 1), Some(ForwardError::Workspace { have: need - 1, want: need }));
        let id = |id| Some(ForwardError::ExpertId { token: 1, id, experts: 4 });
        assert_eq!(call(96, &[0, 1, 2, 4, 0, 1], 6, 96, need), id(4));
        assert_eq!(call(96, &[0, 1, -2, 3, 0, 1], 6, 96, need), id(-2));
        assert_eq!(call(0, &[], 0, 0, kernel.workspace_bytes(0)), None);
    }
    let batched = MoeConfig { format: ActivationFormat::Batched, ..layer.config };
    let batched = Layer { oracle: layer.oracle, config: batched, weights: layer.weights.clone() };
    for target in targets(&batched) {
        let kernel = kernel::<Batched>(&batched, target, None);
        for (counts, expert) in [([0, 3, 0, 0], 1), ([0, 0, -1, 0], 2)] {
            let (x, mut y) = (vec![1.0; 4 * 2 * 32], vec![0.0; 4 * 2 * 32]);
            let mut workspace = vec![0u8; kernel.workspace_bytes(2)];
            let result =
                kernel.forward_batched(Rows::F32(&x), &counts, RowsMut::F32(&mut y), &mut workspace, &SingleThread);
            assert_eq!(result, Err(ForwardError::Count { expert, count: counts[expert], max: 2 }));
        }
    }
}

#[test]
fn random_layers_are_near_float64() {
    let shape = prop::sample::select(vec![(704, 32), (32, 704), (352, 64), (64, 352), (192, 96), (96, 192)]);
    let skew = prop::sample::select(vec![Skew::Uniform, Skew::Same, Skew::Zipf, Skew::Holes]);
    let activation = prop::sample::select(GATED.into_iter().chain(UNGATED).collect::<Vec<_>>());
    let tokens = prop::sample::select(vec![0usize, 1, 7, 33]);
    // Weight-only pairs: the exact bound holds for them on every backend, whatever the values are.
    let exact = prop::sample::select(ORACLES.iter().filter(|o| o.activation == 0).map(|o| o.alias).collect::<Vec<_>>());
    let all = (any::<u64>(), exact, shape, 1usize..=64, 1usize..=10, tokens, skew, activation, any::<[bool; 2]>());
    // The same cases on every run: a failure in CI is a failure at home.
    let config_ = Config { cases: 48, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(
        config_,
        proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
    );
    let result = runner.run(&all, |(seed, alias, (h, i), e, k, tokens, skew, activation, [bias, on_input])| {
        let mut rng = Rng(seed);
        let c = MoeConfig { activation, bias, weight_on_input: on_input, ..config(e, k.min(e), h, i) };
        check(&weights::layer(&mut rng, oracle(alias), c), &mut rng, tokens, skew);
        Ok(())
    });
    result.unwrap();
}

#[test]
fn a_shared_expert_of_another_scheme_gets_its_own_backend() {
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/16_gpt_oss_mxfp4");
    let checkpoint = Checkpoint::open(fixture.as_ref()).unwrap();
    let with_shared = |alias: &str| {
        let mut moe = checkpoint.layer(0).unwrap();
        let c = MoeConfig { activation: moe.config.activation, input: moe.config.input, ..config(1, 1, 256, 96) };
        let c = MoeConfig { hidden: moe.config.hidden, ..c };
        let weights = weights::layer(&mut Rng(77), oracle(alias), c).weights;
        moe.shared = Some(SharedExpert { weights, gate: None });
        moe
    };
    let named = |name: &str| LayerOptions {
        platform: Platform::cpu(),
        inputs: SelectInputs::named(MoeBackend::by_name(name).unwrap()),
        exact_activations: false,
    };
    let made = |alias: &str, name: &str| CheckpointLayer::new(with_shared(alias), &named(name));
    // 16-bit weights have no backend of that name.
    let layer = made("Bf16", "cpu_simd_a8").unwrap();
    let names = (layer.choice().kernel.name, layer.shared_choice().unwrap().kernel.name);
    assert_eq!(names, ("cpu_simd_a8", "cpu_simd"));
    let x = hidden(&mut Rng(78), 3, layer.config());
    assert!(layer.run(&x, None, None, &SingleThread).unwrap().output_with_shared.is_some());
    // Where it has one, that is it.
    for (alias, name) in [("Int8ChannelWeightOnly", "cpu_simd_a8"), ("Bf16", "cpu_reference")] {
        assert_eq!(made(alias, name).unwrap().shared_choice().unwrap().kernel.name, name, "{alias}");
    }
    // A name of the routed experts' scheme must be right.
    assert!(matches!(made("Bf16", "rdna3").err().unwrap(), LayerError::Select(_)));
}
