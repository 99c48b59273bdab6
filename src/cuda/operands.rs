//! Rows of activations as operands of Hopper's products: 16-bit numbers, or 8-bit codes and their scales
//! (kernels/operands.cu), in planes as kernels/common/order.cuh has them.

use super::launch::{Arg, Launch};
use super::module::Kernel;
use super::permute::ROW_BYTES;
use super::{CudaError, Gpu, Stream};
use crate::config::InputType;
use crate::scheme::*;
use bytemuck::{Pod, Zeroable};

/// A kernel's two entries, by the input type, and the keys that it serves.
type Served = ([&'static str; 2], &'static [QuantKey]);

macro_rules! served {
    ($name:literal, $keys:expr) => {
        ([concat!("operands_", $name, "_bf16"), concat!("operands_", $name, "_f16")], &$keys)
    };
}

const SERVED: [Served; 5] = [
    served!("fp8_tensor", [FP8_STATIC_TENSOR_SYM]),
    served!("fp8_token", [FP8_DYNAMIC_TOKEN_SYM, FP8_DYNAMIC_TENSOR_SYM]),
    served!("fp8_128", [FP8_DYNAMIC_128_SYM]),
    served!("int8_tensor", [INT8_STATIC_TENSOR_SYM]),
    served!("int8_token", [INT8_DYNAMIC_TOKEN_SYM, INT8_DYNAMIC_TENSOR_SYM]),
];
/// The same where each expert has a stored scale of its own.
const BY_EXPERT: [Served; 2] =
    [served!("fp8_expert", [FP8_STATIC_TENSOR_SYM]), served!("int8_expert", [INT8_STATIC_TENSOR_SYM])];

/// Warps of a block.
const WARPS: usize = 8;
/// What a warp takes of a row at once, and how many such steps it has under way.
const STEP_BYTES: usize = 256;
const STEPS: usize = 4;

/// How warps share out rows, as powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    /// A row's warps.
    warp_bits: u32,
    /// A warp's rows.
    row_bits: u32,
}

impl Shape {
    /// For so many rows of so many planes; `together`: a warp may take several. Measured with rows of 256 to 14336 columns.
    fn of(sources: usize, planes: usize, together: bool) -> Self {
        const MANY: usize = 8192;
        const FEW: usize = 2048;
        let steps = (planes * ROW_BYTES).div_ceil(STEP_BYTES);
        if together && steps < STEPS && sources >= MANY {
            return Self { warp_bits: 0, row_bits: STEPS.ilog2() };
        }
        // As many as have all of the row under way; or more, so that every multiprocessor has some.
        let mut warps = steps.div_ceil(STEPS).next_power_of_two();
        while sources * warps < FEW && warps < steps {
            warps *= 2;
        }
        Self { warp_bits: warps.min(WARPS).ilog2(), row_bits: 0 }
    }

    fn rows_of_block(self) -> usize {
        WARPS >> self.warp_bits << self.row_bits
    }
}

/// Where rows go.
#[derive(Clone, Copy)]
pub(super) struct OrderedPlanes {
    /// Planes of 128 bytes of a row; what columns do not fill is zeros.
    pub count: usize,
    /// Rows of a plane.
    pub rows: usize,
    /// `[sources, copies]` rows of the planes that a source's row goes to, i32, -1 for none; or 0: each to its own.
    pub places: u64,
    /// As above, 32 at most; 0 without places.
    pub copies: usize,
    /// `[sources]`, i32: those with a negative number are left out, and not read; 0 for none.
    pub present: u64,
    /// The scale of static keys that all rows share, f32; or 0.
    pub stored: u64,
}

/// As in kernels/operands.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct OperandsParams {
    input: u64,
    places: u64,
    present: u64,
    stored: u64,
    codes: u64,
    scales: u64,
    columns: i32,
    planes: i32,
    rows: i32,
    sources: i32,
    copies: i32,
    warp_bits: i32,
    row_bits: i32,
    unused: i32,
}

const _: () = assert!(size_of::<OperandsParams>() == 80);

/// Quantises rows of one length to 8-bit codes.
pub(super) struct Operands {
    kernel: Kernel,
    columns: usize,
    by_expert: bool,
    /// Scales of a row.
    pub scales: usize,
}

impl Operands {
    /// For rows of `columns` columns, a multiple of 8. With scales `by_expert`, which are stored, those of the rows are read.
    pub fn new(gpu: &Gpu, key: QuantKey, input: InputType, columns: usize, by_expert: bool) -> Result<Self, CudaError> {
        let table = if by_expert { &BY_EXPERT[..] } else { &SERVED[..] };
        let served = table.iter().find(|(_, keys)| keys.contains(&key));
        let place = match input {
            InputType::Bf16 => 0,
            InputType::F16 => 1,
            InputType::F32 => {
                return Err(CudaError::Argument("operands of Hopper's products are made of 16-bit numbers"));
            }
        };
        let (entries, _) = served.ok_or(CudaError::Argument("this key is not one that Hopper's products take"))?;
        let scales = match (key.scale.dynamic, key.scale.group.cols) {
            (false, _) => usize::from(by_expert),
            (true, Extent::Len(n)) => columns.div_ceil(n as usize),
            (true, _) => 1,
        };
        Ok(Self { kernel: gpu.kernel("operands", entries[place])?, columns, by_expert, scales })
    }

    /// Quantises `sources` rows to codes, in planes, and their scales, `[scales][rows]`; does not wait, and may start while
    /// the stream's previous kernel still runs.
    ///
    /// # Safety
    /// The addresses must be device memory of these sizes, aligned to 16 bytes, and as [`Launch::run`] wants them.
    pub unsafe fn run(
        &self,
        stream: &Stream,
        input: u64,
        codes: u64,
        scales: u64,
        to: OrderedPlanes,
        sources: usize,
    ) -> Result<(), CudaError> {
        // Experts' own scales are read for a row as a whole.
        let shape = Shape::of(sources, to.count, to.places == 0 && !self.by_expert);
        let params = OperandsParams {
            input,
            places: to.places,
            present: to.present,
            stored: to.stored,
            codes,
            scales,
            columns: self.columns as i32,
            planes: to.count as i32,
            rows: to.rows as i32,
            sources: sources as i32,
            copies: to.copies as i32,
            warp_bits: shape.warp_bits as i32,
            row_bits: shape.row_bits as i32,
            unused: 0,
        };
        let blocks = sources.div_ceil(shape.rows_of_block());
        let launch = Launch::new(blocks as u32, 32 * WARPS as u32).overlap(true);
        // SAFETY: the only parameter of every entry; the rest is the caller's promise.
        unsafe { launch.run(stream, &self.kernel, &mut [Arg::new(&params)]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_have_the_same_numbers() {
        let source = include_str!("../../kernels/operands.cu");
        assert!(source.contains(&format!("kWarps = {WARPS},")) && STEP_BYTES == 256);
        assert!(source.contains(&format!("kStep = 32 * CHUNK, kSteps = {STEPS};")));
        for (table, entries) in [(&SERVED[..], "MOE_ENTRIES"), (&BY_EXPERT[..], "MOE_BY_ROW")] {
            for ([bf16, f16], _) in table {
                let name = bf16.trim_start_matches("operands_").trim_end_matches("_bf16");
                assert!(source.contains(&format!("{entries}({name}, ")), "{name}");
                assert_eq!(*f16, format!("operands_{name}_f16"));
            }
        }
    }

    #[test]
    fn every_row_has_its_warps() {
        for (sources, planes, together, warps, rows) in [
            (33664, 6, true, 1, 4),
            (33664, 6, false, 1, 1),
            (2944, 6, true, 1, 1),
            (34560, 2, true, 1, 4),
            (4096, 16, false, 2, 1),
            (16, 16, false, 8, 1),
            (16, 56, false, 8, 1),
            (8248, 112, true, 8, 1),
            (1, 1, true, 1, 1),
            (8, 1024, true, 8, 1),
        ] {
            let shape = Shape::of(sources, planes, together);
            assert_eq!((1 << shape.warp_bits, 1 << shape.row_bits), (warps, rows), "{sources} {planes}");
            assert_eq!(shape.rows_of_block(), WARPS / warps * rows);
        }
    }
}
