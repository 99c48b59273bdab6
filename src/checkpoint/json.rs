//! Reading `config.json`: JSON as Python writes it, and values with a name in every error.

use super::CheckpointError;
use serde_json::{Map, Value};

/// Parses JSON in which Python may have left a bare `Infinity`, `-Infinity` or `NaN`. Those become null: no value that
/// this module reads may be one of them, and a missing value is an error where it matters.
pub(super) fn parse(text: &[u8], file: &str) -> Result<Value, CheckpointError> {
    let bad = |e: serde_json::Error| CheckpointError::Config(format!("{file} is not JSON: {e}"));
    match serde_json::from_slice(text) {
        Ok(value) => Ok(value),
        Err(_) => serde_json::from_slice(&without_infinities(text)).map_err(bad),
    }
}

fn without_infinities(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut at = 0;
    let mut in_string = false;
    while let Some(&byte) = text.get(at) {
        if in_string {
            out.push(byte);
            at += 1;
            match byte {
                b'"' => in_string = false,
                // The escaped byte may be a quote: copy it without looking at it.
                b'\\' => {
                    out.extend(text.get(at));
                    at += 1;
                }
                _ => {}
            }
            continue;
        }
        let rest = &text[at..];
        if let Some(word) = ["-Infinity", "Infinity", "NaN"].into_iter().find(|w| rest.starts_with(w.as_bytes())) {
            out.extend_from_slice(b"null");
            at += word.len();
            continue;
        }
        in_string = byte == b'"';
        out.push(byte);
        at += 1;
    }
    out
}

/// A JSON object with the name that errors give it. A null counts as absent, as it does for transformers.
#[derive(Clone, Copy)]
pub(super) struct Object<'a> {
    map: &'a Map<String, Value>,
    name: &'a str,
}

impl<'a> Object<'a> {
    /// The value, which must be an object.
    pub fn new(value: &'a Value, name: &'a str) -> Result<Self, CheckpointError> {
        match value {
            Value::Object(map) => Ok(Self { map, name }),
            _ => Err(CheckpointError::Config(format!("{name} is not an object"))),
        }
    }

    /// Any value but null.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// Every entry.
    pub fn entries(&self) -> impl Iterator<Item = (&'a String, &'a Value)> {
        self.map.iter()
    }

    /// An error about one key.
    pub fn error(&self, key: &str, problem: &str) -> CheckpointError {
        CheckpointError::Config(format!("{}: {key} {problem}", self.name))
    }

    fn typed<T>(
        &self,
        key: &str,
        want: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => match read(v) {
                Some(t) => Ok(Some(t)),
                None => {
                    let mut shown = v.to_string();
                    if shown.len() > 60 {
                        shown = format!("{}...", shown.chars().take(60).collect::<String>());
                    }
                    Err(self.error(key, &format!("is {shown}, expected {want}")))
                }
            },
        }
    }

    /// A string.
    pub fn str(&self, key: &str) -> Result<Option<&'a str>, CheckpointError> {
        self.typed(key, "a string", Value::as_str)
    }

    /// A truth value.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, CheckpointError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A whole number from 0 to `max`.
    pub fn count(&self, key: &str, max: usize) -> Result<Option<usize>, CheckpointError> {
        let read = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n <= max);
        self.typed(key, &format!("a whole number from 0 to {max}"), read)
    }

    /// A whole number, possibly negative.
    pub fn int(&self, key: &str) -> Result<Option<i64>, CheckpointError> {
        self.typed(key, "a whole number", Value::as_i64)
    }

    /// A number that is finite in float32.
    pub fn float(&self, key: &str) -> Result<Option<f32>, CheckpointError> {
        let read = |v: &Value| v.as_f64().map(|x| x as f32).filter(|x| x.is_finite());
        self.typed(key, "a finite number", read)
    }

    /// An object within.
    pub fn object(&self, key: &'a str) -> Result<Option<Object<'a>>, CheckpointError> {
        self.typed(key, "an object", |v| Object::new(v, key).ok())
    }

    /// A list of strings; absent counts as empty.
    pub fn strings(&self, key: &str) -> Result<Vec<String>, CheckpointError> {
        let read = |v: &Value| v.as_array()?.iter().map(|s| s.as_str().map(String::from)).collect::<Option<Vec<_>>>();
        Ok(self.typed(key, "a list of strings", read)?.unwrap_or_default())
    }

    /// The value, or an error that says that it is missing.
    pub fn required<T>(&self, key: &str, value: Option<T>) -> Result<T, CheckpointError> {
        value.ok_or_else(|| self.error(key, "is missing"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn infinities_outside_strings_become_null() {
        let text = br#"{"a": [0.0, Infinity, -Infinity, NaN], "b": "Infinity \" NaN"}"#;
        let value = parse(text, "x").unwrap();
        assert_eq!(value["a"], serde_json::json!([0.0, null, null, null]));
        assert_eq!(value["b"], "Infinity \" NaN");
    }
}
