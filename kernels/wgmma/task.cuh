// What a launch is given, how a block's shared memory is divided, and the tasks that a cluster takes in turn.
#pragma once
#include "kind.cuh"

namespace moe {

enum Kind : int {
    kFirst,   // gate, up and activation, to rows in the plan's order
    kSecond,  // down, to the assignment's own place
};

struct GemmParams {
    Matrix weights;
    const char* x;         // planes of `count` rows; kernels/common/order.cuh
    const float* scales;   // of their rows, [stages or 1][count], or null
    const int* rows;       // [count] assignments sorted by expert; -1 for none
    const float* routing;  // of each assignment, to multiply sums of the first kind by; or null
    const int4* tiles;     // {local expert or -1, first row, how many, nth of its expert | of how many << 16}
    void* out;             // rows of `out_columns`; of 16 bits and the first kind planes as of x
    int count;             // rows of the plan, a multiple of 8; experts' begin at multiples of 8
    int scale_step;        // floats from a stage's scales to the next one's
    int out_columns;
    int row_tiles;  // of a cluster
    int max_tiles, depth;
    int kind;
    float scale;  // of all rows
    Activation activation;
    float* out_scales;   // of the first kind: the result is planes of codes, and these their scales, [planes][count]; or null
    unsigned* taken;     // how many tasks were asked for, 0 at first; or null: clusters take them in turn
    // Of the first kind: the result is planes of codes with these stored scales, one, or one of each local expert; or null.
    const float* stored;
    long long stored_step;  // 0 or 1
};
// src/cuda/wgmma.rs has the same.
static_assert(sizeof(GemmParams) == 168, "");

// A block's rows are four slabs of 16 for each warpgroup that multiplies; the blocks of a cluster have neighbouring rows
// and the same tokens, which are read once for all of them.
constexpr int kWarpgroup = 128, kMathGroups = 2, kMathThreads = kMathGroups * kWarpgroup;
constexpr int kThreads = kWarpgroup + kMathThreads;
constexpr int kSlabs = 4 * kMathGroups, kRows = 16 * kSlabs;
constexpr int kCluster = 2;
constexpr int kMaxDepth = 16;
// Tokens whose results go out at once.
constexpr int kPiece = 32;
// Tasks known in advance, and those of which everything else is known.
constexpr int kTasks = 4, kFacts = 2;
constexpr int kTaskBytes = 16;

// Shared memory of a tile of at most kN tokens: a ring of tokens, of weights, of scales; room for results on their way
// out; facts of columns and rows; tasks; barriers.
template <int kN>
struct Layout {
    // Columns of a product: of promoted sums, what there are registers for twice.
    static constexpr int kWidth = kPromoted && kN > 128 ? 128 : kN, kChunks = kN / kWidth;
    // Stages of a place. A few tokens' products take no longer than it takes to send for copies, so that there large
    // ones are to be few.
    static constexpr int kSpan = kN <= 64 ? 2 : 1;
    static constexpr int kTokens = kSpan * kN * kRowBytes, kWeights = kSpan * kSlabs * kSlabStage;
    static constexpr int kScales = kBlockScales ? kSpan * 4 * kN : 0;
    static constexpr int kStaged = 2 * kPiece * 128;  // of a warpgroup
    // The last one divides results by a stored scale.
    static constexpr int kFactBytes = 8 * (kN + kRows) + (kStoredScales ? 16 : 0);
    // Where the result is quantised: largest magnitudes, as 16 bits, of every warpgroup of the cluster.
    static constexpr bool kRequantises = kBlockScales && kN <= 64;
    static constexpr int kLargest = kRequantises ? 2 * kN * kMathGroups * kCluster : 0;
    int depth;

    __device__ __forceinline__ uint32_t base() const {
        extern __shared__ __align__(1024) char shared_memory[];
        return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
    }
    __device__ __forceinline__ uint32_t tokens(int place, int stage) const {
        return base() + place * kTokens + stage % kSpan * (kN * kRowBytes);
    }
    __device__ __forceinline__ uint32_t weights(int place, int slab, int stage) const {
        return base() + depth * kTokens + place * kWeights + (slab * kSpan + stage % kSpan) * kSlabStage;
    }
    __device__ __forceinline__ uint32_t scales(int place, int stage) const {
        return base() + depth * (kTokens + kWeights) + place * kScales + stage % kSpan * (4 * kN);
    }
    __device__ __forceinline__ uint32_t after() const { return base() + depth * (kTokens + kWeights + kScales); }
    __device__ __forceinline__ uint32_t staged(int warpgroup) const { return after() + warpgroup * kStaged; }
    // Of the columns, then of the rows, then a divisor.
    __device__ __forceinline__ uint32_t facts(int place) const {
        return after() + kMathGroups * kStaged + place * kFactBytes;
    }
    __device__ __forceinline__ uint32_t largest(int place) const { return facts(kFacts) + place * kLargest; }
    __device__ __forceinline__ uint32_t task(int place) const { return largest(kFacts) + kTaskBytes * place; }
    __device__ __forceinline__ uint32_t full(int place) const { return task(kTasks) + 8 * place; }
    __device__ __forceinline__ uint32_t free(int place) const { return full(kMaxDepth + place); }
    __device__ __forceinline__ uint32_t task_full(int place) const { return free(kMaxDepth + place); }
    __device__ __forceinline__ uint32_t task_free(int place) const { return task_full(kTasks + place); }
    __device__ __forceinline__ uint32_t facts_full(int place) const { return task_free(kTasks + place); }
    __device__ __forceinline__ uint32_t facts_free(int place) const { return facts_full(kFacts + place); }
    __device__ __forceinline__ uint32_t largest_full(int place) const { return facts_free(kFacts + place); }
};

// A thread's part of a tile's sums.
template <int kN>
using Sums = Sum[Layout<kN>::kChunks][Layout<kN>::kWidth / 2];

// A place of a ring, and which time round.
struct Place {
    int at = 0;
    uint32_t round = 0;
    __device__ __forceinline__ void next(int depth) {
        if (++at == depth) at = 0, round ^= 1;
    }
};

struct Task {
    int expert, start, count, row_tile;
    bool once;  // whether no other tile of tokens reads these weights
};

// A cluster's task by its place in the order of all, for rank 0; expert -1 for none. An expert's tiles of one part of the
// matrix stand next to each other, so that its weights are read from memory once and for the other tiles from L2.
__device__ __forceinline__ Task task_of(const GemmParams& p, int place) {
    const int at = place / p.row_tiles;
    if (at >= p.max_tiles) return {-1, 0, 0, 0, false};
    int4 tile = __ldcg(p.tiles + at);
    if (tile.x < 0) return {-1, 0, 0, 0, false};
    const int nth = tile.w & 0xffff, of = tile.w >> 16, first = at - nth;
    const int local = place - first * p.row_tiles, row_tile = local / of, wanted = local - row_tile * of;
    if (wanted != nth) tile = __ldcg(p.tiles + first + wanted);
    return {tile.x, tile.y, tile.z, row_tile * kCluster, of == 1};
}

__device__ __forceinline__ int stages_of(const GemmParams& p) { return (p.weights.blocks + kBlocks - 1) / kBlocks; }

}  // namespace moe
