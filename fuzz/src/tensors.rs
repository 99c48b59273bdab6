//! Edits of safetensors files.

use crate::base::{BASES, Tensor, bits};
use crate::config::Splice;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use serde_json::{Map, Value, json};

/// What a safetensors file holds.
pub struct File(pub Vec<Tensor>);

/// One edit. Tensors count in the file's order, round and round.
#[derive(Arbitrary, Debug)]
pub enum Edit {
    Remove(u8),
    /// Takes another tensor's name.
    Rename(u8, u8),
    /// Its name ends otherwise.
    Suffix(u8, u8),
    /// A number in its name changes: another expert or layer.
    Renumber(u8, u8),
    Dtype(u8, u8),
    Dimension(u8, u8, u64),
    /// By a little.
    Nudge(u8, u8, i8),
    Transpose(u8),
    Scalar(u8, bool),
    /// Adds or removes a dimension of one.
    Rank(u8, bool),
    Fill(u8, u8),
    Bytes(u8, u16, Vec<u8>),
    /// Another base's tensor of about this place under this name.
    Graft(u8, u8, u8),
    /// Another base's tensor beside it.
    Join(u8, u8),
}

/// What spoils the file as a whole, after the rest.
#[derive(Arbitrary, Debug)]
pub enum Damage {
    None,
    /// Bytes of the header or of the first data.
    Header(Vec<Splice>),
    Cut(u32),
    Longer(u8),
    Length(u64),
    /// A tensor's offsets no longer match.
    Offsets(u8, i16, i16),
}

const DTYPES: [&str; 16] = [
    "BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "I8", "U8", "I16", "I32", "I64",
    "BOOL", "Q4",
];

const SUFFIXES: [&str; 24] = [
    "weight",
    "bias",
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "weight_packed",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "weight_global_scale",
    "input_scale",
    "input_global_scale",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "gate_up_proj_blocks",
    "gate_up_proj_scales",
    "down_proj_bias",
    "gate_up_proj_bias",
    "e_score_correction_bias",
    "per_expert_scale",
    "scale",
    "pre_quant_scale",
];

/// Larger tensors would test the machine's memory, not the reader.
const LARGEST: u64 = 4 << 20;

impl Tensor {
    /// The bytes that type and shape need, if they are few enough to write.
    fn size(&self) -> Option<usize> {
        let elements = self.shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d))?;
        let bytes = elements.checked_mul(bits(&self.dtype))?.div_ceil(8);
        (bytes <= LARGEST).then_some(bytes as usize)
    }

    /// Repeats or cuts the data, so that header and data agree.
    fn fit(&mut self) {
        if let Some(size) = self.size() {
            if self.data.is_empty() {
                self.data.push(0x3c);
            }
            let cycle = self.data.len();
            let data = (self.data.len()..size).map(|i| self.data[i % cycle]).collect::<Vec<u8>>();
            self.data.extend(data);
            self.data.truncate(size);
        }
    }
}

impl File {
    /// Applies an edit. With `fit` the file stays consistent in itself, where its tensors have a size that can be
    /// written.
    pub fn edit(&mut self, edit: &Edit, fit: bool) {
        let n = self.0.len();
        if n == 0 {
            return;
        }
        let of = |t: &u8| usize::from(*t) % n;
        let mut touched = None;
        match edit {
            Edit::Remove(t) => drop(self.0.remove(of(t))),
            Edit::Rename(t, to) => self.0[of(t)].name = self.0[of(to)].name.clone(),
            Edit::Suffix(t, s) => {
                let name = &mut self.0[of(t)].name;
                name.truncate(name.rfind('.').map_or(0, |i| i + 1));
                name.push_str(SUFFIXES[usize::from(*s) % SUFFIXES.len()]);
            }
            Edit::Renumber(t, number) => {
                let name = &mut self.0[of(t)].name;
                let parts = name.split('.').map(|p| match p.parse::<u32>() {
                    Ok(_) if number % 2 == 0 => (number / 2).to_string(),
                    _ => p.to_owned(),
                });
                *name = parts.collect::<Vec<_>>().join(".");
            }
            Edit::Dtype(t, d) => {
                self.0[of(t)].dtype = DTYPES[usize::from(*d) % DTYPES.len()].into();
                touched = Some(of(t));
            }
            Edit::Dimension(t, i, new) => {
                touched = self.dimension(of(t), *i, |d| *d = *new);
            }
            Edit::Nudge(t, i, by) => {
                touched = self.dimension(of(t), *i, |d| *d = d.saturating_add_signed(i64::from(*by)));
            }
            Edit::Transpose(t) => self.0[of(t)].shape.reverse(),
            Edit::Scalar(t, empty) => {
                self.0[of(t)].shape = if *empty { vec![] } else { vec![1] };
                touched = Some(of(t));
            }
            Edit::Rank(t, more) => {
                let shape = &mut self.0[of(t)].shape;
                if *more {
                    shape.push(1);
                } else {
                    shape.retain(|&d| d != 1);
                }
            }
            Edit::Fill(t, byte) => self.0[of(t)].data.fill(*byte),
            Edit::Bytes(t, at, new) => {
                let data = &mut self.0[of(t)].data;
                for (i, b) in new.iter().enumerate() {
                    let len = data.len().max(1);
                    if let Some(d) = data.get_mut((usize::from(*at) + i) % len) {
                        *d = *b;
                    }
                }
            }
            Edit::Graft(t, base, from) => {
                if let Some(other) = other(*base, *from) {
                    let name = std::mem::take(&mut self.0[of(t)].name);
                    self.0[of(t)] = Tensor { name, ..other };
                }
            }
            Edit::Join(base, from) => self.0.extend(other(*base, *from)),
        }
        if let (Some(t), true) = (touched, fit) {
            self.0[t].fit();
        }
    }

    fn dimension(&mut self, t: usize, i: u8, f: impl FnOnce(&mut u64)) -> Option<usize> {
        let shape = &mut self.0[t].shape;
        let i = usize::from(i) % shape.len().max(1);
        f(shape.get_mut(i)?);
        Some(t)
    }

    /// The file, spoilt as asked.
    pub fn bytes(&self, damage: &Damage) -> Vec<u8> {
        let mut header = Map::new();
        let mut at = 0;
        for (i, e) in self.0.iter().enumerate() {
            let (mut from, mut to) = (at as i64, (at + e.data.len()) as i64);
            if let Damage::Offsets(t, a, b) = damage
                && usize::from(*t) % self.0.len() == i
            {
                (from, to) = (from.saturating_add((*a).into()), to.saturating_add((*b).into()));
            }
            header.insert(e.name.clone(), json!({"dtype": e.dtype, "shape": e.shape, "data_offsets": [from, to]}));
            at += e.data.len();
        }
        let header = Value::Object(header).to_string().into_bytes();
        let length = match damage {
            Damage::Length(n) => *n,
            _ => header.len() as u64,
        };
        let mut bytes = length.to_le_bytes().to_vec();
        let range = 8 + header.len() + 64;
        bytes.extend(header);
        self.0.iter().for_each(|e| bytes.extend_from_slice(&e.data));
        match damage {
            Damage::Header(all) => all.iter().take(4).for_each(|s| s.apply(&mut bytes, range)),
            Damage::Cut(n) => bytes.truncate(*n as usize % bytes.len()),
            Damage::Longer(n) => bytes.extend(std::iter::repeat_n(0, usize::from(*n))),
            _ => {}
        }
        bytes
    }
}

fn other(base: u8, from: u8) -> Option<Tensor> {
    let tensors = &BASES[usize::from(base) % BASES.len()].0.tensors;
    tensors.get(usize::from(from) % tensors.len()).cloned()
}
