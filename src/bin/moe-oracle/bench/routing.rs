//! Which experts the made-up tokens choose.

use super::rng::Rng;

/// Uniformly random experts, `topk` different ones per token.
pub struct Routing {
    /// `[tokens, topk]`
    pub ids: Vec<i32>,
    topk: usize,
    /// All experts, in the order that the shuffles so far have left.
    order: Vec<i32>,
    used: Vec<bool>,
}

impl Routing {
    /// For calls of this many tokens.
    pub fn new(experts: usize, topk: usize, tokens: usize) -> Self {
        let order = (0..experts as i32).collect();
        Self { ids: vec![0; tokens * topk], topk, order, used: vec![false; experts] }
    }

    /// Fresh experts for every token; returns how many different ones there are.
    pub fn draw(&mut self, rng: &mut Rng) -> usize {
        self.used.fill(false);
        for token in self.ids.chunks_exact_mut(self.topk) {
            // The first steps of a Fisher-Yates shuffle; any order is as good a start as another.
            for (i, id) in token.iter_mut().enumerate() {
                let other = i + rng.below(self.order.len() - i);
                self.order.swap(i, other);
                *id = self.order[i];
                self.used[*id as usize] = true;
            }
        }
        self.used().count()
    }

    /// The experts of the last draw.
    pub fn used(&self) -> impl Iterator<Item = usize> {
        self.used.iter().enumerate().filter(|u| *u.1).map(|u| u.0)
    }
}
