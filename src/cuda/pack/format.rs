//! Which packed format a layer's weights get; kernels/common/format.cuh has the other half of every definition here.

use super::GpuPackError;
use crate::config::{InputType, MoeConfig};
use crate::scheme::Elem;
use crate::weights::{HalfType, MoeWeights, Scales, WeightElem, WeightMatrix};

/// The 16-bit type that products are made in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compute {
    /// bfloat16
    Bf16,
    /// float16
    F16,
}

impl Compute {
    /// The layer's input type decides.
    pub(super) fn of(config: &MoeConfig) -> Result<Self, GpuPackError> {
        match config.input {
            InputType::Bf16 => Ok(Compute::Bf16),
            InputType::F16 => Ok(Compute::F16),
            InputType::F32 => Err(GpuPackError::Float32),
        }
    }
}

/// How codes are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codes {
    /// In the compute type itself.
    Half,
    /// e4m3
    E4m3,
    /// int8, or u8 less 128
    Int8,
    /// e2m1
    E2m1,
    /// u4
    U4,
}

impl Codes {
    /// 16-byte words per lane and block.
    pub const fn words(self) -> usize {
        match self {
            Codes::Half => 4,
            Codes::E4m3 | Codes::Int8 => 2,
            Codes::E2m1 | Codes::U4 => 1,
        }
    }
}

/// How the scales of a stage (128 columns) are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StageScales {
    /// In the row's factor.
    None,
    /// float32; so many groups per stage.
    F32(usize),
    /// 16 bits; groups per stage, and whether zero points follow.
    Half(usize, bool),
    /// e8m0 for every 32 columns
    E8m0,
    /// e4m3 for every 16 columns
    E4m3,
}

impl StageScales {
    /// Scale groups per stage.
    pub const fn groups(self) -> usize {
        match self {
            StageScales::None => 0,
            StageScales::F32(n) | StageScales::Half(n, _) => n,
            StageScales::E8m0 => 4,
            StageScales::E4m3 => 8,
        }
    }

    /// Whether zero points follow the scales.
    pub const fn zeros(self) -> bool {
        matches!(self, StageScales::Half(_, true))
    }

    /// 32-bit registers of a lane group's word: the scales of rows g and g + 8.
    pub const fn registers(self) -> usize {
        match self {
            StageScales::None => 0,
            StageScales::F32(n) => 2 * n,
            StageScales::Half(n, zero) => n * (1 + zero as usize),
            StageScales::E8m0 => 2,
            StageScales::E4m3 => 4,
        }
    }
}

/// A packed format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Codes.
    pub codes: Codes,
    /// Scales.
    pub scales: StageScales,
    /// The other operand's type.
    pub compute: Compute,
    /// 16-bit scales are bf16, not f16.
    pub scale_bf16: bool,
}

/// Fatbins by (codes, scales), without the compute type; the table has the same names.
const NAMES: [(Codes, StageScales, [&str; 2]); 21] = {
    use Codes::*;
    use StageScales as S;
    [
        (Half, S::None, ["decode_half_bf16", "decode_half_f16"]),
        (E4m3, S::None, ["decode_fp8_bf16", "decode_fp8_f16"]),
        (E4m3, S::F32(1), ["decode_fp8_block128_bf16", "decode_fp8_block128_f16"]),
        (E4m3, S::F32(2), ["decode_fp8_block64_bf16", "decode_fp8_block64_f16"]),
        (E4m3, S::F32(4), ["decode_fp8_block32_bf16", "decode_fp8_block32_f16"]),
        (E4m3, S::E8m0, ["decode_mxfp8_bf16", "decode_mxfp8_f16"]),
        (E2m1, S::E8m0, ["decode_mxfp4_bf16", "decode_mxfp4_f16"]),
        (E2m1, S::E4m3, ["decode_nvfp4_bf16", "decode_nvfp4_f16"]),
        (Int8, S::None, ["decode_int8_bf16", "decode_int8_f16"]),
        (Int8, S::Half(1, false), ["decode_int8_g128_bf16", "decode_int8_g128_f16"]),
        (Int8, S::Half(2, false), ["decode_int8_g64_bf16", "decode_int8_g64_f16"]),
        (Int8, S::Half(4, false), ["decode_int8_g32_bf16", "decode_int8_g32_f16"]),
        (Int8, S::Half(1, true), ["decode_int8_g128_zero_bf16", "decode_int8_g128_zero_f16"]),
        (Int8, S::Half(2, true), ["decode_int8_g64_zero_bf16", "decode_int8_g64_zero_f16"]),
        (Int8, S::Half(4, true), ["decode_int8_g32_zero_bf16", "decode_int8_g32_zero_f16"]),
        (U4, S::Half(1, false), ["decode_int4_g128_bf16", "decode_int4_g128_f16"]),
        (U4, S::Half(2, false), ["decode_int4_g64_bf16", "decode_int4_g64_f16"]),
        (U4, S::Half(4, false), ["decode_int4_g32_bf16", "decode_int4_g32_f16"]),
        (U4, S::Half(1, true), ["decode_int4_g128_zero_bf16", "decode_int4_g128_zero_f16"]),
        (U4, S::Half(2, true), ["decode_int4_g64_zero_bf16", "decode_int4_g64_zero_f16"]),
        (U4, S::Half(4, true), ["decode_int4_g32_zero_bf16", "decode_int4_g32_zero_f16"]),
    ]
};

impl Format {
    /// The one format that holds every matrix of the layer. Weights that no other holds (permuted columns, groups of
    /// an odd size) are stored as 16-bit values, rounded to the compute type.
    pub(super) fn of(weights: &MoeWeights, compute: Compute) -> Self {
        let half = Format { codes: Codes::Half, scales: StageScales::None, compute, scale_bf16: false };
        let mut found: Option<Format> = None;
        for m in weights.experts.iter().flat_map(|e| e.gate.iter().chain([&e.up, &e.down])) {
            let Some(this) = one(m, compute) else { return half };
            found = match found {
                None => Some(this),
                Some(other) => match join(other, this) {
                    Some(joined) => Some(joined),
                    None => return half,
                },
            };
        }
        found.unwrap_or(half)
    }

    /// The fatbin of the decode kernels.
    pub fn decode_fatbin(&self) -> Option<&'static str> {
        let row = NAMES.iter().find(|n| (n.0, n.1) == (self.codes, self.scales))?;
        Some(row.2[self.compute as usize])
    }

    /// The fatbin of the grouped GEMM, which takes the number of groups at run time.
    pub fn mma_fatbin(&self) -> Option<&'static str> {
        let names = match (self.codes, self.scales) {
            (Codes::Half, StageScales::None) => ["mma_half_bf16", "mma_half_f16"],
            (Codes::E4m3, StageScales::None) => ["mma_fp8_bf16", "mma_fp8_f16"],
            (Codes::E4m3, StageScales::F32(_)) => ["mma_fp8_block_bf16", "mma_fp8_block_f16"],
            (Codes::E4m3, StageScales::E8m0) => ["mma_mxfp8_bf16", "mma_mxfp8_f16"],
            (Codes::E2m1, StageScales::E8m0) => ["mma_mxfp4_bf16", "mma_mxfp4_f16"],
            (Codes::E2m1, StageScales::E4m3) => ["mma_nvfp4_bf16", "mma_nvfp4_f16"],
            (Codes::Int8, StageScales::None) => ["mma_int8_bf16", "mma_int8_f16"],
            (Codes::Int8, StageScales::Half(..)) => ["mma_int8_group_bf16", "mma_int8_group_f16"],
            (Codes::U4, StageScales::Half(..)) => ["mma_int4_bf16", "mma_int4_f16"],
            _ => return None,
        };
        Some(names[self.compute as usize])
    }

    /// Bytes of a block's codes.
    pub(in crate::cuda) const fn block_bytes(&self) -> usize {
        self.codes.words() * 512
    }

    /// Bytes of a stage's scales.
    pub(in crate::cuda) const fn scale_bytes(&self) -> usize {
        8 * 4 * self.scales.registers()
    }

    /// What a row's factor carries beside the checkpoint's scale: codes that are moved into a wider exponent as they are
    /// come out too small, and the kernel lifts the other operand by 2^80 (bf16 only).
    pub(in crate::cuda) const fn lift(&self) -> f32 {
        const fn power(n: u32) -> f32 {
            f32::from_bits((n + 127) << 23)
        }
        match (self.codes, self.compute) {
            (Codes::E4m3, Compute::Bf16) => power(120 - 80),
            (Codes::E4m3, Compute::F16) => power(8),
            (Codes::E2m1, Compute::Bf16) => power(126 - 80),
            (Codes::E2m1, Compute::F16) => power(14),
            _ => 1.0,
        }
    }
}

/// The format of one matrix, unless only 16-bit values hold it.
fn one(m: &WeightMatrix, compute: Compute) -> Option<Format> {
    let groups = |size: usize| match size {
        _ if size == m.cols || size.is_multiple_of(128) => Some(1),
        64 => Some(2),
        32 => Some(4),
        _ => None,
    };
    let (scales, scale_bf16) = match &m.scales {
        Scales::None | Scales::PerTensor(_) | Scales::PerRow(_) => (StageScales::None, false),
        Scales::Block { block, values } if near_one_another(values) => (StageScales::F32(groups(*block)?), false),
        Scales::E8m0(_) => (StageScales::E8m0, false),
        Scales::Nvfp4 { .. } => (StageScales::E4m3, false),
        Scales::Group { g_idx: Some(g), .. } if !g.is_sorted() => return None,
        Scales::Group { size, ty, zero_points, values, .. } if near_one_another(values) => {
            (StageScales::Half(groups(*size)?, zero_points.is_some()), *ty == HalfType::Bf16)
        }
        Scales::Block { .. } | Scales::Group { .. } => return None,
    };
    let codes = match m.elem {
        WeightElem::Bf16 | WeightElem::F16 => Codes::Half,
        WeightElem::Quant(Elem::E4m3) => Codes::E4m3,
        WeightElem::Quant(Elem::E2m1) => Codes::E2m1,
        WeightElem::Quant(Elem::Int8 | Elem::U8) => Codes::Int8,
        WeightElem::Quant(Elem::U4) => Codes::U4,
        WeightElem::Quant(_) => return None,
    };
    // Not every pair of codes and scales has kernels.
    let format = Format { codes, scales, compute, scale_bf16 };
    format.decode_fatbin().map(|_| format)
}

/// Whether sums in units of one scale can be moved to another's: all but zeros are ordinary numbers within 2^60 of one
/// another. No checkpoint is known where they are not.
fn near_one_another(scales: &[f32]) -> bool {
    let sizes = || scales.iter().map(|s| s.abs()).filter(|s| *s > 0.0);
    let (least, most) = (sizes().fold(f32::INFINITY, f32::min), sizes().fold(0.0, f32::max));
    least >= f32::MIN_POSITIVE && most <= 1e37 && f64::from(most) <= f64::from(least) * 2f64.powi(60)
}

/// A format that holds both, the finer groups of the two.
fn join(a: Format, b: Format) -> Option<Format> {
    let scales = match (a.scales, b.scales) {
        (StageScales::F32(m), StageScales::F32(n)) => StageScales::F32(m.max(n)),
        (StageScales::Half(m, p), StageScales::Half(n, q)) if p == q => StageScales::Half(m.max(n), p),
        (x, y) if x == y => x,
        _ => return None,
    };
    (a.codes == b.codes && a.scale_bf16 == b.scale_bf16).then_some(Format { scales, ..a })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_build_has_every_fatbin_that_a_format_names() {
        use crate::cuda::{FATBINS, NOT_BUILT};
        if let Some(why) = NOT_BUILT {
            return println!("skipped: {why}");
        }
        let mma = NAMES.iter().flat_map(|n| {
            [Compute::Bf16, Compute::F16].map(|compute| Format { codes: n.0, scales: n.1, compute, scale_bf16: false })
        });
        let mma = mma.map(|f| f.mma_fatbin().expect("every format has a grouped GEMM"));
        for name in NAMES.iter().flat_map(|n| n.2).chain(mma) {
            assert!(FATBINS.iter().any(|f| f.name == name), "{name} is not in the table");
        }
    }
}
