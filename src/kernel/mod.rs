//! The kernel: prepare/finalize joined with experts.
//!
//! `[route] -> [widen, group by expert] -> [experts] -> [combine]`, on the caller's threads and in the caller's
//! workspace. Nothing here allocates during a forward call.

mod forward;
pub mod routing;
mod rows;
mod workspace;

pub use rows::{Rows, RowsMut};
pub use workspace::ALIGN;

use crate::config::{ActivationFormat, MoeConfig};
use crate::cpu::{Executor, Experts, ExpertsCall};
use crate::oracle::{self, ConvertError};
use std::marker::PhantomData;

/// How tokens come in and results go out.
pub trait PrepareFinalize: Send + Sync + 'static {
    /// The activation format that it takes.
    const FORMAT: ActivationFormat;
}

/// `[T, H]` with expert ids and weights per token; the result is combined over a token's experts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Standard;

/// `[E, max_tokens, H]` with a count per expert; the results stay per expert, the caller combines.
#[derive(Clone, Copy, Debug, Default)]
pub struct Batched;

impl PrepareFinalize for Standard {
    const FORMAT: ActivationFormat = ActivationFormat::Standard;
}

impl PrepareFinalize for Batched {
    const FORMAT: ActivationFormat = ActivationFormat::Batched;
}

/// Arguments of a forward call that do not fit the layer. Nothing was written when one comes back.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ForwardError {
    /// A slice of the wrong length.
    #[error("{what} holds {have} elements, {want} expected")]
    Length {
        /// Which.
        what: &'static str,
        /// What came.
        have: usize,
        /// What was expected.
        want: usize,
    },
    /// The workspace is too small.
    #[error("the workspace has {have} bytes, this call needs {want}: ask workspace_bytes for the largest batch")]
    Workspace {
        /// What came.
        have: usize,
        /// What is needed.
        want: usize,
    },
    /// An id that is no expert.
    #[error("token {token} names expert {id}, there are {experts} (-1 means: not on this rank)")]
    ExpertId {
        /// Which token.
        token: usize,
        /// The id.
        id: i32,
        /// The number of experts.
        experts: usize,
    },
    /// More tokens for an expert than its slots.
    #[error("expert {expert} has {count} tokens in a batch of {max} slots each")]
    Count {
        /// Which expert.
        expert: usize,
        /// Its count.
        count: i32,
        /// The slots.
        max: usize,
    },
    /// The routing method is the caller's to perform.
    #[error("this layer's routing method is the caller's: give ids and weights to `forward`")]
    Routing,
}

/// A layer ready to run.
pub struct MoeKernel<P, X> {
    config: MoeConfig,
    experts: X,
    /// Global expert to local, -1 where it lives on another rank.
    map: Option<Vec<i32>>,
    prepare: PhantomData<P>,
}

/// Tokens that go through the experts at once: bounds the workspace of long prompts, and is far beyond what register
/// tiles need to reuse weights.
const CHUNK: usize = 1024;

impl<P: PrepareFinalize, X: Experts> MoeKernel<P, X> {
    /// Checks that the parts fit together. `map[global]` is a local expert or -1; required where `local_experts` is
    /// less than `experts` and tokens come in the standard format.
    pub fn new(experts: X, config: &MoeConfig, map: Option<Vec<i32>>) -> Result<Self, ConvertError> {
        if let Some(problem) = config.problem() {
            return Err(ConvertError::Config(problem));
        }
        if P::FORMAT != config.format {
            return Err(ConvertError::Format);
        }
        if P::FORMAT == ActivationFormat::Standard || map.is_some() {
            check_map(map.as_deref(), config)?;
        }
        oracle::check_sizes(config, [experts.experts(), experts.hidden(), experts.intermediate()], None)?;
        Ok(Self { config: *config, experts, map, prepare: PhantomData })
    }

    /// The layer.
    pub fn config(&self) -> &MoeConfig {
        &self.config
    }

    /// The experts.
    pub fn experts(&self) -> &X {
        &self.experts
    }
}

/// Checks an expert map, which must be there where this rank holds only some of the experts.
pub(crate) fn check_map(map: Option<&[i32]>, config: &MoeConfig) -> Result<(), ConvertError> {
    let bad = |what: String| Err(ConvertError::ExpertMap(what));
    match map {
        None if config.local_experts != config.experts => {
            bad("is missing: this rank holds only some of the experts".into())
        }
        Some(m) if m.len() != config.experts => bad(format!("has {} entries for {} experts", m.len(), config.experts)),
        Some(m) => match m.iter().find(|l| **l < -1 || **l >= config.local_experts as i32) {
            Some(l) => bad(format!("names local expert {l}, there are {}", config.local_experts)),
            None => Ok(()),
        },
        None => Ok(()),
    }
}

/// Checks hidden states of so many elements with their ids and weights; gives the number of tokens.
pub(crate) fn check_routed(
    c: &MoeConfig,
    hidden: usize,
    topk_ids: &[i32],
    topk_weights: &[f32],
) -> Result<usize, ForwardError> {
    let tokens = hidden / c.hidden;
    expect("hidden_states", hidden, tokens * c.hidden)?;
    expect("topk_ids", topk_ids.len(), tokens * c.topk)?;
    expect("topk_weights", topk_weights.len(), tokens * c.topk)?;
    match topk_ids.iter().position(|id| *id < -1 || *id >= c.experts as i32) {
        Some(i) => Err(ForwardError::ExpertId { token: i / c.topk, id: topk_ids[i], experts: c.experts }),
        None => Ok(tokens),
    }
}

fn expect(what: &'static str, have: usize, want: usize) -> Result<(), ForwardError> {
    if have == want { Ok(()) } else { Err(ForwardError::Length { what, have, want }) }
}

impl Experts for Box<dyn Experts> {
    fn scratch_len(&self, assignments: usize) -> usize {
        (**self).scratch_len(assignments)
    }
    fn run(&self, call: ExpertsCall<'_>, scratch: &mut [f32], output: &mut [f32], pool: &dyn Executor) {
        (**self).run(call, scratch, output, pool)
    }
    fn bytes_per_expert(&self) -> usize {
        (**self).bytes_per_expert()
    }
    fn experts(&self) -> usize {
        (**self).experts()
    }
    fn hidden(&self) -> usize {
        (**self).hidden()
    }
    fn intermediate(&self) -> usize {
        (**self).intermediate()
    }
    fn isa(&self) -> crate::platform::CpuIsa {
        (**self).isa()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Experts that an engine made by hand: E, H, I.
    struct Hand([usize; 3]);

    impl Experts for Hand {
        fn scratch_len(&self, _: usize) -> usize {
            0
        }
        fn run(&self, _: ExpertsCall<'_>, _: &mut [f32], _: &mut [f32], _: &dyn Executor) {}
        fn bytes_per_expert(&self) -> usize {
            0
        }
        fn experts(&self) -> usize {
            self.0[0]
        }
        fn hidden(&self) -> usize {
            self.0[1]
        }
        fn intermediate(&self) -> usize {
            self.0[2]
        }
        fn isa(&self) -> crate::platform::CpuIsa {
            crate::platform::CpuIsa::Portable
        }
    }

    #[test]
    fn experts_of_other_sizes_than_the_layer_are_refused() {
        let config = MoeConfig::new(4, 2, 64, 32);
        let make = |sizes| MoeKernel::<Standard, _>::new(Hand(sizes), &config, None).map(|_| ());
        make([4, 64, 32]).unwrap();
        for (sizes, word) in [([3, 64, 32], "experts"), ([4, 32, 32], "hidden"), ([4, 64, 64], "intermediate")] {
            let said = make(sizes).unwrap_err().to_string();
            assert!(said.contains(word) && said.contains("layer's configuration"), "{said}");
        }
    }
}
