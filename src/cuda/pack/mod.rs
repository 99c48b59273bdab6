//! From canonical weights to the layout that the GPU kernels stream; kernels/common/format.cuh describes it.

mod codes;
mod format;
#[cfg(test)]
mod tests;

pub use format::{Codes, Compute, Format, StageScales};

use crate::config::MoeConfig;
use crate::scheme::number;
use crate::weights::{ExpertWeights, MoeWeights, Scales, WeightError, WeightMatrix};
use rayon::prelude::*;

/// Rows of a slab.
pub const SLAB: usize = 16;
/// Columns of a block.
pub const BLOCK: usize = 64;

/// Why weights can't be packed for a GPU.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GpuPackError {
    /// The weights contradict themselves.
    #[error(transparent)]
    Weights(#[from] WeightError),
    /// No such tensor cores.
    #[error("the GPU kernels take bf16 or f16 hidden states, not float32")]
    Float32,
    /// Rows are read 16 bytes at a time.
    #[error("the GPU kernels need a hidden size that is a multiple of 8, not {0}")]
    Hidden(usize),
    /// Too large for the kernels' 32-bit offsets inside a slab.
    #[error("rows of {0} columns are more than the GPU kernels can address")]
    Columns(usize),
}

/// One projection of all experts, on the host.
pub(super) struct PackedProjection {
    /// `[E][slabs]` slabs of `slab_bytes`: stages of two blocks' codes and their scales.
    pub stages: Vec<u8>,
    /// `[E][slabs * 16]`: what multiplies a row's sum at last.
    pub factors: Vec<f32>,
    /// `[E][slabs * 16]`
    pub bias: Option<Vec<f32>>,
    /// Bytes of a slab.
    pub slab_bytes: usize,
    /// Slabs of an expert.
    pub slabs: usize,
    /// Blocks of a slab.
    pub blocks: usize,
}

/// A layer's experts, on the host. The kernels trust its sizes, so that nobody may change them.
pub struct PackedExperts {
    /// The format of both projections.
    pub(super) format: Format,
    /// Gate and up: rows 0-7 of a slab are gate's, 8-15 up's; all 16 are up's where not gated.
    pub(super) first: PackedProjection,
    /// Down.
    pub(super) second: PackedProjection,
    /// Rows of the activation's result per assignment, padding included.
    pub(super) middle: usize,
    pub(super) experts: usize,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) gated: bool,
    /// Stored scales of the inputs of both GEMMs, where all experts have the same.
    pub(super) input_scales: [Option<f32>; 2],
    /// The same by expert, where all have one.
    pub(super) expert_input_scales: [Option<Vec<f32>>; 2],
    /// Bytes that one expert's use must read, as the checkpoint stores them.
    pub(super) bytes_per_expert: usize,
}

/// Where a packed row comes from.
type Source<'a> = Option<(&'a WeightMatrix, Option<&'a [f32]>, usize)>;

impl PackedExperts {
    /// Packs the weights, in parallel on rayon's pool.
    pub fn new(weights: &MoeWeights, config: &MoeConfig) -> Result<Self, GpuPackError> {
        weights.validate()?;
        let (hidden, intermediate, gated) = (weights.hidden(), weights.intermediate(), weights.gated());
        if !hidden.is_multiple_of(8) {
            return Err(GpuPackError::Hidden(hidden));
        }
        let format = Format::of(weights, Compute::of(config)?);
        let slabs = intermediate.div_ceil(if gated { SLAB / 2 } else { SLAB });
        let first = projection(weights, format, slabs, hidden, |e, row| match (&e.gate, row % SLAB) {
            (Some(gate), r) if r < 8 => {
                let row = row / SLAB * 8 + r;
                (row < intermediate).then_some((gate, e.gate_bias.as_deref(), row))
            }
            (Some(_), r) => {
                let row = row / SLAB * 8 + r - 8;
                (row < intermediate).then_some((&e.up, e.up_bias.as_deref(), row))
            }
            (None, _) => (row < intermediate).then_some((&e.up, e.up_bias.as_deref(), row)),
        })?;
        let second = projection(weights, format, hidden.div_ceil(SLAB), intermediate, |e, row| {
            (row < hidden).then_some((&e.down, e.down_bias.as_deref(), row))
        })?;
        Ok(Self {
            format,
            middle: slabs * if gated { SLAB / 2 } else { SLAB },
            first,
            second,
            experts: weights.experts.len(),
            hidden,
            intermediate,
            gated,
            input_scales: [same(weights, |e| e.input_scale), same(weights, |e| e.down_input_scale)],
            expert_input_scales: [|e: &ExpertWeights| e.input_scale, |e: &ExpertWeights| e.down_input_scale]
                .map(|of| weights.experts.iter().map(of).collect()),
            bytes_per_expert: weights.experts.first().map_or(0, ExpertWeights::bytes),
        })
    }

    /// The format of both projections.
    pub fn format(&self) -> Format {
        self.format
    }
}

/// What all experts have.
fn same(weights: &MoeWeights, of: impl Fn(&ExpertWeights) -> Option<f32>) -> Option<f32> {
    let first = of(weights.experts.first()?)?;
    weights.experts.iter().all(|e| of(e) == Some(first)).then_some(first)
}

fn projection<'w>(
    weights: &'w MoeWeights,
    format: Format,
    slabs: usize,
    cols: usize,
    source: impl Fn(&'w ExpertWeights, usize) -> Source<'w> + Sync,
) -> Result<PackedProjection, GpuPackError> {
    let blocks = cols.div_ceil(BLOCK);
    let slab_bytes = blocks * format.block_bytes() + blocks.div_ceil(2) * format.scale_bytes();
    if i32::try_from(slab_bytes).is_err() {
        return Err(GpuPackError::Columns(cols));
    }
    let rows = slabs * SLAB;
    let mut stages = vec![0; weights.experts.len() * slabs * slab_bytes];
    stages.par_chunks_mut(slab_bytes).enumerate().for_each(|(i, out)| {
        let expert = &weights.experts[i / slabs];
        let rows = std::array::from_fn(|r| source(expert, i % slabs * SLAB + r).map(|(m, _, row)| (m, row)));
        codes::slab(format, &rows, blocks, out);
    });
    let each = |f: &dyn Fn(Source<'w>) -> f32| -> Vec<f32> {
        weights
            .experts
            .iter()
            .flat_map(|e| (0..rows).map(move |row| (e, row)))
            .map(|(e, row)| f(source(e, row)))
            .collect()
    };
    let factors = each(&|s| s.map_or(0.0, |(m, _, row)| factor(m, row, format)));
    let bias = weights.experts.iter().any(|e| (0..rows).any(|r| source(e, r).is_some_and(|s| s.1.is_some())));
    let bias = bias.then(|| each(&|s| s.and_then(|(_, b, row)| Some(b?[row])).unwrap_or(0.0)));
    Ok(PackedProjection { stages, factors, bias, slab_bytes, slabs, blocks })
}

/// What multiplies a row's sum at last.
fn factor(m: &WeightMatrix, row: usize, format: Format) -> f32 {
    if format.codes == Codes::Half {
        return 1.0;
    }
    let scale = match &m.scales {
        Scales::PerTensor(s) => *s,
        Scales::PerRow(s) => s[row],
        Scales::Nvfp4 { global, .. } => *global,
        Scales::E8m0(_) => number::E8M0[usize::from(codes::top(m, row))] * 0.5,
        _ => 1.0,
    };
    scale * format.lift()
}
