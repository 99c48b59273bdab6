// A step's operand from a lane's words of codes, where the tensor cores are what is waited for.
#pragma once
#include "task.cuh"

namespace moe {

// e4m3 codes become f16 by an instruction where they are multiplied as such.
constexpr bool kConverted = Q::kHalves && !C::kBf16 && (Format::kScale == Scale::kNone || Format::kScale == Scale::kF32);

// (x & mask) | (y & ~mask).
__device__ __forceinline__ uint32_t either(uint32_t x, uint32_t mask, uint32_t y) {
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xe2;" : "=r"(r) : "r"(x), "r"(mask), "r"(y));
    return r;
}

// What CodesE4m3::step gives, in 12 instructions instead of 14: the signs of a word's four codes are found at once, and those
// that do not belong stand where the mask takes the other number.
template <class Codes>
__device__ __forceinline__ void e4m3_step(const uint4 (&w)[Codes::kWords], int step, uint32_t (&a)[4]) {
    constexpr uint32_t kBody = C::kBf16 ? 0x07f007f0u : 0x3f803f80u;
    constexpr int kDown = C::kBf16 ? 4 : 1;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t v = word(w[step / 2], 2 * (step % 2) + i);
        uint32_t signs;
        // The compiler would shift first, and mask twice.
        asm("and.b32 %0, %1, 0x80808080;" : "=r"(signs) : "r"(v));
        a[2 * i] = either(v << (8 - kDown), kBody, signs << 8);
        a[2 * i + 1] = either(v >> kDown, kBody, signs);
    }
}

template <class Codes>
__device__ __forceinline__ void operand_of(const uint4 (&w)[Codes::kWords], int step, uint32_t (&a)[4]) {
    if constexpr (kConverted) {
        Codes::halves(w, step, a);
    } else if constexpr (D::kE4m3) {
        e4m3_step<Codes>(w, step, a);
    } else {
        Codes::step(w, step, a);
    }
}

// What sums of such operands are multiplied by.
template <class Codes>
__device__ __forceinline__ float sum_scale() {
    if constexpr (kConverted) return D::kPost * Codes::kHalvesScale;
    return D::kPost;
}

}  // namespace moe
