//! What tests of the kernels over packed weights share.

use super::reference::Reference;
use super::{Layer, Rng, Skew, gpu, hidden, relative_error, route};
use moe_oracle::config::InputType;
use moe_oracle::cuda::pack::{Codes, PackedExperts};
use moe_oracle::cuda::{CudaKernel, Stream};
use moe_oracle::oracle::{DynOracle, ORACLES};
use moe_oracle::weights::{Scales, WeightElem, WeightMatrix};

pub fn oracle(alias: &str) -> &'static DynOracle {
    ORACLES.iter().find(|o| o.alias == alias).unwrap()
}

/// As tests/layers.rs has it for these input types, the activation's result being rounded to 16 bits as the output is.
pub fn bound(input: InputType) -> f64 {
    if input == InputType::F16 { 6e-4 } else { 4e-3 }
}

/// The layer with the weights that the GPU has: those that no packed format holds (permuted columns, scales of two
/// types, another 16-bit type than the layer's) are rounded to the layer's 16-bit type when they are packed.
pub fn as_stored(layer: &Layer) -> Layer {
    let mut weights = layer.weights.clone();
    if PackedExperts::new(&weights, &layer.config).unwrap().format().codes == Codes::Half {
        let f16 = layer.config.input == InputType::F16;
        let bits = |v: f32| if f16 { half::f16::from_f32(v).to_bits() } else { half::bf16::from_f32(v).to_bits() };
        let matrices = weights.experts.iter_mut().flat_map(|e| e.gate.iter_mut().chain([&mut e.up, &mut e.down]));
        for m in matrices {
            let all = (0..m.rows).flat_map(|r| (0..m.cols).map(move |c| (r, c)));
            let codes: Vec<u8> = all.flat_map(|(r, c)| bits(m.value(r, c)).to_le_bytes()).collect();
            *m = WeightMatrix {
                rows: m.rows,
                cols: m.cols,
                elem: if f16 { WeightElem::F16 } else { WeightElem::Bf16 },
                codes: codes.into(),
                scales: Scales::None,
            };
        }
    }
    Layer { oracle: layer.oracle, config: layer.config, weights }
}

/// Compares a call with the reference: eager, and the same bits again from a graph. Gives the bits.
pub fn check(
    stream: &Stream,
    kernel: &CudaKernel,
    layer: &Layer,
    rng: &mut Rng,
    tokens: usize,
    skew: Skew,
    bound: f64,
) -> Vec<u16> {
    let x = hidden(rng, tokens, &layer.config);
    let (ids, weights) = route(rng, tokens, &layer.config, skew);
    let call = gpu::Call::new(stream, kernel, &x, &ids, &weights);
    call.launch(stream, kernel);
    let bits = call.output_bits(stream);
    let have = gpu::values(layer.config.input, &bits);
    let want = Reference::new(&as_stored(layer), None).forward(&x, &ids, &weights, None);
    let error = relative_error(&have, &want);
    assert!(error < bound, "{}: {error:e}, {tokens} tokens, {skew:?}, {:?}", layer.oracle.alias, layer.config);
    assert!(have.iter().all(|v| !v.is_nan()), "{}: not all written", layer.oracle.alias);
    assert_eq!(call.replay(stream, kernel), bits, "{}: a graph's replay differs", layer.oracle.alias);
    bits
}
