//! Every routing method against its definition in float64.

mod common;

use common::Rng;
use moe_oracle::config::{Routing, RoutingMethod};
use moe_oracle::kernel::routing::{route_token, scratch_len};

fn route(r: &Routing, logits: &[f32], bias: Option<&[f32]>, k: usize) -> (Vec<i32>, Vec<f32>) {
    let (mut ids, mut weights) = (vec![i32::MIN; k], vec![f32::NAN; k]);
    let mut scratch = vec![f32::NAN; scratch_len(logits.len())];
    route_token(r, logits, bias, &mut scratch, &mut ids, &mut weights);
    (ids, weights)
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = x.iter().map(|v| (v - max).exp()).sum();
    x.iter().map(|v| (v - max).exp() / sum).collect()
}

/// Indices in order of descending score; equal scores: the lowest index first (the sort is stable).
fn order(scores: &[f64]) -> Vec<usize> {
    let mut all: Vec<usize> = (0..scores.len()).collect();
    all.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    all
}

fn reference(r: &Routing, logits: &[f32], bias: &[f32], k: usize) -> (Vec<usize>, Vec<f64>) {
    use RoutingMethod::*;
    let x: Vec<f64> = logits.iter().map(|v| f64::from(*v)).collect();
    let sigmoid = |v: f64| 1.0 / (1.0 + (-v).exp());
    let scores: Vec<f64> = match r.method {
        Default | RenormalizeNaive => softmax(&x),
        Renormalize | TopK | Llama4 => x.clone(),
        Sigmoid | SigmoidRenorm | DeepSeekV3 | MiniMax2 => x.iter().map(|v| sigmoid(*v)).collect(),
        DeepseekV4 => x.iter().map(|v| v.exp().ln_1p().sqrt()).collect(),
        _ => unreachable!(),
    };
    let biased = matches!(r.method, DeepSeekV3 | MiniMax2 | DeepseekV4);
    let mut choice = scores.clone();
    if biased {
        choice.iter_mut().zip(bias).for_each(|(c, b)| *c += f64::from(*b));
    }
    if r.method == DeepSeekV3 {
        let size = choice.len() / r.groups;
        let score = |g: &[f64]| order(g).iter().take(2).map(|i| g[*i]).sum::<f64>();
        let of_groups: Vec<f64> = choice.chunks(size).map(score).collect();
        for g in &order(&of_groups)[r.topk_groups..] {
            choice[g * size..][..size].fill(f64::NEG_INFINITY);
        }
    }
    let ids = order(&choice)[..k].to_vec();
    let mut w: Vec<f64> = ids.iter().map(|i| scores[*i]).collect();
    let sum: f64 = w.iter().sum();
    match r.method {
        Renormalize => w = softmax(&w),
        RenormalizeNaive | SigmoidRenorm => w.iter_mut().for_each(|w| *w /= sum),
        Llama4 => w.iter_mut().for_each(|w| *w = sigmoid(*w)),
        DeepSeekV3 | MiniMax2 | DeepseekV4 if r.normalize => w.iter_mut().for_each(|w| *w /= sum + 1e-20),
        _ => {}
    }
    w.iter_mut().for_each(|w| *w *= f64::from(r.scaling));
    (ids, w)
}

fn inside() -> impl Iterator<Item = RoutingMethod> {
    RoutingMethod::ALL.into_iter().map(|m| m.1).filter(|m| m.routes_inside())
}

#[test]
fn every_method_does_what_its_definition_says() {
    for method in inside() {
        let mut rng = Rng(1);
        for (e, k, groups, topk_groups) in [
            (8, 2, 1, 1),
            (256, 8, 8, 4),
            (128, 10, 4, 1),
            (16, 4, 16, 6),
            (1, 1, 1, 1),
            (512, 10, 1, 1),
            (60, 6, 4, 3),
        ] {
            for normalize in [true, false] {
                for _ in 0..50 {
                    let r = Routing { method, groups, topk_groups, normalize, scaling: rng.range(0.5, 3.0) };
                    // A coarse grid keeps float32 and float64 agreed on the order.
                    let mut logits: Vec<f32> = (0..e).map(|i| i as f32 / 64.0 - 2.0).collect();
                    for i in (1..e).rev() {
                        logits.swap(i, rng.below(i + 1));
                    }
                    let bias: Vec<f32> = (0..e).map(|_| 0.5 * rng.normal()).collect();
                    let (ids, weights) = route(&r, &logits, Some(&bias), k);
                    let (want_ids, want) = reference(&r, &logits, &bias, k);
                    assert_eq!(ids, want_ids.iter().map(|i| *i as i32).collect::<Vec<_>>(), "{r:?} of {e}");
                    for (have, want) in weights.iter().zip(want) {
                        assert!((f64::from(*have) - want).abs() <= 5e-6 * want.abs(), "{r:?}: {have} and {want}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_bias_is_optional_and_only_chooses() {
    for method in inside() {
        let r = Routing::new(method);
        let logits = [0.5, -1.0, 2.0, 0.0];
        assert_eq!(route(&r, &logits, None, 2), route(&r, &logits, Some(&[0.0; 4]), 2), "{method:?}");
        let biased = matches!(method, RoutingMethod::DeepSeekV3 | RoutingMethod::MiniMax2 | RoutingMethod::DeepseekV4);
        let (ids, weights) = route(&r, &logits, Some(&[0.0, 50.0, 0.0, 0.0]), 2);
        assert_eq!(ids[0], if biased { 1 } else { 2 }, "{method:?}");
        assert!(weights.iter().all(|w| *w < 5.0), "{method:?}: the bias is in a weight");
    }
}

#[test]
fn equal_scores_go_to_the_lowest_index() {
    for method in inside() {
        let r = Routing { groups: 4, topk_groups: 2, ..Routing::new(method) };
        assert_eq!(route(&r, &[0.25; 16], None, 4).0, [0, 1, 2, 3], "{method:?}");
        let mut logits = [0.0; 16];
        logits[9] = 1.0;
        logits[5] = 1.0;
        assert_eq!(route(&r, &logits, None, 2).0, [5, 9], "{method:?}");
    }
}

#[test]
fn logits_that_are_no_numbers_do_not_panic_and_ids_stay_distinct() {
    let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, 1.0, 3e38, -3e38];
    for method in inside() {
        for groups in [1, 4] {
            let r = Routing { groups, topk_groups: groups.div_ceil(2), ..Routing::new(method) };
            let mut rng = Rng(3);
            for _ in 0..2000 {
                let logits: Vec<f32> = (0..16).map(|_| odd[rng.below(odd.len())]).collect();
                let (mut ids, _) = route(&r, &logits, None, 6);
                ids.sort();
                assert!(ids.windows(2).all(|w| w[0] < w[1]), "{method:?} {logits:?}: {ids:?}");
                assert!(ids.iter().all(|i| (0..16).contains(i)));
            }
            assert_eq!(route(&r, &[f32::NAN; 16], None, 4).0, [0, 1, 2, 3], "{method:?}");
        }
    }
}

#[test]
fn methods_of_the_caller_leave_ids_empty() {
    for (_, method) in RoutingMethod::ALL.into_iter().filter(|m| !m.1.routes_inside()) {
        assert_eq!(route(&Routing::new(method), &[1.0, 2.0], None, 2), (vec![-1, -1], vec![0.0, 0.0]));
    }
}
