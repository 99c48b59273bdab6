// Tiles of many tokens, which wait for the tensor cores. A warp takes 64 rows by 64 columns: an unpacked weight is used
// eight times, and with less than that shared memory could not feed the tensor cores.
//
// Two rings, of token blocks and of weight stages, so that two thread blocks fit a multiprocessor: one multiplies while
// the other begins or ends. A warp goes through units, a slab by half a block of K; what a unit reads was read and
// unpacked in the unit before.
#pragma once
#include "epilogue.cuh"

namespace moe {

// c += a * b where `wanted`, which all lanes agree on.
__device__ __forceinline__ void mma_if(bool wanted, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define MOE_MMA_IF(type)                                                                                          \
    asm volatile(                                                                                                 \
        "{\n.reg .pred wanted;\nsetp.ne.s32 wanted, %10, 0;\n@wanted mma.sync.aligned.m16n8k16.row.col.f32." type  \
        "." type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n}"                                  \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                          \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(static_cast<int>(wanted)))
    if constexpr (C::kBf16) {
        MOE_MMA_IF("bf16");
    } else {
        MOE_MMA_IF("f16");
    }
#undef MOE_MMA_IF
}

template <int kN>
struct Wide {
    using S = Shape<kN>;
    static constexpr int kTokenBytes = kN * kRowBytes, kUnits = 2 * S::kWarpSlabs;
    static constexpr int kFetched = S::kSlabs / S::kWarps;  // slabs that a warp sends for
    // Full: each warp's announcement, or every thread's copies. Free: every warp.
    static constexpr int kTokenArrivals = MOE_BULK ? 1 : S::kThreads, kWeightArrivals = MOE_BULK ? S::kWarps : S::kThreads;
    const GemmParams& p;
    const Task task;
    const Slabs slab;
    const uint32_t memory;
    const int warp, lane, stage_bytes, stages;
    // Pairs of eight columns that hold tokens.
    const int pairs;
    D dequant[S::kWarpSlabs];
    float acc[S::kWarpSlabs][S::kTiles][4];

    __device__ __forceinline__ Wide(const GemmParams& params, const Task& its, uint32_t shared, int w)
        : p(params), task(its), slab{params.weights, its.expert, its.row_tile * S::kSlabs}, memory(shared), warp(w),
          lane(threadIdx.x & 31), stage_bytes(kBlocks * kCodeBytes + 8 * params.scales.stride),
          stages((params.weights.blocks + kBlocks - 1) / kBlocks),
          pairs(((its.count + 15) / 16 + S::kWarpColumns - 1 - w % S::kWarpColumns) / S::kWarpColumns), acc{} {
#pragma unroll
        for (int s = 0; s < S::kWarpSlabs; s++) dequant[s].begin();
    }

    static __device__ __forceinline__ void make_barriers(const GemmParams& p, uint32_t memory) {
        for (int i = 0; i < kMaxDepth; i++) {
            barrier_init(memory + 8 * i, kTokenArrivals);
            barrier_init(memory + kBarriers + 8 * i, S::kWarps);
            barrier_init(memory + 2 * kBarriers + 8 * i, kWeightArrivals);
            barrier_init(memory + 3 * kBarriers + 8 * i, S::kWarps);
        }
    }
    __device__ __forceinline__ uint32_t tokens_full(int n) const { return memory + 8 * n; }
    __device__ __forceinline__ uint32_t tokens_free(int n) const { return memory + kBarriers + 8 * n; }
    __device__ __forceinline__ uint32_t weights_full(int n) const { return memory + 2 * kBarriers + 8 * n; }
    __device__ __forceinline__ uint32_t weights_free(int n) const { return memory + 3 * kBarriers + 8 * n; }
    __device__ __forceinline__ uint32_t tokens_at(int n) const { return memory + kRingAt + n * kTokenBytes; }
    __device__ __forceinline__ uint32_t weights_at(int n) const {
        return tokens_at(p.depth) + n * (S::kSlabs * stage_bytes);
    }

    // A block of tokens; warps take turns.
    __device__ __forceinline__ void fetch_tokens(int block, int to) const {
        const char* from = p.x + block * p.plane + (long long)task.start * kRowBytes;
        const int bytes = task.count * kRowBytes;
#if MOE_BULK
        if (lane == 0) {
            barrier_expect(tokens_full(to), bytes);
            copy_bulk(tokens_at(to), from, bytes, tokens_full(to));
        }
#else
        for (int i = threadIdx.x * 16; i < bytes; i += S::kThreads * 16) copy_16(tokens_at(to) + i, from + i);
        arrive_after_copies(tokens_full(to));
#endif
    }
    __device__ __forceinline__ bool fetches(int block) const { return !MOE_BULK || block % S::kWarps == warp; }

    // A warp's part of a stage of weights.
    __device__ __forceinline__ void fetch_weights(int stage, int to) const {
        const uint32_t at = weights_at(to) + warp * kFetched * stage_bytes;
        const int offset = stage * stage_bytes, bytes = min(stage_bytes, p.weights.slab_bytes - offset);
#if MOE_BULK
        if (lane == 0) {
            barrier_expect(weights_full(to), kFetched * bytes);
#pragma unroll
            for (int s = 0; s < kFetched; s++) {
                copy_bulk(at + s * stage_bytes, slab(warp * kFetched + s) + offset, bytes, weights_full(to));
            }
        }
#else
        for (int s = 0; s < kFetched; s++) {
            const char* from = slab(warp * kFetched + s) + offset;
            for (int i = lane * 16; i < bytes; i += 512) copy_16(at + s * stage_bytes + i, from + i);
        }
        arrive_after_copies(weights_full(to));
#endif
    }

    // Where the sums are along K: a block of tokens, the stage of weights that it belongs to.
    struct Position {
        int block = 0;
        Place tokens, weights;
    };
    static __device__ __forceinline__ int in_stage(int block) { return kBlocks == 1 ? 0 : block % kBlocks; }
    __device__ __forceinline__ Position after(const Position& at) const {
        const bool same = in_stage(at.block + 1) != 0;
        return {at.block + 1, at.tokens.next(p.depth), same ? at.weights : at.weights.next(p.weights_depth)};
    }

    __device__ __forceinline__ void begin() const {
        for (int i = 0; i < p.depth - 1 && i < p.weights.blocks; i++) {
            if (fetches(i)) fetch_tokens(i, i);
        }
        for (int i = 0; i < p.weights_depth - 1 && i < stages; i++) fetch_weights(i, i);
    }
    // Sends for what goes to the places that came before.
    __device__ __forceinline__ void refill_tokens(const Position& at) const {
        const int ahead = at.block + p.depth - 1;
        if (ahead >= p.weights.blocks || !fetches(ahead)) return;
        const Place last = at.tokens.before(p.depth);
        if (at.block > 0) barrier_wait(tokens_free(last.at), last.round);
        fetch_tokens(ahead, last.at);
    }
    __device__ __forceinline__ void refill_weights(const Position& at) const {
        const int ahead = at.block / kBlocks + p.weights_depth - 1;
        if (in_stage(at.block) != 0 || ahead >= stages) return;
        const Place last = at.weights.before(p.weights_depth);
        if (at.block > 0) barrier_wait(weights_free(last.at), last.round);
        fetch_weights(ahead, last.at);
    }
    __device__ __forceinline__ void wait(const Position& at) const {
        barrier_wait(tokens_full(at.tokens.at), at.tokens.round);
        if (in_stage(at.block) == 0) barrier_wait(weights_full(at.weights.at), at.weights.round);
        __syncwarp();
    }
    __device__ __forceinline__ void done(const Position& at) const {
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(tokens_free(at.tokens.at));
            if (in_stage(at.block + 1) == 0) barrier_arrive(weights_free(at.weights.at));
        }
    }

    // What a warp reads of a block.
    struct Source {
        uint32_t tokens, codes, scales;
        int block;  // of the stage
    };
    __device__ __forceinline__ Source source(const Position& at, uint32_t from_token) const {
        const int block = in_stage(at.block), blocks = min(kBlocks, p.weights.blocks - at.block + block);
        const uint32_t slabs = weights_at(at.weights.at) + warp / S::kWarpColumns * S::kWarpSlabs * stage_bytes;
        return {tokens_at(at.tokens.at) + from_token, slabs + block * kCodeBytes + lane * 16,
                slabs + blocks * kCodeBytes + (lane >> 2) * p.scales.stride, block};
    }
    __device__ __forceinline__ void load_codes(const Source& from, int unit, uint4 (&w)[Q::kWords]) const {
        codes_of(from.codes + unit % S::kWarpSlabs * stage_bytes, unit / S::kWarpSlabs, w);
    }
    __device__ __forceinline__ void load_token(const Source& from, int half, int n, uint32_t (&b)[S::kTiles][4]) const {
        if (n / 2 < pairs) token_of((from.tokens ^ (64 * half)) + S::column(0, n) * kRowBytes, b[n]);
    }
    // A unit's two operands.
    __device__ __forceinline__ void unpack(const Source& from, int unit, bool there, const uint4 (&w)[Q::kWords],
                                           uint32_t (&a)[2][4]) {
        const int half = unit / S::kWarpSlabs, s = unit % S::kWarpSlabs;
        D& d = dequant[s];
        const uint32_t scales = from.scales + s * stage_bytes;
        float move[2];
        if (there && d.enter(scales, 2 * from.block + half, p.scales, move)) rescale(acc[s], move);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            Q::step(w, 2 * half + h, a[h]);
            d.enter_narrow(scales, 4 * from.block + 2 * half + h);
            d.finish(a[h]);
        }
    }

    __device__ __forceinline__ void multiply() {
        const uint32_t from_token = token_offset(task.start, S::column(warp, 0) + (lane >> 2), lane);
        Position at;
        wait(at);
        Source from = source(at, from_token);
        uint32_t b[S::kTiles][4], a[2][2][4];
        uint4 w[Q::kWords];
#pragma unroll
        for (int n = 0; n < S::kTiles; n++) {
            b[n][0] = b[n][1] = b[n][2] = b[n][3] = 0;
            load_token(from, 0, n, b);
        }
        load_codes(from, 0, w);
        unpack(from, 0, true, w, a[0]);
        load_codes(from, 1, w);
#pragma unroll 1
        while (at.block < p.weights.blocks) {
            const Position next = after(at);
            const bool more = next.block < p.weights.blocks;
            // Beyond the last block old bytes are read, and not used.
            const Source then = source(next, from_token);
#pragma unroll
            for (int unit = 0; unit < kUnits; unit++) {
                const int s = unit % S::kWarpSlabs, half = unit / S::kWarpSlabs;
                const bool last = s == S::kWarpSlabs - 1;
                uint32_t(&now)[2][4] = a[unit % 2];
#pragma unroll
                for (int n = 0; n < S::kTiles; n++) mma_if(n / 2 < pairs, acc[s][n], now[0], b[n][0], b[n][1]);
                if (unit == 0) refill_tokens(at);
                if (unit == 2) refill_weights(at);
                if (unit == kUnits - 2 && more) wait(next);
                const bool crossed = unit == kUnits - 1;
                unpack(crossed ? then : from, (unit + 1) % kUnits, !crossed || more, w, a[(unit + 1) % 2]);
                load_codes(unit >= kUnits - 2 ? then : from, (unit + 2) % kUnits, w);
#pragma unroll
                for (int n = 0; n < S::kTiles; n++) {
                    mma_if(n / 2 < pairs, acc[s][n], now[1], b[n][2], b[n][3]);
                    // Its last use in this half.
                    if (last) load_token(half == 0 ? from : then, 1 - half, n, b);
                }
            }
            done(at);
            at = next, from = then;
        }
    }

    // Warps without tokens only help to copy.
    __device__ __forceinline__ void help() const {
        for (Position at; at.block < p.weights.blocks; at = after(at)) {
            wait(at);
            refill_tokens(at);
            refill_weights(at);
            done(at);
        }
    }
};

template <int kN>
__device__ __forceinline__ void wide(const GemmParams& p) {
    const uint32_t memory = static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
    if (threadIdx.x == 0) {
        Wide<kN>::make_barriers(p, memory);
#if MOE_BULK
        barrier_init_done();
#endif
    }
    __syncthreads();
    wait_for_previous_grid();
    release_next_grid();
    const Task task = task_of(p);
    if (task.expert < 0) return;
    Wide<kN> gemm(p, task, memory, uniform(threadIdx.x >> 5));
    gemm.begin();
    if (gemm.pairs > 0) {
        gemm.multiply();
    } else {
        gemm.help();
    }
    Epilogue<kN>{p, task, gemm.warp, gemm.lane, gemm.slab.first}.write(gemm.dequant, gemm.acc);
}

}  // namespace moe
