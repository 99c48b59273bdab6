//! Routing on the GPU: [`route_token`](crate::kernel::routing::route_token) for many tokens at once, with the same
//! experts and weights to the bit.

use super::launch::{Arg, Launch};
use super::memory::DevicePtr;
use super::module::Kernel;
use super::{CudaError, Gpu, Stream};
use crate::config::{Routing, RoutingMethod};

/// The most experts.
pub const MAX_EXPERTS: usize = 1024;
/// The largest top-k.
pub const MAX_TOPK: usize = 32;

/// Tokens of a block, a warp each; kernels/routing.cu has the same.
const TOKENS: usize = 4;
/// Entries by the most experts that they take.
const ENTRIES: [(usize, &str); 6] = [
    (32, "route_1"),
    (64, "route_2"),
    (128, "route_4"),
    (256, "route_8"),
    (512, "route_16"),
    (MAX_EXPERTS, "route_32"),
];

/// A layer's router on a GPU.
#[derive(Clone)]
pub struct Router {
    kernel: Kernel,
    params: Params,
    shared: u32,
}

/// As in kernels/routing.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    tokens: i32,
    experts: i32,
    topk: i32,
    method: i32,
    groups: i32,
    topk_groups: i32,
    normalize: i32,
    scaling: f32,
}

/// The memory of one call, T tokens.
#[derive(Clone, Copy, Debug)]
pub struct Tensors<'a> {
    /// `[T, E]`
    pub logits: DevicePtr<'a, f32>,
    /// `[E]`: the score correction of DeepSeekV3, MiniMax2 and DeepseekV4.
    pub bias: Option<DevicePtr<'a, f32>>,
    /// `[T, k]`, written, best first.
    pub ids: DevicePtr<'a, i32>,
    /// `[T, k]`, written.
    pub weights: DevicePtr<'a, f32>,
}

impl Router {
    /// Loads the kernel. Methods that the caller performs are refused.
    pub fn new(gpu: &Gpu, routing: &Routing, experts: usize, topk: usize) -> Result<Self, CudaError> {
        let params = params(routing, experts, topk).map_err(CudaError::Argument)?;
        let entry = ENTRIES.iter().find(|e| experts <= e.0).ok_or(CudaError::Argument(TOO_MANY))?.1;
        let grouped = routing.method == RoutingMethod::DeepSeekV3 && routing.groups > 1;
        // At most 4 * 2048 floats, which needs no permission.
        let shared = if grouped { TOKENS * (experts + routing.groups) * size_of::<f32>() } else { 0 };
        Ok(Self { kernel: gpu.kernel("routing", entry)?, params, shared: shared as u32 })
    }

    /// Routes `tokens` tokens on the stream; does not wait. With `overlap`, it may start while the stream's previous
    /// kernel still runs ([`Launch::overlap`]).
    ///
    /// # Safety
    /// The tensors must be allocated on this GPU and stay so until the work is done; nothing unordered may write what is
    /// read here or touch what is written. The outputs must not overlap the inputs or each other.
    pub unsafe fn run(&self, stream: &Stream, t: &Tensors<'_>, tokens: usize, overlap: bool) -> Result<(), CudaError> {
        let Params { experts, topk, .. } = self.params;
        let holds = |have: usize, each: i32| tokens.checked_mul(each as usize).is_some_and(|n| have >= n);
        if !(holds(t.logits.len(), experts) && holds(t.ids.len(), topk) && holds(t.weights.len(), topk)) {
            return Err(CudaError::Argument("routing: logits, ids or weights are too short for the tokens"));
        }
        if t.bias.is_some_and(|b| b.len() < experts as usize) {
            return Err(CudaError::Argument("routing: the bias is shorter than the number of experts"));
        }
        let count = i32::try_from(tokens).map_err(|_| CudaError::Argument("routing: more than 2^31 - 1 tokens"))?;
        let params = Params { tokens: count, ..self.params };
        let bias = t.bias.unwrap_or(DevicePtr::NULL);
        let mut args =
            [Arg::new(&params), Arg::new(&t.logits), Arg::new(&bias), Arg::new(&t.ids), Arg::new(&t.weights)];
        let launch = Launch::new(tokens.div_ceil(TOKENS) as u32, 32 * TOKENS as u32);
        // SAFETY: the arguments are the parameters of every `route_` entry, the lengths were checked, the rest is the
        // caller's promise.
        unsafe { launch.shared(self.shared).overlap(overlap).run(stream, &self.kernel, &mut args) }
    }
}

const TOO_MANY: &str = "routing on the GPU takes at most 1024 experts and a top-k of at most 32";

/// What the kernel gets, or why it can't.
fn params(routing: &Routing, experts: usize, topk: usize) -> Result<Params, &'static str> {
    use RoutingMethod::*;
    // The order of `enum Method` in kernels/routing.cu.
    let method = match routing.method {
        Default => 0,
        Renormalize => 1,
        RenormalizeNaive => 2,
        TopK => 3,
        Sigmoid => 4,
        SigmoidRenorm => 5,
        Llama4 => 6,
        DeepSeekV3 => 7,
        MiniMax2 => 8,
        DeepseekV4 => 9,
        Custom | Simulated | Unspecified => return Err("this routing method is the caller's: pass ids and weights"),
    };
    if experts > MAX_EXPERTS || topk > MAX_TOPK {
        return Err(TOO_MANY);
    }
    if topk == 0 || topk > experts {
        return Err("top-k must be between 1 and the number of experts");
    }
    let Routing { groups, topk_groups, normalize, scaling, .. } = *routing;
    if groups == 0 || topk_groups == 0 || topk_groups > groups || !experts.is_multiple_of(groups) {
        return Err("the routing groups must divide the experts, and some of them must be kept");
    }
    // All are at most 1024 now.
    let int = |n: usize| n as i32;
    Ok(Params {
        tokens: 0,
        experts: int(experts),
        topk: int(topk),
        method,
        groups: int(groups),
        topk_groups: int(topk_groups),
        normalize: i32::from(normalize),
        scaling,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_of_ours_is_the_kernels_and_no_other() {
        let mut numbers = Vec::new();
        for (name, method) in RoutingMethod::ALL {
            let params = params(&Routing::new(method), 8, 2);
            assert_eq!(params.is_ok(), method.routes_inside(), "{name}");
            numbers.extend(params.map(|p| p.method));
        }
        assert_eq!(numbers, (0..10).collect::<Vec<_>>());
    }

    #[test]
    fn what_the_kernel_cannot_hold_is_refused() {
        let routing = Routing::new(RoutingMethod::Default);
        for (experts, topk) in [(1025, 8), (1024, 33), (8, 0), (8, 9), (0, 0)] {
            assert!(params(&routing, experts, topk).is_err(), "{experts} {topk}");
        }
        assert!(params(&routing, 1024, 32).is_ok());
        for (groups, topk_groups) in [(0, 0), (3, 1), (4, 5), (4, 0)] {
            assert!(params(&Routing { groups, topk_groups, ..routing }, 8, 2).is_err(), "{groups} {topk_groups}");
        }
    }
}
