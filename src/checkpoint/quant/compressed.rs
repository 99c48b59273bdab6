//! compressed-tensors (`quant_method` "compressed-tensors"): `config_groups` with the arguments of weights and input
//! activations, and a `format` for the group or for all.
//!
//! Packed integers: `weight_packed` I32 `[N, K/pack]` along K, `weight_zero_point` I32 `[N/pack, G]` along N, both
//! stored with an offset of half the range; `weight_shape` I64 `[2]` holds N and K.

use super::nvfp4::Nvfp4;
use super::{
    CheckpointError, Format, Kind, Linear, Object, Pattern, QuantConfig, ScaleShape, Site, Target, field, fp8, gptq,
    group_size, half_type, int_elem, int_key,
};
use crate::checkpoint::file::Tensor;
use crate::scheme::{self, Elem, QuantKey, Scheme};
use crate::weights::Scales;
use bytes::Bytes;
use safetensors::Dtype;
use serde_json::Value;

/// What the config says of packed integers.
#[derive(Clone, Debug)]
pub(in super::super) struct Packed {
    bits: u32,
    group: Option<usize>,
    symmetric: bool,
    /// `weight_g_idx` must be there.
    act_order: bool,
}

/// The config.
pub(super) fn config(o: Object) -> Result<QuantConfig, CheckpointError> {
    for key in ["transform_config", "sparsity_config"] {
        let dense = |c: &Object| matches!(c.str("format"), Ok(Some("dense"))) || c.entries().next().is_none();
        if o.object(key)?.is_some_and(|c| !dense(&c)) {
            return Err(CheckpointError::Unsupported(format!("compressed-tensors with a {key}")));
        }
    }
    let common = o.str("format")?;
    let groups = o.required("config_groups", o.object("config_groups")?)?;
    let mut formats = Vec::new();
    for (name, group) in groups.entries() {
        let group = Object::new(group, name)?;
        let format = group.str("format")?.or(common);
        let format = o.required("format", format)?;
        let mut targets = Vec::new();
        for target in group.strings("targets")? {
            targets.push(match target.as_str() {
                "Linear" => Target::Linear,
                _ => Target::Module(Pattern::new(&target)?),
            });
        }
        if targets.is_empty() {
            return Err(group.error("targets", "is missing or empty"));
        }
        formats.push((targets, group_format(group, format)?));
    }
    if formats.is_empty() {
        return Err(o.error("config_groups", "is empty"));
    }
    let ignored = o.strings("ignore")?.iter().map(|p| Pattern::new(p)).collect::<Result<_, _>>()?;
    Ok(QuantConfig { formats, ignored })
}

/// The arguments of weights or activations.
struct Args<'a> {
    o: Object<'a>,
    bits: i64,
    /// "float" or "int"
    ty: &'a str,
    strategy: &'a str,
    symmetric: bool,
}

impl<'a> Args<'a> {
    fn new(o: Object<'a>) -> Result<Self, CheckpointError> {
        Ok(Args {
            o,
            bits: o.required("num_bits", o.int("num_bits")?)?,
            ty: o.required("type", o.str("type")?)?,
            strategy: o.required("strategy", o.str("strategy")?)?,
            symmetric: o.required("symmetric", o.bool("symmetric")?)?,
        })
    }

    fn unsupported(&self, what: &str) -> CheckpointError {
        let Args { bits, ty, strategy, symmetric, .. } = self;
        CheckpointError::Unsupported(format!(
            "compressed-tensors {what} of {bits}-bit {ty}, strategy {strategy:?}, symmetric {symmetric}"
        ))
    }
}

fn group_format(group: Object, format: &str) -> Result<Format, CheckpointError> {
    let w = Args::new(group.required("weights", group.object("weights")?)?)?;
    let unsupported = || w.unsupported(&format!("{format} weights"));
    if !w.symmetric && format != "pack-quantized" {
        return Err(unsupported());
    }
    let activation_key = match group.object("input_activations")? {
        None => None,
        Some(a) => Some(activation_key(&Args::new(a)?)?),
    };
    // A stored scale of the input belongs to per-tensor keys and to nvfp4's second level.
    let static_tensor = [scheme::FP8_STATIC_TENSOR_SYM, scheme::INT8_STATIC_TENSOR_SYM].map(Some);
    let static_input = static_tensor.contains(&activation_key);
    let need_group = |want: usize| match group_size(w.o, "group_size")? {
        Some(n) if n == want => Ok(()),
        _ => Err(w.o.error("group_size", &format!("must be {want} in {format}"))),
    };
    let (kind, scheme, weight_key) = match (format, w.ty, w.bits) {
        ("int-quantized" | "naive-quantized", "int", 8) => {
            let (scale, key) = match w.strategy {
                "tensor" => (ScaleShape::Tensor, scheme::INT8_STATIC_TENSOR_SYM),
                "channel" => (ScaleShape::Channel, scheme::INT8_STATIC_CHANNEL_SYM),
                _ => return Err(unsupported()),
            };
            let kind = Kind::Scaled { elem: Elem::Int8, scale, scale_name: "weight_scale", static_input };
            (kind, Scheme::Int8, key)
        }
        ("float-quantized" | "naive-quantized", "float", 8) => {
            let scale = match w.strategy {
                "tensor" => ScaleShape::Tensor,
                "channel" => ScaleShape::Channel,
                "block" => {
                    let block = w.o.required("block_structure", w.o.get("block_structure"))?;
                    ScaleShape::Block(fp8::block_size(block)?)
                }
                _ => return Err(unsupported()),
            };
            let kind = Kind::Scaled { elem: Elem::E4m3, scale, scale_name: "weight_scale", static_input };
            (kind, Scheme::Fp8, fp8::weight_key(scale)?)
        }
        ("mxfp8-quantized", "float", 8) => {
            need_group(32)?;
            (Kind::Mx { elem: Elem::E4m3, codes: "weight" }, Scheme::Mxfp8, scheme::MXFP8_STATIC)
        }
        ("mxfp4-pack-quantized", "float", 4) => {
            need_group(32)?;
            (Kind::Mx { elem: Elem::E2m1, codes: "weight_packed" }, Scheme::Mxfp4, scheme::MXFP4_STATIC)
        }
        ("nvfp4-pack-quantized", "float", 4) => {
            need_group(16)?;
            let input = match activation_key {
                None => false,
                Some(scheme::NVFP4_DYNAMIC) => true,
                Some(_) => return Err(unsupported()),
            };
            (Kind::Nvfp4(Nvfp4 { compressed: true, input }), Scheme::Nvfp4, scheme::NVFP4_STATIC)
        }
        ("pack-quantized", "int", 4 | 8) => {
            let group = match w.strategy {
                "group" => group_size(w.o, "group_size")?,
                "channel" => None,
                _ => return Err(unsupported()),
            };
            let bits = if w.bits == 4 { 4 } else { 8 };
            // "weight" and "static" order the columns only while quantising; "group" (also "dynamic") needs an index.
            // Old configs say true.
            let act_order = match w.o.get("actorder") {
                None | Some(Value::Bool(false)) => false,
                Some(Value::Bool(true)) => true,
                Some(Value::String(s)) if matches!(s.as_str(), "weight" | "static") => false,
                Some(Value::String(s)) if matches!(s.as_str(), "group" | "dynamic") => true,
                Some(other) => return Err(w.o.error("actorder", &format!("is {other}"))),
            };
            let packed = Packed { bits, group, symmetric: w.symmetric, act_order };
            (Kind::Packed(packed), Scheme::IntWna16, int_key(bits, group, w.symmetric))
        }
        (
            "int-quantized"
            | "naive-quantized"
            | "float-quantized"
            | "mxfp8-quantized"
            | "mxfp4-pack-quantized"
            | "nvfp4-pack-quantized"
            | "pack-quantized",
            ..,
        ) => return Err(unsupported()),
        _ => return Err(CheckpointError::Unsupported(format!("compressed-tensors format {format:?}"))),
    };
    if static_input && !matches!(kind, Kind::Scaled { .. }) {
        return Err(unsupported());
    }
    let producer = format!("compressed-tensors {format}");
    Ok(Format { kind, scheme, weight_key: Some(weight_key), activation_key, producer })
}

/// What the input activations are quantised to.
fn activation_key(a: &Args) -> Result<QuantKey, CheckpointError> {
    let unsupported = || a.unsupported("activations");
    if !a.symmetric {
        return Err(unsupported());
    }
    let dynamic = match a.o.get("dynamic") {
        None | Some(Value::Bool(false)) => "no",
        Some(Value::Bool(true)) => "yes",
        Some(Value::String(s)) if s == "local" => "local",
        Some(other) => return Err(a.o.error("dynamic", &format!("is {other}"))),
    };
    let group = a.o.int("group_size")?;
    let e8m0 = matches!(a.o.str("scale_dtype")?, Some("torch.uint8" | "torch.float8_e8m0fnu"));
    Ok(match (a.ty, a.bits, a.strategy, dynamic, group) {
        ("float", 8, "tensor", "no", _) => scheme::FP8_STATIC_TENSOR_SYM,
        ("float", 8, "tensor", "yes", _) => scheme::FP8_DYNAMIC_TENSOR_SYM,
        ("float", 8, "token", "yes", _) => scheme::FP8_DYNAMIC_TOKEN_SYM,
        ("float", 8, "group", "yes", Some(128)) => scheme::FP8_DYNAMIC_128_SYM,
        ("float", 8, "group", "yes", Some(64)) => scheme::FP8_DYNAMIC_64_SYM,
        ("float", 8, "group", "yes", Some(32)) if e8m0 => scheme::MXFP8_DYNAMIC,
        ("float", 4, "group", "yes", Some(32)) => scheme::MXFP4_DYNAMIC,
        ("float", 4, "tensor_group", "local", Some(16)) => scheme::NVFP4_DYNAMIC,
        ("int", 8, "tensor", "no", _) => scheme::INT8_STATIC_TENSOR_SYM,
        ("int", 8, "tensor", "yes", _) => scheme::INT8_DYNAMIC_TENSOR_SYM,
        ("int", 8, "token", "yes", _) => scheme::INT8_DYNAMIC_TOKEN_SYM,
        _ => return Err(unsupported()),
    })
}

/// Reads packed integers.
pub(super) fn read(site: &Site, p: &Packed) -> Result<Linear, CheckpointError> {
    let (rows, cols, bits) = (site.rows, site.cols, p.bits);
    let pack = 32 / bits as usize;
    let (groups, size) = site.groups("weight_packed", p.group)?;
    let words = cols.div_ceil(pack);
    let packed = site.get("weight_packed")?.expect(&[Dtype::I32], &[rows, words])?;
    let shape = site.get("weight_shape")?;
    weight_shape(shape, rows, cols)?;
    let scales = site.get("weight_scale")?;
    let ty = half_type(scales)?;
    scales.expect(&[scales.dtype], &[rows, groups])?;

    let codes = if cols % pack == 0 {
        packed.data.clone()
    } else {
        // Rows are filled up to whole words; canonical ones are not.
        if !(cols * bits as usize).is_multiple_of(8) {
            return Err(packed.error(format!("has rows of {cols} codes, which are not whole bytes")));
        }
        let row = cols * bits as usize / 8;
        let rows = packed.data.chunks_exact(words * 4).flat_map(|r| r[..row].iter().copied());
        Bytes::from(rows.collect::<Vec<u8>>())
    };
    let zero_points = match (site.find("weight_zero_point"), p.symmetric) {
        (None, true) => None,
        (Some(t), true) => return Err(t.error("is there, but the config says symmetric")),
        (None, false) => return Err(site.error("weight_zero_point", "is not in the file".into())),
        (Some(t), false) => {
            t.expect(&[Dtype::I32], &[rows.div_ceil(pack), groups])?;
            let word = t.words();
            let zero = |i: usize| field(word(i / groups / pack * groups + i % groups), i / groups % pack, bits);
            Some((0..rows * groups).map(zero).collect())
        }
    };
    let g_idx = match site.find("weight_g_idx") {
        None if p.act_order => return Err(site.error("weight_g_idx", "is not in the file".into())),
        None => None,
        Some(t) => gptq::group_index(t, cols, groups, size)?,
    };
    let scales = Scales::Group { size, ty, values: scales.floats()?, zero_points, g_idx };
    Ok(site.matrix(int_elem(bits), codes, scales).into())
}

/// Checks that the stored shape is `rows`, `cols`.
fn weight_shape(t: &Tensor, rows: usize, cols: usize) -> Result<(), CheckpointError> {
    t.expect_type(&[Dtype::I64, Dtype::I32])?.expect(&[t.dtype], &[2])?;
    let stored: Vec<i64> = match t.dtype {
        Dtype::I32 => (0..2).map(|i| i64::from(t.words()(i) as i32)).collect(),
        _ => (0..2).map(|i| i64::from(t.words()(2 * i)) | i64::from(t.words()(2 * i + 1)) << 32).collect(),
    };
    if stored != [rows as i64, cols as i64] {
        return Err(t.error(format!("is {stored:?}, expected [{rows}, {cols}]")));
    }
    Ok(())
}
