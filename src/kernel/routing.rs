//! Routing: from logits to expert ids and weights, in float32, one token at a time.
//!
//! Which experts are chosen is a matter of bits: a GPU must choose as this file does. So everything is made of additions,
//! multiplications, divisions and square roots in a fixed order, which every machine rounds alike; and where a score
//! only grows with the logit, the logits themselves decide.

use crate::config::{Routing, RoutingMethod};

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
    let by_score = matches!(routing.method, DeepSeekV3 | MiniMax2 | DeepseekV4);
    choice.copy_from_slice(if by_score { scores } else { logits });
    if let (true, Some(bias)) = (by_score, bias) {
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

/// e^x within 2 units in the last place, of operations that round alike everywhere: x = n ln 2 + r, a polynomial in r.
fn exp(x: f32) -> f32 {
    if x.is_nan() {
        return x;
    }
    if x > 88.722_84 {
        return f32::INFINITY;
    }
    if x < -103.972_08 {
        return 0.0;
    }
    // Adding 1.5 * 2^23 leaves no bits after the point: it rounds.
    const ROUND: f32 = 12_582_912.0;
    let n = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
    // The first part of ln 2 has so few bits that n times it is exact.
    let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let y = (p * (r * r) + r) + 1.0;
    // In two steps: 2^128 and 2^-150 are no floats.
    let n = n as i32;
    let half = n >> 1;
    y * power_of_two(half) * power_of_two(n - half)
}

/// 2^n for n from -126 to 127.
fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

/// `1 / (1 + e^-x)`
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// ln(1 + e^x)
fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { ln_1p(exp(x)) }
}

/// ln(1 + x) for x from 0 to e^20, of operations that round alike everywhere.
fn ln_1p(x: f32) -> f32 {
    let u = 1.0 + x;
    if u == 1.0 || x.is_nan() {
        return x;
    }
    // What rounding 1 + x lost, as a share of u: ln(1 + x) = ln u + lost / u nearly.
    let lost = if x < 1.0 { x - (u - 1.0) } else { 1.0 - (u - x) };
    // u = m 2^n with m from sqrt(1/2) to sqrt(2).
    let bits = u.to_bits() as i32;
    let n = (bits - 0x3f35_04f3) >> 23;
    let m = f32::from_bits((bits - (n << 23)) as u32);
    // ln m = 2 artanh s = 2 s + 2 s^3 / 3 + 2 s^5 / 5 + ...
    let f = m - 1.0;
    let s = f / (2.0 + f);
    let z = s * s;
    let mut p = 0.222_222_22;
    for c in [0.285_714_3, 0.4, 0.666_666_7] {
        p = p * z + c;
    }
    // 2 s = f - s f, where f is exact and s f is small.
    let ln_m = f - s * (f - p * z);
    n as f32 * std::f32::consts::LN_2 + (ln_m + lost / u)
}

fn softmax(logits: &[f32], out: &mut [f32]) {
    out.copy_from_slice(logits);
    softmax_in_place(out);
}

fn softmax_in_place(x: &mut [f32]) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    x.iter_mut().for_each(|v| *v = exp(*v - max));
    divide_by_sum(x, 0.0);
}

fn divide_by_sum(x: &mut [f32], eps: f32) {
    let sum = sum(x) + eps;
    x.iter_mut().for_each(|v| *v /= sum);
}

/// In the order of a GPU's warp: 32 sums of every 32nd element, then their halves onto each other.
fn sum(x: &[f32]) -> f32 {
    let mut lanes = [0.0; 32];
    for row in x.chunks(32) {
        lanes.iter_mut().zip(row).for_each(|(lane, v)| *lane += v);
    }
    for half in [16, 8, 4, 2, 1] {
        let (low, high) = lanes.split_at_mut(half);
        low.iter_mut().zip(high).for_each(|(l, h)| *l += *h);
    }
    lanes[0]
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Units in the last place between a float32 and the truth.
    fn ulps(have: f32, want: f64) -> f64 {
        let unit = f64::from((want as f32).next_up()) - f64::from(want as f32);
        (f64::from(have) - want).abs() / unit
    }

    #[test]
    fn exp_and_softplus_are_within_a_few_units_in_the_last_place() {
        let (mut worst_exp, mut worst_softplus) = (0.0, 0.0);
        for i in -1_040_000..=887_000 {
            let x = i as f32 * 1e-4;
            let truth = f64::from(x).exp();
            worst_exp = f64::max(worst_exp, ulps(exp(x), truth));
            worst_softplus = f64::max(worst_softplus, ulps(softplus(x), truth.ln_1p()));
        }
        assert!(worst_exp <= 2.0 && worst_softplus <= 3.0, "{worst_exp} {worst_softplus}");
    }

    #[test]
    fn exp_and_softplus_take_every_float() {
        for (x, e, s) in [
            (f32::INFINITY, f32::INFINITY, f32::INFINITY),
            (f32::NEG_INFINITY, 0.0, 0.0),
            (3e38, f32::INFINITY, 3e38),
            (-3e38, 0.0, 0.0),
            (-0.0, 1.0, std::f32::consts::LN_2),
            (1e-40, 1.0, std::f32::consts::LN_2),
        ] {
            assert_eq!((exp(x), softplus(x)), (e, s), "{x}");
        }
        assert!(exp(f32::NAN).is_nan() && softplus(f32::NAN).is_nan());
    }

    /// Where float32 cannot tell two scores apart, their logits still do.
    #[test]
    fn saturated_scores_are_chosen_by_their_logits() {
        for method in [RoutingMethod::Default, RoutingMethod::Sigmoid, RoutingMethod::SigmoidRenorm] {
            let (mut ids, mut weights) = ([0; 2], [0.0; 2]);
            let logits = [-200.0, 30.0, -150.0, 40.0];
            route_token(&Routing::new(method), &logits, None, &mut [0.0; 8], &mut ids, &mut weights);
            assert_eq!(ids, [3, 1], "{method:?}");
        }
    }
}
