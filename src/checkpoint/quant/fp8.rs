//! 8-bit weights with float scales: `quant_method` "fp8" (DeepSeek-V3, transformers and vLLM), and the reader that
//! compressed-tensors' and ModelOpt's fp8 and int8 share.
//!
//! Block scales are called `weight_scale_inv` here, and multiply in spite of that name.

use super::{CheckpointError, Format, Kind, Linear, Object, QuantConfig, ScaleShape, Site};
use crate::checkpoint::file::FLOATS;
use crate::scheme::{self, Elem, QuantKey, Scheme};
use crate::weights::Scales;
use safetensors::Dtype;

/// The config of `quant_method` "fp8".
pub(super) fn config(o: Object) -> Result<QuantConfig, CheckpointError> {
    if let Some(fmt) = o.str("fmt")?.filter(|f| !matches!(*f, "e4m3" | "float8_e4m3fn")) {
        return Err(CheckpointError::Unsupported(format!("fp8 with fmt {fmt:?}")));
    }
    let static_input = match o.required("activation_scheme", o.str("activation_scheme")?)? {
        "static" => true,
        "dynamic" => false,
        other => return Err(CheckpointError::Unsupported(format!("fp8 with activation_scheme {other:?}"))),
    };
    let (scale, scale_name) = match o.get("weight_block_size") {
        None => (ScaleShape::Tensor, "weight_scale"),
        Some(v) => (ScaleShape::Block(block_size(v)?), "weight_scale_inv"),
    };
    let activation_key = match (scale, static_input) {
        (ScaleShape::Block(128), false) => scheme::FP8_DYNAMIC_128_SYM,
        (ScaleShape::Block(64), false) => scheme::FP8_DYNAMIC_64_SYM,
        (ScaleShape::Block(n), false) => {
            return Err(CheckpointError::Unsupported(format!("fp8 activations in groups of {n}")));
        }
        (ScaleShape::Block(_), true) => {
            return Err(CheckpointError::Unsupported("fp8 blocks with static activations".into()));
        }
        (_, true) => scheme::FP8_STATIC_TENSOR_SYM,
        (_, false) => scheme::FP8_DYNAMIC_TENSOR_SYM,
    };
    let format = Format {
        kind: Kind::Scaled { elem: Elem::E4m3, scale, scale_name, static_input },
        scheme: Scheme::Fp8,
        weight_key: Some(weight_key(scale)?),
        activation_key: Some(activation_key),
        producer: "fp8".into(),
    };
    let mut ignored = o.strings("modules_to_not_convert")?;
    ignored.extend(o.strings("ignored_layers")?);
    QuantConfig::single(format, &ignored)
}

/// The side of a square block.
pub(super) fn block_size(v: &serde_json::Value) -> Result<usize, CheckpointError> {
    let sides: Option<Vec<u64>> = match v {
        serde_json::Value::Array(a) => a.iter().map(|x| x.as_u64()).collect(),
        serde_json::Value::String(s) => s.split('x').map(|x| x.parse().ok()).collect(),
        _ => None,
    };
    match sides.as_deref() {
        Some(&[a, b]) if a == b && matches!(a, 32 | 64 | 128) => Ok(a as usize),
        _ => Err(CheckpointError::Unsupported(format!("weight blocks of {v} (squares of 128, 64 and 32 are)"))),
    }
}

/// The key of fp8 weights.
pub(super) fn weight_key(scale: ScaleShape) -> Result<QuantKey, CheckpointError> {
    Ok(match scale {
        ScaleShape::Tensor => scheme::FP8_STATIC_TENSOR_SYM,
        ScaleShape::Channel => scheme::FP8_STATIC_CHANNEL_SYM,
        ScaleShape::Block(128) => scheme::FP8_STATIC_128_BLOCK_SYM,
        ScaleShape::Block(64) => scheme::FP8_STATIC_64_BLOCK_SYM,
        ScaleShape::Block(32) => scheme::FP8_STATIC_32_BLOCK_SYM,
        ScaleShape::Block(n) => return Err(CheckpointError::Unsupported(format!("fp8 blocks of {n}"))),
    })
}

/// Reads `weight`, its scale and the scale of its input.
pub(super) fn read(
    site: &Site,
    elem: Elem,
    scale: ScaleShape,
    scale_name: &str,
    static_input: bool,
) -> Result<Linear, CheckpointError> {
    let (rows, cols) = (site.rows, site.cols);
    let dtype = if elem == Elem::Int8 { Dtype::I8 } else { Dtype::F8_E4M3 };
    let weight = site.get("weight")?.expect(&[dtype], &[rows, cols])?;
    let tensor = site.get(scale_name)?;
    let scales = match scale {
        ScaleShape::Tensor => Scales::PerTensor(tensor.scalar()?),
        ScaleShape::Channel => {
            // [N, 1] in compressed-tensors, [N] in ModelOpt.
            let shape: &[usize] = if tensor.shape.len() == 1 { &[rows] } else { &[rows, 1] };
            Scales::PerRow(tensor.expect(&FLOATS, shape)?.floats()?)
        }
        ScaleShape::Block(block) => {
            let shape = [rows.div_ceil(block), cols.div_ceil(block)];
            Scales::Block { block, values: tensor.expect(&FLOATS, &shape)?.floats()? }
        }
    };
    // Symmetric weights have no zero points; older writers store zeros.
    if let Some(zeros) = site.find("weight_zero_point").filter(|t| t.data.iter().any(|&b| b != 0)) {
        return Err(zeros.error("is not zero, but the config says symmetric"));
    }
    let input_scale = if static_input { Some(site.get("input_scale")?.positive()?) } else { None };
    Ok(Linear { matrix: site.matrix(elem, weight.data.clone(), scales), input_scale })
}
