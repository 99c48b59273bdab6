//! The types of moe-oracle's table and its checks. The proc-macro crate and the build script both read the table
//! through this crate, so that they cannot disagree on it.

use serde::Deserialize;
use std::collections::BTreeSet;

/// The whole table.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// The schemes, in the order of their enum.
    pub scheme: Vec<Scheme>,
}

/// One quantisation scheme: one oracle.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scheme {
    /// `fp8`
    pub name: String,
    /// The oracle's type name, `Fp8`
    pub oracle: String,
    /// Legal key pairs.
    pub pairs: Vec<Pair>,
    /// User-facing names.
    pub names: Names,
    /// Backends, best first on their device.
    pub backend: Vec<Backend>,
}

/// A legal (weight, activation) pair.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pair {
    /// Type alias of the oracle with this pair.
    pub alias: String,
    /// Constant of the weight key; absent: not quantised.
    pub weight: Option<String>,
    /// Constant of the activation key; absent: not quantised.
    pub activation: Option<String>,
    /// One line.
    pub doc: String,
}

/// User-facing names of a scheme.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Names {
    /// Name to backend.
    pub means: std::collections::BTreeMap<String, String>,
    /// Names of NVIDIA kernels that have no row.
    pub gpu_only: Vec<String>,
    /// Names of other vendors' kernels.
    pub other_hardware: Vec<String>,
    /// Names that mean `auto`.
    pub as_auto: Vec<String>,
}

/// All, or these.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum Which {
    /// Must say `all`.
    All(String),
    /// Names.
    Some(Vec<String>),
}

impl Which {
    /// The names, `all` standing for `every`.
    pub fn of<'a>(&'a self, every: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
        match self {
            Which::All(_) => every.collect(),
            Which::Some(names) => names.iter().map(String::as_str).collect(),
        }
    }
}

/// A CUDA specialisation: a file under kernels/ with its defines.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// File under kernels/.
    pub file: String,
    /// `NAME=VALUE`
    #[serde(default)]
    pub define: Vec<String>,
}

/// One (scheme, backend) row.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Backend {
    /// `cpu_simd`
    pub name: String,
    /// The Rust type that computes.
    pub experts: String,
    /// `cpu` or `cuda`
    pub device: String,
    /// Smallest compute capability of a cuda row, 80 for 8.0.
    #[serde(default)]
    pub min: u16,
    /// `weight_only` or `as_keyed`
    pub numerics: String,
    /// Aliases.
    pub pairs: Which,
    /// Activation names.
    pub activations: Which,
    /// Activation formats.
    pub formats: Which,
    /// What build.rs compiles for it.
    pub kernels: Vec<Kernel>,
}

/// `cpu_simd` to `CpuSimd`.
pub fn camel(name: &str) -> String {
    let mut out = String::new();
    for part in name.split('_') {
        let mut chars = part.chars();
        out.extend(chars.next().map(|c| c.to_ascii_uppercase()));
        out.push_str(chars.as_str());
    }
    out
}

/// Parses and checks a table; the error is one sentence.
pub fn parse(text: &str) -> Result<Table, String> {
    let table: Table = toml::from_str(text).map_err(|e| e.to_string())?;
    for s in &table.scheme {
        s.check().map_err(|e| format!("scheme `{}`: {e}", s.name))?;
    }
    let aliases: Vec<&str> = table.scheme.iter().flat_map(|s| s.pairs.iter().map(|p| p.alias.as_str())).collect();
    unique("alias", aliases.into_iter())?;
    Ok(table)
}

fn unique<'a>(what: &str, names: impl Iterator<Item = &'a str>) -> Result<(), String> {
    let mut seen = BTreeSet::new();
    for n in names {
        if !seen.insert(n) {
            return Err(format!("{what} `{n}` stands twice"));
        }
    }
    Ok(())
}

fn all_or_some(what: &str, which: &Which) -> Result<(), String> {
    match which {
        Which::All(word) if word != "all" => Err(format!("{what} = \"{word}\", expected \"all\" or a list")),
        _ => Ok(()),
    }
}

fn known(what: &str, which: &Which, every: &[&str]) -> Result<(), String> {
    all_or_some(what, which)?;
    match which {
        Which::Some(names) => match names.iter().find(|n| !every.contains(&n.as_str())) {
            Some(n) => Err(format!("unknown {what} `{n}`")),
            None => Ok(()),
        },
        Which::All(_) => Ok(()),
    }
}

impl Scheme {
    fn check(&self) -> Result<(), String> {
        if self.backend.is_empty() || self.pairs.is_empty() {
            return Err("needs a backend and a key pair at least".into());
        }
        unique("backend", self.backend.iter().map(|b| b.name.as_str()))?;
        let n = &self.names;
        let names = n.means.keys().chain(&n.gpu_only).chain(&n.other_hardware).chain(&n.as_auto);
        unique("name", names.map(String::as_str).chain(self.backend.iter().map(|b| b.name.as_str())))?;
        if let Some(b) = n.means.values().find(|v| !self.backend.iter().any(|b| b.name == **v)) {
            return Err(format!("a name means `{b}`, which is no backend of the scheme"));
        }
        let aliases: Vec<&str> = self.pairs.iter().map(|p| p.alias.as_str()).collect();
        for b in &self.backend {
            let row = || -> Result<(), String> {
                known("pairs", &b.pairs, &aliases)?;
                // Which names there are is the crate's to say, when it compiles the expansion.
                all_or_some("activations", &b.activations)?;
                all_or_some("formats", &b.formats)?;
                match (b.device.as_str(), b.experts.as_str()) {
                    ("cpu", "simd" | "reference") if b.min == 0 && b.kernels.is_empty() => {}
                    ("cuda", _) if b.min != 0 && !b.kernels.is_empty() => {}
                    _ => return Err("device, experts, min and kernels do not fit together".into()),
                }
                match b.numerics.as_str() {
                    "weight_only" | "as_keyed" => Ok(()),
                    other => Err(format!("numerics = \"{other}\"")),
                }
            };
            row().map_err(|e| format!("backend `{}`: {e}", b.name))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_name_for_a_backend_that_is_not_there_is_refused() {
        let text = r#"
            [[scheme]]
            name = "x"
            oracle = "X"
            pairs = [{ alias = "A", doc = "d" }]
            [scheme.names]
            means = { cpu = "cpu_fast" }
            gpu_only = []
            other_hardware = []
            as_auto = []
            [[scheme.backend]]
            name = "cpu_simd"
            experts = "simd"
            device = "cpu"
            numerics = "weight_only"
            pairs = "all"
            activations = "all"
            formats = "all"
            kernels = []
        "#;
        assert!(super::parse(text).unwrap_err().contains("`cpu_fast`"));
        assert!(super::parse(&text.replace("cpu_fast", "cpu_simd")).is_ok());
    }
}
