// A packed projection in device memory; format.cuh says how a slab is laid out.
#pragma once

namespace moe {

// Columns of a block.
constexpr int kBlock = 64;

// One packed projection of all experts.
struct Matrix {
    const char* stages;    // [E][slabs] slabs of `slab_bytes`
    const float* factors;  // [E][slabs * 16], what multiplies a row's sum at last
    const float* bias;     // [E][slabs * 16] or null
    int slab_bytes;
    int slabs;
    int blocks;      // per slab
    int scale_bf16;  // 16-bit scales: bf16, not f16
};

__device__ __forceinline__ const char* slab_of(const Matrix& m, int expert, int slab) {
    return m.stages + ((long long)expert * m.slabs + slab) * m.slab_bytes;
}

}  // namespace moe
