//! NVIDIA ModelOpt: `quant_method` "modelopt" in `config.json`, or `hf_quant_config.json` with the same under
//! `quantization`.

use super::nvfp4::Nvfp4;
use super::{CheckpointError, Format, Kind, Object, QuantConfig, ScaleShape};
use crate::scheme::{self, Elem, Scheme};

/// Reads either form.
pub(super) fn config(o: Object) -> Result<QuantConfig, CheckpointError> {
    let o = o.object("quantization")?.unwrap_or(o);
    let algo = o.required("quant_algo", o.str("quant_algo")?)?;
    let group = |want: i64| match o.int("group_size")? {
        Some(n) if n != want => Err(CheckpointError::Unsupported(format!("modelopt {algo} with group_size {n}"))),
        _ => Ok(()),
    };
    let fp8 = |scale, static_input| Kind::Scaled { elem: Elem::E4m3, scale, scale_name: "weight_scale", static_input };
    let (kind, scheme, weight_key, activation_key) = match algo {
        "NVFP4" | "W4A16_NVFP4" => {
            group(16)?;
            let input = algo == "NVFP4";
            let kind = Kind::Nvfp4(Nvfp4 { compressed: false, input });
            (kind, Scheme::Nvfp4, scheme::NVFP4_STATIC, input.then_some(scheme::NVFP4_DYNAMIC))
        }
        "MXFP8" => {
            group(32)?;
            let kind = Kind::Mx { elem: Elem::E4m3, codes: "weight" };
            (kind, Scheme::Mxfp8, scheme::MXFP8_STATIC, Some(scheme::MXFP8_DYNAMIC))
        }
        "FP8" => {
            let key = scheme::FP8_STATIC_TENSOR_SYM;
            (fp8(ScaleShape::Tensor, true), Scheme::Fp8, key, Some(key))
        }
        "FP8_PER_CHANNEL_PER_TOKEN" => {
            let activation = scheme::FP8_DYNAMIC_TOKEN_SYM;
            (fp8(ScaleShape::Channel, false), Scheme::Fp8, scheme::FP8_STATIC_CHANNEL_SYM, Some(activation))
        }
        other => return Err(CheckpointError::Unsupported(format!("modelopt quant_algo {other:?}"))),
    };
    let format =
        Format { kind, scheme, weight_key: Some(weight_key), activation_key, producer: format!("modelopt {algo}") };
    let mut ignored = o.strings("ignore")?;
    ignored.extend(o.strings("exclude_modules")?);
    QuantConfig::single(format, &ignored)
}
