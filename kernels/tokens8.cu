// The inputs of both projections as int8 codes, in the planes and the order that kernels/mma/int8.cuh wants, with what a
// code of each row stands for. Codes and scales have the bits of kernels/quantize.cu.
//
// A 16-byte chunk of a plane's row is what a lane of the grouped GEMM reads at once: eight columns and the eight that stand
// 32 further on.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/compute.cuh"
#include "common/local.cuh"
#include "common/matrix.cuh"
#include "common/planes.cuh"
#include "common/ptx.cuh"
#include "common/quantize.cuh"

namespace {

using namespace moe;

constexpr int kMaxTopk = 32;
// Chunks of a row in a plane, and of a block of 64 columns.
constexpr int kChunks = kRowBytes / 16, kBlockChunks = kBlock / 16;

struct TokensParams {
    const void* x;         // [tokens, hidden], 16-bit
    const int* ids;        // [tokens, topk]; null for the batched format: an expert's tokens lie `max_tokens` apart
    const int* map;        // [experts] global to local, or null
    const int* places;     // [tokens, topk], rows of the planes; those of absent experts are not read
    const float* weights;  // [tokens, topk], what tokens are multiplied by, or null
    const int* counts;     // batched format: [local experts]
    const float* stored;   // static keys: [2][local experts], scales of either projection's input
    char* planes;          // [planes][rows][kRowBytes], written
    float* units;          // [rows] for the first projection, written; static keys: behind them those for the second
    int hidden, planes_count, rows;
    int topk, experts, local_experts, max_tokens;
};
// src/cuda/mma/int8.rs has the same.
static_assert(sizeof(TokensParams) == 104, "");

struct MiddleParams {
    const float* x;        // [rows, columns]
    const unsigned* tops;  // [rows, columns / 64], largest magnitudes as bits
    const int* sorted;     // [rows], -1 where there is none; null for the batched format
    const int* counts;     // batched format: [local experts]
    char* planes;          // [planes][rows][kRowBytes], written
    float* units;          // [rows], written; static keys: read
    int rows, columns, planes_count, max_tokens;
};
static_assert(sizeof(MiddleParams) == 64, "");

// A chunk's columns.
__device__ __forceinline__ int column_of(int chunk) { return chunk / kBlockChunks * kBlock + chunk % kBlockChunks * 8; }

__device__ __forceinline__ char* chunk_at(char* planes, int rows, int row, int chunk) {
    return planes + (static_cast<long long>(chunk / kChunks) * rows + row) * kRowBytes +
           ((chunk % kChunks ^ swizzle(row)) << 4);
}

// Sixteen columns' codes.
template <class K>
__device__ __forceinline__ uint4 codes_of(const float (&v)[16], const Scale& scale) {
    if (!has_codes(scale)) return make_uint4(0, 0, 0, 0);
    float q[16];
    divide<K, false>(v, divisor_of(scale), q);
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        w[i] = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) w[i] |= code_of<K>(q[4 * i + j]) << (8 * j);
    }
    return make_uint4(w[0], w[1], w[2], w[3]);
}

// Threads of a block that has a token, and the chunks of each that stay in registers; longer rows are read again.
constexpr int kTokenThreads = 128, kKept = 4;

struct Raw {
    uint4 half[2];
};

__device__ __forceinline__ Raw load(const TokensParams& p, int token, int chunk) {
    const uint4* from = static_cast<const uint4*>(p.x) + static_cast<long long>(token) * (p.hidden / 8);
    Raw raw;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int column = column_of(chunk) + 32 * i;
        raw.half[i] = column < p.hidden ? __ldg(from + column / 8) : make_uint4(0, 0, 0, 0);
    }
    return raw;
}

// The largest magnitudes of even and of odd columns, as integers: a NaN is the largest of all.
__device__ __forceinline__ uint32_t largest(const Raw& raw, uint32_t top) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint4& h = raw.half[i];
        top = __vmaxu2(top, __vmaxu2(__vmaxu2(h.x & 0x7fff7fffu, h.y & 0x7fff7fffu), __vmaxu2(h.z & 0x7fff7fffu, h.w & 0x7fff7fffu)));
    }
    return top;
}

template <class C>
__device__ __forceinline__ float value(uint32_t bits) {
    const unsigned short half = static_cast<unsigned short>(bits);
    if constexpr (C::kBf16) return __bfloat162float(__ushort_as_bfloat16(half));
    return __half2float(__ushort_as_half(half));
}

// The experts of a token that are here.
struct Slots {
    int place[kMaxTopk];
    float factor[kMaxTopk];
    Scale scale[kMaxTopk];
    int count;
};

// By the first warp.
template <class K>
__device__ __forceinline__ void find_slots(const TokensParams& p, int token, float top, Slots& slots) {
    const int lane = threadIdx.x;
    int local = -1, place = token;
    float factor = 1.f;
    if (p.ids == nullptr) {
        if (lane == 0) local = token / p.max_tokens;
    } else if (lane < p.topk) {
        const int slot = token * p.topk + lane;
        local = local_expert(p.ids[slot], p.map, p.experts, p.local_experts);
        if (local >= 0) place = __ldcg(p.places + slot);
        if (p.weights != nullptr) factor = p.weights[slot];
    }
    const unsigned here = __ballot_sync(~0u, local >= 0);
    if (local >= 0) {
        const int at = __popc(here & ((1u << lane) - 1));
        Scale scale;
        if constexpr (K::kStored) {
            scale = stored_scale(p.stored[local]);
            p.units[p.rows + place] = stored_scale(p.stored[p.local_experts + local]).value;
        } else {
            scale = group_scale<K>(magnitude(__fmul_rn(top, factor)), 1.f);
        }
        p.units[place] = scale.value;
        slots.place[at] = place, slots.factor[at] = factor, slots.scale[at] = scale;
    }
    if (lane == 0) slots.count = __popc(here);
}

template <class C, class K>
__device__ __forceinline__ void tokens(const TokensParams& p) {
    __shared__ Slots slots;
    __shared__ uint32_t warps[kTokenThreads / 32];
    wait_for_previous_grid();
    release_next_grid();
    const int token = blockIdx.x, chunks = kChunks * p.planes_count;
    if (p.ids == nullptr && token % p.max_tokens >= p.counts[token / p.max_tokens]) return;
    Raw kept[kKept];
    uint32_t top = 0;
#pragma unroll
    for (int i = 0; i < kKept; i++) {
        kept[i] = load(p, token, threadIdx.x + i * kTokenThreads);
        top = largest(kept[i], top);
    }
    if constexpr (!K::kStored) {
        for (int chunk = threadIdx.x + kKept * kTokenThreads; chunk < chunks; chunk += kTokenThreads) {
            top = largest(load(p, token, chunk), top);
        }
        top = __reduce_max_sync(~0u, max(top & 0xffffu, top >> 16));
        if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = top;
        __syncthreads();
        for (int i = 0; i < kTokenThreads / 32; i++) top = max(top, warps[i]);
    }
    if (threadIdx.x < 32) find_slots<K>(p, token, value<C>(top), slots);
    __syncthreads();
    const int count = slots.count;
    const bool alike = !K::kStored && p.weights == nullptr;
    auto emit = [&](int chunk, const Raw& raw) {
        const uint32_t words[8] = {raw.half[0].x, raw.half[0].y, raw.half[0].z, raw.half[0].w,
                                   raw.half[1].x, raw.half[1].y, raw.half[1].z, raw.half[1].w};
        uint4 codes;
        for (int j = 0; j < count; j++) {
            if (j == 0 || !alike) {
                float v[16];
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    v[i] = __fmul_rn(value<C>(i % 2 == 0 ? words[i / 2] & 0xffffu : words[i / 2] >> 16), slots.factor[j]);
                }
                codes = codes_of<K>(v, slots.scale[j]);
            }
            *reinterpret_cast<uint4*>(chunk_at(p.planes, p.rows, slots.place[j], chunk)) = codes;
        }
    };
#pragma unroll
    for (int i = 0; i < kKept; i++) {
        const int chunk = threadIdx.x + i * kTokenThreads;
        if (chunk < chunks) emit(chunk, kept[i]);
    }
    for (int chunk = threadIdx.x + kKept * kTokenThreads; chunk < chunks; chunk += kTokenThreads) {
        emit(chunk, load(p, token, chunk));
    }
}

// Warps of a block, and chunks of a row that a lane takes.
constexpr int kMiddleWarps = 8, kEach = 4;

template <class K>
__device__ __forceinline__ void middle(const MiddleParams& p) {
    wait_for_previous_grid();
    release_next_grid();
    const int all = kChunks * p.planes_count, parts = (all + 32 * kEach - 1) / (32 * kEach);
    const long long unit = static_cast<long long>(blockIdx.x) * kMiddleWarps + threadIdx.x / 32;
    const int row = static_cast<int>(unit / parts), part = static_cast<int>(unit % parts), lane = threadIdx.x % 32;
    if (row >= p.rows) return;
    if (p.sorted != nullptr ? __ldcg(p.sorted + row) < 0 : row % p.max_tokens >= p.counts[row / p.max_tokens]) return;
    Scale scale;
    if constexpr (K::kStored) {
        scale = {__ldcg(p.units + row), 0};
    } else {
        const int blocks = p.columns / kBlock;
        const unsigned* tops = p.tops + static_cast<long long>(row) * blocks;
        uint32_t top = 0;
        for (int i = lane; i < blocks; i += 32) top = max(top, __ldcg(tops + i));
        scale = group_scale<K>(__reduce_max_sync(~0u, top), 1.f);
        if (part == 0 && lane == 0) p.units[row] = scale.value;
    }
    const float* from = p.x + static_cast<long long>(row) * p.columns;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
        const int chunk = part * (32 * kEach) + i * 32 + lane, column = column_of(chunk);
        if (chunk >= all) break;
        float v[16] = {};
        if (column < p.columns) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float4 four = __ldcg(reinterpret_cast<const float4*>(from + column + j / 2 * 32 + j % 2 * 4));
                v[4 * j] = four.x, v[4 * j + 1] = four.y, v[4 * j + 2] = four.z, v[4 * j + 3] = four.w;
            }
        }
        *reinterpret_cast<uint4*>(chunk_at(p.planes, p.rows, row, chunk)) = codes_of<K>(v, scale);
    }
}

using PerToken = Key<Int8, ScaleKind::kF32, 0>;
using PerTensor = Key<Int8, ScaleKind::kStored, 0>;

}  // namespace

// grid (tokens): rows of a key, and of a type, to every place that the plan has for them.
#define MOE_TOKENS(name, C, K)                                                                                     \
    extern "C" __global__ void __launch_bounds__(kTokenThreads) tokens8_##name(const __grid_constant__ TokensParams p) { \
        tokens<C, K>(p);                                                                                           \
    }
MOE_TOKENS(token_bf16, Bf16, PerToken)
MOE_TOKENS(token_f16, F16, PerToken)
MOE_TOKENS(tensor_bf16, Bf16, PerTensor)
MOE_TOKENS(tensor_f16, F16, PerTensor)

// grid (rows * parts of a row / kMiddleWarps): what the first projection's kernel left.
#define MOE_MIDDLE(name, K)                                                                                              \
    extern "C" __global__ void __launch_bounds__(32 * kMiddleWarps) middle8_##name(const __grid_constant__ MiddleParams p) { \
        middle<K>(p);                                                                                                    \
    }
MOE_MIDDLE(token, PerToken)
MOE_MIDDLE(tensor, PerTensor)
