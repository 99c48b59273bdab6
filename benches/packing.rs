//! Packing for `cpu_simd` in every format, in bytes of canonical weights per second: what loading a model waits for
//! once its files are in memory.

mod common;

use common::{CONFIG, FORMATS};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use moe_oracle::cpu::{Experts, simd::SimdExperts};
use moe_oracle::platform::CpuIsa;
use moe_oracle::weights::WeightMatrix;

fn packing(c: &mut Criterion) {
    let mut group = c.benchmark_group("pack");
    for format in &FORMATS {
        let (_, weights) = common::weights(format, &CONFIG);
        let bytes = |m: &WeightMatrix| m.bytes() as u64;
        let expert =
            |e: &moe_oracle::weights::ExpertWeights| e.gate.as_ref().map_or(0, bytes) + bytes(&e.up) + bytes(&e.down);
        group.throughput(Throughput::Bytes(weights.experts.iter().map(expert).sum()));
        group.bench_function(format.0, |b| {
            b.iter(|| {
                let packed = SimdExperts::new(&weights, CONFIG.activation, CpuIsa::detect());
                packed.expect("consistent weights").bytes_per_expert()
            })
        });
    }
    group.finish();
}

criterion_group!(name = benches; config = common::quick(); targets = packing);
criterion_main!(benches);
