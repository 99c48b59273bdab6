// The 16-bit type that products are made in, bf16 or f16, as pairs in a register, and the tensor-core product itself.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace moe {

// (x & mask) | bits, in one instruction: the compiler makes two where both are constants.
__device__ __forceinline__ uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(x), "r"(mask), "r"(bits));
    return r;
}

struct Bf16 {
    using T = __nv_bfloat16;
    static constexpr bool kBf16 = true;
    static constexpr uint32_t kOnes = 0x3f803f80u;

    // Pairs of a - b and a * b. sm_80 has no subtraction or product of bf16 pairs, only the fused form.
    static __device__ __forceinline__ uint32_t sub(uint32_t a, uint32_t b) {
        uint32_t r;
#if __CUDA_ARCH__ >= 900
        asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
#else
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(b), "r"(0xbf80bf80u), "r"(a));
#endif
        return r;
    }
    static __device__ __forceinline__ uint32_t mul(uint32_t a, uint32_t b) {
        uint32_t r;
#if __CUDA_ARCH__ >= 900
        asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
#else
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(0x80008000u));
#endif
        return r;
    }
    static __device__ __forceinline__ float sum_of(uint32_t pair) {
        return __uint_as_float(pair << 16) + __uint_as_float(pair & 0xffff0000u);
    }
    static __device__ __forceinline__ float2 to_floats(uint32_t pair) {
        return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
    }
    static __device__ __forceinline__ T from_float(float x) { return __float2bfloat16_rn(x); }
    // The same for what is not a result yet.
    static __device__ __forceinline__ T between(float x) { return from_float(x); }
    static __device__ __forceinline__ float to_float(T x) { return __bfloat162float(x); }

    // c += a (16 rows x 16) * b (16 x 8 columns), in the register layout of the instruction.
    static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

struct F16 {
    using T = __half;
    static constexpr bool kBf16 = false;
    static constexpr uint32_t kOnes = 0x3c003c00u;

    static __device__ __forceinline__ uint32_t sub(uint32_t a, uint32_t b) {
        uint32_t r;
        asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
        return r;
    }
    static __device__ __forceinline__ uint32_t mul(uint32_t a, uint32_t b) {
        uint32_t r;
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
        return r;
    }
    static __device__ __forceinline__ float sum_of(uint32_t pair) {
        const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&pair));
        return f.x + f.y;
    }
    static __device__ __forceinline__ float2 to_floats(uint32_t pair) {
        return __half22float2(*reinterpret_cast<const __half2*>(&pair));
    }
    static __device__ __forceinline__ T from_float(float x) { return __float2half_rn(x); }
    // For what is not a result yet: beyond the range of f16 its largest value, not infinity.
    static __device__ __forceinline__ T between(float x) {
        return __float2half_rn(isfinite(x) ? fminf(fmaxf(x, -65504.f), 65504.f) : x);
    }
    static __device__ __forceinline__ float to_float(T x) { return __half2float(x); }

    static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

}  // namespace moe
