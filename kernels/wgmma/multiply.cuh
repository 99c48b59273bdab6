// A warpgroup's 64 rows times a tile's tokens. Weights come from the ring into registers, in which the products take them;
// tokens stay in the ring. The other warpgroups' products run while this one reads weights.
#pragma once
#include "products.cuh"
#include "task.cuh"

namespace moe {

// How the tensor cores find rows of 128 bytes, in groups of eight, exchanged as produce.cuh says.
__device__ __forceinline__ uint64_t columns_at(uint32_t at) {
    return static_cast<uint64_t>((at & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// A thread's part of a tile's sums.
template <int kN>
using Sums = Sum[Layout<kN>::kChunks][Layout<kN>::kWidth / 2];

template <int kN>
struct Multiply {
    using L = Layout<kN>;
    const GemmParams& p;
    const L& memory;
    Place& place;
    const int slab, lane;  // the warp's slab of the tile's

    // Operands of a stage. Blocks beyond the matrix are zeros.
    __device__ __forceinline__ void load(uint32_t (&a)[kSteps][4], int at, int stage) const {
        const uint32_t from = memory.weights(at) + slab * kSlabStage + lane * 16;
#pragma unroll
        for (int k = 0; k < kSteps; k++) {
            uint4 v = make_uint4(0, 0, 0, 0);
            if (kBlocks == 1 || k < 2 || kBlocks * stage + 1 < p.weights.blocks) v = read_shared<uint4>(from + 512 * k);
            if constexpr (kHalf) {
                a[k][0] = v.x, a[k][1] = v.y, a[k][2] = v.z, a[k][3] = v.w;
            } else {
                // A word has two columns of row g and of row g + 8 by turns.
                a[k][0] = __byte_perm(v.x, v.y, 0x6420), a[k][1] = __byte_perm(v.x, v.y, 0x7531);
                a[k][2] = __byte_perm(v.z, v.w, 0x6420), a[k][3] = __byte_perm(v.z, v.w, 0x7531);
            }
        }
    }
    __device__ __forceinline__ void wait_full(Place at) const {
        barrier_wait(memory.full(at.at), at.round);
        // Tokens were written by ordinary copies, and the tensor cores read another way.
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __device__ __forceinline__ void release(int at) const {
        __syncwarp();
        if (lane == 0) barrier_arrive(memory.free(at));
    }

    // Sums in place.
    template <int kW, int kUsed>
    __device__ __forceinline__ void plain(Sums<kN>& acc) {
        const int stages = stages_of(p);
        uint32_t a[kSteps][4];
        wait_full(place);
        load(a, place.at, 0);
#pragma unroll 1
        for (int stage = 0; stage < stages; stage++) {
            const int at = uniform(place.at);
            const uint64_t columns = columns_at(memory.tokens(at));
            place.next(memory.depth);
            products_begin();
#pragma unroll
            for (int k = 0; k < kSteps; k++) {
#pragma unroll
                for (int c = 0; c < kUsed; c++) {
                    Product<kW>::run(acc[c], a[k], columns + 2 * k + c * (kW * kRowBytes / 16), stage > 0 || k > 0);
                }
            }
            products_commit();
            products_wait<0>();
            release(at);
            if (stage + 1 < stages) {
                wait_full(place);
                load(a, place.at, stage + 1);
            }
        }
    }

    // Adds a stage's sums, of one chunk of columns, to all stages' in float32.
    template <int kW, int kLength>
    __device__ __forceinline__ void promote(float (&all)[L::kWidth / 2], const Sum (&part)[kLength], int at, int stage,
                                            int chunk) const {
        if constexpr (kBlockScales) {
            const int blocks = min(kBlocks, p.weights.blocks - kBlocks * stage);
            const uint32_t rows = memory.weights(at) + slab * kSlabStage + blocks * kCodeBytes + lane / 4 * 8;
            const float low = read_float(rows), high = read_float(rows + 4);
            const uint32_t columns = memory.scales(at) + 4 * (chunk * kW + 2 * (lane & 3));
#pragma unroll
            for (int j = 0; j < kW / 8; j++) {
                const uint2 s = read_shared<uint2>(columns + 32 * j);
                const float s0 = __uint_as_float(s.x), s1 = __uint_as_float(s.y);
                all[4 * j] = fmaf(part[4 * j] * low, s0, all[4 * j]);
                all[4 * j + 1] = fmaf(part[4 * j + 1] * low, s1, all[4 * j + 1]);
                all[4 * j + 2] = fmaf(part[4 * j + 2] * high, s0, all[4 * j + 2]);
                all[4 * j + 3] = fmaf(part[4 * j + 3] * high, s1, all[4 * j + 3]);
            }
        } else {
#pragma unroll
            for (int i = 0; i < kW / 2; i++) all[i] += part[i];
        }
    }

    // Sums a stage and a chunk of columns at a time, and adds those up while the other warpgroups' products run.
    template <int kW, int kUsed>
    __device__ __forceinline__ void promoted(Sums<kN>& acc) {
        const int stages = stages_of(p);
        uint32_t a[kSteps][4];
#pragma unroll
        for (int c = 0; c < kUsed; c++) {
#pragma unroll
            for (int i = 0; i < kW / 2; i++) acc[c][i] = 0;
        }
        wait_full(place);
        load(a, place.at, 0);
#pragma unroll 1
        for (int stage = 0; stage < stages; stage++) {
            const int at = uniform(place.at);
            const uint64_t columns = columns_at(memory.tokens(at));
            place.next(memory.depth);
#pragma unroll
            for (int c = 0; c < kUsed; c++) {
                Sum part[kW / 2];
                products_begin();
#pragma unroll
                for (int k = 0; k < kSteps; k++) {
                    Product<kW>::run(part, a[k], columns + 2 * k + c * (kW * kRowBytes / 16), k > 0);
                }
                products_commit();
                products_wait<0>();
                if (c == kUsed - 1 && stage + 1 < stages) {
                    wait_full(place);
                    load(a, place.at, stage + 1);
                }
                promote<kW>(acc[c], part, at, stage, c);
            }
            release(at);
        }
    }
};

}  // namespace moe
