//! Canonical expert weights: what every checkpoint reader makes and every packer takes.
//!
//! Matrices are row-major `[N, K]` with K contiguous, in the checkpoint's own codes (mapped from the file where its
//! layout already is this one). Gate (`w1`), up (`w3`) and down (`w2`) stay apart, so that each keeps its own scales.

use crate::scheme::{self, QuantKey, Scheme, number};
use bytes::Bytes;

/// The stored element of a [`WeightMatrix`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightElem {
    /// bfloat16, little endian
    Bf16,
    /// float16, little endian
    F16,
    /// one of the quantised elements
    Quant(scheme::Elem),
}

impl WeightElem {
    /// Bits of one element.
    pub fn bits(self) -> usize {
        match self {
            WeightElem::Bf16 | WeightElem::F16 => 16,
            WeightElem::Quant(scheme::Elem::U4 | scheme::Elem::E2m1) => 4,
            WeightElem::Quant(_) => 8,
        }
    }
}

/// A 16-bit scale's own type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HalfType {
    /// bfloat16
    Bf16,
    /// float16
    F16,
}

/// The scales of a [`WeightMatrix`] of `rows` x `cols`.
#[derive(Clone, Debug)]
pub enum Scales {
    /// 16-bit weights.
    None,
    /// One for all.
    PerTensor(f32),
    /// `[rows]`
    PerRow(Vec<f32>),
    /// `[ceil(rows/block), ceil(cols/block)]`, row-major; edge blocks may be cut.
    Block {
        /// Side of the square block.
        block: usize,
        /// The scales.
        values: Vec<f32>,
    },
    /// e8m0 codes `[rows, cols/32]`.
    E8m0(Bytes),
    /// e4m3 codes `[rows, cols/16]`, all multiplied by `global`.
    Nvfp4 {
        /// The codes.
        codes: Bytes,
        /// The multiplier of the whole matrix.
        global: f32,
    },
    /// Groups along K: value = (code - zero point) * scale.
    Group {
        /// Elements per group; `cols` when one group is the whole row. Divides `cols`.
        size: usize,
        /// What the checkpoint stored; `values` are exact in it.
        ty: HalfType,
        /// `[rows, groups]`
        values: Vec<f32>,
        /// `[rows, groups]`; `None` where symmetric (8 for 4 bits, 128 for 8 bits).
        zero_points: Option<Vec<u8>>,
        /// Group of each column where the checkpoint permuted them (GPTQ act-order); `None`: `col / size`.
        g_idx: Option<Vec<u32>>,
    },
}

/// One quantised matrix `[rows, cols]`, the codes of a row contiguous (4-bit codes: low nibble first).
#[derive(Clone, Debug)]
pub struct WeightMatrix {
    /// N, the output channels.
    pub rows: usize,
    /// K.
    pub cols: usize,
    /// What a code is.
    pub elem: WeightElem,
    /// `rows * cols * elem.bits() / 8` bytes.
    pub codes: Bytes,
    /// How codes become values.
    pub scales: Scales,
}

/// Canonical weights that contradict themselves.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{tensor}: {problem}")]
pub struct WeightError {
    /// The tensor, by its name in the checkpoint where it has one.
    pub tensor: String,
    /// What is wrong with it.
    pub problem: String,
}

impl WeightMatrix {
    /// Columns that share a scale, in canonical order.
    pub fn group_cols(&self) -> usize {
        match &self.scales {
            Scales::None | Scales::PerTensor(_) | Scales::PerRow(_) => self.cols,
            Scales::Block { block, .. } => *block,
            Scales::E8m0(_) => 32,
            Scales::Nvfp4 { .. } => 16,
            Scales::Group { size, .. } => *size,
        }
    }

    /// Checks sizes and that every scale is finite; `tensor` names the matrix in the error.
    pub fn validate(&self, tensor: &str) -> Result<(), WeightError> {
        let err = |problem: String| Err(WeightError { tensor: tensor.into(), problem });
        let (rows, cols) = (self.rows, self.cols);
        if rows == 0 || cols == 0 {
            return err(format!("is empty ({rows} x {cols})"));
        }
        let bits = rows.checked_mul(cols).and_then(|n| n.checked_mul(self.elem.bits()));
        if !(cols * self.elem.bits()).is_multiple_of(8) || bits != self.codes.len().checked_mul(8) {
            return err(format!("has {} bytes, which is not {rows} x {cols} of {:?}", self.codes.len(), self.elem));
        }
        if self.elem == WeightElem::Quant(scheme::Elem::E4m3)
            && let Some(i) = self.codes.iter().position(|c| c & 0x7f == 0x7f)
        {
            return err(format!(
                "holds a NaN (e4m3 code {:#04x}) at row {}, column {}",
                self.codes[i],
                i / cols,
                i % cols
            ));
        }
        let groups = |size: usize| {
            if size == 0 || cols % size != 0 {
                Err(WeightError {
                    tensor: tensor.into(),
                    problem: format!("has rows of {cols}, which groups of {size} do not divide"),
                })
            } else {
                Ok(cols / size * rows)
            }
        };
        let (have, want) = match &self.scales {
            Scales::None | Scales::PerTensor(_) => (0, 0),
            Scales::PerRow(v) => (v.len(), rows),
            Scales::Block { block: 0, .. } => return err("has blocks of size 0".into()),
            Scales::Block { block, values } => (values.len(), rows.div_ceil(*block) * cols.div_ceil(*block)),
            Scales::E8m0(codes) => (codes.len(), groups(32)?),
            Scales::Nvfp4 { codes, .. } => (codes.len(), groups(16)?),
            Scales::Group { size, values, .. } => (values.len(), groups(*size)?),
        };
        if have != want {
            return err(format!("has {have} scales where {rows} x {cols} needs {want}"));
        }
        let finite = match &self.scales {
            Scales::None => true,
            Scales::PerTensor(s) => s.is_finite(),
            Scales::PerRow(v) | Scales::Block { values: v, .. } | Scales::Group { values: v, .. } => {
                v.iter().all(|s| s.is_finite())
            }
            Scales::E8m0(codes) => !codes.contains(&255),
            Scales::Nvfp4 { codes, global } => global.is_finite() && codes.iter().all(|c| c & 0x7f != 0x7f),
        };
        if !finite {
            return err("has a scale that is NaN or infinite".into());
        }
        if let Scales::Group { size, values, zero_points, g_idx, .. } = &self.scales {
            if let Some(z) = zero_points
                && z.len() != values.len()
            {
                return err(format!("has {} zero points for {} scales", z.len(), values.len()));
            }
            if let Some(g) = g_idx {
                if g.len() != cols {
                    return err(format!("has a g_idx of {} for {cols} columns", g.len()));
                }
                let mut counts = vec![0usize; cols / size];
                for &g in g {
                    match counts.get_mut(g as usize) {
                        Some(c) => *c += 1,
                        None => return err(format!("has group {g} in g_idx, but only {} groups", cols / size)),
                    }
                }
                if counts.iter().any(|c| c != size) {
                    return err(format!("has a g_idx whose groups do not all hold {size} columns"));
                }
            }
        }
        Ok(())
    }

    /// The value of one element. Plain and slow: the CPU reference and the tests read weights through it.
    pub fn value(&self, row: usize, col: usize) -> f32 {
        let at = row * self.cols + col;
        let group = |size: usize| row * (self.cols / size) + col / size;
        let code16 = || u16::from_le_bytes([self.codes[2 * at], self.codes[2 * at + 1]]);
        let (code, zero) = match self.elem {
            WeightElem::Bf16 => (half::bf16::from_bits(code16()).to_f32(), 0.0),
            WeightElem::F16 => (half::f16::from_bits(code16()).to_f32(), 0.0),
            WeightElem::Quant(e) => match e {
                scheme::Elem::E4m3 => (number::E4M3[self.codes[at] as usize], 0.0),
                scheme::Elem::E5m2 => (number::E5M2[self.codes[at] as usize], 0.0),
                scheme::Elem::E2m1 => (number::E2M1[number::nibble(&self.codes, at) as usize], 0.0),
                scheme::Elem::Int8 => (f32::from(self.codes[at] as i8), 0.0),
                scheme::Elem::U4 => (f32::from(number::nibble(&self.codes, at)), 8.0),
                scheme::Elem::U8 => (f32::from(self.codes[at]), 128.0),
                // Six-bit weights have no reader and no key pair; the value of such a matrix is not a number.
                scheme::Elem::E3m2 | scheme::Elem::E2m3 => (f32::NAN, 0.0),
            },
        };
        match &self.scales {
            Scales::None => code - zero,
            Scales::PerTensor(s) => (code - zero) * s,
            Scales::PerRow(s) => (code - zero) * s[row],
            Scales::Block { block, values } => {
                (code - zero) * values[row / block * self.cols.div_ceil(*block) + col / block]
            }
            Scales::E8m0(codes) => code * number::E8M0[codes[group(32)] as usize],
            Scales::Nvfp4 { codes, global } => code * number::E4M3[codes[group(16)] as usize] * global,
            Scales::Group { size, values, zero_points, g_idx, .. } => {
                let g = g_idx.as_ref().map_or(col / size, |g| g[col] as usize);
                let at = row * (self.cols / size) + g;
                let zero = zero_points.as_ref().map_or(zero, |z| f32::from(z[at]));
                (code - zero) * values[at]
            }
        }
    }

    /// Bytes of codes and scales as a checkpoint stores them: what a kernel must read at least.
    pub fn bytes(&self) -> usize {
        self.codes.len()
            + match &self.scales {
                Scales::None => 0,
                Scales::PerTensor(_) => 4,
                Scales::PerRow(v) | Scales::Block { values: v, .. } => 4 * v.len(),
                Scales::E8m0(c) => c.len(),
                Scales::Nvfp4 { codes, .. } => codes.len() + 4,
                Scales::Group { values, zero_points, .. } => {
                    2 * values.len() + zero_points.as_ref().map_or(0, |z| z.len() * self.elem.bits() / 8)
                }
            }
    }
}

/// One expert. `gate` is absent where the model is not gated.
#[derive(Clone, Debug)]
pub struct ExpertWeights {
    /// w1, `[I, H]`
    pub gate: Option<WeightMatrix>,
    /// w3, `[I, H]`; the single first projection where not gated
    pub up: WeightMatrix,
    /// w2, `[H, I]`
    pub down: WeightMatrix,
    /// `[I]`
    pub gate_bias: Option<Vec<f32>>,
    /// `[I]`
    pub up_bias: Option<Vec<f32>>,
    /// `[H]`
    pub down_bias: Option<Vec<f32>>,
    /// Stored scale of the first GEMM's input: a multiplier (value = code * scale), for nvfp4 the second-level one.
    pub input_scale: Option<f32>,
    /// The same for the second GEMM's input.
    pub down_input_scale: Option<f32>,
}

impl ExpertWeights {
    /// Bytes of codes and scales as a checkpoint stores them: what a kernel must read at least.
    pub fn bytes(&self) -> usize {
        self.gate.as_ref().map_or(0, WeightMatrix::bytes) + self.up.bytes() + self.down.bytes()
    }
}

/// The experts of one layer.
#[derive(Clone, Debug)]
pub struct MoeWeights {
    /// The scheme that the checkpoint uses.
    pub scheme: Scheme,
    /// What the weights are; `None` for 16-bit ones.
    pub weight_key: Option<QuantKey>,
    /// What the checkpoint asks of the activations.
    pub activation_key: Option<QuantKey>,
    /// In order of expert id.
    pub experts: Vec<ExpertWeights>,
}

impl MoeWeights {
    /// Checks that every expert has the same shape and that every matrix is consistent.
    pub fn validate(&self) -> Result<(), WeightError> {
        let Some(first) = self.experts.first() else {
            return Err(WeightError { tensor: "experts".into(), problem: "there are none".into() });
        };
        let (i, h, gated) = (first.up.rows, first.up.cols, first.gate.is_some());
        for (e, x) in self.experts.iter().enumerate() {
            let matrices = [("w1", x.gate.as_ref(), i, h), ("w3", Some(&x.up), i, h), ("w2", Some(&x.down), h, i)];
            for (name, matrix, rows, cols) in matrices {
                let tensor = format!("experts.{e}.{name}");
                let Some(m) = matrix else {
                    if gated {
                        return Err(WeightError { tensor, problem: "is missing, other experts have it".into() });
                    }
                    continue;
                };
                if (m.rows, m.cols) != (rows, cols) || (name == "w1" && !gated) {
                    let problem = format!("is {} x {}, expected {rows} x {cols}", m.rows, m.cols);
                    return Err(WeightError { tensor, problem });
                }
                m.validate(&tensor)?;
            }
            for (name, bias, len) in [("b1", &x.gate_bias, i), ("b3", &x.up_bias, i), ("b2", &x.down_bias, h)] {
                if let Some(b) = bias
                    && (b.len() != len || b.iter().any(|v| !v.is_finite()))
                {
                    let tensor = format!("experts.{e}.{name}");
                    return Err(WeightError { tensor, problem: format!("must hold {len} finite values") });
                }
            }
        }
        Ok(())
    }

    /// H
    pub fn hidden(&self) -> usize {
        self.experts.first().map_or(0, |e| e.up.cols)
    }

    /// I
    pub fn intermediate(&self) -> usize {
        self.experts.first().map_or(0, |e| e.up.rows)
    }

    /// Whether there is a gate projection.
    pub fn gated(&self) -> bool {
        self.experts.first().is_some_and(|e| e.gate.is_some())
    }
}
