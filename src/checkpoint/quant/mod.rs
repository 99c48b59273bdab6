//! Quantisation configs and the tensors of quantised linear layers.
//!
//! A config becomes a [`QuantConfig`]: which modules are quantised, and each how ([`Format`]). [`read_linear`] then
//! reads one linear layer and checks that its tensors are what the config says.

mod awq;
mod compressed;
mod fp8;
mod gptq;
mod modelopt;
mod mx;
mod nvfp4;

pub(super) use mx::gpt_oss;

use super::CheckpointError;
use super::file::{Tensor, Tensors};
use super::json::Object;
use super::pattern::Pattern;
use crate::scheme::{self, Elem, QuantKey, Scheme};
use crate::weights::{HalfType, Scales, WeightElem, WeightMatrix};
use bytes::Bytes;
use safetensors::Dtype;
use serde_json::Value;

/// How the tensors of a linear layer are stored.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    /// `weight` in 16 bits.
    Plain,
    /// `weight` in 8 bits with float scales.
    Scaled {
        /// e4m3 or int8
        elem: Elem,
        /// How far a scale reaches.
        scale: ScaleShape,
        /// The tensor's last name.
        scale_name: &'static str,
        /// `input_scale` must be there.
        static_input: bool,
    },
    /// e2m1 or e4m3 codes in the tensor of that name, e8m0 in `weight_scale`.
    Mx {
        /// e2m1 or e4m3
        elem: Elem,
        /// `weight` or `weight_packed`
        codes: &'static str,
    },
    /// gpt-oss's fused mxfp4, which has no linear layers of its own.
    GptOss,
    /// e2m1 codes, e4m3 scales, one float scale.
    Nvfp4(nvfp4::Nvfp4),
    /// compressed-tensors' packed integers.
    Packed(compressed::Packed),
    /// GPTQ's.
    Gptq(gptq::Gptq),
    /// AWQ's; `None`: one group per row.
    Awq {
        /// Elements per group.
        group: Option<usize>,
    },
}

/// How far a float scale reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ScaleShape {
    /// One for the tensor.
    Tensor,
    /// One per output channel.
    Channel,
    /// One per square block.
    Block(usize),
}

/// One way of quantising.
#[derive(Clone, Debug)]
pub(super) struct Format {
    /// Which tensors.
    pub kind: Kind,
    /// The crate's scheme for it.
    pub scheme: Scheme,
    /// What the weights are.
    pub weight_key: Option<QuantKey>,
    /// What the activations are to be.
    pub activation_key: Option<QuantKey>,
    /// For [`MoeLayer::producer`](super::MoeLayer::producer).
    pub producer: String,
}

static PLAIN: std::sync::LazyLock<Format> = std::sync::LazyLock::new(|| Format {
    kind: Kind::Plain,
    scheme: Scheme::Unquantized,
    weight_key: None,
    activation_key: None,
    producer: "plain".into(),
});

/// What modules a format is for.
#[derive(Clone, Debug)]
enum Target {
    /// Every linear layer.
    Linear,
    /// Those that match.
    Module(Pattern),
}

/// The whole quantisation config. The default one quantises nothing.
#[derive(Clone, Debug, Default)]
pub(super) struct QuantConfig {
    /// In order of precedence.
    formats: Vec<(Vec<Target>, Format)>,
    ignored: Vec<Pattern>,
}

/// `quantization_config` of a `config.json`, at its top or in the text model's part.
pub(super) fn in_config(config: &Value) -> Result<Option<&Value>, CheckpointError> {
    let root = Object::new(config, "config.json")?;
    let text = root.object("text_config")?;
    let key = "quantization_config";
    let old = "compression_config";
    Ok(root.get(key).or(text.and_then(|t| t.get(key))).or(root.get(old)))
}

impl QuantConfig {
    /// A `quantization_config`, by its `quant_method`.
    pub fn new(value: &Value, name: &str) -> Result<Self, CheckpointError> {
        let o = Object::new(value, name)?;
        match o.required("quant_method", o.str("quant_method")?)? {
            "fp8" => fp8::config(o),
            "compressed-tensors" => compressed::config(o),
            "modelopt" | "modelopt_fp4" | "modelopt_mxfp8" => modelopt::config(o),
            "gptq" => gptq::config(o),
            "awq" => awq::config(o),
            "mxfp4" => mx::config(o),
            other => Err(CheckpointError::Unsupported(format!("quant_method {other:?}"))),
        }
    }

    /// ModelOpt's own file.
    pub fn modelopt(value: &Value, name: &str) -> Result<Self, CheckpointError> {
        modelopt::config(Object::new(value, name)?)
    }

    /// The file of the GPTQ tools, which may lack `quant_method`.
    pub fn gptq(value: &Value, name: &str) -> Result<Self, CheckpointError> {
        let o = Object::new(value, name)?;
        if o.get("quant_method").is_some() { Self::new(value, name) } else { gptq::config(o) }
    }

    /// One format for every linear layer outside of the lists.
    fn single(format: Format, ignored: &[String]) -> Result<Self, CheckpointError> {
        let ignored = ignored.iter().map(|p| Pattern::new(p)).collect::<Result<_, _>>()?;
        Ok(Self { formats: vec![(vec![Target::Linear], format)], ignored })
    }

    /// How the module of this full name is stored.
    pub fn format(&self, module: &str) -> &Format {
        if self.ignored.iter().any(|p| p.matches(module)) {
            return &PLAIN;
        }
        let named = |t: &Target| matches!(t, Target::Module(p) if p.matches(module));
        let linear = |t: &Target| matches!(t, Target::Linear);
        let find = |f: &dyn Fn(&Target) -> bool| self.formats.iter().find(|(t, _)| t.iter().any(f)).map(|(_, f)| f);
        // A name says more than a class.
        find(&named).or_else(|| find(&linear)).unwrap_or(&PLAIN)
    }
}

/// A linear layer.
pub(super) struct Linear {
    /// `[rows, cols]`
    pub matrix: WeightMatrix,
    /// As [`ExpertWeights::input_scale`](crate::weights::ExpertWeights::input_scale).
    pub input_scale: Option<f32>,
}

impl From<WeightMatrix> for Linear {
    fn from(matrix: WeightMatrix) -> Self {
        Linear { matrix, input_scale: None }
    }
}

/// Reads the linear layer `module` of `rows` x `cols`.
pub(super) fn read_linear(
    tensors: &Tensors,
    module: &str,
    rows: usize,
    cols: usize,
    format: &Format,
) -> Result<Linear, CheckpointError> {
    let site = Site { tensors, module, rows, cols };
    // Smoothing factors of AWQ-like ModelOpt recipes would have to divide the activations; nobody here does that.
    if site.find("pre_quant_scale").is_some() {
        return Err(CheckpointError::Unsupported(format!("{module}.pre_quant_scale")));
    }
    match &format.kind {
        Kind::Plain => {
            let weight = site.get("weight")?.expect(&[Dtype::BF16, Dtype::F16], &[rows, cols])?;
            // A scale beside 16-bit weights means that config and file disagree on what is quantised.
            let prefix = format!("{module}.");
            if let Some(other) = tensors.under(&prefix).find(|n| !matches!(&n[prefix.len()..], "weight" | "bias")) {
                return Err(CheckpointError::tensor(other, "is there, but the config has the module not quantised"));
            }
            Ok(WeightMatrix { rows, cols, elem: half_elem(weight), codes: weight.data.clone(), scales: Scales::None }
                .into())
        }
        Kind::Scaled { elem, scale, scale_name, static_input } => {
            fp8::read(&site, *elem, *scale, scale_name, *static_input)
        }
        Kind::Mx { elem, codes } => mx::read(&site, *elem, codes),
        Kind::GptOss => Err(CheckpointError::Unsupported(format!("mxfp4 in gpt-oss's layout at {module}"))),
        Kind::Nvfp4(n) => nvfp4::read(&site, n),
        Kind::Packed(p) => compressed::read(&site, p),
        Kind::Gptq(g) => gptq::read(&site, g),
        Kind::Awq { group } => awq::read(&site, *group),
    }
}

/// The element of a 16-bit tensor whose type has been checked.
pub(super) fn half_elem(t: &Tensor) -> WeightElem {
    if t.dtype == Dtype::F16 { WeightElem::F16 } else { WeightElem::Bf16 }
}

/// One linear layer that is being read.
struct Site<'a> {
    tensors: &'a Tensors,
    module: &'a str,
    rows: usize,
    cols: usize,
}

impl<'a> Site<'a> {
    fn name(&self, last: &str) -> String {
        format!("{}.{last}", self.module)
    }

    fn get(&self, last: &str) -> Result<&'a Tensor, CheckpointError> {
        self.tensors.get(&self.name(last))
    }

    fn find(&self, last: &str) -> Option<&'a Tensor> {
        self.tensors.find(&self.name(last))
    }

    fn error(&self, last: &str, problem: String) -> CheckpointError {
        CheckpointError::tensor(&self.name(last), problem)
    }

    /// How many groups of `size` (`None`: the whole row) a row has, with that size.
    fn groups(&self, last: &str, size: Option<usize>) -> Result<(usize, usize), CheckpointError> {
        let size = size.unwrap_or(self.cols);
        if size == 0 || !self.cols.is_multiple_of(size) {
            let problem = format!("has rows of {}, which the config's group size {size} does not divide", self.cols);
            return Err(self.error(last, problem));
        }
        Ok((self.cols / size, size))
    }

    fn matrix(&self, elem: Elem, codes: Bytes, scales: Scales) -> WeightMatrix {
        WeightMatrix { rows: self.rows, cols: self.cols, elem: WeightElem::Quant(elem), codes, scales }
    }
}

/// Which 16-bit type the scales of integer groups have.
fn half_type(scale: &Tensor) -> Result<HalfType, CheckpointError> {
    scale.expect_type(&[Dtype::BF16, Dtype::F16])?;
    Ok(if scale.dtype == Dtype::F16 { HalfType::F16 } else { HalfType::Bf16 })
}

/// The key of integers in groups.
fn int_key(bits: u32, group: Option<usize>, symmetric: bool) -> QuantKey {
    match (bits, group, symmetric) {
        (4, Some(32), true) => scheme::INT4_STATIC_32,
        (4, Some(32), false) => scheme::INT4_STATIC_32_ASYM,
        (4, _, true) => scheme::INT4_STATIC,
        (4, _, false) => scheme::INT4_STATIC_ASYM,
        (_, _, true) => scheme::INT8_STATIC,
        (_, _, false) => scheme::INT8_STATIC_ASYM,
    }
}

/// The element of integers in groups.
fn int_elem(bits: u32) -> Elem {
    if bits == 4 { Elem::U4 } else { Elem::U8 }
}

/// `bits` of the config, 4 or 8.
fn int_bits(o: Object, key: &str) -> Result<u32, CheckpointError> {
    match o.required(key, o.int(key)?)? {
        4 => Ok(4),
        8 => Ok(8),
        n => Err(CheckpointError::Unsupported(format!("{key} {n} (4 and 8 are)"))),
    }
}

/// `group_size` of the config: -1 is the whole row.
fn group_size(o: Object, key: &str) -> Result<Option<usize>, CheckpointError> {
    match o.required(key, o.int(key)?)? {
        -1 => Ok(None),
        n @ 1..=0x1000000 => Ok(Some(n as usize)),
        n => Err(o.error(key, &format!("is {n}"))),
    }
}

/// Writes 4- or 8-bit codes at their canonical places.
struct Codes {
    bytes: Vec<u8>,
    bits: u32,
}

impl Codes {
    /// Room for `n` codes; `n` must come from a tensor's checked shape.
    fn new(n: usize, bits: u32) -> Self {
        Codes { bytes: vec![0; (n * bits as usize).div_ceil(8)], bits }
    }

    fn set(&mut self, at: usize, code: u8) {
        if self.bits == 4 {
            self.bytes[at / 2] |= (code & 0xf) << (4 * (at % 2));
        } else {
            self.bytes[at] = code;
        }
    }
}

/// Code `at` of a 32-bit word, the lowest bits first.
fn field(word: u32, at: usize, bits: u32) -> u8 {
    (word >> (at as u32 * bits)) as u8 & (0xff >> (8 - bits))
}
