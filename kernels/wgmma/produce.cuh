// The warps that fill the ring: with a block's own weights, and its share of the cluster's tokens, which go to every block.
#pragma once
#include "schedule.cuh"

namespace moe {

// Copies `bytes` to the same place of every block of the cluster and tells the same barrier of each.
__device__ __forceinline__ void copy_to_all(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    constexpr uint16_t kAll = (1 << kCluster) - 1;
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(
            to),
        "l"(from), "r"(bytes), "r"(barrier), "h"(kAll)
        : "memory");
}

// How long what is copied is to stay in L2: what nobody reads again is the first to go.
__device__ __forceinline__ uint64_t policy_of(bool once) {
    uint64_t first, normal;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first));
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(normal));
    return once ? first : normal;
}
__device__ __forceinline__ void copy_bulk_kept(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier,
                                               uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}

template <int kN>
struct Produce {
    using L = Layout<kN>;
    const GemmParams& p;
    const L& memory;
    const int lane, stages;

    // Of a task.
    const char* slab;      // the lane's
    const char* tokens;    // the block's share
    const float* scales;
    int slabs, eights, before, share;  // tokens in eights: all, ahead of the share, in it
    uint64_t policy;

    __device__ __forceinline__ void begin(const Task& task) {
        const int rank = blockIdx.x % kCluster;
        slabs = max(0, min(kSlabs, p.weights.slabs - task.row_tile * kSlabs));
        slab = slab_of(p.weights, task.expert, task.row_tile * kSlabs + lane);
        eights = (task.count + 7) / 8;
        before = eights * rank / kCluster;
        share = eights * (rank + 1) / kCluster - before;
        tokens = p.x + static_cast<long long>(task.start + 8 * before) * kRowBytes;
        scales = p.scales + task.start;
        policy = policy_of(task.once);
    }
    // Of a place's stages, from `stage` on: the matrix may end with the first.
    __device__ __forceinline__ int span(int stage) const { return min(L::kSpan, stages - stage); }
    __device__ __forceinline__ void send_weights(int stage, int at) const {
        const uint32_t full = memory.full(at);
        const uint32_t bytes = min(L::kSpan * kSlabStage, p.weights.slab_bytes - stage * kSlabStage);
        if (lane == 0) barrier_expect(full, slabs * bytes);
        __syncwarp();
        if (lane < slabs) {
            const char* from = slab + static_cast<long long>(stage) * kSlabStage;
            copy_bulk_kept(memory.weights(at, lane, 0), from, bytes, full, policy);
        }
    }
    __device__ __forceinline__ void send_tokens(int stage, int at) const {
        const uint32_t full = memory.full(at);
        // Of all of the cluster's tokens; and where the other blocks send them all, no place is filled without this arrival,
        // so that none can be free for the second time before this warp has waited for the first.
        if (lane == 0) barrier_expect(full, eights * (8 * kRowBytes + (kBlockScales ? 32 : 0)) * span(stage));
        __syncwarp();
        if (lane >= span(stage)) return;
        if (share > 0) {
            const long long plane = static_cast<long long>(p.count) * kRowBytes;
            copy_to_all(memory.tokens(at, lane) + before * 8 * kRowBytes, tokens + (stage + lane) * plane,
                        share * 8 * kRowBytes, full);
        }
        if (kBlockScales) {
            const float* from = scales + static_cast<long long>(stage + lane) * p.scale_step;
            copy_bulk(memory.scales(at, lane), from, eights * 32, full);
        }
    }
};

// Two warps fill the ring, since sending for a copy takes a warp some time: one weights, which are of no other grid, so that
// they go ahead of the wait; one tokens.
template <int kN, bool kWeights>
__device__ __forceinline__ void produce(const GemmParams& p, const Layout<kN>& memory, int lane) {
    Produce<kN> producer{p, memory, lane, stages_of(p)};
    Place place;
    if (!kWeights) wait_for_previous_grid();
    for (int n = 0;; n++) {
        const Task task = take(memory, n, lane);
        if (task.expert < 0) break;
        producer.begin(task);
        for (int stage = 0; stage < producer.stages; stage += Layout<kN>::kSpan, place.next(p.depth)) {
            barrier_wait(memory.free(place.at), place.round ^ 1);
            if (kWeights) {
                producer.send_weights(stage, place.at);
            } else {
                producer.send_tokens(stage, place.at);
                __syncwarp();
            }
        }
    }
}

}  // namespace moe
