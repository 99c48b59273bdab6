// Packed weights as 16-bit operands whose products may be summed over many scale groups in one accumulator.
//
// What the 16-bit type holds exactly is multiplied into the operand: powers of two (e8m0) and e4m3 scales on e2m1 codes.
// Other scales (float32, 16-bit) stay with the accumulators: a row's sum is kept in units of the running group's scale and
// moved to the next group's unit by one product. The packer sees to it that a row's scales are
// normal numbers within 2^60 of one another.
#pragma once
#include "format.cuh"
#include "ptx.cuh"

namespace moe {

enum class Scale { kNone, kF32, kHalf, kE8m0, kE4m3 };

constexpr float power(int n) {
    float x = 1.f;
    for (int i = 0; i < (n < 0 ? -n : n); i++) x *= n < 0 ? 0.5f : 2.f;
    return x;
}

// What a launch knows of a matrix's scales that is not in its type.
struct ScaleLayout {
    int groups;  // per stage
    int stride;  // bytes of a lane group's word
    int zero;    // zero points follow the scales
    int bf16;    // 16-bit scales are bf16
};

template <class C, class Q, Scale kScale>
struct Dequant {
    static constexpr bool kE4m3 = std::is_same_v<Q, CodesE4m3<C>>, kE2m1 = std::is_same_v<Q, CodesE2m1<C>>;
    static constexpr bool kInt4 = std::is_same_v<Q, CodesU4<C>>, kInt8 = std::is_same_v<Q, CodesInt8<C>>;
    // The sum is in units that change from group to group.
    static constexpr bool kUnits = kScale == Scale::kF32 || kScale == Scale::kHalf;
    static constexpr bool kZeros = kScale == Scale::kHalf;
    // Columns in the order for groups of 16.
    static constexpr bool kNarrow = kScale == Scale::kE4m3;
    // Operands are tiny and tokens multiplied by 2^80, as in the decode kernels; elsewhere a scale makes up for it.
    static constexpr bool kLift = Q::kLift && kE4m3 && (kScale == Scale::kNone || kScale == Scale::kF32);
    // What is left to multiply a row's sum by, beside its factor, which suits the decode kernels' operands.
    static constexpr float kPost = kE4m3 && kScale == Scale::kE8m0 ? power(C::kBf16 ? -40 : -8)
                                   : kE4m3                         ? 1.f
                                   : kE2m1 && kNarrow              ? power(C::kBf16 ? -32 : -7)
                                   : kE2m1                         ? power(C::kBf16 ? -46 : -14)
                                                                   : 1.f;

    // Of a slab: rows g and g + 8.
    float unit[2] = {1.f, 1.f};
    // What finish() takes off or multiplies by.
    uint32_t factor[2] = {};

    // Before the first stage.
    __device__ __forceinline__ void begin() {
        // What u4 codes without zero points are too large by, and the operands' offset.
        if constexpr (kZeros) factor[0] = factor[1] = twice((kInt4 ? 8.f : 0.f) + Q::kOffset);
    }

    // Whether the units change with the stage's 32 columns `quarter`.
    static __device__ __forceinline__ bool moves(int quarter, const ScaleLayout& s) {
        return kUnits && (quarter == 0 || (quarter * s.groups & 3) == 0);
    }

    // The scales of those columns, and zero points, of a lane group whose word is at `at`.
    static __device__ __forceinline__ uint2 scales_of(uint32_t at, int quarter, const ScaleLayout& s) {
        if constexpr (kUnits) {
            const int group = quarter > 0 ? quarter * s.groups >> 2 : 0;
            if constexpr (kScale == Scale::kF32) return read_shared<uint2>(at + 8 * group);
            const uint32_t from = at + (s.zero ? 8 : 4) * group;
            return make_uint2(read_shared<uint32_t>(from), s.zero ? read_shared<uint32_t>(from + 4) : 0);
        } else if constexpr (kScale == Scale::kE8m0) {
            return make_uint2(read_shared<uint32_t>(at), read_shared<uint32_t>(at + 4));
        }
        return make_uint2(0, 0);
    }

    // Enters them. Where the units change, the sums must be multiplied by `move`.
    __device__ __forceinline__ void enter(uint2 scales, int quarter, const ScaleLayout& s, float (&move)[2]) {
        if constexpr (kUnits) {
            float now[2];
            if constexpr (kScale == Scale::kF32) {
                now[0] = __uint_as_float(scales.x), now[1] = __uint_as_float(scales.y);
            } else {
                two_halves(scales.x, s.bf16, now);
                if (s.zero) {
                    float zeros[2];
                    two_halves(scales.y, false, zeros);
                    factor[0] = twice(zeros[0] + Q::kOffset), factor[1] = twice(zeros[1] + Q::kOffset);
                }
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                // Padding has no scale.
                const bool none = now[i] == 0.f;
                if (none) now[i] = unit[i];
                move[i] = none ? 1.f : unit[i] * reciprocal(now[i]);
                unit[i] = now[i];
            }
        } else if constexpr (kScale == Scale::kE8m0) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                // The exponent byte into both halves; the row's largest is 128, which stands for 2.
                const uint32_t e = __byte_perm(i == 0 ? scales.x : scales.y, 0, 0x4040 + 0x0101 * quarter);
                if constexpr (C::kBf16) {
                    factor[i] = (e + (kE4m3 ? 0x00780078u : 0x007e007eu)) << 7;
                } else {
                    factor[i] = __vmaxs2(__vsub2(e, kE4m3 ? 0x00680068u : 0x00620062u), 0) << 10;
                }
            }
        }
    }

    // For each 16 columns `step` of a stage (e4m3 scales): the row's scale times 2^112 (bf16) or 2^7 (f16).
    __device__ __forceinline__ void enter_narrow(uint32_t at, int step) {
        if constexpr (kNarrow) {
            factor_of(read_shared<uint32_t>(at + 4 * (step / 4)), read_shared<uint32_t>(at + 8 + 4 * (step / 4)), step);
        }
    }
    __device__ __forceinline__ void factor_of(uint32_t low, uint32_t high, int step) {
        if constexpr (kNarrow) {
            // Byte `step % 4` of either row, one to a half; the masks drop what stands beside them.
            const uint32_t pair = __byte_perm(low, high, step % 4 | (4 + step % 4) << 8);
            uint32_t both;
            if constexpr (C::kBf16) {
                both = and_or(pair << 4, 0x07f007f0u, (pair << 8) & 0x80008000u);
                both = C::mul(C::mul(both, 0x79807980u), 0x79807980u);
            } else {
                both = and_or(pair << 7, 0x3f803f80u, (pair << 8) & 0x80008000u);
                both = C::mul(both, 0x78007800u);
            }
            factor[0] = __byte_perm(both, 0, 0x1010), factor[1] = __byte_perm(both, 0, 0x3232);
        }
    }

    // Scales that operands are multiplied by, of a stage's block `nth`: two words of a lane group's.
    static __device__ __forceinline__ uint2 operand_scales_of(uint32_t at, int nth) {
        if constexpr (kNarrow) return make_uint2(read_shared<uint32_t>(at + 4 * nth), read_shared<uint32_t>(at + 8 + 4 * nth));
        return read_shared<uint2>(at);
    }
    // Enters those of the block's 16 columns `step`; steps come in order.
    __device__ __forceinline__ void enter_operand(uint2 scales, int nth, int step) {
        if constexpr (kNarrow) {
            factor_of(scales.x, scales.y, step);
        } else if constexpr (kScale == Scale::kE8m0) {
            float none[2];
            if (step % 2 == 0) enter(scales, 2 * nth + step / 2, {}, none);
        }
    }

    // The operand of a step from the codes' own.
    __device__ __forceinline__ void finish(uint32_t (&a)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if constexpr (kZeros) {
                a[i] = C::sub(a[i], factor[i % 2]);
            } else if constexpr (kScale == Scale::kE8m0 || kScale == Scale::kE4m3) {
                a[i] = C::mul(a[i], factor[i % 2]);
            }
        }
    }

    // Of a normal number.
    static __device__ __forceinline__ float reciprocal(float x) {
        float r;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
        return r;
    }

    static __device__ __forceinline__ uint32_t twice(float x) {
        if constexpr (C::kBf16) {
            return __byte_perm(__float_as_uint(x), 0, 0x3232);
        } else {
            const __half h = __float2half_rn(x);
            return __half_as_ushort(h) * 0x00010001u;
        }
    }
};

}  // namespace moe
