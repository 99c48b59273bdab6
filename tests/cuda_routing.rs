//! The GPU routes as the CPU does: the same experts and the same weights, to the bit.
#![cfg(feature = "cuda")]

mod common;

use common::{Rng, gpu};
use moe_oracle::config::{Routing, RoutingMethod};
use moe_oracle::cuda::routing::{Router, Tensors};
use moe_oracle::cuda::{DeviceBuffer, Graph, Stream};
use moe_oracle::kernel::routing::{route_token, scratch_len};

/// (experts, k, groups, groups kept): every entry of the kernel, full and not; one expert to a group and one group.
const SHAPES: [(usize, usize, usize, usize); 16] = [
    (1, 1, 1, 1),
    (8, 2, 1, 1),
    (16, 4, 16, 6),
    (32, 32, 2, 2),
    (33, 4, 3, 2),
    (60, 6, 4, 3),
    (64, 8, 1, 1),
    (72, 6, 3, 2),
    (128, 10, 4, 1),
    (160, 6, 8, 3),
    (256, 8, 8, 4),
    (256, 8, 1, 1),
    (384, 8, 24, 5),
    (512, 10, 64, 64),
    (768, 16, 48, 40),
    (1024, 32, 1024, 512),
];

fn inside() -> impl Iterator<Item = RoutingMethod> {
    RoutingMethod::ALL.into_iter().map(|m| m.1).filter(|m| m.routes_inside())
}

/// Logits of several kinds: smooth, on a grid with many equal ones, saturating, and with what is no number.
fn logits(rng: &mut Rng, tokens: usize, experts: usize) -> Vec<f32> {
    let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1.0, 3e38, -3e38, 1e-42];
    let one = |token: usize, rng: &mut Rng| match token % 5 {
        0 => rng.normal(),
        1 => (rng.normal() * 4.0).round() / 2.0,
        2 => 60.0 * rng.normal(),
        3 => 1e-3 * rng.normal() - 4.0,
        _ => odd[rng.below(odd.len())],
    };
    (0..tokens * experts).map(|i| one(i / experts, rng)).collect()
}

struct Routed {
    ids: Vec<i32>,
    weights: Vec<f32>,
}

fn on_cpu(r: &Routing, logits: &[f32], bias: Option<&[f32]>, experts: usize, k: usize) -> Routed {
    let tokens = logits.len() / experts;
    let mut out = Routed { ids: vec![0; tokens * k], weights: vec![0.0; tokens * k] };
    let mut scratch = vec![0.0; scratch_len(experts)];
    for (t, row) in logits.chunks(experts).enumerate() {
        let at = t * k..(t + 1) * k;
        route_token(r, row, bias, &mut scratch, &mut out.ids[at.clone()], &mut out.weights[at]);
    }
    out
}

fn on_gpu(stream: &Stream, r: &Routing, logits: &[f32], bias: Option<&[f32]>, experts: usize, k: usize) -> Routed {
    let tokens = logits.len() / experts;
    let router = Router::new(stream.gpu(), r, experts, k).unwrap();
    let logits = DeviceBuffer::of(stream, logits).unwrap();
    let bias = bias.map(|b| DeviceBuffer::of(stream, b).unwrap());
    let (ids, weights) = (vec![i32::MIN; tokens * k], vec![f32::NAN; tokens * k]);
    let ids_there = DeviceBuffer::of(stream, &ids).unwrap();
    let weights_there = DeviceBuffer::of(stream, &weights).unwrap();
    let tensors = Tensors {
        logits: logits.ptr(),
        bias: bias.as_ref().map(|b| b.ptr()),
        ids: ids_there.ptr(),
        weights: weights_there.ptr(),
    };
    // SAFETY: all tensors live until the downloads below have waited for the kernel; nothing else runs.
    unsafe { router.run(stream, &tensors, tokens, true) }.unwrap();
    let mut out = Routed { ids, weights };
    ids_there.download(stream, 0, &mut out.ids).unwrap();
    weights_there.download(stream, 0, &mut out.weights).unwrap();
    out
}

/// To the bit; a NaN is a NaN.
fn compare(have: &Routed, want: &Routed, what: &str) {
    assert_eq!(have.ids, want.ids, "{what}");
    for (i, (h, w)) in have.weights.iter().zip(&want.weights).enumerate() {
        let same = h.to_bits() == w.to_bits() || h.is_nan() && w.is_nan();
        assert!(same, "{what}: weight {i} is {h}, expected {w}");
    }
}

#[test]
fn every_method_and_shape_chooses_as_the_cpu_does() {
    let Some(stream) = gpu::stream() else { return };
    for method in inside() {
        let mut rng = Rng(5);
        for (experts, k, groups, topk_groups) in SHAPES {
            for (normalize, with_bias) in [(true, true), (false, false)] {
                let r = Routing { method, groups, topk_groups, normalize, scaling: 2.5 };
                for tokens in [1, 7, 130] {
                    let logits = logits(&mut rng, tokens, experts);
                    let bias: Vec<f32> = (0..experts).map(|_| 0.5 * rng.normal()).collect();
                    let bias = with_bias.then_some(&bias[..]);
                    let have = on_gpu(&stream, &r, &logits, bias, experts, k);
                    let want = on_cpu(&r, &logits, bias, experts, k);
                    compare(&have, &want, &format!("{r:?}, {tokens} tokens, {experts} experts, top {k}"));
                }
            }
        }
    }
}

#[test]
fn equal_scores_go_to_the_lowest_index() {
    let Some(stream) = gpu::stream() else { return };
    for method in inside() {
        let r = Routing { groups: 4, topk_groups: 2, ..Routing::new(method) };
        for experts in [16, 1024] {
            let have = on_gpu(&stream, &r, &vec![0.25; experts], None, experts, 4);
            assert_eq!(have.ids, [0, 1, 2, 3], "{method:?}");
        }
    }
}

#[test]
fn no_tokens_is_legal_and_short_tensors_are_refused() {
    let Some(stream) = gpu::stream() else { return };
    let router = Router::new(stream.gpu(), &Routing::new(RoutingMethod::Default), 8, 2).unwrap();
    let buffer = DeviceBuffer::zeroed(&stream, 8 * 4).unwrap();
    let t = Tensors { logits: buffer.ptr(), bias: None, ids: buffer.ptr(), weights: buffer.ptr() };
    // SAFETY: nothing is launched: no tokens, too few logits.
    unsafe {
        router.run(&stream, &t, 0, false).unwrap();
        assert!(router.run(&stream, &t, 2, false).is_err());
        assert!(router.run(&stream, &t, usize::MAX, false).is_err());
    }
    stream.synchronize().unwrap();
}

#[test]
fn a_captured_router_reads_the_new_logits_at_every_replay() {
    let Some(stream) = gpu::stream() else { return };
    let (experts, k, tokens) = (256, 8, 9);
    let r = Routing { groups: 8, topk_groups: 4, ..Routing::new(RoutingMethod::DeepSeekV3) };
    let router = Router::new(stream.gpu(), &r, experts, k).unwrap();
    let input = DeviceBuffer::alloc(stream.gpu(), tokens * experts * 4).unwrap();
    let ids = DeviceBuffer::alloc(stream.gpu(), tokens * k * 4).unwrap();
    let weights = DeviceBuffer::alloc(stream.gpu(), tokens * k * 4).unwrap();
    let t = Tensors { logits: input.ptr(), bias: None, ids: ids.ptr(), weights: weights.ptr() };
    // SAFETY: the buffers outlive the graph and every replay, each of which is waited for.
    let graph = Graph::capture(&stream, || unsafe { router.run(&stream, &t, tokens, false) }).unwrap();
    let mut rng = Rng(8);
    for replay in 0..3 {
        let logits = logits(&mut rng, tokens, experts);
        input.upload(&stream, 0, &logits).unwrap();
        // SAFETY: as above.
        unsafe { graph.launch(&stream) }.unwrap();
        let mut have = Routed { ids: vec![0; tokens * k], weights: vec![0.0; tokens * k] };
        ids.download(&stream, 0, &mut have.ids).unwrap();
        weights.download(&stream, 0, &mut have.weights).unwrap();
        compare(&have, &on_cpu(&r, &logits, None, experts, k), &format!("replay {replay}"));
    }
}
