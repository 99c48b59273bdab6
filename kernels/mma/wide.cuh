// Tiles of 128 tokens, which wait for the tensor cores. A warp takes 64 rows by up to 64 columns: an unpacked weight is
// used up to eight times.
//
// Two warps share a scheduler, and a product keeps its warp for six cycles: nothing else may stand in its way. The loop is
// made for every number of columns, has next to no branches, and what a step needs was read and unpacked in the step
// before. Two blocks on a multiprocessor: one multiplies while the other begins or ends.
//
// Two rings: blocks of tokens and stages of weights. A stage is sent for before the tokens of its first block, so that
// those stand for both.
#pragma once
#include "epilogue.cuh"

namespace moe {

// What a warp reads of a block of K.
struct Source {
    uint32_t tokens, codes, scales;
    int block;  // of the stage
};

template <int kN>
struct Wide {
    using S = Shape<kN>;
    static constexpr int kTokenBytes = kN * kRowBytes, kSteps = 4 * S::kWarpSlabs;
    // What a warp sends for: slabs; 512 bytes at a time of a stage and of a block of tokens.
    static constexpr int kFetched = S::kSlabs / S::kWarps, kScaleBytes = Format::kScale == Scale::kNone ? 0 : 256;
    static constexpr int kStageCopies = (kBlocks * kCodeBytes + kScaleBytes) / 512 + (kScaleBytes > 0 ? 1 : 0);
    static constexpr int kTokenCopies = kTokenBytes / 512 / S::kWarps;
    const GemmParams& p;
    const Task task;
    const Slabs slab;
    const uint32_t memory;
    const int warp, lane, stage_bytes;
    // Pairs of eight columns that hold tokens.
    const int pairs;
    D dequant[S::kWarpSlabs];
    Sum acc[S::kWarpSlabs][S::kTiles][4];

    __device__ __forceinline__ Wide(const GemmParams& params, const Task& its, uint32_t shared, int w)
        : p(params), task(its), slab{params.weights, its.expert, its.row_tile * S::kSlabs}, memory(shared), warp(w),
          lane(threadIdx.x & 31), stage_bytes(kBlocks * kCodeBytes + 8 * params.scales.stride),
          pairs(((its.count + 15) / 16 + S::kWarpColumns - 1 - w % S::kWarpColumns) / S::kWarpColumns), acc{} {
#pragma unroll
        for (int s = 0; s < S::kWarpSlabs; s++) dequant[s].begin();
    }

    static __device__ __forceinline__ void make_barriers(const GemmParams& p, uint32_t memory) {
        for (int i = 0; i < p.depth; i++) {
            // Full: every thread's copies. Free: every warp.
            barrier_init(memory + 8 * i, S::kThreads);
            barrier_init(memory + kBarriers + 8 * i, S::kWarps * kWarpArrivals);
        }
    }
    __device__ __forceinline__ uint32_t full(int n) const { return memory + 8 * n; }
    __device__ __forceinline__ uint32_t free(int n) const { return memory + kBarriers + 8 * n; }
    __device__ __forceinline__ uint32_t tokens_at(int n) const { return memory + kRingAt + n * kTokenBytes; }
    __device__ __forceinline__ uint32_t weights_at(int n) const {
        return tokens_at(p.depth) + n * (S::kSlabs * stage_bytes);
    }
    static __device__ __forceinline__ int in_stage(int block) { return kBlocks == 1 ? 0 : block % kBlocks; }

    // What a thread sends for next. A slab beyond the matrix is not, and what comes of it is not written.
    struct Cursor {
        const char *tokens, *weights;
        int token_bytes;   // of a block, from the thread's first on
        int weight_bytes;  // of a slab, from there on
        int block;         // of tokens
        int slabs;         // of the matrix, from the warp's first on
    };
    __device__ __forceinline__ Cursor begin_copies() const {
        const int first = slab.first + warp * kFetched, offset = warp * (kTokenCopies * 512) + lane * 16;
        return {p.x + (long long)task.start * kRowBytes + offset,
                slab_of(p.weights, task.expert, first) + lane * 16,
                task.count * kRowBytes - offset,
                p.weights.slab_bytes - lane * 16,
                0,
                p.weights.slabs - first};
    }
    __device__ __forceinline__ void copy_weights(const Cursor& c, int nth, bool wanted, int to) const {
        const int s = nth / kStageCopies, i = nth % kStageCopies;
        const int bytes = wanted && s < c.slabs ? min(c.weight_bytes, stage_bytes - lane * 16) : 0;
        const uint32_t at = weights_at(to) + (warp * kFetched + s) * stage_bytes + lane * 16;
        if (i * 512 < bytes) copy_16(at + i * 512, c.weights + (long long)s * p.weights.slab_bytes + i * 512);
    }
    __device__ __forceinline__ void copy_tokens(const Cursor& c, int nth, int to) const {
        const int bytes = c.block < p.weights.blocks ? c.token_bytes : 0;
        const uint32_t at = tokens_at(to) + warp * (kTokenCopies * 512) + lane * 16;
        if (nth * 512 < bytes) copy_16(at + nth * 512, c.tokens + nth * 512);
    }
    __device__ __forceinline__ void next_weights(Cursor& c) const { c.weights += stage_bytes, c.weight_bytes -= stage_bytes; }
    // A block of tokens and all that was sent for before are there when `to` is full.
    __device__ __forceinline__ void next_tokens(Cursor& c, int to) const {
        arrive_after_copies(full(to));
        c.tokens += p.plane, c.block++;
    }
    __device__ __forceinline__ void fill(Cursor& c) const {
        for (int i = 0; i < max(p.depth, p.weights_depth) - 1; i++) {
            if (i < p.weights_depth - 1) {
                for (int n = 0; n < kFetched * kStageCopies; n++) copy_weights(c, n, true, i);
                next_weights(c);
            }
            if (i < p.depth - 1) {
                for (int n = 0; n < kTokenCopies; n++) copy_tokens(c, n, i);
                next_tokens(c, i);
            }
        }
    }
    // Sends, in parts, for what goes to the places that the block and the stage before had.
    static constexpr int kRefillAt = 3, kParts = kSteps - 2 - kRefillAt;
    __device__ __forceinline__ void refill(Cursor& c, int part, int block, Place last, int last_weights) const {
        constexpr int kWeights = kFetched * kStageCopies, kEach = (kWeights + kTokenCopies + kParts - 1) / kParts;
        if (part == 0) {
            if (block > 0) barrier_wait(free(last.at), last.round);
            __syncwarp();
        }
        const bool wanted = in_stage(block) == 0;
#pragma unroll
        for (int i = part * kEach; i < (part + 1) * kEach; i++) {
            if (i < kWeights) {
                copy_weights(c, i, wanted, last_weights);
            } else if (i < kWeights + kTokenCopies) {
                copy_tokens(c, i - kWeights, last.at);
            }
        }
        if (part == kParts - 1) {
            if (wanted) next_weights(c);
            next_tokens(c, last.at);
        }
    }

    __device__ __forceinline__ void done(int place) const { warp_arrive(free(place), lane); }

    __device__ __forceinline__ Source source(int block, int place, int weights_place, uint32_t from_token) const {
        const int nth = in_stage(block), blocks = min(kBlocks, p.weights.blocks - block + nth);
        const uint32_t slabs = weights_at(weights_place) + warp / S::kWarpColumns * S::kWarpSlabs * stage_bytes;
        return {tokens_at(place) + from_token, slabs + nth * kCodeBytes + lane * 16,
                slabs + blocks * kCodeBytes + (lane >> 2) * p.scales.stride, nth};
    }
    // Enters the scales of half a block of all slabs, if the sums change their units there.
    __device__ __forceinline__ void enter_half(const Source& from, int half) {
        if constexpr (D::kUnits) {
            const int quarter = 2 * from.block + half;
            if (!D::moves(quarter, p.scales)) return;
            uint2 scales[S::kWarpSlabs];
#pragma unroll
            for (int s = 0; s < S::kWarpSlabs; s++) scales[s] = D::scales_of(from.scales + s * stage_bytes, quarter, p.scales);
#pragma unroll
            for (int s = 0; s < S::kWarpSlabs; s++) enter(dequant[s], scales[s], quarter, p.scales, acc[s]);
        }
    }
    // A step's operand: 16 rows by 16 columns.
    __device__ __forceinline__ void unpack(const Source& from, int step, const uint4 (&w)[Q::kWords], uint32_t (&a)[4]) {
        const int half = step / (2 * S::kWarpSlabs), s = step / 2 % S::kWarpSlabs, h = step % 2;
        const uint32_t scales = from.scales + s * stage_bytes;
        if (!D::kUnits && h == 0) {
            const int quarter = 2 * from.block + half;
            enter(dequant[s], D::scales_of(scales, quarter, p.scales), quarter, p.scales, acc[s]);
        }
        operand_of<Q>(w, 2 * half + h, a);
        dequant[s].enter_narrow(scales, 4 * from.block + 2 * half + h);
        dequant[s].finish(a);
    }
    static __device__ __forceinline__ void load_token(const Source& from, int half, int n, uint32_t (&b)[4]) {
        token_of((from.tokens ^ (64 * half)) + S::column(0, n) * kRowBytes, b);
    }
    __device__ __forceinline__ void load_codes(const Source& from, int unit, uint4 (&w)[Q::kWords]) const {
        codes_of(from.codes + unit % S::kWarpSlabs * stage_bytes, unit / S::kWarpSlabs, w);
    }

    // A warp's sums, of kUsed times eight columns.
    template <int kUsed>
    __device__ __forceinline__ void multiply(Cursor& copies) {
        const uint32_t from_token = token_offset(task.start, S::column(warp, 0) + (lane >> 2), lane);
        Place place, weights;
        barrier_wait(full(0), 0);
        __syncwarp();
        Source from = source(0, 0, 0, from_token);
        uint32_t b[kUsed][4], a[2][4];
        uint4 w[Q::kWords];
#pragma unroll
        for (int n = 0; n < kUsed; n++) load_token(from, 0, n, b[n]);
        load_codes(from, 0, w);
        enter_half(from, 0);
        unpack(from, 0, w, a[0]);
#pragma unroll 1
        for (int block = 0; block < p.weights.blocks; block++) {
            const Place next = place.next(p.depth);
            const Place then_weights = in_stage(block + 1) == 0 ? weights.next(p.weights_depth) : weights;
            // Beyond the last block old bytes are read, and not used.
            const Source then = source(block + 1, next.at, then_weights.at, from_token);
#pragma unroll
            for (int step = 0; step < kSteps; step++) {
                const int half = step / (2 * S::kWarpSlabs), s = step / 2 % S::kWarpSlabs, h = step % 2;
                // The last step that reads this half's tokens.
                const bool last = step % (2 * S::kWarpSlabs) == 2 * S::kWarpSlabs - 1;
#pragma unroll
                for (int n = 0; n < kUsed; n++) {
                    Product::mma(acc[s][n], a[step % 2], b[n][2 * h], b[n][2 * h + 1]);
                    if (last) load_token(half == 0 ? from : then, 1 - half, n, b[n]);
                }
                if (last && half == 0) enter_half(from, 1);
                if (last && half == 1 && block + 1 < p.weights.blocks) enter_half(then, 0);
                unpack(step == kSteps - 1 ? then : from, (step + 1) % kSteps, w, a[(step + 1) % 2]);
                if (step == kSteps - 2) {
                    barrier_wait(full(next.at), next.round);
                    __syncwarp();
                }
                // Before the wait for the next block, which may be among it.
                if (step >= kRefillAt && step < kRefillAt + kParts) {
                    refill(copies, step - kRefillAt, block, place.before(p.depth), weights.before(p.weights_depth).at);
                }
                if (h == 0) load_codes(step == kSteps - 2 ? then : from, (step / 2 + 1) % (kSteps / 2), w);
            }
            done(place.at);
            place = next, weights = then_weights, from = then;
        }
    }

    // Warps without tokens keep the others' pace.
    __device__ __forceinline__ void keep_pace(Cursor& copies) const {
        Place place, weights;
        for (int block = 0; block < p.weights.blocks; block++, place = place.next(p.depth)) {
            if (block > 0 && in_stage(block) == 0) weights = weights.next(p.weights_depth);
            barrier_wait(full(place.at), place.round);
#pragma unroll
            for (int i = 0; i < kParts; i++) {
                refill(copies, i, block, place.before(p.depth), weights.before(p.weights_depth).at);
            }
            done(place.at);
        }
    }
};

template <int kN>
__device__ __forceinline__ void wide(const GemmParams& p) {
    const uint32_t memory = static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
    if (threadIdx.x == 0) Wide<kN>::make_barriers(p, memory);
    __syncthreads();
    wait_for_previous_grid();
    release_next_grid();
    const Task task = task_of(p);
    if (task.expert < 0) return;
    // Behind the barriers until the sums are done: registers are scarce.
    const uint32_t keep = memory + 2 * kBarriers;
    keep_task(keep, task);
    Wide<kN> gemm(p, task, memory, uniform(threadIdx.x >> 5));
    typename Wide<kN>::Cursor copies = gemm.begin_copies();
    gemm.fill(copies);
    switch (gemm.pairs) {
        case 0: gemm.keep_pace(copies); break;
        case 1: gemm.template multiply<2>(copies); break;
        case 2: gemm.template multiply<4>(copies); break;
        case 3: gemm.template multiply<6>(copies); break;
        default: gemm.template multiply<8>(copies);
    }
    write_kept<kN>(p, keep, gemm);
}

}  // namespace moe
