//! `cpu_reference`: plain loops in float32 over weights that were dequantised at construction. Slow and large (four
//! bytes a weight); what every other backend is compared with.

use super::quantize::quantize_row;
use super::{Executor, Experts, ExpertsCall, padded};
use crate::config::Activation;
use crate::platform::CpuIsa;
use crate::scheme::QuantKey;
use crate::weights::{MoeWeights, WeightError, WeightMatrix};
use rayon::prelude::*;
use std::sync::atomic::{AtomicU32, Ordering};

struct Expert {
    gate: Option<Vec<f32>>,
    up: Vec<f32>,
    down: Vec<f32>,
    gate_bias: Option<Vec<f32>>,
    up_bias: Option<Vec<f32>>,
    down_bias: Option<Vec<f32>>,
    input_scale: Option<f32>,
    down_input_scale: Option<f32>,
}

/// The reference experts.
pub struct ReferenceExperts {
    experts: Vec<Expert>,
    hidden: usize,
    intermediate: usize,
    activation: Activation,
    activation_key: Option<QuantKey>,
}

fn dequantize(m: &WeightMatrix) -> Vec<f32> {
    (0..m.rows * m.cols).map(|i| m.value(i / m.cols, i % m.cols)).collect()
}

impl ReferenceExperts {
    /// Dequantises. With an `activation_key` the input of each GEMM is quantised as it says; without, never.
    pub fn new(
        weights: &MoeWeights,
        activation: Activation,
        activation_key: Option<QuantKey>,
    ) -> Result<Self, WeightError> {
        weights.validate()?;
        let experts = weights.experts.par_iter().map(|e| Expert {
            gate: e.gate.as_ref().map(dequantize),
            up: dequantize(&e.up),
            down: dequantize(&e.down),
            gate_bias: e.gate_bias.clone(),
            up_bias: e.up_bias.clone(),
            down_bias: e.down_bias.clone(),
            input_scale: e.input_scale,
            down_input_scale: e.down_input_scale,
        });
        Ok(Self {
            experts: experts.collect(),
            hidden: weights.hidden(),
            intermediate: weights.intermediate(),
            activation,
            activation_key,
        })
    }

    /// One row through one expert; `x` and `h` are scratch.
    fn row(&self, expert: &Expert, input: &[f32], x: &mut [f32], h: &mut [f32], mut output: impl FnMut(usize, f32)) {
        x.copy_from_slice(&input[..self.hidden]);
        if let Some(key) = self.activation_key {
            quantize_row(key, expert.input_scale, x);
        }
        for (i, h) in h.iter_mut().enumerate() {
            let project = |w: &[f32], bias: &Option<Vec<f32>>| {
                dot(&w[i * self.hidden..][..self.hidden], x) + bias.as_ref().map_or(0.0, |b| b[i])
            };
            let gate = expert.gate.as_ref().map_or(0.0, |w| project(w, &expert.gate_bias));
            *h = self.activation.apply(gate, project(&expert.up, &expert.up_bias));
        }
        if let Some(key) = self.activation_key {
            quantize_row(key, expert.down_input_scale, h);
        }
        for (n, w) in expert.down.chunks_exact(self.intermediate).enumerate() {
            output(n, dot(w, h) + expert.down_bias.as_ref().map_or(0.0, |b| b[n]));
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// A buffer that tasks write disjoint parts of.
struct Shared(*mut f32);

// SAFETY: every task turns a part of its own into a slice; see the uses.
unsafe impl Sync for Shared {}

impl Shared {
    fn at(&self, index: usize) -> *mut f32 {
        self.0.wrapping_add(index)
    }
}

impl Experts for ReferenceExperts {
    fn scratch_len(&self, assignments: usize) -> usize {
        assignments * (padded(self.hidden) + padded(self.intermediate))
    }

    fn run(&self, call: ExpertsCall<'_>, scratch: &mut [f32], output: &mut [f32], pool: &dyn Executor) {
        let (hidden, inter) = (self.hidden, self.intermediate);
        let stride = padded(hidden) + padded(inter);
        assert!(scratch.len() >= self.scratch_len(call.assignments.len()), "scratch too small");
        let rows = output.len() / hidden;
        let (scratch, output) = (Shared(scratch.as_mut_ptr()), Shared(output.as_mut_ptr()));
        for segment in call.segments {
            let expert = &self.experts[segment.expert as usize];
            pool.run(segment.len as usize, &|i| {
                let index = segment.start as usize + i;
                let a = call.assignments[index];
                let out = a.output_row as usize;
                assert!(out < rows, "output row out of range");
                // SAFETY: `scratch` holds `stride` elements per assignment (asserted above) and only this task has
                // assignment `index`, so that no other slice overlaps.
                let (x, h) = unsafe {
                    (
                        std::slice::from_raw_parts_mut(scratch.at(index * stride), hidden),
                        std::slice::from_raw_parts_mut(scratch.at(index * stride + padded(hidden)), inter),
                    )
                };
                let store = |n: usize, y: f32| {
                    // SAFETY: `out` is a row of `output` (asserted) and `n < hidden`; f32 and AtomicU32 have the same
                    // layout. The store is atomic, so that a call which names an output row twice gets one of the
                    // results and not a data race.
                    unsafe { AtomicU32::from_ptr(output.at(out * hidden + n).cast()) }
                        .store(y.to_bits(), Ordering::Relaxed);
                };
                self.row(expert, &call.input[a.input_row as usize * call.input_stride..], x, h, store);
            });
        }
    }

    fn bytes_per_expert(&self) -> usize {
        4 * self.experts.first().map_or(0, |e| e.gate.as_ref().map_or(0, Vec::len) + e.up.len() + e.down.len())
    }

    fn experts(&self) -> usize {
        self.experts.len()
    }

    fn hidden(&self) -> usize {
        self.hidden
    }

    fn intermediate(&self) -> usize {
        self.intermediate
    }

    fn isa(&self) -> CpuIsa {
        CpuIsa::Portable
    }
}
