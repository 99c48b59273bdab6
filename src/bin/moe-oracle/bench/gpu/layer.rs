//! Timing of a layer on the GPU: a graph of calls, each with tokens, routing and outputs of its own.

use super::super::measure::Timed;
use super::super::rng::Rng;
use super::super::routing::Routing;
use super::Stop;
use super::cold::{self, Reads};
use crate::failure::Failure;
use half::bf16;
use moe_oracle::config::MoeConfig;
use moe_oracle::cuda::{CudaError, CudaKernel, DeviceBuffer, Event, GpuWeights, Graph, Stream, Tensors};
use std::time::{Duration, Instant};

/// Replays of the graph that are timed.
const REPLAYS: usize = 12;
/// How long to replay before: a GPU takes milliseconds to come up to its clock.
const WARMUP: Duration = Duration::from_millis(50);
/// The fewest eager calls whose launches are timed.
const EAGER: usize = 24;

/// A layer on the GPU, as often as it takes to be larger than the cache.
pub struct Layer {
    copies: Vec<CudaKernel>,
    expert_bytes: usize,
    cache: usize,
}

/// What came out for one number of tokens.
pub struct GpuTimed {
    /// Time and experts.
    pub timed: Timed,
    /// Median time that the host takes to launch a call without a graph.
    pub host_us: f64,
    /// Calls in the graph.
    pub calls: usize,
    /// See [`cold::warm_share`].
    pub warm_share: f64,
    /// Workspace of a call.
    pub workspace_bytes: usize,
}

/// One call's memory, but for the workspace, which the calls share in the stream's order as an engine's layers do.
struct Call {
    hidden: DeviceBuffer,
    ids: DeviceBuffer,
    weights: DeviceBuffer,
    output: DeviceBuffer,
    reads: Reads,
}

impl Call {
    fn new(
        stream: &Stream,
        c: &MoeConfig,
        tokens: usize,
        routing: &Routing,
        copy: usize,
        rng: &mut Rng,
    ) -> Result<Self, CudaError> {
        let hidden: Vec<u16> = (0..tokens * c.hidden).map(|_| bf16::from_f32(rng.signed()).to_bits()).collect();
        Ok(Self {
            hidden: DeviceBuffer::of(stream, &hidden)?,
            ids: DeviceBuffer::of(stream, &routing.ids)?,
            weights: DeviceBuffer::of(stream, &vec![1.0 / c.topk as f32; tokens * c.topk])?,
            // NaNs: what a kernel leaves unwritten shows.
            output: DeviceBuffer::of(stream, &vec![0xffffu16; hidden.len()])?,
            reads: Reads { copy, experts: routing.used().collect() },
        })
    }

    fn launch(&self, stream: &Stream, layer: &Layer, workspace: &DeviceBuffer, tokens: usize) -> Result<(), CudaError> {
        let tensors = Tensors {
            hidden: self.hidden.ptr(),
            topk_ids: self.ids.ptr(),
            topk_weights: self.weights.ptr(),
            output: self.output.ptr(),
            workspace: workspace.ptr(),
        };
        // SAFETY: the buffers are of this stream's GPU, overlap nothing, and only this stream uses them. Freeing one waits
        // for the GPU, so that none goes before the work that uses it.
        unsafe { layer.copies[self.reads.copy].forward(stream, &tensors, tokens) }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

impl Layer {
    /// Uploads the weights, several times where they are few. `expert_bytes` is what one expert's use must read; `adjust`
    /// is called for every copy.
    pub fn new(
        stream: &Stream,
        weights: &GpuWeights,
        config: &MoeConfig,
        expert_bytes: usize,
        adjust: impl Fn(&mut CudaKernel) -> Result<(), CudaError>,
    ) -> Result<Self, Stop> {
        let cache = stream.gpu().info().l2;
        let mut copies = Vec::new();
        for _ in 0..cold::copies(expert_bytes * config.local_experts, cache).max(1) {
            let mut kernel = CudaKernel::new(stream, weights, config, None)?;
            adjust(&mut kernel)?;
            copies.push(kernel);
        }
        Ok(Self { copies, expert_bytes, cache })
    }

    /// How often the layer is there.
    pub fn copies(&self) -> usize {
        self.copies.len()
    }

    /// The median time of a call with this many tokens, in graphs of at least `least` calls, with routing skewed as asked.
    pub fn time(&self, stream: &Stream, tokens: usize, least: usize, skew: f64) -> Result<GpuTimed, Stop> {
        let kernel = &self.copies[0];
        let c = kernel.config();
        let mut rng = Rng::new(tokens as u64);
        let mut routing = Routing::new(c.experts, c.topk, tokens, skew);
        let (mut calls, mut hits) = (Vec::new(), 0);
        while !cold::enough(calls.len(), tokens, least, hits * self.expert_bytes, self.cache) {
            hits += routing.draw(&mut rng);
            calls.push(Call::new(stream, c, tokens, &routing, calls.len() % self.copies.len(), &mut rng)?);
        }
        let workspace_bytes = kernel.workspace_bytes(tokens);
        let workspace = DeviceBuffer::alloc(stream.gpu(), workspace_bytes)?;

        let host_us = self.eager(stream, &calls, &workspace, tokens)?;
        let replay_us = self.replays(stream, &calls, &workspace, tokens)?;
        let (count, expert_bytes, cache) = (calls.len(), self.expert_bytes, self.cache);
        let reads: Vec<Reads> = calls.into_iter().map(|call| call.reads).collect();
        let distinct_experts = hits as f64 / count as f64;
        Ok(GpuTimed {
            // The one thread that launches.
            timed: Timed { tokens, threads: 1, us: replay_us / count as f64, distinct_experts, read_gbps: None },
            host_us,
            calls: count,
            warm_share: cold::warm_share(&reads, expert_bytes, cache),
            workspace_bytes,
        })
    }

    /// The host's median time for a call's launches, each on an idle GPU. Ends with a look at every output.
    fn eager(&self, stream: &Stream, calls: &[Call], workspace: &DeviceBuffer, tokens: usize) -> Result<f64, Stop> {
        let mut times = Vec::new();
        while times.len() < EAGER {
            for call in calls {
                let start = Instant::now();
                call.launch(stream, self, workspace, tokens)?;
                times.push(start.elapsed().as_secs_f64() * 1e6);
                stream.synchronize()?;
            }
        }
        for call in calls {
            let mut bits = vec![0u16; call.output.len() / 2];
            call.output.download(stream, 0, &mut bits)?;
            // A kernel that computes nonsense is fast for nothing.
            if bits.iter().any(|b| !bf16::from_bits(*b).is_finite()) {
                return Err(Stop::Run(Failure::said("the measured layer's output is not finite")));
            }
        }
        Ok(median(times))
    }

    /// The median time of a replay of all calls.
    fn replays(&self, stream: &Stream, calls: &[Call], workspace: &DeviceBuffer, tokens: usize) -> Result<f64, Stop> {
        let record = || calls.iter().try_for_each(|call| call.launch(stream, self, workspace, tokens));
        let graph = Graph::capture::<CudaError>(stream, record)?;
        // SAFETY: as for the launches: kernels, buffers and workspace outlive the graph, and one stream orders all.
        let replay = || unsafe { graph.launch(stream) };
        let started = Instant::now();
        while started.elapsed() < WARMUP {
            replay()?;
            stream.synchronize()?;
        }
        let mut marks = Vec::new();
        for _ in 0..=REPLAYS {
            marks.push(Event::new(stream.gpu())?);
        }
        // The host runs ahead, so that its own time to launch a graph does not count: the first replay keeps the GPU busy
        // meanwhile.
        replay()?;
        marks[0].record(stream)?;
        for mark in &marks[1..] {
            replay()?;
            mark.record(stream)?;
        }
        stream.synchronize()?;
        let mut times = Vec::new();
        for pair in marks.windows(2) {
            times.push(f64::from(pair[1].ms_since(&pair[0])?) * 1e3);
        }
        Ok(median(times))
    }
}
