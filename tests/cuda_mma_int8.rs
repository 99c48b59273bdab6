//! `cuda_mma` where int8 tokens are multiplied by int8 weights: the float64 reference with activations as keyed.
#![cfg(feature = "cuda")]

mod common;

use common::gemm::{self, KIND, gemm};
use common::packed::{self, oracle};
use common::reference::Reference;
use common::*;
use moe_oracle::config::*;
use moe_oracle::cuda::{CudaKernel, GpuLayerError, GpuWeights, Stream, Tile, pack::PackedExperts};
use moe_oracle::oracle::{DynOracle, ORACLES};
use moe_oracle::scheme::QuantKey;

/// Every pair of int8 weights and int8 activations.
fn oracles() -> impl Iterator<Item = &'static DynOracle> {
    let all = ORACLES.iter().filter(|o| ["Int8Channel", "Int8Tensor", "Int8TensorDynamic"].contains(&o.alias));
    assert_eq!(all.clone().count(), 3);
    all
}

fn check(stream: &Stream, kernel: &CudaKernel, layer: &Layer, rng: &mut Rng, tokens: usize, skew: Skew) -> Vec<u16> {
    packed::check_keyed(stream, kernel, layer, gemm::key(layer), rng, tokens, skew, gemm::bound(layer))
}

const SKEWS: [Skew; 4] = [Skew::Uniform, Skew::Same, Skew::Zipf, Skew::Holes];

#[test]
fn every_pair_shape_and_tile_is_near_float64() {
    let Some(stream) = gpu::stream() else { return };
    let shapes = [(2880, 32), (64, 1408), (704, 96), (96, 352), (192, 192), (200, 72), (8, 8), (8328, 24), (136, 8200)];
    for (n, oracle) in oracles().enumerate() {
        for (m, (h, i)) in shapes.into_iter().enumerate() {
            for input in [InputType::Bf16, InputType::F16] {
                let mut rng = Rng((9000 + n * 100 + m) as u64);
                let activation =
                    if m % 2 == 0 { GATED[(n + m) % GATED.len()] } else { UNGATED[(n + m) % UNGATED.len()] };
                let (bias, weight_on_input) = ((n + m) % 3 == 0, (n + m) % 4 == 1);
                let c = MoeConfig { input, bias, activation, weight_on_input, ..MoeConfig::new(5, 2, h, i) };
                let layer = weights::layer(&mut rng, oracle, c);
                for (t, tile) in Tile::ALL.into_iter().map(Some).chain([None]).enumerate() {
                    let tokens = [10, 21, 75, 150, 9][t];
                    check(&stream, &gemm(&stream, &layer, tile, None), &layer, &mut rng, tokens, SKEWS[(m + t) % 4]);
                }
            }
        }
    }
}

#[test]
fn every_activation_and_skew_with_biases() {
    let Some(stream) = gpu::stream() else { return };
    for (n, activation) in GATED.into_iter().chain(UNGATED).enumerate() {
        for (m, oracle) in oracles().enumerate() {
            let mut rng = Rng((9400 + n) as u64);
            let c = MoeConfig { activation, bias: true, weight_on_input: m == 1, ..MoeConfig::new(9, 4, 160, 224) };
            let layer = weights::layer(&mut rng, oracle, c);
            let kernel = gemm(&stream, &layer, None, None);
            for (skew, tokens) in SKEWS.into_iter().zip([33, 130, 700, 12]) {
                check(&stream, &kernel, &layer, &mut rng, tokens, skew);
            }
        }
    }
}

/// Which also tells that sums are exact: no order of addition shows.
#[test]
fn every_tile_gives_the_same_bits_and_so_does_a_token_alone() {
    let Some(stream) = gpu::stream() else { return };
    for (n, oracle) in oracles().enumerate() {
        let c = MoeConfig { bias: n == 0, batch_invariant: true, ..MoeConfig::new(6, 3, 352, 416) };
        let layer = weights::layer(&mut Rng(9500 + n as u64), oracle, c);
        let of = |tile| check(&stream, &gemm(&stream, &layer, tile, None), &layer, &mut Rng(9600), 190, Skew::Zipf);
        let want = of(None);
        for tile in Tile::ALL {
            assert_eq!(of(Some(tile)), want, "{}, {tile:?}", oracle.alias);
        }
        let kernel = gpu::kernel(&stream, &layer, KIND, None);
        packed::tokens_are_alone(&stream, &kernel, &layer, &mut Rng(9700), 75, &[0, 1, 13, 40, 74]);
    }
}

#[test]
fn few_tokens_keep_exact_activations() {
    let Some(stream) = gpu::stream() else { return };
    for oracle in oracles() {
        let mut rng = Rng(9800);
        let layer = weights::layer(&mut rng, oracle, MoeConfig::new(8, 2, 256, 384));
        let kernel = gpu::kernel(&stream, &layer, KIND, None);
        packed::check(&stream, &kernel, &layer, &mut rng, 8, Skew::Uniform, packed::bound(layer.config.input));
        check(&stream, &kernel, &layer, &mut rng, 9, Skew::Uniform);
    }
}

#[test]
fn exact_activations_can_be_had() {
    let Some(stream) = gpu::stream() else { return };
    let mut rng = Rng(9900);
    let layer = weights::layer(&mut rng, oracle("Int8Channel"), MoeConfig::new(8, 2, 256, 384));
    let packed = PackedExperts::new(&layer.weights, &layer.config).unwrap();
    let weights = GpuWeights::Mma { packed, activation: None, hopper: false };
    let kernel = CudaKernel::new(&stream, &weights, &layer.config, None).unwrap();
    packed::check(&stream, &kernel, &layer, &mut rng, 40, Skew::Uniform, gemm::bound(&layer));
}

#[test]
fn a_stored_scale_must_be_there() {
    let Some(stream) = gpu::stream() else { return };
    let mut layer = weights::layer(&mut Rng(9950), oracle("Int8Tensor"), MoeConfig::new(4, 2, 64, 64));
    layer.weights.experts[2].down_input_scale = None;
    let packed = PackedExperts::new(&layer.weights, &layer.config).unwrap();
    let weights = GpuWeights::Mma { packed, activation: layer.weights.activation_key, hopper: false };
    let said = CudaKernel::new(&stream, &weights, &layer.config, None).err().unwrap();
    assert!(matches!(said, GpuLayerError::Cuda(_)) && said.to_string().contains("input scale"), "{said}");
}

#[test]
fn expert_parallel_ranks_add_up() {
    let Some(stream) = gpu::stream() else { return };
    for oracle in oracles() {
        let key = QuantKey::from_bits(oracle.activation);
        packed::ranks_of_add_up(
            &stream,
            &|layer, map| gemm(&stream, layer, None, map),
            21,
            &[(oracle.alias, key, 6e-3)],
        );
    }
}

#[test]
fn the_batched_format_gives_what_the_standard_one_gives() {
    let Some(stream) = gpu::stream() else { return };
    let aliases: Vec<&str> = oracles().map(|o| o.alias).collect();
    for tile in [None, Some(Tile::T16), Some(Tile::T128)] {
        let make = |layer: &Layer, map: Option<&[i32]>| gemm(&stream, layer, tile, map);
        packed::the_batched_format_agrees(&stream, &make, &aliases, gemm::key, 150, [3, 0, 150, 1, 40]);
    }
}

/// A NaN makes its token's scale one.
#[test]
fn a_poisoned_token_leaves_its_neighbours_alone() {
    let Some(stream) = gpu::stream() else { return };
    let mut rng = Rng(9990);
    let layer = weights::layer(&mut rng, oracle("Int8Channel"), MoeConfig::new(4, 2, 96, 96));
    let kernel = gemm(&stream, &layer, None, None);
    let (tokens, h) = (5, 96);
    let mut x = hidden(&mut rng, tokens, &layer.config);
    let (ids, weights) = route(&mut rng, tokens, &layer.config, Skew::Same);
    let want = Reference::new(&layer, gemm::key(&layer)).forward(&x, &ids, &weights, None);
    x[2 * h + 7] = f32::NAN;
    let call = gpu::Call::new(&stream, &kernel, &x, &ids, &weights);
    call.launch(&stream, &kernel);
    let y = gpu::values(layer.config.input, &call.output_bits(&stream));
    assert!(y[2 * h..3 * h].iter().all(|v| v.is_nan()), "a NaN was swallowed");
    for t in [0, 1, 3, 4] {
        let error = relative_error(&y[t * h..(t + 1) * h], &want[t * h..(t + 1) * h]);
        assert!(error < 8e-3, "token {t}: {error:e}");
    }
}
