// Quantised activations: rows of bf16, f16 or float32 to packed codes and their scales, a block per row, every key in
// one launch. Row r of the result comes from row `rows[r]` of the input. src/cuda/quantize.rs says what is written.

#include <cstdint>
#include <type_traits>

#include "common/chunk.cuh"
#include "common/quantize.cuh"

namespace {

using namespace moe;

constexpr int LANES = 32, MAX_WARPS = 8;
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

// Of the whole block.
__device__ __forceinline__ uint32_t block_max(uint32_t top) {
    __shared__ uint32_t warps[MAX_WARPS];
    top = __reduce_max_sync(~0u, top);
    if (threadIdx.x % LANES == 0) warps[threadIdx.x / LANES] = top;
    __syncthreads();
    for (unsigned i = 0; i < blockDim.x / LANES; i++) top = max(top, warps[i]);
    return top;
}

// A chunk's codes.
template <class K>
__device__ __forceinline__ void store(uint8_t* row, int chunk, const float (&v)[CHUNK], const Scale& scale) {
    constexpr int kBits = K::Elem::kBits;
    float q[CHUNK];
    divide<K, false>(v, divisor_of(scale), q);
    uint32_t low = four_codes<K>(q), high = four_codes<K>(q + 4);
    if (!has_codes(scale)) low = high = 0;
    uint8_t* to = row + chunk * kBits;
    if constexpr (kBits == 8) {
        *reinterpret_cast<uint2*>(to) = make_uint2(low, high);
    } else if constexpr (kBits == 4) {
        *reinterpret_cast<uint32_t*>(to) = low | high << 16;
    } else {
        // 24 bits each, at an even address.
        uint16_t* words = reinterpret_cast<uint16_t*>(to);
        words[0] = static_cast<uint16_t>(low);
        words[1] = static_cast<uint16_t>(low >> 16 | high << 8);
        words[2] = static_cast<uint16_t>(high >> 8);
    }
}

// One chunk of each lane, with the scales of the groups that they make.
template <class T, class K>
__device__ __forceinline__ void emit(const Call& call, int chunk, const Raw<T>& raw, Scale scale, float second) {
    const int64_t row = blockIdx.x;
    if constexpr (K::kGroup > 0) {
        constexpr int kLanes = K::kGroup / CHUNK;
        uint32_t top = one<T>(largest(raw));
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
    if (chunk >= call.chunks) return;
    float v[CHUNK];
    widen(raw, v);
    store<K>(call.codes + row * call.chunks * K::Elem::kBits, chunk, v, scale);
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
        Raw<T> kept[KEPT];
        uint32_t top = 0;
#pragma unroll
        for (int i = 0; i < KEPT; i++) {
            load(from, (begin + lane + i * step) * CHUNK, cols, aligned, kept[i]);
            top = largest(kept[i], top);
        }
        for (int chunk = begin + lane + KEPT * step; chunk < call.chunks; chunk += step) {
            Raw<T> raw;
            load(from, chunk * CHUNK, cols, aligned, raw);
            top = largest(raw, top);
        }
        top = block_max(one<T>(top));
        if constexpr (K::kSecond) {
            second = second_scale(top);
            if (threadIdx.x == 0) call.second[row] = second;
        } else {
            scale = group_scale<K>(top, 1.f);
            if (threadIdx.x == 0) static_cast<float*>(call.scales)[row] = scale.value;
        }
#pragma unroll
        for (int i = 0; i < KEPT; i++) {
            if (begin + i * step < call.chunks) emit<T, K>(call, begin + lane + i * step, kept[i], scale, second);
        }
    }
    for (int at = begin + (kWhole ? KEPT * step : 0); at < call.chunks; at += step) {
        Raw<T> raw;
        load(from, (at + lane) * CHUNK, cols, aligned, raw);
        emit<T, K>(call, at + lane, raw, scale, second);
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
