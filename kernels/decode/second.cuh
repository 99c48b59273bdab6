// The second kernel: down, summed over a token's experts.
//
// A block to each slab of the output; its warps share all chunks of all chosen experts, so that the sum over a token's
// experts happens in registers and needs no atomics. Where that leaves multiprocessors idle, or the rows no room, clusters
// of two take several slabs, a block half of the columns.
#pragma once
#include "digits.cuh"
#include "jobs.cuh"
#include "parts.cuh"
#include "tokens.cuh"

namespace moe {

// Chunks of 2 KiB or so (4 for 16 bits), as rows are short.
constexpr int kSecondStages = Q::kWords == 1 ? 2 : 1;
using SecondRing = Ring<C, Q, S, kSecondStages, 0>;
template <Mode kMode>
using SecondRows = Rows<C, Q, S, false, kMode == Mode::kOne && kGroupsApart<S>>;

// kShared: the blocks of a cluster share several slabs' columns, all warps of a block being one group.
template <Mode kMode, bool kShared>
__device__ __forceinline__ void second(const DecodeParams& p) {
    constexpr bool kOne = kMode == Mode::kOne, kFar = kMode == Mode::kFar, kDigits = kOne && Q::kDigits;
    constexpr bool kApart = kOne && kGroupsApart<S>;
    static_assert(!kShared || (!kFar && !kDigits), "");
    __shared__ Jobs<kOne> jobs;
    __shared__ __align__(16) uint32_t zeros[kApart ? 32 : 1];
    if (kApart && threadIdx.x < 32) zeros[threadIdx.x] = 0;
    const int warp = uniform(threadIdx.x >> 5), lane = threadIdx.x & 31, warps = blockDim.x >> 5;
    const int g = lane >> 2, t = lane & 3;
    const bool batched = kFar && p.counts != nullptr;
    const int start = batched ? blockIdx.z * kColumns : 0;
    const int tokens = kOne ? 1 : batched ? batched_tokens(p, blockIdx.y, start) : p.tokens;
    if (batched && tokens <= 0) {
        // Not without the grid ahead: whoever waits for this one counts on that.
        wait_for_previous_grid();
        return;
    }
    // Of the output's rows.
    const long long first_token = kOne ? blockIdx.y : batched ? (long long)blockIdx.y * p.max_tokens + start : 0;
    const uint32_t memory = static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
    const int ring_bytes = SecondRing::bytes(p.second_depth);
    SecondRing ring(memory + warp * ring_bytes, p.second_depth, lane);
    const Group group = kShared ? Group{0, warp, warps, 1} : Group(warp, p.second_split);
    const int slots = batched ? 1 : p.topk, length = p.middle_stride;
    const int each = kShared ? p.second_each : 1;
    // The block's share of the columns, in chunks.
    const int part = kShared ? blockIdx.x & ((1 << p.second_parts) - 1) : 0, all = SecondRing::chunks(p.second);
    const int begin = kShared ? all * part >> p.second_parts : 0;
    const int chunks = kShared ? (all * (part + 1) >> p.second_parts) - begin : all;
    constexpr int kChunkBlocks = 2 * kSecondStages;
    const int skipped = begin * kChunkBlocks * kBlock;
    // Behind the rings: the factors of every job, of the group's rows; where there are several slabs, where the jobs'
    // weights are, the warps' sums, the results of the cluster's other blocks; the tokens' rows.
    const int pairs = tokens * slots, sum_bytes = tokens * (4 * kColumnStride);
    const uint32_t factors = memory + warps * ring_bytes + group.number * pairs * 64;
    const uint32_t table = factors + each * pairs * 64, sums = factors + each * pairs * 80;
    const uint32_t results = sums + warps * each * sum_bytes;
    const SecondRows<kMode> rows(kShared ? results + 4 * blockDim.x * ((1 << p.second_parts) - 1)
                                  : memory + warps * ring_bytes + group.count * pairs * 64,
                          kShared ? min(chunks * kChunkBlocks, p.second.blocks - begin * kChunkBlocks) : p.second.blocks,
                          kShared ? min(chunks * kChunkBlocks * kBlock, length - skipped) : length, pairs, length);
    const RowDigits digits(rows.barrier, p.second.blocks);
    const int slab = ((kShared ? blockIdx.x >> p.second_parts : blockIdx.x) * group.count + group.number) * each;
    const int slabs = kShared ? max(min(each, p.second.slabs - slab), 0) : 1;
#if MOE_BULK
    const uint32_t arrived = rows.barrier;  // whether the other blocks' results are there
    if constexpr (kShared) {
        if (threadIdx.x == 0) {
            barrier_init(arrived, 1);
            barrier_init_done();
            if (part == 0) barrier_expect(arrived, slabs * 16 * tokens * 4 * ((1 << p.second_parts) - 1));
        }
        __syncwarp();
        cluster_arrive();
    }
#endif
    const auto walk = rows.template walk<kOne ? 2 : 4>();
    // The ids were complete before the grid ahead of this one began, so that weights can be on their way already.
    if constexpr (kOne) {
        collect(p, blockIdx.y, jobs);
    } else if (batched) {
        collect_batched(blockIdx.y, tokens, jobs);
    } else {
        collect(p, jobs);
    }

    // A group's warps take the chunks of all jobs in turn, slab after slab.
    const int count = slab < p.second.slabs ? uniform(jobs.count) : 0;
    struct Place {
        int job, chunk;  // jobs of one slab after those of another
        __device__ __forceinline__ void settle(int chunks) {
            while (chunk >= chunks) chunk -= chunks, job++;
        }
    };
    Place next{0, group.rank};
    next.settle(chunks);
    Place at = next;
    const int thread = group.rank * 32 + lane;  // of the group's
    if constexpr (kShared) {
        for (int i = thread; i < slabs * count; i += 32 * group.size) {
            const char* from = slab_of(p.second, jobs.expert[i % count], slab + i / count);
            store_8(table + 8 * i, make_uint2((uint32_t)(uintptr_t)from, (uint32_t)((uintptr_t)from >> 32)));
        }
        __syncthreads();
    }
    auto fetch_next = [&](int to) {
        if (next.job < slabs * count) {
            if constexpr (kShared) {
                const uint2 v = read_shared<uint2>(table + 8 * next.job);
                const char* weights = reinterpret_cast<const char*>((uint64_t)v.y << 32 | v.x);
                ring.fetch(to, p.second, weights, begin + next.chunk, nullptr, nullptr, lane);
            } else {
                const char* weights = slab_of(p.second, uniform(jobs.expert[next.job]), slab);
                ring.fetch(to, p.second, weights, next.chunk, nullptr, nullptr, lane);
            }
            next.chunk += group.size;
            next.settle(chunks);
        }
        ring.commit();
    };
#pragma unroll 1
    for (int d = 0; d < p.second_depth; d++) fetch_next(d);
#pragma unroll 1
    for (int i = thread; i < slabs * count * 16; i += 32 * group.size) {
        const int of = kShared ? i / 16 / count : 0, job = i / 16 - of * count;
        const float* from = p.second.factors + ((long long)jobs.expert[job] * p.second.slabs + slab + of) * 16 + i % 16;
        copy_4(factors + 4 * i, from);
    }
    // The result that this thread may write, and its bias.
    const int of = kShared ? thread / 16 / tokens : 0;
    const int c = thread / 16 - of * tokens, r = (slab + of) * 16 + thread % 16;
    const bool adds = kShared ? of < slabs : thread < 16 * kColumns && c < tokens;
    float bias = 0.f;
    if (adds && part == 0 && p.second.bias != nullptr) {
        if (batched) {
            bias = p.second.bias[(long long)blockIdx.y * p.second.slabs * 16 + r];
        } else {
#pragma unroll 4
            for (int j = 0; j < p.topk; j++) {
                const long long pair = (first_token + c) * p.topk + j;
                const int expert = local_expert(p, p.ids[pair]);
                if (expert < 0) continue;
                const float weight = p.weight_on_input ? 1.f : p.weights[pair];
                bias = fmaf(weight, p.second.bias[(long long)expert * p.second.slabs * 16 + r], bias);
            }
        }
    }
    wait_for_previous_grid();
    release_next_grid();

    const C::T* middle = p.middle + first_token * slots * length;
    if constexpr (kDigits) {
        digits.from_global<2>(middle, length, pairs);
    } else if constexpr (!kFar) {
        rows.template load<kOne ? 2 : 4>(middle + skipped, walk);
    }
    // The factors, too.
    wait_for_small_copies();
    __syncthreads();

#pragma unroll 1
    for (int s = 0; s < slabs; s++) {
        float out[4] = {0.f, 0.f, 0.f, 0.f}, acc[4] = {0.f, 0.f, 0.f, 0.f};
        while (at.job < (s + 1) * count) {
            const int job = at.job - s * count;
            auto run = [&](auto& tokens) {
#pragma unroll 1
                for (; at.chunk < chunks; at.chunk += group.size) {
                    ring.turn<kOne>(p.second, begin + at.chunk, tokens, lane, acc);
                    ring.leave(fetch_next);
                }
            };
            const int ahead = 2 * skipped;  // as if the columns before the block's were there
            auto row = [&](int c) { return kOne ? (int)jobs.slot[job][0] : c * slots + jobs.slot[job][c]; };
            if constexpr (kFar) {
                const C::T* from = jobs.has(job, g) ? middle + (long long)row(g) * length : nullptr;
                FarTokens<C, Q, S, kSecondStages, false> tokens{reinterpret_cast<const char*>(from), length};
                run(tokens);
            } else if constexpr (kDigits) {
                auto tokens = digits.tokens(row(0), lane);
                run(tokens);
            } else if constexpr (kApart) {
                const uint32_t zero = static_cast<uint32_t>(__cvta_generic_to_shared(zeros));
                ApartTokens tokens(rows.row(row(0)) - ahead, rows.row(0), zero, lane);
                run(tokens);
            } else {
                const int sums_ahead = begin * kSecondStages * SecondRows<kMode>::kGroups * 4;
                auto column = [&](int c) { return kOne || jobs.has(job, c) ? row(c) : row(jobs.lead[job]); };
                auto sums_of = [&](int c) { return rows.sums(column(c)) - sums_ahead; };
                NearTokens<S> tokens{rows.row(column(g)) - ahead, {sums_of(2 * t), sums_of(2 * t + 1)}};
                run(tokens);
            }
            const uint32_t f = factors + 4 * (at.job * 16 + g);
            at.settle(chunks);
            const float factor[2] = {read_float(f), read_float(f + 32)};
            if (kOne || jobs.has(job, 2 * t)) {
                out[0] = fmaf(acc[0], factor[0], out[0]), out[2] = fmaf(acc[2], factor[1], out[2]);
            }
            if (kDigits || (!kOne && jobs.has(job, 2 * t + 1))) {
                out[1] = fmaf(acc[1], factor[0], out[1]), out[3] = fmaf(acc[3], factor[1], out[3]);
            }
            acc[0] = acc[1] = acc[2] = acc[3] = 0.f;
        }
        if constexpr (kDigits) digits.combine(out);
        if constexpr (kApart) ApartTokens::combine(out);
        __syncwarp();
        // Where there is but one slab, the rings serve to add up, too.
        write_columns<kOne>(kShared ? sums + (s * group.size + group.rank) * sum_bytes : ring.base, lane,
                            kShared ? tokens : kColumns, out);
    }

    group.barrier();
    float sum = bias;
    if (adds) {
        const int step = kShared ? sum_bytes : ring_bytes;
        const uint32_t first = kShared ? sums + of * group.size * step : memory + group.number * group.size * step;
        const uint32_t from = first + 4 * (c * kColumnStride + thread % 16);
#pragma unroll 4
        for (int w = 0; w < group.size; w++) sum += read_float(from + w * step);
    }
#if MOE_BULK
    if constexpr (kShared) {
        // The cluster's first block adds the others' sums up, in their order.
        const int others = (1 << p.second_parts) - 1, step = 4 * blockDim.x;
        const uint32_t own = results + 4 * threadIdx.x;
        cluster_wait();  // all have begun
        if (part > 0) {
            if (adds) store_4_remote(own + (part - 1) * step, __float_as_uint(sum), arrived, 0);
            return;
        }
        barrier_wait(arrived, 0);
        for (int i = 0; adds && i < others; i++) sum += read_float(own + i * step);
    }
#endif
    if (adds && r < p.hidden_size) p.output[(first_token + c) * p.hidden_size + r] = C::from_float(sum);
}

}  // namespace moe
