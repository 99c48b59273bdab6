// What a launch of the grouped GEMM is given, and which part of it a block takes.
#pragma once
#include "common/activation.cuh"
#include "common/dequant.cuh"
#include "common/matrix.cuh"
#include "common/planes.cuh"
#include "int8.cuh"

#define MOE_CASE(name, codes, scales)                  \
    struct Format_##name {                             \
        using Q = codes;                               \
        static constexpr moe::Scale kScale = scales;   \
    }

namespace moe {

using C = MOE_COMPUTE;
MOE_CASE(half, Codes16<C>, Scale::kNone);
MOE_CASE(fp8, CodesE4m3<C>, Scale::kNone);
MOE_CASE(fp8_block, CodesE4m3<C>, Scale::kF32);
MOE_CASE(mxfp8, CodesE4m3<C>, Scale::kE8m0);
MOE_CASE(int8, CodesInt8<C>, Scale::kNone);
MOE_CASE(w8a8, CodesW8A8, Scale::kNone);
MOE_CASE(int8_group, CodesInt8<C>, Scale::kHalf);
MOE_CASE(mxfp4, CodesE2m1<C>, Scale::kE8m0);
MOE_CASE(nvfp4, CodesE2m1<C>, Scale::kE4m3);
MOE_CASE(int4, CodesU4<C>, Scale::kHalf);

#define MOE_PASTE_(a, b) a##b
#define MOE_PASTE(a, b) MOE_PASTE_(a, b)
using Format = MOE_PASTE(Format_, MOE_FORMAT);
using Q = Format::Q;
using D = Dequant<C, Q, Format::kScale>;
// int8 weights times int8 tokens.
constexpr bool kWhole = std::is_same_v<Q, CodesW8A8>;
using Product = std::conditional_t<kWhole, WholeProduct, C>;
using Sum = std::conditional_t<kWhole, int, float>;

// Blocks of a stage of packed weights: two; one where codes are wide and nothing follows them, or a block is twice as long.
constexpr int kBlocks = Q::kWords == 4 ? 1 : 2;
constexpr int kCodeBytes = Q::kWords * 512;
static_assert(kRowBytes == 2 * kBlock, "a plane holds a block's columns, or two blocks' of int8");
// Before the rings: their barriers, "full" and "free" of every place of two rings.
constexpr int kMaxDepth = 8, kBarriers = 8 * kMaxDepth, kRingAt = 4 * kBarriers;

// The most that a slab's scales of a stage are.
constexpr int kScaleBytes = Format::kScale == Scale::kNone   ? 0
                            : Format::kScale == Scale::kE8m0 ? 64
                            : Format::kScale == Scale::kE4m3 ? 128
                                                             : 256;

enum Kind : int {
    kFirst,     // gate, up and activation
    kSecond,    // down, to the assignment's own place
    kBatched,   // down, final, in place
};

struct GemmParams {
    Matrix weights;
    const char* x;          // planes of tokens
    const int* rows;        // [assignments] sorted by expert, or null for the batched format: as they lie
    const float* routing;   // of each assignment, to multiply sums of the first kind by; or null
    const float* units;     // int8: of each row of the planes, what its codes stand for
    unsigned* tops;         // int8, kFirst: [rows][out_columns / 64], the largest magnitude of so many results as bits
    const int4* tiles;      // {local expert or -1, first row, how many, nth of its expert | of how many << 16}
    void* out;              // kFirst: planes of `out_columns`, int8: rows of float32; else rows of that many
    long long plane;        // bytes of a plane of x and of kFirst's out
    int out_columns;        // kFirst: a multiple of 64, what lies beyond the matrix becomes zeros
    int row_tiles;          // blocks that share the matrix's slabs
    short depth;            // places of the ring: stages; with tiles of 128, blocks of tokens
    short weights_depth;    // with tiles of 128: stages of weights
    int kind;
    ScaleLayout scales;
    Activation activation;
};
// src/cuda/mma.rs has the same.
static_assert(sizeof(GemmParams) == 152, "");

// How a block's four warps share its rows and kN columns.
template <int kN>
struct Shape {
    // Every unpacked weight serves all of a warp's columns, every token all of its rows: many tokens are worth more of
    // both, as far as registers go (int8 codes with zero points need too many on sm_120). Where nothing is unpacked, more
    // warps are worth more.
    static constexpr bool kOwnRows = kN == 64 && Q::kWords < (Format::kScale == Scale::kHalf ? 2 : 4);
    static constexpr bool kWide = kN > 64 || kOwnRows;
    // Blocks on a multiprocessor.
    static constexpr int kResident = kN == 16 ? 6 : kN == 32 ? 4 : kWide ? 2 : 3;
    static constexpr int kWarps = 4, kThreads = 32 * kWarps;
    static constexpr int kWarpColumns = kN == 128 ? 2 : 1;
    static constexpr int kWarpSlabs = kWide ? 4 : 2;  // of 16 rows
    static constexpr int kSlabs = kWarps / kWarpColumns * kWarpSlabs;
    static constexpr int kTiles = kN / 8 / kWarpColumns;  // of eight tokens, per warp
    // Floats of a token's results in shared memory, which take the ring's place; four more to spread the banks.
    static constexpr int kPitch = 16 * kSlabs + 4;
    // A token has 2^kFours times four of them.
    static constexpr int kFours = kSlabs == 16 ? 6 : 5;
    static_assert(4 << kFours == 16 * kSlabs, "");

    // The first column of a warp's nth eight; warps take turns in pairs of them.
    static __device__ __forceinline__ int column(int warp, int n) {
        return (n / 2 * kWarpColumns + warp % kWarpColumns) * 16 + n % 2 * 8;
    }
};

struct Task {
    int expert, start, count, row_tile;
};

// The block's task; expert -1 for none.
__device__ __forceinline__ Task task_of(const GemmParams& p) {
    const int at = blockIdx.x / p.row_tiles;
    int4 tile = __ldcg(p.tiles + at);
    if (tile.x < 0) return {-1, 0, 0, 0};
    const int nth = tile.w & 0xffff, of = tile.w >> 16, base = at - nth;
    const int local = blockIdx.x - base * p.row_tiles, row_tile = local / of, wanted = local - row_tile * of;
    if (wanted != nth) tile = __ldcg(p.tiles + base + wanted);
    return {tile.x, tile.y, tile.z, row_tile};
}

extern __shared__ __align__(128) char shared_memory[];

// A matrix's part of a block: a slab beyond the matrix is its last, and what comes of it is not written.
struct Slabs {
    const Matrix& weights;
    const int expert, first;
    __device__ __forceinline__ const char* operator()(int n) const {
        return slab_of(weights, expert, min(first + n, weights.slabs - 1));
    }
};

// A place of a ring, and the parity of how often the ring went round.
struct Place {
    int at = 0;
    uint32_t round = 0;
    __device__ __forceinline__ Place next(int depth) const {
        return at + 1 == depth ? Place{0, round ^ 1} : Place{at + 1, round};
    }
    __device__ __forceinline__ Place before(int depth) const {
        return at == 0 ? Place{depth - 1, round ^ 1} : Place{at - 1, round};
    }
};

// The codes' words of half a block; those of other steps keep what they hold.
__device__ __forceinline__ void codes_of(uint32_t at, int half, uint4 (&w)[Q::kWords]) {
    if constexpr (Q::kWords == 4) {
        w[2 * half] = read_shared<uint4>(at + 1024 * half), w[2 * half + 1] = read_shared<uint4>(at + 1024 * half + 512);
    } else if constexpr (Q::kWords == 2) {
        w[half] = read_shared<uint4>(at + 512 * half);
    } else {
        const uint2 v = read_shared<uint2>(at + 8 * half);
        if (half == 0) {
            w[0].x = v.x, w[0].y = v.y;
        } else {
            w[0].z = v.x, w[0].w = v.y;
        }
    }
}

// Where a lane's token, the tile's `row`, has the first chunk of half a block; the other half's differs by 64.
__device__ __forceinline__ uint32_t token_offset(int start, int row, int lane) {
    const int t = lane & 3, chunk = D::kNarrow ? t / 2 : t;
    return row * kRowBytes + ((chunk ^ swizzle(start + row)) << 4) + (D::kNarrow ? t % 2 * 8 : 0);
}

// A token's operands for 32 columns of K: two steps.
__device__ __forceinline__ void token_of(uint32_t at, uint32_t (&b)[4]) {
    if constexpr (D::kNarrow) {
        // The second step's two chunks: their number differs in one bit.
        const uint2 v = read_shared<uint2>(at), w = read_shared<uint2>(at ^ 32);
        b[0] = v.x, b[1] = v.y, b[2] = w.x, b[3] = w.y;
    } else {
        const uint4 v = read_shared<uint4>(at);
        b[0] = v.x, b[1] = v.y, b[2] = v.z, b[3] = v.w;
    }
}

// Enters a slab's scales of 32 columns of K, in whose units its sums are.
template <int kTiles>
__device__ __forceinline__ void enter(D& dequant, uint2 scales, int quarter, const ScaleLayout& layout, Sum (&acc)[kTiles][4]) {
    float move[2];
    dequant.enter(scales, quarter, layout, move);
    if constexpr (D::kUnits) {
#pragma unroll
        for (int n = 0; n < kTiles; n++) {
            acc[n][0] *= move[0], acc[n][1] *= move[0];
            acc[n][2] *= move[1], acc[n][3] *= move[1];
        }
    }
}

}  // namespace moe
