// How tokens lie for products whose other operand is packed (format.cuh): in planes of 128 bytes of every row, whose
// columns are in the order in which the tensor cores meet them, since they take the packed operand's in an order of their own.
//
// 16 bits: of 32 columns, pairs 4 t + r (t, r from 0 to 3) stand at 4 r + t. 8 bits: of 32 columns, fours 2 t + b (b 0 or 1)
// stand at 4 b + t.
#pragma once

namespace moe {

// Where 16-byte chunk `chunk` of all planes of row `row` lies, in chunks, with `rows` rows to a plane: eight rows' same
// chunks are in eight different places of their lines.
__device__ __forceinline__ long long ordered_place(int chunk, int row, int rows) {
    return (static_cast<long long>(chunk / 8) * rows + row) * 8 + (chunk % 8 ^ (row & 7));
}

}  // namespace moe
