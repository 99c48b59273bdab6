// The warpgroup that fills the ring: weights by bulk copies, tokens gathered 16 bytes at a time and exchanged as the
// tensor cores read them: chunk c of row r lies in place c ^ r % 8.
#pragma once
#include "task.cuh"

namespace moe {

template <int kN>
__device__ __forceinline__ void produce(const GemmParams& p, const Layout<kN>& memory) {
    // A thread copies the same chunk of every sixteenth row.
    constexpr int kEach = kN / 16, kScalesEach = (kN + kWarpgroup - 1) / kWarpgroup;
    const int thread = threadIdx.x, lane = thread & 31, first = thread / 8, chunk = thread % 8;
    const uint32_t to = first * kRowBytes + ((chunk ^ (first & 7)) << 4);
    const int stages = stages_of(p);
    Place place;
    for (int n = 0;; n++) {
        const Task task = task_of(p, n);
        if (task.expert < 0) break;
        const auto source = [&](int row) {
            const int at = task.start + row;
            return p.topk > 0 ? __ldcg(p.rows + at) / p.topk : at;
        };
        uint32_t from[kEach];
#pragma unroll
        for (int i = 0; i < kEach; i++) {
            const int row = first + 16 * i;
            from[i] = row < task.count ? static_cast<uint32_t>(source(row)) * p.pitch + chunk : 0;
        }
        int scales[kScalesEach];
        if constexpr (kBlockScales) {
#pragma unroll
            for (int i = 0; i < kScalesEach; i++) {
                const int row = thread + kWarpgroup * i;
                scales[i] = row < task.count ? source(row) * p.scale_stride : 0;
            }
        }
        const int slabs = min(kSlabs, p.weights.slabs - task.row_tile * kSlabs);
        const char* slab = slab_of(p.weights, task.expert, task.row_tile * kSlabs + lane);
        for (int stage = 0; stage < stages; stage++, place.next(memory.depth)) {
            barrier_wait(memory.free(place.at), place.round ^ 1);
            if (thread < 32) {
                const int blocks = min(kBlocks, p.weights.blocks - kBlocks * stage);
                const uint32_t bytes = blocks * kCodeBytes + kScaleBytes;
                if (lane == 0) barrier_expect(memory.full(place.at), slabs * bytes);
                __syncwarp();
                if (lane < slabs) {
                    const char* codes = slab + static_cast<long long>(stage) * kSlabStage;
                    copy_bulk(memory.weights(place.at) + lane * kSlabStage, codes, bytes, memory.full(place.at));
                }
            }
            const uint32_t at = memory.tokens(place.at) + to;
#pragma unroll
            for (int i = 0; i < kEach; i++) {
                if (first + 16 * i < task.count) {
                    copy_16(at + i * 16 * kRowBytes, p.x + (static_cast<uint64_t>(from[i] + 8 * stage) << 4));
                }
            }
            if constexpr (kBlockScales) {
#pragma unroll
                for (int i = 0; i < kScalesEach; i++) {
                    const int row = thread + kWarpgroup * i;
                    const float* scale = p.scales + scales[i] + stage * p.scale_step;
                    if (row < task.count) copy_4(memory.scales(place.at) + 4 * row, scale);
                }
            }
            arrive_after_copies(memory.full(place.at));
        }
    }
}

}  // namespace moe
