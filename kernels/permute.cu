// What surrounds the grouped GEMM: the plan of tiles and the tokens in the plan's order before it, the sum over a token's
// experts after it.
//
// The plan sorts assignments (token, slot) by local expert: a counting sort of one block, or, for many, of several that
// count their parts first, in whatever order within an expert, which no result depends on. In the batched format they are
// sorted as they lie, and only moved together where rows are wanted. Then it lists tiles of at most
// `tile` assignments of one expert, in the order of experts or of their tiles' size, and fills the rest of the list, whose
// length the host knows only as a bound, with -1. An expert's tiles are as equal as multiples of kGranularity allow: a small
// one costs nearly as much as a large one.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/compute.cuh"
#include "common/local.cuh"
#include "common/order.cuh"
#include "common/planes.cuh"
#include "common/ptx.cuh"

namespace {

constexpr int kThreads = 1024;
// Local experts at most: one per thread.
constexpr int kMaxExperts = kThreads;
// Ids that a thread has under way.
constexpr int kAhead = 8;
// Assignments that a tile's size is a multiple of, its expert's last tile aside.
constexpr int kGranularity = 16;

struct PlanParams {
    const int* ids;     // [assignments], global, -1 for none
    const int* map;     // [experts] global to local, or null
    const int* counts;  // batched format: [local experts]; ids are null then
    int* rows;          // [rows_count], written: sorted assignments, -1 where there is none; null: rows are slots
    int4* tiles;        // [max_tiles], written; kernels/mma.cu says what they hold
    int* places;        // [assignments], written with `rows`: where each is there, or -1; or null
    int* parts;         // [blocks, local experts] assignments to each expert in a block's part; null for one block
    const float* stored;  // [2][local experts] scales of both projections' inputs, or null
    float* scales[2];     // [rows_count] each, written with `rows` where they are stored: those of a row's expert
    uint2* taken;         // made zero, or null
    int assignments, experts, local_experts;
    int max_tokens;     // batched format: an expert's slots, each of which is an assignment where there are `rows`
    int tile, max_tiles;
    int part;           // assignments of a block
    int align;          // an expert's rows begin at a multiple of this
    int rows_count;     // at most that many rows, and what is left is filled
    int largest_first;  // whether experts with larger tiles come first in the list of tiles
};
// src/cuda/permute.rs has the same.
static_assert(sizeof(PlanParams) == 128, "");

// Calls f(assignment, local expert or -1) for the thread's assignments of the block's part.
template <class F>
__device__ __forceinline__ void for_each(const PlanParams& p, F f) {
    const int first = blockIdx.x * p.part, end = min(first + p.part, p.assignments);
    for (int base = first + threadIdx.x; base < end; base += kThreads * kAhead) {
        int id[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
            const int at = base + i * kThreads;
            id[i] = at < end ? p.ids[at] : -1;
        }
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
            const int at = base + i * kThreads;
            if (at < end) f(at, moe::local_expert(id[i], p.map, p.experts, p.local_experts));
        }
    }
}

// The sum over threads before this one, of two numbers; `all` gets the whole sums.
__device__ __forceinline__ int2 sum_before(int2 mine, int2& all) {
    __shared__ int2 warps[32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int2 sum = mine;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
        const int x = __shfl_up_sync(~0u, sum.x, step), y = __shfl_up_sync(~0u, sum.y, step);
        if (lane >= step) sum.x += x, sum.y += y;
    }
    if (lane == 31) warps[warp] = sum;
    __syncthreads();
    static_assert(kThreads == 32 * 32, "");
    // Every warp sums up all warps' sums.
    int2 of = warps[lane];
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
        const int x = __shfl_up_sync(~0u, of.x, step), y = __shfl_up_sync(~0u, of.y, step);
        if (lane >= step) of.x += x, of.y += y;
    }
    all = make_int2(__shfl_sync(~0u, of.x, 31), __shfl_sync(~0u, of.y, 31));
    int2 before = make_int2(__shfl_sync(~0u, of.x, (warp - 1) & 31), __shfl_sync(~0u, of.y, (warp - 1) & 31));
    if (warp == 0) before = make_int2(0, 0);
    return make_int2(before.x + sum.x - mine.x, before.y + sum.y - mine.y);
}

struct LayOutParams {
    const uint4* x;     // [tokens, eights]
    const int* rows;    // [rows] assignment of each row, or null for the batched format: as they lie
    const int* counts;  // batched format: [local experts]
    char* planes;       // [planes][rows][moe::kRowBytes], written; common/planes.cuh
    int count;          // rows
    int topk, max_tokens;
    int eights;         // of 16 bytes, that a token has
    int planes_count;
    int lift;           // multiply them, bf16, by 2^80
};
static_assert(sizeof(LayOutParams) == 56, "");

// Warps of a block; 16-byte chunks of a row that a lane copies.
constexpr int kLayOutWarps = 8, kEach = 4;
// Chunks of a row in a plane.
constexpr int kChunks = moe::kRowBytes / 16;

// Eight bf16 times 2^80.
__device__ __forceinline__ uint4 lifted(uint4 v) {
    constexpr uint32_t kPair = 0x67806780u;
    return make_uint4(moe::Bf16::mul(v.x, kPair), moe::Bf16::mul(v.y, kPair), moe::Bf16::mul(v.z, kPair),
                      moe::Bf16::mul(v.w, kPair));
}

struct SpreadParams {
    const uint32_t* x;  // [tokens, eights * 4] pairs
    const int* places;  // [tokens, topk] rows of the planes, -1 for none
    uint4* planes;      // [planes][rows][moe::kRowBytes], written; common/order.cuh
    int rows, topk;
    int eights;         // of 8 columns, that a token has; what the last plane has more is zeros
    int planes_count;
    int tokens, unused;
};
static_assert(sizeof(SpreadParams) == 48, "");

constexpr int kSpreadThreads = 256;
// Slots of the batched format that a block takes: most may be empty.
constexpr int kSlots = 8;

// A token's 16-byte chunk as planes have it: four pairs that are eight columns apart.
__device__ __forceinline__ uint4 spread_chunk(const SpreadParams& p, int token, int at) {
    const int first = at / 4 * 4;
    const uint32_t* from = p.x + (static_cast<long long>(token) * p.eights + first) * 4 + at % 4;
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = first + i < p.eights ? __ldg(from + 4 * i) : 0;
    return make_uint4(v[0], v[1], v[2], v[3]);
}

struct CombineParams {
    const void* results;   // [tokens * topk, hidden], 16-bit; those of absent experts are not read
    const int* ids;        // [tokens, topk]
    const float* weights;  // [tokens, topk], or null: ones
    const int* map;        // as above
    void* output;          // [tokens, hidden], 16-bit
    int topk, experts, local_experts, hidden;
};
static_assert(sizeof(CombineParams) == 56, "");

constexpr int kCombineThreads = 256;
constexpr int kMaxTopk = 32;

// What is read once, and is the first to go from L2.
__device__ __forceinline__ uint4 load_once(const uint4* at) {
    uint4 v;
    asm volatile(
        "{\n.reg .b64 once;\nmov.b64 once, 0x12f0000000000000;\n"
        "ld.global.cg.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], once;\n}"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(at));
    return v;
}

// Eight columns of the sum of weight * result over the token's slots, in their order; lane i has the ith slot's weight, and
// its assignment or -1.
template <class C, int kAtOnce>
__device__ __forceinline__ void sum_slots(const uint4* results, int eights, int topk, bool exists, int mine, float weight,
                                          float (&sum)[8]) {
#pragma unroll 1
    for (int first = 0; first < topk; first += kAtOnce) {
        uint4 v[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; j++) {
            const int slot = __shfl_sync(~0u, mine, first + j);
            if (slot >= 0 && exists) v[j] = load_once(results + static_cast<long long>(slot) * eights);
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; j++) {
            const int slot = __shfl_sync(~0u, mine, first + j);
            const float w = __shfl_sync(~0u, weight, first + j);
            if (slot < 0) continue;
            const typename C::T* x = reinterpret_cast<const typename C::T*>(&v[j]);
#pragma unroll
            for (int e = 0; e < 8; e++) sum[e] = fmaf(w, C::to_float(x[e]), sum[e]);
        }
    }
}

// Of a warp: a part of a token.
template <class C>
__device__ __forceinline__ void combine(const CombineParams& p) {
    static_assert(kMaxTopk == 32, "");
    const int token = blockIdx.x, lane = threadIdx.x % 32;
    const int eights = p.hidden / 8, i = blockIdx.y * kCombineThreads + threadIdx.x;
    // Ids and weights were complete when the plan was begun, several grids ago.
    int mine = -1;
    float weight = 1.f;
    if (lane < p.topk) {
        const int slot = token * p.topk + lane;
        if (moe::local_expert(p.ids[slot], p.map, p.experts, p.local_experts) >= 0) mine = slot;
        if (p.weights != nullptr) weight = p.weights[slot];
    }
    moe::wait_for_previous_grid();
    moe::release_next_grid();
    const uint4* results = static_cast<const uint4*>(p.results) + i;
    float sum[8] = {};
    if (p.topk > 4) {
        sum_slots<C, 8>(results, eights, p.topk, i < eights, mine, weight, sum);
    } else {
        sum_slots<C, 4>(results, eights, p.topk, i < eights, mine, weight, sum);
    }
    if (i >= eights) return;
    __align__(16) typename C::T y[8];
#pragma unroll
    for (int e = 0; e < 8; e++) y[e] = C::from_float(sum[e]);
    static_cast<uint4*>(p.output)[static_cast<long long>(token) * eights + i] = *reinterpret_cast<const uint4*>(y);
}

}  // namespace

// grid (parts): counts a part's assignments
extern "C" __global__ void __launch_bounds__(kThreads, 1) moe_count(const __grid_constant__ PlanParams p) {
    __shared__ int counts[kMaxExperts];
    const int t = threadIdx.x;
    counts[t] = 0;
    __syncthreads();
    moe::wait_for_previous_grid();
    moe::release_next_grid();
    for_each(p, [&](int, int expert) {
        if (expert >= 0) atomicAdd(&counts[expert], 1);
    });
    __syncthreads();
    if (t < p.local_experts) p.parts[blockIdx.x * p.local_experts + t] = counts[t];
}

// grid (parts): after moe_count where there are several
extern "C" __global__ void __launch_bounds__(kThreads, 1) moe_plan(const __grid_constant__ PlanParams p) {
    __shared__ int places[kMaxExperts], ends[kMaxExperts];
    __shared__ int2 sizes[kMaxExperts];  // of an expert's tiles, and how many
    const int t = threadIdx.x;
    places[t] = 0;
    __syncthreads();
    moe::wait_for_previous_grid();
    moe::release_next_grid();
    // Few ids are read once.
    const bool few = p.counts == nullptr && p.parts == nullptr && p.assignments <= kThreads;
    int own = -1;
    if (few) {
        if (t < p.assignments) own = moe::local_expert(p.ids[t], p.map, p.experts, p.local_experts);
        if (own >= 0) atomicAdd(&places[own], 1);
    } else if (p.counts == nullptr && p.parts == nullptr) {
        for_each(p, [&](int, int expert) {
            if (expert >= 0) atomicAdd(&places[expert], 1);
        });
    }
    __syncthreads();
    // All assignments to the thread's expert, and those in the parts before the block's.
    int count = places[t], earlier = 0;
    if (p.parts != nullptr && t < p.local_experts) {
        for (int b = 0; b < gridDim.x; b++) {
            const int part = __ldcg(p.parts + b * p.local_experts + t);
            if (b < blockIdx.x) earlier += part;
            count += part;
        }
    }
    if (p.counts != nullptr) count = t < p.local_experts ? max(0, min(p.counts[t], p.max_tokens)) : 0;
    const int tiles = (count + p.tile - 1) / p.tile;
    int2 all;
    const int room = (count + p.align - 1) / p.align * p.align;
    int2 before = sum_before(make_int2(room, tiles), all);
    const int start = p.rows != nullptr ? before.x : t * p.max_tokens;
    places[t] = start + earlier, ends[t] = start + count;
    const int even = (count + tiles - 1) / max(tiles, 1);
    const int each = min(p.tile, (even + kGranularity - 1) / kGranularity * kGranularity);
    if (p.largest_first && blockIdx.x == 0) {
        sizes[t] = make_int2(each, tiles);
        __syncthreads();
        before.y = 0;
        // Only asked for where experts are few.
        for (int e = 0; e < p.local_experts; e++) {
            const int2 other = sizes[e];
            if (other.x > each || (other.x == each && e < t)) before.y += other.y;
        }
    }
    if (blockIdx.x == 0) {
        for (int i = 0; i < tiles; i++) {
            p.tiles[before.y + i] = make_int4(t, start + i * each, min(count - i * each, each), i | tiles << 16);
        }
        for (int i = all.y + t; i < p.max_tiles; i += kThreads) p.tiles[i] = make_int4(-1, 0, 0, 0);
        if (t == 0 && p.taken != nullptr) *p.taken = make_uint2(0, 0);
        if (p.rows != nullptr) {
            for (int i = count; i < room; i++) p.rows[start + i] = -1;
        }
    }
    if (p.rows == nullptr) return;
    __syncthreads();
    const auto put = [&](int at, int expert, int place) {
        if (p.places != nullptr) p.places[at] = place;
        if (place < 0) return;
        p.rows[place] = at;
        if (p.stored == nullptr) return;
#pragma unroll
        for (int i = 0; i < 2; i++) p.scales[i][place] = __ldg(p.stored + i * p.local_experts + expert);
    };
    if (p.counts != nullptr) {
        const int first = blockIdx.x * p.part, end = min(first + p.part, p.assignments);
        for (int at = first + t; at < end; at += kThreads) {
            const int expert = at / p.max_tokens, place = places[expert] + at - expert * p.max_tokens;
            put(at, expert, place < ends[expert] ? place : -1);
        }
    } else {
        const auto put_next = [&](int at, int expert) {
            put(at, expert, expert >= 0 ? atomicAdd(&places[expert], 1) : -1);
        };
        if (!few) {
            for_each(p, put_next);
        } else if (t < p.assignments) {
            put_next(t, own);
        }
    }
    const int nth = blockIdx.x * kThreads + t;
    for (int i = all.x + nth; i < p.rows_count; i += gridDim.x * kThreads) p.rows[i] = -1;
}

// grid (rows * parts of a row / kLayOutWarps): tokens to planes in the plan's order, what is missing of the last plane as
// zeros
extern "C" __global__ void __launch_bounds__(32 * kLayOutWarps) moe_lay_out(const __grid_constant__ LayOutParams p) {
    moe::wait_for_previous_grid();
    moe::release_next_grid();
    const int all = kChunks * p.planes_count, parts = (all + 32 * kEach - 1) / (32 * kEach);
    const long long unit = static_cast<long long>(blockIdx.x) * kLayOutWarps + threadIdx.x / 32;
    const int row = static_cast<int>(unit / parts), first = static_cast<int>(unit % parts) * (32 * kEach) + threadIdx.x % 32;
    if (row >= p.count) return;
    long long token = row;
    if (p.rows != nullptr) {
        const int assignment = __ldcg(p.rows + row);
        if (assignment < 0) return;
        token = assignment / p.topk;
    } else if (row % p.max_tokens >= p.counts[row / p.max_tokens]) {
        return;
    }
    uint4 v[kEach];
#pragma unroll
    for (int i = 0; i < kEach; i++) {
        const int at = first + 32 * i;
        v[i] = at < p.eights ? __ldg(p.x + token * p.eights + at) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kEach; i++) {
        const int at = first + 32 * i, plane = at / kChunks, chunk = at % kChunks ^ moe::swizzle(row);
        char* to = p.planes + (static_cast<long long>(plane) * p.count + row) * moe::kRowBytes + chunk * 16;
        if (at < all) *reinterpret_cast<uint4*>(to) = p.lift ? lifted(v[i]) : v[i];
    }
}

// grid (tokens, parts of a row): 16-bit tokens to each of their experts' rows
extern "C" __global__ void __launch_bounds__(kSpreadThreads) moe_spread(const __grid_constant__ SpreadParams p) {
    const int token = blockIdx.x, at = blockIdx.y * kSpreadThreads + threadIdx.x, lane = threadIdx.x % 32;
    const bool exists = at < kChunks * p.planes_count;
    // Tokens were complete when the plan was begun, which is the grid ahead.
    const uint4 v = exists ? spread_chunk(p, token, at) : make_uint4(0, 0, 0, 0);
    moe::wait_for_previous_grid();
    moe::release_next_grid();
    const int mine = lane < p.topk ? __ldcg(p.places + token * p.topk + lane) : -1;
#pragma unroll 4
    for (int slot = 0; slot < p.topk; slot++) {
        const int row = __shfl_sync(~0u, mine, slot);
        if (row >= 0 && exists) p.planes[moe::ordered_place(at, row, p.rows)] = v;
    }
}

// grid (slots / kSlots, parts of a row): the same in the batched format, whose empty slots are not read
extern "C" __global__ void __launch_bounds__(kSpreadThreads) moe_spread_slots(const __grid_constant__ SpreadParams p) {
    moe::wait_for_previous_grid();
    moe::release_next_grid();
    const int first = blockIdx.x * kSlots, at = blockIdx.y * kSpreadThreads + threadIdx.x;
    if (at >= kChunks * p.planes_count) return;
    int rows[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; i++) rows[i] = first + i < p.tokens ? __ldcg(p.places + first + i) : -1;
#pragma unroll
    for (int i = 0; i < kSlots; i++) {
        if (rows[i] >= 0) p.planes[moe::ordered_place(at, rows[i], p.rows)] = spread_chunk(p, first + i, at);
    }
}

// grid (tokens, parts of a row)
extern "C" __global__ void __launch_bounds__(kCombineThreads) moe_combine_bf16(const __grid_constant__ CombineParams p) {
    combine<moe::Bf16>(p);
}
extern "C" __global__ void __launch_bounds__(kCombineThreads) moe_combine_f16(const __grid_constant__ CombineParams p) {
    combine<moe::F16>(p);
}
