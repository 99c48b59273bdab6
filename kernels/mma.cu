// Grouped GEMM for any number of tokens: weight rows are the tensor-core product's rows, tokens its columns.
//
// kernels/permute.cu sorts the assignments (token, slot) by expert, lists tiles of at most kN of them, and lays the tokens
// out in that order. A block takes a few slabs of an expert's matrix times one tile. Blocks of one matrix part stand next
// to each other, so that its weights are read from memory once and for the other tiles from L2. Experts are not padded to
// tiles. A column's sum runs over K in one order, whatever the tile: its bits do not depend on what shares the batch.
//
// Tokens lie in planes of a stage's columns, [planes][rows][kRowBytes], so that a tile's part of a stage is one run of
// memory; the 16-byte chunks of a row are exchanged (`swizzle`) so that a warp's reads touch every bank of shared memory
// once. Shared memory: barriers, then a ring of stages (kBlocks blocks of K each): tokens, weights as packed.
#include "common/activation.cuh"
#include "common/dequant.cuh"
#include "common/matrix.cuh"
#include "common/planes.cuh"

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
MOE_CASE(int8_group, CodesInt8<C>, Scale::kHalf);
MOE_CASE(mxfp4, CodesE2m1<C>, Scale::kE8m0);
MOE_CASE(nvfp4, CodesE2m1<C>, Scale::kE4m3);
MOE_CASE(int4, CodesU4<C>, Scale::kHalf);

#define MOE_PASTE_(a, b) a##b
#define MOE_PASTE(a, b) MOE_PASTE_(a, b)
using Format = MOE_PASTE(Format_, MOE_FORMAT);
using Q = Format::Q;
using D = Dequant<C, Q, Format::kScale>;

// Blocks (64 columns) of a stage: two, as packed; one where codes are wide and nothing follows them.
constexpr int kBlocks = Q::kWords == 4 ? 1 : 2;
constexpr int kColumns = kBlocks * kBlock, kRowBytes = 2 * kColumns;
constexpr int kCodeBytes = Q::kWords * 512;
// Before the ring: its barriers (a place is full, a place is free).
constexpr int kMaxDepth = 8, kFreeAt = 8 * kMaxDepth, kRingAt = 16 * kMaxDepth;

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
    const int4* tiles;      // {local expert or -1, first row, how many, nth of its expert | of how many << 16}
    void* out;              // kFirst: planes of `out_columns`; else rows of that many
    long long plane;        // bytes of a plane of x and of kFirst's out
    int out_columns;        // kFirst: rounded up to whole planes, what lies beyond the matrix becomes zeros
    int row_tiles;          // blocks that share the matrix's slabs
    int depth;              // stages of the ring
    int kind;
    ScaleLayout scales;
    Activation activation;
};
// src/cuda/mma.rs has the same.
static_assert(sizeof(GemmParams) == 136, "");

// How a block's warps share its rows and kN columns.
template <int kN>
struct Shape {
    // Many tokens are worth larger blocks: every weight and token is read by fewer of them.
    static constexpr int kWarps = kN == 128 ? 8 : 4, kThreads = 32 * kWarps;
    static constexpr int kSlabs = 2 * kWarps;  // of 16 rows
    static constexpr int kWarpColumns = kN == 128 ? 2 : 1;
    static constexpr int kWarpSlabs = kSlabs * kWarpColumns / kWarps;
    static constexpr int kTiles = kN / 8 / kWarpColumns;  // of eight tokens, per warp
    static constexpr int kTokenBytes = kN * kRowBytes;
    // Floats of a token's results in shared memory, which take the ring's place; four more to spread the banks.
    static constexpr int kPitch = 16 * kSlabs + 4;
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

template <int kN>
struct Gemm {
    using S = Shape<kN>;
    const GemmParams& p;
    const Task task;
    const uint32_t memory;
    const int warp, lane;
    int stage_bytes, place_bytes, first_slab;
    // Where this lane's token begins in a place: the first chunks of either half of a block.
    uint32_t from_token[2];

    __device__ __forceinline__ Gemm(const GemmParams& params, const Task& its, uint32_t shared)
        : p(params), task(its), memory(shared), warp(uniform(threadIdx.x >> 5)), lane(threadIdx.x & 31) {
        stage_bytes = kBlocks * kCodeBytes + 8 * p.scales.stride;
        place_bytes = S::kTokenBytes + S::kSlabs * stage_bytes;
        first_slab = task.row_tile * S::kSlabs;
        const int g = lane >> 2, t = lane & 3, row = warp % S::kWarpColumns * (8 * S::kTiles) + g;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int chunk = 4 * half + (D::kNarrow ? t / 2 : t);
            from_token[half] = row * kRowBytes + ((chunk ^ swizzle(task.start + row)) << 4) + (D::kNarrow ? t % 2 * 8 : 0);
        }
    }

    __device__ __forceinline__ uint32_t place(int n) const { return memory + kRingAt + n * place_bytes; }
    __device__ __forceinline__ uint32_t full(int n) const { return memory + 8 * n; }
    __device__ __forceinline__ uint32_t free(int n) const { return memory + kFreeAt + 8 * n; }
    __device__ __forceinline__ int stages() const { return (p.weights.blocks + kBlocks - 1) / kBlocks; }

    // A slab beyond the matrix is its last: what comes of it is not written.
    __device__ __forceinline__ const char* slab(int n) const {
        return slab_of(p.weights, task.expert, min(first_slab + n, p.weights.slabs - 1));
    }

    // Sends for a stage: each warp for two slabs, the first for the tokens, too.
    __device__ __forceinline__ void fetch(int stage, int to) const {
        const uint32_t tokens = place(to), codes = tokens + S::kTokenBytes + 2 * warp * stage_bytes;
        const int offset = stage * stage_bytes, bytes = min(stage_bytes, p.weights.slab_bytes - offset);
        const char* from = p.x + stage * p.plane + (long long)task.start * kRowBytes;
#if MOE_BULK
        if (lane == 0) {
            const int more = warp == 0 ? task.count * kRowBytes : 0;
            barrier_expect(full(to), 2 * bytes + more);
            copy_bulk(codes, slab(2 * warp) + offset, bytes, full(to));
            copy_bulk(codes + stage_bytes, slab(2 * warp + 1) + offset, bytes, full(to));
            if (warp == 0) copy_bulk(tokens, from, more, full(to));
        }
#else
        for (int s = 0; s < 2; s++) {
            const char* at = slab(2 * warp + s) + offset;
            for (int i = lane * 16; i < bytes; i += 512) copy_16(codes + s * stage_bytes + i, at + i);
        }
        for (int i = threadIdx.x * 16; i < task.count * kRowBytes; i += S::kThreads * 16) copy_16(tokens + i, from + i);
        arrive_after_copies(full(to));
#endif
    }

    // Tokens 8 n + g of the warp's columns, 32 columns of K: two steps' operands.
    __device__ __forceinline__ void tokens_of(uint32_t tokens, int block, int half, uint32_t (&b)[S::kTiles][4]) const {
#pragma unroll
        for (int n = 0; n < S::kTiles; n++) {
            const uint32_t at = tokens + from_token[half] + n * (8 * kRowBytes) + 128 * block;
            if constexpr (D::kNarrow) {
                // The second step's two chunks: their number differs in one bit.
                const uint2 v = read_shared<uint2>(at), w = read_shared<uint2>(at ^ 32);
                b[n][0] = v.x, b[n][1] = v.y, b[n][2] = w.x, b[n][3] = w.y;
            } else {
                const uint4 v = read_shared<uint4>(at);
                b[n][0] = v.x, b[n][1] = v.y, b[n][2] = v.z, b[n][3] = v.w;
            }
        }
    }

    // The codes' words of half a block; those of other steps keep what they hold.
    static __device__ __forceinline__ void codes_of(uint32_t at, int half, uint4 (&w)[Q::kWords]) {
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

    // One stage into the sums; `refill` is called when the first products are under way.
    template <class F>
    __device__ __forceinline__ void multiply(int stage, int from, D (&dequant)[S::kWarpSlabs],
                                             float (&acc)[S::kWarpSlabs][S::kTiles][4], F refill) const {
        const uint32_t tokens = place(from);
        const uint32_t slabs = tokens + S::kTokenBytes + warp / S::kWarpColumns * S::kWarpSlabs * stage_bytes;
        const int blocks = p.weights.blocks - stage * kBlocks;
        const uint32_t scales = min(blocks, kBlocks) * kCodeBytes + (lane >> 2) * p.scales.stride;
#pragma unroll
        for (int block = 0; block < kBlocks; block++) {
            if (block > 0 && blocks <= block) break;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint32_t b[S::kTiles][4];
                tokens_of(tokens, block, half, b);
#pragma unroll
                for (int s = 0; s < S::kWarpSlabs; s++) {
                    const uint32_t slab = slabs + s * stage_bytes;
                    uint4 w[Q::kWords];
                    codes_of(slab + block * kCodeBytes + lane * 16, half, w);
                    D& d = dequant[s];
                    float move[2];
                    if (d.enter(slab + scales, 2 * block + half, p.scales, move)) {
#pragma unroll
                        for (int n = 0; n < S::kTiles; n++) {
                            acc[s][n][0] *= move[0], acc[s][n][1] *= move[0];
                            acc[s][n][2] *= move[1], acc[s][n][3] *= move[1];
                        }
                    }
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        uint32_t a[4];
                        Q::step(w, 2 * half + h, a);
                        d.enter_narrow(slab + scales, 4 * block + 2 * half + h);
                        d.finish(a);
#pragma unroll
                        for (int n = 0; n < S::kTiles; n++) C::mma(acc[s][n], a, b[n][2 * h], b[n][2 * h + 1]);
                    }
                }
                if (block == 0 && half == 0) refill();
            }
        }
    }

    // The sums as projections, to shared memory: [tokens][kPitch], the block's rows.
    __device__ __forceinline__ void stage_sums(const D (&dequant)[S::kWarpSlabs],
                                               const float (&acc)[S::kWarpSlabs][S::kTiles][4]) const {
        const int g = lane >> 2, t = lane & 3, column = warp % S::kWarpColumns * (8 * S::kTiles) + 2 * t;
        float* staged = reinterpret_cast<float*>(shared_memory + kRingAt) + column * S::kPitch + g;
        float routing[S::kTiles][2];
#pragma unroll
        for (int n = 0; n < S::kTiles; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int c = column + 8 * n + i;
                routing[n][i] = p.routing != nullptr && c < task.count ? p.routing[p.rows[task.start + c]] : 1.f;
            }
        }
#pragma unroll
        for (int s = 0; s < S::kWarpSlabs; s++) {
            const int slab = warp / S::kWarpColumns * S::kWarpSlabs + s;
            if (first_slab + slab >= p.weights.slabs) break;
            const long long at = ((long long)task.expert * p.weights.slabs + first_slab + slab) * 16 + g;
#pragma unroll
            for (int high = 0; high < 2; high++) {
                const float factor = p.weights.factors[at + 8 * high] * D::kPost * dequant[s].unit[high];
                const float bias = p.weights.bias != nullptr ? p.weights.bias[at + 8 * high] : 0.f;
#pragma unroll
                for (int n = 0; n < S::kTiles; n++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        staged[(8 * n + i) * S::kPitch + 16 * slab + 8 * high] =
                            fmaf(acc[s][n][2 * high + i] * factor, routing[n][i], bias);
                    }
                }
            }
        }
    }

    __device__ __forceinline__ float4 staged(int token, int row) const {
        return *reinterpret_cast<const float4*>(shared_memory + kRingAt + 4 * (token * S::kPitch + row));
    }

    static __device__ __forceinline__ uint2 rounded(float4 v, bool final) {
        const auto one = [&](float x) { return final ? C::from_float(x) : C::between(x); };
        __align__(8) const C::T four[4] = {one(v.x), one(v.y), one(v.z), one(v.w)};
        return *reinterpret_cast<const uint2*>(four);
    }

    // From there through the activation to planes, four results at a time.
    __device__ __forceinline__ void write_activated() const {
        const bool pairs = gated(p.activation);
        const int slab_width = pairs ? 8 : 16, first = first_slab * slab_width;
        // The last block fills the last plane up.
        const int width = task.row_tile == p.row_tiles - 1 ? p.out_columns - first : S::kSlabs * slab_width;
        const int filled = p.weights.slabs * slab_width - first, fours = width / 4;
#pragma unroll 1
        for (int i = threadIdx.x; i < task.count * fours; i += S::kThreads) {
            const int c = i / fours, at = i % fours * 4, column = first + at, row = task.start + c;
            float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
            if (at < filled) {
                // A slab holds eight gates, then their ups.
                const float4 gate = staged(c, pairs ? at + at / 8 * 8 : at);
                const float4 up = pairs ? staged(c, at + at / 8 * 8 + 8) : gate;
                v.x = apply(p.activation, gate.x, up.x), v.y = apply(p.activation, gate.y, up.y);
                v.z = apply(p.activation, gate.z, up.z), v.w = apply(p.activation, gate.w, up.w);
            }
            const int plane = column / kColumns, chunk = column % kColumns / 8;
            char* to = static_cast<char*>(p.out) + plane * p.plane + (long long)row * kRowBytes +
                       ((chunk ^ swizzle(row)) << 4) + column % 8 * 2;
            *reinterpret_cast<uint2*>(to) = rounded(v, false);
        }
    }

    // From there to rows.
    __device__ __forceinline__ void write_rows() const {
        constexpr int kFours = 4 * S::kSlabs;
        const int first = first_slab * 16;
        for (int i = threadIdx.x; i < task.count * kFours; i += S::kThreads) {
            const int c = i / kFours, at = i % kFours * 4;
            if (first + at >= p.out_columns) continue;
            const long long row = p.kind == kSecond ? p.rows[task.start + c] : task.start + c;
            C::T* to = static_cast<C::T*>(p.out) + row * p.out_columns + first + at;
            *reinterpret_cast<uint2*>(to) = rounded(staged(c, at), p.kind == kBatched);
        }
    }
};

template <int kN>
__device__ __forceinline__ void gemm(const GemmParams& p) {
    using S = Shape<kN>;
    const uint32_t memory = static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
    if (threadIdx.x == 0) {
        // Full: each warp's announcement, or every thread's copies. Free: every warp.
        constexpr int kArrivals = MOE_BULK ? S::kWarps : S::kThreads;
        for (int i = 0; i < p.depth; i++) {
            barrier_init(memory + 8 * i, kArrivals);
            barrier_init(memory + kFreeAt + 8 * i, S::kWarps);
        }
#if MOE_BULK
        barrier_init_done();
#endif
    }
    __syncthreads();
    wait_for_previous_grid();
    release_next_grid();
    const Task task = task_of(p);
    if (task.expert < 0) return;
    const Gemm<kN> gemm(p, task, memory);
    const int stages = gemm.stages();
    for (int i = 0; i < p.depth - 1 && i < stages; i++) gemm.fetch(i, i);
    float acc[S::kWarpSlabs][S::kTiles][4] = {};
    D dequant[S::kWarpSlabs];
#pragma unroll
    for (int s = 0; s < S::kWarpSlabs; s++) dequant[s].begin();
    // Warps whose columns are all empty only help to copy.
    const bool works = gemm.warp % S::kWarpColumns * (8 * S::kTiles) < task.count;
    int place = 0, round = 0;
    for (int stage = 0; stage < stages; stage++) {
        // The place before, where the stage `depth` after the last one goes.
        auto refill = [&] {
            const int ahead = stage + p.depth - 1, last = place == 0 ? p.depth - 1 : place - 1;
            if (ahead >= stages) return;
            if (stage > 0) barrier_wait(gemm.free(last), (place == 0 ? round - 1 : round) & 1);
            gemm.fetch(ahead, last);
        };
        barrier_wait(gemm.full(place), round & 1);
        __syncwarp();
        if (S::kWarpColumns == 1 || works) {
            gemm.multiply(stage, place, dequant, acc, refill);
        } else {
            refill();
        }
        __syncwarp();
        if (gemm.lane == 0) barrier_arrive(gemm.free(place));
        if (++place == p.depth) place = 0, round++;
    }
    __syncthreads();
    gemm.stage_sums(dequant, acc);
    __syncthreads();
    if (p.kind == kFirst) {
        gemm.write_activated();
    } else {
        gemm.write_rows();
    }
}

}  // namespace moe

// grid (row_tiles * tiles)
extern "C" __global__ void __launch_bounds__(128, 6) moe_mma_16(const __grid_constant__ moe::GemmParams p) { moe::gemm<16>(p); }
extern "C" __global__ void __launch_bounds__(128, 4) moe_mma_32(const __grid_constant__ moe::GemmParams p) { moe::gemm<32>(p); }
extern "C" __global__ void __launch_bounds__(128, 3) moe_mma_64(const __grid_constant__ moe::GemmParams p) { moe::gemm<64>(p); }
extern "C" __global__ void __launch_bounds__(256, 1) moe_mma_128(const __grid_constant__ moe::GemmParams p) { moe::gemm<128>(p); }
