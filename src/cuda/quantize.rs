//! Activations quantised on the GPU as the keys say, with the values of [`quantize_row`](crate::cpu::quantize_row) to
//! the bit: packed codes and their scales, for kernels that multiply them.
//!
//! A value is its code's times its group's scale. The scale is float32, e8m0, or for nvfp4 e4m3 times the row's second
//! level (that product rounded to float32 first). "Dynamic per tensor" scales are taken per row, as everywhere here.
//! A group that is all zero, or too small for a scale, has zero codes. A NaN makes its group's scale a NaN; with a stored
//! scale, fp8 has a code for it and int8 does not, where it becomes zero.

use super::launch::{Arg, Launch};
use super::memory::DevicePtr;
use super::module::Kernel;
use super::{CudaError, Gpu, Stream};
use crate::config::InputType;
use crate::scheme::*;
use bytemuck::{Pod, Zeroable};

/// A kernel with the keys that it serves.
struct Served {
    /// By the place of the input type in `InputType::ALL`.
    entries: [&'static str; 3],
    keys: &'static [QuantKey],
}

macro_rules! served {
    ($name:literal, $keys:expr) => {
        Served {
            entries: [
                concat!("quantize_", $name, "_bf16"),
                concat!("quantize_", $name, "_f16"),
                concat!("quantize_", $name, "_f32"),
            ],
            keys: &$keys,
        }
    };
}

/// In the order of MOE_ACTIVATION_KEYS in kernels/common/quantize.cuh.
const SERVED: [Served; 12] = [
    served!("fp8_tensor", [FP8_STATIC_TENSOR_SYM]),
    served!("fp8_token", [FP8_DYNAMIC_TOKEN_SYM, FP8_DYNAMIC_TENSOR_SYM]),
    served!("fp8_128", [FP8_DYNAMIC_128_SYM]),
    served!("fp8_64", [FP8_DYNAMIC_64_SYM]),
    served!("int8_tensor", [INT8_STATIC_TENSOR_SYM]),
    served!("int8_token", [INT8_DYNAMIC_TOKEN_SYM, INT8_DYNAMIC_TENSOR_SYM]),
    served!("mxfp8", [MXFP8_DYNAMIC]),
    served!("mxfp4", [MXFP4_DYNAMIC]),
    served!("mxfp6_e3m2", [MXFP6_E3M2_DYNAMIC]),
    served!("mxfp6_e2m3", [MXFP6_E2M3_DYNAMIC]),
    served!("nvfp4", [NVFP4_DYNAMIC]),
    served!("nvfp4_token", [NVFP4_DYNAMIC_TOKEN]),
];

/// The place of an activation key in the kernels' list of them.
pub(super) fn index(key: QuantKey) -> Result<usize, CudaError> {
    let place = SERVED.iter().position(|s| s.keys.contains(&key));
    place.ok_or(CudaError::Argument("this key is not one that activations are quantised to on the GPU"))
}

/// Whether a key needs a stored scale, or for nvfp4 a stored second level.
pub(super) fn stored(key: QuantKey) -> bool {
    !key.scale.dynamic || key.scale2.is_some_and(|s| !s.dynamic)
}

/// Columns that a row of codes is padded to, with zeros.
const COLUMNS: usize = 64;
/// Columns of a thread's part; kernels/common/chunk.cuh has the same.
const CHUNK: usize = 8;
/// The most threads of a block; kernels/quantize.cu has the same.
const MAX_THREADS: usize = 256;

/// What a quantised row of K columns is in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuantLayout {
    /// Bytes of a row's codes, a multiple of 16. A column has 8, 6 or 4 bits, one after the other from the lowest bits
    /// of the first byte on (4 bits: low nibble first); zero codes fill up to a multiple of 64 columns.
    pub code_bytes: usize,
    /// Scales of a row, one for each group of columns, the last group cut where the columns end; 0 where it is stored.
    pub scales: usize,
    /// Bytes of a scale: 4 (float32) or 1 (e8m0, e4m3).
    pub scale_bytes: usize,
    /// Whether each row has a second level of its own (float32).
    pub second: bool,
}

impl QuantLayout {
    /// Of a key and the number of columns.
    pub fn of(key: QuantKey, cols: usize) -> Result<Self, CudaError> {
        index(key)?;
        if cols == 0 || cols > 1 << 24 {
            return Err(CudaError::Argument("quantised rows have between 1 and 2^24 columns"));
        }
        let scales = match (key.scale.dynamic, key.scale.group.cols) {
            (false, _) => 0,
            (true, Extent::Len(n)) => cols.div_ceil(n as usize),
            (true, _) => 1,
        };
        Ok(Self {
            code_bytes: cols.next_multiple_of(COLUMNS) * key.elem_bits() as usize / 8,
            scales,
            scale_bytes: if key.scale.ty == ScaleType::F32 { 4 } else { 1 },
            second: key.scale2.is_some_and(|s| s.dynamic),
        })
    }
}

/// Quantises rows of one length to one key.
#[derive(Clone)]
pub struct Quantizer {
    kernel: Kernel,
    layout: QuantLayout,
    input: InputType,
    cols: usize,
    stored: bool,
}

/// The memory of one call: R rows of K columns.
#[derive(Clone, Copy, Debug)]
pub struct Tensors<'a> {
    /// `[S, K]` of the input type, as bytes; fastest where rows begin at multiples of 16 bytes
    pub input: DevicePtr<'a, u8>,
    /// `[R]`: the input's row for each result; a number that is none of 0..S gives zeros. `None`: result r is of row r
    pub rows: Option<DevicePtr<'a, i32>>,
    /// The scale of static keys and the second level of nvfp4 where it is stored: one for all rows, or `[R]`. Others
    /// do not look at it
    pub stored: Option<DevicePtr<'a, f32>>,
    /// `[R, code_bytes]`, written; aligned to 16 bytes
    pub codes: DevicePtr<'a, u8>,
    /// `[R, scales]` of `scale_bytes` each, written; aligned to `scale_bytes`
    pub scales: DevicePtr<'a, u8>,
    /// `[R]`, written where the layout has second levels
    pub second: DevicePtr<'a, f32>,
}

/// As in kernels/quantize.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Call {
    input: u64,
    rows: u64,
    stored: u64,
    codes: u64,
    scales: u64,
    second: u64,
    sources: i64,
    cols: i32,
    chunks: i32,
    stored_step: i32,
    aligned: i32,
}

const _: () = assert!(size_of::<Call>() == 72);

impl Quantizer {
    /// Loads the kernel for rows of `cols` columns.
    pub fn new(gpu: &Gpu, key: QuantKey, input: InputType, cols: usize) -> Result<Self, CudaError> {
        let layout = QuantLayout::of(key, cols)?;
        let kernel = gpu.kernel("quantize", SERVED[index(key)?].entries[input as usize])?;
        Ok(Self { kernel, layout, input, cols, stored: stored(key) })
    }

    /// What a row becomes.
    pub fn layout(&self) -> QuantLayout {
        self.layout
    }

    /// Quantises `rows` rows on the stream; does not wait. With `overlap`, it may start while the stream's previous
    /// kernel still runs ([`Launch::overlap`]).
    ///
    /// # Safety
    /// The tensors must be allocated on this GPU and stay so until the work is done; nothing unordered may write what is
    /// read here or touch what is written. The outputs must not overlap the inputs or each other.
    pub unsafe fn run(&self, stream: &Stream, t: &Tensors<'_>, rows: usize, overlap: bool) -> Result<(), CudaError> {
        let call = check(self.layout, self.input, self.cols, self.stored, t, rows).map_err(CudaError::Argument)?;
        let threads = (self.cols.div_ceil(CHUNK)).next_multiple_of(32).min(MAX_THREADS);
        let mut args = [Arg::new(&call)];
        // SAFETY: the argument is the parameter of every `quantize_` entry. They read rows of the input below `sources`,
        // row numbers and stored scales below `rows` (or the first), and write codes, scales and second levels of rows
        // below `rows`; `call` has found all of these in the tensors. The rest is the caller's promise.
        unsafe { Launch::new(rows as u32, threads as u32).overlap(overlap).run(stream, &self.kernel, &mut args) }
    }
}

/// What the kernel gets, or why it can't.
fn check(
    layout: QuantLayout,
    input: InputType,
    cols: usize,
    stored: bool,
    t: &Tensors<'_>,
    rows: usize,
) -> Result<Call, &'static str> {
    if i32::try_from(rows).is_err() {
        return Err("quantising: more than 2^31 - 1 rows");
    }
    // At most 2^26 bytes and 2^31 rows: no product overflows.
    let row_bytes = cols * input.bytes();
    let sources = t.input.len() / row_bytes;
    match t.rows {
        Some(r) if r.len() < rows => return Err("quantising: there are fewer row numbers than rows"),
        None if sources < rows => return Err("quantising: the input is shorter than the rows"),
        _ => {}
    }
    let given = t.stored.unwrap_or(DevicePtr::NULL);
    if stored && rows > 0 && given.len() != 1 && given.len() < rows {
        return Err("quantising: this key needs a stored scale, one for all rows or one for each");
    }
    let short = t.codes.len() < rows * layout.code_bytes
        || t.scales.len() < rows * layout.scales * layout.scale_bytes
        || (layout.second && t.second.len() < rows);
    if short {
        return Err("quantising: codes, scales or second levels are too short for the rows");
    }
    let misplaced = !t.input.address().is_multiple_of(input.bytes() as u64)
        || !t.codes.address().is_multiple_of(16)
        || (layout.scales > 0 && !t.scales.address().is_multiple_of(layout.scale_bytes as u64));
    if misplaced {
        return Err("quantising: codes must be aligned to 16 bytes, input and scales to their elements");
    }
    Ok(Call {
        input: t.input.address(),
        rows: t.rows.map_or(0, |r| r.address()),
        stored: given.address(),
        codes: t.codes.address(),
        scales: t.scales.address(),
        second: t.second.address(),
        sources: sources as i64,
        cols: cols as i32,
        chunks: (cols.next_multiple_of(COLUMNS) / CHUNK) as i32,
        stored_step: i32::from(given.len() != 1),
        aligned: i32::from(row_bytes.is_multiple_of(16) && t.input.address().is_multiple_of(16)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::ORACLES;

    #[test]
    fn every_activation_key_of_every_oracle_has_a_kernel() {
        for oracle in ORACLES {
            if let Some(key) = QuantKey::from_bits(oracle.activation) {
                index(key).unwrap_or_else(|e| panic!("{}: {e}", oracle.alias));
            }
        }
        assert!(index(INT4_STATIC).is_err() && index(FP8_STATIC_128_BLOCK_SYM).is_err());
    }

    /// The kernels' list of keys is in a macro, of which there is no number to compare.
    #[test]
    fn the_keys_stand_in_the_order_of_the_kernels() {
        let source = include_str!("../../kernels/common/quantize.cuh");
        let names = source.lines().filter_map(|l| l.trim().strip_prefix("X(")?.split(',').next());
        assert_eq!(
            names.collect::<Vec<_>>(),
            SERVED.map(|s| s.entries[0].trim_start_matches("quantize_").trim_end_matches("_bf16"))
        );
    }

    #[test]
    fn layouts_are_what_they_are_said_to_be() {
        let of = |key, cols| {
            let l = QuantLayout::of(key, cols).unwrap();
            (l.code_bytes, l.scales, l.scale_bytes, l.second)
        };
        assert_eq!(of(FP8_STATIC_TENSOR_SYM, 100), (128, 0, 4, false));
        assert_eq!(of(FP8_DYNAMIC_TENSOR_SYM, 128), (128, 1, 4, false));
        assert_eq!(of(FP8_DYNAMIC_128_SYM, 129), (192, 2, 4, false));
        assert_eq!(of(FP8_DYNAMIC_64_SYM, 129), (192, 3, 4, false));
        assert_eq!(of(MXFP8_DYNAMIC, 1), (64, 1, 1, false));
        assert_eq!(of(MXFP4_DYNAMIC, 65), (64, 3, 1, false));
        assert_eq!(of(MXFP6_E3M2_DYNAMIC, 64), (48, 2, 1, false));
        assert_eq!(of(NVFP4_DYNAMIC, 2880), (1440, 180, 1, false));
        assert_eq!(of(NVFP4_DYNAMIC_TOKEN, 64), (32, 4, 1, true));
        assert!(QuantLayout::of(MXFP8_DYNAMIC, 0).is_err() && QuantLayout::of(MXFP8_DYNAMIC, (1 << 24) + 1).is_err());
    }

    #[test]
    fn tensors_that_are_too_short_or_misplaced_are_refused() {
        const LEN: usize = 3 * 128;
        // SAFETY: nothing is launched with these.
        let bytes = |address, len| unsafe { DevicePtr::<u8>::new(address, len) };
        // SAFETY: as above.
        let floats = |len| unsafe { DevicePtr::<f32>::new(1 << 12, len) };
        // SAFETY: as above.
        let rows = |len| Some(unsafe { DevicePtr::<i32>::new(1 << 12, len) });
        let all = Tensors {
            input: bytes(1 << 10, 3 * 200),
            rows: None,
            stored: None,
            codes: bytes(1 << 11, LEN),
            scales: bytes(1 << 12, 12),
            second: DevicePtr::NULL,
        };
        let ask = |key: QuantKey, t: Tensors<'_>, rows| {
            let layout = QuantLayout::of(key, 100).unwrap();
            check(layout, InputType::Bf16, 100, stored(key), &t, rows)
        };
        let token = FP8_DYNAMIC_TOKEN_SYM;
        let call = ask(token, all, 3).unwrap();
        assert_eq!((call.sources, call.cols, call.chunks, call.aligned), (3, 100, 16, 0));
        for (what, t) in [
            ("input", Tensors { input: bytes(1 << 10, 3 * 200 - 1), ..all }),
            ("odd input", Tensors { input: bytes((1 << 10) + 1, 3 * 200), ..all }),
            ("rows", Tensors { rows: rows(2), ..all }),
            ("codes", Tensors { codes: bytes(1 << 11, LEN - 1), ..all }),
            ("odd codes", Tensors { codes: bytes((1 << 11) + 8, LEN), ..all }),
            ("scales", Tensors { scales: bytes(1 << 12, 11), ..all }),
            ("odd scales", Tensors { scales: bytes((1 << 12) + 2, 12), ..all }),
        ] {
            assert!(ask(token, t, 3).is_err(), "{what}");
        }
        assert!(ask(token, all, 4).is_err() && ask(token, all, usize::MAX).is_err());
        assert_eq!(ask(token, Tensors { rows: rows(3), ..all }, 3).unwrap().sources, 3);
        let two_sources = Tensors { input: bytes(1 << 10, 2 * 200), rows: rows(3), ..all };
        assert_eq!(ask(token, two_sources, 3).unwrap().sources, 2);
        for (len, step) in [(0, None), (1, Some(0)), (2, None), (3, Some(1))] {
            let t = Tensors { stored: Some(floats(len)), ..all };
            assert_eq!(ask(FP8_STATIC_TENSOR_SYM, t, 3).ok().map(|c| c.stored_step), step, "{len} stored scales");
        }
        assert!(ask(NVFP4_DYNAMIC_TOKEN, Tensors { scales: bytes(1 << 12, 21), ..all }, 3).is_err());
        let second = Tensors { scales: bytes(1 << 12, 21), second: floats(3), ..all };
        assert!(ask(NVFP4_DYNAMIC_TOKEN, second, 3).is_ok());
    }

    /// kernels/common/quantize.cuh divides 16-bit numbers by scales made of such with one correction of the quotient: that
    /// has the bits of a division for every pair of mantissas (exponents only move them).
    #[test]
    fn one_correction_divides_by_a_scale_of_16_bit_numbers() {
        for (bits, largest) in [(8, 448.0f32), (11, 448.0), (8, 127.0), (11, 127.0)] {
            let mantissas = || (1 << (bits - 1)..1 << bits).map(|m| m as f32);
            for top in mantissas() {
                let scale = top / largest;
                let power = 2f32.powi(-(scale.log2().floor() as i32));
                let (scale, inverse) = (scale * power, (scale * power).recip());
                assert!((1.0..2.0).contains(&scale));
                for x in mantissas() {
                    let guess = x * inverse;
                    let near = (-guess).mul_add(scale, x).mul_add(inverse, guess);
                    assert_eq!(near, x / scale, "{x} {top} {largest}");
                }
            }
        }
    }

    /// kernels/operands.cu divides by a constant with products, and makes codes of 16-bit numbers by an inverse in two parts,
    /// whose first one is off by up to three units of the last place. Powers of two only move them.
    #[test]
    fn inverses_in_two_parts_make_the_same_codes() {
        use crate::scheme::number::round_e4m3;
        for largest in [448.0f32, 127.0] {
            for bits in (0..f32::INFINITY.to_bits()).step_by(4093) {
                let (top, inverse) = (f32::from_bits(bits), 1.0 / largest);
                let near = top * inverse;
                let value = (-near).mul_add(largest, top).mul_add(inverse, near);
                assert!(value == top / largest || !value.is_normal() && !(top / largest).is_normal(), "{top}");
            }
        }
        for (bits, largest) in [(8, 448.0f32), (11, 448.0), (8, 127.0), (11, 127.0)] {
            let mantissas = || (1 << (bits - 1)..1 << bits).map(|m| m as f32);
            for top in mantissas() {
                let scale = top / largest;
                for off in 1..=3 {
                    let high = f32::from_bits(scale.recip().to_bits() - off);
                    let low = (-high).mul_add(scale, 1.0) * high;
                    assert!(low > 0.0);
                    for x in mantissas() {
                        for power in [1.0, 0.5f32.powi(9), 0.5f32.powi(16)] {
                            let (near, q) = ((x * power).mul_add(high, x * power * low), x * power / scale);
                            let code = if largest == 127.0 { f32::round_ties_even } else { round_e4m3 };
                            assert_eq!(code(near), code(q), "{x} {top} {largest}");
                        }
                    }
                }
            }
        }
    }
}
