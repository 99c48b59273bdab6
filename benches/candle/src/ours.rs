//! The layer in this crate, chosen as an engine would.

use crate::weights::{GROUP, Matrix, Weights};
use crate::{Call, Format};
use moe_oracle::config::{InputType, MoeConfig};
use moe_oracle::cpu::{Experts, ThreadPool};
use moe_oracle::kernel::{MoeKernel, Rows, RowsMut, Standard};
use moe_oracle::oracle::{MoeBackend, ORACLES, SelectInputs};
use moe_oracle::platform::Platform;
use moe_oracle::scheme::{Elem, QuantKey};
use moe_oracle::weights::{ExpertWeights, HalfType, MoeWeights, Scales, WeightElem, WeightMatrix};
use std::error::Error;

pub struct Layer {
    kernel: MoeKernel<Standard, Box<dyn Experts>>,
    workspace: Vec<u8>,
    pool: ThreadPool,
}

fn matrix(format: Format, m: Matrix) -> WeightMatrix {
    let (elem, codes): (_, Vec<u8>) = match format {
        // u8 with 128 for zero
        Format::Int8 => (Elem::U8, m.codes.iter().map(|c| c ^ 0x80).collect()),
        // The first of two in the low bits
        Format::Int4 => (Elem::U4, m.codes.chunks_exact(2).map(|c| c[0] | c[1] << 4).collect()),
    };
    let values = m.scales.iter().map(|s| s.to_f32()).collect();
    let scales = Scales::Group { size: GROUP, ty: HalfType::F16, values, zero_points: None, g_idx: None };
    WeightMatrix { rows: m.rows, cols: m.cols, elem: WeightElem::Quant(elem), codes: codes.into(), scales }
}

impl Layer {
    pub fn new(weights: Weights, threads: usize, backend: &str) -> Result<Self, Box<dyn Error>> {
        let (s, format) = (weights.sizes, weights.format);
        let config = MoeConfig { input: InputType::F32, ..MoeConfig::new(s.experts, s.topk, s.hidden, s.intermediate) };
        let alias = if format == Format::Int8 { "Int8Group" } else { "Int4G32" };
        let oracle = ORACLES.iter().find(|o| o.alias == alias).ok_or("the crate has no such oracle")?;
        let expert = |[gate, up, down]: [Matrix; 3]| ExpertWeights {
            gate: Some(matrix(format, gate)),
            up: matrix(format, up),
            down: matrix(format, down),
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
            experts: weights.experts.into_iter().map(expert).collect(),
        };
        let platform = Platform::cpu();
        let backend = MoeBackend::by_name(backend).ok_or("the crate has no such backend")?;
        let choice = oracle.select(&config, &platform, &SelectInputs::named(backend))?;
        let quant = oracle.quant_config(&config, &weights)?;
        let experts = oracle.convert(choice, &config, &platform, weights)?.into_experts(&config, quant)?;
        let kernel = MoeKernel::new(experts, &config, None)?;
        Ok(Self { kernel, workspace: Vec::new(), pool: ThreadPool::new(threads)? })
    }

    pub fn forward(&mut self, call: &Call) -> Result<Vec<f32>, Box<dyn Error>> {
        let need = self.kernel.workspace_bytes(call.x.len() / self.kernel.config().hidden);
        if self.workspace.len() < need {
            self.workspace.resize(need, 0);
        }
        let mut y = vec![0f32; call.x.len()];
        let (x, out) = (Rows::F32(&call.x), RowsMut::F32(&mut y));
        self.kernel.forward(x, &call.ids, &call.weights, out, &mut self.workspace, &self.pool)?;
        Ok(y)
    }
}
