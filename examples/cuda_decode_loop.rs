//! A toy decode loop with the layer on an NVIDIA GPU: chosen while compiling, packed and uploaded once, router and experts
//! recorded as one CUDA graph, which every step replays over new logits. One step is compared with the CPU.

use half::bf16;
use moe_oracle::checkpoint::{Checkpoint, RouterWeights};
use moe_oracle::config::{Activation, MoeConfig, Routing, RoutingMethod};
use moe_oracle::cpu::ThreadPool;
use moe_oracle::cuda::{CudaError, CudaKernel, DeviceBuffer, Gpu, Graph, NOT_BUILT, Stream, Tensors, routing};
use moe_oracle::layer::{Layer, LayerOptions};
use moe_oracle::oracle::{KernelWeights, MoeKernelOracle, Mxfp4Backend, Mxfp4W4A16, SelectInputs, Selection};
use moe_oracle::platform::Platform;
use safetensors::SafeTensors;
use std::error::Error;
use std::path::Path;
use std::time::Instant;

/// gpt-oss in small: 8 experts, 2 of them per token, hidden and intermediate size 256.
const LAYER: MoeConfig = MoeConfig {
    activation: Activation::SWIGLU_OAI,
    bias: true,
    routing: Routing::new(RoutingMethod::Renormalize),
    ..MoeConfig::new(8, 2, 256, 256)
};
/// Decided at compile time, for the oldest GPU that kernels exist for: what serves it serves later ones too.
const CHOICE: Selection<Mxfp4Backend> = match Mxfp4W4A16::select(&LAYER, &Platform::Cuda(80), &SelectInputs::AUTO) {
    Ok(choice) => choice,
    Err(_) => panic!("no backend serves this layer"),
};
/// Sequences that are decoded together.
const BATCH: usize = 4;
const STEPS: usize = 512;
/// The fixture's own tolerance for exact activations.
const TOLERANCE: f64 = 0.008;

fn main() -> Result<(), Box<dyn Error>> {
    match NOT_BUILT.map(String::from).map_or_else(|| Gpu::open(0).map_err(|e| e.to_string()), Err) {
        Ok(gpu) => decode(&gpu, STEPS),
        Err(why) => {
            println!("nothing to show here: {why}");
            Ok(())
        }
    }
}

/// Decodes, says how fast, and fails where the GPU's last step is not the CPU's.
fn decode(gpu: &Gpu, steps: usize) -> Result<(), Box<dyn Error>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/16_gpt_oss_mxfp4");
    let moe = Checkpoint::open(&dir)?.layer(0)?;
    if moe.config != LAYER {
        return Err("the checkpoint holds another layer than the one chosen for".into());
    }
    let stream = Stream::new(gpu)?;
    let step = Step::new(&stream, moe.weights.clone())?;

    let mut x = first_tokens(&dir)?;
    let (mut seen, mut y) = (x.clone(), Vec::new());
    let start = Instant::now();
    for _ in 0..steps {
        seen.clone_from(&x);
        y = step.run(&stream, &moe.router, &x)?;
        next_tokens(&mut x, &y);
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{} on {}: {:.0} tokens/s through this layer, {BATCH} at a time, logits and copies on the host included",
        CHOICE.kernel.name,
        gpu.info().name,
        (steps * BATCH) as f64 / seconds
    );

    let options = LayerOptions { platform: Platform::cpu(), inputs: SelectInputs::AUTO, exact_activations: true };
    let want = Layer::new(moe, &options)?.run(&seen, None, None, &ThreadPool::new(2)?)?;
    if step.ids(&stream)? != want.topk_ids {
        return Err("the GPU chose other experts than the CPU".into());
    }
    let error = distance(&y, &want.output);
    println!("the last step is {error:.5} from the CPU's");
    // A NaN is no answer either.
    if error < TOLERANCE { Ok(()) } else { Err(format!("that is more than {TOLERANCE}").into()) }
}

/// One step, recorded: its buffers stay, their contents change.
struct Step {
    // First, so that it goes before what it uses.
    graph: Graph,
    hidden: DeviceBuffer,
    logits: DeviceBuffer,
    ids: DeviceBuffer,
    _weights: DeviceBuffer,
    output: DeviceBuffer,
    _workspace: DeviceBuffer,
    _kernel: CudaKernel,
    _router: routing::Router,
}

impl Step {
    /// Packs, uploads and records.
    fn new(stream: &Stream, weights: moe_oracle::weights::MoeWeights) -> Result<Self, Box<dyn Error>> {
        let gpu = stream.gpu();
        let packed = Mxfp4W4A16::convert_to_kernel_format(CHOICE.backend, &LAYER, &gpu.platform(), weights)?;
        let KernelWeights::Gpu(packed) = packed else {
            return Err(format!("{} does not run on a GPU", CHOICE.kernel.name).into());
        };
        let kernel = CudaKernel::new(stream, &packed, &LAYER, None)?;
        let router = routing::Router::new(gpu, &LAYER.routing, LAYER.experts, LAYER.topk)?;
        let hidden = DeviceBuffer::zeroed(stream, BATCH * LAYER.hidden * 2)?;
        let logits = DeviceBuffer::zeroed(stream, BATCH * LAYER.experts * 4)?;
        let ids = DeviceBuffer::zeroed(stream, BATCH * LAYER.topk * 4)?;
        let weights = DeviceBuffer::zeroed(stream, BATCH * LAYER.topk * 4)?;
        let output = DeviceBuffer::zeroed(stream, BATCH * LAYER.hidden * 2)?;
        let workspace = DeviceBuffer::alloc(gpu, kernel.workspace_bytes(BATCH))?;

        let route = routing::Tensors { logits: logits.ptr(), bias: None, ids: ids.ptr(), weights: weights.ptr() };
        let call = Tensors {
            hidden: hidden.ptr(),
            topk_ids: ids.ptr(),
            topk_weights: weights.ptr(),
            output: output.ptr(),
            workspace: workspace.ptr(),
        };
        let graph = Graph::capture::<CudaError>(stream, || {
            // SAFETY: the buffers are of this GPU, overlap nothing, stay in the `Step` beside the graph and are used by
            // one stream only, which runs the router before the layer.
            unsafe { router.run(stream, &route, BATCH, false) }?;
            // SAFETY: as above.
            unsafe { kernel.forward(stream, &call, BATCH) }
        })?;
        Ok(Self {
            graph,
            hidden,
            logits,
            ids,
            _weights: weights,
            output,
            _workspace: workspace,
            _kernel: kernel,
            _router: router,
        })
    }

    /// Hidden states `[BATCH, H]`, whose values bf16 holds, to the layer's output.
    fn run(&self, stream: &Stream, router: &RouterWeights, x: &[f32]) -> Result<Vec<f32>, CudaError> {
        let bits: Vec<u16> = x.iter().map(|v| bf16::from_f32(*v).to_bits()).collect();
        let logits: Vec<f32> = x.chunks(LAYER.hidden).flat_map(|row| router.logits(row)).collect();
        self.hidden.upload(stream, 0, &bits)?;
        self.logits.upload(stream, 0, &logits)?;
        // SAFETY: as for what was recorded; the stream that it was recorded on orders this after the uploads.
        unsafe { self.graph.launch(stream) }?;
        let mut bits = vec![0u16; x.len()];
        self.output.download(stream, 0, &mut bits)?;
        Ok(bits.iter().map(|b| bf16::from_bits(*b).to_f32()).collect())
    }

    /// The experts of the last step.
    fn ids(&self, stream: &Stream) -> Result<Vec<i32>, CudaError> {
        let mut ids = vec![0; BATCH * LAYER.topk];
        self.ids.download(stream, 0, &mut ids)?;
        Ok(ids)
    }
}

/// The fixture's first hidden states.
fn first_tokens(dir: &Path) -> Result<Vec<f32>, Box<dyn Error>> {
    let file = std::fs::read(dir.join("input.safetensors"))?;
    let file = SafeTensors::deserialize(&file)?;
    let (words, _) = file.tensor("hidden_states")?.data().as_chunks::<2>();
    let x: Vec<f32> = words.iter().take(BATCH * LAYER.hidden).map(|w| bf16::from_le_bytes(*w).to_f32()).collect();
    if x.len() == BATCH * LAYER.hidden { Ok(x) } else { Err("the fixture holds too few tokens".into()) }
}

/// Stands for the rest of a model: the layer's output is added, the sum normalised, and rounded to bf16 again.
fn next_tokens(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.chunks_mut(LAYER.hidden).zip(y.chunks(LAYER.hidden)) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
        let mean_square = x.iter().map(|v| v * v).sum::<f32>() / LAYER.hidden as f32;
        let scale = 1.0 / (mean_square + 1e-5).sqrt();
        x.iter_mut().for_each(|v| *v = bf16::from_f32(*v * scale).to_f32());
    }
}

/// The difference's length relative to the expected answer's.
fn distance(have: &[f32], want: &[f32]) -> f64 {
    let square = |v: &mut dyn Iterator<Item = f32>| v.map(|x| f64::from(x).powi(2)).sum::<f64>();
    let off = square(&mut have.iter().zip(want).map(|(h, w)| h - w));
    (off / square(&mut want.iter().copied())).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gpu_decodes_as_the_cpu_does() {
        if let Some(why) = NOT_BUILT {
            return println!("skipped: no kernels in this build: {why}");
        }
        match Gpu::open(0) {
            Ok(gpu) => decode(&gpu, 5).unwrap(),
            Err(why) => println!("skipped: {why}"),
        }
    }
}
