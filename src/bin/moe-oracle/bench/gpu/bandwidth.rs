//! The GPU's read bandwidth, measured by a kernel that does nothing but read.

use super::super::rng::Rng;
use crate::failure::{Failure, Outcome};
use moe_oracle::cuda::{Arg, DeviceBuffer, Event, Launch, Stream};

/// As in kernels/bandwidth.cu.
const THREADS: u32 = 256;
const TILE: usize = THREADS as usize * 8 * 16;
/// What is made up once and uploaded again and again.
const PIECE: usize = 16 << 20;
/// Pieces, 2 GiB in all where there is room: a launch's start and end weigh less than a hundredth. Odd, because the sum of
/// an even number of equal pieces is zero whatever was read.
const PIECES: usize = 129;
/// Passes of each grid; the best counts, as for the CPU's limits.
const PASSES: usize = 5;

/// Bytes per nanosecond; the best of several grids.
pub fn read_gbps(stream: &Stream) -> Outcome<f64> {
    let gpu = stream.gpu();
    let kernel = gpu.kernel("bandwidth", "bandwidth_read")?;
    let room = gpu.memory()?.0 / 4 / PIECE;
    let pieces = (room.clamp(1, PIECES) - 1) | 1;
    if pieces * PIECE < 4 * gpu.info().l2 {
        return Err(Failure::said("too little GPU memory is free to measure how fast it can be read"));
    }
    let mut rng = Rng::new(1);
    let piece: Vec<u64> = (0..PIECE / 8).map(|_| rng.next()).collect();
    let want = piece.iter().fold(0, |a, v| a ^ (*v as u32) ^ (*v >> 32) as u32);
    let data = DeviceBuffer::alloc(gpu, pieces * PIECE)?;
    (0..pieces).try_for_each(|p| data.upload(stream, p * PIECE, &piece))?;
    let sum = DeviceBuffer::zeroed(stream, 4)?;
    let (from, to, tiles) = (data.ptr::<u8>(), sum.ptr::<u32>(), (pieces * PIECE / TILE) as i32);
    let read = |blocks: u32| {
        let mut args = [Arg::new(&from), Arg::new(&to), Arg::new(&tiles)];
        // SAFETY: the three parameters of the entry; `data` holds that many whole tiles and `sum` its word, and both live
        // until the synchronisation at the end, or until the driver has waited in freeing them.
        unsafe { Launch::new(blocks, THREADS).run(stream, &kernel, &mut args) }
    };

    let most = kernel.blocks_per_sm(THREADS, 0)?;
    read(gpu.info().sms * most)?;
    let mut have = [0u32];
    sum.download(stream, 0, &mut have)?;
    if have[0] != want {
        return Err(Failure::said("the kernel that measures memory did not read it right"));
    }
    let (start, end) = (Event::new(gpu)?, Event::new(gpu)?);
    let mut best = 0f64;
    for blocks in [1, 2, 4, most].into_iter().filter(|b| *b <= most) {
        for _ in 0..PASSES {
            start.record(stream)?;
            read(gpu.info().sms * blocks)?;
            end.record(stream)?;
            end.synchronize()?;
            best = best.max(data.len() as f64 / (f64::from(end.ms_since(&start)?) * 1e6));
        }
    }
    Ok(best)
}
