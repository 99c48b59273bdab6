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

// |x| at most `largest`, and its exponent's bits (the subnormals' for those).
template <class E>
__device__ __forceinline__ float limited(float x, uint32_t& exponent) {
    const float a = fminf(fabsf(x), E::kLargest);
    exponent = max(__float_as_uint(a) & kInfinityBits, static_cast<uint32_t>(127 + E::kMinExponent) << 23);
    return a;
}

// 2^(23 - mantissa) times that power of two has the element's step for its last bit: adding it rounds, to nearest and
// ties to even.
template <class E>
__device__ __forceinline__ uint32_t magic(uint32_t exponent) {
    return exponent + (static_cast<uint32_t>(23 - E::kMantissa) << 23);
}

// The nearest value of the element; a NaN stays one.
template <class E>
__device__ __forceinline__ float rounded(float x) {
    if (x != x) return x;
    if constexpr (E::kMantissa == 0) return fminf(fmaxf(rintf(x), -128.f), 127.f);
    uint32_t exponent;
    const float a = limited<E>(x, exponent), large = __uint_as_float(magic<E>(exponent));
    return copysignf(__fsub_rn(__fadd_rn(a, large), large), x);
}

// Its code; not for NaNs.
template <class E>
__device__ __forceinline__ uint32_t encoded(float x) {
    if constexpr (E::kMantissa == 0) {
        // 1.5 * 2^23, whose last bit stands for 1: what is added to it, of either sign, ends up in the last bits.
        return __float_as_uint(__fadd_rn(fminf(fmaxf(x, -128.f), 127.f), 12582912.f)) & 255u;
    } else {
        uint32_t exponent;
        const float a = limited<E>(x, exponent);
        const uint32_t large = magic<E>(exponent);
        // The steps are the code, and a mantissa's worth of codes more for each binade above the first normal one. A carry
        // is the next code.
        const uint32_t steps = __float_as_uint(__fadd_rn(a, __uint_as_float(large))) - large;
        constexpr uint32_t first = static_cast<uint32_t>(127 + E::kMinExponent) << E::kMantissa;
        const uint32_t before = (exponent >> (23 - E::kMantissa)) - first;
        return before + steps | __float_as_uint(x) >> (32 - E::kBits) & 1u << (E::kBits - 1);
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

// Whether a group has codes at all.
__device__ __forceinline__ bool has_codes(const Scale& scale) { return is_normal(scale.value); }

// The quantised value of x.
template <class K>
__device__ __forceinline__ float quantized(float x, const Scale& scale) {
    // 0 or NaN.
    if (!has_codes(scale)) return scale.value;
    return __fmul_rn(rounded<typename K::Elem>(__fdiv_rn(x, scale.value)), scale.value);
}

// 1 / x for x from 1 to 2, rounded. Two steps of Newton's from a quotient within two units of the last place fall short at
// one mantissa only.
__device__ __forceinline__ float inverse(float x) {
    float y = __fdividef(1.f, x);
    y = __fmaf_rn(y, __fmaf_rn(-x, y, 1.f), y);
    y = __fmaf_rn(y, __fmaf_rn(-x, y, 1.f), y);
    return __float_as_uint(x) == 0x3fffffffu ? __uint_as_float(0x3f000001u) : y;
}

// What divides by a scale: a power of two that takes it to between 1 and 2 (exact, and a subnormal at the upper end; a value
// that it takes out of the normal numbers is far below the smallest code), the scale there, and the inverse of that. Of a
// scale without codes they are anything.
struct Divisor {
    float power, scale, inverse;
};
__device__ __forceinline__ Divisor divisor_of(const Scale& scale) {
    const uint32_t exponent = magnitude(scale.value) >> 23;
    const float power = __uint_as_float(exponent >= 254 ? 1u << 22 : (254 - exponent) << 23);
    const float reduced = __fmul_rn(scale.value, power);
    return {power, reduced, copysignf(inverse(fabsf(reduced)), reduced)};
}

// The same, with an inverse of 0 where there are no codes.
__device__ __forceinline__ Divisor coding_divisor(const Scale& scale) {
    const Divisor by = divisor_of(scale);
    return {by.power, by.scale, has_codes(scale) ? by.inverse : 0.f};
}

// The quotients of a group's values and its scale, with the bits of a division wherever they could decide on a code. kHalf:
// the values are 16-bit numbers and the scale is made of the largest of them.
template <class K, bool kHalf, int kCount>
__device__ __forceinline__ void divide(const float (&x)[kCount], const Divisor& by, float (&q)[kCount]) {
    static_assert(!kHalf || (K::kScale == ScaleKind::kF32 && !K::kSecond), "");
#pragma unroll
    for (int i = 0; i < kCount; i++) {
        q[i] = __fmul_rn(x[i], by.power);
        if constexpr (K::kScale != ScaleKind::kE8m0) {
            // Markstein's theorem: from a rounded inverse and a quotient within a unit of the last place, which the first
            // correction makes it, the second gives the rounded quotient. Of numbers with few digits the first one does:
            // src/cuda/quantize.rs tries all of them.
            const float y = q[i], guess = __fmul_rn(y, by.inverse);
            const float near = __fmaf_rn(__fmaf_rn(-guess, by.scale, y), by.inverse, guess);
            q[i] = kHalf ? near : __fmaf_rn(__fmaf_rn(-near, by.scale, y), by.inverse, near);
            // Where the scale is not from the values themselves they can be far beyond it: no remainder, and no need.
            if constexpr (K::kStored) q[i] = fabsf(guess) < 8192.f ? q[i] : guess;
        }
    }
}

// The code of a quotient. In a group with a scale of its own there are no NaNs; with a stored one, a NaN has a code in
// e4m3 and is zero elsewhere.
template <class K>
__device__ __forceinline__ uint32_t code_of(float q) {
    using E = typename K::Elem;
    if constexpr (K::kScale == ScaleKind::kStored) {
        if (q != q) return E::kMantissa != 0 ? 0x7fu : 0u;
    }
    return encoded<E>(q);
}

}  // namespace moe
