//! One small layer in every format. Any codes do for timing; these stay clear of NaN and of subnormals.

use bytes::Bytes;
use criterion::Criterion;
use moe_oracle::config::MoeConfig;
use moe_oracle::oracle::{DynOracle, ORACLES};
use moe_oracle::scheme::{Elem, QuantKey};
use moe_oracle::weights::{ExpertWeights, HalfType, MoeWeights, Scales, WeightElem, WeightMatrix};
use std::time::Duration;

/// Small enough to stay in a cache.
pub const CONFIG: MoeConfig = MoeConfig::new(8, 2, 512, 256);

/// A name, an oracle's alias, the codes and their scales for rows and columns.
pub type Format = (&'static str, &'static str, WeightElem, fn(usize, usize) -> Scales);

/// Every scheme.
pub const FORMATS: [Format; 10] = [
    ("bf16", "Bf16", WeightElem::Bf16, |_, _| Scales::None),
    ("fp8-tensor", "Fp8TensorDynamic", WeightElem::Quant(Elem::E4m3), |_, _| Scales::PerTensor(0.01)),
    ("fp8-channel", "Fp8Channel", WeightElem::Quant(Elem::E4m3), |rows, _| Scales::PerRow(vec![0.01; rows])),
    ("fp8-block", "Fp8Block", WeightElem::Quant(Elem::E4m3), |rows, cols| Scales::Block {
        block: 128,
        values: vec![0.01; rows.div_ceil(128) * cols.div_ceil(128)],
    }),
    ("nvfp4", "Nvfp4W4A16", WeightElem::Quant(Elem::E2m1), |rows, cols| Scales::Nvfp4 {
        codes: vec![0x38; rows * cols / 16].into(),
        global: 0.01,
    }),
    ("mxfp4", "Mxfp4W4A16", WeightElem::Quant(Elem::E2m1), e8m0),
    ("mxfp8", "Mxfp8W8A8", WeightElem::Quant(Elem::E4m3), e8m0),
    ("int8", "Int8Channel", WeightElem::Quant(Elem::Int8), |rows, _| Scales::PerRow(vec![0.01; rows])),
    ("int4-g128", "Int4", WeightElem::Quant(Elem::U4), group),
    ("int8-g128", "Int8Group", WeightElem::Quant(Elem::U8), group),
];

fn e8m0(rows: usize, cols: usize) -> Scales {
    Scales::E8m0(vec![120; rows * cols / 32].into())
}

fn group(rows: usize, cols: usize) -> Scales {
    let values = vec![1.0 / 128.0; rows * cols / 128];
    Scales::Group { size: 128, ty: HalfType::Bf16, values, zero_points: None, g_idx: None }
}

fn matrix(format: &Format, rows: usize, cols: usize) -> WeightMatrix {
    let (_, _, elem, scales) = *format;
    let codes: Vec<u8> = match elem {
        WeightElem::Bf16 => (0..rows * cols).flat_map(|i| [(i * 7) as u8, 0x3c]).collect(),
        _ => (0..rows * cols * elem.bits() / 8).map(|i| (i * 37) as u8 & 0x77).collect(),
    };
    WeightMatrix { rows, cols, elem, codes: Bytes::from(codes), scales: scales(rows, cols) }
}

/// A layer's weights, the same for all experts, and their oracle.
pub fn weights(format: &Format, config: &MoeConfig) -> (&'static DynOracle, MoeWeights) {
    let oracle = ORACLES.iter().find(|o| o.alias == format.1).expect("an alias of the table");
    let (h, i) = (config.hidden, config.intermediate);
    let expert = ExpertWeights {
        gate: Some(matrix(format, i, h)),
        up: matrix(format, i, h),
        down: matrix(format, h, i),
        gate_bias: None,
        up_bias: None,
        down_bias: None,
        input_scale: None,
        down_input_scale: None,
    };
    let weights = MoeWeights {
        scheme: oracle.scheme,
        weight_key: QuantKey::from_bits(oracle.weight),
        activation_key: QuantKey::from_bits(oracle.activation),
        experts: vec![expert; config.experts],
    };
    (oracle, weights)
}

/// Short measurements: there are many formats, and these figures are for changes of the code.
pub fn quick() -> Criterion {
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500))
}
