// Hopper's grouped GEMM for many tokens: weight rows are the product's 64 rows, in registers; tokens its columns, in
// shared memory. A cluster of blocks stays and takes tasks (as many rows of an expert's matrix as it has room for, times a
// tile of its tokens) in turn: two warps of each block fill a ring, two warpgroups multiply. Everything that a task needs
// besides is found out ahead of it, and the ring goes on over tasks.
#include "wgmma/finish.cuh"
#include "wgmma/multiply.cuh"
#include "wgmma/produce.cuh"
#include "wgmma/requantise.cuh"

namespace moe {

// Registers of a thread after the warpgroups have shared out what a block is launched with, 168 a thread: whatever is asked
// for beyond that is waited for forever.
template <int kN>
constexpr int kMath = kN <= 128 || !kPromoted ? 224 : kBlockScales ? 240 : 232;
template <int kN>
constexpr int kProducer = 3 * 168 - 2 * kMath<kN>;

// Widths of products that there is code for: of small tiles in steps of eight (int8 has none of 40 and 56), else in steps of
// 16, or 32 where a large tile is small for once.
template <int kN>
__device__ constexpr int next_width(int width) {
    if (kN <= 64) return width + (kInt8 && width >= 32 ? 16 : 8);
    return width + (kN > 128 && width < 128 && !kPromoted ? 32 : 16);
}
template <int kN>
constexpr int kNarrowest = kN <= 64 ? 8 : kN > 128 && !kPromoted ? 32 : 16;

// Sums in as few chunks of columns as take all of the tile's tokens, the last one of the narrowest products that do.
template <int kN, int kUsed = 1, int kW = kNarrowest<kN>>
__device__ __forceinline__ void sum(Multiply<kN>& multiply, int count, Sums<kN>& acc) {
    constexpr int kWidth = Layout<kN>::kWidth;
    if constexpr (kUsed < Layout<kN>::kChunks) {
        if (count > kUsed * kWidth) return sum<kN, kUsed + 1>(multiply, count, acc);
    }
    if constexpr (kW < kWidth) {
        if (count > (kUsed - 1) * kWidth + kW) return sum<kN, kUsed, next_width<kN>(kW)>(multiply, count, acc);
    }
    if constexpr (kPromoted) {
        multiply.template promoted<kW, kUsed>(acc);
    } else {
        multiply.template plain<kW>(acc);
    }
}

// The thread's number, read here: whatever follows from it takes no registers where sums need them.
__device__ __forceinline__ int thread_again() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

template <int kN>
__device__ __forceinline__ void multiply_all(const GemmParams& p, const Layout<kN>& memory) {
    const int warp = uniform(threadIdx.x >> 5) - 4, lane = threadIdx.x & 31;
    Place place;
    Multiply<kN> multiply{p, memory, place, warp, lane};
    for (int n = 0;; n++) {
        const Task task = take(memory, n, lane);
        if (task.expert < 0) break;
        Sums<kN> acc;
        sum<kN>(multiply, task.count, acc);
        const int facts = place_of<kFacts>(n);
        const int thread = thread_again() - kWarpgroup;
        Finish<kN> finish{p, memory, uniform(thread / kWarpgroup), uniform(thread / 32 % 4), thread % 32};
        barrier_wait(memory.facts_full(facts), round_of<kFacts>(n));
        if constexpr (Layout<kN>::kRequantises) {
            if (p.out_scales != nullptr) {
                Requantise<kN>{finish}.write(acc, task, memory.facts(facts), n);
            } else {
                finish.write(acc, task, memory.facts(facts));
            }
        } else {
            finish.write(acc, task, memory.facts(facts));
        }
        // Every lane, as for what is full.
        barrier_arrive(memory.facts_free(facts));
    }
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

template <int kN>
__device__ __forceinline__ void gemm(const GemmParams& p) {
    constexpr int kMathWarps = kMathThreads / 32;
    const Layout<kN> memory{p.depth};
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.depth; i++) {
            // Full: the two warps that send. Free: every warp of the cluster that multiplies.
            barrier_init(memory.full(i), 2), barrier_init(memory.free(i), kMathWarps * kWarpArrivals * kCluster);
        }
        for (int i = 0; i < kTasks; i++) {
            // Free: all warps of the cluster but the one that fills.
            barrier_init(memory.task_full(i), 1), barrier_init(memory.task_free(i), kCluster * (kMathWarps + 4) - 1);
        }
        for (int i = 0; i < kFacts; i++) {
            barrier_init(memory.facts_full(i), 32), barrier_init(memory.facts_free(i), kMathThreads);
            barrier_init(memory.largest_full(i), 1);
        }
        barrier_init_done();
    }
    // No block's barriers are used before all are there.
    cluster_sync();
    const int warp = uniform(threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (warp < 4) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducer<kN>));
        if (warp == 0) {
            produce<kN, true>(p, memory, lane);
        } else if (warp == 1) {
            if (blockIdx.x % kCluster == 0) {
                share_out<kN>(p, memory, lane);
            } else {
                expect_tasks<kN>(memory, lane);
            }
        } else if (warp == 2) {
            find_facts<kN>(p, memory, lane);
        } else {
            produce<kN, false>(p, memory, lane);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kMath<kN>));
        multiply_all<kN>(p, memory);
    }
    // Nor is a block gone while another still copies or arrives there.
    cluster_sync();
}

}  // namespace moe

// grid (a multiple of the cluster, at most one block to a multiprocessor)
#define MOE_ENTRY(n)                                                                                       \
    extern "C" __global__ void __cluster_dims__(moe::kCluster, 1, 1) __launch_bounds__(moe::kThreads, 1)   \
        moe_wgmma_##n(const __grid_constant__ moe::GemmParams p) {                                         \
        moe::gemm<n>(p);                                                                                   \
    }
MOE_ENTRY(64)
MOE_ENTRY(128)
MOE_ENTRY(256)
