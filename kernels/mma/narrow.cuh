// Tiles of few tokens, which wait for memory: a ring of stages, kBlocks blocks of K of tokens and weights each.
#pragma once
#include "epilogue.cuh"

namespace moe {

template <int kN>
struct Narrow {
    using S = Shape<kN>;
    static constexpr int kTokenBytes = kN * kRowBytes;
    const GemmParams& p;
    const Task task;
    const Slabs slab;
    const uint32_t memory;
    const int warp, lane, stage_bytes, place_bytes;
    // Where this lane's token begins in a place.
    const uint32_t from_token;

    __device__ __forceinline__ Narrow(const GemmParams& params, const Task& its, uint32_t shared, int w)
        : p(params), task(its), slab{params.weights, its.expert, its.row_tile * S::kSlabs}, memory(shared), warp(w),
          lane(threadIdx.x & 31), stage_bytes(kBlocks * kCodeBytes + 8 * params.scales.stride),
          place_bytes(kBlocks * kTokenBytes + S::kSlabs * stage_bytes),
          from_token(token_offset(its.start, lane >> 2, lane)) {}

    __device__ __forceinline__ uint32_t place(int n) const { return memory + kRingAt + n * place_bytes; }
    __device__ __forceinline__ uint32_t full(int n) const { return memory + 8 * n; }
    __device__ __forceinline__ uint32_t free(int n) const { return memory + kBarriers + 8 * n; }
    __device__ __forceinline__ int stages() const { return (p.weights.blocks + kBlocks - 1) / kBlocks; }

    // Sends for a stage: each warp for two slabs, the first for the tokens, too.
    __device__ __forceinline__ void fetch(int stage, int to) const {
        const uint32_t tokens = place(to), codes = tokens + kBlocks * kTokenBytes + 2 * warp * stage_bytes;
        const int offset = stage * stage_bytes, bytes = min(stage_bytes, p.weights.slab_bytes - offset);
        const int blocks = min(kBlocks, p.weights.blocks - stage * kBlocks), each = task.count * kRowBytes;
        const char* from = p.x + stage * kBlocks * p.plane + (long long)task.start * kRowBytes;
#if MOE_BULK
        if (lane == 0) {
            barrier_expect(full(to), 2 * bytes + (warp == 0 ? blocks * each : 0));
            copy_bulk(codes, slab(2 * warp) + offset, bytes, full(to));
            copy_bulk(codes + stage_bytes, slab(2 * warp + 1) + offset, bytes, full(to));
            if (warp == 0) {
                for (int b = 0; b < blocks; b++) copy_bulk(tokens + b * kTokenBytes, from + b * p.plane, each, full(to));
            }
        }
#else
        for (int s = 0; s < 2; s++) {
            const char* at = slab(2 * warp + s) + offset;
            for (int i = lane * 16; i < bytes; i += 512) copy_16(codes + s * stage_bytes + i, at + i);
        }
        for (int b = 0; b < blocks; b++) {
            for (int i = threadIdx.x * 16; i < each; i += S::kThreads * 16) {
                copy_16(tokens + b * kTokenBytes + i, from + b * p.plane + i);
            }
        }
        arrive_after_copies(full(to));
#endif
    }

    // One stage into the sums; `refill` is called when the first products are under way.
    template <class F>
    __device__ __forceinline__ void multiply(int stage, int from, D (&dequant)[S::kWarpSlabs],
                                             Sum (&acc)[S::kWarpSlabs][S::kTiles][4], F refill) const {
        const uint32_t tokens = place(from) + from_token;
        const uint32_t slabs = place(from) + kBlocks * kTokenBytes + warp * S::kWarpSlabs * stage_bytes;
        const int blocks = p.weights.blocks - stage * kBlocks;
        const uint32_t scales = min(blocks, kBlocks) * kCodeBytes + (lane >> 2) * p.scales.stride;
#pragma unroll
        for (int block = 0; block < kBlocks; block++) {
            if (block > 0 && blocks <= block) break;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint32_t b[S::kTiles][4];
#pragma unroll
                for (int n = 0; n < S::kTiles; n++) {
                    token_of((tokens ^ (64 * half)) + n * (8 * kRowBytes) + block * kTokenBytes, b[n]);
                }
#pragma unroll
                for (int s = 0; s < S::kWarpSlabs; s++) {
                    const uint32_t slab = slabs + s * stage_bytes;
                    uint4 w[Q::kWords];
                    codes_of(slab + block * kCodeBytes + lane * 16, half, w);
                    D& d = dequant[s];
                    const int quarter = 2 * block + half;
                    if (!D::kUnits || D::moves(quarter, p.scales)) {
                        enter(d, D::scales_of(slab + scales, quarter, p.scales), quarter, p.scales, acc[s]);
                    }
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        uint32_t a[4];
                        operand_of<Q>(w, 2 * half + h, a);
                        d.enter_narrow(slab + scales, 4 * block + 2 * half + h);
                        d.finish(a);
#pragma unroll
                        for (int n = 0; n < S::kTiles; n++) Product::mma(acc[s][n], a, b[n][2 * h], b[n][2 * h + 1]);
                    }
                }
                if (block == 0 && half == 0) refill();
            }
        }
    }
};

template <int kN>
__device__ __forceinline__ void narrow(const GemmParams& p) {
    using S = Shape<kN>;
    const uint32_t memory = static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
    if (threadIdx.x == 0) {
        // Full: each warp's announcement, or every thread's copies. Free: every warp.
        constexpr int kArrivals = MOE_BULK ? S::kWarps : S::kThreads;
        for (int i = 0; i < p.depth; i++) {
            barrier_init(memory + 8 * i, kArrivals);
            barrier_init(memory + kBarriers + 8 * i, S::kWarps * kWarpArrivals);
        }
#if MOE_BULK
        barrier_init_done();
#endif
    }
    __syncthreads();
    wait_for_previous_grid();
    release_next_grid();
    const Task task = task_of(p);
    if (task.expert < 0) return;
    const Narrow<kN> gemm(p, task, memory, uniform(threadIdx.x >> 5));
    const int stages = gemm.stages();
    for (int i = 0; i < p.depth - 1 && i < stages; i++) gemm.fetch(i, i);
    Sum acc[S::kWarpSlabs][S::kTiles][4] = {};
    D dequant[S::kWarpSlabs];
#pragma unroll
    for (int s = 0; s < S::kWarpSlabs; s++) dequant[s].begin();
    Place place;
    for (int stage = 0; stage < stages; stage++) {
        // The place before, where the stage `depth` after the last one goes.
        auto refill = [&] {
            const int ahead = stage + p.depth - 1;
            if (ahead >= stages) return;
            const Place last = place.before(p.depth);
            if (stage > 0) barrier_wait(gemm.free(last.at), last.round);
            gemm.fetch(ahead, last.at);
        };
        barrier_wait(gemm.full(place.at), place.round);
        __syncwarp();
        gemm.multiply(stage, place.at, dequant, acc, refill);
        warp_arrive(gemm.free(place.at), gemm.lane);
        place = place.next(p.depth);
    }
    Epilogue<kN>{p, task, gemm.warp, gemm.lane, gemm.slab.first}.write(dequant, acc);
}

}  // namespace moe
