//! A call of the packed experts: tasks over (segment, panel), first gate, up and activation, then down.
//!
//! That tasks do not race rests on what [`Executor::run`] promises: each index once, all done when it returns.

use super::format::PANEL;
use super::kernel::{CHUNK, Job};
use super::{Projection, SimdExperts};
use crate::cpu::{Executor, Experts, ExpertsCall, Segment, padded};
use crate::platform::CpuIsa;
use std::sync::atomic::{AtomicU32, Ordering};

/// Memory that tasks write at places that differ from task to task.
#[derive(Clone, Copy)]
struct Shared(*mut f32);

// SAFETY: a pointer is only an address; every use of it says why it does not race.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Row `i` of rows of `stride` elements.
    fn row(self, i: usize, stride: usize) -> *mut f32 {
        self.0.wrapping_add(i * stride)
    }
}

/// Scratch: rows per assignment, in this order.
struct Scratch {
    /// Inputs of gate in its packed order (only of experts that have one).
    gate: Shared,
    /// The same of up.
    up: Shared,
    /// The activation's results, in down's packed order.
    mid: Shared,
}

impl SimdExperts {
    fn hidden(&self) -> usize {
        self.down.shape.rows
    }

    fn intermediate(&self) -> usize {
        self.down.shape.cols
    }

    /// Bytes of the `i`th gate (if any) and up panel of an expert, or of its down panel.
    fn panels(&self, expert: usize, i: usize, down: bool) -> (&[u8], &[u8]) {
        let all = &self.packed[expert * self.expert_bytes..][..self.expert_bytes];
        let (g, u) = (self.gate.as_ref().map_or(0, |g| g.shape.panel_bytes()), self.up.shape.panel_bytes());
        if down {
            let d = self.down.shape.panel_bytes();
            return (&[], &all[self.up.shape.panels() * (g + u) + i * d..][..d]);
        }
        all[i * (g + u)..][..g + u].split_at(g)
    }

    /// Panics unless every index of the call lies within its slice and segments do not overlap.
    fn check(&self, call: &ExpertsCall<'_>, scratch: &[f32], output: &[f32]) {
        let n = call.assignments.len();
        assert!(call.input_stride >= self.hidden(), "the input's stride is smaller than a row");
        assert!(scratch.len() >= self.scratch_len(n), "the scratch is too small");
        let (inputs, outputs) = (call.input.len() / call.input_stride, output.len() / self.hidden());
        for a in call.assignments {
            assert!((a.input_row as usize) < inputs, "an assignment reads a row beyond the input");
            assert!((a.output_row as usize) < outputs, "an assignment writes a row beyond the output");
        }
        let mut end = 0;
        for s in call.segments {
            assert!((s.expert as usize) < self.orders.len(), "a segment names an expert that does not exist");
            assert!(s.start as usize == end, "segments do not follow one another");
            end += s.len as usize;
        }
        assert!(end == n, "segments do not cover the assignments");
    }

    /// Brings the inputs of a segment into its expert's column orders.
    fn permute(&self, call: &ExpertsCall<'_>, segment: &Segment, scratch: &Scratch) {
        let stride = padded(self.hidden());
        let orders = &self.orders[segment.expert as usize];
        for (order, to) in [(&orders.gate, scratch.gate), (&orders.up, scratch.up)] {
            let Some(order) = order else { continue };
            for a in segment.start as usize..(segment.start + segment.len) as usize {
                let input = &call.input[call.assignments[a].input_row as usize * call.input_stride..];
                let row = to.row(a, stride);
                for (i, &c) in order.iter().enumerate() {
                    // SAFETY: `check` saw that scratch has rows of `stride >= order.len()` elements per assignment,
                    // and that no other segment, hence no other task, has this assignment.
                    unsafe { row.add(i).write(input[c as usize]) };
                }
            }
        }
    }

    /// Rows `panel * 32 ..` of gate and up and the activation, for the assignments of a segment.
    fn first(&self, call: &ExpertsCall<'_>, segment: &Segment, panel: usize, scratch: &Scratch) {
        let (expert, hidden) = (segment.expert as usize, padded(self.hidden()));
        let orders = &self.orders[expert];
        let (gate_panel, up_panel) = self.panels(expert, panel, false);
        let rows = PANEL.min(self.intermediate() - panel * PANEL);
        let (start, end) = (segment.start as usize, (segment.start + segment.len) as usize);
        let (mut gate, mut up) = ([[0f32; PANEL]; CHUNK], [[0f32; PANEL]; CHUNK]);
        for at in (start..end).step_by(CHUNK) {
            let n = CHUNK.min(end - at);
            let input = |permuted: bool, from: Shared| {
                let mut x = [std::ptr::null::<f32>(); CHUNK];
                for (i, a) in call.assignments[at..at + n].iter().enumerate() {
                    x[i] = match permuted {
                        true => from.row(at + i, hidden),
                        false => call.input[a.input_row as usize * call.input_stride..].as_ptr(),
                    };
                }
                x
            };
            if let Some(g) = &self.gate {
                let x = input(orders.gate.is_some(), scratch.gate);
                // SAFETY: `x` holds rows of the input, whose stride is at least H, or of scratch, whose rows were
                // written for all H columns by `permute` before this phase.
                unsafe { multiply(g, gate_panel, &x[..n], &mut gate[..n]) };
            }
            let x = input(orders.up.is_some(), scratch.up);
            // SAFETY: as for gate.
            unsafe { multiply(&self.up, up_panel, &x[..n], &mut up[..n]) };
            for i in 0..n {
                let mut mid = [0f32; PANEL];
                // SAFETY: `new` checked the instruction set.
                unsafe { (self.activate)(self.activation, &gate[i], &up[i], &mut mid) };
                let row = scratch.mid.row(at + i, padded(self.intermediate()));
                for (j, value) in mid[..rows].iter().enumerate() {
                    let column = panel * PANEL + j;
                    let column = orders.down.as_ref().map_or(column, |order| order[column] as usize);
                    // SAFETY: the column is below I (`order` is a permutation of 0..I), the row one of scratch. No
                    // other task has both this assignment and this panel, and a permutation sends other panels'
                    // elements elsewhere.
                    unsafe { row.add(column).write(*value) };
                }
            }
        }
    }

    /// Rows `panel * 32 ..` of down, for the assignments of a segment.
    fn second(&self, call: &ExpertsCall<'_>, segment: &Segment, panel: usize, scratch: &Scratch, output: Shared) {
        let (_, bytes) = self.panels(segment.expert as usize, panel, true);
        let (hidden, stride) = (self.hidden(), padded(self.intermediate()));
        let rows = PANEL.min(hidden - panel * PANEL);
        let (start, end) = (segment.start as usize, (segment.start + segment.len) as usize);
        let mut out = [[0f32; PANEL]; CHUNK];
        for at in (start..end).step_by(CHUNK) {
            let n = CHUNK.min(end - at);
            let mut x = [std::ptr::null::<f32>(); CHUNK];
            for (i, x) in x[..n].iter_mut().enumerate() {
                *x = scratch.mid.row(at + i, stride);
            }
            // SAFETY: `x` holds rows of scratch, of which the first phase wrote all I columns, and which nobody
            // writes in this phase.
            unsafe { multiply(&self.down, bytes, &x[..n], &mut out[..n]) };
            for (a, out) in call.assignments[at..at + n].iter().zip(&out) {
                write_row(output.row(a.output_row as usize, hidden).wrapping_add(panel * PANEL), &out[..rows]);
            }
        }

        fn write_row(to: *mut f32, values: &[f32]) {
            for (j, value) in values.iter().enumerate() {
                // SAFETY: `check` saw that the output has this row, and row and panel end within H. During this phase
                // the output is only touched by these atomic stores, so that even a call that breaks the contract by
                // naming an output row twice gets one result or the other, not a data race. f32 and AtomicU32 have
                // the same size and alignment.
                unsafe { AtomicU32::from_ptr(to.add(j).cast()) }.store(value.to_bits(), Ordering::Relaxed);
            }
        }
    }
}

/// A panel of a projection times the rows `x`.
///
/// # Safety
///
/// Every pointer of `x` can be read for as many elements as the projection has columns.
unsafe fn multiply(p: &Projection, panel: &[u8], x: &[*const f32], out: &mut [[f32; PANEL]]) {
    debug_assert_eq!((panel.len(), x.len()), (p.shape.panel_bytes(), out.len()));
    // SAFETY: `new` checked the instruction set and chose the kernel by the shape's code; callers pass panels that
    // `panels` cut to the shape's size, and as many results as rows.
    unsafe { (p.kernel)(&mut Job { shape: &p.shape, panel, x, out }) }
}

/// # Panics
///
/// `run` panics if the call's rows lie beyond `input`, `output` or `scratch`, if a segment names an expert that does
/// not exist, or if segments do not cover the assignments one after the other.
impl Experts for SimdExperts {
    fn scratch_len(&self, assignments: usize) -> usize {
        let copies = if self.permuted { 1 + usize::from(self.gate.is_some()) } else { 0 };
        assignments * (copies * padded(self.hidden()) + padded(self.intermediate()))
    }

    fn run(&self, call: ExpertsCall<'_>, scratch: &mut [f32], output: &mut [f32], pool: &dyn Executor) {
        self.check(&call, scratch, output);
        let n = call.assignments.len();
        let copy = if self.permuted { n * padded(self.hidden()) } else { 0 };
        let up = Shared(scratch.as_mut_ptr());
        let mid = Shared(up.0.wrapping_add(copy));
        // Behind the others, since it is the one that may be missing.
        let gate = Shared(mid.0.wrapping_add(n * padded(self.intermediate())));
        let parts = Scratch { gate, up, mid };
        let output = Shared(output.as_mut_ptr());
        if self.permuted {
            pool.run(call.segments.len(), &|i| self.permute(&call, &call.segments[i], &parts));
        }
        let panels = self.up.shape.panels();
        pool.run(call.segments.len() * panels, &|i| {
            self.first(&call, &call.segments[i / panels], i % panels, &parts);
        });
        let panels = self.down.shape.panels();
        pool.run(call.segments.len() * panels, &|i| {
            self.second(&call, &call.segments[i / panels], i % panels, &parts, output);
        });
    }

    fn bytes_per_expert(&self) -> usize {
        self.expert_bytes
    }

    fn experts(&self) -> usize {
        self.orders.len()
    }

    fn hidden(&self) -> usize {
        self.down.shape.rows
    }

    fn intermediate(&self) -> usize {
        self.down.shape.cols
    }

    fn isa(&self) -> CpuIsa {
        self.isa
    }
}
