// The warp that fills the ring: a block's own weights, and its share of the cluster's tokens, which go to every block.
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

// As copy_bulk, of what nobody reads again: the first to go from L2.
__device__ __forceinline__ void copy_bulk_once(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}

template <int kN>
struct Produce {
    // Small tiles are for experts that have few tokens, mostly one tile of them. With scales between the stages nothing was
    // gained.
    static constexpr bool kOnce = kN <= 64 && !kBlockScales;
    const GemmParams& p;
    const Layout<kN>& memory;
    const int lane;

    // Of a task.
    const char* slab;      // the lane's
    const char* tokens;    // the block's share
    const float* scales;
    int slabs, eights, before, share;  // tokens in eights: all, ahead of the share, in it

    __device__ __forceinline__ void begin(const Task& task) {
        const int rank = blockIdx.x % kCluster;
        slabs = max(0, min(kSlabs, p.weights.slabs - task.row_tile * kSlabs));
        slab = slab_of(p.weights, task.expert, task.row_tile * kSlabs + lane);
        eights = (task.count + 7) / 8;
        before = eights * rank / kCluster;
        share = eights * (rank + 1) / kCluster - before;
        tokens = p.x + static_cast<long long>(task.start + 8 * before) * kRowBytes;
        scales = p.scales + task.start;
    }
    __device__ __forceinline__ void send_weights(int stage, int at) const {
        const uint32_t full = memory.full(at), blocks = min(kBlocks, p.weights.blocks - kBlocks * stage);
        const uint32_t bytes = blocks * kCodeBytes + kScaleBytes;
        if (lane == 0) barrier_expect(full, slabs * bytes + eights * (8 * kRowBytes + (kBlockScales ? 32 : 0)));
        __syncwarp();
        if (lane < slabs) {
            const uint32_t to = memory.weights(at) + lane * kSlabStage;
            const char* from = slab + static_cast<long long>(stage) * kSlabStage;
            if (kOnce) {
                copy_bulk_once(to, from, bytes, full);
            } else {
                copy_bulk(to, from, bytes, full);
            }
        }
    }
    __device__ __forceinline__ void send_tokens(int stage, int at) const {
        const uint32_t full = memory.full(at);
        if (lane == 0 && share > 0) {
            const long long plane = static_cast<long long>(p.count) * kRowBytes;
            copy_to_all(memory.tokens(at) + before * 8 * kRowBytes, tokens + stage * plane, share * 8 * kRowBytes, full);
        }
        if (kBlockScales && lane == 1) {
            copy_bulk(memory.scales(at), scales + static_cast<long long>(stage) * p.scale_step, eights * 32, full);
        }
    }
};

template <int kN>
__device__ __forceinline__ void produce(const GemmParams& p, const Layout<kN>& memory, int lane) {
    Produce<kN> producer{p, memory, lane};
    const int stages = stages_of(p);
    Place place;
    // Weights are of no other grid: the first task's go ahead of the wait, as far as the ring takes them.
    int ahead = 0;
    for (int n = 0;; n++) {
        const Task task = take(memory, n, lane);
        if (task.expert < 0) break;
        producer.begin(task);
        if (n == 0) {
            ahead = min(stages, p.depth);
            for (int stage = 0; stage < ahead; stage++) producer.send_weights(stage, stage);
            wait_for_previous_grid();
        }
        for (int stage = 0; stage < stages; stage++, place.next(p.depth)) {
            if (ahead > 0) {
                // Nor a wait for the place: with all tokens from the other block, it may be free for the second time by now.
                ahead--;
            } else {
                barrier_wait(memory.free(place.at), place.round ^ 1);
                producer.send_weights(stage, place.at);
            }
            producer.send_tokens(stage, place.at);
        }
    }
}

}  // namespace moe
