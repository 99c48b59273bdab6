//! Random weights that both sides hold exactly.

use crate::rng::Rng;
use crate::{Format, Sizes};
use half::f16;

/// Columns that share a scale.
pub const GROUP: usize = 32;

/// A matrix, row-major: a code per element (int8, or u4 in the low bits) and a scale per group.
pub struct Matrix {
    pub rows: usize,
    pub cols: usize,
    pub codes: Vec<u8>,
    pub scales: Vec<f16>,
}

impl Matrix {
    fn new(format: Format, rows: usize, cols: usize, rng: &mut Rng) -> Self {
        let mut codes = vec![0u8; rows * cols];
        for eight in codes.chunks_mut(8) {
            let bytes = rng.next().to_le_bytes();
            eight.iter_mut().zip(bytes).for_each(|(c, b)| *c = if format == Format::Int4 { b & 15 } else { b });
        }
        // Weights of about 2^-6.
        let base = 0.015 / if format == Format::Int4 { 4.6 } else { 74.0 };
        let scales = (0..rows * cols / GROUP).map(|_| f16::from_f32(base * (1.0 + 0.5 * rng.signed()))).collect();
        Self { rows, cols, codes, scales }
    }
}

/// Gate, up and down of every expert.
pub struct Weights {
    pub format: Format,
    pub sizes: Sizes,
    pub experts: Vec<[Matrix; 3]>,
}

impl Weights {
    pub fn new(format: Format, sizes: Sizes) -> Self {
        let mut rng = Rng::new(7);
        let (h, i) = (sizes.hidden, sizes.intermediate);
        let mut matrix = |rows, cols| Matrix::new(format, rows, cols, &mut rng);
        let experts = (0..sizes.experts).map(|_| [matrix(i, h), matrix(i, h), matrix(h, i)]).collect();
        Self { format, sizes, experts }
    }
}
