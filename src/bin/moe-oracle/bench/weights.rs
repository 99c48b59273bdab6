//! Made-up weights in every format: valid, of sensible size, and quick to make.

use super::rng::Rng;
use crate::failure::{Failure, Outcome};
use crate::machine;
use crate::presets::Preset;
use bytes::Bytes;
use moe_oracle::oracle::{DynOracle, ExpertsKind, ORACLES};
use moe_oracle::scheme::{Elem, QuantKey};
use moe_oracle::weights::{ExpertWeights, HalfType, MoeWeights, Scales, WeightElem, WeightMatrix};
use rayon::prelude::*;

/// How a format's scales lie.
#[derive(Clone, Copy)]
enum Layout {
    None,
    PerTensor,
    PerRow,
    Block128,
    E8m0,
    Nvfp4,
    Group(usize),
}

/// What `--scheme` names: a scheme with the pair of keys that checkpoints of that kind have.
pub struct Format {
    /// The name.
    pub name: &'static str,
    /// The oracle's alias.
    alias: &'static str,
    elem: WeightElem,
    layout: Layout,
}

const fn format(name: &'static str, alias: &'static str, elem: WeightElem, layout: Layout) -> Format {
    Format { name, alias, elem, layout }
}

/// Every format.
pub const FORMATS: [Format; 12] = [
    format("bf16", "Bf16", WeightElem::Bf16, Layout::None),
    format("f16", "Bf16", WeightElem::F16, Layout::None),
    format("fp8-block", "Fp8Block", WeightElem::Quant(Elem::E4m3), Layout::Block128),
    format("fp8-channel", "Fp8Channel", WeightElem::Quant(Elem::E4m3), Layout::PerRow),
    format("fp8-tensor", "Fp8Tensor", WeightElem::Quant(Elem::E4m3), Layout::PerTensor),
    format("nvfp4", "Nvfp4W4A4", WeightElem::Quant(Elem::E2m1), Layout::Nvfp4),
    format("mxfp4", "Mxfp4W4A16", WeightElem::Quant(Elem::E2m1), Layout::E8m0),
    format("mxfp8", "Mxfp8W8A8", WeightElem::Quant(Elem::E4m3), Layout::E8m0),
    format("int8", "Int8Channel", WeightElem::Quant(Elem::Int8), Layout::PerRow),
    format("int4-g128", "Int4", WeightElem::Quant(Elem::U4), Layout::Group(128)),
    format("int4-g32", "Int4G32", WeightElem::Quant(Elem::U4), Layout::Group(32)),
    format("int8-g128", "Int8Group", WeightElem::Quant(Elem::U8), Layout::Group(128)),
];

impl Format {
    /// The oracle of this format's keys.
    pub fn oracle(&self) -> Outcome<&'static DynOracle> {
        let found = ORACLES.iter().find(|o| o.alias == self.alias);
        found.ok_or_else(|| Failure::said(format_args!("the oracle {} is not in this build", self.alias)))
    }

    /// Why the preset has no weights in this format, if so.
    #[cfg_attr(
        not(feature = "cuda"),
        allow(dead_code, reason = "`make` says the same where the first refusal ends all")
    )]
    pub fn problem(&self, preset: &Preset) -> Option<String> {
        self.fitting(preset, &mut Vec::new()).err().map(|e| e.to_string())
    }

    /// This format with groups that divide the preset's rows, and a word about it where they are not the usual ones.
    fn fitting(&self, preset: &Preset, notes: &mut Vec<String>) -> Outcome<Layout> {
        let (h, i) = (preset.hidden, preset.intermediate);
        let divides = |n: usize| h.is_multiple_of(n) && i.is_multiple_of(n);
        let refuse = |n: usize| {
            Failure::said(format_args!("{} has rows of {h} and {i}, which groups of {n} do not divide", preset.name))
        };
        match self.layout {
            Layout::E8m0 if !divides(32) => Err(refuse(32)),
            Layout::Nvfp4 if !divides(16) => Err(refuse(16)),
            Layout::Group(n) if !divides(n) => {
                let fits = [64, 32].into_iter().find(|m| *m < n && divides(*m)).ok_or_else(|| refuse(n))?;
                let (preset, name) = (preset.name, self.name);
                notes.push(format!("{name} on {preset} has groups of {fits}: {n} does not divide {h} and {i}"));
                Ok(Layout::Group(fits))
            }
            layout => Ok(layout),
        }
    }
}

/// Bytes that one expert's use must read: codes and scales as a checkpoint stores them.
pub fn expert_bytes(weights: &MoeWeights) -> usize {
    weights.experts.first().map_or(0, |e| e.bytes())
}

/// Random weights of a preset. All experts share one expert's codes, for a packer copies them anyway and time does not
/// depend on the values; so the canonical form is small whatever the model, and only the packed one needs memory.
pub fn make(preset: &Preset, format: &Format, kind: ExpertsKind, notes: &mut Vec<String>) -> Outcome<MoeWeights> {
    let oracle = format.oracle()?;
    let layout = format.fitting(preset, notes)?;
    let elements = preset.hidden * preset.intermediate * if preset.activation.gated() { 3 } else { 2 };
    check_memory(preset, format, kind, elements)?;
    let (h, i) = (preset.hidden, preset.intermediate);
    let matrix = |rows, cols, seed| matrix(format.elem, layout, rows, cols, seed);
    let bias = |len: usize, seed| {
        let mut rng = Rng::new(seed);
        preset.bias.then(|| (0..len).map(|_| 0.1 * rng.signed()).collect::<Vec<f32>>())
    };
    let gated = preset.activation.gated();
    let expert = ExpertWeights {
        gate: gated.then(|| matrix(i, h, 1)),
        up: matrix(i, h, 2),
        down: matrix(h, i, 3),
        gate_bias: bias(i, 4).filter(|_| gated),
        up_bias: bias(i, 5),
        down_bias: bias(h, 6),
        input_scale: Some(0.02),
        down_input_scale: Some(0.02),
    };
    Ok(MoeWeights {
        scheme: oracle.scheme,
        weight_key: QuantKey::from_bits(oracle.weight),
        activation_key: QuantKey::from_bits(oracle.activation),
        experts: vec![expert; preset.experts],
    })
}

/// Refuses before the machine starts to swap or the kernel kills the process.
fn check_memory(preset: &Preset, format: &Format, kind: ExpertsKind, elements: usize) -> Outcome {
    // The reference holds float32. Packed weights are about as large as the codes; an eighth more covers scales and
    // padding, a quarter of a GiB the workspace and the single canonical expert's copies.
    let bits = if kind == ExpertsKind::Reference { 32 } else { format.elem.bits() };
    let scales = if format.elem.bits() < 16 { elements / 8 } else { 0 };
    let need = preset.experts * (elements * bits / 8 + elements * bits / 64 + scales) + (256 << 20);
    match machine::memory_available() {
        Some(have) if have < need => {
            let gib = |n: usize| n as f64 / (1u64 << 30) as f64;
            Err(Failure::said(format_args!(
                "{} in {} needs {:.1} GiB of memory and {:.1} GiB are available",
                preset.name,
                format.name,
                gib(need),
                gib(have)
            )))
        }
        _ => Ok(()),
    }
}

/// Bytes that one task fills with random ones.
const PIECE: usize = 1 << 16;

fn random_bytes(len: usize, seed: u64, fix: impl Fn(u8) -> u8 + Sync) -> Vec<u8> {
    let mut bytes = vec![0u8; len];
    bytes.par_chunks_mut(PIECE).enumerate().for_each(|(piece, bytes)| {
        let mut rng = Rng::new(seed << 32 | piece as u64);
        for eight in bytes.chunks_mut(8) {
            eight.iter_mut().zip(rng.next().to_le_bytes()).for_each(|(b, r)| *b = fix(r));
        }
    });
    bytes
}

/// The e4m3 code itself, or the largest finite one where it is a NaN.
fn finite_e4m3(code: u8) -> u8 {
    if code & 0x7f == 0x7f { code & 0xfe } else { code }
}

fn codes(elem: WeightElem, len: usize, seed: u64) -> Bytes {
    // 16-bit numbers: any sign and mantissa, one of four exponents around 2^-7.
    let exponents = |low: u16, shift: u32, keep: u16| {
        let mut bytes = random_bytes(len, seed, |b| b);
        bytes.par_chunks_mut(PIECE).for_each(|piece| {
            for two in piece.chunks_exact_mut(2) {
                let code = u16::from_le_bytes([two[0], two[1]]);
                let exponent = low + (code >> shift & 3);
                two.copy_from_slice(&(code & keep | exponent << shift).to_le_bytes());
            }
        });
        bytes
    };
    match elem {
        WeightElem::Bf16 => exponents(118, 7, 0x807f),
        WeightElem::F16 => exponents(6, 10, 0x83ff),
        WeightElem::Quant(Elem::E4m3) => random_bytes(len, seed, finite_e4m3),
        WeightElem::Quant(_) => random_bytes(len, seed, |b| b),
    }
    .into()
}

/// The typical magnitude of a uniformly random code, so that scales can bring weights to about 2^-6.
fn code_size(elem: WeightElem) -> f32 {
    match elem {
        WeightElem::Quant(Elem::E4m3) => 130.0,
        WeightElem::Quant(Elem::E2m1) => 3.0,
        WeightElem::Quant(Elem::U4) => 4.6,
        WeightElem::Quant(_) => 74.0,
        WeightElem::Bf16 | WeightElem::F16 => 1.0,
    }
}

fn matrix(elem: WeightElem, layout: Layout, rows: usize, cols: usize, seed: u64) -> WeightMatrix {
    let mut rng = Rng::new(seed << 40);
    let base = 0.015 / code_size(elem);
    let mut scales = |n: usize| (0..n).map(|_| base * (1.0 + 0.5 * rng.signed())).collect::<Vec<f32>>();
    let scales = match layout {
        Layout::None => Scales::None,
        Layout::PerTensor => Scales::PerTensor(base),
        Layout::PerRow => Scales::PerRow(scales(rows)),
        Layout::Block128 => Scales::Block { block: 128, values: scales(rows.div_ceil(128) * cols.div_ceil(128)) },
        Layout::E8m0 => {
            let low = (127.0 + base.log2()).round() as u8;
            Scales::E8m0(random_bytes(rows * cols / 32, seed << 8, |b| low + (b & 1)).into())
        }
        Layout::Nvfp4 => {
            // Codes from 1 up: 0x38 is 1.0 and the next seven steps reach 1.875.
            let codes = random_bytes(rows * cols / 16, seed << 8, |b| 0x38 + (b & 7)).into();
            Scales::Nvfp4 { codes, global: base }
        }
        Layout::Group(size) => {
            // What a checkpoint stores is bf16; the values must be exact in it.
            let values = scales(rows * cols / size).into_iter().map(|s| half::bf16::from_f32(s).to_f32()).collect();
            Scales::Group { size, ty: HalfType::Bf16, values, zero_points: None, g_idx: None }
        }
    };
    WeightMatrix { rows, cols, elem, codes: codes(elem, rows * cols * elem.bits() / 8, seed), scales }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_makes_valid_weights() {
        let tiny = Preset::by_name("tiny").unwrap();
        for format in &FORMATS {
            let weights = make(tiny, format, ExpertsKind::Simd, &mut Vec::new()).unwrap();
            weights.validate().unwrap_or_else(|e| panic!("{}: {e}", format.name));
            let size = (0..256).map(|c| weights.experts[0].up.value(7, c).powi(2)).sum::<f32>().sqrt() / 16.0;
            assert!((0.002..0.1).contains(&size), "{}: weights of size {size}", format.name);
        }
    }

    #[test]
    fn a_format_that_does_not_divide_the_rows_is_a_problem() {
        let problem = |name, hidden| {
            let preset = Preset { hidden, ..*Preset::by_name("tiny").unwrap() };
            FORMATS.iter().find(|f| f.name == name).unwrap().problem(&preset)
        };
        assert_eq!((problem("mxfp4", 2848), problem("bf16", 24)), (None, None));
        assert!(problem("nvfp4", 24).unwrap().contains("groups of 16"));
    }

    #[test]
    fn groups_shrink_to_what_divides_both_sizes_and_say_so() {
        let int4 = FORMATS.iter().find(|f| f.name == "int4-g128").unwrap();
        for (preset, group) in [("qwen3-30b-a3b", 128), ("gpt-oss-20b", 64), ("nemotron-3-nano", 64)] {
            let mut notes = Vec::new();
            let layout = int4.fitting(Preset::by_name(preset).unwrap(), &mut notes).unwrap();
            assert!(matches!(layout, Layout::Group(n) if n == group), "{preset}");
            assert_eq!(notes.len(), usize::from(group != 128), "{preset}");
        }
    }
}
