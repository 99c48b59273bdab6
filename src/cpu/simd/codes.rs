//! Codes from a row-major matrix to steps. In every format a step holds 4 bytes of each of the 32 rows.

use crate::scheme::{Elem, number};
use crate::weights::{Scales, WeightElem, WeightMatrix};
use moe_oracle_simd::format::{Code, PANEL, STEP_BYTES};
use std::ops::Range;

/// Steps that are written row by row before the next ones: they stay in the first-level cache, and a row's part of them
/// is a cache line.
const STEPS: usize = 16;

/// Packs columns `columns` (places in `order`, where there is one) of rows `first .. first + rows` into whole steps.
pub(super) fn pack(
    m: &WeightMatrix,
    code: Code,
    first: usize,
    rows: usize,
    columns: Range<usize>,
    order: Option<&[u32]>,
    out: &mut [u8],
) {
    let (out, _) = out.as_chunks_mut::<STEP_BYTES>();
    let job = Job { m, first, rows: rows.min(PANEL), columns, order, step: code.step() };
    match code {
        Code::Bf16 | Code::E4m3 => job.pack(0, out, |four, lane, out| out[4 * lane..][..4].copy_from_slice(&four)),
        Code::F16 => job.pack(0, out, |four, lane, out| {
            out[2 * lane..][..2].copy_from_slice(&four[..2]);
            out[64 + 2 * lane..][..2].copy_from_slice(&four[2..]);
        }),
        Code::Int8 | Code::U8Zero => {
            // U8 without zero points means code - 128: flipping the top bit makes that two's complement.
            let zero_points = matches!(m.scales, Scales::Group { zero_points: Some(_), .. });
            let flip = if m.elem == WeightElem::Quant(Elem::U8) && !zero_points { 0x80 } else { 0 };
            job.pack(flip, out, |four, lane, out| {
                for k in 0..4 {
                    out[32 * k + lane] = four[k] ^ flip;
                }
            });
        }
        Code::Int8Rows | Code::U8ZeroRows => {
            // To unsigned bytes around 128, which flipping the top bit makes of two's complement.
            let flip = if m.elem == WeightElem::Quant(Elem::Int8) { 0x80 } else { 0 };
            job.pack(0, out, |four, lane, out| out[4 * lane..][..4].copy_from_slice(&four.map(|c| c ^ flip)));
        }
        Code::E2m1 | Code::U4 | Code::U4Zero => job.pack(0, out, |four, lane, out| {
            out[4 * lane..][..4].copy_from_slice(&split_halves(u32::from_le_bytes(four)).to_le_bytes());
        }),
    }
}

/// Eight codes in sequence to bytes of codes k (low) and k + 4 (high).
fn split_halves(codes: u32) -> u32 {
    let spread = |x: u32| {
        let x = (x | x << 8) & 0x00ff_00ff;
        (x | x << 4) & 0x0f0f_0f0f
    };
    spread(codes & 0xffff) | spread(codes >> 16) << 4
}

struct Job<'a> {
    m: &'a WeightMatrix,
    first: usize,
    rows: usize,
    columns: Range<usize>,
    order: Option<&'a [u32]>,
    /// Columns of a step.
    step: usize,
}

impl Job<'_> {
    /// `put` writes a row's 4 bytes to the row's place in a step. Columns that there are not are bytes of `pad`.
    #[inline(always)]
    fn pack(&self, pad: u8, out: &mut [[u8; STEP_BYTES]], put: impl Fn([u8; 4], usize, &mut [u8; STEP_BYTES])) {
        let bits = self.m.elem.bits();
        // Rows of 4-bit codes may start within a byte.
        let aligned = (self.m.cols * bits).is_multiple_of(8) && (self.columns.start * bits).is_multiple_of(8);
        let whole = if self.order.is_none() && aligned { self.columns.len() / self.step } else { 0 };
        let (whole, rest) = out.split_at_mut(whole);
        for (chunk, steps) in whole.chunks_mut(STEPS).enumerate() {
            for lane in 0..self.rows {
                let at = (self.first + lane) * self.m.cols + self.columns.start + chunk * STEPS * self.step;
                let (codes, _) = self.m.codes[at * bits / 8..][..4 * steps.len()].as_chunks::<4>();
                for (four, step) in codes.iter().zip(&mut *steps) {
                    put(*four, lane, step);
                }
            }
        }
        let done = self.columns.start + whole.len() * self.step;
        for (columns, step) in (done..self.columns.end).step_by(self.step).zip(rest) {
            for lane in 0..self.rows {
                put(self.gather(pad, lane, columns), lane, step);
            }
        }
    }

    /// The codes of up to a step's columns from `start` on, one by one.
    fn gather(&self, pad: u8, lane: usize, start: usize) -> [u8; 4] {
        let mut four = [pad; 4];
        for (k, i) in (start..self.columns.end.min(start + self.step)).enumerate() {
            let column = self.order.map_or(i, |o| o[i] as usize);
            let at = (self.first + lane) * self.m.cols + column;
            match self.m.elem.bits() {
                16 => four[2 * k..][..2].copy_from_slice(&self.m.codes[2 * at..][..2]),
                8 => four[k] = self.m.codes[at],
                _ => four[k / 2] |= number::nibble(&self.m.codes, at) << (4 * (k % 2)),
            }
        }
        four
    }
}
