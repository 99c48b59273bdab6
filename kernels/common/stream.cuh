// Streaming packed weights through the tensor cores: the loop that every decode kernel is.
//
// A warp brings chunks of a slab to a ring of its own in shared memory and multiplies them some chunks later. The bulk
// copies need no registers while they are under way, and warps never wait for one another. Few large copies: with
// more than about a hundred under way in a multiprocessor, all of them become several times slower.
#pragma once
#include "format.cuh"
#include "matrix.cuh"
#include "ptx.cuh"

namespace moe {

constexpr int kStage = 128;

template <class Q, class S>
struct StageBytes {
    static constexpr int kCodes = Q::kWords * 512;  // of a block
    static constexpr int kScales = 8 * 4 * S::kRegisters;
    static constexpr int kAll = 2 * kCodes + kScales;
};

// A block's part of the other operand: x[2 s], x[2 s + 1] for step s.
struct Operand {
    uint32_t x[8];
};

// A row in global memory may be missing, one in shared memory (an address) is there.
__device__ __forceinline__ bool exists(const char* row) { return row != nullptr; }
__device__ __forceinline__ bool exists(uint32_t) { return true; }
__device__ __forceinline__ uint4 read_16(const char* at) { return load_16(at); }
__device__ __forceinline__ uint4 read_16(uint32_t at) { return read_shared<uint4>(at); }
__device__ __forceinline__ uint2 read_8(const char* at) { return load_8(at); }
__device__ __forceinline__ uint2 read_8(uint32_t at) { return read_shared<uint2>(at); }

// From a token's row at the block's first column; a missing one is zeros. `left` columns exist (all, if kWhole), the
// others are zeros.
template <class S, bool kWhole, class Row>
__device__ __forceinline__ Operand operand_of(Row row, int left, int t) {
    Operand o;
    if constexpr (S::kGroups == 8) {
#pragma unroll
        for (int s = 0; s < 4; s++) {
            uint2 v = make_uint2(0, 0);
            if (exists(row) && (kWhole || 16 * s + 4 * t < left)) v = read_8(row + 32 * s + 8 * t);
            o.x[2 * s] = v.x, o.x[2 * s + 1] = v.y;
        }
    } else {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            uint4 v = make_uint4(0, 0, 0, 0);
            if (exists(row) && (kWhole || 32 * j + 8 * t < left)) v = read_16(row + 64 * j + 16 * t);
            o.x[4 * j] = v.x, o.x[4 * j + 1] = v.y, o.x[4 * j + 2] = v.z, o.x[4 * j + 3] = v.w;
        }
    }
    return o;
}

// Both blocks of a stage; `row` is at its first column.
template <class S, class Row>
__device__ __forceinline__ void load_stage(Operand (&o)[2], Row row, int left, int t) {
    if (left >= kStage) {
        o[0] = operand_of<S, true>(row, 0, t);
        o[1] = operand_of<S, true>(row == Row{} ? row : row + 2 * kBlock, 0, t);
    } else {
        o[0] = operand_of<S, false>(row, left, t);
        o[1] = operand_of<S, false>(row == Row{} ? row : row + 2 * kBlock, left - kBlock, t);
    }
}

// A warp's ring of kDepth places.
template <class C, class Q, class S, int kDepth>
struct Ring {
    using Bytes = StageBytes<Q, S>;
    // Stages of a chunk, and its bytes.
    static constexpr int kStages = Q::kWords == 1 ? 2 : 1, kPlace = kStages * Bytes::kAll;
    // What a warp needs of shared memory.
    static constexpr int kBytes = kDepth * (kPlace + 16);
    uint32_t base, barriers;

    __device__ __forceinline__ Ring(uint32_t memory, int warp, int lane) {
        base = memory + warp * kBytes;
        barriers = base + kDepth * kPlace;
#if __CUDA_ARCH__ >= 900
        if (lane < kDepth) {
            barrier_init(barriers + 8 * lane, 1);
            barrier_init_done();
        }
        __syncwarp();
#endif
    }

    static __device__ __forceinline__ int chunks(const Matrix& m) { return (m.blocks + 2 * kStages - 1) / (2 * kStages); }

    // A chunk of weights, on its way to a place that all lanes have left.
    __device__ __forceinline__ void fetch(int place, const Matrix& m, const char* slab, int chunk, int lane) const {
        const uint32_t at = base + place * kPlace;
        const char* from = slab + chunk * kPlace;
        const int bytes = min(kPlace, m.slab_bytes - chunk * kPlace);
#if __CUDA_ARCH__ >= 900
        if (lane == 0) {
            const uint32_t barrier = barriers + 8 * place;
            barrier_expect(barrier, bytes);
            copy_bulk(at, from, bytes, barrier);
        }
#else
        for (int i = lane * 16; i < bytes; i += 512) copy_16(at + i, from + i);
#endif
    }

    // Ends the fetch of one chunk, or of none.
    __device__ __forceinline__ void commit() const {
#if __CUDA_ARCH__ < 900
        commit_copies();
#endif
    }

    // Waits for the chunk in `place`, which is the ring's `round`th in it; kDepth - 1 were committed, this one first.
    __device__ __forceinline__ void wait(int place, int round) const {
#if __CUDA_ARCH__ >= 900
        barrier_wait(barriers + 8 * place, round & 1);
#else
        wait_for_copies<kDepth - 2>();
#endif
        __syncwarp();
    }

    // acc += 16 rows times the tokens' columns, for the stage at `at`. kBlocks is 2, or 1 for the end of a slab. kOne:
    // a single token, which all columns hold.
    template <bool kOne, int kBlocks>
    static __device__ __forceinline__ void multiply(uint32_t at, const Matrix& m, Operand (&o)[2], int lane,
                                                    float (&acc)[4]) {
        constexpr bool kSums = S::kZero || Q::kOffset != 0.f;
        // Steps per scale group; products of a group are summed apart and then scaled.
        constexpr int kGroupSteps = S::kGroups == 0 ? 8 : 8 / S::kGroups;
        const uint32_t codes = at + lane * 16;
        uint32_t scales[S::kRegisters + 1];
        read_scales(at + kBlocks * Bytes::kCodes + (lane >> 2) * (4 * S::kRegisters), scales);
        float part[4] = {0.f, 0.f, 0.f, 0.f}, sums[4] = {0.f, 0.f, 0.f, 0.f};
        auto scale_group = [&](int i) {
            float scale[2], zero[2] = {8.f, 8.f};
            S::get(scales, i, m.scale_bf16, scale, zero);
            if constexpr (kSums) {
                const float off[2] = {-(zero[0] + Q::kOffset), -(zero[1] + Q::kOffset)};
                part[0] = fmaf(off[0], sums[0], part[0]), part[1] = fmaf(off[0], sums[1], part[1]);
                part[2] = fmaf(off[1], sums[2], part[2]), part[3] = fmaf(off[1], sums[3], part[3]);
                sums[0] = sums[1] = sums[2] = sums[3] = 0.f;
            }
            acc[0] = fmaf(part[0], scale[0], acc[0]), acc[2] = fmaf(part[2], scale[1], acc[2]);
            if constexpr (!kOne) acc[1] = fmaf(part[1], scale[0], acc[1]), acc[3] = fmaf(part[3], scale[1], acc[3]);
            part[0] = part[1] = part[2] = part[3] = 0.f;
        };
#pragma unroll
        for (int b = 0; b < kBlocks; b++) {
            uint4 w[Q::kWords];
#pragma unroll
            for (int i = 0; i < Q::kWords; i++) w[i] = read_shared<uint4>(codes + b * Bytes::kCodes + i * 512);
            uint32_t(&x)[8] = o[b].x;
            if constexpr (Q::kLift) {
#pragma unroll
                for (int i = 0; i < 8; i++) x[i] = C::mul(x[i], 0x67806780u);
            }
#pragma unroll
            for (int s = 0; s < 4; s++) {
                uint32_t a[4];
                Q::step(w, s, a);
                C::mma(S::kGroups == 0 ? acc : part, a, x[2 * s], x[2 * s + 1]);
                if constexpr (kSums) {
                    const uint32_t ones[4] = {C::kOnes, C::kOnes, C::kOnes, C::kOnes};
                    C::mma(sums, ones, x[2 * s], x[2 * s + 1]);
                }
                if constexpr (S::kGroups > 1) {
                    if ((4 * b + s + 1) % kGroupSteps == 0) scale_group((4 * b + s) / kGroupSteps);
                }
            }
        }
        if constexpr (S::kGroups == 1) scale_group(0);
    }

    // One chunk: loads the tokens' part, waits for the weights, lets `refill` send for another chunk, multiplies.
    // `row` is the lane's token from its first column on (a pointer, null for none, or an address in shared memory);
    // `length` elements of it exist.
    template <bool kOne, class Row, class F>
    __device__ __forceinline__ void turn(int place, int round, const Matrix& m, int chunk, Row row, int length, int lane,
                                         F refill, float (&acc)[4]) const {
        const int t = lane & 3;
        const uint32_t at = base + place * kPlace;
        Operand o[kStages][2];
        // Shared memory is near: no need to load ahead of the wait.
        if constexpr (!kOne) load(o, row, chunk, length, t);
        wait(place, round);
        refill();
        if constexpr (kOne) load(o, row, chunk, length, t);
#pragma unroll
        for (int f = 0; f < kStages; f++) {
            const int stage = chunk * kStages + f, blocks = m.blocks - 2 * stage;
            if (blocks >= 2) {
                multiply<kOne, 2>(at + f * Bytes::kAll, m, o[f], lane, acc);
            } else if (blocks == 1) {
                multiply<kOne, 1>(at + f * Bytes::kAll, m, o[f], lane, acc);
            }
        }
    }

    template <class Row>
    static __device__ __forceinline__ void load(Operand (&o)[kStages][2], Row row, int chunk, int length, int t) {
#pragma unroll
        for (int f = 0; f < kStages; f++) {
            const int stage = chunk * kStages + f;
            load_stage<S>(o[f], row == Row{} ? row : row + stage * (2 * kStage), length - stage * kStage, t);
        }
    }

    static __device__ __forceinline__ void read_scales(uint32_t at, uint32_t (&r)[S::kRegisters + 1]) {
        if constexpr (S::kRegisters == 1) {
            r[0] = read_shared<uint32_t>(at);
        } else if constexpr (S::kRegisters == 2) {
            const uint2 v = read_shared<uint2>(at);
            r[0] = v.x, r[1] = v.y;
        } else {
#pragma unroll
            for (int i = 0; i < S::kRegisters; i += 4) {
                const uint4 v = read_shared<uint4>(at + 4 * i);
                r[i] = v.x, r[i + 1] = v.y, r[i + 2] = v.z, r[i + 3] = v.w;
            }
        }
    }
};

}  // namespace moe
