//! The layer as candle's quantised MoE models compute it on the CPU.

use crate::weights::{GROUP, Matrix, Weights};
use crate::{Call, Format, Sizes};
use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{Device, Module, Result, Tensor};

pub struct Layer {
    sizes: Sizes,
    experts: Vec<[QMatMul; 3]>,
}

/// ggml's blocks: a 16-bit scale, then 32 signed bytes, or 16 bytes with element j in the low and j + 16 in the high bits.
fn blocks(format: Format, m: &Matrix) -> Vec<u8> {
    let mut out = Vec::new();
    for (codes, scale) in m.codes.chunks_exact(GROUP).zip(&m.scales) {
        out.extend(scale.to_le_bytes());
        match format {
            Format::Int8 => out.extend(codes),
            Format::Int4 => out.extend(codes[..16].iter().zip(&codes[16..]).map(|(low, high)| low | high << 4)),
        }
    }
    out
}

fn matmul(format: Format, m: &Matrix) -> Result<QMatMul> {
    let ty = if format == Format::Int8 { GgmlDType::Q8_0 } else { GgmlDType::Q4_0 };
    let storage = QStorage::from_data(blocks(format, m).into(), &Device::Cpu, ty)?;
    QMatMul::from_qtensor(QTensor::new(storage, (m.rows, m.cols))?)
}

impl Layer {
    pub fn new(weights: &Weights) -> Result<Self> {
        let expert = |[gate, up, down]: &[Matrix; 3]| {
            let of = |m| matmul(weights.format, m);
            Ok([of(gate)?, of(up)?, of(down)?])
        };
        Ok(Self { sizes: weights.sizes, experts: weights.experts.iter().map(expert).collect::<Result<_>>()? })
    }

    pub fn forward(&self, call: &Call) -> Result<Vec<f32>> {
        let Sizes { topk, hidden, .. } = self.sizes;
        let tokens = call.x.len() / hidden;
        let x = Tensor::from_slice(&call.x, (tokens, hidden), &Device::Cpu)?;
        let mut y = x.zeros_like()?;
        let mut chosen: Vec<(Vec<u32>, Vec<f32>)> = vec![Default::default(); self.experts.len()];
        for (slot, (id, weight)) in call.ids.iter().zip(&call.weights).enumerate() {
            let (rows, weights) = &mut chosen[*id as usize];
            rows.push((slot / topk) as u32);
            weights.push(*weight);
        }
        for ([gate, up, down], (rows, weights)) in self.experts.iter().zip(chosen) {
            if rows.is_empty() {
                continue;
            }
            let (rows, n) = (Tensor::new(rows.as_slice(), &Device::Cpu)?, weights.len());
            let mine = x.index_select(&rows, 0)?;
            let middle = (gate.forward(&mine)?.silu()? * up.forward(&mine)?)?;
            let out = down.forward(&middle)?.broadcast_mul(&Tensor::from_vec(weights, (n, 1), &Device::Cpu)?)?;
            y = y.index_add(&rows, &out, 0)?;
        }
        y.flatten_all()?.to_vec1()
    }
}
