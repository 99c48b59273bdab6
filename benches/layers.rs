//! Whole layers. `layer`: the backend that selection takes, in every format, small enough to stay in a cache: for changes
//! of the code. `cold`: one thread on a layer of Qwen3-30B-A3B's sizes with half of its experts, far larger than a cache,
//! with routing that changes from call to call; after each figure a line says what shares it is of the bandwidth of reads
//! in turn with the calls and of the peaks, which were measured first in the same run. `moe-oracle bench` does that for
//! more models and threads.

mod common;
#[path = "../src/bin/moe-oracle/failure.rs"]
#[allow(dead_code, reason = "the command line uses the rest")]
mod failure;
#[path = "../src/bin/moe-oracle/limits.rs"]
#[allow(dead_code, reason = "the command line uses the rest")]
mod limits;
#[path = "../src/bin/moe-oracle/machine.rs"]
#[allow(dead_code, reason = "the command line uses the rest")]
mod machine;

use common::{CONFIG, FORMATS, Format};
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use limits::Limits;
use moe_oracle::config::MoeConfig;
use moe_oracle::cpu::{Experts, SingleThread};
use moe_oracle::kernel::{MoeKernel, Rows, RowsMut, Standard};
use moe_oracle::oracle::{KernelInfo, MoeBackend, SelectInputs};
use moe_oracle::platform::Platform;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

struct Served {
    kernel: MoeKernel<Standard, Box<dyn Experts>>,
    info: &'static KernelInfo,
    /// What the use of an expert must read.
    expert_bytes: usize,
}

/// A format's layer on a backend; `None` where the format has no such.
fn serve(format: &Format, config: &MoeConfig, backend: MoeBackend) -> Option<Served> {
    let platform = Platform::cpu();
    let (oracle, weights) = common::weights(format, config);
    let info = oracle.select(config, &platform, &SelectInputs::named(backend)).ok()?;
    let expert_bytes = weights.experts.first().map_or(0, |e| e.bytes());
    let quant = oracle.quant_config(config, &weights).expect("no stored input scales needed");
    let packed = oracle.convert(info, config, &platform, weights).expect("consistent weights");
    let experts = packed.into_experts(config, quant).expect("experts");
    let kernel = MoeKernel::new(experts, config, None).expect("a consistent layer");
    Some(Served { kernel, info, expert_bytes })
}

fn layers(c: &mut Criterion) {
    for format in &FORMATS {
        let Served { kernel, .. } = serve(format, &CONFIG, MoeBackend::Auto).expect("a layer that the CPU serves");
        let mut group = c.benchmark_group(format!("layer/{}", format.0));
        for tokens in [1usize, 32] {
            let x = vec![0.5f32; tokens * CONFIG.hidden];
            let mut y = vec![0f32; x.len()];
            let ids: Vec<i32> = (0..(tokens * CONFIG.topk) as i32).map(|i| i % CONFIG.experts as i32).collect();
            let w = vec![0.5f32; ids.len()];
            let mut workspace = vec![0u8; kernel.workspace_bytes(tokens)];
            group.bench_function(BenchmarkId::from_parameter(tokens), |b| {
                b.iter(|| {
                    let out = RowsMut::F32(&mut y);
                    kernel.forward(Rows::F32(&x), &ids, &w, out, &mut workspace, &SingleThread).expect("a good call")
                })
            });
        }
        group.finish();
    }
}

/// 600 MB in bf16, 150 in 4 bits.
const COLD: MoeConfig = MoeConfig::new(64, 8, 2048, 768);

/// The experts of a token: a stride through all of them that is prime to their number, from a start of its own.
fn route(call: usize, tokens: usize) -> Vec<i32> {
    let token = |t: usize| (0..COLD.topk).map(move |k| ((call * 29 + t * 13 + k * 37) % COLD.experts) as i32);
    (0..tokens).flat_map(token).collect()
}

fn cold(c: &mut Criterion) {
    let (limits, reader) = Limits::measure(&SingleThread).expect("limits");
    let int8 = limits.int8_gops.map_or(String::new(), |p| format!(", {p:.0} GOP/s int8"));
    println!(
        "limits with one thread: {:.1} GB/s read, {:.0} GFLOP/s float32{int8}",
        limits.read_gbps, limits.f32_gflops
    );
    let a8 = MoeBackend::by_name("cpu_simd_a8").expect("a name of the table");
    for format in FORMATS.iter().filter(|f| ["bf16", "fp8-block", "int8", "mxfp4", "nvfp4", "int4-g128"].contains(&f.0))
    {
        for backend in [MoeBackend::Auto, a8] {
            let Some(Served { kernel, info, expert_bytes }) = serve(format, &COLD, backend) else { continue };
            let mut group = c.benchmark_group(format!("cold/{}/{}", format.0, info.name));
            group.sampling_mode(SamplingMode::Flat).sample_size(10).measurement_time(Duration::from_secs(1));
            for tokens in [1usize, 128] {
                let x: Vec<f32> = (0..tokens * COLD.hidden).map(|i| (i % 101) as f32 / 50.0 - 1.0).collect();
                let mut y = vec![0f32; x.len()];
                let w = vec![1.0 / COLD.topk as f32; tokens * COLD.topk];
                let routes: Vec<Vec<i32>> = (0..16).map(|call| route(call, tokens)).collect();
                let hit = routes.iter().map(|ids| ids.iter().collect::<BTreeSet<_>>().len()).sum::<usize>() / 16;
                let (bytes, flops) = (hit * expert_bytes, 6 * tokens * COLD.topk * COLD.hidden * COLD.intermediate);
                let mut workspace = vec![0u8; kernel.workspace_bytes(tokens)];
                let (mut call, mut times, mut reads) = (0, Vec::new(), Vec::new());
                group.throughput(Throughput::Bytes(bytes as u64));
                group.bench_function(BenchmarkId::from_parameter(tokens), |b| {
                    b.iter_custom(|calls| {
                        let mut total = Duration::ZERO;
                        for _ in 0..calls {
                            call += 1;
                            let (ids, out) = (&routes[call % 16], RowsMut::F32(&mut y));
                            let start = Instant::now();
                            kernel
                                .forward(Rows::F32(&x), ids, &w, out, &mut workspace, &SingleThread)
                                .expect("a good call");
                            let time = start.elapsed();
                            total += time;
                            times.push(time.as_secs_f64() * 1e9);
                            reads.push(reader.read_gbps(bytes as f64, &SingleThread));
                        }
                        total
                    })
                });
                // None where a filter on the command line left this one out.
                times.sort_by(f64::total_cmp);
                reads.sort_by(f64::total_cmp);
                if let (Some(ns), Some(read)) = (times.get(times.len() / 2), reads.get(reads.len() / 2)) {
                    let (gbps, gflops) = (bytes as f64 / ns, flops as f64 / ns);
                    let share = |have: f64, peak: f64| format!("{:.0} %", 100.0 * have / peak);
                    let int8 = limits.int8_gops.map_or("-".into(), |p| share(gflops, p));
                    println!(
                        "{:<24}median: {} of {read:.1} GB/s read in turn, {} of the float32 peak, {int8} of the int8 peak",
                        "",
                        share(gbps, *read),
                        share(gflops, limits.f32_gflops)
                    );
                }
            }
            group.finish();
        }
    }
}

criterion_group!(name = benches; config = common::quick(); targets = layers, cold);
criterion_main!(benches);
