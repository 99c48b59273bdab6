//! `doctor`: what this machine offers, what it lacks, and what to do about it.

mod gpu;

use crate::failure::{Out, Outcome};
use crate::{limits, machine};
use gpu::Gpu;
use moe_oracle::platform::CpuIsa;
use std::collections::BTreeMap;

/// Options of `doctor`.
#[derive(clap::Args)]
pub struct Args {
    /// Answer in JSON
    #[arg(long)]
    json: bool,
}

#[derive(serde::Serialize)]
struct Report {
    version: &'static str,
    cpu: String,
    cores: usize,
    isa: &'static str,
    features: BTreeMap<&'static str, bool>,
    memory_available: Option<usize>,
    transparent_huge_pages: Option<String>,
    read_gbps_one_thread: f64,
    read_gbps_all_threads: f64,
    gpu: Gpu,
    advice: Vec<String>,
}

fn advice(isa: CpuIsa, thp: Option<&str>, gpu: &Gpu) -> Vec<String> {
    let mut advice = Vec::new();
    if isa == CpuIsa::Portable {
        advice.push(
            "The processor (or the virtual machine's CPU model) lacks AVX2, FMA or F16C: kernels run without vector \
             instructions of their own; give the virtual machine the host's CPU model if there is one."
                .into(),
        );
    }
    if thp == Some("never") {
        advice.push(
            "Transparent huge pages are off, so that large weights cost address translations: write `madvise` or \
             `always` to /sys/kernel/mm/transparent_hugepage/enabled."
                .into(),
        );
    }
    advice.extend(gpu.advice());
    advice
}

/// Runs the command.
pub fn run(args: Args) -> Outcome {
    let (isa, cores, gpu) = (CpuIsa::detect(), machine::cores(), Gpu::look());
    let thp = machine::transparent_huge_pages();
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        cpu: machine::cpu_model(),
        cores,
        isa: isa.name(),
        features: machine::features().into_iter().collect(),
        memory_available: machine::memory_available(),
        read_gbps_one_thread: limits::read_gbps(1)?,
        read_gbps_all_threads: limits::read_gbps(cores)?,
        advice: advice(isa, thp.as_deref(), &gpu),
        transparent_huge_pages: thp,
        gpu,
    };
    let mut out = Out::new();
    if args.json {
        out.json(&report)?
    } else {
        print(&mut out, &report)?
    }
    out.flush()
}

fn print(out: &mut Out, r: &Report) -> Outcome {
    let pick = |has: bool| {
        let names: Vec<_> = r.features.iter().filter(|f| *f.1 == has).map(|f| *f.0).collect();
        if names.is_empty() { "none".into() } else { names.join(" ") }
    };
    let gib = |bytes: usize| format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64);
    let mut rows = vec![
        ("moe-oracle", r.version.to_string()),
        ("processor", r.cpu.clone()),
        ("cores", r.cores.to_string()),
        ("has", pick(true)),
        ("lacks", pick(false)),
        ("kernels use", r.isa.to_string()),
        ("free memory", r.memory_available.map_or("unknown".into(), gib)),
        ("huge pages", r.transparent_huge_pages.clone().unwrap_or("unknown".into())),
        ("read, 1 thread", format!("{:.1} GB/s", r.read_gbps_one_thread)),
        ("read, all", format!("{:.1} GB/s", r.read_gbps_all_threads)),
    ];
    rows.extend(r.gpu.rows());
    for (name, value) in rows {
        out.line(format_args!("{name:<15} {value}"))?;
    }
    r.advice.iter().try_for_each(|a| out.line(format_args!("- {a}")))
}
