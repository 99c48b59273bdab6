//! Selection and forward calls allocate nothing, on any thread.

mod common;

use common::*;
use moe_oracle::config::{ActivationFormat, InputType, MoeConfig};
use moe_oracle::cpu::ThreadPool;
use moe_oracle::kernel::{Batched, Rows, RowsMut, Standard};
use moe_oracle::oracle::{Fp8Block, MoeBackend, MoeKernelOracle, ORACLES, SelectInputs};
use moe_oracle::platform::Platform;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static CALLS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller's contract is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        CALLS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller's contract is the same.
        unsafe { System.dealloc(p, layout) }
    }

    unsafe fn realloc(&self, p: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller's contract is the same.
        unsafe { System.realloc(p, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations(f: impl FnOnce()) -> usize {
    let before = CALLS.load(Ordering::SeqCst);
    f();
    CALLS.load(Ordering::SeqCst) - before
}

/// One test only: another one's thread would count too.
#[test]
fn selection_and_forward_calls_allocate_nothing() {
    assert!(allocations(|| drop(std::hint::black_box(Box::new(1)))) > 0, "the counter counts");

    let config = MoeConfig { input: InputType::F32, ..MoeConfig::new(8, 2, 96, 64) };
    for platform in [Platform::cpu(), Platform::Cuda(90), Platform::Rocm] {
        for name in MoeBackend::ALL {
            let inputs = SelectInputs::named(*name);
            let n = allocations(|| {
                let _ = std::hint::black_box(Fp8Block::select_backend(&config, &platform, &inputs));
            });
            assert_eq!(n, 0, "selecting {} on {platform}", name.name());
        }
    }

    let pool = ThreadPool::new(2).unwrap();
    for oracle in ORACLES {
        let mut rng = Rng(9);
        let layer = weights::layer(&mut rng, oracle, config);
        let x = hidden(&mut rng, 7, &config);
        let (ids, weights) = route(&mut rng, 7, &config, Skew::Uniform);
        let logits: Vec<f32> = (0..7 * 8).map(|_| rng.normal()).collect();
        let batched = MoeConfig { format: ActivationFormat::Batched, ..config };
        let batched = Layer { oracle, config: batched, weights: layer.weights.clone() };
        for target in targets(&layer) {
            let kernel_ = kernel::<Standard>(&layer, target, None);
            let batched = kernel::<Batched>(&batched, target, None);
            let mut out = vec![0.0; x.len()];
            let mut workspace = vec![0u8; kernel_.router_workspace_bytes(7)];
            let (slots, counts) = (vec![1.0; 8 * 2 * 96], [2, 1, 0, 2, 2, 2, 0, 1]);
            let (mut slots_out, mut slots_workspace) = (slots.clone(), vec![0u8; batched.workspace_bytes(2)]);
            let mut run = || {
                kernel_.forward(Rows::F32(&x), &ids, &weights, RowsMut::F32(&mut out), &mut workspace, &pool).unwrap();
                kernel_
                    .forward_router(Rows::F32(&x), &logits, None, RowsMut::F32(&mut out), &mut workspace, &pool)
                    .unwrap();
                let (x, y) = (Rows::F32(&slots), RowsMut::F32(&mut slots_out));
                batched.forward_batched(x, &counts, y, &mut slots_workspace, &pool).unwrap();
            };
            run();
            assert_eq!(allocations(run), 0, "{} {target}", oracle.alias);
        }
    }
}
