//! GPTQ as AutoGPTQ and GPTQModel write it: `qweight` I32 `[K/pack, N]` packed along K, `qzeros` I32 `[G, N/pack]`
//! packed along N, `scales` `[G, N]`, `g_idx` I32 `[K]`. The first version of the format stores zero points minus one,
//! wrapping within their bits; `checkpoint_format` "gptq_v2" stores them as they are.

use super::{
    CheckpointError, Codes, Format, Kind, Linear, Object, Pattern, QuantConfig, Site, field, group_size, half_type,
    int_bits, int_elem, int_key,
};
use crate::checkpoint::file::Tensor;
use crate::scheme::Scheme;
use crate::weights::Scales;
use safetensors::Dtype;

/// What the config says.
#[derive(Clone, Debug)]
pub(in super::super) struct Gptq {
    bits: u32,
    group: Option<usize>,
    symmetric: bool,
    act_order: bool,
    /// Added to a stored zero point.
    zero_offset: u8,
}

/// The config, of `config.json` or `quantize_config.json`.
pub(super) fn config(o: Object) -> Result<QuantConfig, CheckpointError> {
    let bits = int_bits(o, "bits")?;
    let group = group_size(o, "group_size")?;
    let symmetric = o.required("sym", o.bool("sym")?)?;
    let zero_offset = match o.str("checkpoint_format")? {
        None | Some("gptq") => 1,
        Some("gptq_v2") => 0,
        Some(other) => return Err(CheckpointError::Unsupported(format!("gptq with checkpoint_format {other:?}"))),
    };
    let act_order = o.bool("desc_act")?.unwrap_or(false);
    let format = Format {
        kind: Kind::Gptq(Gptq { bits, group, symmetric, act_order, zero_offset }),
        scheme: Scheme::IntWna16,
        weight_key: Some(int_key(bits, group, symmetric)),
        activation_key: None,
        producer: "gptq".into(),
    };
    let mut config = QuantConfig::single(format, &o.strings("modules_to_not_convert")?)?;
    // GPTQModel: "-:" leaves modules alone, anything else changes their bits or groups.
    for (pattern, _) in o.object("dynamic")?.iter().flat_map(|d| d.entries()) {
        match pattern.strip_prefix("-:") {
            Some(regex) => config.ignored.push(Pattern::regex(regex)?),
            None => return Err(CheckpointError::Unsupported(format!("gptq with dynamic rule {pattern:?}"))),
        }
    }
    Ok(config)
}

/// Reads and repacks one linear layer.
pub(super) fn read(site: &Site, g: &Gptq) -> Result<Linear, CheckpointError> {
    let (rows, cols, bits) = (site.rows, site.cols, g.bits);
    let pack = 32 / bits as usize;
    let (groups, size) = site.groups("qweight", g.group)?;
    if !cols.is_multiple_of(pack) || !rows.is_multiple_of(pack) {
        return Err(site.error("qweight", format!("is {rows} x {cols}, which is not whole words of {pack}")));
    }
    let qweight = site.get("qweight")?.expect(&[Dtype::I32], &[cols / pack, rows])?;
    let scales = site.get("scales")?;
    let ty = half_type(scales)?;
    scales.expect(&[scales.dtype], &[groups, rows])?;

    let mut codes = Codes::new(rows * cols, bits);
    let word = qweight.words();
    for c in 0..cols / pack {
        for r in 0..rows {
            let w = word(c * rows + r);
            for i in 0..pack {
                codes.set(r * cols + c * pack + i, field(w, i, bits));
            }
        }
    }
    let zero_points = match site.find("qzeros") {
        None if g.symmetric => None,
        None => return Err(site.error("qzeros", "is not in the file".into())),
        Some(t) => {
            t.expect(&[Dtype::I32], &[groups, rows / pack])?;
            let zeros = zeros(t, rows, groups, g);
            let middle = 1 << (bits - 1);
            match zeros.iter().find(|&&z| z != middle) {
                Some(z) if g.symmetric => {
                    return Err(t.error(format!("holds zero point {z}, but the config says sym (always {middle})")));
                }
                _ if g.symmetric => None,
                _ => Some(zeros),
            }
        }
    };
    let g_idx = match site.find("g_idx") {
        None if g.act_order => return Err(site.error("g_idx", "is not in the file".into())),
        None => None,
        Some(t) => group_index(t, cols, groups, size)?,
    };
    let values = transpose(&scales.floats()?, groups, rows);
    let scales = Scales::Group { size, ty, values, zero_points, g_idx };
    Ok(site.matrix(int_elem(bits), codes.bytes.into(), scales).into())
}

/// Zero points `[rows, groups]` from words `[groups, rows/pack]`.
fn zeros(t: &Tensor, rows: usize, groups: usize, g: &Gptq) -> Vec<u8> {
    let pack = 32 / g.bits as usize;
    let mask = 0xffu8 >> (8 - g.bits);
    let word = t.words();
    let mut out = vec![0; rows * groups];
    for group in 0..groups {
        for r in 0..rows {
            let stored = field(word(group * (rows / pack) + r / pack), r % pack, g.bits);
            out[r * groups + group] = stored.wrapping_add(g.zero_offset) & mask;
        }
    }
    out
}

/// The group of each column; `None` when they lie in order.
pub(super) fn group_index(
    t: &Tensor,
    cols: usize,
    groups: usize,
    size: usize,
) -> Result<Option<Vec<u32>>, CheckpointError> {
    t.expect(&[Dtype::I32], &[cols])?;
    let word = t.words();
    let index: Vec<u32> = (0..cols).map(&word).collect();
    if let Some(i) = index.iter().position(|&g| g as usize >= groups) {
        return Err(t.error(format!("holds group {} at index {i}, but there are {groups}", index[i] as i32)));
    }
    let in_order = index.iter().enumerate().all(|(k, &g)| g as usize == k / size);
    // A checkpoint permutes columns, it does not change how many share a scale.
    let mut counts = vec![0usize; groups];
    index.iter().for_each(|&g| counts[g as usize] += 1);
    if let Some(g) = counts.iter().position(|&c| c != size) {
        return Err(t.error(format!("gives group {g} {} columns, expected {size}", counts[g])));
    }
    Ok((!in_order).then_some(index))
}

/// `[groups, rows]` to `[rows, groups]`.
pub(super) fn transpose(values: &[f32], groups: usize, rows: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for r in 0..rows {
        out.extend((0..groups).map(|g| values[g * rows + r]));
    }
    out
}
