// How fast this GPU reads its memory: for `bench`, whose limit it is. Reads everything once and checks that by a sum.

#include <cstdint>

namespace {

constexpr int THREADS = 256;
constexpr int LOADS = 8;  // of 16 bytes that a thread asks for in a row

// Past L1, and with whole 256-byte sectors into L2: what streaming kernels ask for.
__device__ __forceinline__ uint4 load(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

}  // namespace

// Exclusive or of `tiles` tiles of THREADS * LOADS * 16 bytes, into *sum.
extern "C" __global__ void __launch_bounds__(THREADS) bandwidth_read(const uint4* data, unsigned* sum, int tiles) {
    unsigned folded = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const uint4* p = data + static_cast<size_t>(tile) * (THREADS * LOADS) + threadIdx.x;
        uint4 v[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; i++) v[i] = load(p + i * THREADS);
#pragma unroll
        for (int i = 0; i < LOADS; i++) folded ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
    }
    folded = __reduce_xor_sync(0xffffffffu, folded);
    if (threadIdx.x % 32 == 0) atomicXor(sum, folded);
}
