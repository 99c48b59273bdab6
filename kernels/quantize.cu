// Quantised activations: rows of bf16, f16 or float32 to packed codes and their scales, a block per row, every key in
// one launch. Row r of the result comes from row `rows[r]` of the input. src/cuda/quantize.rs says what is written.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/order.cuh"
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
    int plane_rows;    // 0, or 8-bit codes and their scales go to planes: see Planes
    int copies;        // to so many rows of them; 0: row r to row r
    const int* present;  // [R] or null: rows with a negative number here are not written
    const int* places;   // [R, copies] rows of the planes, -1 for none
};
static_assert(sizeof(Call) == 96, "");

// As common/order.cuh has them; their scales lie [groups][plane_rows].
struct Planes {
    const Call& call;
    __device__ __forceinline__ uint32_t* at(int row, int chunk) const {
        return reinterpret_cast<uint32_t*>(call.codes) + 4 * ordered_place(chunk, row, call.plane_rows);
    }
    // Calls f(row of the planes) for each that the block's row goes to.
    template <class F>
    __device__ __forceinline__ void for_each(F f) const {
        if (call.copies == 0) return f(static_cast<int>(blockIdx.x));
        for (int i = 0; i < call.copies; i++) {
            const int row = __ldcg(call.places + static_cast<int64_t>(blockIdx.x) * call.copies + i);
            if (row >= 0) f(row);
        }
    }
};

// A chunk as it lies in memory.
template <class T>
struct Raw {
    static constexpr int kWords = CHUNK * sizeof(T) / 4;
    uint32_t words[kWords];
};

// Columns from `col` on, zeros where there are none; past L1, for the previous grid may have written them after this one
// began.
template <class T>
__device__ __forceinline__ void load(const T* row, int col, int cols, bool aligned, Raw<T>& raw) {
    if (aligned && col + CHUNK <= cols) {
#pragma unroll
        for (int i = 0; i < Raw<T>::kWords; i += 4) {
            const uint4 w = load_16(reinterpret_cast<const char*>(row + col) + 4 * i);
            raw.words[i] = w.x, raw.words[i + 1] = w.y, raw.words[i + 2] = w.z, raw.words[i + 3] = w.w;
        }
    } else if constexpr (sizeof(T) == 4) {
        const uint32_t* from = reinterpret_cast<const uint32_t*>(row) + col;
#pragma unroll
        for (int i = 0; i < CHUNK; i++) raw.words[i] = col + i < cols ? __ldcg(from + i) : 0u;
    } else {
        const unsigned short* from = reinterpret_cast<const unsigned short*>(row) + col;
#pragma unroll
        for (int i = 0; i < CHUNK; i += 2) {
            const uint32_t low = col + i < cols ? __ldcg(from + i) : 0u;
            const uint32_t high = col + i + 1 < cols ? __ldcg(from + i + 1) : 0u;
            raw.words[i / 2] = low | high << 16;
        }
    }
}

template <class T>
__device__ __forceinline__ float half_value(uint32_t bits) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) return __uint_as_float(bits << 16);
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

template <class T>
__device__ __forceinline__ void widen(const Raw<T>& raw, float (&v)[CHUNK]) {
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
        if constexpr (sizeof(T) == 4) {
            v[i] = __uint_as_float(raw.words[i]);
        } else {
            v[i] = half_value<T>(i % 2 == 0 ? raw.words[i / 2] & 0xffffu : raw.words[i / 2] >> 16);
        }
    }
}

// The largest magnitudes, of even and of odd columns where they are 16-bit, as integers: a NaN is the largest of all.
template <class T>
__device__ __forceinline__ uint32_t largest(const Raw<T>& raw, uint32_t top = 0) {
#pragma unroll
    for (int i = 0; i < Raw<T>::kWords; i++) {
        top = sizeof(T) == 4 ? max(top, raw.words[i] & 0x7fffffffu) : __vmaxu2(top, raw.words[i] & 0x7fff7fffu);
    }
    return top;
}

// The larger of both as the bits of a float32.
template <class T>
__device__ __forceinline__ uint32_t one(uint32_t top) {
    if constexpr (sizeof(T) == 4) return top;
    return __float_as_uint(half_value<T>(max(top & 0xffffu, top >> 16)));
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

// Four codes, the first in the lowest bits.
template <class K>
__device__ __forceinline__ uint32_t four_codes(const float* q) {
    constexpr int kBits = K::Elem::kBits;
#if __CUDA_ARCH__ >= 890
    if constexpr (std::is_same_v<typename K::Elem, E4m3>) {
        // NaNs included.
        uint32_t packed;
        asm("{\n.reg .b16 low, high;\n"
            "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
            "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
            "mov.b32 %0, {low, high};\n}"
            : "=r"(packed)
            : "f"(q[0]), "f"(q[1]), "f"(q[2]), "f"(q[3]));
        return packed;
    }
#endif
    uint32_t packed = code_of<K>(q[0]);
#pragma unroll
    for (int i = 1; i < 4; i++) packed |= code_of<K>(q[i]) << (kBits * i);
    return packed;
}

// A chunk's codes.
template <class K>
__device__ __forceinline__ void store(const Call& call, int chunk, const float (&v)[CHUNK], const Scale& scale) {
    constexpr int kBits = K::Elem::kBits;
    float q[CHUNK];
    divide<K>(v, scale, q);
    uint32_t low = four_codes<K>(q), high = four_codes<K>(q + 4);
    if (!has_codes(scale)) low = high = 0;
    uint8_t* to = call.codes + (static_cast<int64_t>(blockIdx.x) * call.chunks + chunk) * kBits;
    if constexpr (kBits == 8) {
        if (call.plane_rows > 0) {
            const Planes planes{call};
            planes.for_each([&](int row) {
                planes.at(row, chunk / 4 * 2)[chunk % 4] = low;
                planes.at(row, chunk / 4 * 2 + 1)[chunk % 4] = high;
            });
            return;
        }
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
                float* scales = static_cast<float*>(call.scales);
                if (call.plane_rows > 0) {
                    scales += static_cast<int64_t>(chunk / kLanes) * call.plane_rows;
                    Planes{call}.for_each([&](int to) { scales[to] = scale.value; });
                } else {
                    scales[at] = scale.value;
                }
            } else {
                static_cast<uint8_t*>(call.scales)[at] = static_cast<uint8_t>(scale.code);
            }
        }
    }
    if (chunk >= call.chunks) return;
    float v[CHUNK];
    widen(raw, v);
    store<K>(call, chunk, v, scale);
}

template <class T, class K>
__device__ __forceinline__ void quantize(const Call& call) {
    // Largest magnitude of the row: its own scale, or what the groups' scales are relative to.
    constexpr bool kWhole = K::kSecond || (K::kScale == ScaleKind::kF32 && K::kGroup == 0);
    wait_for_previous_grid();
    release_next_grid();
    const int64_t row = blockIdx.x;
    if (call.present != nullptr && __ldcg(call.present + row) < 0) return;
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
            if (threadIdx.x == 0) {
                float* scales = static_cast<float*>(call.scales);
                if (call.plane_rows > 0) {
                    Planes{call}.for_each([&](int to) { scales[to] = scale.value; });
                } else {
                    scales[row] = scale.value;
                }
            }
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
