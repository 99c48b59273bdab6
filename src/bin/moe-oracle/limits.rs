//! What the machine can do at best, measured: reading memory, multiplying float32 and, where there is VNNI, bytes.

use crate::failure::{Failure, Outcome};
use crate::machine;
use memmap2::MmapMut;
use moe_oracle::cpu::Executor;
use moe_oracle::platform::CpuIsa;
use std::hint::black_box;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The limits with a number of threads.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Limits {
    /// Threads that were measured.
    pub threads: usize,
    /// Bytes per nanosecond that can be read from memory.
    pub read_gbps: f64,
    /// Float32 operations per nanosecond, a fused multiply-add counted as two.
    pub f32_gflops: f64,
    /// Operations per nanosecond of integer dot products of bytes (VNNI), where the processor has them.
    pub int8_gops: Option<f64>,
}

impl Limits {
    /// Measures all, about a second, with as many threads as the pool has; and what reads on the pool go on with.
    pub fn measure(pool: &dyn Executor) -> Outcome<(Self, Reader)> {
        let threads = pool.threads();
        let (way, read_gbps) = fastest_read(threads)?;
        let limits = Self {
            threads,
            read_gbps,
            f32_gflops: peak(threads, multiply_add)?,
            int8_gops: match CpuIsa::detect() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `detect` has found VNNI.
                CpuIsa::Avx512Vnni | CpuIsa::Avx512Bf16 => Some(peak(threads, || unsafe { dot_vnni() })?),
                _ => None,
            },
        };
        Ok((limits, Reader::new(way, pool)?))
    }

    /// The least microseconds that reading `bytes` and computing `flops` can take when they overlap fully.
    pub fn floor_us(&self, bytes: f64, flops: f64) -> f64 {
        (bytes / self.read_gbps).max(flops / self.f32_gflops) / 1e3
    }
}

/// A thread's stretch of work.
struct Span {
    start: Instant,
    end: Instant,
    work: f64,
}

/// Passes of each measurement, two for every way of reading; the best counts, for other processes can only slow a pass
/// down.
const PASSES: usize = 8;

/// Runs `work` (with the pass's number) on every thread after `prepare` and returns each pass's work per nanosecond,
/// from the first thread's start to the last one's end. All threads begin a pass together: their start-up would
/// otherwise be measured on machines with many cores.
fn rates<T>(
    threads: usize,
    prepare: impl Fn() -> T + Sync,
    work: impl Fn(&T, usize) -> f64 + Sync,
) -> Outcome<Vec<f64>> {
    let (prepare, work) = (&prepare, &work);
    let barrier = &Barrier::new(threads);
    let pass = move |prepared: &T, pass: usize| {
        barrier.wait();
        let start = Instant::now();
        let work = work(prepared, pass);
        Span { start, end: Instant::now(), work }
    };
    let spans: Option<Vec<[Span; PASSES]>> = std::thread::scope(|scope| {
        let run = move || {
            let prepared = prepare();
            std::array::from_fn(|i| pass(&prepared, i))
        };
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        handles.into_iter().map(|h| h.join().ok()).collect()
    });
    let spans = spans.ok_or_else(|| Failure::said("a thread that measured the machine failed"))?;
    let rates = (0..PASSES).filter_map(|p| {
        let (start, end) = (spans.iter().map(|s| s[p].start).min()?, spans.iter().map(|s| s[p].end).max()?);
        Some(spans.iter().map(|s| s[p].work).sum::<f64>() / (end - start).as_nanos().max(1) as f64)
    });
    Ok(rates.collect())
}

const MIB: usize = 1 << 20;

/// Bytes per nanosecond that `threads` threads read together.
pub fn read_gbps(threads: usize) -> Outcome<f64> {
    Ok(fastest_read(threads)?.1)
}

/// How memory is read, and how fast it was.
fn fastest_read(threads: usize) -> Outcome<(Way, f64)> {
    let len = (room(threads) / threads).next_multiple_of(8 * STREAMS * LANES);
    // Each thread touches its own part first, so that its pages lie on the thread's memory node.
    let prepare = || -> std::io::Result<MmapMut> {
        let mut buffer = memory(len)?;
        touch(&mut buffer);
        Ok(buffer)
    };
    let rates = rates(threads, prepare, |buffer, pass| {
        let Ok(buffer) = buffer else { return 0.0 };
        black_box(Way::of(pass).sum(numbers(black_box(buffer))));
        buffer.len() as f64
    })?;
    match rates.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)) {
        Some((pass, best)) if *best > 0.0 => Ok((Way::of(pass), *best)),
        _ => Err(Failure::said(format_args!("no memory to measure with: {} MiB were asked for", len * threads / MIB))),
    }
}

/// Bytes to read: far beyond any last-level cache, also where many cores share many of them; but no more than the machine has.
fn room(threads: usize) -> usize {
    let available = machine::memory_available().map_or(usize::MAX, |m| m / 4);
    (64 * MIB * threads).clamp(512 * MIB, 8192 * MIB).min(available.max(64 * MIB))
}

/// Untouched memory, in huge pages where the system has some, as packed weights are.
fn memory(len: usize) -> std::io::Result<MmapMut> {
    let buffer = MmapMut::map_anon(len)?;
    #[cfg(target_os = "linux")]
    let _ = buffer.advise(memmap2::Advice::HugePage);
    Ok(buffer)
}

/// Fills memory with numbers.
fn touch(buffer: &mut [u8]) {
    buffer.chunks_exact_mut(8).zip(0u64..).for_each(|(to, i)| to.copy_from_slice(&i.to_ne_bytes()));
}

/// A mapping, or a part of one that starts at a page: all of it is there as numbers.
fn numbers(buffer: &[u8]) -> &[u64] {
    bytemuck::pod_align_to::<u8, u64>(buffer).1
}

/// Memory that is read in turn with what it is a limit of, so that both meet the same neighbours on a shared machine.
pub struct Reader {
    buffer: MmapMut,
    way: Way,
    /// The chunk that comes next.
    next: AtomicUsize,
}

/// What a thread reads before it takes more.
const CHUNK: usize = 4 * MIB;
/// The least that a [`Reader`] reads at once.
const LEAST: usize = 64 * MIB;

impl Reader {
    fn new(way: Way, pool: &dyn Executor) -> Outcome<Self> {
        let len = room(pool.threads()).next_multiple_of(CHUNK);
        let mut buffer =
            memory(len).map_err(|e| Failure::said(format_args!("{} MiB to measure with: {e}", len / MIB)))?;
        touch(&mut buffer);
        Ok(Self { buffer, way, next: AtomicUsize::new(0) })
    }

    /// Reads from the memory of `bytes` in all, at least [`LEAST`], but no more than what there is; returns bytes per nanosecond.
    pub fn read_gbps(&self, bytes: f64, pool: &dyn Executor) -> f64 {
        let all = self.buffer.len() / CHUNK;
        let chunks = ((bytes as usize).max(LEAST) / CHUNK).min(all);
        let first = self.next.fetch_add(chunks, Ordering::Relaxed);
        let start = Instant::now();
        pool.run(chunks, &|i| {
            let chunk = &self.buffer[(first + i) % all * CHUNK..][..CHUNK];
            black_box(self.way.sum(numbers(black_box(chunk))));
        });
        (chunks * CHUNK) as f64 / start.elapsed().as_nanos().max(1) as f64
    }
}

/// How to read: some machines read one stream faster than several, others the other way round; with vectors likewise.
#[derive(Clone, Copy)]
struct Way {
    streams: bool,
    widest: bool,
}

impl Way {
    /// That of a pass.
    fn of(pass: usize) -> Self {
        Self { streams: pass % 2 == 1, widest: pass % 4 < 2 }
    }

    /// Adds up everything.
    fn sum(self, numbers: &[u64]) -> u64 {
        if self.streams { sum::<STREAMS>(numbers, self.widest) } else { sum::<1>(numbers, self.widest) }
    }
}

/// Independent places that a thread reads from at once in half of the passes, so that every prefetcher has work.
const STREAMS: usize = 4;
/// Elements that a stream adds per step: two widest vectors.
const LANES: usize = 16;

/// Adds up everything with the `widest` vectors of the processor or, where that is AVX-512, with those half as wide.
fn sum<const STREAMS: usize>(buffer: &[u64], widest: bool) -> u64 {
    #[cfg(target_arch = "x86_64")]
    match CpuIsa::detect() {
        CpuIsa::Avx512 | CpuIsa::Avx512Vnni | CpuIsa::Avx512Bf16 if widest => {
            // SAFETY: `detect` has found AVX-512F.
            return unsafe { sum_avx512::<STREAMS>(buffer) };
        }
        CpuIsa::Avx512 | CpuIsa::Avx512Vnni | CpuIsa::Avx512Bf16 | CpuIsa::Avx2 => {
            // SAFETY: `detect` has found AVX2, which it asks of the AVX-512 sets, too.
            return unsafe { sum_avx2::<STREAMS>(buffer) };
        }
        CpuIsa::Portable => {}
    }
    let _ = widest;
    sum_any::<STREAMS>(buffer)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn sum_avx512<const STREAMS: usize>(buffer: &[u64]) -> u64 {
    sum_any::<STREAMS>(buffer)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_avx2<const STREAMS: usize>(buffer: &[u64]) -> u64 {
    sum_any::<STREAMS>(buffer)
}

/// Adds up everything; inlined into the functions above, each with its own vectors.
#[inline(always)]
fn sum_any<const STREAMS: usize>(buffer: &[u64]) -> u64 {
    let part = buffer.len() / STREAMS;
    let mut acc = [[0u64; LANES]; STREAMS];
    for at in (0..part).step_by(LANES) {
        for (stream, acc) in acc.iter_mut().enumerate() {
            if let Some(values) = buffer.get(stream * part + at..).and_then(|b| b.first_chunk::<LANES>()) {
                for (a, v) in acc.iter_mut().zip(values) {
                    *a = a.wrapping_add(*v);
                }
            }
        }
    }
    acc.iter().flatten().fold(0, |a, v| a.wrapping_add(*v))
}

/// Steps between two looks at the clock: some ten microseconds.
const STEPS: usize = 10_000;

/// Operations per nanosecond of `threads` threads together, `burst` being some and returning their number.
fn peak(threads: usize, burst: impl Fn() -> f64 + Sync) -> Outcome<f64> {
    let work = |_: &(), _| {
        let (start, mut flops) = (Instant::now(), 0.0);
        while start.elapsed() < Duration::from_millis(30) {
            flops += burst();
        }
        flops
    };
    Ok(rates(threads, || (), work)?.into_iter().fold(0.0, f64::max))
}

/// A burst of multiply-adds; returns how many operations it did.
fn multiply_add() -> f64 {
    #[cfg(target_arch = "x86_64")]
    match CpuIsa::detect() {
        // SAFETY: `detect` has found AVX-512F.
        CpuIsa::Avx512 | CpuIsa::Avx512Vnni | CpuIsa::Avx512Bf16 => return unsafe { fma_avx512() },
        // SAFETY: `detect` has found AVX2 and FMA.
        CpuIsa::Avx2 => return unsafe { fma_avx2() },
        CpuIsa::Portable => {}
    }
    const N: usize = 32;
    let (mut acc, x, y) = ([1.0f32; N], black_box(0.5f32), black_box(0.5f32));
    for _ in 0..STEPS {
        // Without a fused instruction `mul_add` is a slow library call; two operations are what such a target has.
        acc.iter_mut().for_each(|a| *a = *a * x + y);
    }
    black_box(acc);
    (2 * N * STEPS) as f64
}

/// Chains enough to hide the latency of two units with four or five cycles each, few enough for 16 registers.
#[cfg(target_arch = "x86_64")]
const CHAINS: usize = 12;

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn fma_avx512() -> f64 {
    use std::arch::x86_64::*;
    // x -> x / 2 + 1/2 stays at 1: no overflow and no subnormals, which would be slow.
    let (x, y) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(0.5)));
    let mut acc = [_mm512_set1_ps(1.0); CHAINS];
    for _ in 0..STEPS {
        acc.iter_mut().for_each(|a| *a = _mm512_fmadd_ps(*a, x, y));
    }
    black_box(acc.iter().fold(x, |a, b| _mm512_add_ps(a, *b)));
    (2 * 16 * CHAINS * STEPS) as f64
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn fma_avx2() -> f64 {
    use std::arch::x86_64::*;
    let (x, y) = (_mm256_set1_ps(black_box(0.5)), _mm256_set1_ps(black_box(0.5)));
    let mut acc = [_mm256_set1_ps(1.0); CHAINS];
    for _ in 0..STEPS {
        acc.iter_mut().for_each(|a| *a = _mm256_fmadd_ps(*a, x, y));
    }
    black_box(acc.iter().fold(x, |a, b| _mm256_add_ps(a, *b)));
    (2 * 8 * CHAINS * STEPS) as f64
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
fn dot_vnni() -> f64 {
    use std::arch::x86_64::*;
    let (x, y) = (_mm512_set1_epi8(black_box(1)), _mm512_set1_epi8(black_box(1)));
    let mut acc = [_mm512_setzero_si512(); CHAINS];
    for _ in 0..STEPS {
        acc.iter_mut().for_each(|a| *a = _mm512_dpbusd_epi32(*a, x, y));
    }
    black_box(acc.iter().fold(x, |a, b| _mm512_add_epi32(a, *b)));
    (2 * 64 * CHAINS * STEPS) as f64
}
