//! Every backend of the GPU in every format, and the quantisers of activations, by the GPU's own clock: for changes of the
//! code. The layers are small enough to stay in its cache; figures against its limits come from
//! `moe-oracle bench --device cuda`. Without a GPU or without kernels nothing is measured.

mod common;

use common::{CONFIG, FORMATS};
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime,
};
use moe_oracle::config::InputType;
use moe_oracle::cuda::quantize::{self, Quantizer};
use moe_oracle::cuda::{CudaError, CudaKernel, DeviceBuffer, Event, Gpu, NOT_BUILT, Stream, Tensors};
use moe_oracle::oracle::{KernelWeights, ORACLES, SUPPORT, SelectInputs};
use moe_oracle::platform::Platform;
use moe_oracle::scheme::QuantKey;
use std::time::Duration;

/// The first GPU, if this build has kernels for it.
fn stream() -> Option<Stream> {
    if let Some(why) = NOT_BUILT {
        println!("skipped: no kernels in this build: {why}");
        return None;
    }
    match Gpu::open(0).and_then(|gpu| Stream::new(&gpu)) {
        Ok(stream) => Some(stream),
        Err(why) => {
            println!("skipped: {why}");
            None
        }
    }
}

/// Measures launches by events around them, so that the host's time counts only where the GPU waits for it.
fn measure(
    group: &mut BenchmarkGroup<'_, WallTime>,
    id: BenchmarkId,
    stream: &Stream,
    launch: impl Fn() -> Result<(), CudaError>,
) {
    let time = |launches: u64| {
        let (start, end) = (Event::new(stream.gpu())?, Event::new(stream.gpu())?);
        start.record(stream)?;
        (0..launches).try_for_each(|_| launch())?;
        end.record(stream)?;
        end.synchronize()?;
        Ok::<_, CudaError>(Duration::from_secs_f64(f64::from(end.ms_since(&start)?) / 1e3))
    };
    group.bench_function(id, |b| b.iter_custom(|launches| time(launches).expect("launches that the GPU takes")));
}

fn layers(c: &mut Criterion) {
    let Some(stream) = stream() else { return };
    let platform = Platform::Cuda(stream.gpu().info().capability);
    for format in &FORMATS {
        let (oracle, weights) = common::weights(format, &CONFIG);
        let mut group = c.benchmark_group(format!("cuda/{}", format.0));
        for candidate in oracle.explain_for(&CONFIG, &platform, &SelectInputs::AUTO.built_only()) {
            let rows = SUPPORT.iter().filter(|(scheme, _)| *scheme == oracle.scheme);
            let Some((_, info)) = rows.into_iter().find(|(_, k)| k.name == candidate.backend) else { continue };
            if candidate.verdict.is_err() {
                continue;
            }
            let packed = oracle.convert(info, &CONFIG, &platform, weights.clone()).expect("consistent weights");
            let KernelWeights::Gpu(packed) = packed else { continue };
            let kernel = CudaKernel::new(&stream, &packed, &CONFIG, None).expect("a consistent layer");
            for tokens in [1usize, 32] {
                let ids: Vec<i32> = (0..(tokens * CONFIG.topk) as i32).map(|i| i % CONFIG.experts as i32).collect();
                let x = vec![half::bf16::from_f32(0.5); tokens * CONFIG.hidden];
                let up = |bytes: &[u8]| DeviceBuffer::of(&stream, bytes).expect("memory on the GPU");
                let (x, weights) = (up(bytemuck::cast_slice(&x)), up(bytemuck::cast_slice(&vec![0.5f32; ids.len()])));
                let (output, ids) = (up(&vec![0; x.len()]), up(bytemuck::cast_slice(&ids)));
                let workspace = up(&vec![0; kernel.workspace_bytes(tokens)]);
                let tensors = Tensors {
                    hidden: x.ptr(),
                    topk_ids: ids.ptr(),
                    topk_weights: weights.ptr(),
                    output: output.ptr(),
                    workspace: workspace.ptr(),
                };
                // SAFETY: the buffers are of this stream's GPU and only it uses them; freeing them waits for the GPU.
                let launch = || unsafe { kernel.forward(&stream, &tensors, tokens) };
                measure(&mut group, BenchmarkId::new(info.name, tokens), &stream, launch);
            }
        }
        group.finish();
    }
}

fn quantisers(c: &mut Criterion) {
    const COLS: usize = 7168;
    let Some(stream) = stream() else { return };
    let mut keys: Vec<QuantKey> = ORACLES.iter().filter_map(|o| QuantKey::from_bits(o.activation)).collect();
    keys.sort_by_key(|k| k.bits());
    keys.dedup();
    for rows in [1usize, 4096] {
        let x: Vec<_> = (0..rows * COLS).map(|i| half::bf16::from_f32((i * 7 % 1000) as f32 / 500.0 - 1.0)).collect();
        let input = DeviceBuffer::of(&stream, &x).expect("memory on the GPU");
        let stored = DeviceBuffer::of(&stream, &[0.01f32]).expect("memory on the GPU");
        let mut group = c.benchmark_group(format!("cuda/quantise/{rows}x{COLS}"));
        for key in &keys {
            let quantizer = Quantizer::new(stream.gpu(), *key, InputType::Bf16, COLS).expect("a kernel for the key");
            let layout = quantizer.layout();
            let sizes = [layout.code_bytes, layout.scales * layout.scale_bytes, if layout.second { 4 } else { 0 }];
            let [codes, scales, second] =
                sizes.map(|n| DeviceBuffer::alloc(stream.gpu(), rows * n).expect("memory on the GPU"));
            let tensors = quantize::Tensors {
                input: input.ptr(),
                rows: None,
                stored: Some(stored.ptr()),
                codes: codes.ptr(),
                scales: scales.ptr(),
                second: second.ptr(),
            };
            group.throughput(Throughput::Bytes((input.len() + rows * sizes.iter().sum::<usize>()) as u64));
            // SAFETY: as for the layers.
            let launch = || unsafe { quantizer.run(&stream, &tensors, rows, true) };
            measure(&mut group, BenchmarkId::from_parameter(key), &stream, launch);
        }
        group.finish();
    }
}

criterion_group!(name = benches; config = common::quick(); targets = layers, quantisers);
criterion_main!(benches);
