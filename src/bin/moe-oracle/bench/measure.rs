//! Timing of forward calls on the CPU, every call with routing of its own.

use super::rng::Rng;
use super::routing::Routing;
use crate::failure::{Failure, Outcome};
use crate::limits::Reader;
use half::bf16;
use moe_oracle::config::MoeConfig;
use moe_oracle::cpu::{Experts, ThreadPool};
use moe_oracle::kernel::{MoeKernel, Rows, RowsMut, Standard};
use moe_oracle::oracle::{Bf16, KernelWeights, MoeKernelOracle, QuantConfig};
use std::hint::black_box;
use std::time::{Duration, Instant};

/// A layer ready to be timed.
pub struct Layer {
    kernel: MoeKernel<Standard, Box<dyn Experts>>,
    expert_bytes: usize,
}

/// What came out for one number of tokens.
pub struct Timed {
    /// Tokens per call.
    pub tokens: usize,
    /// Threads that took part.
    pub threads: usize,
    /// Median time of a call.
    pub us: f64,
    /// Mean number of different experts that a call used.
    pub distinct_experts: f64,
    /// Bytes per nanosecond that reads of memory in turn with the calls reached, the median; `None` on a GPU.
    pub read_gbps: Option<f64>,
}

/// Calls before the clock counts: caches, page tables and the processor's frequency settle.
const WARMUP: usize = 2;
/// The fewest calls that a median is taken of.
const CALLS: usize = 7;
/// How long to go on beyond them.
const LONG_ENOUGH: Duration = Duration::from_millis(1000);

impl Layer {
    /// Joins packed weights with the standard activation format.
    pub fn new(
        weights: KernelWeights,
        quant: Option<QuantConfig>,
        config: &MoeConfig,
        expert_bytes: usize,
    ) -> Outcome<Self> {
        // How parts are joined does not depend on the oracle's keys, so that any oracle does it.
        let kernel = Bf16::make_kernel::<Standard>(weights, quant, config, None).map_err(Failure::said)?;
        Ok(Self { kernel, expert_bytes })
    }

    /// The median time of a call with this many tokens. After every call `reader` reads as much as that had to: what other
    /// users of the machine leave of its memory changes from second to second.
    pub fn time(&self, tokens: usize, skew: f64, pool: &ThreadPool, reader: &Reader) -> Outcome<Timed> {
        let c = self.kernel.config();
        let mut rng = Rng::new(tokens as u64);
        let hidden: Vec<bf16> = (0..tokens * c.hidden).map(|_| bf16::from_f32(rng.signed())).collect();
        let mut output = vec![bf16::ZERO; tokens * c.hidden];
        let mut workspace = vec![0u8; self.kernel.workspace_bytes(tokens)];
        let mut routing = Routing::new(c.experts, c.topk, tokens, skew);
        let weights = vec![1.0 / c.topk as f32; tokens * c.topk];

        let (mut times, mut reads, mut distinct) = (Vec::new(), Vec::new(), 0);
        let mut started = Instant::now();
        for call in 0.. {
            if call == WARMUP {
                started = Instant::now();
            }
            if times.len() >= CALLS && started.elapsed() >= LONG_ENOUGH {
                break;
            }
            let hit = routing.draw(&mut rng);
            let start = Instant::now();
            self.kernel
                .forward(Rows::Bf16(&hidden), &routing.ids, &weights, RowsMut::Bf16(&mut output), &mut workspace, pool)
                .map_err(Failure::said)?;
            let time = start.elapsed();
            black_box(&output);
            let read = reader.read_gbps((hit * self.expert_bytes) as f64, pool);
            if call >= WARMUP {
                times.push(time);
                reads.push(read);
                distinct += hit;
            }
        }
        // A kernel that computes nonsense is fast for nothing.
        if output.iter().any(|x| !x.is_finite()) {
            return Err(Failure::said("the measured layer's output is not finite"));
        }
        times.sort_unstable();
        reads.sort_by(f64::total_cmp);
        let us = times[times.len() / 2].as_secs_f64() * 1e6;
        let distinct_experts = distinct as f64 / times.len() as f64;
        let read_gbps = Some(reads[reads.len() / 2]);
        Ok(Timed { tokens, threads: moe_oracle::cpu::Executor::threads(pool), us, distinct_experts, read_gbps })
    }
}
