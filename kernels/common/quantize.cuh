// Activation quantisation with the bits of src/cpu/quantize.rs: the same IEEE operations in the same order, none of them
// fused (the __f*_rn functions never are).
#pragma once
#include <cstdint>

namespace moe {

constexpr uint32_t kInfinityBits = 0x7f800000u;

// The elements: mantissa bits, the exponent of the smallest normal, the largest value.
struct E4m3 {
    static constexpr int kBits = 8, kMantissa = 3, kMinExponent = -6;
    static constexpr float kLargest = 448.f;
};
struct E2m1 {
    static constexpr int kBits = 4, kMantissa = 1, kMinExponent = 0;
    static constexpr float kLargest = 6.f;
};
struct E3m2 {
    static constexpr int kBits = 6, kMantissa = 2, kMinExponent = -2;
    static constexpr float kLargest = 28.f;
};
struct E2m3 {
    static constexpr int kBits = 6, kMantissa = 3, kMinExponent = 0;
    static constexpr float kLargest = 7.5f;
};
struct Int8 {
    static constexpr int kBits = 8, kMantissa = 0, kMinExponent = 0;
    static constexpr float kLargest = 127.f;
};

// |x| at most `largest`, and 2^(23 - mantissa) times its power of two (the subnormals' for those): a float32 as large as
// that has the element's step for its last bit, so that adding it rounds, to nearest and ties to even.
template <class E>
__device__ __forceinline__ float limited(float x, uint32_t& exponent, float& magic) {
    const float a = fminf(fabsf(x), E::kLargest);
    exponent = max(__float_as_uint(a) >> 23, static_cast<uint32_t>(127 + E::kMinExponent));
    magic = __uint_as_float((exponent + 23 - E::kMantissa) << 23);
    return a;
}

// The nearest value of the element; a NaN stays one.
template <class E>
__device__ __forceinline__ float rounded(float x) {
    if (x != x) return x;
    if constexpr (E::kMantissa == 0) return fminf(fmaxf(rintf(x), -128.f), 127.f);
    uint32_t exponent;
    float magic;
    const float a = limited<E>(x, exponent, magic);
    return copysignf(__fsub_rn(__fadd_rn(a, magic), magic), x);
}

// Its code. A NaN has one in e4m3 only; elsewhere it is zero.
template <class E>
__device__ __forceinline__ uint32_t encoded(float x) {
    if constexpr (E::kMantissa == 0) {
        return x != x ? 0u : static_cast<uint32_t>(__float2int_rn(fminf(fmaxf(x, -128.f), 127.f))) & 255u;
    } else {
        if (x != x) return E::kBits == 8 ? 0x7fu : 0u;
        uint32_t exponent;
        float magic;
        const float a = limited<E>(x, exponent, magic);
        // Steps above the binade's, of which the first two binades have the same; a carry is the next code.
        const uint32_t steps = __float_as_uint(__fadd_rn(a, magic)) - __float_as_uint(magic);
        const uint32_t binade = exponent - static_cast<uint32_t>(127 + E::kMinExponent);
        return (binade << E::kMantissa) + steps | __float_as_uint(x) >> 31 << (E::kBits - 1);
    }
}

// The scale of a group. `value` 0: all its elements are zero; NaN: so are its values.
struct Scale {
    float value;
    uint32_t code;  // of e8m0 and e4m3
};

enum class ScaleKind { kStored, kF32, kE8m0, kE4m3 };

// An activation key. kGroup columns share a scale, 0: the row. kSecond: nvfp4's second level is the row's, not stored.
template <class E, ScaleKind kScale_, int kGroup_, bool kSecond_ = false>
struct Key {
    using Elem = E;
    static constexpr ScaleKind kScale = kScale_;
    static constexpr int kGroup = kGroup_;
    static constexpr bool kSecond = kSecond_;
    static constexpr bool kStored = kScale == ScaleKind::kStored || (kScale == ScaleKind::kE4m3 && !kSecond);
};

// Every key, in the order of src/cuda/quantize.rs.
#define MOE_ACTIVATION_KEYS(X)                                      \
    X(fp8_tensor, Key<E4m3, ScaleKind::kStored, 0>)                 \
    X(fp8_token, Key<E4m3, ScaleKind::kF32, 0>)                     \
    X(fp8_128, Key<E4m3, ScaleKind::kF32, 128>)                     \
    X(fp8_64, Key<E4m3, ScaleKind::kF32, 64>)                       \
    X(int8_tensor, Key<Int8, ScaleKind::kStored, 0>)                \
    X(int8_token, Key<Int8, ScaleKind::kF32, 0>)                    \
    X(mxfp8, Key<E4m3, ScaleKind::kE8m0, 32>)                       \
    X(mxfp4, Key<E2m1, ScaleKind::kE8m0, 32>)                       \
    X(mxfp6_e3m2, Key<E3m2, ScaleKind::kE8m0, 32>)                  \
    X(mxfp6_e2m3, Key<E2m3, ScaleKind::kE8m0, 32>)                  \
    X(nvfp4, Key<E2m1, ScaleKind::kE4m3, 16>)                       \
    X(nvfp4_token, Key<E2m1, ScaleKind::kE4m3, 16, true>)

__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Neither zero nor subnormal, infinite or NaN.
__device__ __forceinline__ bool is_normal(float x) { return magnitude(x) - 0x800000u < kInfinityBits - 0x800000u; }

// The row's second level from its largest magnitude.
__device__ __forceinline__ float second_scale(uint32_t top) {
    return __fdiv_rn(__uint_as_float(top), 6.f * 448.f);
}

// A stored scale as it is used.
__device__ __forceinline__ Scale stored_scale(float stored) { return {is_normal(stored) ? stored : 0.f, 0}; }

// A computed one, from the largest magnitude of the group as an integer, in which a NaN is largest of all.
template <class K>
__device__ __forceinline__ Scale group_scale(uint32_t top, float second) {
    using E = typename K::Elem;
    if (top > kInfinityBits) return {__uint_as_float(top), K::kScale == ScaleKind::kE8m0 ? 0xffu : 0x7fu};
    const float amax = __uint_as_float(top);
    if constexpr (K::kScale == ScaleKind::kE8m0) {
        if (top == 0) return {0.f, 0};
        int code;
        if constexpr (E::kBits == 8) {
            // ceil(log2(amax / 448))
            const uint32_t ratio = __float_as_uint(__fdiv_rn(amax, E::kLargest));
            code = static_cast<int>(ratio >> 23) + ((ratio & 0x7fffffu) != 0);
        } else {
            // floor(log2(amax)) less the largest exponent of the element
            code = top == kInfinityBits ? 254 : static_cast<int>(top >> 23) - (E::kLargest < 16.f ? 2 : 4);
        }
        code = min(max(code, 1), 254);
        return {__uint_as_float(static_cast<uint32_t>(code) << 23), static_cast<uint32_t>(code)};
    } else if constexpr (K::kScale == ScaleKind::kE4m3) {
        const float wanted = __fdiv_rn(__fdiv_rn(amax, E::kLargest), second);
        const float value = __fmul_rn(rounded<E4m3>(wanted), second);
        return is_normal(value) ? Scale{value, encoded<E4m3>(wanted)} : Scale{0.f, 0};
    } else {
        const float value = __fdiv_rn(amax, E::kLargest);
        return {is_normal(value) ? value : 0.f, 0};
    }
}

// x over the scale, which is not 0.
template <class K>
__device__ __forceinline__ float quotient(float x, const Scale& scale) {
    if constexpr (K::kScale == ScaleKind::kE8m0) {
        // A power of two: its inverse is exact, and a subnormal at the upper end.
        return __fmul_rn(x, __uint_as_float(scale.code == 254 ? 1u << 22 : (254 - scale.code) << 23));
    }
    return __fdiv_rn(x, scale.value);
}

// The quantised value of x.
template <class K>
__device__ __forceinline__ float quantized(float x, const Scale& scale) {
    if (scale.value == 0.f || scale.value != scale.value) return scale.value;
    return __fmul_rn(rounded<typename K::Elem>(quotient<K>(x, scale)), scale.value);
}

// The code of x.
template <class K>
__device__ __forceinline__ uint32_t quantized_code(float x, const Scale& scale) {
    if (scale.value == 0.f || scale.value != scale.value) return 0;
    return encoded<typename K::Elem>(quotient<K>(x, scale));
}

}  // namespace moe
