// A lone token's rows as integers, for codes that are integers themselves. The numbers of a stage of 128 columns are
// counted in units of 2^-22 of the power of two above their largest, and written as three signed digits of base 256, for
// which the product has columns to spare. Products of digits and codes are exact, and half as many; four bits make bytes
// by a mask, and int8's are bytes but for their order.
#pragma once
#include "params.cuh"

namespace moe {

template <class C, class Q, class S>
struct Digits {
    static constexpr int kGroups = S::kGroups == 0 ? 1 : S::kGroups;
    uint32_t at;
    int blocks, stages, stride, bytes;  // stride: of a row's digit; bytes: of a row

    // src/cuda/decode/plan.rs reckons the same.
    __device__ __forceinline__ Digits(uint32_t at, int blocks) : at(at), blocks(blocks), stages((blocks + 1) / 2) {
        // Off a multiple of 128 bytes, so that two digits lie in different banks.
        stride = stages * kStage + 16, bytes = (3 * stride + stages * (1 + kGroups) * 4 + 15) / 16 * 16;
    }
    __device__ __forceinline__ uint32_t row(int i) const { return at + i * bytes; }
    __device__ __forceinline__ uint32_t units(int i) const { return row(i) + 3 * stride; }
    __device__ __forceinline__ uint32_t sums(int i) const { return units(i) + stages * 4; }
    __device__ __forceinline__ DigitTokens tokens(int i, int lane) const {
        const int g = lane >> 2, t = lane & 3;
        return {row(i) + min(g, 2) * stride + 32 * t, units(i), sums(i)};
    }

    // Half a warp's, but of both halves at once: eight columns a lane, which `x` holds, of a row's stage, if it exists.
    __device__ __forceinline__ void write(int i, int stage, uint4 x, bool exists) const {
        const int lane = threadIdx.x & 15;
        float v[8];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 f = C::to_floats(word(x, j));
            v[2 * j] = f.x, v[2 * j + 1] = f.y;
        }
        uint32_t most = 0;
#pragma unroll
        for (int j = 0; j < 8; j++) most = max(most, __float_as_uint(v[j]) & 0x7fffffffu);
#pragma unroll
        for (int d = 1; d < 16; d *= 2) most = max(most, __shfl_xor_sync(~0u, most, d));
        // Of tiny stages the units are numbers, too.
        const uint32_t exponent = max(most >> 23, 22u);
        const float times = __uint_as_float((275 - exponent) << 23);
        int sum = 0;
        uint32_t digits[8];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            // The integer in a number's last places; then what makes its bytes signed.
            const int n = __float_as_int(fmaf(v[j], times, 12582912.f)) - 0x4b400000;
            sum += n, digits[j] = (n + 0x808080) ^ 0x808080;
        }
        uint32_t words[3][2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            // As the bytes of a code's word: columns 0, 2, 1, 3.
            const uint32_t* d = digits + 4 * j;
            const uint32_t a = __byte_perm(d[0], d[2], 0x5140), b = __byte_perm(d[1], d[3], 0x5140);
            words[2][j] = __byte_perm(a, b, 0x5410), words[1][j] = __byte_perm(a, b, 0x7632);
            words[0][j] = __byte_perm(__byte_perm(d[0], d[2], 0x0062), __byte_perm(d[1], d[3], 0x0062), 0x5410);
        }
        const uint32_t to = row(i) + stage * kStage + lane % 4 * 32 + lane / 4 * 8;
#pragma unroll
        for (int p = 0; p < 3; p++) {
            if (exists) store_8(to + p * stride, make_uint2(words[p][0], words[p][1]));
        }
        if constexpr (kNeedsSums<Q, S>) {
            constexpr int kLanes = 16 / kGroups;
#pragma unroll
            for (int d = 1; d < kLanes; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
            if (exists && lane % kLanes == 0) {
                store_4(sums(i) + (stage * kGroups + lane / kLanes) * 4, __float_as_uint(sum * 0x1p-16f));
            }
        }
        // What is no number stays none.
        if (exists && lane == 0) store_4(units(i) + 4 * stage, most >= 0x7f800000u ? 0x7fc00000u : (exponent - 5) << 23);
    }

    // A row in shared memory. The whole block's; a barrier of the block must follow.
    __device__ __forceinline__ void from_shared(uint32_t from) const {
        const int lane = threadIdx.x & 15;
#pragma unroll 1
        for (int start = threadIdx.x / 32 * 2; start < stages; start += blockDim.x / 16) {
            const int stage = start + (threadIdx.x & 31) / 16;
            uint4 x = make_uint4(0, 0, 0, 0);
            if (2 * stage + lane / 8 < blocks) x = read_shared<uint4>(from + stage * 256 + lane * 16);
            write(0, stage, x, stage < stages);
        }
    }

    // `count` rows of `length` elements in L2. The whole block's; a barrier of the block must follow.
    template <int kBatch>
    __device__ __forceinline__ void from_global(const typename C::T* first, int length, int count) const {
        const int per_row = stages * 16, all = per_row * count;
#pragma unroll 1
        for (int start = threadIdx.x; start - (int)(threadIdx.x & 31) < all; start += kBatch * blockDim.x) {
            uint4 x[kBatch];
            int row[kBatch], vector[kBatch];
#pragma unroll
            for (int b = 0; b < kBatch; b++) {
                const int v = start + b * blockDim.x;
                row[b] = v / per_row, vector[b] = v - row[b] * per_row;
                x[b] = make_uint4(0, 0, 0, 0);
                if (v < all && 8 * vector[b] < length) x[b] = load_16(first + (long long)row[b] * length + 8 * vector[b]);
            }
#pragma unroll
            for (int b = 0; b < kBatch; b++) {
                const int v = start + b * blockDim.x;
                if (v - (int)(threadIdx.x & 31) < all) write(row[b], vector[b] / 16, x[b], v < all);
            }
        }
    }

    // The sum of what the digits' columns hold, in the lanes with t = 0.
    static __device__ __forceinline__ void combine(float (&acc)[4]) {
        acc[0] += 0x1p-8f * (acc[1] + 0x1p-8f * __shfl_down_sync(~0u, acc[1], 1));
        acc[2] += 0x1p-8f * (acc[3] + 0x1p-8f * __shfl_down_sync(~0u, acc[3], 1));
    }
};

using RowDigits = Digits<C, Q, S>;

}  // namespace moe
