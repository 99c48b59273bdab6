// Grouped GEMM for any number of tokens: weight rows are the tensor-core product's rows, tokens its columns.
//
// kernels/permute.cu sorts the assignments (token, slot) by expert, lists tiles of at most kN of them, and lays the tokens
// out in that order. A block takes a few slabs of an expert's matrix times one tile. Blocks of one matrix part stand next
// to each other, so that its weights are read from memory once and for the other tiles from L2. Experts are not padded to
// tiles. A column's sum runs over K in one order, whatever the tile: its bits do not depend on what shares the batch.
//
// Tokens lie in planes of a block's columns, [planes][rows][kRowBytes], so that a tile's part of a block is one run of
// memory; the 16-byte chunks of a row are exchanged (`swizzle`) so that a warp's reads touch every bank of shared memory
// once. Shared memory: barriers, then the rings.
#include "mma/narrow.cuh"
#include "mma/own_rows.cuh"
#include "mma/wide.cuh"

namespace moe {

template <int kN>
__device__ __forceinline__ void gemm(const GemmParams& p) {
    if constexpr (kN == 128 && Shape<64>::kOwnRows) {
        // No faster than tiles of 64, so that nobody asks for it (src/cuda/mma/shape.rs); its code takes long to compile.
    } else if constexpr (Shape<kN>::kOwnRows) {
        own_rows<kN>(p);
    } else if constexpr (Shape<kN>::kWide) {
        wide<kN>(p);
    } else {
        narrow<kN>(p);
    }
}

}  // namespace moe

// grid (row_tiles * tiles)
#define MOE_ENTRY(n)                                                                                        \
    extern "C" __global__ void __launch_bounds__(moe::Shape<n>::kThreads, moe::Shape<n>::kResident)         \
        moe_mma_##n(const __grid_constant__ moe::GemmParams p) {                                            \
        moe::gemm<n>(p);                                                                                    \
    }
MOE_ENTRY(16)
MOE_ENTRY(32)
MOE_ENTRY(64)
MOE_ENTRY(128)
