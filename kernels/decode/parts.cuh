// Warps that share a unit hold parts of the same 16 rows x 8 columns: adding them up.
#pragma once
#include "params.cuh"

namespace moe {

// Some warps of a block that share units of work, a power of two of them.
struct Group {
    int number, rank, size, count;  // of the block's groups, of the group's warps

    __device__ __forceinline__ Group(int number, int rank, int size, int count)
        : number(number), rank(rank), size(size), count(count) {}
    __device__ __forceinline__ Group(int warp, int split) {
        number = warp >> split, rank = warp & ((1 << split) - 1), size = 1 << split;
        count = (blockDim.x >> 5) >> split;
    }
    __device__ __forceinline__ void barrier() const { group_barrier(1 + number, 32 * size); }
};

// Two slots of every warp in shared memory, used in turn: whoever adds up reads one while the others are ahead by one.
template <bool kOne>
struct Parts {
    static constexpr int kBytes = kOne ? 8 : 16;  // of a lane
    uint32_t at;

    // What a block's warps need of shared memory.
    static __device__ __forceinline__ int bytes(int warps, int split) { return split == 0 ? 0 : 2 * warps * 32 * kBytes; }

    // Adds the group's parts of its `n`th unit up, for the one warp that `takes` them: the one with the unit's first chunk.
    // From there on in the order of their chunks, so that a unit's bits do not depend on which warps had them.
    __device__ __forceinline__ void add(const Group& group, int n, bool takes, int lane, float (&acc)[4]) const {
        const uint32_t mine = at + (((n & 1) * group.count + group.number) * group.size * 32 + lane) * kBytes;
        if (kOne) {
            store_8(mine + group.rank * 32 * kBytes, make_uint2(__float_as_uint(acc[0]), __float_as_uint(acc[2])));
        } else {
            store_16(mine + group.rank * 32 * kBytes, make_uint4(__float_as_uint(acc[0]), __float_as_uint(acc[1]),
                                                                 __float_as_uint(acc[2]), __float_as_uint(acc[3])));
        }
        group.barrier();
        if (!takes) return;
        acc[0] = acc[1] = acc[2] = acc[3] = 0.f;
#pragma unroll 4
        for (int w = 0; w < group.size; w++) {
            const uint32_t from = mine + ((group.rank + w) & (group.size - 1)) * 32 * kBytes;
            if (kOne) {
                const uint2 v = read_shared<uint2>(from);
                acc[0] += __uint_as_float(v.x), acc[2] += __uint_as_float(v.y);
            } else {
                const uint4 v = read_shared<uint4>(from);
                acc[0] += __uint_as_float(v.x), acc[1] += __uint_as_float(v.y);
                acc[2] += __uint_as_float(v.z), acc[3] += __uint_as_float(v.w);
            }
        }
    }
};

// Floats from column to column where results change from their lanes to others. Off a multiple of 32, so that a warp's
// lanes write to different banks.
constexpr int kColumnStride = 20;

// A warp's accumulators, by columns, the first `columns` of them.
template <bool kOne>
__device__ __forceinline__ void write_columns(uint32_t at, int lane, int columns, const float (&acc)[4]) {
    const int g = lane >> 2, t = lane & 3;
    const uint32_t even = at + 4 * (g + 2 * t * kColumnStride), odd = even + 4 * kColumnStride;
    if (kOne ? t == 0 : 2 * t < columns) {
        store_4(even, __float_as_uint(acc[0])), store_4(even + 32, __float_as_uint(acc[2]));
    }
    if (!kOne && 2 * t + 1 < columns) {
        store_4(odd, __float_as_uint(acc[1])), store_4(odd + 32, __float_as_uint(acc[3]));
    }
}

}  // namespace moe
