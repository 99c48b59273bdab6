//! AWQ as AutoAWQ's "gemm" version writes it: `qweight` I32 `[K, N/8]` and `qzeros` I32 `[G, N/8]`, both packed along
//! N with the columns in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest nibble; `scales` `[G, N]`.

use super::{
    CheckpointError, Codes, Format, Kind, Linear, Object, QuantConfig, Site, field, gptq, group_size, half_type,
    int_bits, int_key,
};
use crate::scheme::{Elem, Scheme};
use crate::weights::Scales;
use safetensors::Dtype;

/// Column of each nibble.
const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// The config of `quant_method` "awq".
pub(super) fn config(o: Object) -> Result<QuantConfig, CheckpointError> {
    let bits = int_bits(o, if o.get("bits").is_some() { "bits" } else { "w_bit" })?;
    let group = group_size(o, if o.get("group_size").is_some() { "group_size" } else { "q_group_size" })?;
    let version = o.str("version")?.unwrap_or("gemm").to_lowercase();
    let zero_point = o.required("zero_point", o.bool("zero_point")?)?;
    if bits != 4 || version != "gemm" || !zero_point {
        let what = format!("awq with bits {bits}, version {version:?}, zero_point {zero_point}");
        return Err(CheckpointError::Unsupported(what));
    }
    let format = Format {
        kind: Kind::Awq { group },
        scheme: Scheme::IntWna16,
        weight_key: Some(int_key(4, group, false)),
        activation_key: None,
        producer: "awq".into(),
    };
    QuantConfig::single(format, &o.strings("modules_to_not_convert")?)
}

/// Reads and repacks one linear layer.
pub(super) fn read(site: &Site, group: Option<usize>) -> Result<Linear, CheckpointError> {
    let (rows, cols) = (site.rows, site.cols);
    let (groups, size) = site.groups("qweight", group)?;
    if !rows.is_multiple_of(8) {
        return Err(site.error("qweight", format!("has {rows} output channels, which are not whole words of 8")));
    }
    let words = rows / 8;
    let qweight = site.get("qweight")?.expect(&[Dtype::I32], &[cols, words])?;
    let qzeros = site.get("qzeros")?.expect(&[Dtype::I32], &[groups, words])?;
    let scales = site.get("scales")?;
    let ty = half_type(scales)?;
    scales.expect(&[scales.dtype], &[groups, rows])?;

    let mut codes = Codes::new(rows * cols, 4);
    let word = qweight.words();
    for c in 0..cols {
        for n in 0..words {
            let w = word(c * words + n);
            for (i, r) in ORDER.into_iter().enumerate() {
                codes.set((n * 8 + r) * cols + c, field(w, i, 4));
            }
        }
    }
    let mut zeros = vec![0; rows * groups];
    let word = qzeros.words();
    for g in 0..groups {
        for n in 0..words {
            let w = word(g * words + n);
            for (i, r) in ORDER.into_iter().enumerate() {
                zeros[(n * 8 + r) * groups + g] = field(w, i, 4);
            }
        }
    }
    let values = gptq::transpose(&scales.floats()?, groups, rows);
    let scales = Scales::Group { size, ty, values, zero_points: Some(zeros), g_idx: None };
    Ok(site.matrix(Elem::U4, codes.bytes.into(), scales).into())
}
