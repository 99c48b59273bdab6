//! nvfp4 tensors as compressed-tensors and ModelOpt store them: e2m1 codes low nibble first, an e4m3 scale per 16, and
//! a float32 scale per tensor that divides in the former and multiplies in the latter.

use super::{CheckpointError, Linear, Site};
use crate::scheme::Elem;
use crate::weights::Scales;
use safetensors::Dtype;

/// Who wrote it and whether the input is quantised.
#[derive(Clone, Debug)]
pub(in super::super) struct Nvfp4 {
    /// compressed-tensors' names and dividing scales; otherwise ModelOpt's.
    pub compressed: bool,
    /// The scale of the input must be there.
    pub input: bool,
}

/// Reads the codes, both scales and the input's scale.
pub(super) fn read(site: &Site, n: &Nvfp4) -> Result<Linear, CheckpointError> {
    let (rows, cols) = (site.rows, site.cols);
    let (codes, global, input) = if n.compressed {
        ("weight_packed", "weight_global_scale", "input_global_scale")
    } else {
        ("weight", "weight_scale_2", "input_scale")
    };
    let (groups, _) = site.groups(codes, Some(16))?;
    let weight = site.get(codes)?.expect(&[Dtype::U8], &[rows, cols / 2])?;
    let scales = site.get("weight_scale")?.expect(&[Dtype::F8_E4M3], &[rows, groups])?;
    if let Some(i) = scales.data.iter().position(|c| c & 0x7f == 0x7f) {
        return Err(scales.error(format!("holds a NaN (e4m3 code {:#04x}) at index {i}", scales.data[i])));
    }
    let multiplier = |name: &str| {
        let tensor = site.get(name)?;
        let v = if n.compressed { 1.0 / tensor.positive()? } else { tensor.positive()? };
        // The reciprocal of a subnormal is infinite, that of a huge number rounds to a subnormal or zero.
        if v.is_finite() && v > 0.0 { Ok(v) } else { Err(tensor.error("has no finite reciprocal")) }
    };
    let scales = Scales::Nvfp4 { codes: scales.data.clone(), global: multiplier(global)? };
    let input_scale = if n.input { Some(multiplier(input)?) } else { None };
    Ok(Linear { matrix: site.matrix(Elem::E2m1, weight.data.clone(), scales), input_scale })
}
