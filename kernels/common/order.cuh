// The order of a token's columns for products whose other operand is packed (format.cuh): the tensor cores take columns in
// an order of their own, which the packing does not follow, so that the tokens do.
//
// 16 bits: of 32 columns, pairs 4 t + r (t, r from 0 to 3) stand at 4 r + t. 8 bits: of 32 columns, fours 2 t + b (b 0 or 1)
// stand at 4 b + t.
#pragma once
#include <cuda_runtime.h>

namespace moe {

// 32 columns of 16 bits, eight to a word of 16 bytes, from one order to the other; the same way back.
__device__ __forceinline__ void reorder(const uint4 (&v)[4], uint4 (&to)[4]) {
    to[0] = make_uint4(v[0].x, v[1].x, v[2].x, v[3].x);
    to[1] = make_uint4(v[0].y, v[1].y, v[2].y, v[3].y);
    to[2] = make_uint4(v[0].z, v[1].z, v[2].z, v[3].z);
    to[3] = make_uint4(v[0].w, v[1].w, v[2].w, v[3].w);
}

}  // namespace moe
