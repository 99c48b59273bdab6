//! `bench` on this machine's processor.

use super::measure;
use super::report::{self, Bounds, Machine, Report, Row};
use super::weights::{self, Format};
use super::{Args, Session};
use crate::failure::{Failure, Outcome};
use crate::limits::{Limits, Reader};
use crate::machine;
use crate::presets::Preset;
use moe_oracle::cpu::ThreadPool;
use moe_oracle::oracle::SelectInputs;
use moe_oracle::platform::{CpuIsa, Platform};

/// Measures every preset in every format with every number of tokens.
pub fn run(args: &Args, session: &mut Session) -> Outcome<Report> {
    if args.anchors.is_some() {
        return Err(Failure::said("--anchors holds what peers reach on a GPU: it goes with --device cuda"));
    }
    let threads = args.threads.map_or_else(machine::cores, usize::from);
    let pool =
        ThreadPool::new(threads).map_err(|e| Failure::said(format_args!("{threads} threads can't be started: {e}")))?;
    session.say("limits of the machine");
    let (limits, reader) = Limits::measure(&pool)?;
    session.step(1);
    let machine =
        Machine { cpu: machine::cpu_model(), cores: machine::cores(), isa: CpuIsa::detect().name().into(), gpu: None };
    let mut report = Report { machine, limits: Bounds::Cpu(limits), skew: args.skew, rows: Vec::new() };
    for preset in session.presets.clone() {
        for format in session.formats.clone() {
            format_rows(args, session, preset, format, (&pool, &reader), &mut report)?;
        }
    }
    Ok(report)
}

/// Measures one weight format with every number of tokens.
fn format_rows(
    args: &Args,
    session: &mut Session,
    preset: &'static Preset,
    format: &'static Format,
    (pool, reader): (&ThreadPool, &Reader),
    report: &mut Report,
) -> Outcome {
    let platform = Platform::cpu();
    let config = preset.config();
    let oracle = format.oracle()?;
    let kernel = oracle.select(&config, &platform, &SelectInputs::named(args.backend)).map_err(Failure::said)?;
    session.say(format!("{}: packing {}", preset.name, format.name));
    let weights = weights::make(preset, format, kernel.experts, &mut session.notes)?;
    let expert_bytes = weights::expert_bytes(&weights);
    let quant = oracle.quant_config(&config, &weights).map_err(Failure::said)?;
    let packed = oracle.convert(kernel, &config, &platform, weights).map_err(Failure::said)?;
    let layer = measure::Layer::new(packed, quant, &config, expert_bytes)?;
    session.step(1);
    let served = report::Served { preset, format, oracle, backend: kernel.name, device: "cpu".into(), expert_bytes };
    for tokens in &args.tokens {
        let tokens = *tokens as usize;
        session.say(format!("{}: {} with {tokens} tokens", preset.name, format.name));
        report.rows.push(Row::new(&served, &report.limits, layer.time(tokens, args.skew, pool, reader)?, None));
        session.step(1);
    }
    Ok(())
}
