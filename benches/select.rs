//! Selection at run time: what an engine pays when it can't select at compile time.

use criterion::{Criterion, criterion_group, criterion_main};
use moe_oracle::config::MoeConfig;
use moe_oracle::oracle::{Fp8Block, MoeBackend, MoeKernelOracle, Mxfp4W4A16, SelectInputs, find};
use moe_oracle::platform::{CpuIsa, Platform};
use moe_oracle::scheme::{FP8_DYNAMIC_128_SYM, FP8_STATIC_128_BLOCK_SYM, Scheme};
use std::hint::black_box;

fn selection(c: &mut Criterion) {
    let config = MoeConfig::new(128, 8, 2048, 768);
    let (cpu, gpu) = (Platform::Cpu(CpuIsa::Avx2), Platform::Cuda(90));
    let reference = SelectInputs::named(MoeBackend::CpuReference);
    let mut group = c.benchmark_group("select");
    group.bench_function("auto", |b| {
        b.iter(|| Fp8Block::select_backend(black_box(&config), black_box(&cpu), black_box(&SelectInputs::AUTO)))
    });
    group.bench_function("named", |b| {
        b.iter(|| Mxfp4W4A16::select_backend(black_box(&config), black_box(&cpu), black_box(&reference)))
    });
    group.bench_function("refused", |b| {
        b.iter(|| Fp8Block::select_backend(black_box(&config), black_box(&gpu), black_box(&SelectInputs::AUTO)))
    });
    group.bench_function("keys known at run time", |b| {
        let keys = (Some(FP8_STATIC_128_BLOCK_SYM), Some(FP8_DYNAMIC_128_SYM));
        b.iter(|| {
            find(black_box(Scheme::Fp8), black_box(keys.0), black_box(keys.1))
                .map(|o| o.select(black_box(&config), black_box(&cpu), &SelectInputs::AUTO))
        })
    });
    group.finish();
}

criterion_group!(benches, selection);
criterion_main!(benches);
