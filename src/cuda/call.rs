//! One call of a layer on the GPU.

use super::CudaError;
use super::memory::DevicePtr;
use crate::config::MoeConfig;

/// Kernels read rows 16 bytes at a time; an address that is not a multiple would be a fault of the whole context.
fn aligned(addresses: [u64; 3]) -> Result<(), CudaError> {
    match addresses.iter().all(|a| a.is_multiple_of(16)) {
        true => Ok(()),
        false => Err(CudaError::Argument("hidden states, output and workspace must be aligned to 16 bytes")),
    }
}

/// The memory of one call in the standard format: T tokens, H hidden, k top-k. Hidden states and output are
/// given as bytes: their elements are of the layer's input type.
#[derive(Clone, Copy, Debug)]
pub struct Tensors<'a> {
    /// `[T, H]` of the input type; aligned to 16 bytes
    pub hidden: DevicePtr<'a, u8>,
    /// `[T, k]`, global expert ids, -1 for none
    pub topk_ids: DevicePtr<'a, i32>,
    /// `[T, k]`
    pub topk_weights: DevicePtr<'a, f32>,
    /// `[T, H]` of the input type, written; aligned to 16 bytes
    pub output: DevicePtr<'a, u8>,
    /// Scratch of `workspace_bytes(T)`, whatever it holds; aligned to 16 bytes
    pub workspace: DevicePtr<'a, u8>,
}

impl Tensors<'_> {
    /// Checks the lengths for a call with `tokens` tokens.
    pub(super) fn check(&self, config: &MoeConfig, tokens: usize, workspace: usize) -> Result<(), CudaError> {
        let holds = |have: usize, each: usize| tokens.checked_mul(each).is_some_and(|n| have >= n);
        // At most 2^24 elements.
        let row = config.hidden * config.input.bytes();
        if !holds(self.hidden.len(), row) || !holds(self.output.len(), row) {
            return Err(CudaError::Argument("hidden states or output are shorter than the tokens' rows"));
        }
        if !holds(self.topk_ids.len(), config.topk) || !holds(self.topk_weights.len(), config.topk) {
            return Err(CudaError::Argument("topk_ids or topk_weights are shorter than the tokens' rows"));
        }
        if self.workspace.len() < workspace {
            return Err(CudaError::Argument("the workspace is too small: ask workspace_bytes for the largest batch"));
        }
        aligned([self.hidden.address(), self.output.address(), self.workspace.address()])
    }

    /// A checked call in parts of at most `most` tokens, one after the other in the same workspace.
    pub(super) fn passes(
        &self,
        config: &MoeConfig,
        tokens: usize,
        most: usize,
        map: Option<DevicePtr<'_, i32>>,
    ) -> impl Iterator<Item = Pass> {
        let (row, slots) = (config.hidden * config.input.bytes(), config.topk * 4);
        let (all, map) = (*self, map.map_or(0, |m| m.address()));
        (0..tokens).step_by(most).map(move |start| {
            let at = |base: u64, each: usize| base + (start * each) as u64;
            Pass {
                tokens: (tokens - start).min(most),
                hidden: at(all.hidden.address(), row),
                ids: at(all.topk_ids.address(), slots),
                weights: at(all.topk_weights.address(), slots),
                map,
                output: at(all.output.address(), row),
                workspace: all.workspace.address(),
            }
        })
    }
}

/// Device addresses of a part of a call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Pass {
    pub tokens: usize,
    /// As in [`Tensors`], from the part's first token on.
    pub hidden: u64,
    pub ids: u64,
    pub weights: u64,
    /// `[experts]` global to local, or 0
    pub map: u64,
    pub output: u64,
    pub workspace: u64,
}

/// The memory of one call in the batched format: E local experts with `max` slots each, of which the first `counts[e]`
/// hold tokens.
#[derive(Clone, Copy, Debug)]
pub struct BatchedTensors<'a> {
    /// `[E, max, H]` of the input type, as bytes; aligned to 16 bytes
    pub hidden: DevicePtr<'a, u8>,
    /// `[E]`
    pub counts: DevicePtr<'a, i32>,
    /// `[E, max, H]` of the input type, as bytes, written where there are tokens: results without routing weights
    pub output: DevicePtr<'a, u8>,
    /// Scratch of `workspace_bytes(max)`, whatever it holds; aligned to 16 bytes
    pub workspace: DevicePtr<'a, u8>,
}

impl BatchedTensors<'_> {
    /// Checks the lengths for a call with `max` slots.
    pub(super) fn check(&self, config: &MoeConfig, max: usize, workspace: usize) -> Result<(), CudaError> {
        let want = max.checked_mul(config.local_experts * config.hidden * config.input.bytes());
        let holds = |have: usize| want.is_some_and(|want| have >= want);
        if !holds(self.hidden.len()) || !holds(self.output.len()) {
            return Err(CudaError::Argument("hidden states or output are shorter than the experts' slots"));
        }
        if self.counts.len() < config.local_experts {
            return Err(CudaError::Argument("there are fewer token counts than local experts"));
        }
        if self.workspace.len() < workspace {
            return Err(CudaError::Argument("the workspace is too small: ask workspace_bytes for the most slots"));
        }
        aligned([self.hidden.address(), self.output.address(), self.workspace.address()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_cover_a_call_one_after_the_other() {
        let config = MoeConfig::new(8, 2, 64, 32);
        // SAFETY: nothing reads these addresses.
        let bytes = |address| unsafe { DevicePtr::<u8>::new(address, 1 << 20) };
        let t = Tensors {
            hidden: bytes(0x10000),
            // SAFETY: as above.
            topk_ids: unsafe { DevicePtr::new(0x20000, 100) },
            // SAFETY: as above.
            topk_weights: unsafe { DevicePtr::new(0x30000, 100) },
            output: bytes(0x40000),
            workspace: bytes(0x50000),
        };
        let pass = |tokens: usize, first: u64| Pass {
            tokens,
            hidden: 0x10000 + 128 * first,
            ids: 0x20000 + 8 * first,
            weights: 0x30000 + 8 * first,
            map: 0,
            output: 0x40000 + 128 * first,
            workspace: 0x50000,
        };
        let of = |tokens, most| t.passes(&config, tokens, most, None).collect::<Vec<_>>();
        assert_eq!(of(10, 4), [pass(4, 0), pass(4, 4), pass(2, 8)]);
        assert_eq!(of(4, 4), [pass(4, 0)]);
        assert_eq!(of(0, 4), []);
    }
}
