//! Hidden states in and out: borrowed rows of any of the three float types.

use crate::cpu::padded;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Input rows, row-major and contiguous.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// bfloat16
    Bf16(&'a [bf16]),
    /// float16
    F16(&'a [f16]),
    /// float32
    F32(&'a [f32]),
}

/// Output rows, row-major and contiguous.
#[derive(Debug)]
pub enum RowsMut<'a> {
    /// bfloat16
    Bf16(&'a mut [bf16]),
    /// float16
    F16(&'a mut [f16]),
    /// float32
    F32(&'a mut [f32]),
}

impl Rows<'_> {
    /// Elements.
    pub fn len(&self) -> usize {
        match self {
            Rows::Bf16(x) => x.len(),
            Rows::F16(x) => x.len(),
            Rows::F32(x) => x.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Row `row` of width `width` as float32 into `out`, which is `padded(width)` long; the padding becomes zero.
    pub(super) fn widen(&self, row: usize, width: usize, out: &mut [f32]) {
        let range = row * width..(row + 1) * width;
        debug_assert_eq!(out.len(), padded(width));
        let (head, tail) = out.split_at_mut(width);
        match self {
            Rows::Bf16(x) => x[range].convert_to_f32_slice(head),
            Rows::F16(x) => x[range].convert_to_f32_slice(head),
            Rows::F32(x) => head.copy_from_slice(&x[range]),
        }
        tail.fill(0.0);
    }
}

impl RowsMut<'_> {
    /// Elements.
    pub fn len(&self) -> usize {
        match self {
            RowsMut::Bf16(x) => x.len(),
            RowsMut::F16(x) => x.len(),
            RowsMut::F32(x) => x.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Stores a float32 row, rounded to nearest even.
    pub(super) fn narrow(&mut self, row: usize, values: &[f32]) {
        let range = row * values.len()..(row + 1) * values.len();
        match self {
            RowsMut::Bf16(x) => x[range].convert_from_f32_slice(values),
            RowsMut::F16(x) => x[range].convert_from_f32_slice(values),
            RowsMut::F32(x) => x[range].copy_from_slice(values),
        }
    }
}
