//! `cuda_decode` against the float64 reference, on the GPU of this machine.
#![cfg(feature = "cuda")]

mod common;

use common::packed::{self, oracle};
use common::*;
use moe_oracle::config::*;
use moe_oracle::cuda::{CudaKernel, Stream};
use moe_oracle::oracle::{ExpertsKind, ORACLES};

const KIND: ExpertsKind = ExpertsKind::Decode;

fn config(e: usize, k: usize, h: usize, i: usize) -> MoeConfig {
    MoeConfig::new(e, k, h, i)
}

/// Compares with the reference: eager, and the same bits again from a graph.
fn check(stream: &Stream, layer: &Layer, rng: &mut Rng, tokens: usize, skew: Skew) {
    let kernel = gpu::kernel(stream, layer, KIND, None);
    packed::check(stream, &kernel, layer, rng, tokens, skew, packed::bound(layer.config.input));
}

#[test]
fn every_oracle_is_near_float64() {
    let Some(stream) = gpu::stream() else { return };
    packed::every_oracle(|_, layer, rng| {
        for tokens in [1, 7] {
            check(&stream, layer, rng, tokens, Skew::Uniform);
        }
    });
}

#[test]
fn every_activation_with_biases() {
    let Some(stream) = gpu::stream() else { return };
    packed::every_activation(|layer, rng| {
        for tokens in [1, 7] {
            check(&stream, layer, rng, tokens, Skew::Zipf);
        }
    });
}

#[test]
fn every_skew_and_number_of_tokens() {
    let Some(stream) = gpu::stream() else { return };
    packed::every_skew(|layer, rng, skew| {
        for tokens in [0, 1, 2, 3, 4, 8, 9, 33] {
            check(&stream, layer, rng, tokens, skew);
        }
    });
}

#[test]
fn with_batch_invariance_a_token_is_alone() {
    let Some(stream) = gpu::stream() else { return };
    for (n, oracle) in ORACLES.iter().enumerate() {
        let mut rng = Rng(4000 + n as u64);
        let c = MoeConfig { batch_invariant: true, ..config(6, 3, 192, 96) };
        let layer = weights::layer(&mut rng, oracle, c);
        let kernel = gpu::kernel(&stream, &layer, KIND, None);
        let all: Vec<usize> = (0..13).collect();
        packed::tokens_are_alone(&stream, &kernel, &layer, &mut rng, 13, &all);
    }
}

#[test]
fn layers_as_large_as_real_ones() {
    let Some(stream) = gpu::stream() else { return };
    for (n, alias) in ["Bf16", "Fp8Block", "Int8Channel", "Mxfp8W8A16", "Int4", "Nvfp4W4A16"].into_iter().enumerate() {
        let mut rng = Rng(8000 + n as u64);
        let layer = weights::layer(&mut rng, oracle(alias), config(12, 8, 2048, 768));
        for tokens in [1, 4, 8] {
            check(&stream, &layer, &mut rng, tokens, Skew::Uniform);
        }
        // Here the groups of warps have several units, so that who does what changes from unit to unit.
        let layer = Layer { config: MoeConfig { batch_invariant: true, ..layer.config }, ..layer };
        let kernel = gpu::kernel(&stream, &layer, KIND, None);
        packed::tokens_are_alone(&stream, &kernel, &layer, &mut rng, 8, &[0, 5, 7]);
    }
}

/// A lone token's numbers are counted in units of their stages' largest: of any size, and beside one that is much larger.
#[test]
fn a_lone_token_of_any_size() {
    let Some(stream) = gpu::stream() else { return };
    let integers = ["Int4", "Int4Asym", "Int4G32", "Int4G32Asym", "Int8ChannelWeightOnly"];
    let lone = integers.into_iter().chain(["Fp8Block", "Fp8Channel", "Fp8Block32", "Mxfp8W8A16"]);
    for (n, alias) in lone.enumerate() {
        let mut rng = Rng(7000 + n as u64);
        let layer = weights::layer(&mut rng, oracle(alias), config(5, 3, 1088, 416));
        let kernel = gpu::kernel(&stream, &layer, KIND, None);
        // Between the kernels, numbers of layers of e4m3 codes are 2^80 times as large as they are.
        let scales: &[i32] = if alias.to_lowercase().contains("fp8") { &[-45, -20, 0] } else { &[-45, -20, 0, 30] };
        for &scale in scales {
            let mut x = hidden(&mut rng, 1, &layer.config);
            x.iter_mut().for_each(|v| *v *= 2f32.powi(scale));
            x[200] *= 1024.0;
            let (ids, routing) = route(&mut rng, 1, &layer.config, Skew::Uniform);
            let call = gpu::Call::new(&stream, &kernel, &x, &ids, &routing);
            call.launch(&stream, &kernel);
            let have = gpu::values(layer.config.input, &call.output_bits(&stream));
            let want = reference::Reference::new(&layer, None).forward(&x, &ids, &routing, None);
            let error = relative_error(&have, &want);
            assert!(error < packed::bound(layer.config.input), "{alias}, 2^{scale}: {error:e}");
        }
    }
}

/// On GPUs with some 132 multiprocessors that have clusters: 180 slabs of the output are too many for a block to each and
/// too few for two; rows of 14336 do not fit into shared memory.
#[test]
fn clusters_share_the_output() {
    let Some(stream) = gpu::stream() else { return };
    let odd = config(6, 4, 2880, 416);
    let odd = MoeConfig { activation: Activation::SWIGLU_OAI, bias: true, ..odd };
    let alone = MoeConfig { batch_invariant: true, ..odd };
    let wide = config(4, 2, 256, 14336);
    for (n, alias) in ["Mxfp4W4A16", "Nvfp4W4A16", "Mxfp8W8A16", "Int4G32"].into_iter().enumerate() {
        for (config, counts) in [(odd, &[1, 2, 4, 5, 8][..]), (alone, &[3]), (wide, &[3, 4, 8])] {
            let mut rng = Rng(9000 + n as u64);
            let layer = weights::layer(&mut rng, oracle(alias), config);
            for &tokens in counts {
                check(&stream, &layer, &mut rng, tokens, Skew::Zipf);
            }
        }
    }
}

fn decode(stream: &Stream) -> impl Fn(&Layer, Option<&[i32]>) -> CudaKernel {
    move |layer, map| gpu::kernel(stream, layer, KIND, map)
}

#[test]
fn a_token_may_name_an_expert_twice() {
    let Some(stream) = gpu::stream() else { return };
    packed::a_token_names_an_expert_twice(&stream, &decode(&stream));
}

#[test]
fn expert_parallel_ranks_add_up() {
    let Some(stream) = gpu::stream() else { return };
    for tokens in [1, 7] {
        packed::ranks_add_up(&stream, &decode(&stream), tokens);
    }
}

#[test]
fn a_poisoned_token_leaves_its_neighbours_alone() {
    let Some(stream) = gpu::stream() else { return };
    packed::a_poisoned_token_harms_no_other(&stream, &decode(&stream));
}

#[test]
fn the_batched_format_gives_what_the_standard_one_gives() {
    let Some(stream) = gpu::stream() else { return };
    packed::the_batched_format_agrees(&stream, &decode(&stream), &packed::BATCHED, |_| None, 19, [3, 0, 19, 1, 9]);
}
