//! Which experts the made-up tokens choose.

use super::rng::Rng;

/// Random experts, `topk` different ones per token: all alike, or skewed by Zipf's law.
pub struct Routing {
    /// `[tokens, topk]`
    pub ids: Vec<i32>,
    topk: usize,
    skew: f64,
    /// All experts, in the order that the shuffles so far have left.
    order: Vec<i32>,
    used: Vec<bool>,
}

impl Routing {
    /// For calls of this many tokens. The nth most wanted expert is so with a weight of `n^-skew`.
    pub fn new(experts: usize, topk: usize, tokens: usize, skew: f64) -> Self {
        let order = (0..experts as i32).collect();
        Self { ids: vec![0; tokens * topk], topk, skew, order, used: vec![false; experts] }
    }

    /// Fresh experts for every token; returns how many different ones there are. Which experts are wanted most differs from
    /// draw to draw, as it does between a model's layers.
    pub fn draw(&mut self, rng: &mut Rng) -> usize {
        if self.skew > 0.0 {
            self.zipf(rng)
        } else {
            self.uniform(rng)
        }
        self.used.fill(false);
        self.ids.iter().for_each(|id| self.used[*id as usize] = true);
        self.used().count()
    }

    fn uniform(&mut self, rng: &mut Rng) {
        for token in self.ids.chunks_exact_mut(self.topk) {
            // The first steps of a Fisher-Yates shuffle; any order is as good a start as another.
            shuffle(&mut self.order, self.topk, rng);
            token.copy_from_slice(&self.order[..self.topk]);
        }
    }

    /// Each expert of a token is drawn by weight from those that the token does not have yet. That is the order of
    /// exponentially distributed times whose rates are the weights (Efraimidis and Spirakis 2006).
    fn zipf(&mut self, rng: &mut Rng) {
        let experts = self.order.len();
        shuffle(&mut self.order, experts, rng);
        let means: Vec<f64> = (0..experts).map(|rank| ((rank + 1) as f64).powf(self.skew)).collect();
        let mut times = Vec::new();
        for token in self.ids.chunks_exact_mut(self.topk) {
            times.clear();
            times.extend(self.order.iter().zip(&means).map(|(id, mean)| (-rng.unit().ln() * mean, *id)));
            if self.topk < experts {
                times.select_nth_unstable_by(self.topk, |a, b| a.0.total_cmp(&b.0));
            }
            token.iter_mut().zip(&times).for_each(|(id, time)| *id = time.1);
        }
    }

    /// The experts of the last draw.
    pub fn used(&self) -> impl Iterator<Item = usize> {
        self.used.iter().enumerate().filter(|u| *u.1).map(|u| u.0)
    }
}

/// The first steps of a Fisher-Yates shuffle.
fn shuffle(order: &mut [i32], steps: usize, rng: &mut Rng) {
    for i in 0..steps {
        let other = i + rng.below(order.len() - i);
        order.swap(i, other);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKENS: usize = 20_000;

    /// Tokens of each expert, the most wanted first.
    fn sorted_counts(experts: usize, topk: usize, skew: f64) -> Vec<usize> {
        let mut routing = Routing::new(experts, topk, TOKENS, skew);
        assert_eq!(routing.draw(&mut Rng::new(1)), routing.used().count());
        let mut counts = vec![0; experts];
        for token in routing.ids.chunks(topk) {
            let mut ids = token.to_vec();
            ids.sort_unstable();
            assert!(ids.windows(2).all(|w| w[0] < w[1]) && ids[0] >= 0, "an expert twice: {token:?}");
            ids.iter().for_each(|id| counts[*id as usize] += 1);
        }
        counts.sort_unstable_by(|a, b| b.cmp(a));
        counts
    }

    #[test]
    fn a_lone_expert_of_a_token_follows_zipfs_law() {
        for skew in [0.5, 1.0, 1.5] {
            let counts = sorted_counts(16, 1, skew);
            let weights: Vec<f64> = (1..=16).map(|n| f64::from(n).powf(-skew)).collect();
            let all: f64 = weights.iter().sum();
            for (count, weight) in counts.iter().zip(weights) {
                let want = TOKENS as f64 * weight / all;
                assert!((*count as f64 - want).abs() < 5.0 * want.sqrt(), "{skew}: {counts:?}");
            }
        }
    }

    #[test]
    fn a_token_takes_the_second_of_two_experts_by_what_is_left() {
        // Weights 1, 1/2, 1/3: the third is left out where the other two come first, in either order.
        let counts = sorted_counts(3, 2, 1.0);
        let (a, b, c) = (6.0 / 11.0, 3.0 / 11.0, 2.0 / 11.0);
        let without_c = a * b / (b + c) + b * a / (a + c);
        let want = TOKENS as f64 * (1.0 - without_c);
        assert!((counts[2] as f64 - want).abs() < 5.0 * want.sqrt(), "{counts:?} {want}");
    }

    #[test]
    fn without_skew_all_experts_are_alike() {
        let counts = sorted_counts(32, 4, 0.0);
        let mean = (TOKENS * 4 / 32) as f64;
        assert!(counts.iter().all(|c| (*c as f64 - mean).abs() < 5.0 * mean.sqrt()), "{counts:?}");
    }

    #[test]
    fn every_expert_may_be_a_tokens() {
        assert_eq!(sorted_counts(5, 5, 2.0), [TOKENS; 5]);
    }

    #[test]
    fn other_experts_are_wanted_most_in_another_draw() {
        let mut routing = Routing::new(64, 1, 1000, 2.0);
        let mut rng = Rng::new(2);
        let mut most = std::collections::HashSet::new();
        for _ in 0..8 {
            routing.draw(&mut rng);
            most.insert((0..64).max_by_key(|e| routing.ids.iter().filter(|id| *id == e).count()));
        }
        assert!(most.len() > 1, "{most:?}");
    }
}
