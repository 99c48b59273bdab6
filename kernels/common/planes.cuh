// How tokens lie for the grouped GEMM: planes of 64 columns, [planes][rows][kRowBytes].
#pragma once

namespace moe {

constexpr int kRowBytes = 128;

// A row's 16-byte chunk `c` lies in place c ^ swizzle(row): eight lanes that read four chunks of two neighbouring rows, or
// sixteen that read half chunks of four, then touch every bank of shared memory once.
__device__ __forceinline__ int swizzle(int row) { return (row & 1) << 2 | (row & 2); }

}  // namespace moe
