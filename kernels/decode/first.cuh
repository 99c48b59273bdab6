// The first kernel: gate, up and activation, times the routing weight.
//
// The blocks take the (expert, slab of gate and up rows) units in turn; a block's warps share a unit's chunks and are ahead
// in the next units while one of them adds up.
#pragma once
#include "digits.cuh"
#include "jobs.cuh"
#include "parts.cuh"
#include "tokens.cuh"

namespace moe {

// Chunks of 4 KiB or so; of half of it (but for 16 bits) for a lone token, which cannot wait as long for its first one.
// Behind a unit's first chunk come its factors and biases.
template <Mode kMode>
constexpr int kFirstStages = (kMode == Mode::kOne && Q::kWords < 4 ? 2 : 4) / Q::kWords;
template <Mode kMode>
using FirstRing = Ring<C, Q, S, kFirstStages<kMode>, 128>;
template <Mode kMode>
using FirstRows = Rows<C, Q, S, Q::kLift, kMode == Mode::kOne && kGroupsApart<S>>;

// What the first kernel reads of the tokens: starts its way to L2. A line to a thread of the grid.
__device__ __forceinline__ void prefetch_input(const DecodeParams& p) {
    const int line = threadIdx.x * gridDim.x + blockIdx.x;
    const int rows = (p.tokens * p.hidden_size * 2 + 127) / 128, pairs = (p.tokens * p.topk * 4 + 127) / 128;
    const char* from = reinterpret_cast<const char*>(p.hidden);
    int at = line - rows;
    if (at >= 0) from = reinterpret_cast<const char*>(p.ids);
    if (at >= pairs) from = reinterpret_cast<const char*>(p.weights), at -= pairs;
    if (at < pairs) prefetch_l2(from + 128 * (line < rows ? line : at));
}

template <Mode kMode>
__device__ __forceinline__ void first(const DecodeParams& p) {
    constexpr bool kOne = kMode == Mode::kOne, kFar = kMode == Mode::kFar, kDigits = kOne && Q::kDigits;
    constexpr bool kApart = kOne && kGroupsApart<S>;
    using Ring = FirstRing<kMode>;
    __shared__ Jobs<kOne> jobs;
    __shared__ __align__(16) uint32_t zeros[kApart ? 32 : 1];
    const int warp = uniform(threadIdx.x >> 5), lane = threadIdx.x & 31, warps = blockDim.x >> 5;
    const int g = lane >> 2, t = lane & 3;
    const uint32_t memory = static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
    Ring ring(memory + warp * Ring::bytes(p.first_depth), p.first_depth, lane);
    const Group group(warp, p.first_split);
    const Parts<kOne> parts{memory + warps * Ring::bytes(p.first_depth)};
    const FirstRows<kMode> rows(parts.at + Parts<kOne>::bytes(warps, p.first_split), p.first.blocks, p.hidden_size, p.tokens,
                         p.hidden_size);
    const RowDigits digits((rows.end() + 15) & ~15u, p.first.blocks);
    if constexpr (!kFar) rows.init();
    if (kApart && threadIdx.x < 32) zeros[threadIdx.x] = 0;
    const bool batched = kFar && p.counts != nullptr;
    const int start = batched ? blockIdx.z * kColumns : 0;
    // A unit is a slab of a job. The grid's groups take the units in turn.
    const int slabs = p.first.slabs, chunks = Ring::chunks(p.first);
    const int step = gridDim.x * group.count;
    const int begin = p.spread ? blockIdx.x + group.number * gridDim.x : blockIdx.x * group.count + group.number;
    struct Unit {
        int job, slab;
        __device__ __forceinline__ void settle(int slabs) {
            while (slab >= slabs) slab -= slabs, job++;
        }
    };
    const Unit begins{begin / slabs, begin % slabs};
    // A group's warps take the chunks of its units in turn; where that would always give them the same ones, the work of
    // the first and the last chunk goes around. This is a warp's first chunk of the group's `n`th unit.
    auto first_chunk = [&](int n) {
        return (group.rank - n * ((chunks & (group.size - 1)) == 0 ? 1 : chunks)) & (group.size - 1);
    };
    Unit next = begins;
    int n = 0, chunk = first_chunk(0);
    bool fresh = true;  // whether this warp has not asked for a chunk of it yet
    // What the ring's places hold first, of which each lane knows one before the experts are known: all are sent for at once
    // then. Not a lone token's, whose first kernel's copies and the second's get into one another's way then.
    constexpr bool kAtOnce = !kOne && MOE_BULK;
    Unit early = begins;
    int early_chunk = 0, releases = kMaxItems;  // the job with which the second kernel is let go
    if constexpr (kAtOnce) {
#pragma unroll 1
        for (int d = 0; d < p.first_depth; d++) {
            while (chunk >= chunks) {
                const int on = next.slab + step;
                n++, chunk = first_chunk(n), fresh = true;
                next.job += on / slabs, next.slab = on % slabs;
            }
            if (fresh && n == p.release) releases = next.job;
            if (d == lane) early = next, early_chunk = chunk;
            fresh = false, chunk += group.size;
        }
    }
    if (!batched) prefetch_input(p);
    __syncthreads();
    wait_for_previous_grid();
    if (kFar) release_next_grid();

    if constexpr (!kFar) rows.fetch(p.hidden);
    if constexpr (kOne) {
        collect(p, 0, jobs);
    } else if (batched) {
        const int tokens = batched_tokens(p, blockIdx.y, start);
        if (tokens <= 0) return;
        collect_batched(blockIdx.y, tokens, jobs);
    } else {
        collect(p, jobs);
    }
    // `who` is 0 for a lane that sends.
    auto fetch = [&](int to, int expert, int slab, int chunk, int who) {
        const char* weights = slab_of(p.first, expert, slab);
        const float *factors = nullptr, *bias = nullptr;
        if (chunk == 0) {
            const long long at = ((long long)expert * slabs + slab) * 16;
            factors = p.first.factors + at;
            if (p.first.bias != nullptr) bias = p.first.bias + at;
        }
        ring.fetch(to, p.first, weights, chunk, factors, bias, who);
    };
    if constexpr (kAtOnce) {
        const int count = jobs.count;
        if (lane < p.first_depth && early.job < count) {
            fetch(lane, jobs.expert[early.job], early.slab, early_chunk, 0);
        }
        __syncwarp();
        if (!kFar && releases < count) release_next_grid();
    }
    const int units = max(uniform(jobs.count) * slabs - begin + step - 1, 0) / step;
    auto fetch_next = [&](int to) {
        while (chunk >= chunks && n < units) n++, next.slab += step, chunk = first_chunk(n), fresh = true;
        if (n < units) {
            if (fresh) {
                if (!kFar && n == p.release) release_next_grid();
                next.settle(slabs);
                fresh = false;
            }
            fetch(to, uniform(jobs.expert[next.job]), next.slab, chunk, lane);
            chunk += group.size;
        }
        ring.commit();
    };
    if constexpr (!kAtOnce) {
#pragma unroll 1
        for (int d = 0; d < p.first_depth; d++) fetch_next(d);
    }
    if constexpr (kDigits) {
        rows.wait(p.first_depth);
        digits.from_shared(rows.row(0));
        __syncthreads();
    } else if constexpr (!kFar) {
        rows.prepare(p.first_depth);
    }
    Unit unit = begins;
#pragma unroll 1
    for (int i = 0; i < units; i++, unit.slab += step) {
        unit.settle(slabs);
        float acc[4] = {0.f, 0.f, 0.f, 0.f};
        float factor[2], bias[2] = {0.f, 0.f};
        auto run = [&](auto& tokens) {
#pragma unroll 1
            for (int c = first_chunk(i); c < chunks; c += group.size) {
                ring.turn<kOne>(p.first, c, tokens, lane, acc);
                if (c == 0) {
                    const uint32_t at = ring.extra() + 4 * g;
                    factor[0] = read_float(at), factor[1] = read_float(at + 32);
                    if (p.first.bias != nullptr) bias[0] = read_float(at + 64), bias[1] = read_float(at + 96);
                }
                ring.leave(fetch_next);
            }
        };
        if constexpr (kFar) {
            // Columns that are not there are zeros.
            const long long row = batched ? (long long)blockIdx.y * p.max_tokens + start + g : g;
            const C::T* from = jobs.has(unit.job, g) ? p.hidden + row * p.hidden_size : nullptr;
            FarTokens<C, Q, S, kFirstStages<kMode>, Q::kLift> tokens{reinterpret_cast<const char*>(from), p.hidden_size};
            run(tokens);
        } else if constexpr (kDigits) {
            auto tokens = digits.tokens(0, lane);
            run(tokens);
            digits.combine(acc);
        } else if constexpr (kApart) {
            const uint32_t zero = static_cast<uint32_t>(__cvta_generic_to_shared(zeros));
            ApartTokens tokens(rows.row(0), rows.row(0), zero, lane);
            run(tokens);
            tokens.combine(acc);
        } else {
            // Columns that are not there repeat one that is; nobody reads their results.
            auto column = [&](int c) { return kOne ? 0 : jobs.has(unit.job, c) ? c : (int)jobs.lead[unit.job]; };
            NearTokens<S> tokens{rows.row(column(g)), {rows.sums(column(2 * t)), rows.sums(column(2 * t + 1))}};
            run(tokens);
        }
        // Who had the first chunk has the factors.
        const bool mine = first_chunk(i) == 0;
        if (p.first_split > 0) parts.add(group, i, mine, lane, acc);
        if (!mine) continue;

        // The functions are much code: one place for both columns and either kind.
        const bool gates = gated(p.activation);
#pragma unroll 1
        for (int j = 0; j < (kOne ? 1 : 2); j++, acc[0] = acc[1], acc[2] = acc[3]) {
            // Rows g (of gate) and g + 8 (of up) of column 2 t + j.
            const int c = 2 * t + j;
            if (kOne ? t > 0 : !jobs.has(unit.job, c)) continue;
            const int pair = kOne ? jobs.slot[unit.job][0] : c * p.topk + jobs.slot[unit.job][c];
            const float weight = batched ? 1.f : jobs.weight[pair];
            float a = acc[0] * factor[0], b = acc[2] * factor[1];
            if (p.weight_on_input) a *= weight, b *= weight;
            a += bias[0], b += bias[1];
            const float by = (p.weight_on_input ? 1.f : weight) * (Q::kLift ? 0x1p80f : 1.f);
            const long long row = batched ? (long long)blockIdx.y * p.max_tokens + start + c : pair;
            C::T* middle = p.middle + row * p.middle_stride + g + unit.slab * (gates ? 8 : 16);
            float gate = gates ? a : 0.f, up = gates ? b : a;
#pragma unroll 1
            for (int i = 0; i < (gates ? 1 : 2); i++, up = b) {
                // Else what depends on it in any of the functions is reckoned before the loop.
                asm volatile("" : "+f"(gate));
                middle[8 * i] = C::between(apply(p.activation, gate, up) * by);
            }
        }
    }
}

}  // namespace moe
