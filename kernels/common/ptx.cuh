// The instructions that have no C++ spelling, and what they do on architectures that lack them.
#pragma once
#include <cstdint>

// Copies by the engine; MOE_NO_BULK takes the older architectures' way, to try it on a newer GPU.
#if __CUDA_ARCH__ >= 900 && !defined(MOE_NO_BULK)
#define MOE_BULK 1
#else
#define MOE_BULK 0
#endif

namespace moe {

// What is the same in all lanes, said so that the compiler knows.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// Waits until the grid that this one depends on has finished and its writes are visible.
__device__ __forceinline__ void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next grid start, once every block of this one has got here.
__device__ __forceinline__ void release_next_grid() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Starts to bring the line at `p` from memory to L2.
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Copies 16 bytes from global to shared memory in the background, past L1.
__device__ __forceinline__ void copy_16(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// The same of 4 bytes, not past L1; before Hopper, where the rings count such copies, at once.
__device__ __forceinline__ void copy_4(uint32_t to, const void* from) {
#if MOE_BULK
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
#else
    asm volatile("{\n.reg .u32 v;\nld.global.u32 v, [%1];\nst.shared.u32 [%0], v;\n}" ::"r"(to), "l"(from) : "memory");
#endif
}

// Waits for all of this thread's copies of 4 bytes.
__device__ __forceinline__ void wait_for_small_copies() {
#if MOE_BULK
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// One arrival at `barrier` when this thread's copies so far are there; the barrier's count includes it.
__device__ __forceinline__ void arrive_after_copies(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Closes the running group of copies, which may be empty.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's latest groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The same, known at run time; at most 5 are told apart.
__device__ __forceinline__ void wait_for_copies(int pending) {
    switch (pending) {
        case 0: wait_for_copies<0>(); break;
        case 1: wait_for_copies<1>(); break;
        case 2: wait_for_copies<2>(); break;
        case 3: wait_for_copies<3>(); break;
        case 4: wait_for_copies<4>(); break;
        default: wait_for_copies<5>();
    }
}

#if __CUDA_ARCH__ >= 900
// copy_bulk of what is read once, and is the first to go from L2.
__device__ __forceinline__ void copy_bulk_once(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    // The policy here and not before the loop, where it would take two registers.
    asm volatile(
        "{\n.reg .b64 once;\nmov.b64 once, 0x12f0000000000000;\n"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], once;\n}" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
}

// Copies `bytes` (a multiple of 16) in the background and tells `barrier` when they are there.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// Makes initialised barriers known to the copy engine.
__device__ __forceinline__ void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// One arrival, and `bytes` to wait for.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// A barrier of a cluster's blocks, of every thread: barriers initialised before an arrival are known behind the wait.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait;" ::: "memory"); }

// Writes to another block's shared memory, to the place that is `at` here, and tells its barrier that 4 bytes are there.
__device__ __forceinline__ void store_4_remote(uint32_t at, uint32_t v, uint32_t barrier, int block) {
    asm volatile(
        "{\n.reg .u32 there, told;\nmapa.shared::cluster.u32 there, %0, %3;\nmapa.shared::cluster.u32 told, %2, %3;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [there], %1, [told];\n}" ::"r"(at),
        "r"(v), "r"(barrier), "r"(block)
        : "memory");
}
// The same of 16 bytes.
__device__ __forceinline__ void store_16_remote(uint32_t at, uint4 v, uint32_t barrier, int block) {
    asm volatile(
        "{\n.reg .u32 there, told;\nmapa.shared::cluster.u32 there, %0, %6;\nmapa.shared::cluster.u32 told, %5, %6;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [there], {%1, %2, %3, %4}, [told];\n}" ::"r"(at),
        "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier), "r"(block)
        : "memory");
}

// One arrival at another block's barrier, or the own one's. Orders nothing that was written.
__device__ __forceinline__ void barrier_arrive_remote(uint32_t barrier, int block) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
        "r"(block)
        : "memory");
}
#endif

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}

// How often a warp that is done with a place of a ring arrives: once, behind __syncwarp. compute-sanitizer's racecheck does not
// take that for an order between the other lanes' reads and what is copied there next; for it, compile with
// NVCC_APPEND_FLAGS=-DMOE_EVERY_LANE, and all lanes arrive.
#ifdef MOE_EVERY_LANE
constexpr int kWarpArrivals = 32;
#else
constexpr int kWarpArrivals = 1;
#endif
__device__ __forceinline__ void warp_arrive(uint32_t barrier, int lane) {
    __syncwarp();
    if (lane < kWarpArrivals) barrier_arrive(barrier);
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t phase) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
            barrier),
        "r"(phase)
        : "memory");
#else
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.test_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
            barrier),
        "r"(phase)
        : "memory");
#endif
}

// A barrier of some of the block's warps, all of which must know its number (not 0) and how many threads they are.
__device__ __forceinline__ void group_barrier(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Reads through L2: what an earlier grid wrote is seen even if this grid began before that one ended.
__device__ __forceinline__ uint4 load_16(const void* p) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
__device__ __forceinline__ uint2 load_8(const void* p) {
    uint2 v;
    asm volatile("ld.global.cg.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}

__device__ __forceinline__ void store_16(uint32_t at, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void store_8(uint32_t at, uint2 v) {
    asm volatile("st.shared.v2.u32 [%0], {%1,%2};" ::"r"(at), "r"(v.x), "r"(v.y) : "memory");
}
__device__ __forceinline__ void store_4(uint32_t at, uint32_t v) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory");
}

template <class T>
__device__ __forceinline__ T read_shared(uint32_t at) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "");
    T v;
    if constexpr (sizeof(T) == 4) {
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    } else if constexpr (sizeof(T) == 8) {
        asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at) : "memory");
    } else {
        asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(at)
                     : "memory");
    }
    return v;
}

__device__ __forceinline__ uint32_t read_shared_16(uint32_t at) {
    uint16_t v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at) : "memory");
    return v;
}

// Four matrices of 8 x 8 16-bit numbers, of whose 32 lines a lane says where one is; lane 4 g + t gets two numbers of each
// one's line g.
__device__ __forceinline__ void load_matrices(uint32_t at, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                 : "r"(at)
                 : "memory");
}

__device__ __forceinline__ float read_float(uint32_t at) { return __uint_as_float(read_shared<uint32_t>(at)); }

}  // namespace moe
