//! OCP microscaling: e2m1 or e4m3 codes with an e8m0 scale per 32 (compressed-tensors, ModelOpt), and gpt-oss's fused
//! mxfp4 tensors (`quant_method` "mxfp4").

use super::{CheckpointError, Format, Kind, Linear, Object, QuantConfig, Site};
use crate::checkpoint::file::{Tensor, Tensors};
use crate::scheme::{self, Elem, Scheme};
use crate::weights::{Scales, WeightElem, WeightMatrix};
use bytes::Bytes;
use safetensors::Dtype;

/// The types in which e8m0 codes are stored.
const E8M0: [Dtype; 2] = [Dtype::U8, Dtype::F8_E8M0];

/// The config of `quant_method` "mxfp4".
pub(super) fn config(o: Object) -> Result<QuantConfig, CheckpointError> {
    let format = Format {
        kind: Kind::GptOss,
        scheme: Scheme::Mxfp4,
        weight_key: Some(scheme::MXFP4_STATIC),
        activation_key: None,
        producer: "mxfp4".into(),
    };
    QuantConfig::single(format, &o.strings("modules_to_not_convert")?)
}

fn checked(scales: &Tensor) -> Result<(), CheckpointError> {
    match scales.data.iter().position(|&c| c == 255) {
        Some(i) => Err(scales.error(format!("holds a NaN (e8m0 code 255) at index {i}"))),
        None => Ok(()),
    }
}

/// Reads the codes and `weight_scale`.
pub(super) fn read(site: &Site, elem: Elem, codes: &str) -> Result<Linear, CheckpointError> {
    let (rows, cols) = (site.rows, site.cols);
    let (groups, _) = site.groups(codes, Some(32))?;
    let weight = match elem {
        Elem::E2m1 => site.get(codes)?.expect(&[Dtype::U8], &[rows, cols / 2])?,
        _ => site.get(codes)?.expect(&[Dtype::F8_E4M3], &[rows, cols])?,
    };
    let scales = site.get("weight_scale")?.expect(&E8M0, &[rows, groups])?;
    checked(scales)?;
    Ok(site.matrix(elem, weight.data.clone(), Scales::E8m0(scales.data.clone())).into())
}

/// The fused tensors of one of gpt-oss's projections, checked.
pub(in super::super) struct GptOss<'a> {
    blocks: &'a Tensor,
    scales: &'a Tensor,
    rows: usize,
    cols: usize,
}

/// Finds `<name>_blocks` `[E, rows, cols/32, 16]` and `<name>_scales` `[E, rows, cols/32]`.
pub(in super::super) fn gpt_oss<'a>(
    tensors: &'a Tensors,
    name: &str,
    experts: usize,
    rows: usize,
    cols: usize,
) -> Result<GptOss<'a>, CheckpointError> {
    let blocks = tensors.get(&format!("{name}_blocks"))?;
    if !cols.is_multiple_of(32) {
        return Err(blocks.error(format!("has rows of {cols}, which are not whole blocks of 32")));
    }
    blocks.expect(&[Dtype::U8], &[experts, rows, cols / 32, 16])?;
    let scales = tensors.get(&format!("{name}_scales"))?.expect(&E8M0, &[experts, rows, cols / 32])?;
    checked(scales)?;
    Ok(GptOss { blocks, scales, rows, cols })
}

impl GptOss<'_> {
    /// Rows `first`, `first + step`, ... of one expert; mapped where they are all of them.
    pub fn expert(&self, e: usize, first: usize, step: usize) -> WeightMatrix {
        let rows = self.rows / step;
        let take = |t: &Tensor, row: usize| -> Bytes {
            let whole = t.data.slice(e * self.rows * row..(e + 1) * self.rows * row);
            if step == 1 {
                return whole;
            }
            let mut out = Vec::with_capacity(rows * row);
            for r in 0..rows {
                let at = (first + r * step) * row;
                out.extend_from_slice(&whole[at..at + row]);
            }
            out.into()
        };
        WeightMatrix {
            rows,
            cols: self.cols,
            elem: WeightElem::Quant(Elem::E2m1),
            codes: take(self.blocks, self.cols / 2),
            scales: Scales::E8m0(take(self.scales, self.cols / 32)),
        }
    }
}
