//! Edits of JSON.

use crate::base::BASES;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use serde_json::{Value, json};

/// One edit of a JSON file. Nodes count in document order, round and round.
#[derive(Arbitrary, Debug)]
pub enum Edit {
    /// Another value.
    Set(u16, Pick),
    /// Gone, or null where it is the root or in a list.
    Remove(u16),
    /// A node of any base's configs in its place: right kinds in wrong places.
    Graft(u16, u8, u16),
    /// A key of any base's configs, with its value, joins the object at or above the node.
    Join(u16, u8, u16),
    /// The whole object of one name becomes that of another base: another quantisation, say.
    Swap(u8, u16),
    /// Nested deeply.
    Deep(u16, u16),
}

/// Values that config readers may stumble over.
#[derive(Arbitrary, Debug)]
pub enum Pick {
    Null,
    Bool(bool),
    Small(i8),
    Number(i64),
    Unsigned(u64),
    Float(f64),
    Power(u8, i8),
    Text(String),
    Word(u8),
    EmptyList,
    EmptyObject,
    List(Vec<i16>),
    Regex(Vec<u8>),
}

const WORDS: [&str; 40] = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "deepseek_v2",
    "deepseek_v3",
    "kimi_k2",
    "glm4_moe",
    "llama4",
    "gpt_oss",
    "gemma4",
    "nemotron_h",
    "silu",
    "gelu",
    "gelu_pytorch_tanh",
    "relu2",
    "bfloat16",
    "float16",
    "float32",
    "fp8",
    "compressed-tensors",
    "modelopt",
    "gptq",
    "awq",
    "mxfp4",
    "float-quantized",
    "int-quantized",
    "pack-quantized",
    "mxfp8-quantized",
    "tensor",
    "channel",
    "group",
    "block",
    "token",
    "static",
    "softmax",
    "greedy",
    "group_limited_greedy",
    "NVFP4",
    "MXFP8",
];

impl Pick {
    fn value(&self) -> Value {
        match self {
            Pick::Null => Value::Null,
            Pick::Bool(b) => json!(b),
            Pick::Small(n) => json!(n),
            Pick::Number(n) => json!(n),
            Pick::Unsigned(n) => json!(n),
            Pick::Float(f) => json!(f),
            Pick::Power(p, d) => json!(1i64.wrapping_shl(u32::from(*p)).wrapping_add(i64::from(*d))),
            Pick::Text(s) => json!(s),
            Pick::Word(i) => json!(WORDS[usize::from(*i) % WORDS.len()]),
            Pick::EmptyList => json!([]),
            Pick::EmptyObject => json!({}),
            Pick::List(v) => json!(v),
            Pick::Regex(bytes) => {
                const PARTS: [&str; 20] = [
                    ".*", "\\d+", "[0-9]", "(", ")", "|", "+", "*", "?", "^", "$", "\\.", "model", "layers", "experts",
                    "_proj", "(?:", "a", "[^a]", "0",
                ];
                json!(format!("re:{}", bytes.iter().map(|b| PARTS[usize::from(*b) % PARTS.len()]).collect::<String>()))
            }
        }
    }
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Object(m) => m.values().map(count).sum(),
        Value::Array(v) => v.iter().map(count).sum(),
        _ => 0,
    }
}

/// The node, which must be below `count`.
fn node<'a>(value: &'a mut Value, at: &mut usize) -> Option<&'a mut Value> {
    if *at == 0 {
        return Some(value);
    }
    *at -= 1;
    match value {
        Value::Object(m) => m.values_mut().find_map(|v| node(v, at)),
        Value::Array(v) => v.iter_mut().find_map(|v| node(v, at)),
        _ => None,
    }
}

fn with_node(value: &mut Value, at: u16, f: impl FnOnce(&mut Value)) {
    let mut at = usize::from(at) % count(value);
    if let Some(n) = node(value, &mut at) {
        f(n);
    }
}

fn remove(value: &mut Value, at: &mut usize) -> bool {
    let Value::Object(m) = value else { return false };
    let mut found = None;
    for (key, v) in m.iter_mut() {
        if *at == 0 {
            found = Some(key.clone());
            break;
        }
        *at -= 1;
        if remove(v, at) {
            return true;
        }
    }
    match found {
        Some(key) => m.remove(&key).is_some(),
        None => false,
    }
}

fn pick(base: u8) -> Value {
    BASES[usize::from(base) % BASES.len()].0.configs.iter().map(|c| c.1.clone()).next().unwrap_or_default()
}

impl Edit {
    /// Applies it.
    pub fn apply(&self, value: &mut Value) {
        match self {
            Edit::Set(at, new) => with_node(value, *at, |n| *n = new.value()),
            Edit::Remove(at) => {
                let mut left = usize::from(*at) % count(value);
                if !remove(value, &mut left) {
                    with_node(value, *at, |n| *n = Value::Null);
                }
            }
            Edit::Graft(at, base, from) => {
                with_node(&mut pick(*base), *from, |new| with_node(value, *at, |n| *n = new.take()));
            }
            Edit::Join(at, base, from) => {
                let mut other = pick(*base);
                let mut taken = None;
                with_node(&mut other, *from, |n| {
                    if let Value::Object(m) = n {
                        let i = usize::from(*from) % m.len().max(1);
                        taken = m.iter().nth(i).map(|(k, v)| (k.clone(), v.clone()));
                    }
                });
                with_node(value, *at, |n| {
                    if let (Value::Object(m), Some((key, new))) = (n, taken) {
                        m.insert(key, new);
                    }
                });
            }
            Edit::Swap(base, which) => {
                let other = pick(*base);
                const KEYS: [&str; 4] = ["quantization_config", "model_type", "text_config", "hidden_act"];
                let key = KEYS[usize::from(*which) % KEYS.len()];
                match (value, other.get(key)) {
                    (Value::Object(m), Some(new)) => drop(m.insert(key.into(), new.clone())),
                    (Value::Object(m), None) => drop(m.remove(key)),
                    _ => {}
                }
            }
            // The parser stops at 128 levels; a little more shows that it does.
            Edit::Deep(at, depth) => with_node(value, *at, |n| {
                for _ in 0..depth % 160 {
                    let inner = n.take();
                    *n = match depth % 2 {
                        0 => Value::Array(vec![inner]),
                        _ => Value::Object([("text_config".to_owned(), inner)].into_iter().collect()),
                    };
                }
            }),
        }
    }
}

/// Replaces bytes of a text by others.
#[derive(Arbitrary, Debug)]
pub struct Splice {
    at: u16,
    length: u8,
    new: Vec<u8>,
}

impl Splice {
    /// Applies it within the first `range` bytes.
    pub fn apply(&self, bytes: &mut Vec<u8>, range: usize) {
        let from = usize::from(self.at) % bytes.len().min(range).max(1);
        let from = from.min(bytes.len());
        let to = (from + usize::from(self.length)).min(bytes.len());
        bytes.splice(from..to, self.new.iter().copied());
    }
}
