//! Panels of an expert times its tokens, several panels in one call of the kernel where the tokens are few: between two calls
//! the processor runs out of loads that are under way, and a panel of one token takes but a microsecond or two.

use super::run::{Parts, Scratch, Shared, multiply, write_row};
use super::{Projection, SimdExperts};
use crate::cpu::{Experts, ExpertsCall, Segment};
use moe_oracle_simd::format::PANEL;
use moe_oracle_simd::kernel::CHUNK;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Panels of a matrix that one of several threads takes at most.
pub(super) const PANELS: usize = 8;

/// Panels of a matrix, `each` of which lie side by side, that begin and end where packed panels do: these are two and two.
pub(super) fn unit(each: usize) -> usize {
    2 / each
}

/// Rows of results that a call of a kernel has room for: gate's and up's of so many tokens, of one panel at least. 24 KB, so that
/// calls of few tokens are few and long.
const ROWS: usize = 192;

/// A call's room for results, on the stack.
type Room = [MaybeUninit<[f32; PANEL]>; ROWS];

/// What the calls of a task need of it at most, zeroed; all of it would take several times as long for a lone token.
fn zeros<'a>(room: &'a mut Room, segment: &Segment, panels: &Range<usize>, each: usize) -> &'a mut [[f32; PANEL]] {
    let most = ROWS.min(each * panels.len() * CHUNK.min(segment.len as usize));
    let room = &mut room[..most];
    room.iter_mut().for_each(|row| *row = MaybeUninit::new([0.0; PANEL]));
    // SAFETY: all of these rows were written just now.
    unsafe { std::slice::from_raw_parts_mut(room.as_mut_ptr().cast(), most) }
}

/// Parts of some panels times the tokens of a segment, whose results, `each` rows for a token and a panel, have room.
fn parts(segment: &Segment, panels: Range<usize>, each: usize) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    let (start, len) = (segment.start as usize, segment.len as usize);
    // A panel that several calls need stays in the cache meanwhile.
    let unit = unit(each);
    let at_once = if len > CHUNK { unit } else { ROWS / (each * len) / unit * unit };
    let end = panels.end;
    panels.step_by(at_once).flat_map(move |panel| {
        let panels = panel..end.min(panel + at_once);
        (start..start + len).step_by(CHUNK).map(move |at| (at..(start + len).min(at + CHUNK), panels.clone()))
    })
}

/// Pointers to the rows of up to [`CHUNK`] tokens.
fn rows(tokens: Range<usize>, row: impl Fn(usize) -> *const f32) -> [*const f32; CHUNK] {
    let mut x = [std::ptr::null(); CHUNK];
    x.iter_mut().zip(tokens).for_each(|(x, token)| *x = row(token));
    x
}

impl SimdExperts {
    /// Rows of gate and up and the activation, of these panels.
    pub(super) fn first(&self, call: &ExpertsCall<'_>, segment: &Segment, panels: Range<usize>, to: &Parts) {
        let expert = segment.expert as usize;
        let orders = &self.orders[expert];
        let each = self.side_by_side();
        let mut room = [MaybeUninit::uninit(); ROWS];
        let room = zeros(&mut room, segment, &panels, each);
        for (tokens, panels) in parts(segment, panels, each) {
            let n = tokens.len();
            let input = |p: &Projection, order: &Option<Vec<u32>>, from: Scratch| {
                rows(tokens.clone(), |a| self.input(call, p, order, a, from))
            };
            let x = input(&self.up, &orders.up, to.up);
            let bytes = self.panels(expert, panels.clone(), false);
            let sums = &mut room[..each * panels.len() * n];
            match &self.gate {
                Some(gate) if !self.together => {
                    let gate_x = input(gate, &orders.gate, if self.shared_input() { to.up } else { to.gate });
                    let pairs = bytes.chunks_exact(gate.panel_bytes + self.up.panel_bytes);
                    for (bytes, sums) in pairs.zip(sums.chunks_exact_mut(2 * n)) {
                        let (gate_panel, up_panel) = bytes.split_at(gate.panel_bytes);
                        let (gate_sums, up_sums) = sums.split_at_mut(n);
                        // SAFETY: both are rows as `input` promises.
                        unsafe { multiply(gate, gate_panel, &gate_x[..n], gate_sums) };
                        // SAFETY: as above.
                        unsafe { multiply(&self.up, up_panel, &x[..n], up_sums) };
                    }
                }
                // SAFETY: as above; gate, where there is one, has up's shape and reads what up reads.
                _ => unsafe { multiply(&self.up, bytes, &x[..n], sums) },
            }
            // SAFETY: `new` checked the instruction set, and that there is a gate where the activation takes one.
            unsafe { (self.activate)(self.activation, n, sums) };
            for (panel, sums) in panels.zip(sums.chunks_exact(each * n)) {
                for (a, mid) in tokens.clone().zip(&sums[(each - 1) * n..]) {
                    self.write_mid(mid, panel, orders.down.as_deref(), to.mid.row(a));
                }
            }
        }
    }

    /// All of down for a lone token, where rows of the output are whole panels: the kernel writes them in place. These lines are
    /// mostly in no cache, and a kernel that reads for microseconds between two of them does not wait for that.
    ///
    /// # Safety
    ///
    /// No other thread reads or writes the output.
    pub(super) unsafe fn second_in_place(
        &self,
        call: &ExpertsCall<'_>,
        segment: &Segment,
        from: &Parts,
        output: Shared,
    ) {
        let (start, panels) = (segment.start as usize, self.down.shape.panels());
        debug_assert_eq!((segment.len, panels * PANEL), (1, self.hidden()));
        let row = output.row(call.assignments[start].output_row as usize, self.hidden());
        // SAFETY: `check` saw that the output has this row, which is as many panels, and the caller promises that nobody else uses
        // it meanwhile.
        let out = unsafe { std::slice::from_raw_parts_mut(row.cast::<[f32; PANEL]>(), panels) };
        let bytes = self.panels(segment.expert as usize, 0..panels, true);
        // SAFETY: the row was written as a whole, or its form, before, and nobody writes it now.
        unsafe { multiply(&self.down, bytes, &[self.formed_mid(from).row(start)], out) };
    }

    /// Rows of down, of these panels.
    pub(super) fn second(
        &self,
        call: &ExpertsCall<'_>,
        segment: &Segment,
        panels: Range<usize>,
        from: &Parts,
        output: Shared,
    ) {
        let (hidden, mid) = (self.hidden(), self.formed_mid(from));
        let mut room = [MaybeUninit::uninit(); ROWS];
        let room = zeros(&mut room, segment, &panels, 1);
        for (tokens, panels) in parts(segment, panels, 1) {
            let n = tokens.len();
            let x = rows(tokens.clone(), |a| mid.row(a).cast_const());
            let bytes = self.panels(segment.expert as usize, panels.clone(), true);
            let out = &mut room[..panels.len() * n];
            // SAFETY: `x` holds rows of scratch, of which the phases before wrote all I columns or the whole form, and which
            // nobody writes in this phase.
            unsafe { multiply(&self.down, bytes, &x[..n], out) };
            for (panel, out) in panels.zip(out.chunks_exact(n)) {
                let start = panel * PANEL;
                for (a, out) in call.assignments[tokens.clone()].iter().zip(out) {
                    let to = output.row(a.output_row as usize, hidden).wrapping_add(start);
                    write_row(to, &out[..PANEL.min(hidden - start)]);
                }
            }
        }
    }
}
