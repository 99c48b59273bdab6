//! What a CPU backend implements: the two GEMMs and the activation, over rows grouped by expert.

/// One row of work: a hidden-state row that an expert turns into an output row.
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Assignment {
    /// Row of [`ExpertsCall::input`].
    pub input_row: u32,
    /// Row of the output.
    pub output_row: u32,
}

/// The rows of one expert: `assignments[start .. start + len]`.
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Segment {
    /// Local expert.
    pub expert: u32,
    /// First assignment.
    pub start: u32,
    /// How many; never 0.
    pub len: u32,
}

/// One call of the experts.
#[derive(Clone, Copy)]
pub struct ExpertsCall<'a> {
    /// Float32 rows `[_, input_stride]`; columns beyond H up to the stride are zero.
    pub input: &'a [f32],
    /// At least H, a multiple of [`ROW_ALIGN`].
    pub input_stride: usize,
    /// Grouped by expert.
    pub assignments: &'a [Assignment],
    /// Ascending by expert; together they cover `assignments`.
    pub segments: &'a [Segment],
}

/// Rows of float32 in workspaces are padded to a multiple of this many elements with zeros.
pub const ROW_ALIGN: usize = 32;

/// `n` rounded up to [`ROW_ALIGN`].
pub const fn padded(n: usize) -> usize {
    n.next_multiple_of(ROW_ALIGN)
}

/// The experts of one layer on the CPU: down(activation(gate x, up x)) per assignment, biases included, routing
/// weights not. Every output row has one assignment. The result of a row does not depend on the other rows of the
/// call, nor on the number of threads.
pub trait Experts: Send + Sync {
    /// Float32 elements of scratch that a call with this many assignments needs.
    fn scratch_len(&self, assignments: usize) -> usize;

    /// Writes row `output_row` of `output` (`[_, H]`) for every assignment. `scratch` holds
    /// `scratch_len(call.assignments.len())` elements with arbitrary content. Allocates nothing.
    fn run(&self, call: ExpertsCall<'_>, scratch: &mut [f32], output: &mut [f32], pool: &dyn super::Executor);

    /// Bytes of packed weights per expert: what one expert's use must read.
    fn bytes_per_expert(&self) -> usize;

    /// Number of experts.
    fn experts(&self) -> usize;

    /// H, the columns of input and output rows.
    fn hidden(&self) -> usize;

    /// I, the columns between the GEMMs.
    fn intermediate(&self) -> usize;

    /// The instruction set in use, for reports.
    fn isa(&self) -> crate::platform::CpuIsa;
}
