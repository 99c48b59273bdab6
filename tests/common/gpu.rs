//! Layers on the GPU, as an engine would run them.

use super::{Layer, round_to};
use moe_oracle::config::InputType;
use moe_oracle::cuda::{BatchedTensors, CudaKernel, DeviceBuffer, Gpu, Graph, Stream, Tensors};
use moe_oracle::oracle::{ExpertsKind, KernelWeights, SUPPORT};
use moe_oracle::platform::Platform;

/// A stream on the first GPU; a machine without one skips the test with a word.
pub fn stream() -> Option<Stream> {
    match Gpu::open(0).and_then(|gpu| Stream::new(&gpu)) {
        Ok(stream) => Some(stream),
        Err(why) => {
            super::skip::skipped(why);
            None
        }
    }
}

/// The layer's kernel of a kind, through the same steps as an engine takes.
pub fn kernel(stream: &Stream, layer: &Layer, kind: ExpertsKind, map: Option<&[i32]>) -> CudaKernel {
    let info = SUPPORT.iter().find(|(s, info)| *s == layer.oracle.scheme && info.experts == kind).unwrap().1;
    let platform = Platform::Cuda(stream.gpu().info().capability);
    let served = layer.oracle.explain(&layer.config, &platform);
    let verdict = served.iter().find(|c| c.backend == info.name).unwrap().verdict;
    assert!(verdict.is_ok(), "{}: {verdict:?}", layer.oracle.alias);
    let weights = layer.oracle.convert(info, &layer.config, &platform, layer.weights.clone()).unwrap();
    let KernelWeights::Gpu(weights) = weights else { panic!("{} is not for a GPU", info.name) };
    CudaKernel::new(stream, &weights, &layer.config, map).unwrap()
}

/// One call's memory: output and workspace hold NaNs (0xff bytes) until they are written.
pub struct Call {
    hidden: DeviceBuffer,
    ids: DeviceBuffer,
    weights: DeviceBuffer,
    output: DeviceBuffer,
    workspace: DeviceBuffer,
    tokens: usize,
}

fn bits(ty: InputType, x: &[f32]) -> Vec<u16> {
    match ty {
        InputType::Bf16 => x.iter().map(|v| half::bf16::from_f32(*v).to_bits()).collect(),
        InputType::F16 => x.iter().map(|v| half::f16::from_f32(*v).to_bits()).collect(),
        InputType::F32 => panic!("no float32 on the GPU"),
    }
}

impl Call {
    pub fn new(stream: &Stream, kernel: &CudaKernel, x: &[f32], ids: &[i32], weights: &[f32]) -> Self {
        let c = kernel.config();
        let tokens = x.len() / c.hidden;
        let mut rounded = x.to_vec();
        round_to(c.input, &mut rounded);
        let held = rounded.iter().zip(x).all(|(r, v)| r == v || r.is_nan() && v.is_nan());
        assert!(held, "hidden states that 16 bits do not hold");
        Self {
            hidden: DeviceBuffer::of(stream, &bits(c.input, x)).unwrap(),
            ids: DeviceBuffer::of(stream, ids).unwrap(),
            weights: DeviceBuffer::of(stream, weights).unwrap(),
            output: DeviceBuffer::of(stream, &vec![0xffffu16; x.len()]).unwrap(),
            workspace: DeviceBuffer::of(stream, &vec![0xffu8; kernel.workspace_bytes(tokens)]).unwrap(),
            tokens,
        }
    }

    pub fn launch(&self, stream: &Stream, kernel: &CudaKernel) {
        let t = Tensors {
            hidden: self.hidden.ptr(),
            topk_ids: self.ids.ptr(),
            topk_weights: self.weights.ptr(),
            output: self.output.ptr(),
            workspace: self.workspace.ptr(),
        };
        // SAFETY: all buffers are this call's own and live on; the stream orders everything.
        unsafe { kernel.forward(stream, &t, self.tokens) }.unwrap();
    }

    pub fn output_bits(&self, stream: &Stream) -> Vec<u16> {
        stream.synchronize().unwrap();
        let mut out = vec![0u16; self.output.len() / 2];
        self.output.download(stream, 0, &mut out).unwrap();
        out
    }

    /// The launches as a graph, over a poisoned output.
    pub fn replay(&self, stream: &Stream, kernel: &CudaKernel) -> Vec<u16> {
        let graph = Graph::capture(stream, || {
            self.launch(stream, kernel);
            Ok::<(), moe_oracle::cuda::CudaError>(())
        })
        .unwrap();
        self.output.upload(stream, 0, &vec![0xffffu16; self.output.len() / 2]).unwrap();
        // SAFETY: as for the launches themselves.
        unsafe { graph.launch(stream) }.unwrap();
        self.output_bits(stream)
    }
}

pub fn values(ty: InputType, bits: &[u16]) -> Vec<f32> {
    match ty {
        InputType::Bf16 => bits.iter().map(|b| half::bf16::from_bits(*b).to_f32()).collect(),
        _ => bits.iter().map(|b| half::f16::from_bits(*b).to_f32()).collect(),
    }
}

/// A forward call; no element may be left unwritten.
pub fn forward(stream: &Stream, kernel: &CudaKernel, x: &[f32], ids: &[i32], weights: &[f32]) -> Vec<f32> {
    let call = Call::new(stream, kernel, x, ids, weights);
    call.launch(stream, kernel);
    let out = values(kernel.config().input, &call.output_bits(stream));
    assert!(out.iter().all(|v| !v.is_nan()), "an output element is NaN or was not written");
    out
}

/// A call in the batched format: output and workspace hold NaNs until they are written.
pub struct BatchedCall {
    hidden: DeviceBuffer,
    counts: DeviceBuffer,
    output: DeviceBuffer,
    workspace: DeviceBuffer,
    max: usize,
}

impl BatchedCall {
    pub fn new(stream: &Stream, kernel: &CudaKernel, x: &[f32], counts: &[i32], max: usize) -> Self {
        Self {
            hidden: DeviceBuffer::of(stream, &bits(kernel.config().input, x)).unwrap(),
            counts: DeviceBuffer::of(stream, counts).unwrap(),
            output: DeviceBuffer::of(stream, &vec![0xffffu16; x.len()]).unwrap(),
            workspace: DeviceBuffer::of(stream, &vec![0xffu8; kernel.workspace_bytes(max)]).unwrap(),
            max,
        }
    }

    pub fn launch(&self, stream: &Stream, kernel: &CudaKernel) {
        let t = BatchedTensors {
            hidden: self.hidden.ptr(),
            counts: self.counts.ptr(),
            output: self.output.ptr(),
            workspace: self.workspace.ptr(),
        };
        // SAFETY: all buffers are this call's own and live on; the stream orders everything.
        unsafe { kernel.forward_batched(stream, &t, self.max) }.unwrap();
    }

    pub fn output_bits(&self, stream: &Stream) -> Vec<u16> {
        stream.synchronize().unwrap();
        let mut out = vec![0u16; self.output.len() / 2];
        self.output.download(stream, 0, &mut out).unwrap();
        out
    }

    /// Other tokens and counts for the same launches as a graph, over poisoned memory.
    pub fn replay(&self, stream: &Stream, kernel: &CudaKernel, x: &[f32], counts: &[i32]) -> Vec<u16> {
        let graph = Graph::capture(stream, || {
            self.launch(stream, kernel);
            Ok::<(), moe_oracle::cuda::CudaError>(())
        })
        .unwrap();
        self.hidden.upload(stream, 0, &bits(kernel.config().input, x)).unwrap();
        self.counts.upload(stream, 0, counts).unwrap();
        self.output.upload(stream, 0, &vec![0xffffu16; self.output.len() / 2]).unwrap();
        self.workspace.upload(stream, 0, &vec![0xffu8; self.workspace.len()]).unwrap();
        // SAFETY: as for the launches themselves.
        unsafe { graph.launch(stream) }.unwrap();
        self.output_bits(stream)
    }
}

/// A call in the batched format, eager, and the same bits again from a graph.
pub fn forward_batched(stream: &Stream, kernel: &CudaKernel, x: &[f32], counts: &[i32], max: usize) -> Vec<f32> {
    let call = BatchedCall::new(stream, kernel, x, counts, max);
    call.launch(stream, kernel);
    let bits = call.output_bits(stream);
    assert_eq!(call.replay(stream, kernel, x, counts), bits, "a graph's replay differs");
    values(kernel.config().input, &bits)
}
