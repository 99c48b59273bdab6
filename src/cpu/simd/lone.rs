//! An expert's lone token: several panels in one call of the kernel. Between two calls the processor runs out of loads that
//! are under way, and a panel of one token takes but a microsecond or two.

use super::SimdExperts;
use super::run::{Parts, Shared, multiply, write_row};
use crate::cpu::{Experts, ExpertsCall, Segment};
use moe_oracle_simd::format::PANEL;
use std::ops::Range;

/// Panels of a matrix that a task takes at most.
pub(super) const PANELS: usize = 8;

impl SimdExperts {
    /// Rows of gate and up and the activation, of these panels.
    pub(super) fn first_alone(&self, call: &ExpertsCall<'_>, segment: &Segment, panels: Range<usize>, parts: &Parts) {
        let (expert, at, n) = (segment.expert as usize, segment.start as usize, panels.len());
        let order = self.orders[expert].down.as_deref();
        let x = self.input(call, &self.up, &self.orders[expert].up, at, parts.up);
        let bytes = self.panels(expert, panels.clone(), false);
        let mut sums = [[0f32; PANEL]; 2 * PANELS];
        // Gate and up panels alternate.
        let each = if self.gate.is_some() { 2 } else { 1 };
        let sums = &mut sums[..each * n];
        match &self.gate {
            Some(gate) if !self.together => {
                let from = if self.shared_input() { parts.up } else { parts.gate };
                let gate_x = self.input(call, gate, &self.orders[expert].gate, at, from);
                let pairs = bytes.chunks_exact(gate.panel_bytes + self.up.panel_bytes).zip(sums.chunks_exact_mut(2));
                for (bytes, sums) in pairs {
                    let (gate_panel, up_panel) = bytes.split_at(gate.panel_bytes);
                    // SAFETY: both are rows as `input` promises.
                    unsafe { multiply(gate, gate_panel, &[gate_x], &mut sums[..1]) };
                    // SAFETY: as above.
                    unsafe { multiply(&self.up, up_panel, &[x], &mut sums[1..]) };
                }
            }
            // SAFETY: as above; gate, where there is one, has up's shape and reads what up reads.
            _ => unsafe { multiply(&self.up, bytes, &[x], sums) },
        }
        for (panel, sums) in panels.zip(sums.chunks_exact(each)) {
            let gate = if each == 2 { &sums[0] } else { &[0f32; PANEL] };
            let mut mid = [0f32; PANEL];
            // SAFETY: `new` checked the instruction set.
            unsafe { (self.activate)(self.activation, gate, &sums[each - 1], &mut mid) };
            self.write_mid(&mid, panel, order, parts.mid.row(at));
        }
    }

    /// Rows of down, of these panels.
    pub(super) fn second_alone(
        &self,
        call: &ExpertsCall<'_>,
        segment: &Segment,
        panels: Range<usize>,
        parts: &Parts,
        output: Shared,
    ) {
        let at = segment.start as usize;
        let bytes = self.panels(segment.expert as usize, panels.clone(), true);
        let mut out = [[0f32; PANEL]; PANELS];
        let out = &mut out[..panels.len()];
        // SAFETY: a row of scratch, of which the phases before wrote all I columns or the whole form, and which nobody
        // writes in this phase.
        unsafe { multiply(&self.down, bytes, &[self.formed_mid(parts).row(at)], out) };
        let to = output.row(call.assignments[at].output_row as usize, self.hidden());
        let row = out.as_flattened();
        let start = panels.start * PANEL;
        write_row(to.wrapping_add(start), &row[..row.len().min(self.hidden() - start)]);
    }
}
