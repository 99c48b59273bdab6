//! The vectorised CPU backend: weights stay in the checkpoint's number format and become float32 in registers.
//!
//! The kernels are a crate of their own, `moe-oracle-simd`, which says how they multiply; here is what surrounds them: the
//! packing of weights, and a call's way over experts, panels and threads.
//!
//! With [`Rounding::None`] (`cpu_simd`) weight-only and exact: activations and sums are float32, or of forms that are as
//! good as exact. Where there are dot products of bfloat16, rows of hidden states that are such in every value meet bf16,
//! fp8 and 4-bit weights as such, exactly, in the first projections. What the activation function gives is float32, and
//! goes the way that rows of other types go: in two parts of bfloat16 each it would be less exact and, with fp8 weights, no
//! faster. The other [`Rounding`]s (`cpu_simd_a8`, `cpu_simd_w8a8`) round the input of each GEMM to int8.
//!
//! A token's bits depend on its inputs, the weights and the instruction set, not on the batch or on threads. Products of
//! integers (4-bit weights that do not go the way above, int8 activations) do not depend on the instruction set either.

mod codes;
mod pack;
mod panels;
mod run;
#[cfg(test)]
mod tests;

use crate::config::Activation;
use crate::platform::CpuIsa;
use crate::weights::{ExpertWeights, MoeWeights, WeightError, WeightMatrix};
#[doc(inline)]
pub use moe_oracle_simd::Rounding;
use moe_oracle_simd::format::Shape;
use moe_oracle_simd::kernel;
use pack::Source;
use rayon::prelude::*;

/// Why weights cannot be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The weights contradict themselves.
    #[error(transparent)]
    Weights(#[from] WeightError),
    /// The processor cannot run the kernels.
    #[error("this machine runs {} kernels at best, not {}", has.name(), asked.name())]
    Isa {
        /// What was asked for.
        asked: CpuIsa,
        /// The best there is.
        has: CpuIsa,
    },
    /// The activation does not fit the weights.
    #[error("the activation {activation} {} a gate projection, but the experts have {}", if *.gated { "needs" } else { "takes no" }, if *.gated { "none" } else { "one" })]
    Gate {
        /// Its name.
        activation: &'static str,
        /// Whether it takes a gate.
        gated: bool,
    },
    /// A combination that no kernel decodes.
    #[error("the vectorised kernels have no code for {0}")]
    Unsupported(String),
    /// The same projection is stored in different ways.
    #[error("experts.{expert}.{tensor} is not quantised as in expert 0")]
    Mixed {
        /// The expert.
        expert: usize,
        /// `w1`, `w2` or `w3`
        tensor: &'static str,
    },
    /// No memory.
    #[error("cannot get {bytes} bytes for packed weights: {source}")]
    Memory {
        /// How much was asked for.
        bytes: usize,
        /// What the system says.
        source: std::io::Error,
    },
}

/// One projection of all experts.
struct Projection {
    shape: Shape,
    /// [`Shape::panel_bytes`], which takes a while to work out.
    panel_bytes: usize,
    kernel: kernel::PanelFn,
    /// Brings rows into the form of the shape's code.
    form: kernel::FormFn,
}

/// The order of an expert's columns where the checkpoint permuted them.
#[derive(Default)]
struct Orders {
    /// Column of the input at each packed column.
    gate: Option<Vec<u32>>,
    /// The same.
    up: Option<Vec<u32>>,
    /// Packed column of each intermediate element.
    down: Option<Vec<u32>>,
}

/// Experts packed for vector instructions. Does not refer to the canonical weights.
pub struct SimdExperts {
    gate: Option<Projection>,
    up: Projection,
    down: Projection,
    orders: Vec<Orders>,
    /// Whether any expert permutes its input.
    permuted: bool,
    /// Whether gate, if there is one, is packed as up is and reads the same input.
    together: bool,
    /// Experts one after the other: gate and up panels in turn, then down panels, see `pack_expert`.
    packed: memmap2::Mmap,
    expert_bytes: usize,
    activation: Activation,
    activate: kernel::ActivateFn,
    isa: CpuIsa,
}

impl SimdExperts {
    /// Packs the weights, in parallel on rayon's pool, for kernels of the instruction set, with exact activations.
    pub fn new(weights: &MoeWeights, activation: Activation, isa: CpuIsa) -> Result<Self, PackError> {
        Self::rounding(weights, activation, isa, Rounding::None)
    }

    /// The same for kernels that round activations; weights of 4 bits, int8 and u8 have such.
    pub fn rounding(
        weights: &MoeWeights,
        activation: Activation,
        isa: CpuIsa,
        rounding: Rounding,
    ) -> Result<Self, PackError> {
        weights.validate()?;
        let has = CpuIsa::detect();
        if isa > has {
            return Err(PackError::Isa { asked: isa, has });
        }
        if activation.gated() != weights.gated() {
            return Err(PackError::Gate { activation: activation.name(), gated: activation.gated() });
        }
        let gate = match weights.gated() {
            true => Some(projection(weights, isa, rounding, "w1", |e| (e.gate.as_ref(), e.gate_bias.as_deref()))?),
            false => None,
        };
        let up = projection(weights, isa, rounding, "w3", |e| (Some(&e.up), e.up_bias.as_deref()))?;
        let down = projection(weights, isa, rounding, "w2", |e| (Some(&e.down), e.down_bias.as_deref()))?;
        let orders: Vec<Orders> = weights.experts.par_iter().map(orders).collect();

        let bytes = gate.as_ref().map_or(0, |g| g.shape.bytes()) + up.shape.bytes() + down.shape.bytes();
        let expert_bytes = bytes.next_multiple_of(64);
        let total = expert_bytes * weights.experts.len();
        let memory = |source| PackError::Memory { bytes: total, source };
        let mut packed = memmap2::MmapMut::map_anon(total).map_err(memory)?;
        // Fewer TLB misses where the system has huge pages to give; nothing depends on it.
        #[cfg(target_os = "linux")]
        let _ = packed.advise(memmap2::Advice::HugePage);
        let permuted = orders.iter().any(|o| o.gate.is_some() || o.up.is_some());
        let together = !permuted && gate.as_ref().is_none_or(|g| g.shape == up.shape);
        packed.par_chunks_mut(expert_bytes).zip(&weights.experts).zip(&orders).for_each(|((out, expert), orders)| {
            pack_expert(expert, orders, gate.as_ref(), &up, &down, together, out);
        });
        let packed = packed.make_read_only().map_err(memory)?;
        Ok(Self {
            permuted,
            together,
            gate,
            up,
            down,
            orders,
            packed,
            expert_bytes,
            activation,
            activate: kernel::activation(isa),
            isa,
        })
    }
}

/// The one shape that a projection has in all experts.
fn projection(
    weights: &MoeWeights,
    isa: CpuIsa,
    rounding: Rounding,
    tensor: &'static str,
    get: impl Fn(&ExpertWeights) -> (Option<&WeightMatrix>, Option<&[f32]>),
) -> Result<Projection, PackError> {
    let bias = weights.experts.iter().any(|e| get(e).1.is_some());
    let mut shape = None;
    for (expert, e) in weights.experts.iter().enumerate() {
        let Some(m) = get(e).0 else { return Err(PackError::Mixed { expert, tensor }) };
        let this = pack::shape(m, bias, rounding)?.for_isa(isa, tensor != "w2");
        if *shape.get_or_insert(this) != this {
            return Err(PackError::Mixed { expert, tensor });
        }
    }
    let Some(shape) = shape else { return Err(PackError::Unsupported("a layer without experts".into())) };
    let form = kernel::form(isa, &shape);
    Ok(Projection { shape, panel_bytes: shape.panel_bytes(), kernel: kernel::kernel(isa, &shape), form })
}

fn orders(expert: &ExpertWeights) -> Orders {
    Orders {
        gate: expert.gate.as_ref().and_then(pack::permutation),
        up: pack::permutation(&expert.up),
        down: pack::permutation(&expert.down).map(|order| inverse(&order)),
    }
}

/// The permutation that undoes `order`.
fn inverse(order: &[u32]) -> Vec<u32> {
    let mut inverse = vec![0; order.len()];
    for (i, &c) in order.iter().enumerate() {
        inverse[c as usize] = i as u32;
    }
    inverse
}

/// Gate and up panels in turn, two and two (`together`) or one by one, then down panels two and two.
fn pack_expert(
    expert: &ExpertWeights,
    orders: &Orders,
    gate: Option<&Projection>,
    up: &Projection,
    down: &Projection,
    together: bool,
    out: &mut [u8],
) {
    let mut room = vec![0; 2 * up.panel_bytes.max(down.panel_bytes).max(gate.map_or(0, |g| g.panel_bytes))];
    let mut rest = out;
    let mut next = |of: &[(&Source<'_>, usize)], p: &Projection| {
        let bytes = of.len() * p.panel_bytes;
        let (to, tail) = std::mem::take(&mut rest).split_at_mut(bytes);
        pack::panels(of, &p.shape, &mut room[..bytes], to);
        rest = tail;
    };
    let of_up = Source { matrix: &expert.up, bias: expert.up_bias.as_deref(), order: orders.up.as_deref() };
    match (gate, &expert.gate) {
        (Some(gate), Some(matrix)) => {
            let of_gate = Source { matrix, bias: expert.gate_bias.as_deref(), order: orders.gate.as_deref() };
            for i in 0..up.shape.panels() {
                if together {
                    next(&[(&of_gate, i), (&of_up, i)], up);
                } else {
                    next(&[(&of_gate, i)], gate);
                    next(&[(&of_up, i)], up);
                }
            }
        }
        _ => two_and_two(up.shape.panels(), |of| next(of, up), &of_up),
    }
    let order = orders.down.as_deref().map(inverse);
    let of_down = Source { matrix: &expert.down, bias: expert.down_bias.as_deref(), order: order.as_deref() };
    two_and_two(down.shape.panels(), |of| next(of, down), &of_down);
}

/// All panels of a projection, two at a time.
fn two_and_two(panels: usize, mut next: impl FnMut(&[(&Source<'_>, usize)]), of: &Source<'_>) {
    for i in (0..panels).step_by(2) {
        match i + 1 < panels {
            true => next(&[(of, i), (of, i + 1)]),
            false => next(&[(of, i)]),
        }
    }
}
