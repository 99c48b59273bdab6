//! One Mixture-of-Experts layer in candle's quantised CPU path and in `cpu_simd` or `cpu_simd_a8`, from the very same
//! weights, in turn.
//!
//! candle has no MoE layer for the CPU, so that its side is what its quantised MoE models do there: for every expert that
//! was chosen, gather its tokens, three `QMatMul`s, silu, and add the weighted rows up. Both sides use as many threads as
//! `RAYON_NUM_THREADS` says. candle rounds activations to 8 bits per 32 values inside, as `cpu_simd_a8` does; `cpu_simd` leaves them
//! exact.

mod ours;
#[path = "../../../src/bin/moe-oracle/bench/rng.rs"]
mod rng;
mod theirs;
mod weights;

use clap::{Parser, ValueEnum};
use rng::Rng;
use std::error::Error;
use std::time::Instant;
use weights::Weights;

/// The layer's sizes; those of Qwen3-30B-A3B, with fewer experts (still many times a cache).
#[derive(Clone, Copy)]
pub struct Sizes {
    experts: usize,
    topk: usize,
    hidden: usize,
    intermediate: usize,
}

/// A weight format that both sides have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// int8, a 16-bit scale per 32 columns: candle's Q8_0
    Int8,
    /// u4 less 8, a 16-bit scale per 32 columns: candle's Q4_0
    Int4,
}

#[derive(Parser)]
#[command(about = "Times a MoE layer on the CPU against candle")]
struct Args {
    /// Weight formats
    #[arg(long, value_delimiter = ',', default_values_t = [Format::Int8, Format::Int4], value_enum)]
    format: Vec<Format>,
    /// Tokens per call
    #[arg(long, value_delimiter = ',', default_values_t = [1usize, 4, 32, 128, 512])]
    tokens: Vec<usize>,
    /// Experts, 8 of which each token takes
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(8..))]
    experts: u16,
    /// Our backend
    #[arg(long, default_value = "cpu_simd", value_parser = ["cpu_simd", "cpu_simd_a8"])]
    backend: String,
    /// Calls of each side for each figure, the median of which is printed
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u16).range(1..))]
    calls: u16,
}

/// One call: what both sides get.
pub struct Call {
    x: Vec<f32>,
    ids: Vec<i32>,
    weights: Vec<f32>,
}

impl Call {
    fn new(rng: &mut Rng, s: Sizes, tokens: usize) -> Self {
        let x = (0..tokens * s.hidden).map(|_| rng.signed()).collect();
        let mut ids = Vec::new();
        for _ in 0..tokens {
            let mut chosen: Vec<i32> = Vec::new();
            while chosen.len() < s.topk {
                let id = rng.below(s.experts) as i32;
                if !chosen.contains(&id) {
                    chosen.push(id);
                }
            }
            ids.extend(chosen);
        }
        let weights = vec![1.0 / s.topk as f32; ids.len()];
        Self { x, ids, weights }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Milliseconds that it takes, and what comes out.
fn timed<T, E>(f: impl FnOnce() -> Result<T, E>) -> Result<(f64, T), E> {
    let start = Instant::now();
    let out = f()?;
    Ok((start.elapsed().as_secs_f64() * 1e3, out))
}

/// |a - b| / |b|
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>();
    let off = square(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
    (off / square(&mut b.iter().map(|b| f64::from(*b)))).sqrt()
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let sizes = Sizes { experts: args.experts.into(), topk: 8, hidden: 2048, intermediate: 768 };
    let threads = candle_core::utils::get_num_threads();
    println!(
        "{} of {} experts, hidden 2048, intermediate 768; {threads} threads; ms per call",
        sizes.topk, args.experts
    );
    println!("{:<8}{:>8}{:>12}{:>12}{:>10}{:>12}", "format", "tokens", "candle", args.backend, "ratio", "distance");
    for format in args.format {
        let made = Weights::new(format, sizes);
        let theirs = theirs::Layer::new(&made)?;
        let mut ours = ours::Layer::new(made, threads, &args.backend)?;
        for &tokens in &args.tokens {
            let mut rng = Rng::new(tokens as u64);
            let (mut a, mut b, mut worst) = (Vec::new(), Vec::new(), 0f64);
            // The first of each is a warm-up. In turn, so that a neighbour's load meets both.
            for n in 0..=args.calls {
                let call = Call::new(&mut rng, sizes, tokens);
                let (candle_ms, want) = timed(|| theirs.forward(&call))?;
                let (our_ms, have) = timed(|| ours.forward(&call))?;
                if n > 0 {
                    a.push(candle_ms);
                    b.push(our_ms);
                }
                worst = worst.max(distance(&have, &want));
            }
            let (a, b) = (median(a), median(b));
            let name = format.to_possible_value().map_or(String::new(), |v| v.get_name().to_owned());
            println!("{name:<8}{tokens:>8}{a:>12.2}{b:>12.2}{:>10.2}{worst:>12.4}", a / b);
            // Their activations have 8 bits: further apart than that, one of the two computes something else.
            if worst.is_nan() || worst > 0.03 {
                return Err(format!("the two layers differ by {worst}").into());
            }
        }
    }
    Ok(())
}
