//! `cuda_mma`'s grouped GEMM, and what it gives.

use super::{Layer, gpu, packed};
use moe_oracle::cuda::{CudaKernel, Families, Stream, Tile};
use moe_oracle::oracle::ExpertsKind;
use moe_oracle::scheme::{Elem, QuantKey};

pub const KIND: ExpertsKind = ExpertsKind::Mma;

/// The grouped GEMM whatever the number of tokens, with a tile, or the largest where the layer has no such, or the one that
/// suits.
pub fn gemm(stream: &Stream, layer: &Layer, tile: Option<Tile>, map: Option<&[i32]>) -> CudaKernel {
    let mut kernel = gpu::kernel(stream, layer, KIND, map);
    let families = |tile| Families { decode_up_to: 0, tile, ..Families::of(&layer.config) };
    if tile != Some(Tile::T128) || kernel.set_families(families(tile)).is_err() {
        kernel.set_families(families(tile.map(|t| t.min(Tile::T64)))).unwrap();
    }
    kernel
}

/// What it quantises the input of each GEMM to: int8 tokens meet int8 weights, others stay exact.
pub fn key(layer: &Layer) -> Option<QuantKey> {
    QuantKey::from_bits(layer.oracle.activation).filter(|k| k.elem == Elem::Int8)
}

/// Every expert's result is rounded before the sum, which the bound of exact activations has no room for. Once in a while a
/// value lies so near the middle between two codes that float32 and float64 disagree. Activations that stay exact are 0.01
/// away.
pub fn bound(layer: &Layer) -> f64 {
    1.5 * packed::bound(layer.config.input) + if key(layer).is_some() { 2e-3 } else { 0.0 }
}
