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

// For p.tokens tokens, in the order of their first pairs, of which a warp's lanes have one each: in little code, which
// comes slowly when it runs for the first time, and without barriers but the block's at the end.
__device__ __forceinline__ void collect_few(const DecodeParams& p, Jobs<false>& jobs) {
    if (threadIdx.x < 32) {
        const int i = threadIdx.x, n = p.tokens * p.topk;
        const unsigned before = (1u << i) - 1;
        int id = ~i, expert = -1;  // no two lanes without a pair are alike
        if (i < n) {
            id = p.ids[i], expert = local_expert(p, id);
            jobs.weight[i] = p.weights[i];
        }
        const int token = i / p.topk, slot = i - token * p.topk;
        unsigned same = __match_any_sync(~0u, id);
        // A token's pairs before this one that name its expert, too.
        const int nth = __popc(same & before & ~((1u << (i - slot)) - 1));
        if (__any_sync(~0u, nth > 0)) same &= __match_any_sync(~0u, nth);
        const bool leads = expert >= 0 && (same & before) == 0;
        const unsigned leaders = __ballot_sync(~0u, leads);
        const int at = __shfl_sync(~0u, __popc(leaders & before), __ffs(same) - 1);
        if (leads) {
            jobs.expert[at] = expert, jobs.lead[at] = token;
            *reinterpret_cast<uint2*>(jobs.slot[at]) = make_uint2(~0u, ~0u);
        }
        if (i == 0) jobs.count = __popc(leaders);
        __syncwarp();
        if (expert >= 0) jobs.slot[at][token] = slot;
    }
    __syncthreads();
}

// For p.tokens tokens, in the order of their first pairs. Of kMaxItems threads or more; ends with a barrier of the block.
__device__ __forceinline__ void collect(const DecodeParams& p, Jobs<false>& jobs) {
    if (p.tokens * p.topk <= 32) return collect_few(p, jobs);
    __shared__ int ids[kMaxItems];
    __shared__ __align__(16) unsigned keys[kMaxItems];
    __shared__ unsigned leaders[kMaxItems / 32];
    const int n = p.tokens * p.topk, i = threadIdx.x;
    int id = -1, expert = -1, token = 0, slot = 0;
    if (i < n) {
        id = p.ids[i], expert = local_expert(p, id), ids[i] = id;
        jobs.weight[i] = p.weights[i];
        token = i / p.topk, slot = i - token * p.topk;
    }
    __syncthreads();
    // Pairs of one job have the same expert, and their tokens name it as often in slots before.
    if (i < kMaxItems) {
        int nth = 0;
        for (int j = i - slot; j < i; j++) nth += ids[j] == id;
        keys[i] = expert >= 0 ? id * kMaxItems + nth : ~0u;
    }
    __syncthreads();
    unsigned same[kMaxItems / 32] = {0, 0, 0, 0};
    bool leads = false;
    if (i < kMaxItems) {
        const unsigned key = keys[i];
#pragma unroll
        for (int w = 0; w < kMaxItems / 32; w++) {
            if (32 * w >= n) break;
#pragma unroll
            for (int j = 0; j < 32; j += 4) {
                const uint4 k = *reinterpret_cast<const uint4*>(&keys[32 * w + j]);
                same[w] |= (k.x == key ? 1u : 0u) << j | (k.y == key ? 2u : 0u) << j | (k.z == key ? 4u : 0u) << j |
                           (k.w == key ? 8u : 0u) << j;
            }
        }
        const int first = same[0] ? __ffs(same[0]) - 1
                                  : same[1] ? __ffs(same[1]) + 31 : same[2] ? __ffs(same[2]) + 63 : __ffs(same[3]) + 95;
        leads = expert >= 0 && first == i;
        const unsigned mask = __ballot_sync(~0u, leads);
        if ((i & 31) == 0) leaders[i / 32] = mask;
    }
    __syncthreads();
    if (leads) {
        int at = __popc(leaders[i / 32] & ((1u << (i & 31)) - 1));
        for (int w = 0; w < i / 32; w++) at += __popc(leaders[w]);
        jobs.expert[at] = expert, jobs.lead[at] = token;
        *reinterpret_cast<uint2*>(jobs.slot[at]) = make_uint2(~0u, ~0u);
#pragma unroll
        for (int w = 0; w < kMaxItems / 32; w++) {
            for (unsigned m = same[w]; m != 0; m &= m - 1) {
                const int pair = 32 * w + __ffs(m) - 1, of = pair / p.topk;
                jobs.slot[at][of] = pair - of * p.topk;
            }
        }
    }
    if (i == 0) {
        int count = 0;
        for (int w = 0; w < kMaxItems / 32; w++) count += __popc(leaders[w]);
        jobs.count = count;
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
