// What a cluster's first task is, from the ids that the plan is being made of: weights go ahead of the plan.
#pragma once
#include "common/local.cuh"
#include "task.cuh"

namespace moe {

// By a warp; of a task only what concerns weights. `counts` is room for a word to each local expert.
template <int kN>
__device__ __forceinline__ Task first_task(const GemmParams& p, uint32_t counts, int lane) {
    for (int i = lane; i < p.local_experts; i += 32) store_4(counts + 4 * i, 0);
    __syncwarp();
#pragma unroll 4
    for (int i = lane; i < p.assignments; i += 32) {
        const int expert = local_expert(__ldg(p.ids + i), p.map, p.experts, p.local_experts);
        if (expert >= 0) asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(counts + 4 * expert) : "memory");
    }
    __syncwarp();
    // A lane's experts follow one another.
    const int each = (p.local_experts + 31) / 32, begin = lane * each, end = min(begin + each, p.local_experts);
    const auto tiles_of = [&](int expert) { return static_cast<int>(read_shared<uint32_t>(counts + 4 * expert) + kN - 1) / kN; };
    int mine = 0;
    for (int i = begin; i < end; i++) mine += tiles_of(i);
    int first = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int before = __shfl_up_sync(~0u, first, step);
        if (lane >= step) first += before;
    }
    first -= mine;
    const int place = blockIdx.x / kCluster, at = place / p.row_tiles;
    const unsigned here = __ballot_sync(~0u, first <= at && at < first + mine);
    if (here == 0) return {-1, 0, 0, 0, false};
    Task task = {};
    for (int i = begin; i < end; i++) {
        const int of = tiles_of(i);
        if (first <= at && at < first + of) {
            const int row_tile = part_of(p, place, first, of).row_tile * kCluster + blockIdx.x % kCluster;
            task = {i, 0, 0, row_tile, of == 1};
        }
        first += of;
    }
    const int lead = __ffs(here) - 1;
    const auto from = [&](int x) { return __shfl_sync(~0u, x, lead); };
    return {from(task.expert), 0, 0, from(task.row_tile), from(task.once) != 0};
}

}  // namespace moe
