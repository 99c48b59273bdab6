//! Routing: from logits to expert ids and weights, in float32, one token at a time.

use crate::config::{Routing, RoutingMethod, sigmoid};

/// Scratch float32 elements per token that [`route_token`] needs for `experts` experts.
pub const fn scratch_len(experts: usize) -> usize {
    2 * experts
}

/// Routes one token: fills `ids` and `weights` (both `[k]`), best first; equal scores go to the lowest index.
///
/// `logits` is `[E]`; `bias` is the score correction of DeepSeekV3, MiniMax2 and DeepseekV4, used to choose only.
/// A NaN logit counts as the smallest score. Methods that the caller performs leave ids -1 and weights 0.
pub fn route_token(
    routing: &Routing,
    logits: &[f32],
    bias: Option<&[f32]>,
    scratch: &mut [f32],
    ids: &mut [i32],
    weights: &mut [f32],
) {
    let e = logits.len();
    let (scores, choice) = scratch[..2 * e].split_at_mut(e);
    use RoutingMethod::*;
    match routing.method {
        Default | RenormalizeNaive => softmax(logits, scores),
        Renormalize | TopK | Llama4 => scores.copy_from_slice(logits),
        Sigmoid | SigmoidRenorm | DeepSeekV3 | MiniMax2 => map(logits, scores, sigmoid),
        DeepseekV4 => map(logits, scores, |x| softplus(x).sqrt()),
        Custom | Simulated | Unspecified => {
            ids.fill(-1);
            weights.fill(0.0);
            return;
        }
    }
    choice.copy_from_slice(scores);
    let biased = matches!(routing.method, DeepSeekV3 | MiniMax2 | DeepseekV4);
    if let (true, Some(bias)) = (biased, bias) {
        choice.iter_mut().zip(bias).for_each(|(c, b)| *c += b);
    }
    choice.iter_mut().filter(|c| c.is_nan()).for_each(|c| *c = f32::NEG_INFINITY);
    if routing.method == DeepSeekV3 && routing.groups > 1 {
        keep_groups(choice, routing.groups, routing.topk_groups);
    }
    top_k(choice, ids);
    for (w, id) in weights.iter_mut().zip(ids.iter()) {
        *w = scores[*id as usize];
    }
    match routing.method {
        Renormalize => softmax_in_place(weights),
        RenormalizeNaive | SigmoidRenorm => divide_by_sum(weights, 0.0),
        Llama4 => weights.iter_mut().for_each(|w| *w = sigmoid(*w)),
        DeepSeekV3 | MiniMax2 | DeepseekV4 if routing.normalize => divide_by_sum(weights, 1e-20),
        _ => {}
    }
    weights.iter_mut().for_each(|w| *w *= routing.scaling);
}

fn map(from: &[f32], to: &mut [f32], f: impl Fn(f32) -> f32) {
    to.iter_mut().zip(from).for_each(|(t, x)| *t = f(*x));
}

fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

fn softmax(logits: &[f32], out: &mut [f32]) {
    out.copy_from_slice(logits);
    softmax_in_place(out);
}

fn softmax_in_place(x: &mut [f32]) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    x.iter_mut().for_each(|v| *v = (*v - max).exp());
    divide_by_sum(x, 0.0);
}

fn divide_by_sum(x: &mut [f32], eps: f32) {
    let sum = x.iter().sum::<f32>() + eps;
    x.iter_mut().for_each(|v| *v /= sum);
}

/// Sets the scores outside the best groups to minus infinity; a group's score is the sum of its two best.
fn keep_groups(choice: &mut [f32], groups: usize, keep: usize) {
    let size = choice.len() / groups;
    let score = |g: &[f32]| {
        let (mut a, mut b) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for &x in g {
            if x > a {
                (a, b) = (x, a);
            } else if x > b {
                b = x;
            }
        }
        if size > 1 { a + b } else { a }
    };
    // A group stays when fewer than `keep` others beat it; at equal score the earlier one does. Going down from the
    // last group, a dropped group had `keep` better ones and so has no place among those that beat a kept one.
    for g in (0..groups).rev() {
        let mine = score(&choice[g * size..][..size]);
        let beats = |o: &usize| {
            let s = score(&choice[o * size..][..size]);
            *o != g && (s > mine || s == mine && *o < g)
        };
        if (0..groups).filter(beats).count() >= keep {
            choice[g * size..][..size].fill(f32::NEG_INFINITY);
        }
    }
}

/// The indices of the largest, best first.
fn top_k(choice: &mut [f32], ids: &mut [i32]) {
    for id in ids.iter_mut() {
        let mut best = usize::MAX;
        for (i, c) in choice.iter().enumerate() {
            // NaN marks what is taken already: it compares false with everything.
            if best == usize::MAX && !c.is_nan() || best != usize::MAX && *c > choice[best] {
                best = i;
            }
        }
        *id = best as i32;
        choice[best] = f32::NAN;
    }
}
