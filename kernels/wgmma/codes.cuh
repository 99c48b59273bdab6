// Results of a gated first projection to operands of the second one, with the bits that a kernel of their own makes of results
// rounded to 16 bits (kernels/operands.cu).
#pragma once
#include "common/chunk.cuh"
#include "common/order.cuh"
#include "task.cuh"

namespace moe {

// A token has four lanes, which are the nth `eight` of 32 columns from 16 * `chunk` on: theirs to codes in row `row` of the
// result's planes. By all lanes of a warp.
template <class K>
__device__ __forceinline__ void write_codes(const GemmParams& p, const uint4& results, const Divisor& by, int chunk, int eight,
                                            int row, bool exists) {
    float v[CHUNK], q[CHUNK];
    widen(Raw<C::T>{results.x, results.y, results.z, results.w}, v);
    divide<K, K::kScale == ScaleKind::kF32>(v, by, q);
    uint32_t low = four_codes<K>(q), high = four_codes<K>(q + 4);
    if (by.inverse == 0) low = high = 0;
    // Four lanes' first words are one chunk of the row, their second words the next one: neighbours write half of either.
    const bool second = eight & 1;
    const uint32_t theirs = __shfl_xor_sync(~0u, second ? low : high, 1);
    if (!exists) return;
    uint4* to = static_cast<uint4*>(p.out) + ordered_place(chunk + second, row, p.count);
    reinterpret_cast<uint2*>(to)[eight / 2] = second ? make_uint2(theirs, high) : make_uint2(low, theirs);
}

}  // namespace moe
