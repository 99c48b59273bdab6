// Packed weights: how a lane's 16-byte words become operands of the tensor cores, and their scales.
//
// A slab is 16 rows of a matrix; a block is 64 columns of a slab, four tensor-core products ("steps") of 16 columns.
// As that product wants it, lane 4 g + t holds rows g and g + 8. Of a step it takes four columns: 32 (s / 2) + 8 t +
// 4 (s % 2) and the next three, so that two steps' worth of the other operand is 16 consecutive bytes; where groups of
// 16 columns have scales, 16 s + 4 t and the next three. A stage is two blocks (the last of a slab may have one) and
// their scales, one run of memory. src/cuda/pack.rs is the other half of every definition here.
#pragma once
#include "compute.cuh"

namespace moe {

__device__ __forceinline__ uint32_t word(const uint4& w, int i) {
    return i == 0 ? w.x : i == 1 ? w.y : i == 2 ? w.z : w.w;
}

// Codes. `step` gives the four operand registers of a step: (row g, columns 0 1), (row g + 8, columns 0 1),
// (row g, columns 2 3), (row g + 8, columns 2 3).
//   kWords   16-byte words per lane and block
//   kOffset  what every operand is too large by; the product with the columns' sum is taken off later
//   kDigits  codes are bytes (kSigned or not) that meet a lone token's digits; `bytes` gives the registers of two steps:
//            (row g, first step), (row g + 8, first step), (row g, second step), (row g + 8, second step), columns 0, 2, 1, 3
//            of each; row g + 8's are larger by 1 / kSecondRow; kZeroCode is the code of zero where none is stored
//   kHalves  tokens in shared memory are made f16, each stage in units of its own, and codes by `halves`, which gives the
//            same registers as `step`; kHalvesScale is what an operand of `step` is of the code's value
//   kLift    operands are tiny (the code's bits in a wider exponent); the other operand is lifted by 2^80 so that
//            products are ordinary numbers, and the row's factor carries the rest

// Whether e4m3 codes are converted by an instruction.
#if __CUDA_ARCH__ >= 890
#define MOE_HALVES 1
#else
#define MOE_HALVES 0
#endif

// Four e4m3 codes as f16: the first two, the others.
__device__ __forceinline__ void e4m3_to_halves(uint32_t codes, uint32_t& low, uint32_t& high) {
#if MOE_HALVES
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.rn.f16x2.e4m3x2 %0, l;\ncvt.rn.f16x2.e4m3x2 %1, h;\n}"
        : "=r"(low), "=r"(high)
        : "r"(codes));
#endif
}

// bf16 or f16 as they are.
template <class C>
struct Codes16 {
    static constexpr bool kHalves = false;
    static constexpr bool kDigits = false;
    static constexpr int kWords = 4;
    static constexpr float kOffset = 0.f;
    static constexpr bool kLift = false;
    static __device__ __forceinline__ void step(const uint4 (&w)[kWords], int s, uint32_t (&a)[4]) {
        a[0] = w[s].x, a[1] = w[s].y, a[2] = w[s].z, a[3] = w[s].w;
    }
};

// e4m3: the code's bits moved into the 16-bit type are its value times 2^-120 (bf16) or 2^-8 (f16), subnormals
// included. A word's bytes are plain codes, which the tensor cores of Hopper multiply as they are.
template <class C>
struct CodesE4m3 {
    static constexpr bool kDigits = false;
    static constexpr int kWords = 2;
    static constexpr float kOffset = 0.f;
    static constexpr bool kLift = C::kBf16;
    static constexpr bool kHalves = MOE_HALVES;
    static constexpr float kHalvesScale = C::kBf16 ? 0x1p-120f : 0x1p-8f;
    static __device__ __forceinline__ void halves(const uint4 (&w)[kWords], int s, uint32_t (&a)[4]) {
        const uint32_t v = word(w[s / 2], 2 * (s % 2)), u = word(w[s / 2], 2 * (s % 2) + 1);
        e4m3_to_halves(__byte_perm(v, u, 0x6420), a[0], a[2]);
        e4m3_to_halves(__byte_perm(v, u, 0x7531), a[1], a[3]);
    }
    static __device__ __forceinline__ void step(const uint4 (&w)[kWords], int s, uint32_t (&a)[4]) {
        constexpr uint32_t kBody = C::kBf16 ? 0x07f007f0u : 0x3f803f80u;
        constexpr int kDown = C::kBf16 ? 4 : 1;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t v = word(w[s / 2], 2 * (s % 2) + i);
            a[2 * i] = and_or(v << (8 - kDown), kBody, (v << 8) & 0x80008000u);
            a[2 * i + 1] = and_or(v >> kDown, kBody, v & 0x80008000u);
        }
    }
};

// int8, two's complement, exact in either type. Unsigned codes are stored less 128.
template <class C>
struct CodesInt8 {
    static constexpr bool kHalves = false;
    static constexpr bool kDigits = true, kSigned = true;
    static constexpr float kSecondRow = 1.f, kZeroCode = 0.f;
    static constexpr int kWords = 2;
    static constexpr float kOffset = 0.f;
    static constexpr bool kLift = false;
    static __device__ __forceinline__ void bytes(const uint4 (&w)[kWords], int j, uint32_t (&a)[4]) {
        a[0] = __byte_perm(w[j].x, w[j].y, 0x6240), a[1] = __byte_perm(w[j].x, w[j].y, 0x7351);
        a[2] = __byte_perm(w[j].z, w[j].w, 0x6240), a[3] = __byte_perm(w[j].z, w[j].w, 0x7351);
    }
    static __device__ __forceinline__ uint32_t pair(uint32_t v) {
        if (C::kBf16) {
            // 128 + the low seven bits, less 128 or, where the sign is set, 256.
            return C::sub(and_or(v, 0x007f007fu, 0x43004300u), and_or(v, 0x00800080u, 0x43004300u));
        }
        return C::sub(and_or(v ^ 0x00800080u, 0x00ff00ffu, 0x64006400u), 0x64806480u);
    }
    static __device__ __forceinline__ void step(const uint4 (&w)[kWords], int s, uint32_t (&a)[4]) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t v = word(w[s / 2], 2 * (s % 2) + i);
            a[2 * i] = pair(v);
            a[2 * i + 1] = pair(v >> 8);
        }
    }
};

// u4: register i takes nibble i of either half, into the mantissa of a number whose last place is 1.
template <class C>
struct CodesU4 {
    static constexpr bool kHalves = false;
    static constexpr bool kDigits = true, kSigned = false;
    static constexpr float kSecondRow = 0.0625f, kZeroCode = 8.f;
    static constexpr int kWords = 1;
    static constexpr float kOffset = C::kBf16 ? 128.f : 1024.f;
    static constexpr bool kLift = false;
    static __device__ __forceinline__ void bytes(const uint4 (&w)[kWords], int j, uint32_t (&a)[4]) {
        const uint32_t v = word(w[0], 2 * j), u = word(w[0], 2 * j + 1);
        a[0] = v & 0x0f0f0f0fu, a[1] = v & 0xf0f0f0f0u, a[2] = u & 0x0f0f0f0fu, a[3] = u & 0xf0f0f0f0u;
    }
    static __device__ __forceinline__ void step(const uint4 (&w)[kWords], int s, uint32_t (&a)[4]) {
        constexpr uint32_t kMagic = C::kBf16 ? 0x43004300u : 0x64006400u;
        uint32_t v = word(w[0], s);
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = and_or(v >> (4 * i), 0x000f000fu, kMagic);
    }
};

// e2m1: four codes in either half of a word, as bits of a 16-bit number whose other bits are masked off: the value times
// 2^-126 in bf16, times 2^-14 in f16. Masks and rotations cost most, shifts to the left go another way through the GPU: no
// other places need so few of the former. Sign and three bits of code i are at
//   bf16  15, 8..6 (i = 0); 5', 14..12 (1); 9, 2..0 (2); 3', 4, 11, 10 (3), where ' means the other half
//   f16   15, 11..9; 12, 8..6; 13, 5..3; 14, 2..0
template <class C>
struct CodesE2m1 {
    static constexpr bool kHalves = false;
    static constexpr bool kDigits = false;
    static constexpr int kWords = 1;
    static constexpr float kOffset = 0.f;
    static constexpr bool kLift = C::kBf16;
    static __device__ __forceinline__ void step(const uint4 (&w)[kWords], int s, uint32_t (&a)[4]) {
        const uint32_t v = word(w[0], s);
        if constexpr (C::kBf16) {
            const uint32_t turned = __funnelshift_r(v, v, 6);
            a[0] = v & 0x81c081c0u;
            a[1] = turned & 0x81c081c0u;
            a[2] = (v << 6) & 0x81c081c0u;
            a[3] = and_or(turned << 2, 0x80c080c0u, (v << 4) & 0x01000100u);
        } else {
            a[0] = v & 0x8e008e00u;
            a[1] = (v << 3) & 0x8e008e00u;
            a[2] = and_or(v << 6, 0x0e000e00u, (v << 2) & 0x80008000u);
            a[3] = and_or(v << 9, 0x0e000e00u, (v << 1) & 0x80008000u);
        }
    }
};

// Scales of a stage. `Word` is what lane group g reads of it; `get` gives the two rows' scales of scale group i of the
// stage and their zero points.
//   kGroups  scale groups per stage; one where groups are of 128 columns or more
//   kRegisters  32-bit registers of a word

struct NoScale {
    static constexpr int kGroups = 0, kRegisters = 0;
    static constexpr bool kZero = false;
    static __device__ __forceinline__ void get(const uint32_t*, int, bool, float (&)[2], float (&)[2]) {}
};

// float32.
template <int kPerStage>
struct ScaleF32 {
    static constexpr int kGroups = kPerStage, kRegisters = 2 * kPerStage;
    static constexpr bool kZero = false;
    static __device__ __forceinline__ void get(const uint32_t* w, int i, bool, float (&s)[2], float (&)[2]) {
        s[0] = __uint_as_float(w[2 * i]), s[1] = __uint_as_float(w[2 * i + 1]);
    }
};

__device__ __forceinline__ void two_halves(uint32_t w, bool bf16, float (&s)[2]) {
    if (bf16) {
        s[0] = __uint_as_float(w << 16), s[1] = __uint_as_float(w & 0xffff0000u);
    } else {
        float2 f = __half22float2(*reinterpret_cast<const __half2*>(&w));
        s[0] = f.x, s[1] = f.y;
    }
}

// bf16 or f16, as `bf16` says; zero points are f16, each group's behind its scales.
template <int kPerStage, bool kHasZero>
struct ScaleHalf {
    static constexpr int kGroups = kPerStage, kRegisters = kPerStage * (kHasZero ? 2 : 1);
    static constexpr bool kZero = kHasZero;
    static __device__ __forceinline__ void get(const uint32_t* w, int i, bool bf16, float (&s)[2], float (&zero)[2]) {
        two_halves(w[kHasZero ? 2 * i : i], bf16, s);
        if (kHasZero) two_halves(w[2 * i + 1], false, zero);
    }
};

// e8m0 for every 32 columns: row g's four, then row g + 8's. No code is above 128, and none but that of padding is 0,
// which would stand for a subnormal.
struct ScaleE8m0 {
    static constexpr int kGroups = 4, kRegisters = 2;
    static constexpr bool kZero = false;
    static __device__ __forceinline__ float one(uint32_t w, int i) {
        if (i == 0) return __uint_as_float(__byte_perm(w, 0, 0x4440) << 23);
        return __uint_as_float((i < 3 ? w << (23 - 8 * i) : w >> 1) & 0x7f800000u);
    }
    static __device__ __forceinline__ void get(const uint32_t* w, int i, bool, float (&s)[2], float (&)[2]) {
        s[0] = one(w[0], i), s[1] = one(w[1], i);
    }
};

// e4m3 for every 16 columns: row g's eight, then row g + 8's.
struct ScaleE4m3 {
    static constexpr int kGroups = 8, kRegisters = 4;
    static constexpr bool kZero = false;
    static __device__ __forceinline__ float one(uint32_t w, int i) {
#if __CUDA_ARCH__ >= 890
        // Two at once: the compiler sees that neighbours ask for the same ones.
        uint32_t two;
        asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, low;\n}"
            : "=r"(two)
            : "r"(i < 2 ? w : w >> 16));
        const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&two));
        return i % 2 == 0 ? f.x : f.y;
#else
        // The code's bits moved into float32 are the value times 2^-120, subnormals included.
        uint32_t b = __byte_perm(w, 0, 0x4440 + i);
        return __uint_as_float((b & 0x7f) << 20 | (b & 0x80) << 24) * 0x1p120f;
#endif
    }
    static __device__ __forceinline__ void get(const uint32_t* w, int i, bool, float (&s)[2], float (&)[2]) {
        s[0] = one(w[i / 4], i % 4), s[1] = one(w[2 + i / 4], i % 4);
    }
    // Of two codes.
    static __device__ __forceinline__ float2 two(uint32_t w) { return make_float2(one(w, 0), one(w, 1)); }
};

}  // namespace moe
