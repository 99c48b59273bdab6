//! `cuda_mma` against the float64 reference, on the GPU of this machine: the grouped GEMM with every tile, and the choice
//! between it and the kernels for few tokens.
#![cfg(feature = "cuda")]

mod common;

use common::gemm::{self, KIND, gemm};
use common::packed::{self, oracle};
use common::*;
use moe_oracle::config::*;
use moe_oracle::cuda::{CudaKernel, Families, Stream, Tile};
use moe_oracle::oracle::{ExpertsKind, ORACLES};

fn config(e: usize, k: usize, h: usize, i: usize) -> MoeConfig {
    MoeConfig::new(e, k, h, i)
}

fn check(stream: &Stream, kernel: &CudaKernel, layer: &Layer, rng: &mut Rng, tokens: usize, skew: Skew) -> Vec<u16> {
    packed::check_keyed(stream, kernel, layer, gemm::key(layer), rng, tokens, skew, gemm::bound(layer))
}

#[test]
fn every_oracle_is_near_float64() {
    let Some(stream) = gpu::stream() else { return };
    packed::every_oracle(|n, layer, rng| {
        let tile = Tile::ALL[n % 4];
        check(&stream, &gemm(&stream, layer, Some(tile), None), layer, rng, 37, Skew::Uniform);
        check(&stream, &gemm(&stream, layer, None, None), layer, rng, 9, Skew::Uniform);
    });
}

#[test]
fn every_activation_with_biases() {
    let Some(stream) = gpu::stream() else { return };
    packed::every_activation(|layer, rng| {
        check(&stream, &gemm(&stream, layer, None, None), layer, rng, 19, Skew::Zipf);
    });
}

#[test]
fn every_skew_and_number_of_tokens() {
    let Some(stream) = gpu::stream() else { return };
    packed::every_skew(|layer, rng, skew| {
        let kernel = gemm(&stream, layer, None, None);
        for tokens in [0, 1, 2, 9, 33, 130, 700] {
            check(&stream, &kernel, layer, rng, tokens, skew);
        }
    });
}

#[test]
fn every_tile_gives_the_same_bits() {
    let Some(stream) = gpu::stream() else { return };
    for (n, oracle) in ORACLES.iter().enumerate() {
        let c = MoeConfig { bias: n % 2 == 0, ..config(6, 3, 352, 416) };
        let layer = weights::layer(&mut Rng(7000 + n as u64), oracle, c);
        let of = |tile| check(&stream, &gemm(&stream, &layer, tile, None), &layer, &mut Rng(7100), 150, Skew::Zipf);
        let want = of(None);
        for tile in Tile::ALL {
            assert_eq!(of(Some(tile)), want, "{}, {tile:?}", oracle.alias);
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
        let mut kernel = gpu::kernel(&stream, &layer, KIND, None);
        let why = kernel.set_families(Families { decode_up_to: 1, ..Families::of(&c) }).unwrap_err();
        assert!(why.to_string().contains("batch-invariant"), "{why}");
        packed::tokens_are_alone(&stream, &kernel, &layer, &mut rng, 75, &[0, 1, 13, 40, 74]);
    }
}

#[test]
fn few_tokens_go_to_the_kernels_for_few_tokens() {
    let Some(stream) = gpu::stream() else { return };
    let layer = weights::layer(&mut Rng(8000), oracle("Fp8Block"), config(8, 2, 256, 384));
    let (both, few) =
        (gpu::kernel(&stream, &layer, KIND, None), gpu::kernel(&stream, &layer, ExpertsKind::Decode, None));
    let gemm = gemm(&stream, &layer, None, None);
    let usual = both.families().unwrap();
    assert_eq!((usual.decode_up_to, usual.tile), (8, None));
    assert_eq!(few.families(), None);
    for (tokens, want) in [(1, &few), (8, &few), (9, &gemm)] {
        let bits = |kernel| check(&stream, kernel, &layer, &mut Rng(8100), tokens, Skew::Uniform);
        assert_eq!(bits(&both), bits(want), "{tokens} tokens");
    }
    // Of 128 tokens there are tiles for what is multiplied as it is stored.
    for (alias, has) in [("Bf16", true), ("Fp8Block", false), ("Mxfp4W4A16", false)] {
        let c = config(8, 2, 256, 384);
        let layer = weights::layer(&mut Rng(8200), oracle(alias), c);
        let mut kernel = gpu::kernel(&stream, &layer, KIND, None);
        let answer = kernel.set_families(Families { tile: Some(Tile::T128), ..Families::of(&c) });
        assert_eq!(answer.is_ok(), has, "{alias}: {answer:?}");
    }
    // A workspace for many tokens serves fewer.
    let sizes: Vec<usize> = (0..64).map(|t| both.workspace_bytes(t)).collect();
    assert!(sizes.is_sorted(), "{sizes:?}");
}

#[test]
fn a_token_may_name_an_expert_twice() {
    let Some(stream) = gpu::stream() else { return };
    packed::a_token_names_an_expert_twice(&stream, &|layer, map| gemm(&stream, layer, None, map));
}

#[test]
fn expert_parallel_ranks_add_up() {
    let Some(stream) = gpu::stream() else { return };
    packed::ranks_add_up(&stream, &|layer, map| gemm(&stream, layer, None, map), 21);
}

#[test]
fn a_poisoned_token_leaves_its_neighbours_alone() {
    let Some(stream) = gpu::stream() else { return };
    packed::a_poisoned_token_harms_no_other(&stream, &|layer, map| gemm(&stream, layer, None, map));
}

#[test]
fn the_batched_format_gives_what_the_standard_one_gives() {
    let Some(stream) = gpu::stream() else { return };
    for tile in [None, Some(Tile::T16)] {
        let make = |layer: &Layer, map: Option<&[i32]>| gemm(&stream, layer, tile, map);
        packed::the_batched_format_agrees(&stream, &make, &packed::BATCHED, |_| None, 150, [3, 0, 150, 1, 40]);
    }
}
