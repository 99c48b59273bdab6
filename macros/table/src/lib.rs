//! The types of moe-oracle's table and its checks. The proc-macro crate and the build script both read the table
//! through this crate, so that they cannot disagree on it.

use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};

/// The whole table.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// The schemes, in the order of their enum.
    pub scheme: Vec<Scheme>,
    /// CUDA kernels: those that backends name, and those that no row owns: routing, quantisers, sums.
    #[serde(default)]
    pub kernel: Vec<Kernel>,
}

impl Table {
    /// What build.rs compiles, one fatbin each.
    pub fn specialisations(&self) -> Vec<Specialisation<'_>> {
        self.kernel.iter().flat_map(Kernel::specialisations).collect()
    }
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
    pub means: BTreeMap<String, String>,
    /// Names of `means` that mean another backend on NVIDIA GPUs.
    #[serde(default)]
    pub on_cuda: BTreeMap<String, String>,
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

/// A CUDA kernel: a file under kernels/ with its defines.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// `decode_half`: rows name it so.
    pub name: String,
    /// File under kernels/.
    pub file: String,
    /// `NAME=VALUE`
    #[serde(default)]
    pub define: Vec<String>,
    /// Whether it is compiled for bf16 and for f16, which its name then ends with.
    #[serde(default)]
    pub typed: bool,
    /// The only architectures that it is for, as MOE_ORACLE_CUDA_ARCHS writes them; none: all.
    #[serde(default)]
    pub archs: Vec<String>,
    /// Levels whose code is not that of the level before: 89, 120.
    #[serde(default)]
    pub own_ptx: Vec<u16>,
}

/// What becomes one fatbin.
#[derive(Clone, Debug)]
pub struct Specialisation<'a> {
    /// `decode_half_bf16`: the name by which the runtime loads it.
    pub name: String,
    /// The kernel's, and the type's.
    pub define: Vec<String>,
    /// Everything else.
    pub kernel: &'a Kernel,
}

impl Kernel {
    fn specialisations(&self) -> Vec<Specialisation<'_>> {
        let types: &[_] = if self.typed { &[("_bf16", "Bf16"), ("_f16", "F16")] } else { &[("", "")] };
        let one = |(suffix, compute): &(&str, &str)| Specialisation {
            name: format!("{}{suffix}", self.name),
            define: self
                .typed
                .then(|| format!("MOE_COMPUTE={compute}"))
                .into_iter()
                .chain(self.define.clone())
                .collect(),
            kernel: self,
        };
        types.iter().map(one).collect()
    }

    fn check(&self) -> Result<(), String> {
        let identifier = |s: &str| {
            s.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
                && s.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        };
        // The name becomes a file's name and the defines become arguments of nvcc.
        if !identifier(&self.name) {
            return Err(format!("kernel `{}`: a name is letters, digits and underscores", self.name));
        }
        let stem = self.file.strip_suffix(".cu").unwrap_or("");
        if stem.is_empty() || !stem.split('/').all(identifier) {
            return Err(format!(
                "kernel `{}`: file = \"{}\", expected a .cu file under kernels/",
                self.name, self.file
            ));
        }
        let named = |d: &&String| identifier(d.split_once('=').map_or(d.as_str(), |(name, _)| name));
        if let Some(d) = self.define.iter().find(|d| !named(d)) {
            return Err(format!("kernel `{}`: define = \"{d}\", expected NAME=VALUE", self.name));
        }
        if let Some(level) = self.own_ptx.iter().find(|level| ![89, 120].contains(level)) {
            return Err(format!("kernel `{}`: own_ptx = [{level}], expected 89 or 120", self.name));
        }
        Ok(())
    }
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
    /// Largest compute capability of a cuda row; absent: any.
    #[serde(default = "any")]
    pub max: u16,
    /// `weight_only`, `as_keyed`, `mixed` or `int8_block`
    pub numerics: String,
    /// Whether it serves only callers that name it.
    #[serde(default)]
    pub by_name_only: bool,
    /// Aliases.
    pub pairs: Which,
    /// Activation names.
    pub activations: Which,
    /// Activation formats.
    pub formats: Which,
    /// Types of hidden states.
    #[serde(default = "half_types")]
    pub inputs: Which,
    /// The CUDA kernels that it runs.
    pub kernels: Vec<String>,
}

fn any() -> u16 {
    u16::MAX
}

/// What a row reads that says nothing of it.
fn half_types() -> Which {
    Which::Some(vec!["bf16".into(), "f16".into()])
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
    table.kernel.iter().try_for_each(Kernel::check)?;
    unique("kernel", table.specialisations().iter().map(|k| k.name.as_str()))?;
    let kernels: Vec<&str> = table.kernel.iter().map(|k| k.name.as_str()).collect();
    for s in &table.scheme {
        s.check(&kernels).map_err(|e| format!("scheme `{}`: {e}", s.name))?;
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
    /// `kernels`: the names of all CUDA kernels.
    fn check(&self, kernels: &[&str]) -> Result<(), String> {
        if self.backend.is_empty() || self.pairs.is_empty() {
            return Err("needs a backend and a key pair at least".into());
        }
        unique("backend", self.backend.iter().map(|b| b.name.as_str()))?;
        let n = &self.names;
        let names = n.means.keys().chain(&n.other_hardware).chain(&n.as_auto);
        unique("name", names.map(String::as_str).chain(self.backend.iter().map(|b| b.name.as_str())))?;
        if let Some(name) = n.on_cuda.keys().find(|name| !n.means.contains_key(*name)) {
            return Err(format!(
                "`{name}` means something on NVIDIA GPUs and nothing elsewhere: it belongs to `means`"
            ));
        }
        if let Some(b) =
            n.means.values().chain(n.on_cuda.values()).find(|v| !self.backend.iter().any(|b| b.name == **v))
        {
            return Err(format!("a name means `{b}`, which is no backend of the scheme"));
        }
        let aliases: Vec<&str> = self.pairs.iter().map(|p| p.alias.as_str()).collect();
        for b in &self.backend {
            let row = || -> Result<(), String> {
                known("pairs", &b.pairs, &aliases)?;
                // Which names there are is the crate's to say, when it compiles the expansion.
                all_or_some("activations", &b.activations)?;
                all_or_some("formats", &b.formats)?;
                all_or_some("inputs", &b.inputs)?;
                if let Some(name) = b.kernels.iter().find(|name| !kernels.contains(&name.as_str())) {
                    return Err(format!("kernel `{name}` is not in the table"));
                }
                match (b.device.as_str(), b.experts.as_str()) {
                    ("cpu", "simd" | "simd_int8" | "reference") if b.min == 0 && b.kernels.is_empty() => {}
                    ("cuda", "decode" | "mma" | "wgmma" | "emulation")
                        if b.min != 0 && b.min <= b.max && !b.kernels.is_empty() => {}
                    _ => return Err("device, experts, min and kernels do not fit together".into()),
                }
                match b.numerics.as_str() {
                    "weight_only" | "as_keyed" | "mixed" => Ok(()),
                    "int8_block" if b.by_name_only => Ok(()),
                    "int8_block" => Err("rounds what no key asks to round: by_name_only must be true".into()),
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
    use super::parse;

    const CPU: &str = r#"
        [[scheme]]
        name = "x"
        oracle = "X"
        pairs = [{ alias = "A", doc = "d" }]
        [scheme.names]
        means = { cpu = "cpu_simd" }
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
    const CUDA: &str = r#"
        [[scheme.backend]]
        name = "cuda_decode"
        experts = "decode"
        device = "cuda"
        min = 80
        numerics = "weight_only"
        pairs = "all"
        activations = "all"
        formats = "all"
        kernels = ["decode"]
        [[kernel]]
        name = "decode"
        file = "decode.cu"
        define = ["WEIGHT=half", "FAST"]
        typed = true
        own_ptx = [89]
    "#;
    const ROUTING: &str = r#"
        [[kernel]]
        name = "routing"
        file = "routing.cu"
    "#;

    #[test]
    fn a_name_for_a_backend_that_is_not_there_is_refused() {
        assert!(parse(&CPU.replace(r#"cpu = "cpu_simd""#, r#"cpu = "cpu_fast""#)).unwrap_err().contains("`cpu_fast`"));
        assert!(parse(CPU).is_ok());
    }

    #[test]
    fn a_cuda_row_says_what_computes_and_from_what_capability() {
        for experts in ["decode", "mma", "wgmma", "emulation"] {
            let text = CPU.to_string() + &CUDA.replace(r#""decode""#, &format!("{experts:?}"));
            assert_eq!(parse(&text).unwrap().scheme[0].backend[1].experts, experts);
        }
        for (from, to) in [
            (r#"experts = "decode""#, r#"experts = "simd""#),
            (r#"experts = "decode""#, r#"experts = "tcgen05""#),
            ("min = 80", "min = 0"),
            ("min = 80", "min = 80\nmax = 70"),
            (r#"device = "cuda""#, r#"device = "cpu""#),
        ] {
            let error = parse(&(CPU.to_string() + &CUDA.replace(from, to))).unwrap_err();
            assert!(error.contains("`cuda_decode`") && error.contains("do not fit together"), "{to}: {error}");
        }
    }

    #[test]
    fn a_typed_kernel_is_two_specialisations() {
        let table = parse(&(CPU.to_string() + ROUTING + CUDA)).unwrap();
        let all = table.specialisations();
        let names: Vec<_> = all.iter().map(|k| k.name.as_str()).collect();
        assert_eq!(names, ["routing", "decode_bf16", "decode_f16"]);
        assert!(all[0].define.is_empty() && all[0].kernel.own_ptx.is_empty());
        assert_eq!(all[1].define, ["MOE_COMPUTE=Bf16", "WEIGHT=half", "FAST"]);
        assert_eq!((all[2].define[0].as_str(), all[2].kernel.own_ptx.as_slice()), ("MOE_COMPUTE=F16", &[89][..]));
    }

    #[test]
    fn a_row_names_kernels_that_stand_once_in_the_table() {
        let text = CPU.to_string() + CUDA;
        let error = parse(&text.replace(r#"["decode"]"#, r#"["decode_fp8"]"#)).unwrap_err();
        assert!(error.contains("`cuda_decode`") && error.contains("`decode_fp8`"), "{error}");
        assert!(parse(&(text.clone() + ROUTING + ROUTING)).unwrap_err().contains("`routing`"));
        // What the untyped one would be called.
        assert!(
            parse(&(text + &ROUTING.replace("\"routing\"", "\"decode_bf16\""))).unwrap_err().contains("`decode_bf16`")
        );
    }

    #[test]
    fn kernel_names_files_and_defines_are_safe_to_pass_on() {
        for (from, to) in [
            ("decode\"\n        file", "../decode\"\n        file"),
            ("decode\"\n        file", "\"\n        file"),
            ("decode.cu", "../decode.cu"),
            ("decode.cu", "/decode.cu"),
            ("decode.cu", "decode.cpp"),
            ("decode.cu", ".cu"),
            ("WEIGHT=half", "=1"),
            ("FAST", "-o"),
            ("[89]", "[90]"),
        ] {
            let error = parse(&(CPU.to_string() + &CUDA.replace(from, to))).unwrap_err();
            assert!(error.contains("kernel `"), "{to}: {error}");
        }
        assert!(parse(&(CPU.to_string() + &CUDA.replace("decode.cu", "moe/decode.cu"))).is_ok());
    }
}
