//! The tensors that `run` takes and gives.

use crate::failure::AnyError as Failure;
use half::{bf16, f16};
use moe_oracle::layer::LayerOutput;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::path::Path;

/// What an input file holds, widened to float32.
pub struct Input {
    /// T
    pub tokens: usize,
    /// `[T, H]`
    pub hidden: Vec<f32>,
    /// `[T, H]`
    pub router_hidden: Option<Vec<f32>>,
    /// ids and weights `[T, k]`
    pub routed: Option<(Vec<i32>, Vec<f32>)>,
}

fn find<'a>(file: &SafeTensors<'a>, name: &str) -> Option<TensorView<'a>> {
    file.tensor(name).ok()
}

fn floats(name: &str, t: &TensorView<'_>) -> Result<Vec<f32>, Failure> {
    let d = t.data();
    Ok(match t.dtype() {
        Dtype::BF16 => d.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Dtype::F16 => d.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Dtype::F32 => d.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        other => return Err(format!("`{name}` is {other:?}; BF16, F16 and F32 are read").into()),
    })
}

fn shaped(name: &str, t: &TensorView<'_>, shape: [usize; 2]) -> Result<(), Failure> {
    if t.shape() == shape {
        return Ok(());
    }
    Err(format!("`{name}` has the shape {:?}, expected {shape:?}", t.shape()).into())
}

impl Input {
    /// Reads and checks a file for a layer of this hidden size, top-k and number of experts.
    pub fn read(path: &Path, hidden: usize, topk: usize, experts: usize) -> Result<Self, Failure> {
        let in_file = |e: &dyn std::fmt::Display| Failure::from(format!("{}: {e}", path.display()));
        let bytes = std::fs::read(path).map_err(|e| in_file(&e))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| in_file(&e))?;
        Self::from(&file, hidden, topk, experts).map_err(|e| in_file(&e))
    }

    fn from(file: &SafeTensors<'_>, hidden: usize, topk: usize, experts: usize) -> Result<Self, Failure> {
        let x = find(file, "hidden_states").ok_or("has no tensor `hidden_states`")?;
        let tokens = x.shape().first().copied().unwrap_or(0);
        shaped("hidden_states", &x, [tokens, hidden])?;
        let router = find(file, "router_hidden_states");
        let router_hidden = match &router {
            None => None,
            Some(r) => {
                shaped("router_hidden_states", r, [tokens, hidden])?;
                Some(floats("router_hidden_states", r)?)
            }
        };
        let routed = match (find(file, "topk_ids"), find(file, "topk_weights")) {
            (None, None) => None,
            (Some(ids), Some(weights)) => {
                shaped("topk_ids", &ids, [tokens, topk])?;
                shaped("topk_weights", &weights, [tokens, topk])?;
                Some((integers(&ids, experts)?, floats("topk_weights", &weights)?))
            }
            _ => return Err("has only one of `topk_ids` and `topk_weights`; they go together".into()),
        };
        Ok(Self { tokens, hidden: floats("hidden_states", &x)?, router_hidden, routed })
    }
}

fn integers(t: &TensorView<'_>, experts: usize) -> Result<Vec<i32>, Failure> {
    let d = t.data();
    let ids: Vec<i64> = match t.dtype() {
        Dtype::I32 => d.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]).into()).collect(),
        Dtype::I64 => {
            d.chunks_exact(8).map(|b| i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]])).collect()
        }
        other => return Err(format!("`topk_ids` is {other:?}; I32 and I64 are read").into()),
    };
    match ids.iter().find(|id| **id < -1 || **id >= experts as i64) {
        Some(id) => Err(format!("`topk_ids` holds {id}, there are {experts} experts (-1 means none)").into()),
        None => Ok(ids.into_iter().map(|id| id as i32).collect()),
    }
}

/// Writes an answer, to a temporary neighbour first so that no half-written file is left behind.
pub fn write(path: &Path, result: &LayerOutput, hidden: usize, topk: usize) -> Result<(), Failure> {
    let tokens = result.output.len() / hidden;
    let (wide, narrow) = (vec![tokens, hidden], vec![tokens, topk]);
    let mut tensors = vec![
        ("output", TensorView::new(Dtype::F32, wide.clone(), bytemuck::cast_slice(&result.output))?),
        ("topk_ids", TensorView::new(Dtype::I32, narrow.clone(), bytemuck::cast_slice(&result.topk_ids))?),
        ("topk_weights", TensorView::new(Dtype::F32, narrow, bytemuck::cast_slice(&result.topk_weights))?),
    ];
    if let Some(shared) = &result.output_with_shared {
        tensors.push(("output_with_shared", TensorView::new(Dtype::F32, wide, bytemuck::cast_slice(shared))?));
    }
    let bytes = safetensors::serialize(tensors, None)?;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.part", std::process::id()));
    let temporary = std::path::PathBuf::from(temporary);
    let done = std::fs::write(&temporary, bytes).and_then(|()| std::fs::rename(&temporary, path));
    done.map_err(|e| {
        // What could not be written is of no use; the error that matters is the first one.
        let _ = std::fs::remove_file(&temporary);
        format!("{}: {e}", path.display()).into()
    })
}

/// The relative Frobenius error of `output` against every `output` and `output_actq*` of a file.
pub fn compare(path: &Path, output: &[f32], hidden: usize) -> Result<Vec<(String, f64)>, Failure> {
    let in_file = |e: &dyn std::fmt::Display| Failure::from(format!("{}: {e}", path.display()));
    let bytes = std::fs::read(path).map_err(|e| in_file(&e))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| in_file(&e))?;
    let mut errors = Vec::new();
    for name in file.names().into_iter().filter(|n| *n == "output" || n.starts_with("output_actq")) {
        let tensor = file.tensor(name)?;
        shaped(name, &tensor, [output.len() / hidden, hidden]).map_err(|e| in_file(&e))?;
        let want = floats(name, &tensor).map_err(|e| in_file(&e))?;
        let square = |x: f32| f64::from(x) * f64::from(x);
        let off: f64 = output.iter().zip(&want).map(|(a, b)| square(a - b)).sum();
        errors.push((name.to_owned(), (off / want.iter().copied().map(square).sum::<f64>()).sqrt()));
    }
    errors.sort_by(|a, b| a.0.cmp(&b.0));
    if errors.is_empty() {
        return Err(in_file(&"has no tensor `output` to compare with"));
    }
    Ok(errors)
}
