// Which experts a launch has to read, and for which tokens: what a sort by expert would tell.
#pragma once
#include "params.cuh"

namespace moe {

// A job is an expert with the slot that it has in every token. A token that names an expert twice makes two jobs.
template <bool kOne>
struct Jobs {
    static constexpr int kMax = kOne ? 32 : kMaxItems;
    int count;
    int expert[kMax];
    __align__(8) signed char slot[kMax][kOne ? 1 : kColumns];
    signed char lead[kMax];  // the first token that has it
    float weight[kMax];      // of a (token, slot) pair

    __device__ __forceinline__ bool has(int job, int column) const { return slot[job][kOne ? 0 : column] >= 0; }
};

// For a lone token: the jobs are its slots in order. Ends with a barrier of the block.
__device__ __forceinline__ void collect(const DecodeParams& p, int token, Jobs<true>& jobs) {
    if (threadIdx.x < 32) {
        const int lane = threadIdx.x, pair = token * p.topk + lane;
        int expert = -1;
        if (lane < p.topk) {
            jobs.weight[lane] = p.weights[pair];
            expert = local_expert(p, p.ids[pair]);
        }
        const unsigned here = __ballot_sync(~0u, expert >= 0);
        const int at = __popc(here & ((1u << lane) - 1));
        if (expert >= 0) jobs.expert[at] = expert, jobs.slot[at][0] = lane;
        if (lane == 0) jobs.count = __popc(here);
    }
    __syncthreads();
}

// For p.tokens tokens, in the order of their first pairs. A warp looks at 32 pairs at a time, a lane at one: little code, as
// it comes slowly when it runs for the first time, and no barriers but the block's at the end. The other warps bring the
// weights.
__device__ __forceinline__ void collect(const DecodeParams& p, Jobs<false>& jobs) {
    __shared__ __align__(16) unsigned keys[kMaxItems + 4];  // of the jobs so far, and a few that no pair has
    const int n = p.tokens * p.topk;
    if (threadIdx.x >= 32) {
        for (int i = threadIdx.x - 32; i < n; i += blockDim.x - 32) jobs.weight[i] = p.weights[i];
    } else {
        const int lane = threadIdx.x;
        const unsigned before = (1u << lane) - 1;
        int count = 0, next = lane < n ? p.ids[lane] : 0;
#pragma unroll 1
        for (int start = 0; start < n; start += 32) {
            const int i = start + lane, token = i / p.topk, slot = i - token * p.topk;
            int id = ~i, expert = -1;  // no two lanes without a pair are alike
            if (i < n) id = next, expert = local_expert(p, id);
            if (i + 32 < n) next = p.ids[i + 32];
            unsigned same = __match_any_sync(~0u, id);
            // A token's pairs before this one that name its expert, too.
            int nth = __popc(same & before & ~(slot <= lane ? (1u << (lane - slot)) - 1 : 0u));
            for (int j = i - slot; j < start; j++) nth += p.ids[j] == id;
            if (__any_sync(~0u, nth > 0)) same &= __match_any_sync(~0u, nth);
            const unsigned key = id * kMaxItems + nth;
            int at = -1;
            for (int j = 0; start > 0 && j < count; j += 4) {
                const uint4 k = *reinterpret_cast<const uint4*>(&keys[j]);
                if (k.x == key) at = j;
                if (k.y == key) at = j + 1;
                if (k.z == key) at = j + 2;
                if (k.w == key) at = j + 3;
            }
            const bool leads = expert >= 0 && at < 0 && (same & before) == 0;
            const unsigned leaders = __ballot_sync(~0u, leads);
            const int fresh = __shfl_sync(~0u, count + __popc(leaders & before), __ffs(same) - 1);
            if (at < 0) at = fresh;
            if (leads) {
                jobs.expert[at] = expert, jobs.lead[at] = token, keys[at] = key;
                *reinterpret_cast<uint2*>(jobs.slot[at]) = make_uint2(~0u, ~0u);
            }
            count += __popc(leaders);
            if (lane < 4) keys[count + lane] = ~0u;
            __syncwarp();
            if (expert >= 0) jobs.slot[at][token] = slot;
        }
        if (lane == 0) jobs.count = count;
    }
    __syncthreads();
}

// Tokens of a batched expert from the block's first on; as many as there are columns, or fewer, or none.
__device__ __forceinline__ int batched_tokens(const DecodeParams& p, int expert, int first) {
    return min(min(p.counts[expert], p.max_tokens) - first, kColumns);
}

// The batched format: one job, `tokens` rows of one expert.
__device__ __forceinline__ void collect_batched(int expert, int tokens, Jobs<false>& jobs) {
    if (threadIdx.x < kColumns) jobs.slot[0][threadIdx.x] = threadIdx.x < tokens ? 0 : -1;
    if (threadIdx.x == 0) jobs.count = 1, jobs.expert[0] = expert, jobs.lead[0] = 0;
    __syncthreads();
}

}  // namespace moe
