//! Results as JSON and as a table.

use super::measure::Timed;
use super::weights::Format;
use crate::failure::{Out, Outcome};
use crate::limits::Limits;
use crate::presets::Preset;
use moe_oracle::oracle::DynOracle;
use moe_oracle::scheme::{QuantKey, Scheme};
use serde::Serialize;

/// Everything of one run.
#[derive(Serialize)]
pub struct Report {
    /// Where it ran.
    pub machine: Machine,
    /// What that machine can do at best.
    pub limits: Bounds,
    /// The exponent of Zipf's law by which tokens chose experts, 0 for all alike.
    pub skew: f64,
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
    /// The instruction set that kernels use; `sm_90` for a GPU's.
    pub isa: String,
    /// The GPU, where the layers ran on one.
    #[serde(flatten)]
    pub gpu: Option<GpuMachine>,
}

/// The GPU of a run.
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "a build without GPUs makes none"))]
#[derive(Serialize)]
pub struct GpuMachine {
    /// Its name.
    pub gpu: String,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Its memory.
    pub memory_bytes: usize,
    /// Its L2 cache.
    pub l2_bytes: usize,
    /// CUDA version of the driver.
    pub driver: String,
}

/// What the machine can do at best.
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "a build without GPUs makes none"))]
#[derive(Serialize)]
#[serde(untagged)]
pub enum Bounds {
    /// Measured in the same run.
    Cpu(Limits),
    /// Measured in the same run, or the anchors'.
    Gpu(GpuLimits),
}

/// A GPU's limits.
#[derive(Serialize)]
pub struct GpuLimits {
    /// Bytes per nanosecond read from memory: what floors are computed with.
    pub read_gbps: f64,
    /// Where that is from: `anchors` or `measured`.
    pub read_from: &'static str,
    /// What this run measured.
    pub measured_read_gbps: f64,
    /// 10^12 operations per second in bf16; without it, floors are memory's alone.
    pub bf16_tflops: Option<f64>,
    /// The same in fp8, or int8.
    pub fp8_tflops: Option<f64>,
}

impl GpuLimits {
    /// The least microseconds that reading `bytes` and computing `flops`, of numbers of 8 or of 16 bits, can take when they
    /// overlap fully.
    fn floor_us(&self, bytes: f64, flops: f64, eight_bits: bool) -> f64 {
        let peak = if eight_bits { self.fp8_tflops.or(self.bf16_tflops) } else { self.bf16_tflops };
        let compute = peak.map_or(0.0, |peak| flops / peak / 1e6);
        (bytes / self.read_gbps / 1e3).max(compute)
    }
}

impl Bounds {
    fn line(&self) -> String {
        match self {
            Bounds::Cpu(l) => {
                let vnni = l.int8_gops.map_or(String::new(), |peak| format!(", {peak:.0} GOP/s int8 (VNNI)"));
                let (threads, read, f32s) = (l.threads, l.read_gbps, l.f32_gflops);
                format!("limits with {threads} threads: {read:.1} GB/s read, {f32s:.0} GFLOP/s float32{vnni}")
            }
            Bounds::Gpu(l) => {
                let read = match l.read_from {
                    "measured" => format!("{:.0} GB/s read (measured)", l.read_gbps),
                    from => format!("{:.0} GB/s read ({from}; {:.0} measured now)", l.read_gbps, l.measured_read_gbps),
                };
                match l.bf16_tflops {
                    Some(peak) => {
                        let fp8 = l.fp8_tflops.map_or(String::new(), |peak| format!(", {peak:.0} fp8 and int8"));
                        format!("limits: {read}, {peak:.0} TFLOP/s bf16{fp8} (anchors)")
                    }
                    None => format!("limits: {read}; no compute floor, for that peak comes from --anchors"),
                }
            }
        }
    }
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
    pub device: String,
    /// Threads; for a GPU, those that launch.
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
    /// What only a CPU's row has.
    #[serde(flatten)]
    pub shares: Option<Shares>,
    /// What only a GPU's row has.
    #[serde(flatten)]
    pub gpu: Option<GpuRow>,
}

/// Shares of what the processor did in the same run.
#[derive(Serialize)]
pub struct Shares {
    /// Bytes per nanosecond that reads in turn with the calls reached: what the floor is computed with.
    pub read_limit_gbps: f64,
    /// Of those.
    pub read_share: f64,
    /// Of the float32 operations per time. Kernels that multiply integers can be beyond 1.
    pub f32_share: f64,
    /// Of the byte operations per time, where the processor has VNNI.
    pub int8_share: Option<f64>,
}

impl Shares {
    fn of(limits: &Limits, gbps: f64, gflops: f64) -> Self {
        let (read_share, f32_share) = (rounded(gbps / limits.read_gbps), rounded(gflops / limits.f32_gflops));
        let read_limit_gbps = rounded(limits.read_gbps);
        Self { read_limit_gbps, read_share, f32_share, int8_share: limits.int8_gops.map(|peak| rounded(gflops / peak)) }
    }
}

/// The fields of a GPU's row beside the common ones.
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "a build without GPUs makes none"))]
#[derive(Serialize)]
pub struct GpuRow {
    /// Median time that the host takes to launch a call without a graph.
    pub host_us: f64,
    /// Calls in the graph.
    pub calls: usize,
    /// Copies of the layer that took turns.
    pub copies: usize,
    /// Share of the experts' reads that the L2 cache may have answered.
    pub warm_share: f64,
    /// Workspace of a call.
    pub workspace_bytes: usize,
    /// The fastest peer in the anchors.
    pub peer: Option<String>,
    /// Its time.
    pub peer_us: Option<f64>,
    /// `us / peer_us`
    pub vs_peer: Option<f64>,
    /// The peer's time over the floor for the experts that its own routing hit: to compare with `ratio`.
    pub peer_ratio: Option<f64>,
}

/// What was measured, beside the number of tokens.
pub struct Served {
    /// The layer.
    pub preset: &'static Preset,
    /// The weight format.
    pub format: &'static Format,
    /// The oracle of its keys.
    pub oracle: &'static DynOracle,
    /// The backend's name.
    pub backend: &'static str,
    /// `cpu`, `cuda:0`
    pub device: String,
    /// What the use of one expert must read.
    pub expert_bytes: usize,
}

/// Keeps three decimals: nothing beyond them is real.
pub fn rounded(x: f64) -> f64 {
    (x * 1e3).round() / 1e3
}

impl Row {
    /// Sets a time against the limits.
    pub fn new(served: &Served, bounds: &Bounds, timed: Timed, gpu: Option<GpuRow>) -> Self {
        let Served { preset, format, oracle, backend, device, expert_bytes } = served;
        let matrices = if preset.activation.gated() { 3 } else { 2 };
        let bytes = timed.distinct_experts * *expert_bytes as f64;
        let flops = (2 * timed.tokens * preset.topk * matrices * preset.hidden * preset.intermediate) as f64;
        // Weights and activations that the keys want multiplied as they are.
        let eight = |bits| QuantKey::from_bits(bits).is_some_and(|k| k.elem_bits() == 8);
        let eight_bits =
            matches!(oracle.scheme, Scheme::Fp8 | Scheme::Int8) && eight(oracle.weight) && eight(oracle.activation);
        let key = |bits| QuantKey::from_bits(bits).map(QuantKey::name);
        let (gbps, gflops) = (bytes / timed.us / 1e3, flops / timed.us / 1e3);
        let (floor_us, shares) = match bounds {
            Bounds::Cpu(limits) => {
                let in_turn = Limits { read_gbps: timed.read_gbps.unwrap_or(limits.read_gbps), ..*limits };
                (in_turn.floor_us(bytes, flops), Some(Shares::of(&in_turn, gbps, gflops)))
            }
            Bounds::Gpu(limits) => (limits.floor_us(bytes, flops, eight_bits), None),
        };
        Self {
            preset: preset.name,
            scheme: format.name,
            weight_key: key(oracle.weight),
            activation_key: key(oracle.activation),
            backend,
            device: device.clone(),
            threads: timed.threads,
            tokens: timed.tokens,
            distinct_experts: rounded(timed.distinct_experts),
            us: rounded(timed.us),
            floor_us: rounded(floor_us),
            ratio: rounded(timed.us / floor_us),
            gbps: rounded(gbps),
            gflops: rounded(gflops),
            shares,
            gpu,
        }
    }
}

/// The tables for people, one per preset.
pub fn print(out: &mut Out, presets: &[&Preset], report: &Report, notes: &[String]) -> Outcome {
    out.line(report.machine.title())?;
    out.line(report.limits.line())?;
    notes.iter().try_for_each(|n| out.line(format_args!("note: {n}")))?;
    for p in presets {
        out.line("")?;
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
        let rows = || report.rows.iter().filter(|r| r.preset == p.name);
        out.line(match report.limits {
            Bounds::Cpu(_) => {
                format!("{COMMON_TITLE} {:>9} {:>6} {:>6} {:>6} {:>6}", "GFLOP/s", "limit", "read", "f32", "int8")
            }
            Bounds::Gpu(_) => format!(
                "{COMMON_TITLE} {:>8} {:>8} {:>6} {:>6} {:>6} {:>10} {:>9} {:>5} {:>6}  peer",
                "TFLOP/s", "host us", "calls", "copies", "warm", "workspace", "peer us", "ours/", "ratio"
            ),
        })?;
        rows().try_for_each(|r| out.line(r.line()))?;
    }
    if matches!(report.limits, Bounds::Cpu(_)) {
        out.line("")?;
        out.line(
            "limit: GB/s that reads in turn with the calls reached, of which the floor is and, as a share, `read`;",
        )?;
        out.line(
            "f32, int8: shares of the limits above; kernels that multiply integers can be beyond the float32 one",
        )?;
    }
    if matches!(report.limits, Bounds::Gpu(_)) {
        out.line("")?;
        out.line("us: a call in a graph of `calls` calls, each with its own inputs and routing; host us: to launch one eagerly;")?;
        out.line(
            "warm: share of the weights that L2 may have held; experts, bytes and floor are of the experts really hit,",
        )?;
        out.line(
            "which may be others than the peer's; the last ratio is the peer's, over the floor for the experts that it hit",
        )?;
    }
    Ok(())
}

impl Machine {
    /// What the numbers are of.
    pub fn title(&self) -> String {
        match &self.gpu {
            None => format!("{}, {} cores, {}", self.cpu, self.cores, self.isa),
            Some(g) => {
                let (l2, GpuMachine { gpu, multiprocessors, driver, .. }) = (g.l2_bytes >> 20, g);
                let gpu = format!("{gpu}, {}, {multiprocessors} multiprocessors, L2 {l2} MiB, CUDA {driver}", self.isa);
                format!("{gpu}; host {}, {} cores", self.cpu, self.cores)
            }
        }
    }
}

const COMMON_TITLE: &str = "scheme       backend        tokens  experts           us     floor us   ratio     GB/s";

impl Row {
    fn line(&self) -> String {
        let r = self;
        let common = format!(
            "{:<12} {:<14} {:>6} {:>8.1} {:>12.1} {:>12.1} {:>7.2} {:>8.1}",
            r.scheme, r.backend, r.tokens, r.distinct_experts, r.us, r.floor_us, r.ratio, r.gbps
        );
        let percent = |share: f64| format!("{:>5.0}%", 100.0 * share);
        let Some(g) = &r.gpu else {
            let shares = r.shares.as_ref().map_or(String::new(), |s| {
                let int8 = s.int8_share.map_or(format!("{:>6}", "-"), percent);
                format!(" {:>6.1} {} {} {int8}", s.read_limit_gbps, percent(s.read_share), percent(s.f32_share))
            });
            return format!("{common} {:>9.1}{shares}", r.gflops);
        };
        let ours = format!(
            "{common} {:>8.1} {:>8.1} {:>6} {:>6} {:>5.0}% {:>10}",
            r.gflops / 1e3,
            g.host_us,
            g.calls,
            g.copies,
            100.0 * g.warm_share,
            g.workspace_bytes
        );
        match (&g.peer, g.peer_us, g.vs_peer) {
            (Some(peer), Some(us), Some(vs)) => {
                let ratio = g.peer_ratio.map_or("-".into(), |r| format!("{r:.2}"));
                format!("{ours} {us:>9.1} {vs:>5.2} {ratio:>6}  {peer}")
            }
            _ => ours,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits_of_gpu(bf16_tflops: Option<f64>) -> GpuLimits {
        let fp8_tflops = bf16_tflops.map(|peak| 2.0 * peak);
        let read_from = "anchors";
        GpuLimits { read_gbps: 4000.0, read_from, measured_read_gbps: 3900.0, bf16_tflops, fp8_tflops }
    }

    fn gpu(bf16_tflops: Option<f64>) -> Bounds {
        Bounds::Gpu(limits_of_gpu(bf16_tflops))
    }

    #[test]
    fn the_floor_is_the_larger_of_memory_and_compute() {
        // 4 TB/s is 4 MB in a microsecond, 800 TFLOP/s 800 million operations.
        assert_eq!(limits_of_gpu(Some(800.0)).floor_us(40e6, 4e9, false), 10.0);
        assert_eq!(limits_of_gpu(Some(800.0)).floor_us(40e6, 16e9, false), 20.0);
        assert_eq!(limits_of_gpu(Some(800.0)).floor_us(40e6, 32e9, true), 20.0);
        assert_eq!(limits_of_gpu(None).floor_us(40e6, 16e9, true), 10.0);
        assert!(gpu(None).line().contains("no compute floor") && gpu(Some(1.0)).line().contains("3900 measured now"));
    }

    #[test]
    fn the_title_stands_over_its_columns() {
        let title = format!(
            "{:<12} {:<14} {:>6} {:>8} {:>12} {:>12} {:>7} {:>8}",
            "scheme", "backend", "tokens", "experts", "us", "floor us", "ratio", "GB/s"
        );
        assert_eq!(title, COMMON_TITLE);
    }

    #[test]
    fn a_gpus_row_has_its_fields_beside_the_common_ones() {
        let preset = Preset::by_name("tiny").unwrap();
        let format = &super::super::weights::FORMATS[0];
        let oracle = format.oracle().unwrap();
        let served = Served { preset, format, oracle, backend: "b", device: "cuda:0".into(), expert_bytes: 1_000_000 };
        let timed = || Timed { tokens: 4, threads: 1, us: 5.0, distinct_experts: 8.0, read_gbps: None };
        let extra = GpuRow {
            host_us: 7.0,
            calls: 6,
            copies: 1,
            warm_share: 0.25,
            workspace_bytes: 64,
            peer: Some("p".into()),
            peer_us: Some(10.0),
            vs_peer: Some(0.5),
            peer_ratio: Some(1.25),
        };
        let row = Row::new(&served, &gpu(Some(800.0)), timed(), Some(extra));
        assert_eq!((row.floor_us, row.ratio, row.gbps), (2.0, 2.5, 1600.0));
        assert!(row.line().ends_with(" 0.50   1.25  p") && row.line().contains(" 25% "), "{}", row.line());
        let json = serde_json::to_value(&row).unwrap();
        assert_eq!((&json["device"], &json["host_us"], &json["peer"]), (&"cuda:0".into(), &7.0.into(), &"p".into()));
        let plain = serde_json::to_value(Row::new(&served, &gpu(None), timed(), None)).unwrap();
        assert!(plain.get("host_us").is_none() && plain.get("gpu").is_none());
    }

    #[test]
    fn a_processors_row_has_its_shares_of_the_limits() {
        let limits = |int8_gops| Limits { threads: 1, read_gbps: 20.0, f32_gflops: 100.0, int8_gops };
        let shares = Shares::of(&limits(Some(400.0)), 15.0, 120.0);
        assert_eq!((shares.read_share, shares.f32_share, shares.int8_share), (0.75, 1.2, Some(0.3)));
        assert_eq!(Shares::of(&limits(None), 15.0, 120.0).int8_share, None);
        assert!(Bounds::Cpu(limits(Some(400.0))).line().ends_with(", 400 GOP/s int8 (VNNI)"));
        assert!(Bounds::Cpu(limits(None)).line().ends_with(" 100 GFLOP/s float32"));
    }

    #[test]
    fn a_processors_floor_is_of_reads_in_turn_with_the_calls() {
        let preset = Preset::by_name("tiny").unwrap();
        let format = &super::super::weights::FORMATS[0];
        let oracle = format.oracle().unwrap();
        let served = Served { preset, format, oracle, backend: "b", device: "cpu".into(), expert_bytes: 1_000_000 };
        let bounds = Bounds::Cpu(Limits { threads: 1, read_gbps: 20.0, f32_gflops: 1e6, int8_gops: None });
        let row = |read_gbps| {
            Row::new(
                &served,
                &bounds,
                Timed { tokens: 1, threads: 1, us: 1600.0, distinct_experts: 8.0, read_gbps },
                None,
            )
        };
        // 8 MB at 10 GB/s, in 1.6 ms.
        let (in_turn, first) = (row(Some(10.0)), row(None));
        let shares = in_turn.shares.unwrap();
        assert_eq!(
            (in_turn.floor_us, in_turn.ratio, shares.read_limit_gbps, shares.read_share),
            (800.0, 2.0, 10.0, 0.5)
        );
        assert_eq!((first.floor_us, first.shares.unwrap().read_share), (400.0, 0.25));
    }
}
