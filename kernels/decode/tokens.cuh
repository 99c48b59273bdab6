// Tokens' rows in a block's shared memory: a barrier (16 bytes), the rows, the sums of their scale groups or (kHalves) the
// units of their stages.
#pragma once
#include "params.cuh"

namespace moe {

// kApart: a lone token's scale groups are to have columns for themselves.
template <class C, class Q, class S, bool kLift, bool kApart>
struct Rows {
    static constexpr bool kHalves = Q::kHalves;
    static constexpr int kGroups = S::kGroups == 0 || kHalves ? 1 : S::kGroups;  // whose sums there are, per stage
    static constexpr bool kSums = kHalves || kNeedsSums<Q, S>;
    uint32_t barrier, rows;
    int blocks, length, stride, sum_stride, count, pitch;

    // `count` rows of `length` elements (a multiple of 8), padded to `blocks` blocks; in global memory they are `pitch`
    // apart. src/cuda/decode/plan.rs reckons the same.
    __device__ __forceinline__ Rows(uint32_t at, int blocks, int length, int count, int pitch)
        : barrier(at), rows(at + 16), blocks(blocks), length(length), count(count), pitch(pitch) {
        // Off a multiple of 128 bytes, so that two rows lie in different banks.
        stride = blocks * 128 + 64;
        // Not where nobody asks for them: with several tokens it is this much that may keep the second kernel's block from
        // a place beside the first one's.
        sum_stride = kSums ? (blocks + 1) / 2 * kGroups * 4 : 0;
    }

    __device__ __forceinline__ uint32_t row(int i) const { return rows + i * stride; }
    __device__ __forceinline__ uint32_t sums(int i) const { return rows + count * stride + i * sum_stride; }
    __device__ __forceinline__ uint32_t end() const { return sums(count); }

    // A vector of a row, where it belongs: `at` is where it would lie in the columns' order. A thread has odd or even ones.
    static __device__ __forceinline__ void store(uint32_t at, const uint4& x) {
        if constexpr (kApart) {
            ApartTokens::store(at, threadIdx.x & 1, x);
        } else {
            store_16(at, x);
        }
    }

    // Before the first kernel's rows are sent for: zeros behind them, and the barrier. The whole block's; a barrier of the
    // block must follow before `prepare`.
    __device__ __forceinline__ void init() const {
#if MOE_BULK
        if (threadIdx.x == 32) {
            barrier_init(barrier, 1);
            barrier_init_done();
        }
#endif
        const int vectors = blocks * 8 - length / 8;
        if (vectors == 0) return;
        for (int i = threadIdx.x; i < vectors * count; i += blockDim.x) {
            store_16(row(i / vectors) + 2 * length + i % vectors * 16, make_uint4(0, 0, 0, 0));
        }
    }

    // Sends for the rows at `from`, one after the other there.
    __device__ __forceinline__ void fetch(const typename C::T* from) const {
        const int bytes = 2 * length;
#if MOE_BULK
        // By the block's second warp: the first has the ids to look at.
        if (threadIdx.x / 32 == 1) {
            const int lane = threadIdx.x & 31;
            if (lane == 0) barrier_expect(barrier, bytes * count);
            __syncwarp();
            for (int i = lane; i < count; i += 32) copy_bulk(row(i), from + (long long)i * pitch, bytes, barrier);
        }
#else
        for (int i = 0; i < count; i++) {
            for (int b = threadIdx.x * 16; b < bytes; b += blockDim.x * 16) {
                copy_16(row(i) + b, reinterpret_cast<const char*>(from + (long long)i * pitch) + b);
            }
        }
        commit_copies();
#endif
    }

    // Waits for the rows, where at most `later` groups of copies were committed since.
    __device__ __forceinline__ void wait(int later) const {
#if MOE_BULK
        barrier_wait(barrier, 0);
#else
        wait_for_copies(later);
        __syncthreads();
#endif
    }

    // Half a warp's: a stage's numbers, eight a lane, as f16 in units of what is returned: 2^-14 of the power of two that their
    // largest has, which leaves all that are within 2^28 of it as exact as they came.
    static __device__ __forceinline__ float halve(uint4& x) {
        uint32_t v[4] = {x.x, x.y, x.z, x.w};
        float2 f[4];
        uint32_t most = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            f[j] = C::to_floats(v[j]);
            most = max(most, max(__float_as_uint(f[j].x) & 0x7fffffffu, __float_as_uint(f[j].y) & 0x7fffffffu));
        }
#pragma unroll
        for (int d = 1; d < 16; d *= 2) most = max(most, __shfl_xor_sync(~0u, most, d));
        const uint32_t exponent = max(most >> 23, 15u);
        const float times = __uint_as_float((268 - exponent) << 23);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const __half2 h = __floats2half2_rn(f[j].x * times, f[j].y * times);
            v[j] = *reinterpret_cast<const uint32_t*>(&h);
        }
        x = make_uint4(v[0], v[1], v[2], v[3]);
        // What is no number stays none.
        const float unit = __uint_as_float((exponent - 14) << 23) * (Q::kHalvesScale * (kLift ? 0x1p80f : 1.f));
        return most >= 0x7f800000u ? __uint_as_float(0x7fc00000u) : unit;
    }

    // And makes them what NearTokens wants: lifted, summed up. The whole block's.
    __device__ __forceinline__ void prepare(int later) const {
        wait(later);
        if constexpr (kHalves) {
            const int stages = (blocks + 1) / 2, all = count * stages, lane = threadIdx.x & 15;
#pragma unroll 1
            for (int start = threadIdx.x / 32 * 2; start < all; start += blockDim.x / 16) {
                const int i = start + (threadIdx.x & 31) / 16, r = i / stages, stage = i - r * stages;
                const bool exists = i < all && 2 * stage + lane / 8 < blocks;
                const uint32_t at = row(r) + stage * 256 + lane * 16;
                uint4 x = make_uint4(0, 0, 0, 0);
                if (exists) x = read_shared<uint4>(at);
                const float unit = halve(x);
                if (exists) store_16(at, x);
                if (exists && lane == 0) store_4(sums(r) + stage * 4, __float_as_uint(unit));
            }
            __syncthreads();
            return;
        }
        if constexpr (kLift || kApart) {
            for (int i = 0; i < count; i++) {
#pragma unroll 1
                for (int v = threadIdx.x; v < blocks * 8; v += blockDim.x) {
                    uint4 x = read_shared<uint4>(row(i) + 16 * v);
                    if constexpr (kLift) {
                        x.x = C::mul(x.x, kLiftPair), x.y = C::mul(x.y, kLiftPair);
                        x.z = C::mul(x.z, kLiftPair), x.w = C::mul(x.w, kLiftPair);
                    }
                    // Two lanes write where both have read.
                    if constexpr (kApart) __syncwarp(3u << (threadIdx.x & 30));
                    store(row(i) + 16 * v, x);
                }
            }
        }
        if constexpr (kNeedsSums<Q, S>) {
            // Half a warp sums up a stage's groups, eight columns a lane.
            constexpr int kLanes = 16 / kGroups;
            const int stages = (blocks + 1) / 2, all = count * stages, lane = threadIdx.x & 15;
#pragma unroll 2
            for (int start = threadIdx.x / 32 * 2; start < all; start += blockDim.x / 16) {
                const int i = start + (threadIdx.x & 31) / 16, r = i / stages, stage = i - r * stages;
                uint4 x = make_uint4(0, 0, 0, 0);
                if (i < all && 2 * stage + lane / 8 < blocks) x = read_shared<uint4>(row(r) + stage * 256 + lane * 16);
                float sum = (C::sum_of(x.x) + C::sum_of(x.y)) + (C::sum_of(x.z) + C::sum_of(x.w));
#pragma unroll
                for (int d = 1; d < kLanes; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
                if (i < all && lane % kLanes == 0) {
                    store_4(sums(r) + (stage * kGroups + lane / kLanes) * 4, __float_as_uint(sum));
                }
            }
        }
        if constexpr (kLift || kApart || kNeedsSums<Q, S>) __syncthreads();
    }

    // What a thread will load: its vectors' offsets, found before the rows are there.
    template <int kBatch>
    struct Walk {
        int row, vector, rows, vectors;  // of the next batch, and how a step goes on
        int from[kBatch];                // bytes from the first row on; -1 for zeros
        uint32_t to[kBatch], sum[kBatch];
    };
    __device__ __forceinline__ int vectors() const { return (blocks + 1) / 2 * 16; }  // of 16 bytes, to whole stages
    template <int kBatch>
    __device__ __forceinline__ Walk<kBatch> walk() const {
        const int per_row = vectors(), t = threadIdx.x, step = blockDim.x;
        Walk<kBatch> w;
        w.row = t / per_row, w.vector = t % per_row, w.rows = step / per_row, w.vectors = step % per_row;
        next(w);
        return w;
    }
    template <int kBatch>
    __device__ __forceinline__ void next(Walk<kBatch>& w) const {
        constexpr int kLanes = 16 / kGroups;  // of a scale group
        const int per_row = vectors();
#pragma unroll
        for (int b = 0; b < kBatch; b++) {
            const bool exists = w.row < count;
            w.from[b] = exists && 8 * w.vector < length ? (w.row * pitch + 8 * w.vector) * 2 : -1;
            w.to[b] = exists && w.vector < blocks * 8 ? row(w.row) + 16 * w.vector : 0;
            w.sum[b] = exists && threadIdx.x % kLanes == 0 ? sums(w.row) + w.vector / kLanes * 4 : 0;
            w.row += w.rows, w.vector += w.vectors;
            if (w.vector >= per_row) w.vector -= per_row, w.row++;
        }
    }

    // Brings rows that are in L2, as NearTokens wants them, but for lifting: quicker than copies by the engine, which take
    // a microsecond. The whole block's; a barrier of the block must follow.
    template <int kBatch>
    __device__ __forceinline__ void load(const typename C::T* first, Walk<kBatch> w) const {
        const int lane = threadIdx.x & 31, all = vectors() * count;
#pragma unroll 1
        for (int start = threadIdx.x - lane;;) {
            uint4 x[kBatch];
#pragma unroll
            for (int b = 0; b < kBatch; b++) {
                x[b] = make_uint4(0, 0, 0, 0);
                if (w.from[b] >= 0) x[b] = load_16(reinterpret_cast<const char*>(first) + w.from[b]);
            }
#pragma unroll
            for (int b = 0; b < kBatch; b++) {
                if constexpr (kHalves) {
                    const float unit = halve(x[b]);
                    if (w.sum[b] != 0) store_4(w.sum[b], __float_as_uint(unit));
                }
                if (w.to[b] != 0) store(w.to[b], x[b]);
                if constexpr (kNeedsSums<Q, S>) {
                    constexpr int kLanes = 16 / kGroups;
                    float sum = (C::sum_of(x[b].x) + C::sum_of(x[b].y)) + (C::sum_of(x[b].z) + C::sum_of(x[b].w));
#pragma unroll
                    for (int d = 1; d < kLanes; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
                    if (w.sum[b] != 0) store_4(w.sum[b], __float_as_uint(sum));
                }
            }
            start += kBatch * blockDim.x;
            if (start >= all) break;
            next(w);
        }
    }
};

}  // namespace moe
