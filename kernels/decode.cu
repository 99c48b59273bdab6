// Decode: a handful of tokens, whose experts are read straight from the ids; no sorting, two launches a layer.
//
// Tokens are the eight columns of the tensor-core product, weight rows its sixteen rows. The first kernel gives a
// block to each (slab of gate and up rows, chosen expert); its warps share the slab's stages among them. The second
// gives a block to each slab of the output; its warps share all stages of all chosen experts, so that the sum over a
// token's experts happens in registers and needs no atomics. Both add the warps' parts in one order: same bits always.
#include "common/activation.cuh"
#include "common/specialisation.cuh"

namespace moe {

constexpr int kColumns = 8;

// What a launch is for.
enum class Mode {
    kOne,      // a single token
    kMany,     // tokens that may share experts
    kBatched,  // the batched format: an expert's tokens lie together, results stay per expert
};

// T * topk at most.
constexpr int kMaxItems = 128;
// Places of the warps' rings; src/cuda/decode.rs has the same.
constexpr int kFirstDepth = 2;
constexpr int kSecondDepth = 3;

struct DecodeParams {
    Matrix first;   // gate and up: rows 0-7 of a slab are gate's, 8-15 up's; all 16 up's where not gated
    Matrix second;  // down
    const C::T* hidden;  // [tokens, hidden_size]
    const int* ids;      // [tokens, topk], global, -1 for none
    const float* weights;
    const int* map;  // global to local expert, or null
    C::T* middle;    // [tokens * topk, middle_stride], a stride of all rows that the first kernel makes
    C::T* output;    // [tokens, hidden_size]
    // Batched: hidden and output are [experts, max_tokens, hidden_size], of which counts[expert] rows are tokens;
    // middle is [experts * max_tokens, middle_stride].
    const int* counts;
    int max_tokens;
    int tokens, topk, hidden_size, middle_stride, experts;
    int weight_on_input;
    Activation activation;
};
// src/cuda/decode.rs has the same.
static_assert(sizeof(DecodeParams) == 184, "");

// The local expert of a global id, -1 if it is not here.
__device__ __forceinline__ int local_expert(const DecodeParams& p, int id) {
    if (id < 0 || id >= p.experts) return -1;
    return p.map != nullptr ? p.map[id] : id;
}

// The slot in which token `token` has `id` for the (`nth` + 1)th time, or -1.
__device__ __forceinline__ int slot_of(const int* ids, int topk, int token, int id, int nth) {
    for (int j = 0; j < topk; j++) {
        if (ids[token * topk + j] == id && nth-- == 0) return j;
    }
    return -1;
}

// How often slots before `slot` of the same token have its id.
__device__ __forceinline__ int occurrence(const int* ids, int topk, int token, int slot) {
    int n = 0;
    for (int j = 0; j < slot; j++) n += ids[token * topk + j] == ids[token * topk + slot];
    return n;
}

// Adds up what the warps hold of 16 rows x 8 columns; thread i < 16 * columns gets row i % 16 of column i / 16.
template <bool kOne>
__device__ __forceinline__ float reduce(float* shared, const float (&acc)[4], int warp, int warps, int lane) {
    constexpr int kHeld = kOne ? 16 : 128;
    const int g = lane >> 2, t = lane & 3;
    float* mine = shared + warp * kHeld;
    if (kOne) {
        if (t == 0) mine[g] = acc[0], mine[g + 8] = acc[2];
    } else {
        mine[(2 * t) * 16 + g] = acc[0], mine[(2 * t + 1) * 16 + g] = acc[1];
        mine[(2 * t) * 16 + g + 8] = acc[2], mine[(2 * t + 1) * 16 + g + 8] = acc[3];
    }
    __syncthreads();
    float sum = 0.f;
    if (threadIdx.x < kHeld) {
        for (int w = 0; w < warps; w++) sum += shared[w * kHeld + threadIdx.x];
    }
    return sum;
}

extern __shared__ __align__(128) char shared_memory[];

using FirstRing = Ring<C, Q, S, kFirstDepth>;
using SecondRing = Ring<C, Q, S, kSecondDepth>;

// Brings a single token's rows to shared memory, behind 16 bytes for the barrier.
__device__ __forceinline__ void fetch_tokens(uint32_t at, const void* from, int bytes) {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
        barrier_init(at, 1);
        barrier_init_done();
        barrier_expect(at, bytes);
        copy_bulk(at + 16, from, bytes, at);
    }
#else
    for (int i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16) {
        const uint4 v = load_16(static_cast<const char*>(from) + i);
        asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(at + 16 + i), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
    }
#endif
}

__device__ __forceinline__ void wait_for_tokens(uint32_t at) {
    __syncthreads();
#if __CUDA_ARCH__ >= 900
    barrier_wait(at, 0);
#endif
}

// Tokens of a batched expert from the block's first on; as many as there are columns, or fewer, or none.
__device__ __forceinline__ int batched_tokens(const DecodeParams& p, int expert, int first) {
    return min(min(p.counts[expert], p.max_tokens) - first, kColumns);
}

// Gate, up and activation, times the routing weight.
template <Mode kMode>
__device__ __forceinline__ void first(const DecodeParams& p) {
    constexpr bool kOne = kMode == Mode::kOne, kBatched = kMode == Mode::kBatched;
    const int warp = uniform(threadIdx.x >> 5), lane = threadIdx.x & 31, warps = blockDim.x >> 5;
    const int g = lane >> 2, slab = blockIdx.x;
    // The column whose result this thread may write.
    const int c = kOne ? 0 : threadIdx.x / 16, r = threadIdx.x % 16;
    wait_for_previous_grid();
    release_next_grid();

    // Which expert; which row of `hidden` is column g, and which row of `middle` column c, or -1.
    int expert, hidden_row = 0, middle_row;
    float weight = 1.f;
    if constexpr (kBatched) {
        expert = blockIdx.y;
        const int start = blockIdx.z * kColumns, tokens = batched_tokens(p, expert, start);
        if (tokens <= 0) return;
        hidden_row = g < tokens ? expert * p.max_tokens + start + g : -1;
        middle_row = c < tokens ? expert * p.max_tokens + start + c : -1;
    } else {
        const int token = kOne ? 0 : blockIdx.y / p.topk, slot = blockIdx.y - token * p.topk;
        const int id = uniform(p.ids[blockIdx.y]);
        expert = uniform(local_expert(p, id));
        if (expert < 0) return;
        if constexpr (kOne) {
            middle_row = slot;
        } else {
            // Column g is token g, if it has this expert, too.
            const int nth = occurrence(p.ids, p.topk, token, slot);
            hidden_row = g < p.tokens && slot_of(p.ids, p.topk, g, id, nth) >= 0 ? g : -1;
            // The block of the first token that has it does the work for all.
            if (__ffs(__ballot_sync(~0u, hidden_row >= 0)) - 1 != 4 * token) return;
            const int my_slot = c < p.tokens ? slot_of(p.ids, p.topk, c, id, nth) : -1;
            middle_row = my_slot < 0 ? -1 : c * p.topk + my_slot;
        }
    }

    // The warps take the slab's chunks in turn, so that together they read one run of memory.
    const int chunks = FirstRing::chunks(p.first), length = p.hidden_size;
    const char* weights = slab_of(p.first, expert, slab);
    const uint32_t memory = static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
    const uint32_t tokens_at = memory + warps * FirstRing::kBytes;
    if (kOne) fetch_tokens(tokens_at, p.hidden, length * 2);
    const FirstRing ring(memory, warp, lane);
    auto fetch = [&](int place, int chunk) {
        if (chunk < chunks) ring.fetch(place, p.first, weights, chunk, lane);
        ring.commit();
    };
    for (int d = 0; d < kFirstDepth - 1; d++) fetch(d, warp + d * warps);

    // What the last lines need, on its way early.
    const bool live = threadIdx.x < (kOne ? 16 : 128) && middle_row >= 0;
    const long long at = ((long long)expert * p.first.slabs + slab) * 16 + r;
    float factor = 1.f, bias = 0.f;
    if (live) {
        if (!kBatched) weight = p.weights[middle_row];
        factor = p.first.factors[at];
        if (p.first.bias != nullptr) bias = p.first.bias[at];
    }

    float acc[4] = {0.f, 0.f, 0.f, 0.f};
    int place = 0, free_place = kFirstDepth - 1, round = 0;
    auto run = [&](auto row) {
        for (int chunk = warp; chunk < chunks; chunk += warps) {
            auto refill = [&] { fetch(free_place, chunk + (kFirstDepth - 1) * warps); };
            ring.turn<kOne>(place, round, p.first, chunk, row, length, lane, refill, acc);
            free_place = place;
            if (++place == kFirstDepth) place = 0, round++;
        }
    };
    if constexpr (kOne) {
        wait_for_tokens(tokens_at);
        run(tokens_at + 16);
    } else {
        run(hidden_row >= 0 ? reinterpret_cast<const char*>(p.hidden + (long long)hidden_row * length) : nullptr);
    }
    __syncthreads();

    float sum = reduce<kOne>(reinterpret_cast<float*>(shared_memory), acc, warp, warps, lane) * factor;
    if (p.weight_on_input) sum *= weight, weight = 1.f;
    sum += bias;
    // Up's eight rows go over to the lanes that hold gate's.
    const float up = __shfl_down_sync(~0u, sum, 8);
    C::T* middle = p.middle + (long long)middle_row * p.middle_stride;
    if (gated(p.activation)) {
        if (live && r < 8) middle[slab * 8 + r] = C::between(apply(p.activation, sum, up) * weight);
    } else if (live) {
        middle[slab * 16 + r] = C::between(apply(p.activation, 0.f, sum) * weight);
    }
}

// The experts of a batch, each with the slot it has in every token.
template <bool kOne>
struct Items {
    static constexpr int kMax = kOne ? 32 : kMaxItems;
    int count;
    int expert[kMax];
    signed char slot[kMax][kOne ? 1 : kColumns];
    float factor[kMax][16];    // of this block's rows
};

template <bool kOne>
__device__ __forceinline__ void collect(const DecodeParams& p, int first_token, int tokens, Items<kOne>& items) {
    if constexpr (kOne) {
        if (threadIdx.x < 32) {
            const int lane = threadIdx.x;
            const int expert = lane < p.topk ? local_expert(p, p.ids[first_token * p.topk + lane]) : -1;
            const unsigned here = __ballot_sync(~0u, expert >= 0);
            const int at = __popc(here & ((1u << lane) - 1));
            if (expert >= 0) items.expert[at] = expert, items.slot[at][0] = lane;
            if (lane == 0) items.count = __popc(here);
        }
        __syncthreads();
    } else {
        __shared__ unsigned kept[kMaxItems / 32];
        __shared__ int ids[kMaxItems];
        const int n = tokens * p.topk, i = threadIdx.x, rounds = (n + blockDim.x - 1) / blockDim.x;
        for (int j = i; j < n; j += blockDim.x) ids[j] = p.ids[first_token * p.topk + j];
        __syncthreads();
        for (int round = 0; round < rounds; round++) {
            const int j = round * blockDim.x + i;
            bool keep = j < n && local_expert(p, ids[j]) >= 0;
            if (keep) {
                const int token = j / p.topk, nth = occurrence(ids, p.topk, token, j % p.topk);
                for (int other = 0; other < token && keep; other++) keep = slot_of(ids, p.topk, other, ids[j], nth) < 0;
            }
            const unsigned mask = __ballot_sync(~0u, keep);
            if (j < kMaxItems && (i & 31) == 0) kept[j / 32] = mask;
        }
        __syncthreads();
        for (int j = i; j < n; j += blockDim.x) {
            if (!(kept[j / 32] >> (j % 32) & 1)) continue;
            int at = __popc(kept[j / 32] & ((1u << (j % 32)) - 1));
            for (int w = 0; w < j / 32; w++) at += __popc(kept[w]);
            items.expert[at] = local_expert(p, ids[j]);
            const int nth = occurrence(ids, p.topk, j / p.topk, j % p.topk);
            for (int c = 0; c < kColumns; c++) {
                items.slot[at][c] = c < tokens ? slot_of(ids, p.topk, c, ids[j], nth) : -1;
            }
        }
        if (i == 0) {
            items.count = 0;
            for (int w = 0; w < (n + 31) / 32; w++) items.count += __popc(kept[w]);
        }
        __syncthreads();
    }
}

// Down, summed over a token's experts.
template <Mode kMode>
__device__ __forceinline__ void second(const DecodeParams& p) {
    constexpr bool kOne = kMode == Mode::kOne, kBatched = kMode == Mode::kBatched;
    __shared__ Items<kOne || kBatched> items;
    const int warp = uniform(threadIdx.x >> 5), lane = threadIdx.x & 31, warps = blockDim.x >> 5;
    const int g = lane >> 2, slab = blockIdx.x;
    const int start = blockIdx.z * kColumns, tokens = kOne ? 1 : kBatched ? batched_tokens(p, blockIdx.y, start) : p.tokens;
    if (kBatched && tokens <= 0) {
        // Not without the grid ahead: whoever waits for this one counts on that.
        wait_for_previous_grid();
        return;
    }
    // Of the output's rows.
    const int first_token = kOne ? blockIdx.y : kBatched ? blockIdx.y * p.max_tokens + start : 0;
    const uint32_t memory = static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
    const uint32_t tokens_at = memory + warps * SecondRing::kBytes;
    const SecondRing ring(memory, warp, lane);
    // The ids were complete before the grid ahead of this one began, so that weights can be on their way already.
    if constexpr (kBatched) {
        if (threadIdx.x == 0) items.count = 1, items.expert[0] = blockIdx.y;
        __syncthreads();
    } else {
        collect<kOne>(p, first_token, tokens, items);
    }

    // The warps take the chunks of all items in turn.
    const int chunks = SecondRing::chunks(p.second), length = p.middle_stride, count = uniform(items.count);
    struct Place {
        int item, chunk;
    };
    auto settle = [&](Place& at) {
        while (at.chunk >= chunks) at.chunk -= chunks, at.item++;
    };
    Place next{0, warp};
    settle(next);
    auto fetch_next = [&](int place) {
        if (next.item < count) {
            const char* weights = slab_of(p.second, uniform(items.expert[next.item]), slab);
            ring.fetch(place, p.second, weights, next.chunk, lane);
            next.chunk += warps;
            settle(next);
        }
        ring.commit();
    };
    Place at = next;
    for (int d = 0; d < kSecondDepth - 1; d++) fetch_next(d);
    for (int i = threadIdx.x; i < count * 16; i += blockDim.x) {
        items.factor[i / 16][i % 16] = p.second.factors[((long long)items.expert[i / 16] * p.second.slabs + slab) * 16 + i % 16];
    }
    __syncthreads();
    wait_for_previous_grid();
    release_next_grid();

    float out[4] = {0.f, 0.f, 0.f, 0.f}, acc[4] = {0.f, 0.f, 0.f, 0.f};
    int place = 0, free_place = kSecondDepth - 1, round = 0;
    const C::T* tokens_from = p.middle + (long long)first_token * (kBatched ? 1 : p.topk) * length;
    if constexpr (kOne) {
        fetch_tokens(tokens_at, tokens_from, p.topk * length * 2);
        wait_for_tokens(tokens_at);
    }
    while (at.item < count) {
        // The row of the lane's token, from the block's first on.
        int row = g < tokens ? g : -1;
        if (!kBatched) {
            const int slot = items.slot[at.item][kOne ? 0 : g];
            row = kOne ? slot : slot < 0 ? -1 : g * p.topk + slot;
        }
        const float factor[2] = {items.factor[at.item][g], items.factor[at.item][g + 8]};
        auto run = [&](auto row) {
            for (; at.chunk < chunks; at.chunk += warps) {
                auto refill = [&] { fetch_next(free_place); };
                ring.turn<kOne>(place, round, p.second, at.chunk, row, length, lane, refill, acc);
                free_place = place;
                if (++place == kSecondDepth) place = 0, round++;
            }
        };
        if constexpr (kOne) {
            run(tokens_at + 16 + row * length * 2);
        } else {
            run(row >= 0 ? reinterpret_cast<const char*>(tokens_from + (long long)row * length) : nullptr);
        }
        settle(at);
        out[0] = fmaf(acc[0], factor[0], out[0]), out[1] = fmaf(acc[1], factor[0], out[1]);
        out[2] = fmaf(acc[2], factor[1], out[2]), out[3] = fmaf(acc[3], factor[1], out[3]);
        acc[0] = acc[1] = acc[2] = acc[3] = 0.f;
    }
    __syncthreads();

    float sum = reduce<kOne>(reinterpret_cast<float*>(shared_memory), out, warp, warps, lane);
    const int c = threadIdx.x / 16, r = slab * 16 + threadIdx.x % 16;
    if (threadIdx.x < 128 && c < tokens && r < p.hidden_size) {
        if (kBatched) {
            if (p.second.bias != nullptr) sum += p.second.bias[(long long)blockIdx.y * p.second.slabs * 16 + r];
        } else if (p.second.bias != nullptr) {
            for (int j = 0; j < p.topk; j++) {
                const int slot = (first_token + c) * p.topk + j, expert = local_expert(p, p.ids[slot]);
                if (expert < 0) continue;
                const float weight = p.weight_on_input ? 1.f : p.weights[slot];
                sum = fmaf(weight, p.second.bias[(long long)expert * p.second.slabs * 16 + r], sum);
            }
        }
        p.output[(long long)(first_token + c) * p.hidden_size + r] = C::from_float(sum);
    }
}

}  // namespace moe

// Shared memory of all: the warps' rings (common/stream.cuh), which then serve to add up.

// Blocks per multiprocessor that the registers must allow: as many as they do without spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr bool kFourBits = false;
#else
constexpr bool kFourBits = moe::Q::kWords == 1;
#endif
constexpr bool kManyRegisters = moe::S::kZero || (moe::Q::kOffset != 0.f && moe::S::kGroups > 1) || kFourBits;
constexpr int kBlocksOne = kManyRegisters ? 2 : 4, kBlocksMany = kManyRegisters ? 2 : 3;

// grid (first.slabs, topk)
extern "C" __global__ void __launch_bounds__(256, kBlocksOne) moe_decode_first_one(const __grid_constant__ moe::DecodeParams p) {
    moe::first<moe::Mode::kOne>(p);
}
// grid (first.slabs, tokens * topk)
extern "C" __global__ void __launch_bounds__(256, kBlocksMany) moe_decode_first_many(const __grid_constant__ moe::DecodeParams p) {
    moe::first<moe::Mode::kMany>(p);
}
// grid (first.slabs, local experts, max_tokens / 8 rounded up)
extern "C" __global__ void __launch_bounds__(256, kBlocksMany)
    moe_decode_first_batched(const __grid_constant__ moe::DecodeParams p) {
    moe::first<moe::Mode::kBatched>(p);
}
// grid (second.slabs, tokens): a block has one token, whose bits then do not depend on the others
extern "C" __global__ void __launch_bounds__(512, 1) moe_decode_second_one(const __grid_constant__ moe::DecodeParams p) {
    moe::second<moe::Mode::kOne>(p);
}
// grid (second.slabs)
extern "C" __global__ void __launch_bounds__(512, 1)
    moe_decode_second_many(const __grid_constant__ moe::DecodeParams p) {
    moe::second<moe::Mode::kMany>(p);
}
// grid (second.slabs, local experts, max_tokens / 8 rounded up)
extern "C" __global__ void __launch_bounds__(512, 1)
    moe_decode_second_batched(const __grid_constant__ moe::DecodeParams p) {
    moe::second<moe::Mode::kBatched>(p);
}
