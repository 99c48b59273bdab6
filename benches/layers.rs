//! Packing and whole layers of `cpu_simd`, unquantised and int8, small enough to stay in a cache: for changes of the
//! code. Figures against the machine's limits come from `moe-oracle bench`.

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use moe_oracle::config::{Activation, MoeConfig};
use moe_oracle::cpu::{Experts, SingleThread, simd::SimdExperts};
use moe_oracle::kernel::{MoeKernel, Rows, RowsMut, Standard};
use moe_oracle::platform::CpuIsa;
use moe_oracle::scheme::{Elem, INT8_STATIC_CHANNEL_SYM, Scheme};
use moe_oracle::weights::{ExpertWeights, MoeWeights, Scales, WeightElem, WeightMatrix};

const CONFIG: MoeConfig = MoeConfig::new(8, 2, 512, 256);

fn matrix(elem: WeightElem, rows: usize, cols: usize) -> WeightMatrix {
    let n = rows * cols;
    // Any codes do for timing; these stay clear of NaN and of subnormals.
    let (codes, scales) = match elem {
        WeightElem::Bf16 => ((0..n).flat_map(|i| [(i * 7) as u8, 0x3c]).collect(), Scales::None),
        _ => ((0..n).map(|i| (i * 37) as u8).collect::<Vec<u8>>(), Scales::PerRow(vec![0.01; rows])),
    };
    WeightMatrix { rows, cols, elem, codes: Bytes::from(codes), scales }
}

fn weights(elem: WeightElem) -> MoeWeights {
    let (h, i) = (CONFIG.hidden, CONFIG.intermediate);
    let expert = ExpertWeights {
        gate: Some(matrix(elem, i, h)),
        up: matrix(elem, i, h),
        down: matrix(elem, h, i),
        gate_bias: None,
        up_bias: None,
        down_bias: None,
        input_scale: None,
        down_input_scale: None,
    };
    let (scheme, weight_key) = match elem {
        WeightElem::Bf16 => (Scheme::Unquantized, None),
        _ => (Scheme::Int8, Some(INT8_STATIC_CHANNEL_SYM)),
    };
    MoeWeights { scheme, weight_key, activation_key: None, experts: vec![expert; CONFIG.experts] }
}

fn layers(c: &mut Criterion) {
    for (name, elem) in [("bf16", WeightElem::Bf16), ("int8", WeightElem::Quant(Elem::Int8))] {
        let weights = weights(elem);
        let pack = || SimdExperts::new(&weights, Activation::SILU, CpuIsa::detect()).expect("consistent weights");
        c.bench_function(&format!("pack/{name}"), |b| b.iter(|| pack().bytes_per_expert()));
        let kernel: MoeKernel<Standard, _> = MoeKernel::new(pack(), &CONFIG, None).expect("a consistent layer");
        let mut group = c.benchmark_group(format!("layer/{name}"));
        for tokens in [1usize, 16] {
            let x = vec![0.5f32; tokens * CONFIG.hidden];
            let mut y = vec![0f32; x.len()];
            let ids: Vec<i32> = (0..tokens as i32 * 2).map(|i| i % 8).collect();
            let w = vec![0.5f32; ids.len()];
            let mut workspace = vec![0u8; kernel.workspace_bytes(tokens)];
            group.bench_function(BenchmarkId::from_parameter(tokens), |b| {
                b.iter(|| {
                    let out = RowsMut::F32(&mut y);
                    kernel.forward(Rows::F32(&x), &ids, &w, out, &mut workspace, &SingleThread)
                })
            });
        }
        group.finish();
    }
}

criterion_group!(benches, layers);
criterion_main!(benches);
