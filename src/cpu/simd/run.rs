//! A call of the packed experts: tasks over (segment, panel), first gate, up and activation, then down. Before each of
//! the two, where it is needed, a phase over rows brings inputs into the column order and the form that kernels read.
//!
//! That tasks do not race rests on what [`Executor::run`] promises: each index once, all done when it returns.

use super::panels::{PANELS, unit};
use super::{Projection, SimdExperts};
use crate::cpu::{Executor, Experts, ExpertsCall, Segment, SingleThread, padded};
use crate::platform::CpuIsa;
use moe_oracle_simd::format::{Form, PANEL};
use moe_oracle_simd::kernel::Job;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Memory that tasks write at places that differ from task to task.
#[derive(Clone, Copy)]
pub(super) struct Shared(*mut f32);

// SAFETY: a pointer is only an address; every use of it says why it does not race.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Row `i` of rows of `stride` elements.
    pub(super) fn row(self, i: usize, stride: usize) -> *mut f32 {
        self.0.wrapping_add(i * stride)
    }
}

/// Rows of scratch, one per assignment.
#[derive(Clone, Copy)]
pub(super) struct Scratch {
    rows: Shared,
    /// Elements of a row.
    stride: usize,
}

impl Scratch {
    pub(super) fn row(self, assignment: usize) -> *mut f32 {
        self.rows.0.wrapping_add(assignment * self.stride)
    }

    /// The same rows for assignments from `first` on.
    fn from(self, first: usize) -> Self {
        Self { rows: Shared(self.rows.0.wrapping_sub(first * self.stride)), ..self }
    }
}

/// Everything in scratch, in this order. What is not needed has rows of no elements.
#[derive(Clone, Copy)]
pub(super) struct Parts {
    /// Up's inputs, in its packed order or form.
    pub(super) up: Scratch,
    /// The same of gate, unless it reads up's.
    pub(super) gate: Scratch,
    /// The activation's results, in down's packed order.
    pub(super) mid: Scratch,
    /// Their form, where down reads one.
    formed_mid: Scratch,
}

/// Tasks of each thread that leave them enough to share.
const TASKS_PER_THREAD: usize = 16;

/// Elements of work that are not worth waking other threads for.
const ALONE: usize = 1 << 15;

impl SimdExperts {
    /// Bytes of these gate (if any) and up panels of an expert, which alternate, or of its down panels.
    pub(super) fn panels(&self, expert: usize, panels: Range<usize>, down: bool) -> &[u8] {
        let all = &self.packed[expert * self.expert_bytes..][..self.expert_bytes];
        let first = self.gate.as_ref().map_or(0, |g| g.panel_bytes) + self.up.panel_bytes;
        let (start, each) = match down {
            true => (self.up.shape.panels() * first, self.down.panel_bytes),
            false => (0, first),
        };
        &all[start + panels.start * each..][..panels.len() * each]
    }

    /// Panels of the first projections that belong to the same rows: gate's and up's.
    pub(super) fn side_by_side(&self) -> usize {
        if self.gate.is_some() { 2 } else { 1 }
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

    /// Elements of a row of scratch for a first projection's inputs.
    fn input_len(&self, p: &Projection) -> usize {
        match p.shape.form_len() {
            0 if self.permuted => padded(self.hidden()),
            len => len,
        }
    }

    /// Whether gate reads the inputs that up reads.
    pub(super) fn shared_input(&self) -> bool {
        let alike = |g: &Projection| g.shape.form() != Form::Plain && g.shape.form_like(&self.up.shape);
        !self.permuted && self.gate.as_ref().is_some_and(alike)
    }

    /// Elements per row of each part of scratch.
    fn strides(&self) -> [usize; 4] {
        let gate = match &self.gate {
            Some(g) if !self.shared_input() => self.input_len(g),
            _ => 0,
        };
        [self.input_len(&self.up), gate, padded(self.intermediate()), self.down.shape.form_len()]
    }

    fn parts(&self, assignments: usize, scratch: &mut [f32]) -> Parts {
        let mut rest = scratch.as_mut_ptr();
        let [up, gate, mid, formed_mid] = self.strides().map(|stride| {
            let part = Scratch { rows: Shared(rest), stride };
            rest = rest.wrapping_add(assignments * stride);
            part
        });
        Parts { up, gate, mid, formed_mid }
    }

    /// The number of input rows, where their forms are made once for all experts: if these want them in the same order
    /// and scratch, of which there is a row per assignment, has room.
    fn common_rows(&self, call: &ExpertsCall<'_>) -> Option<usize> {
        let rows = call.input.len() / call.input_stride;
        (!self.permuted && rows <= call.assignments.len()).then_some(rows)
    }

    /// The row of scratch that holds the input of assignment `a`.
    fn input_of(&self, call: &ExpertsCall<'_>, a: usize) -> usize {
        self.common_rows(call).map_or(a, |_| call.assignments[a].input_row as usize)
    }

    /// Fills row `i` of scratch: brings an input into the order of its expert's columns, and into the forms that kernels
    /// read.
    fn prepare(&self, call: &ExpertsCall<'_>, i: usize, parts: &Parts) {
        let (input, expert) = match self.common_rows(call) {
            Some(_) => (i, 0),
            None => {
                let segment = call.segments.partition_point(|s| s.start as usize <= i) - 1;
                (call.assignments[i].input_row as usize, call.segments[segment].expert as usize)
            }
        };
        let orders = &self.orders[expert];
        let input = &call.input[input * call.input_stride..][..self.hidden()];
        let gate = self.gate.as_ref().filter(|_| !self.shared_input());
        let first = [gate.map(|g| (g, &orders.gate, parts.gate)), Some((&self.up, &orders.up, parts.up))];
        for (p, order, to) in first.into_iter().flatten() {
            let formed = p.shape.form() != Form::Plain;
            if !formed && order.is_none() {
                continue;
            }
            // SAFETY: `strides` gave scratch rows of so many elements per assignment, `check` saw that it is so large, `i`
            // is below the number of assignments, and no other task has this row.
            let row = unsafe { std::slice::from_raw_parts_mut(to.row(i), to.stride) };
            match order {
                // SAFETY: `new` checked the instruction set.
                _ if formed => unsafe { (p.form)(input, order.as_deref(), &p.shape, row) },
                Some(order) => row.iter_mut().zip(order).for_each(|(x, c)| *x = input[*c as usize]),
                None => {}
            }
        }
    }

    /// Where a first projection finds the input of assignment `a`: a row of the input, or of scratch, written by `prepare`
    /// before the phase of these projections, for all H columns or with the whole form.
    pub(super) fn input(
        &self,
        call: &ExpertsCall<'_>,
        p: &Projection,
        order: &Option<Vec<u32>>,
        a: usize,
        from: Scratch,
    ) -> *const f32 {
        match p.shape.form() != Form::Plain || order.is_some() {
            true => from.row(self.input_of(call, a)),
            false => call.input[call.assignments[a].input_row as usize * call.input_stride..].as_ptr(),
        }
    }

    /// What down reads.
    pub(super) fn formed_mid(&self, parts: &Parts) -> Scratch {
        if self.down.shape.form() != Form::Plain { parts.formed_mid } else { parts.mid }
    }

    /// Writes the activation's results of a panel to an assignment's row.
    pub(super) fn write_mid(&self, mid: &[f32; PANEL], panel: usize, order: Option<&[u32]>, row: *mut f32) {
        let start = panel * PANEL;
        let mid = &mid[..PANEL.min(self.intermediate() - start)];
        let Some(order) = order else {
            // SAFETY: the panel's rows are columns below I of a row of scratch. No other task has both this assignment and this
            // panel.
            return unsafe { copy(mid, row.add(start)) };
        };
        for (value, column) in mid.iter().zip(&order[start..]) {
            // SAFETY: as above, `order` being a permutation of 0..I, which sends other panels' elements elsewhere.
            unsafe { row.add(*column as usize).write(*value) };
        }
    }

    /// All that an expert does, by one thread: its memory is one stretch, from gate's first panel to down's last, and what lies
    /// in scratch between them is still in the cache.
    fn expert(&self, call: &ExpertsCall<'_>, segment: &Segment, parts: &Parts, output: Shared) {
        self.until_second(call, segment, parts);
        self.second(call, segment, 0..self.down.shape.panels(), parts, output);
    }

    /// The same up to down.
    fn until_second(&self, call: &ExpertsCall<'_>, segment: &Segment, parts: &Parts) {
        self.first(call, segment, 0..self.up.shape.panels(), parts);
        if parts.formed_mid.stride > 0 {
            let start = segment.start as usize;
            (start..start + segment.len as usize).for_each(|a| self.form_mid(a, parts));
        }
    }

    /// The same where one thread does all: what is in scratch between gate and down is each expert's in turn.
    ///
    /// # Safety
    ///
    /// No other thread reads or writes the output.
    unsafe fn expert_alone(&self, call: &ExpertsCall<'_>, segment: &Segment, parts: &Parts, output: Shared) {
        let start = segment.start as usize;
        let parts = Parts { mid: parts.mid.from(start), formed_mid: parts.formed_mid.from(start), ..*parts };
        self.until_second(call, segment, &parts);
        let panels = self.down.shape.panels();
        if segment.len == 1 && self.hidden() == panels * PANEL {
            // SAFETY: the caller's promise.
            return unsafe { self.second_in_place(call, segment, &parts, output) };
        }
        self.second(call, segment, 0..panels, &parts, output);
    }

    /// Brings the activation's results of an assignment into the form that down reads.
    fn form_mid(&self, a: usize, parts: &Parts) {
        // SAFETY: first projections wrote all I elements of this row of scratch before, and nobody writes them now.
        let mid = unsafe { std::slice::from_raw_parts(parts.mid.row(a), self.intermediate()) };
        // SAFETY: as in `prepare`; no other task has this assignment.
        let row = unsafe { std::slice::from_raw_parts_mut(parts.formed_mid.row(a), parts.formed_mid.stride) };
        // SAFETY: `new` checked the instruction set.
        unsafe { (self.down.form)(mid, None, &self.down.shape, row) };
    }
}

/// # Safety
///
/// `to` can be written for as many elements.
unsafe fn copy(from: &[f32], to: *mut f32) {
    match <&[f32; PANEL]>::try_from(from) {
        // By a few instructions instead of a call.
        // SAFETY: as the caller promises.
        Ok(whole) => unsafe { to.cast::<[f32; PANEL]>().write_unaligned(*whole) },
        // SAFETY: as the caller promises.
        Err(_) => unsafe { to.copy_from_nonoverlapping(from.as_ptr(), from.len()) },
    }
}

/// Writes part of a row of the output.
pub(super) fn write_row(to: *mut f32, values: &[f32]) {
    // Two at a time where they may be, which is the same for all that write there.
    let two = if to.cast::<AtomicU64>().is_aligned() { values.as_chunks::<2>().0 } else { &[] };
    for (j, values) in two.iter().enumerate() {
        // SAFETY: `check` saw that the output has this row, and callers end row and panel within H. During this phase the
        // output is only touched by these atomic stores, so that even a call that breaks the contract by naming an output
        // row twice gets one result or the other, not a data race. The address is aligned for AtomicU64, two f32 long.
        unsafe { AtomicU64::from_ptr(to.add(2 * j).cast()) }.store(bytemuck::cast(*values), Ordering::Relaxed);
    }
    for (j, value) in values.iter().enumerate().skip(2 * two.len()) {
        // SAFETY: as above. f32 and AtomicU32 have the same size and alignment.
        unsafe { AtomicU32::from_ptr(to.add(j).cast()) }.store(value.to_bits(), Ordering::Relaxed);
    }
}

/// Panels of a projection times the rows `x`: results panel by panel.
///
/// # Safety
///
/// Every pointer of `x` can be read for as many elements as the projection has columns, or as its form has.
pub(super) unsafe fn multiply(p: &Projection, panel: &[u8], x: &[*const f32], out: &mut [[f32; PANEL]]) {
    debug_assert_eq!(panel.len() * x.len(), p.panel_bytes * out.len());
    // SAFETY: `new` checked the instruction set and chose the kernel by the shape's code; callers pass panels that
    // `panels` cut to the shape's size, and as many results of each as rows.
    unsafe { (p.kernel)(&mut Job::new(&p.shape, panel, x, out)) }
}

/// Whether each expert can be a task: there are enough of them for all threads, and none has more than twice a task's share of the
/// rows.
fn many_alike(call: &ExpertsCall<'_>, threads: usize) -> bool {
    let tasks = TASKS_PER_THREAD * threads;
    let longest = call.segments.iter().map(|s| s.len as usize).max().unwrap_or(0);
    call.segments.len() >= tasks && longest * tasks <= 2 * call.assignments.len()
}

/// Runs `task` for all panels of all segments, `unit` of which stay together, several at a time where enough tasks for all
/// threads are left.
fn tasks(
    call: &ExpertsCall<'_>,
    panels: usize,
    unit: usize,
    pool: &dyn Executor,
    task: &(dyn Fn(&Segment, Range<usize>) + Sync),
) {
    let units = panels.div_ceil(unit);
    let each = (call.segments.len() * units / (TASKS_PER_THREAD * pool.threads().max(1))).clamp(1, PANELS / unit);
    let parts = units.div_ceil(each);
    pool.run(call.segments.len() * parts, &|i| {
        let start = i % parts * each;
        task(&call.segments[i / parts], start * unit..panels.min((start + each) * unit));
    });
}

/// # Panics
///
/// `run` panics if the call's rows lie beyond `input`, `output` or `scratch`, if a segment names an expert that does
/// not exist, or if segments do not cover the assignments one after the other.
impl Experts for SimdExperts {
    fn scratch_len(&self, assignments: usize) -> usize {
        assignments * self.strides().iter().sum::<usize>()
    }

    fn run(&self, call: ExpertsCall<'_>, scratch: &mut [f32], output: &mut [f32], pool: &dyn Executor) {
        self.check(&call, scratch, output);
        let n = call.assignments.len();
        let parts = self.parts(n, scratch);
        let output = Shared(output.as_mut_ptr());
        let rows = |n: usize, elements: usize, task: &(dyn Fn(usize) + Sync)| match n * elements <= ALONE {
            true => SingleThread.run(n, task),
            false => pool.run(n, task),
        };
        if parts.up.stride + parts.gate.stride > 0 {
            let inputs = self.common_rows(&call).unwrap_or(n);
            rows(inputs, self.hidden(), &|i| self.prepare(&call, i, &parts));
        }
        if pool.threads() == 1 {
            return pool.run(1, &|_| {
                for segment in call.segments {
                    // SAFETY: the output is borrowed by this call alone, and this is its only task.
                    unsafe { self.expert_alone(&call, segment, &parts, output) };
                }
            });
        }
        if many_alike(&call, pool.threads()) {
            return pool.run(call.segments.len(), &|i| self.expert(&call, &call.segments[i], &parts, output));
        }
        tasks(&call, self.up.shape.panels(), unit(self.side_by_side()), pool, &|segment, panels| {
            self.first(&call, segment, panels, &parts)
        });
        if parts.formed_mid.stride > 0 {
            rows(n, self.intermediate(), &|a| self.form_mid(a, &parts));
        }
        tasks(&call, self.down.shape.panels(), unit(1), pool, &|segment, panels| {
            self.second(&call, segment, panels, &parts, output);
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
