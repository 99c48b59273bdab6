// Eight columns of a row, as a thread loads them and packs their codes.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "ptx.cuh"
#include "quantize.cuh"

namespace moe {

// A chunk is what a thread loads, scales and packs at once; a row is padded to a multiple of eight chunks.
constexpr int CHUNK = 8;

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

}  // namespace moe
