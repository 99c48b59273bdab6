// A warpgroup's 64 rows times a tile's tokens. Weights come from the ring into registers, in which the products take them;
// tokens stay in the ring.
#pragma once
#include "products.cuh"
#include "task.cuh"

namespace moe {

// How the tensor cores find rows of 128 bytes, in groups of eight, exchanged as order.cuh says.
__device__ __forceinline__ uint64_t columns_at(uint32_t at) {
    return static_cast<uint64_t>((at & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// A warp's arrivals at the same barrier of every block of the cluster: nothing was written that another would read, so that no
// fence of the cluster is needed (which costs a microsecond).
__device__ __forceinline__ void arrive_at_all(uint32_t barrier, int lane) {
    __syncwarp();
    if constexpr (kWarpArrivals == 1) {
        if (lane < kCluster) barrier_arrive_remote(barrier, lane);
    } else {
        for (int block = 0; block < kCluster; block++) barrier_arrive_remote(barrier, block);
    }
}

template <int kN>
struct Multiply {
    using L = Layout<kN>;
    using Words = uint4[kSteps];
    using Operands = uint32_t[kSteps][4];
    const GemmParams& p;
    const L& memory;
    Place& place;
    const int slab, lane;  // the warp's slab of the tile's

    // A stage's words. Blocks beyond the matrix are zeros.
    __device__ __forceinline__ void read(Words& words, int at, int stage) const {
        const uint32_t from = memory.weights(at, slab, stage) + lane * 16;
#pragma unroll
        for (int k = 0; k < kSteps; k++) {
            words[k] = make_uint4(0, 0, 0, 0);
            if (kBlocks == 1 || k < 2 || kBlocks * stage + 1 < p.weights.blocks) words[k] = read_shared<uint4>(from + 512 * k);
        }
    }
    // Operands of them, here, not between products.
    __device__ __forceinline__ static void arrange(Operands& a, const Words& words) {
#pragma unroll
        for (int k = 0; k < kSteps; k++) {
            const uint4& v = words[k];
            if constexpr (kHalf) {
                a[k][0] = v.x, a[k][1] = v.y, a[k][2] = v.z, a[k][3] = v.w;
            } else {
                // A word has two columns of row g and of row g + 8 by turns.
                a[k][0] = __byte_perm(v.x, v.y, 0x6420), a[k][1] = __byte_perm(v.x, v.y, 0x7531);
                a[k][2] = __byte_perm(v.z, v.w, 0x6420), a[k][3] = __byte_perm(v.z, v.w, 0x7531);
            }
        }
#pragma unroll
        for (int k = 0; k < kSteps; k++) {
#pragma unroll
            for (int i = 0; i < 4; i++) asm volatile("" : "+r"(a[k][i]));
        }
    }
    // Whether a stage is the last one of its place.
    __device__ __forceinline__ bool ends(int stage) const {
        return L::kSpan == 1 || stage % L::kSpan == L::kSpan - 1 || stage + 1 == stages_of(p);
    }
    __device__ __forceinline__ void release(int at, int stage) const {
        if (ends(stage)) arrive_at_all(memory.free(at), lane);
    }

    // Until the next stage is there.
    __device__ __forceinline__ void await(int stage) const {
        if (stage % L::kSpan == 0) barrier_wait(memory.full(place.at), place.round);
    }
    __device__ __forceinline__ void fetch(Operands& a, int stage) const {
        Words words;
        await(stage);
        read(words, place.at, stage);
        arrange(a, words);
    }
    // Sends for a stage's products, whose operands are `a`; its place.
    template <int kW>
    __device__ __forceinline__ int begin(Sums<kN>& acc, const Operands& a, int stage) {
        const int at = uniform(place.at);
        const uint64_t columns = columns_at(memory.tokens(at, stage));
        if (ends(stage)) place.next(memory.depth);
        products_begin();
#pragma unroll
        for (int k = 0; k < kSteps; k++) Product<kW>::run(acc[0], a[k], columns + 2 * k, 1);
        products_commit();
        return at;
    }

    template <int kW, int kUsed>
    __device__ __forceinline__ void clear(Sums<kN>& acc) const {
#pragma unroll
        for (int c = 0; c < kUsed; c++) {
#pragma unroll
            for (int i = 0; i < (c + 1 < kUsed ? L::kWidth : kW) / 2; i++) acc[c][i] = 0;
        }
    }

    // Sums in place.
    template <int kW>
    __device__ __forceinline__ void plain(Sums<kN>& acc) {
        clear<kW, 1>(acc);
        // Where the compiler finds no registers for two stages' operands, one by one.
        if constexpr (kInt8 && kN > 128) {
            one_by_one<kW>(acc);
        } else {
            two_by_two<kW>(acc);
        }
    }
    template <int kW>
    __device__ __forceinline__ void one_by_one(Sums<kN>& acc) {
        const int stages = stages_of(p);
        Operands a;
        fetch(a, 0);
#pragma unroll 1
        for (int stage = 0; stage < stages; stage++) {
            const int at = begin<kW>(acc, a, stage);
            products_wait<0>();
            release(at, stage);
            if (stage + 1 < stages) fetch(a, stage + 1);
        }
    }
    // A stage's operands are read while the last one's products run.
    template <int kW>
    __device__ __forceinline__ void two_by_two(Sums<kN>& acc) {
        const int stages = stages_of(p);
        Operands even, odd;
        fetch(even, 0);
        int left = stages;
#pragma unroll 1
        for (; left > 2; left -= 2) {
            const int stage = stages - left;
            int at = begin<kW>(acc, even, stage);
            fetch(odd, stage + 1);
            products_wait<0>();
            release(at, stage);
            at = begin<kW>(acc, odd, stage + 1);
            fetch(even, stage + 2);
            products_wait<0>();
            release(at, stage + 1);
        }
        int at = begin<kW>(acc, even, stages - left);
        if (left > 1) fetch(odd, stages - 1);
        products_wait<0>();
        release(at, stages - left);
        if (left > 1) {
            at = begin<kW>(acc, odd, stages - 1);
            products_wait<0>();
            release(at, stages - 1);
        }
    }

    // Scales of a slab's stage at `at`, of the thread's two rows.
    struct Pair {
        float low, high;
    };
    __device__ __forceinline__ Pair row_scales(uint32_t at, int stage) const {
        const int blocks = min(kBlocks, p.weights.blocks - kBlocks * stage);
        const uint2 v = read_shared<uint2>(at + blocks * kCodeBytes + lane / 4 * 8);
        return {__uint_as_float(v.x), __uint_as_float(v.y)};
    }

    // Tokens' scales of a stage's columns from `first` on, of the thread's columns.
    template <int kW>
    using Columns = uint2[kBlockScales ? kW / 8 : 1];
    template <int kW>
    __device__ __forceinline__ void column_scales(Columns<kW>& columns, int at, int stage, int first) const {
        const uint32_t from = memory.scales(at, stage) + 4 * (first + 2 * (lane & 3));
#pragma unroll
        for (int j = 0; j < kW / 8; j++) columns[j] = read_shared<uint2>(from + 32 * j);
    }

    // Adds a stage's sums, of eight columns, to all stages' in float32.
    static __device__ __forceinline__ void add_scaled(float* all, const Sum* part, const Pair& rows, uint2 columns) {
        const float s0 = __uint_as_float(columns.x), s1 = __uint_as_float(columns.y);
        all[0] = fmaf(part[0] * rows.low, s0, all[0]), all[1] = fmaf(part[1] * rows.low, s1, all[1]);
        all[2] = fmaf(part[2] * rows.high, s0, all[2]), all[3] = fmaf(part[3] * rows.high, s1, all[3]);
    }

    // The products of a stage's chunk of kW columns from `first` on, added to `all` while the other warpgroup's run. Of the
    // last chunk, the next stage's words come on their way and take the place of this one's.
    template <int kW, bool kLast>
    __device__ __forceinline__ void add_chunk(Sum (&all)[L::kWidth / 2], Operands& a, const Pair& rows, int at, int stage,
                                              int first) const {
        // Scales are read while products run. Wider products are slower for the registers that this takes.
        constexpr bool kAhead = kN <= 64;
        // So are words.
        constexpr bool kEarly = kN <= 128;
        const uint64_t columns = columns_at(memory.tokens(at, stage)) + first * kRowBytes / 16;
        Sum part[kW / 2];
        products_begin();
#pragma unroll
        for (int k = 0; k < kSteps; k++) Product<kW>::run(part, a[k], columns + 2 * k, k > 0);
        products_commit();
        Columns<kW> scales;
        if (kBlockScales && kAhead) column_scales<kW>(scales, at, stage, first);
        const bool more = kLast && stage + 1 < stages_of(p);
        Words next;
        if (more && kEarly) await(stage + 1), read(next, place.at, stage + 1);
        products_wait<0>();
        if (more && !kEarly) await(stage + 1), read(next, place.at, stage + 1);
        if (kBlockScales && !kAhead) column_scales<kW>(scales, at, stage, first);
#pragma unroll
        for (int j = 0; j < kW / 8; j++) {
            if constexpr (kBlockScales) {
                add_scaled(all + 4 * j, part + 4 * j, rows, scales[j]);
            } else {
#pragma unroll
                for (int i = 4 * j; i < 4 * j + 4; i++) all[i] += part[i];
            }
        }
        if (more) arrange(a, next);
    }

    // Sums a stage and a chunk of columns at a time; the last of kUsed chunks has kW.
    template <int kW, int kUsed>
    __device__ __forceinline__ void promoted(Sums<kN>& acc) {
        static_assert(kUsed <= 2, "");
        Operands a;
        clear<kW, kUsed>(acc);
        fetch(a, 0);
#pragma unroll 1
        for (int stage = 0; stage < stages_of(p); stage++) {
            const int at = uniform(place.at);
            if (ends(stage)) place.next(memory.depth);
            Pair rows = {};
            if (kBlockScales) rows = row_scales(memory.weights(at, slab, stage), stage);
            if constexpr (kUsed == 2) add_chunk<L::kWidth, false>(acc[0], a, rows, at, stage, 0);
            add_chunk<kW, true>(acc[kUsed - 1], a, rows, at, stage, (kUsed - 1) * L::kWidth);
            release(at, stage);
        }
    }
};

}  // namespace moe
