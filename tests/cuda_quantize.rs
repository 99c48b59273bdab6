//! Quantised activations on the GPU: what their codes and scales mean are the CPU's quantised values, to the bit.
#![cfg(feature = "cuda")]

mod common;

use common::*;
use microfloat::{f4e2m1fn, f6e2m3fn, f6e3m2fn, f8e4m3fn, f8e8m0fnu};
use moe_oracle::config::InputType;
use moe_oracle::cpu::quantize_row;
use moe_oracle::cuda::quantize::{QuantLayout, Quantizer, Tensors};
use moe_oracle::cuda::{CudaError, DeviceBuffer, DevicePtr, Graph, Stream};
use moe_oracle::oracle::ORACLES;
use moe_oracle::scheme::{Elem, Extent, FP8_DYNAMIC_64_SYM, QuantKey, ScaleType};

/// Every activation key of every oracle once, and the one that has a kernel before it has an oracle.
fn keys() -> Vec<QuantKey> {
    let mut keys = vec![FP8_DYNAMIC_64_SYM];
    for key in ORACLES.iter().filter_map(|o| QuantKey::from_bits(o.activation)) {
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    keys
}

/// Bytes after each output that nobody may write.
const GUARD: usize = 256;

fn poisoned(stream: &Stream, len: usize) -> DeviceBuffer {
    DeviceBuffer::of(stream, &vec![0xa5_u8; len + GUARD]).unwrap()
}

/// What is in a buffer before its guard.
fn read(stream: &Stream, buffer: &DeviceBuffer) -> Vec<u8> {
    let mut all = vec![0_u8; buffer.len()];
    buffer.download(stream, 0, &mut all).unwrap();
    let guard = all.split_off(all.len() - GUARD);
    assert!(guard.iter().all(|b| *b == 0xa5), "wrote beyond the end");
    all
}

/// The memory of one call and what was asked.
struct Call {
    key: QuantKey,
    layout: QuantLayout,
    cols: usize,
    rows: usize,
    quantizer: Quantizer,
    input: DeviceBuffer,
    gather: Option<DeviceBuffer>,
    stored: DeviceBuffer,
    given: Vec<f32>,
    codes: DeviceBuffer,
    scales: DeviceBuffer,
    second: DeviceBuffer,
}

fn bytes(ty: InputType, x: &[f32]) -> Vec<u8> {
    match ty {
        InputType::Bf16 => x.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        InputType::F16 => x.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
        InputType::F32 => x.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

impl Call {
    fn new(
        stream: &Stream,
        (key, ty): (QuantKey, InputType),
        x: &[f32],
        cols: usize,
        gather: Option<&[i32]>,
        given: &[f32],
    ) -> Self {
        let quantizer = Quantizer::new(stream.gpu(), key, ty, cols).unwrap_or_else(|e| panic!("{key}: {e}"));
        let layout = quantizer.layout();
        assert_eq!(layout, QuantLayout::of(key, cols).unwrap());
        let rows = gather.map_or(x.len() / cols, <[i32]>::len);
        Self {
            key,
            layout,
            cols,
            rows,
            quantizer,
            input: DeviceBuffer::of(stream, &bytes(ty, x)).unwrap(),
            gather: gather.map(|g| DeviceBuffer::of(stream, g).unwrap()),
            stored: DeviceBuffer::of(stream, given).unwrap(),
            given: given.to_vec(),
            codes: poisoned(stream, rows * layout.code_bytes),
            scales: poisoned(stream, rows * layout.scales * layout.scale_bytes),
            second: poisoned(stream, if layout.second { 4 * rows } else { 0 }),
        }
    }

    fn tensors(&self) -> Tensors<'_> {
        let outputs = |b: &DeviceBuffer| b.len() - GUARD;
        Tensors {
            input: self.input.ptr(),
            rows: self.gather.as_ref().map(DeviceBuffer::ptr),
            stored: Some(self.stored.ptr()),
            codes: self.codes.ptr().slice(0, outputs(&self.codes)).unwrap(),
            scales: self.scales.ptr().slice(0, outputs(&self.scales)).unwrap(),
            second: self.second.ptr().slice(0, outputs(&self.second) / 4).unwrap(),
        }
    }

    fn run(&self, stream: &Stream, overlap: bool) -> Result<(), CudaError> {
        // SAFETY: the buffers are this call's own and live until `values` has waited; the stream orders everything.
        unsafe { self.quantizer.run(stream, &self.tensors(), self.rows, overlap) }
    }

    /// What codes and scales mean, `[R, K]`.
    fn values(&self, stream: &Stream) -> Vec<f32> {
        let (codes, scales, second) =
            (read(stream, &self.codes), read(stream, &self.scales), read(stream, &self.second));
        let float = |b: &[u8], i: usize| f32::from_le_bytes(b[4 * i..4 * i + 4].try_into().unwrap());
        let bits = self.key.elem_bits() as usize;
        let group = match (self.layout.scales, self.key.scale.group.cols) {
            (n, Extent::Len(group)) if n > 0 => group as usize,
            _ => self.cols,
        };
        let mut values = Vec::new();
        for row in 0..self.rows {
            let code = |col: usize| {
                let all = &codes[row * self.layout.code_bytes..][..self.layout.code_bytes];
                (0..bits).map(|i| (all[(col * bits + i) / 8] >> ((col * bits + i) % 8) & 1) << i).sum::<u8>()
            };
            for col in 0..self.cols {
                let code = code(col);
                let value = match self.key.elem {
                    Elem::E4m3 => f8e4m3fn::from_bits(code).to_f32(),
                    Elem::E2m1 => f4e2m1fn::from_bits(code).to_f32(),
                    Elem::E3m2 => f6e3m2fn::from_bits(code).to_f32(),
                    Elem::E2m3 => f6e2m3fn::from_bits(code).to_f32(),
                    _ => f32::from(code as i8),
                };
                let at = row * self.layout.scales + col / group;
                let given = self.given.get(if self.given.len() > 1 { row } else { 0 }).copied().unwrap_or(f32::NAN);
                let scale = match self.key.scale.ty {
                    _ if self.layout.scales == 0 => given,
                    ScaleType::E8m0 => f8e8m0fnu::from_bits(scales[at]).to_f32(),
                    ScaleType::E4m3 => {
                        let second = if self.layout.second { float(&second, row) } else { given };
                        f8e4m3fn::from_bits(scales[at]).to_f32() * second
                    }
                    _ => float(&scales, at),
                };
                values.push(value * scale);
            }
            let padding = self.layout.code_bytes * 8 / bits;
            assert!((self.cols..padding).all(|col| code(col) == 0), "{}: padding is zero", self.key);
        }
        values
    }
}

/// The kinds of [`rows`].
const KINDS: usize = 7;

/// Rows of every kind: usual, small down to subnormals, large up to the type's end, all of these mixed, all zero, and with
/// quotients that lie in the middle between two codes.
fn rows(rng: &mut Rng, key: QuantKey, ty: InputType, cols: usize) -> Vec<f32> {
    let largest = match key.elem {
        Elem::E4m3 => 448.0,
        Elem::E2m1 => 6.0,
        Elem::E3m2 => 28.0,
        Elem::E2m3 => 7.5,
        _ => 127.0,
    };
    let (low, high) = match ty {
        InputType::F16 => (-26.0, 15.5),
        _ => (-140.0, 127.5),
    };
    let mut x = Vec::new();
    for kind in 0..KINDS {
        for col in 0..cols {
            let wild = |rng: &mut Rng| rng.normal() / 3.5 * rng.range(low, high).exp2();
            x.push(match kind {
                0 => rng.normal(),
                // As padding and relu2 make them.
                1 => rng.normal().max(0.0) * f32::from(col % 96 < 32),
                2 => rng.normal() * f32::exp2(low),
                3 => rng.range(-1.0, 1.0) * f32::exp2(high),
                4 => wild(rng),
                5 => 0.0,
                // Under a dynamic scale that is 1 or a power of two.
                _ if col % 16 == 0 => largest,
                _ => (rng.range(-1.0, 1.0) * 16.0 * largest).round() / 16.0,
            });
        }
    }
    round_to(ty, &mut x);
    assert!(x.iter().all(|v| v.is_finite()));
    x
}

/// What the CPU makes of the rows.
fn want(key: QuantKey, x: &[f32], cols: usize, given: impl Fn(usize) -> f32) -> Vec<f32> {
    let mut x = x.to_vec();
    x.chunks_mut(cols).enumerate().for_each(|(row, x)| quantize_row(key, Some(given(row)), x));
    x
}

fn same(have: &[f32], want: &[f32], what: &dyn std::fmt::Display) {
    assert_eq!(have.len(), want.len(), "{what}");
    let differ = have.iter().zip(want).position(|(h, w)| h != w);
    if let Some(i) = differ {
        panic!("{what}: element {i} is {:e}, expected {:e}", have[i], want[i]);
    }
}

#[test]
fn codes_and_scales_mean_the_cpus_values_for_every_key() {
    let Some(stream) = gpu::stream() else { return };
    for (n, key) in keys().into_iter().enumerate() {
        for (m, cols) in [1, 7, 33, 64, 100, 128, 352, 2880, 7168, 8200, 19999].into_iter().enumerate() {
            for ty in InputType::ALL {
                let mut rng = Rng((100 * n + m) as u64);
                let x = rows(&mut rng, key, ty, cols);
                // Some values saturate.
                let given = rng.range(2.0, 3.0) / if key.scale2.is_some() { 2688.0 } else { 300.0 };
                let call = Call::new(&stream, (key, ty), &x, cols, None, &[given]);
                call.run(&stream, m % 2 == 0).unwrap();
                let what = format!("{key} of {cols} columns of {}", ty.name());
                same(&call.values(&stream), &want(key, &x, cols, |_| given), &what);
            }
        }
    }
}

#[test]
fn rows_are_gathered_and_rows_that_do_not_exist_are_zero() {
    let Some(stream) = gpu::stream() else { return };
    for (n, key) in keys().into_iter().enumerate() {
        for cols in [96, 125] {
            let mut rng = Rng(1000 + n as u64);
            let x = rows(&mut rng, key, InputType::Bf16, cols);
            let gather = [5, 0, 4, -1, 1, 1, 6, i32::MIN, 3, i32::MAX, KINDS as i32, 2];
            let given: Vec<f32> = gather.iter().map(|_| rng.range(0.001, 0.1)).collect();
            let call = Call::new(&stream, (key, InputType::Bf16), &x, cols, Some(&gather), &given);
            call.run(&stream, false).unwrap();
            let sources: Vec<f32> = gather
                .iter()
                .flat_map(|row| match usize::try_from(*row).ok().filter(|r| *r < KINDS) {
                    Some(row) => x[row * cols..(row + 1) * cols].to_vec(),
                    None => vec![0.0; cols],
                })
                .collect();
            same(&call.values(&stream), &want(key, &sources, cols, |row| given[row]), &key);
        }
    }
}

#[test]
fn a_nan_spoils_its_group_and_nothing_else() {
    let Some(stream) = gpu::stream() else { return };
    for key in keys() {
        let (cols, at) = (300, 131);
        let mut rng = Rng(2000);
        let mut x: Vec<f32> = (0..2 * cols).map(|_| rng.normal()).collect();
        x[at] = f32::NAN;
        let call = Call::new(&stream, (key, InputType::F32), &x, cols, None, &[0.01]);
        call.run(&stream, false).unwrap();
        let values = call.values(&stream);
        let clean = want(key, &x[cols..], cols, |_| 0.01);
        same(&values[cols..], &clean, &key);
        if key.scale.dynamic {
            let group = match key.scale.group.cols {
                Extent::Len(n) if !call.layout.second => n as usize,
                _ => cols,
            };
            let spoilt = at / group * group..((at / group + 1) * group).min(cols);
            for (col, v) in values[..cols].iter().enumerate() {
                assert_eq!(v.is_nan(), spoilt.contains(&col), "{key}: column {col} is {v}");
            }
        } else {
            let nan = key.elem == Elem::E4m3;
            assert!(if nan { values[at].is_nan() } else { values[at] == 0.0 }, "{key}: {}", values[at]);
            assert_eq!(values[..cols].iter().filter(|v| v.is_nan()).count(), usize::from(nan), "{key}");
        }
    }
}

#[test]
fn a_replayed_graph_writes_the_same_bytes() {
    let Some(stream) = gpu::stream() else { return };
    let mut rng = Rng(3000);
    for key in keys() {
        let x: Vec<f32> = (0..40 * 2880).map(|_| rng.normal()).collect();
        let eager = Call::new(&stream, (key, InputType::F16), &x, 2880, None, &[0.01]);
        let replayed = Call::new(&stream, (key, InputType::F16), &x, 2880, None, &[0.01]);
        eager.run(&stream, false).unwrap();
        let graph = Graph::capture(&stream, || replayed.run(&stream, true)).unwrap();
        // SAFETY: the call outlives the replay, which the reads wait for.
        unsafe { graph.launch(&stream) }.unwrap();
        for (a, b) in [(&eager.codes, &replayed.codes), (&eager.scales, &replayed.scales)] {
            assert_eq!(read(&stream, a), read(&stream, b), "{key}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_is_written() {
    let Some(stream) = gpu::stream() else { return };
    for key in keys() {
        let call = Call::new(&stream, (key, InputType::Bf16), &[1.0; 4 * 96], 96, None, &[0.5]);
        let all = call.tensors();
        let refused = |t: Tensors<'_>, rows| {
            // SAFETY: refused calls launch nothing.
            let said = unsafe { call.quantizer.run(&stream, &t, rows, false) };
            assert!(matches!(said, Err(CudaError::Argument(_))), "{key}: {said:?}");
        };
        refused(all, 5);
        refused(all, usize::MAX);
        refused(Tensors { input: all.input.slice(0, 4 * 96 * 2 - 1).unwrap(), ..all }, 4);
        refused(Tensors { codes: all.codes.slice(0, all.codes.len() - 1).unwrap(), ..all }, 4);
        if call.layout.scales > 0 {
            refused(Tensors { scales: all.scales.slice(0, all.scales.len() - 1).unwrap(), ..all }, 4);
        }
        if call.layout.second {
            refused(Tensors { second: DevicePtr::NULL, ..all }, 4);
        }
        assert!(read(&stream, &call.codes).iter().all(|b| *b == 0xa5), "{key}");
        // SAFETY: no rows, no work.
        unsafe { call.quantizer.run(&stream, &all, 0, false) }.unwrap();
    }
    let weights_only = moe_oracle::scheme::INT4_STATIC;
    assert!(matches!(
        Quantizer::new(stream.gpu(), weights_only, InputType::Bf16, 96).err(),
        Some(CudaError::Argument(_))
    ));
}
