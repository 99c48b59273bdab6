//! Packed formats: how codes and scales lie in a panel, and how a step of codes becomes values.
//!
//! A panel is 32 rows of a matrix as one stream. It starts with a float32 factor per row (and a bias per row, where
//! the layer has biases). Then, group by group along K: the group's scales, its zero points, and its codes in steps
//! of 128 bytes that hold 2, 4 or 8 columns of the 32 rows. Whatever does not change along K is in the factor.
//!
//! Two panels may be packed together, parts of one and of the other alternating: see [`Shape::slabs`].

use crate::CpuIsa;
use crate::isa::Isa;
use crate::kernel::{NEAR, PREFETCH};
use crate::{Rounding, fixed, int8, pairs, scaled};
use std::ops::Range;

/// Rows of a panel.
pub const PANEL: usize = 32;
/// Bytes of a step, whatever the format.
pub const STEP_BYTES: usize = 128;
/// Columns of a slab of 8 bits and more, which are 8 KB, of 16 bits 16 KB.
const SLAB: usize = 256;
/// Columns whose forms, 4 KB at most, are few.
const FEW: usize = 1024;
/// Columns of a step of 4-bit codes.
pub(crate) const STEP_4BIT: usize = 8;

/// How codes are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// Dwords of two columns.
    Bf16,
    /// By column.
    F16,
    /// By row, 4 columns each.
    E4m3,
    /// By column, two's complement: int8, and u8 around 128.
    Int8,
    /// By column, with zero points.
    U8Zero,
    /// By row, 4 columns each, around 128: int8 and u8, for dot products of bytes.
    Int8Rows,
    /// By row, 4 columns each, with zero points, for int8 activations.
    U8ZeroRows,
    /// 4 bits, laid out as those of `U4`; the factor carries 1/2.
    E2m1,
    /// 4 bits: bytes of columns k and k + 4 (high), 4 bytes a row. The value is the code - 8.
    U4,
    /// The same with zero points.
    U4Zero,
}

impl Code {
    /// Columns of a step.
    pub fn step(self) -> usize {
        match self {
            Code::Bf16 | Code::F16 => 2,
            Code::E4m3 | Code::Int8 | Code::U8Zero | Code::Int8Rows | Code::U8ZeroRows => 4,
            Code::E2m1 | Code::U4 | Code::U4Zero => STEP_4BIT,
        }
    }

    /// Columns of a slab, where groups are no larger.
    pub fn slab(self) -> usize {
        if self.step() == STEP_4BIT { 2 * SLAB } else { SLAB }
    }

    /// Whether there is a kernel that multiplies them as bfloat16, see `pair_dot`.
    fn has_pairs(self) -> bool {
        matches!(self, Code::Bf16 | Code::E4m3 | Code::E2m1 | Code::U4)
    }

    /// Whether groups hold zero points.
    pub fn zero_points(self) -> bool {
        matches!(self, Code::U8Zero | Code::U8ZeroRows | Code::U4Zero)
    }
}

/// What a row of activations is brought into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Nothing: it stays as it is.
    Plain,
    /// Fixed point, see `fixed`; depends on the group's size and on the code.
    Fixed,
    /// The same for int8 weights.
    FixedWide,
    /// A common scale, see `scaled`.
    Scaled,
    /// int8 with a scale per block, see `int8`; depends on the group's size and on the code.
    Int8,
    /// Pairs of bfloat16 where a row consists of such, see `pairs`; depends on the group's size and on the code.
    Pairs,
}

/// The scales of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScale {
    /// One group, whose scale is in the factor.
    None,
    /// float32 per row
    F32,
    /// one float32 for the panel
    Shared,
    /// float16 per row
    F16,
    /// bfloat16 per row
    Bf16,
    /// e8m0 per row
    E8m0,
    /// e4m3 per row; the factor carries 256
    E4m3,
}

impl GroupScale {
    /// Bytes per group; multiples of 32 keep steps aligned to a vector.
    pub fn bytes(self) -> usize {
        match self {
            GroupScale::None => 0,
            GroupScale::F32 => 4 * PANEL,
            GroupScale::Shared => 32,
            GroupScale::F16 | GroupScale::Bf16 => 2 * PANEL,
            GroupScale::E8m0 | GroupScale::E4m3 => PANEL,
        }
    }

    /// The scales of the lanes that start at `row`.
    ///
    /// # Safety
    ///
    /// As for [`Isa`]; `p` is the start of a group that has such scales, `row + LANES <= 32`.
    #[inline(always)]
    #[allow(unsafe_op_in_unsafe_fn)]
    pub(crate) unsafe fn load<I: Isa>(self, p: *const u8, row: usize) -> I::V {
        match self {
            GroupScale::None => I::splat(1.0),
            GroupScale::F32 => I::load(p.cast::<f32>().add(row)),
            GroupScale::Shared => I::splat(p.cast::<f32>().read_unaligned()),
            GroupScale::F16 => I::f16(p.add(2 * row)),
            GroupScale::Bf16 => I::bf16(p.add(2 * row)),
            GroupScale::E8m0 => I::e8m0(p.add(row)),
            GroupScale::E4m3 => I::e4m3(p.add(row)),
        }
    }
}

/// Everything a kernel must know of a packed matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// N
    pub rows: usize,
    /// K
    pub cols: usize,
    /// Columns of a group, the last may hold fewer; at least 1.
    pub group: usize,
    /// Codes.
    pub code: Code,
    /// Scales.
    pub scale: GroupScale,
    /// Whether a bias follows the factor.
    pub bias: bool,
    /// What activations are rounded to.
    pub rounding: Rounding,
    /// Whether rows of bfloat16 are multiplied as such.
    pub pairs: bool,
}

impl Shape {
    /// Bytes before the first group.
    pub fn head(&self) -> usize {
        PANEL * 4 * (1 + usize::from(self.bias))
    }

    /// Columns of a slab: whole groups, or all of so few that their forms stay in the first-level cache beside a panel.
    pub(crate) fn slab(&self) -> usize {
        if self.cols <= FEW {
            return self.cols.max(1);
        }
        (self.code.slab() / self.group).max(1) * self.group
    }

    /// Bytes of so many columns, which begin where a group does.
    fn bytes_of(&self, cols: usize) -> usize {
        let per_group = self.scale.bytes() + if self.code.zero_points() { PANEL } else { 0 };
        let steps = |cols: usize| cols.div_ceil(self.code.step());
        cols.div_ceil(self.group) * per_group
            + (cols / self.group * steps(self.group) + steps(cols % self.group)) * STEP_BYTES
    }

    /// Bytes of a panel, a multiple of 32.
    pub fn panel_bytes(&self) -> usize {
        self.head() + self.bytes_of(self.cols)
    }

    /// The bytes of a panel's slabs, its head being part of the first. Of two panels that are packed together they alternate,
    /// the first one's, then the second one's.
    pub fn slabs(&self) -> impl Iterator<Item = Range<usize>> {
        let slab = self.slab();
        let mut end = 0;
        (0..self.cols).step_by(slab).map(move |k| {
            let start = end;
            end += self.bytes_of(slab.min(self.cols - k)) + if k == 0 { self.head() } else { 0 };
            start..end
        })
    }

    /// The same matrix as it suits an instruction set best: with VNNI, int8 takes exact activations in parts; with BF16,
    /// weights that bfloat16 holds are multiplied as such where activations may be bfloat16, which is in the first
    /// projections (`hidden`): what they and the activation function give is float32.
    pub fn for_isa(self, isa: CpuIsa, hidden: bool) -> Self {
        let code = match self.code {
            Code::Int8 if isa >= CpuIsa::Avx512Vnni => Code::Int8Rows,
            code => code,
        };
        let pairs = isa >= CpuIsa::Avx512Bf16 && hidden && self.rounding == Rounding::None && code.has_pairs();
        Self { code, pairs, ..self }
    }

    /// How kernels take activations.
    pub fn form(&self) -> Form {
        if self.pairs { Form::Pairs } else { self.plain_form() }
    }

    /// The same of rows that are no pairs.
    pub fn plain_form(&self) -> Form {
        match self.code {
            _ if self.rounding != Rounding::None => Form::Int8,
            Code::E2m1 | Code::U4 | Code::U4Zero => Form::Fixed,
            Code::Int8Rows => Form::FixedWide,
            Code::E4m3 => Form::Scaled,
            _ => Form::Plain,
        }
    }

    /// Float32 elements that a row takes in the form that the code's kernels read; 0 where it stays as it is.
    pub fn form_len(&self) -> usize {
        let plain = match self.plain_form() {
            Form::Plain => 0,
            Form::Fixed => fixed::len::<false>(self.cols, self.group),
            Form::FixedWide => fixed::len::<true>(self.cols, self.group),
            Form::Scaled => scaled::HEAD + self.cols,
            Form::Int8 => int8::len(self),
            Form::Pairs => 0,
        };
        match self.form() {
            // Whichever form it will be.
            Form::Pairs => pairs::HEAD + pairs::len(self).max(plain).max(self.cols),
            _ => plain,
        }
    }

    /// Whether kernels of both shapes read the same form of a row.
    pub fn form_like(&self, other: &Self) -> bool {
        match (self.form(), other.form()) {
            (Form::Plain, Form::Plain) | (Form::Scaled, Form::Scaled) => true,
            (a, b) => a == b && (self.group, self.code) == (other.group, other.code),
        }
    }

    /// Number of panels.
    pub fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Bytes of the matrix.
    pub fn bytes(&self) -> usize {
        self.panels() * self.panel_bytes()
    }
}

/// Decoding of codes to float32.
pub(crate) trait Format {
    /// Columns of a step.
    const STEP: usize;
    /// Zero points are subtracted after decoding.
    const ZERO: bool;
    /// Activations come in the scaled form.
    const SCALED: bool = false;
    /// How far ahead a lone token asks for memory.
    const AHEAD: usize = if Self::STEP == 2 { NEAR } else { PREFETCH };

    /// Writes the values of `LANES` rows from `row` on to the first `STEP` vectors of `w`.
    ///
    /// # Safety
    ///
    /// As for [`Isa`]; `p` is a step of 128 bytes, `row + LANES <= 32`.
    unsafe fn decode<I: Isa>(p: *const u8, row: usize, w: &mut [I::V; 4]);
}

macro_rules! format {
    ($(#[$doc:meta])* $name:ident, $cols:literal, $zero:literal $(, scaled = $scaled:literal)?, |$p:ident, $row:ident, $w:ident| $body:block) => {
        $(#[$doc])*
        pub(crate) struct $name;

        impl Format for $name {
            const STEP: usize = $cols;
            const ZERO: bool = $zero;
            $(const SCALED: bool = $scaled;)?

            #[inline(always)]
            #[allow(unsafe_op_in_unsafe_fn)]
            unsafe fn decode<I: Isa>($p: *const u8, $row: usize, $w: &mut [I::V; 4]) $body
        }
    };
}

format!(/// [`Code::Bf16`]
    Bf16, 2, false, |p, row, w| { (w[0], w[1]) = I::bf16x2(p.add(4 * row)); });
format!(/// [`Code::F16`]
F16, 2, false, |p, row, w| {
    w[0] = I::f16(p.add(2 * row));
    w[1] = I::f16(p.add(64 + 2 * row));
});
format!(/// [`Code::E4m3`], times 2^-120
    E4m3, 4, false, scaled = true, |p, row, w| { *w = I::e4m3x4(p.add(4 * row)); });
format!(/// [`Code::Int8`]
Int8, 4, false, |p, row, w| {
    for (k, w) in w.iter_mut().enumerate() {
        *w = I::i8(p.add(32 * k + row));
    }
});
format!(/// [`Code::U8Zero`]
U8Zero, 4, true, |p, row, w| {
    for (k, w) in w.iter_mut().enumerate() {
        *w = I::u8(p.add(32 * k + row));
    }
});

/// Decoding of codes to bytes for dot products with int8 activations: a weight, or a multiple of it, plus an offset.
pub(crate) trait Bytes {
    /// The offset comes from zero points.
    const ZERO: bool;
    /// The offset otherwise.
    const OFFSET: i32;
    /// What an instruction set takes off the bytes, in units of [`Isa::BIAS`].
    const BIASED: bool;
    /// Fours of columns in a step.
    const FOURS: usize;
    /// See [`Nibbles::SMALL_GROUPS`].
    const SMALL_GROUPS: bool;

    /// Columns `4 * four ..` of a step, of `LANES` rows.
    ///
    /// # Safety
    ///
    /// As for [`Isa`]; `p` is the first of these rows in a step, `four < FOURS`.
    unsafe fn decode<I: Isa>(p: *const u8, four: usize) -> I::Bytes;
}

/// [`Code::Int8Rows`]
pub(crate) struct Int8Rows;
/// [`Code::U8ZeroRows`]
pub(crate) struct U8ZeroRows;

macro_rules! whole_bytes {
    ($name:ident, $zero:literal) => {
        impl Bytes for $name {
            const ZERO: bool = $zero;
            const OFFSET: i32 = 128;
            const BIASED: bool = true;
            const FOURS: usize = 1;
            const SMALL_GROUPS: bool = false;

            #[inline(always)]
            unsafe fn decode<I: Isa>(p: *const u8, _: usize) -> I::Bytes {
                // SAFETY: as the caller promises.
                unsafe { I::bytes(p) }
            }
        }
    };
}
whole_bytes!(Int8Rows, false);
whole_bytes!(U8ZeroRows, true);

impl<F: Nibbles> Bytes for F {
    const ZERO: bool = F::ZERO;
    const OFFSET: i32 = F::OFFSET;
    const BIASED: bool = false;
    const FOURS: usize = 2;
    const SMALL_GROUPS: bool = F::SMALL_GROUPS;

    #[inline(always)]
    unsafe fn decode<I: Isa>(p: *const u8, four: usize) -> I::Bytes {
        // SAFETY: as the caller promises.
        unsafe { if four == 0 { F::decode::<I, false>(p) } else { F::decode::<I, true>(p) } }
    }
}

/// Decoding of 4-bit codes to unsigned bytes, at most 24, that are a weight (or a multiple of it) plus an offset.
pub(crate) trait Nibbles {
    /// The offset comes from zero points, at most 31.
    const ZERO: bool;
    /// The offset otherwise.
    const OFFSET: i32;
    /// Its formats have groups of 16 or 32.
    const SMALL_GROUPS: bool;

    /// Those of the low or the high halves of `LANES * 4` bytes.
    ///
    /// # Safety
    ///
    /// As for [`Isa`].
    unsafe fn decode<I: Isa, const HIGH: bool>(p: *const u8) -> I::Bytes;
}

/// [`Code::E2m1`]: twice the value, plus 12.
pub(crate) struct E2m1;
/// [`Code::U4`]
pub(crate) struct U4;
/// [`Code::U4Zero`]
pub(crate) struct U4Zero;

impl Nibbles for E2m1 {
    const ZERO: bool = false;
    const OFFSET: i32 = 12;
    const SMALL_GROUPS: bool = true;

    #[inline(always)]
    unsafe fn decode<I: Isa, const HIGH: bool>(p: *const u8) -> I::Bytes {
        // SAFETY: as the caller promises.
        unsafe { I::e2m1::<HIGH>(p) }
    }
}

impl Nibbles for U4 {
    const ZERO: bool = false;
    const OFFSET: i32 = 8;
    const SMALL_GROUPS: bool = false;

    #[inline(always)]
    unsafe fn decode<I: Isa, const HIGH: bool>(p: *const u8) -> I::Bytes {
        // SAFETY: as the caller promises.
        unsafe { I::nibbles::<HIGH>(p) }
    }
}

impl Nibbles for U4Zero {
    const ZERO: bool = true;
    const OFFSET: i32 = 0;
    const SMALL_GROUPS: bool = false;

    #[inline(always)]
    unsafe fn decode<I: Isa, const HIGH: bool>(p: *const u8) -> I::Bytes {
        // SAFETY: as the caller promises.
        unsafe { I::nibbles::<HIGH>(p) }
    }
}
