//! Whole layers of the backend that selection takes, in every format, small enough to stay in a cache: for changes of
//! the code. Figures against the machine's limits come from `moe-oracle bench`.

mod common;

use common::{CONFIG, FORMATS};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use moe_oracle::cpu::SingleThread;
use moe_oracle::kernel::{MoeKernel, Rows, RowsMut, Standard};
use moe_oracle::oracle::SelectInputs;
use moe_oracle::platform::Platform;

fn layers(c: &mut Criterion) {
    let platform = Platform::cpu();
    for format in &FORMATS {
        let (oracle, weights) = common::weights(format);
        let choice = oracle.select(&CONFIG, &platform, &SelectInputs::AUTO).expect("a layer that the CPU serves");
        let quant = oracle.quant_config(&CONFIG, &weights).expect("no stored input scales needed");
        let packed = oracle.convert(choice, &CONFIG, &platform, weights).expect("consistent weights");
        let experts = packed.into_experts(&CONFIG, quant).expect("experts");
        let kernel: MoeKernel<Standard, _> = MoeKernel::new(experts, &CONFIG, None).expect("a consistent layer");
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

criterion_group!(name = benches; config = common::quick(); targets = layers);
criterion_main!(benches);
