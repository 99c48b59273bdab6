//! The runtime below the kernels: buffers, streams, graphs, events, and what it refuses.
#![cfg(feature = "cuda")]

#[path = "common/skip.rs"]
mod skip;

use moe_oracle::cuda::{CudaError, DeviceBuffer, Event, FATBINS, Gpu, Graph, NOT_BUILT, Stream};

/// The first GPU; a machine without one skips the test with a word.
fn gpu() -> Option<Gpu> {
    match Gpu::open(0) {
        Ok(gpu) => Some(gpu),
        Err(why) => {
            skip::skipped(why);
            None
        }
    }
}

#[test]
fn what_goes_up_comes_down() {
    let Some(gpu) = gpu() else { return };
    let stream = Stream::new(&gpu).unwrap();
    let data: Vec<u32> = (0..100_000).collect();
    let buffer = DeviceBuffer::of(&stream, &data).unwrap();
    assert_eq!((buffer.len(), buffer.address() % 256, buffer.ptr::<u32>().len()), (400_000, 0, 100_000));
    let mut back = vec![0; 1000];
    buffer.download(&stream, 4 * 500, &mut back).unwrap();
    assert_eq!(back, data[500..1500]);
    buffer.upload(&stream, 4 * 600, &[7_u32, 8]).unwrap();
    buffer.download(&stream, 4 * 599, &mut back[..4]).unwrap();
    assert_eq!(back[..4], [599, 7, 8, 602]);
    buffer.zero(&stream).unwrap();
    buffer.download(&stream, 4 * 99_000, &mut back).unwrap();
    assert!(back.iter().all(|x| *x == 0));
}

#[test]
fn copies_outside_a_buffer_are_refused() {
    let Some(gpu) = gpu() else { return };
    let stream = Stream::new(&gpu).unwrap();
    let buffer = DeviceBuffer::zeroed(&stream, 16).unwrap();
    for (offset, len) in [(0, 17), (16, 1), (usize::MAX, 1), (9, 8)] {
        let mut bytes = vec![0_u8; len];
        assert_eq!(buffer.upload(&stream, offset, &bytes), Err(CudaError::Range { offset, len, size: 16 }));
        assert_eq!(buffer.download(&stream, offset, &mut bytes), Err(CudaError::Range { offset, len, size: 16 }));
    }
    let empty = DeviceBuffer::alloc(&gpu, 0).unwrap();
    assert!(empty.is_empty() && empty.upload::<u8>(&stream, 0, &[]).is_ok() && empty.zero(&stream).is_ok());
}

#[test]
fn too_much_memory_is_an_error_with_sizes() {
    let Some(gpu) = gpu() else { return };
    match DeviceBuffer::alloc(&gpu, 1 << 46).err() {
        Some(CudaError::OutOfMemory { wanted, free, total }) => {
            assert!(wanted == 1 << 46 && free > 0 && free <= total, "{free} of {total}");
        }
        other => panic!("{other:?}"),
    }
    // The context still works.
    DeviceBuffer::alloc(&gpu, 1 << 20).unwrap();
}

#[test]
fn events_keep_the_time() {
    let Some(gpu) = gpu() else { return };
    let stream = Stream::new(&gpu).unwrap();
    let buffer = DeviceBuffer::alloc(&gpu, 256 << 20).unwrap();
    let (start, end) = (Event::new(&gpu).unwrap(), Event::new(&gpu).unwrap());
    buffer.zero(&stream).unwrap();
    start.record(&stream).unwrap();
    (0..10).for_each(|_| buffer.zero(&stream).unwrap());
    end.record(&stream).unwrap();
    end.synchronize().unwrap();
    let ms = end.ms_since(&start).unwrap();
    // 2.5 GiB at no more than 100 TB/s.
    assert!(ms > 0.02 && ms < 10_000.0, "{ms}");
}

#[test]
fn a_graph_runs_what_was_captured_and_not_before() {
    let Some(gpu) = gpu() else { return };
    let stream = Stream::new(&gpu).unwrap();
    let buffer = DeviceBuffer::of(&stream, &[1_u8; 64]).unwrap();
    let graph = Graph::capture(&stream, || buffer.zero(&stream)).unwrap();
    let mut back = [9_u8; 64];
    buffer.download(&stream, 0, &mut back).unwrap();
    assert_eq!(back, [1; 64]);
    // SAFETY: the buffer outlives the replay, which the download waits for.
    unsafe { graph.launch(&stream) }.unwrap();
    buffer.download(&stream, 0, &mut back).unwrap();
    assert_eq!(back, [0; 64]);
}

#[test]
fn a_capture_that_fails_leaves_the_stream_usable() {
    let Some(gpu) = gpu() else { return };
    let stream = Stream::new(&gpu).unwrap();
    let buffer = DeviceBuffer::of(&stream, &[1_u8; 64]).unwrap();
    let refused = Graph::capture(&stream, || buffer.upload(&stream, 0, &[2_u8; 64]));
    assert!(matches!(refused.err(), Some(CudaError::Argument(_))), "host memory in a graph");
    let failed = Graph::capture(&stream, || Err(CudaError::NoGpu));
    assert_eq!(failed.err(), Some(CudaError::NoGpu));
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _ = Graph::capture::<CudaError>(&stream, || panic!("in a capture"));
    }));
    assert!(panicked.is_err());
    let mut back = [0_u8; 64];
    buffer.download(&stream, 0, &mut back).unwrap();
    assert_eq!(back, [1; 64]);
}

#[test]
fn a_callers_stream_and_context_serve() {
    let Some(gpu) = gpu() else { return };
    // SAFETY: the legacy default stream always exists.
    let stream = unsafe { Stream::borrow(&gpu, std::ptr::null_mut()) };
    let buffer = DeviceBuffer::of(&stream, &[3_u8; 8]).unwrap();
    let theirs = Stream::new(&gpu).unwrap();
    // SAFETY: `theirs` outlives `ours`.
    let ours = unsafe { Stream::borrow(&gpu, theirs.raw()) };
    let mut back = [0_u8; 8];
    buffer.download(&ours, 0, &mut back).unwrap();
    drop(ours);
    theirs.synchronize().unwrap();
    assert_eq!(back, [3; 8]);
}

#[test]
fn every_kernel_of_the_build_loads() {
    let Some(gpu) = gpu() else { return };
    if let Some(why) = NOT_BUILT {
        return skip::skipped(why);
    }
    for f in FATBINS {
        for r in f.resources {
            let kernel = gpu.kernel(f.name, r.kernel).unwrap_or_else(|e| panic!("{e}"));
            assert!(kernel.blocks_per_sm(32, 0).unwrap() > 0, "{}", r.kernel);
        }
    }
    assert_eq!(
        gpu.kernel("routing", "no_such").err(),
        Some(CudaError::NoEntry { fatbin: "routing", entry: "no_such" })
    );
    assert_eq!(gpu.kernel("no_such", "x").err(), Some(CudaError::NoKernel("no_such")));
    let kernel = gpu.kernel("routing", "route_1").unwrap();
    kernel.allow_shared(100 << 10).unwrap();
    assert!(matches!(kernel.allow_shared(1 << 30), Err(CudaError::SharedMemory { .. })));
}

#[test]
fn threads_share_a_gpu() {
    let Some(gpu) = gpu() else { return };
    std::thread::scope(|scope| {
        for n in 0..8_u8 {
            let gpu = &gpu;
            scope.spawn(move || {
                let stream = Stream::new(gpu).unwrap();
                let buffer = DeviceBuffer::of(&stream, &[n; 4096]).unwrap();
                let mut back = [0; 4096];
                buffer.download(&stream, 0, &mut back).unwrap();
                assert_eq!(back, [n; 4096]);
            });
        }
    });
}
