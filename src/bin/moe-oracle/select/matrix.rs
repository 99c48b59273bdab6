//! `select --matrix`: what the table says is supported, in Markdown. The README holds a copy, which a test compares.

use super::key_name;
use crate::failure::{Out, Outcome};
use moe_oracle::config::{Activation, ActivationFormat, InputType};
use moe_oracle::oracle::{Device, DynOracle, ExpertsKind, KernelInfo, Numerics, ORACLES, SUPPORT};
use moe_oracle::scheme::Scheme;

/// Writes the matrix.
pub fn run() -> Outcome {
    let mut out = Out::new();
    out.line("| scheme | backend | runs on | keys | hidden states | activations | formats | numerics |")?;
    out.line("|---|---|---|---|---|---|---|---|")?;
    for (scheme, kernel) in SUPPORT {
        out.line(format_args!(
            "| {scheme} | `{}` | {} | {} | {} | {} | {} | {} |",
            kernel.name,
            format_args!("{}{}", device(kernel), if kernel.by_name_only { "; by name only" } else { "" }),
            keys(*scheme, kernel),
            names(InputType::ALL.iter().filter(|t| kernel.reads(**t)).map(|t| t.name())),
            some(&Activation::ALL, |a| kernel.computes(*a), |a| a.name()),
            some(&ActivationFormat::ALL, |f| kernel.takes(*f), |f| f.name()),
            match kernel.numerics {
                Numerics::WeightOnly => "activations stay exact",
                Numerics::Mixed => "activations exact for few tokens, else quantised as keyed",
                Numerics::AsKeyed => "activations quantised as keyed",
                Numerics::Int8Block => "activations rounded to int8 per 32 values",
            },
        ))?;
    }
    out.line("")?;
    out.line("| scheme | weight key | activation key: oracle |")?;
    out.line("|---|---|---|")?;
    for scheme in Scheme::ALL {
        let oracles = || ORACLES.iter().filter(|o| o.scheme == scheme);
        for (i, first) in oracles().enumerate() {
            // One line per weight key, where it comes first.
            if oracles().take(i).all(|o| o.weight != first.weight) {
                let pair = |o: &DynOracle| format!("{}: `{}`", key_name(o.activation), o.alias);
                let pairs: Vec<_> = oracles().filter(|o| o.weight == first.weight).map(pair).collect();
                out.line(format_args!("| {scheme} | {} | {} |", key_name(first.weight), pairs.join("; ")))?;
            }
        }
    }
    out.flush()
}

fn device(kernel: &KernelInfo) -> String {
    match (kernel.device, kernel.experts) {
        (Device::Cpu, ExpertsKind::Simd | ExpertsKind::SimdInt8) => "CPU: portable, AVX2, AVX-512".into(),
        (Device::Cpu, _) => "CPU".into(),
        (Device::Cuda { min, max }, _) if min == max => format!("NVIDIA, compute capability {}.{}", min / 10, min % 10),
        (Device::Cuda { min, .. }, _) => format!("NVIDIA, compute capability {}.{} up", min / 10, min % 10),
    }
}

/// The oracles whose keys a kernel takes.
fn keys(scheme: Scheme, kernel: &KernelInfo) -> String {
    let oracles: Vec<_> = ORACLES.iter().filter(|o| o.scheme == scheme).collect();
    some(&oracles, |o| kernel.pairs.contains(&(o.weight, o.activation)), |o| o.alias)
}

/// The names of those that are in; of a long list that is complete only how many.
fn some<T>(all: &[T], is_in: impl Fn(&T) -> bool, name: impl Fn(&T) -> &'static str) -> String {
    if all.len() > 2 && all.iter().all(&is_in) {
        return format!("all {}", all.len());
    }
    names(all.iter().filter(|t| is_in(t)).map(name))
}

fn names(of: impl Iterator<Item = &'static str>) -> String {
    of.collect::<Vec<_>>().join(", ")
}
