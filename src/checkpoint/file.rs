//! Memory-mapped safetensors files (<https://github.com/huggingface/safetensors>), one or sharded, and their tensors.

use super::{CheckpointError, json};
use bytes::Bytes;
use safetensors::tensor::TensorInfo;
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Component, Path};

/// One tensor, its bytes mapped from the file. The header has been checked: `data` has the size that `dtype` and
/// `shape` need.
#[derive(Clone, Debug)]
pub(super) struct Tensor {
    /// Its name in the checkpoint.
    pub name: String,
    /// What an element is.
    pub dtype: Dtype,
    /// Row-major.
    pub shape: Vec<usize>,
    /// Little endian.
    pub data: Bytes,
}

impl Tensor {
    /// An error about this tensor.
    pub fn error(&self, problem: impl Into<String>) -> CheckpointError {
        CheckpointError::tensor(&self.name, problem)
    }

    /// Itself, if it is of one of these types and of exactly this shape.
    pub fn expect(&self, dtypes: &[Dtype], shape: &[usize]) -> Result<&Self, CheckpointError> {
        self.expect_type(dtypes)?;
        if self.shape != shape {
            return Err(self.error(format!("has shape {:?}, expected {shape:?}", self.shape)));
        }
        Ok(self)
    }

    /// Itself, if it is of one of these types.
    pub fn expect_type(&self, dtypes: &[Dtype]) -> Result<&Self, CheckpointError> {
        if !dtypes.contains(&self.dtype) {
            let want: Vec<_> = dtypes.iter().map(|d| format!("{d:?}")).collect();
            return Err(self.error(format!("is {:?}, expected {}", self.dtype, want.join(" or "))));
        }
        Ok(self)
    }

    /// The values as float32, all of them finite; BF16, F16 or F32.
    pub fn floats(&self) -> Result<Vec<f32>, CheckpointError> {
        self.expect_type(&FLOATS)?;
        let two = |f: fn(u16) -> f32| self.data.chunks_exact(2).map(|b| f(u16::from_le_bytes([b[0], b[1]]))).collect();
        let values: Vec<f32> = match self.dtype {
            Dtype::BF16 => two(|b| half::bf16::from_bits(b).to_f32()),
            Dtype::F16 => two(|b| half::f16::from_bits(b).to_f32()),
            _ => self.data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        };
        match values.iter().position(|v| !v.is_finite()) {
            Some(i) => Err(self.error(format!("holds {} at index {i}", values[i]))),
            None => Ok(values),
        }
    }

    /// The one value of a tensor of shape [] or [1].
    pub fn scalar(&self) -> Result<f32, CheckpointError> {
        if !matches!(self.shape[..], [] | [1]) {
            return Err(self.error(format!("has shape {:?}, expected one value ([] or [1])", self.shape)));
        }
        self.floats()?.first().copied().ok_or_else(|| self.error("is empty"))
    }

    /// The one value, which must be above zero: scales of activations and scales that divide.
    pub fn positive(&self) -> Result<f32, CheckpointError> {
        let v = self.scalar()?;
        if v > 0.0 { Ok(v) } else { Err(self.error(format!("is {v}, expected a value above zero"))) }
    }

    /// 32-bit words, little endian; the type must have been checked.
    pub fn words(&self) -> impl Fn(usize) -> u32 + '_ {
        |i| u32::from_le_bytes([self.data[4 * i], self.data[4 * i + 1], self.data[4 * i + 2], self.data[4 * i + 3]])
    }
}

/// The types of scales, biases and routers.
pub(super) const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::BF16, Dtype::F16];

/// Every tensor of a checkpoint, by name.
#[derive(Debug, Default)]
pub(super) struct Tensors {
    map: BTreeMap<String, Tensor>,
}

impl Tensors {
    /// Maps `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let single = dir.join("model.safetensors");
        let index = dir.join("model.safetensors.index.json");
        let mut tensors = Self::default();
        if single.exists() || !index.exists() {
            tensors.map = map_file(&single)?;
            return Ok(tensors);
        }
        let text = std::fs::read(&index).map_err(|e| CheckpointError::io(&index, e))?;
        let value = json::parse(&text, "model.safetensors.index.json")?;
        let root = json::Object::new(&value, "model.safetensors.index.json")?;
        let weight_map = root.required("weight_map", root.object("weight_map")?)?;
        let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, file) in weight_map.entries() {
            let file = file.as_str().ok_or_else(|| weight_map.error(tensor, "does not name a file"))?;
            shards.entry(file).or_default().push(tensor);
        }
        for (file, names) in shards {
            // An index comes from elsewhere: it must not lead out of the directory.
            let mut parts = Path::new(file).components();
            let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
            if !plain || file.contains(['/', '\\']) {
                return Err(weight_map.error(&format!("{file:?}"), "is not a plain file name"));
            }
            let mut shard = map_file(&dir.join(file))?;
            for name in names {
                let tensor = shard.remove(name).ok_or_else(|| {
                    CheckpointError::tensor(name, format!("is not in {file}, where the index has it"))
                })?;
                tensors.map.insert(name.to_owned(), tensor);
            }
        }
        Ok(tensors)
    }

    /// The tensor, which must be there.
    pub fn get(&self, name: &str) -> Result<&Tensor, CheckpointError> {
        self.find(name).ok_or_else(|| CheckpointError::tensor(name, "is not in the file"))
    }

    /// The tensor, if it is there.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.map.get(name)
    }

    /// Every name, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.map.keys().map(String::as_str)
    }

    /// The names that begin with `prefix`.
    pub fn under<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        let from = self.map.range::<str, _>((std::ops::Bound::Included(prefix), std::ops::Bound::Unbounded));
        from.map(|(k, _)| k.as_str()).take_while(move |k| k.starts_with(prefix))
    }
}

fn map_file(path: &Path) -> Result<BTreeMap<String, Tensor>, CheckpointError> {
    let io = |e| CheckpointError::io(path, e);
    let bad = |problem: String| CheckpointError::File { path: path.to_owned(), problem };
    // Opening a pipe would wait for its writer for ever: look first.
    if !std::fs::metadata(path).map_err(io)?.is_file() {
        return Err(bad("is not a file".into()));
    }
    let file = File::open(path).map_err(io)?;
    // SAFETY: the map is read-only and private to this process. That nobody cuts or rewrites the file while it is
    // mapped is the usual condition of every memory-mapped loader; the documentation of `Checkpoint` says so.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
    let bytes = Bytes::from_owner(map);
    let (header, metadata) = SafeTensors::read_metadata(&bytes).map_err(|e| match (e, misfit(&bytes)) {
        (SafeTensorError::TensorInvalidInfo | SafeTensorError::ValidationOverflow, Some(name)) => {
            CheckpointError::tensor(&name, "has a shape that needs other bytes than its data_offsets give")
        }
        (SafeTensorError::MetadataIncompleteBuffer, _) => {
            bad(format!("has {} bytes, which is not where its last tensor ends (cut short?)", bytes.len()))
        }
        (SafeTensorError::InvalidOffset(name), _) => {
            CheckpointError::tensor(&name, "has data_offsets outside of the file or of their order")
        }
        (e, _) => bad(e.to_string()),
    })?;
    let base = header.checked_add(8).filter(|&b| b <= bytes.len()).ok_or_else(|| bad("header too long".into()))?;
    let data = bytes.slice(base..);
    let mut tensors = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        let (from, to) = info.data_offsets;
        let elements = info.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let bits = elements.and_then(|n| n.checked_mul(info.dtype.bitsize()));
        // The safetensors crate has checked this; the slices below must not depend on it.
        if from > to || to > data.len() || bits != (to - from).checked_mul(8) {
            return Err(CheckpointError::tensor(&name, "has offsets that do not fit its shape or the file"));
        }
        let tensor =
            Tensor { name: name.clone(), dtype: info.dtype, shape: info.shape.clone(), data: data.slice(from..to) };
        tensors.insert(name, tensor);
    }
    Ok(tensors)
}

/// The first tensor whose shape and offsets disagree, of a header that the safetensors crate has refused without a name.
fn misfit(file: &[u8]) -> Option<String> {
    let length = u64::from_le_bytes(file.get(..8)?.try_into().ok()?);
    let end = usize::try_from(length).ok()?.checked_add(8)?;
    let header: BTreeMap<String, serde_json::Value> = serde_json::from_slice(file.get(8..end)?).ok()?;
    let fits = |info: &TensorInfo| {
        let elements = info.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
        let bytes = info.data_offsets.1.checked_sub(info.data_offsets.0)?;
        Some(elements.checked_mul(info.dtype.bitsize())? == bytes.checked_mul(8)?)
    };
    let infos = header.into_iter().filter_map(|(k, v)| Some((k, serde_json::from_value::<TensorInfo>(v).ok()?)));
    infos.into_iter().find(|(_, info)| fits(info) != Some(true)).map(|(name, _)| name)
}
