// Products of int8 codes, with sums that are exact.
//
// A block of K is 128 columns here, two blocks of the packed format: a token's codes of it are a row of a plane. A product
// takes 32 columns. Where the tensor cores expect columns 4 t + j and 16 + 4 t + j of the lane 4 g + t, it gives 8 t + j and
// 8 t + 4 + j, which both operands agree on.
#pragma once
#include "common/ptx.cuh"

namespace moe {

// A lane's word of 32 columns has four columns of the rows g (bytes 0 and 2) and g + 8 (1 and 3) in every two registers.
struct CodesW8A8 {
    static constexpr int kWords = 4;
    static constexpr float kOffset = 0.f;
    static constexpr bool kLift = false, kHalves = false;
    static __device__ __forceinline__ void step(const uint4 (&w)[kWords], int s, uint32_t (&a)[4]) {
        a[0] = __byte_perm(w[s].x, w[s].y, 0x6420), a[1] = __byte_perm(w[s].x, w[s].y, 0x7531);
        a[2] = __byte_perm(w[s].z, w[s].w, 0x6420), a[3] = __byte_perm(w[s].z, w[s].w, 0x7531);
    }
};

struct WholeProduct {
    // c += a (16 rows x 32) * b (32 x 8 columns), in the register layout of the instruction.
    static __device__ __forceinline__ void mma(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

}  // namespace moe
