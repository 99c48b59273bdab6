// Hopper's grouped GEMM for many tokens: weight rows are the product's 64 rows, in registers; tokens its columns, in
// shared memory. A block stays and takes tasks (192 rows of an expert's matrix times a tile of its tokens) in turn: a
// warpgroup fills a ring, three multiply, each 64 of the rows. The ring goes on over tasks, so that the next one's weights
// and tokens come while results go out.
#include "wgmma/finish.cuh"
#include "wgmma/multiply.cuh"
#include "wgmma/produce.cuh"

namespace moe {

// Registers of a thread after the warpgroups have shared them out.
constexpr int kProducer = 48, kMath = 144;

// Sums with the narrowest product from kW on that takes all of the tile's tokens, kUsed chunks of them; its width.
template <int kN, int kUsed, int kW = 16>
__device__ __forceinline__ int narrowest(Multiply<kN>& multiply, int count, Sums<kN>& acc) {
    if constexpr (kW < Layout<kN>::kWidth) {
        if (count > kW * kUsed) return narrowest<kN, kUsed, kW + 16>(multiply, count, acc);
    }
    if constexpr (kPromoted) {
        multiply.template promoted<kW, kUsed>(acc);
    } else {
        multiply.template plain<kW, kUsed>(acc);
    }
    return kW;
}

template <int kN>
__device__ __forceinline__ void multiply_all(const GemmParams& p, const Layout<kN>& memory) {
    constexpr int kWidth = Layout<kN>::kWidth, kChunks = Layout<kN>::kChunks;
    const int warp = uniform(threadIdx.x >> 5) - 4, lane = threadIdx.x & 31;
    const Finish<kN> finish{p, memory, warp / 4, warp % 4, lane};
    Place place;
    Multiply<kN> multiply{p, memory, place, warp, lane};
    for (int n = 0;; n++) {
        const Task task = task_of(p, n);
        if (task.expert < 0) break;
        finish.write_facts(task);
        Sums<kN> acc;
        const int width = kChunks == 2 && task.count > kWidth
                              ? narrowest<kN, kChunks, kWidth / 2 + 16>(multiply, task.count, acc)
                              : narrowest<kN, 1>(multiply, task.count, acc);
        finish.write(acc, task, width);
    }
}

template <int kN>
__device__ __forceinline__ void gemm(const GemmParams& p) {
    const Layout<kN> memory{p.depth};
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.depth; i++) {
            // Full: every producing thread's copies, and the bulk copies. Free: every warp that multiplies.
            barrier_init(memory.full(i), kWarpgroup + 1);
            barrier_init(memory.free(i), kMathThreads / 32);
        }
        barrier_init_done();
    }
    __syncthreads();
    wait_for_previous_grid();
    release_next_grid();
    if (threadIdx.x < kWarpgroup) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducer));
        produce<kN>(p, memory);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kMath));
        multiply_all<kN>(p, memory);
    }
}

}  // namespace moe

// grid (at most one block to a multiprocessor)
#define MOE_ENTRY(n)                                                   \
    extern "C" __global__ void __launch_bounds__(moe::kThreads, 1)     \
        moe_wgmma_##n(const __grid_constant__ moe::GemmParams p) {     \
        moe::gemm<n>(p);                                               \
    }
MOE_ENTRY(64)
MOE_ENTRY(128)
