//! `bench` on an NVIDIA GPU.

mod anchors;
mod bandwidth;
mod cold;
mod layer;

use super::report::{self, Bounds, GpuLimits, GpuMachine, GpuRow, Machine, Report, Row};
use super::weights::{self, Format};
use super::{Args, Session};
use crate::failure::{Failure, Outcome};
use crate::machine;
use crate::presets::Preset;
use anchors::Anchors;
use layer::Layer;
use moe_oracle::config::MoeConfig;
use moe_oracle::cuda::{CudaError, CudaKernel, CudaVersion, Families, GpuInfo, GpuLayerError, NOT_BUILT, Stream, Tile};
use moe_oracle::oracle::{KernelWeights, SelectInputs};

impl From<CudaError> for Failure {
    fn from(e: CudaError) -> Self {
        Failure::said(e)
    }
}

/// Why a cell of the table stays empty.
pub enum Stop {
    /// The backend does not serve it; others go on.
    Cell(String),
    /// The GPU, the driver or memory: nothing goes on.
    Run(Failure),
}

impl From<Failure> for Stop {
    fn from(e: Failure) -> Self {
        Stop::Run(e)
    }
}

impl From<CudaError> for Stop {
    fn from(e: CudaError) -> Self {
        match e {
            CudaError::Argument(_) | CudaError::SharedMemory { .. } | CudaError::NoKernel(_) => {
                Stop::Cell(e.to_string())
            }
            e => Stop::Run(Failure::said(e)),
        }
    }
}

impl From<GpuLayerError> for Stop {
    fn from(e: GpuLayerError) -> Self {
        match e {
            GpuLayerError::Cuda(e) => e.into(),
            e => Stop::Cell(e.to_string()),
        }
    }
}

/// Where and against what.
struct Bench<'a> {
    args: &'a Args,
    stream: &'a Stream,
    anchors: Option<Anchors>,
    /// What could not be measured, and why.
    refusals: Vec<String>,
}

/// Measures every preset in every format with every number of tokens.
pub fn run(args: &Args, session: &mut Session, stream: &Stream) -> Outcome<Report> {
    if args.threads.is_some() {
        return Err(Failure::said("--threads is the CPU's: it goes with --device cpu"));
    }
    if let Some(why) = NOT_BUILT {
        return Err(Failure::said(format_args!("there are no CUDA kernels in this build: {why}")));
    }
    let info = stream.gpu().info();
    let anchors = args.anchors.as_deref().map(Anchors::read).transpose()?;
    let anchors = anchors.filter(|a| {
        let same = a.are_of(&info.name);
        if !same {
            session.notes.push(format!("the anchors are of {} and left out: this is {}", a.gpu, info.name));
        }
        same
    });
    session.say("limits of the GPU");
    let limits = limits(bandwidth::read_gbps(stream)?, anchors.as_ref());
    session.step(1);
    let mut bench = Bench { args, stream, anchors, refusals: Vec::new() };
    let mut report = Report { machine: machine(info), limits: Bounds::Gpu(limits), skew: args.skew, rows: Vec::new() };
    for preset in session.presets.clone() {
        for format in session.formats.clone() {
            match bench.format_rows(session, preset, format, &mut report) {
                Ok(()) => {}
                Err(Stop::Cell(why)) => bench.refusals.push(format!("{} on {}: {why}", format.name, preset.name)),
                Err(Stop::Run(failure)) => return Err(failure),
            }
        }
    }
    if let (true, Some(first)) = (report.rows.is_empty(), bench.refusals.first()) {
        return Err(Failure::said(format_args!("nothing could be measured: {first}")));
    }
    session.notes.extend(bench.refusals.into_iter().map(|r| format!("not measured: {r}")));
    Ok(report)
}

fn machine(info: &GpuInfo) -> Machine {
    Machine {
        cpu: machine::cpu_model(),
        cores: machine::cores(),
        isa: format!("sm_{}", info.capability),
        gpu: Some(GpuMachine {
            gpu: info.name.clone(),
            multiprocessors: info.sms,
            memory_bytes: info.memory,
            l2_bytes: info.l2,
            driver: CudaVersion(info.driver).to_string(),
        }),
    }
}

/// The anchors' limits where they are known, so that ratios compare with the peers'; else what this run measured.
fn limits(measured: f64, anchors: Option<&Anchors>) -> GpuLimits {
    let known = anchors.and_then(|a| a.limits.read_gbps);
    GpuLimits {
        read_gbps: known.unwrap_or(measured),
        read_from: if known.is_some() { "anchors" } else { "measured" },
        measured_read_gbps: measured,
        bf16_tflops: anchors.and_then(|a| a.limits.bf16_tflops),
        fp8_tflops: anchors.and_then(|a| a.limits.fp8_tflops),
    }
}

impl Bench<'_> {
    /// Measures one weight format with every number of tokens.
    fn format_rows(
        &mut self,
        session: &mut Session,
        preset: &'static Preset,
        format: &'static Format,
        report: &mut Report,
    ) -> Result<(), Stop> {
        let platform = self.stream.gpu().platform();
        let config = MoeConfig { fast_accum: self.args.fast_accum, ..preset.config() };
        let oracle = format.oracle()?;
        let refused = |e: &dyn std::fmt::Display| Stop::Cell(e.to_string());
        let inputs = SelectInputs::named(self.args.backend);
        let kernel = oracle.select(&config, &platform, &inputs).map_err(|e| refused(&e))?;
        format.problem(preset).map_or(Ok(()), |why| Err(Stop::Cell(why)))?;
        session.say(format!("{}: packing {}", preset.name, format.name));
        let weights = weights::make(preset, format, kernel.experts, &mut session.notes)?;
        let expert_bytes = weights::expert_bytes(&weights);
        let packed = oracle.convert(kernel, &config, &platform, weights).map_err(|e| refused(&e))?;
        let KernelWeights::Gpu(packed) = packed else {
            return Err(Stop::Cell(format!("{} does not run on a GPU", kernel.name)));
        };
        let layer = Layer::new(self.stream, &packed, &config, expert_bytes, |kernel| self.set_families(kernel))?;
        drop(packed);
        if layer.copies() > 1 {
            session.notes.push(format!(
                "{} on {} is less than 4 times the L2 cache: {} copies take turns",
                format.name,
                preset.name,
                layer.copies()
            ));
        }
        session.step(1);
        let device = format!("cuda:{}", self.stream.gpu().info().ordinal);
        let served = report::Served { preset, format, oracle, backend: kernel.name, device, expert_bytes };
        for tokens in &self.args.tokens {
            let tokens = *tokens as usize;
            session.say(format!("{}: {} with {tokens} tokens", preset.name, format.name));
            match layer.time(self.stream, tokens, usize::from(self.args.calls), self.args.skew) {
                Ok(timed) => report.rows.push(self.row(&served, &report.limits, timed, layer.copies())),
                Err(Stop::Cell(why)) => {
                    self.refusals.push(format!("{} on {} with {tokens} tokens: {why}", format.name, preset.name));
                }
                Err(stop) => return Err(stop),
            }
            session.step(1);
        }
        Ok(())
    }

    /// As the options ask.
    fn set_families(&self, kernel: &mut CudaKernel) -> Result<(), CudaError> {
        let tile = |t: &Tile| self.args.tile.as_ref().is_some_and(|name| *name == t.tokens().to_string());
        let have = kernel.families();
        let usual = have.unwrap_or(Families::of(kernel.config()));
        let wanted = Families {
            decode_up_to: self.args.decode_up_to.unwrap_or(usual.decode_up_to),
            tile: Tile::ALL.into_iter().find(tile),
            wgmma_from: self.args.wgmma_from.unwrap_or(usual.wgmma_from),
            wgmma_tile: self.args.wgmma_tile.as_ref().and_then(|t| t.parse().ok()),
        };
        if wanted == usual { Ok(()) } else { kernel.set_families(wanted) }
    }

    fn row(&self, served: &report::Served, bounds: &Bounds, t: layer::GpuTimed, copies: usize) -> Row {
        let best = self.anchors.as_ref().and_then(|a| a.best(served.preset.name, served.format.name, t.timed.tokens));
        let gpu = GpuRow {
            host_us: report::rounded(t.host_us),
            calls: t.calls,
            copies,
            warm_share: report::rounded(t.warm_share),
            workspace_bytes: t.workspace_bytes,
            peer: best.as_ref().map(|p| p.name.to_owned()),
            peer_us: best.as_ref().map(|p| p.us),
            vs_peer: best.as_ref().map(|p| report::rounded(t.timed.us / p.us)),
            peer_ratio: best.as_ref().and_then(|p| p.ratio).map(report::rounded),
        };
        Row::new(served, bounds, t.timed, Some(gpu))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_ends_a_cell_and_want_of_memory_the_run() {
        let cell = |e: CudaError| matches!(Stop::from(e), Stop::Cell(_));
        assert!(cell(CudaError::Argument("no")));
        assert!(cell(CudaError::SharedMemory { kernel: "k", wanted: 2, most: 1 }));
        assert!(!cell(CudaError::OutOfMemory { wanted: 2, free: 1, total: 1 }));
        assert!(!cell(CudaError::NoGpu));
        let nested = GpuLayerError::from(CudaError::OutOfMemory { wanted: 2, free: 1, total: 1 });
        assert!(matches!(Stop::from(nested), Stop::Run(_)));
    }
}
