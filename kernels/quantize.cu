// Quantised activations: rows of bf16, f16 or float32 to packed codes and their scales, a block per row, every key in one
// launch. Row r of the result comes from row `rows[r]` of the input. src/cuda/quantize.rs describes what is written.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/ptx.cuh"
#include "common/quantize.cuh"

namespace {

using namespace moe;

constexpr int LANES = 32, MAX_WARPS = 8;
// A chunk is what a thread loads, scales and packs at once; the row is padded to a multiple of eight chunks.
constexpr int CHUNK = 8;
// Chunks of a thread that stay in registers while the row's largest magnitude is found; longer rows are read again.
constexpr int KEPT = 4;

// src/cuda/quantize.rs has the same.
struct Call {
    const void* input;    // [sources, cols]
    const int* rows;      // [R] or null: row r from row r
    const float* stored;  // null, or one or [R]
    uint8_t* codes;       // [R, padded columns]
    void* scales;         // [R, groups], float32 or a byte
    float* second;        // [R], only of keys that have it
    int64_t sources;
    int cols, chunks;  // chunks of the padded row
    int stored_step;   // 0: one stored scale for all rows, 1: one for each
    int aligned;       // rows begin at multiples of 16 bytes
};
static_assert(sizeof(Call) == 72, "");

__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

__device__ __forceinline__ void widen(const __nv_bfloat16* from, float (&v)[CHUNK]) {
    const uint4 w = load_16(from);
    const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 4; i++) v[2 * i] = __uint_as_float(words[i] << 16), v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
}
__device__ __forceinline__ void widen(const __half* from, float (&v)[CHUNK]) {
    const uint4 w = load_16(from);
    const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        v[2 * i] = __half2float(__ushort_as_half(words[i] & 0xffffu));
        v[2 * i + 1] = __half2float(__ushort_as_half(words[i] >> 16));
    }
}
__device__ __forceinline__ void widen(const float* from, float (&v)[CHUNK]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint4 w = load_16(from + 4 * i);
        v[4 * i] = __uint_as_float(w.x), v[4 * i + 1] = __uint_as_float(w.y);
        v[4 * i + 2] = __uint_as_float(w.z), v[4 * i + 3] = __uint_as_float(w.w);
    }
}

// Past L1, as load_16: the previous grid may have written it after this one began.
__device__ __forceinline__ float one(const __nv_bfloat16* from) {
    return to_float(__ushort_as_bfloat16(__ldcg(reinterpret_cast<const unsigned short*>(from))));
}
__device__ __forceinline__ float one(const __half* from) {
    return to_float(__ushort_as_half(__ldcg(reinterpret_cast<const unsigned short*>(from))));
}
__device__ __forceinline__ float one(const float* from) { return __ldcg(from); }

// Columns from `col` on, zeros where there are none.
template <class T>
__device__ __forceinline__ void load(const T* row, int col, int cols, bool aligned, float (&v)[CHUNK]) {
    if (aligned && col + CHUNK <= cols) {
        widen(row + col, v);
    } else {
#pragma unroll
        for (int i = 0; i < CHUNK; i++) v[i] = col + i < cols ? one(row + col + i) : 0.f;
    }
}

__device__ __forceinline__ uint32_t largest(const float (&v)[CHUNK]) {
    uint32_t top = 0;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) top = max(top, magnitude(v[i]));
    return top;
}

// Of the whole block.
__device__ __forceinline__ uint32_t block_max(uint32_t top) {
    __shared__ uint32_t warps[MAX_WARPS];
    top = __reduce_max_sync(~0u, top);
    if (threadIdx.x % LANES == 0) warps[threadIdx.x / LANES] = top;
    __syncthreads();
    for (unsigned i = 0; i < blockDim.x / LANES; i++) top = max(top, warps[i]);
    return top;
}

// Eight codes, the first in the lowest bits.
template <class K>
__device__ __forceinline__ void store(uint8_t* row, int chunk, const float (&v)[CHUNK], const Scale& scale) {
    constexpr int kBits = K::Elem::kBits;
    uint64_t packed = 0;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) packed |= static_cast<uint64_t>(quantized_code<K>(v[i], scale)) << (kBits * i);
    uint8_t* to = row + chunk * kBits;
    if constexpr (kBits == 8) {
        *reinterpret_cast<uint64_t*>(to) = packed;
    } else if constexpr (kBits == 4) {
        *reinterpret_cast<uint32_t*>(to) = static_cast<uint32_t>(packed);
    } else {
#pragma unroll
        for (int i = 0; i < 3; i++) reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(packed >> (16 * i));
    }
}

// One chunk of each lane, with the scales of the groups that they make.
template <class K>
__device__ __forceinline__ void emit(const Call& call, int chunk, const float (&v)[CHUNK], Scale scale, float second) {
    const int64_t row = blockIdx.x;
    if constexpr (K::kGroup > 0) {
        constexpr int kLanes = K::kGroup / CHUNK;
        uint32_t top = largest(v);
#pragma unroll
        for (int step = 1; step < kLanes; step *= 2) top = max(top, __shfl_xor_sync(~0u, top, step));
        scale = group_scale<K>(top, second);
        if (chunk % kLanes == 0 && chunk * CHUNK < call.cols) {
            const int64_t at = row * ((call.cols + K::kGroup - 1) / K::kGroup) + chunk / kLanes;
            if constexpr (K::kScale == ScaleKind::kF32) {
                static_cast<float*>(call.scales)[at] = scale.value;
            } else {
                static_cast<uint8_t*>(call.scales)[at] = static_cast<uint8_t>(scale.code);
            }
        }
    }
    if (chunk < call.chunks) store<K>(call.codes + row * call.chunks * K::Elem::kBits, chunk, v, scale);
}

template <class T, class K>
__device__ __forceinline__ void quantize(const Call& call) {
    // Largest magnitude of the row: its own scale, or what the groups' scales are relative to.
    constexpr bool kWhole = K::kSecond || (K::kScale == ScaleKind::kF32 && K::kGroup == 0);
    wait_for_previous_grid();
    release_next_grid();
    const int64_t row = blockIdx.x;
    const int64_t source = call.rows != nullptr ? __ldcg(call.rows + row) : row;
    const bool exists = source >= 0 && source < call.sources;
    const int cols = exists ? call.cols : 0;
    const T* from = static_cast<const T*>(call.input) + (exists ? source * call.cols : 0);
    const bool aligned = call.aligned;
    // A warp's lanes stay together, for they share groups: lanes beyond the row have zeros.
    const int lane = threadIdx.x % LANES, step = blockDim.x;
    const int begin = static_cast<int>(threadIdx.x) - lane;

    float second = 1.f;
    Scale scale = {0.f, 0};
    if constexpr (K::kStored) {
        const float stored = __ldcg(call.stored + row * call.stored_step);
        if constexpr (K::kScale == ScaleKind::kStored) scale = stored_scale(stored);
        second = stored;
    }
    if constexpr (kWhole) {
        float kept[KEPT][CHUNK];
        uint32_t top = 0;
#pragma unroll
        for (int i = 0; i < KEPT; i++) {
            load(from, (begin + lane + i * step) * CHUNK, cols, aligned, kept[i]);
            top = max(top, largest(kept[i]));
        }
        for (int chunk = begin + lane + KEPT * step; chunk < call.chunks; chunk += step) {
            float v[CHUNK];
            load(from, chunk * CHUNK, cols, aligned, v);
            top = max(top, largest(v));
        }
        top = block_max(top);
        if constexpr (K::kSecond) {
            second = second_scale(top);
            if (threadIdx.x == 0) call.second[row] = second;
        } else {
            scale = group_scale<K>(top, 1.f);
            if (threadIdx.x == 0) static_cast<float*>(call.scales)[row] = scale.value;
        }
#pragma unroll
        for (int i = 0; i < KEPT; i++) {
            if (begin + i * step < call.chunks) emit<K>(call, begin + lane + i * step, kept[i], scale, second);
        }
    }
    for (int at = begin + (kWhole ? KEPT * step : 0); at < call.chunks; at += step) {
        float v[CHUNK];
        load(from, (at + lane) * CHUNK, cols, aligned, v);
        emit<K>(call, at + lane, v, scale, second);
    }
}

}  // namespace

#define MOE_ENTRY(name, T, ...)                                                                                 \
    extern "C" __global__ void __launch_bounds__(MAX_WARPS* LANES) quantize_##name(const __grid_constant__ Call call) { \
        quantize<T, __VA_ARGS__>(call);                                                                         \
    }
#define MOE_ENTRIES(name, ...)                         \
    MOE_ENTRY(name##_bf16, __nv_bfloat16, __VA_ARGS__) \
    MOE_ENTRY(name##_f16, __half, __VA_ARGS__)         \
    MOE_ENTRY(name##_f32, float, __VA_ARGS__)

MOE_ACTIVATION_KEYS(MOE_ENTRIES)
