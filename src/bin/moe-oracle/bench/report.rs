//! Results as JSON and as a table.

use super::measure::Timed;
use super::weights::Format;
use crate::failure::{Out, Outcome};
use crate::limits::Limits;
use crate::presets::Preset;
use moe_oracle::oracle::DynOracle;
use moe_oracle::scheme::QuantKey;
use serde::Serialize;

/// Everything of one run.
#[derive(Serialize)]
pub struct Report {
    /// Where it ran.
    pub machine: Machine,
    /// What that machine can do at best, measured in the same run.
    pub limits: Limits,
    /// One per format and number of tokens.
    pub rows: Vec<Row>,
}

/// The machine of a run.
#[derive(Serialize)]
pub struct Machine {
    /// The processor.
    pub cpu: String,
    /// Cores that the process may use.
    pub cores: usize,
    /// The instruction set that kernels use.
    pub isa: &'static str,
}

/// One measurement.
#[derive(Serialize)]
pub struct Row {
    /// The layer.
    pub preset: &'static str,
    /// The weight format, as `--scheme` names it.
    pub scheme: &'static str,
    /// Its key.
    pub weight_key: Option<&'static str>,
    /// What it asks of activations.
    pub activation_key: Option<&'static str>,
    /// What served it.
    pub backend: &'static str,
    /// Where.
    pub device: &'static str,
    /// Threads.
    pub threads: usize,
    /// Tokens per call.
    pub tokens: usize,
    /// Mean number of different experts per call.
    pub distinct_experts: f64,
    /// Median time of a call.
    pub us: f64,
    /// The least that the machine's limits allow.
    pub floor_us: f64,
    /// `us / floor_us`
    pub ratio: f64,
    /// Bytes of used experts over the time.
    pub gbps: f64,
    /// Operations over the time.
    pub gflops: f64,
}

/// Keeps three decimals: nothing beyond them is real.
fn rounded(x: f64) -> f64 {
    (x * 1e3).round() / 1e3
}

impl Row {
    /// Sets a time against the limits. `expert_bytes` is what the use of one expert must read.
    pub fn new(
        preset: &'static Preset,
        format: &Format,
        oracle: &DynOracle,
        backend: &'static str,
        limits: &Limits,
        expert_bytes: usize,
        timed: Timed,
    ) -> Self {
        let matrices = if preset.activation.gated() { 3 } else { 2 };
        let bytes = timed.distinct_experts * expert_bytes as f64;
        let flops = (2 * timed.tokens * preset.topk * matrices * preset.hidden * preset.intermediate) as f64;
        let floor_us = limits.floor_us(bytes, flops);
        let key = |bits| QuantKey::from_bits(bits).map(QuantKey::name);
        Self {
            preset: preset.name,
            scheme: format.name,
            weight_key: key(oracle.weight),
            activation_key: key(oracle.activation),
            backend,
            device: "cpu",
            threads: timed.threads,
            tokens: timed.tokens,
            distinct_experts: rounded(timed.distinct_experts),
            us: rounded(timed.us),
            floor_us: rounded(floor_us),
            ratio: rounded(timed.us / floor_us),
            gbps: rounded(bytes / timed.us / 1e3),
            gflops: rounded(flops / timed.us / 1e3),
        }
    }
}

/// The table for people.
pub fn print(out: &mut Out, preset: &Preset, report: &Report, notes: &[String]) -> Outcome {
    let (m, l, p) = (&report.machine, &report.limits, preset);
    out.line(format_args!("{}, {} cores, {}", m.cpu, m.cores, m.isa))?;
    out.line(format_args!(
        "limits with {} threads: {:.1} GB/s read, {:.0} GFLOP/s float32",
        l.threads, l.read_gbps, l.f32_gflops
    ))?;
    out.line(format_args!(
        "{} ({}): hidden {}, intermediate {}, {} of {} experts, {}{}",
        p.name,
        p.source,
        p.hidden,
        p.intermediate,
        p.topk,
        p.experts,
        p.activation.name(),
        if p.bias { ", biases" } else { "" }
    ))?;
    notes.iter().try_for_each(|n| out.line(format_args!("note: {n}")))?;
    out.line("")?;
    out.line(format_args!(
        "{:<12} {:<14} {:>6} {:>8} {:>12} {:>12} {:>7} {:>8} {:>9}",
        "scheme", "backend", "tokens", "experts", "us", "floor us", "ratio", "GB/s", "GFLOP/s"
    ))?;
    for r in &report.rows {
        out.line(format_args!(
            "{:<12} {:<14} {:>6} {:>8.1} {:>12.1} {:>12.1} {:>7.2} {:>8.1} {:>9.1}",
            r.scheme, r.backend, r.tokens, r.distinct_experts, r.us, r.floor_us, r.ratio, r.gbps, r.gflops
        ))?;
    }
    Ok(())
}
