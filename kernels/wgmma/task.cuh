// What a launch is given, how a block's shared memory is divided, and the tasks that a block takes in turn.
#pragma once
#include "kind.cuh"

namespace moe {

enum Kind : int {
    kFirst,   // gate, up and activation, to rows in the plan's order
    kSecond,  // down, to the assignment's own place
};

struct GemmParams {
    Matrix weights;
    const char* x;         // rows of `pitch` times 16 bytes, columns in the products' order (kernels/common/order.cuh)
    const float* scales;   // of their rows, or null
    const int* rows;       // [assignments] sorted by expert
    const float* routing;  // of each assignment, to multiply sums of the first kind by; or null
    const int4* tiles;     // {local expert or -1, first row, how many, nth of its expert | of how many << 16}
    void* out;             // rows of `out_columns`
    int pitch, topk;       // topk: x has rows of tokens, not of the plan; or 0
    int scale_stride, scale_step;  // floats from row to row, from stage to stage
    int out_columns;
    int row_tiles, max_tiles, depth;
    int kind;
    int ordered;  // of the first kind: columns in the products' order
    float scale;  // of all rows
    Activation activation;
};
// src/cuda/wgmma.rs has the same.
static_assert(sizeof(GemmParams) == 152, "");

// A warpgroup that fills the ring and three that multiply, each four slabs of 16 rows: while one reads its weights, adds
// sums up or sends results out, the others keep the tensor cores busy.
constexpr int kWarpgroup = 128, kMathGroups = 3, kMathThreads = kMathGroups * kWarpgroup;
constexpr int kThreads = kWarpgroup + kMathThreads;
constexpr int kSlabs = 4 * kMathGroups;
constexpr int kMaxDepth = 16;

// Shared memory of a tile of at most kN tokens: a ring of tokens, of weights, of scales; room for results on their way
// out; the columns' facts; the ring's barriers.
template <int kN>
struct Layout {
    // Registers hold the sums, and what is promoted of them.
    static constexpr int kChunks = kPromoted && kN > 64 ? 2 : 1, kWidth = kN / kChunks;
    static constexpr int kTokens = kN * kRowBytes, kWeights = kSlabs * kSlabStage, kScales = kBlockScales ? 4 * kN : 0;
    static constexpr int kStaged = kWidth * 128;  // of a warpgroup
    static constexpr int kFacts = 8 * kN;
    int depth;

    __device__ __forceinline__ uint32_t base() const {
        extern __shared__ __align__(1024) char shared_memory[];
        return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
    }
    __device__ __forceinline__ uint32_t tokens(int place) const { return base() + place * kTokens; }
    __device__ __forceinline__ uint32_t weights(int place) const { return base() + depth * kTokens + place * kWeights; }
    __device__ __forceinline__ uint32_t scales(int place) const {
        return base() + depth * (kTokens + kWeights) + place * kScales;
    }
    __device__ __forceinline__ uint32_t after() const { return base() + depth * (kTokens + kWeights + kScales); }
    __device__ __forceinline__ uint32_t staged(int warpgroup) const { return after() + warpgroup * kStaged; }
    __device__ __forceinline__ uint32_t fact(int column) const { return after() + kMathGroups * kStaged + 8 * column; }
    __device__ __forceinline__ uint32_t full(int place) const {
        return after() + kMathGroups * kStaged + kFacts + 8 * place;
    }
    __device__ __forceinline__ uint32_t free(int place) const { return full(kMaxDepth + place); }
};

// A place of the ring, and which time round.
struct Place {
    int at = 0;
    uint32_t round = 0;
    __device__ __forceinline__ void next(int depth) {
        if (++at == depth) at = 0, round ^= 1;
    }
};

struct Task {
    int expert, start, count, row_tile;
};

// The block's nth task; expert -1 for none. An expert's tiles of one part of the matrix stand next to each other, so that
// its weights are read from memory once and for the other tiles from L2.
__device__ __forceinline__ Task task_of(const GemmParams& p, int n) {
    const int all = blockIdx.x + n * gridDim.x, at = all / p.row_tiles;
    if (at >= p.max_tiles) return {-1, 0, 0, 0};
    int4 tile = __ldcg(p.tiles + at);
    if (tile.x < 0) return {-1, 0, 0, 0};
    const int nth = tile.w & 0xffff, of = tile.w >> 16, first = at - nth;
    const int local = all - first * p.row_tiles, row_tile = local / of, wanted = local - row_tile * of;
    if (wanted != nth) tile = __ldcg(p.tiles + first + wanted);
    return {tile.x, tile.y, tile.z, row_tile};
}

__device__ __forceinline__ int stages_of(const GemmParams& p) { return (p.weights.blocks + kBlocks - 1) / kBlocks; }

}  // namespace moe
