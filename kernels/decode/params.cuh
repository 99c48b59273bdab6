// What the decode kernels are given.
#pragma once
#include "../common/activation.cuh"
#include "../common/specialisation.cuh"

namespace moe {

extern __shared__ __align__(128) char shared_memory[];

constexpr int kColumns = 8;

// What a launch is for.
enum class Mode {
    kOne,   // a single token, in shared memory
    kNear,  // tokens that may share experts, in shared memory
    kFar,   // the same, in global memory; and the batched format
};

// T * topk at most.
constexpr int kMaxItems = 128;
// How many experts there may be: a key of theirs and of kMaxItems fits 32 bits.
constexpr int kMaxExperts = 1 << 24;

struct DecodeParams {
    Matrix first;   // gate and up: rows 0-7 of a slab are gate's, 8-15 up's; all 16 up's where not gated
    Matrix second;  // down
    const C::T* hidden;  // [tokens, hidden_size]
    const int* ids;      // [tokens, topk], global, -1 for none
    const float* weights;
    const int* map;  // global to local expert, or null
    C::T* middle;    // [tokens * topk, middle_stride], a stride of all rows that the first kernel makes; times 2^80 if
                     // the format lifts (kLift)
    C::T* output;    // [tokens, hidden_size]
    // The batched format, else null: hidden and output are [experts, max_tokens, hidden_size], of which counts[expert]
    // rows are tokens; middle is [experts * max_tokens, middle_stride].
    const int* counts;
    int max_tokens;
    int tokens, topk, hidden_size, middle_stride, experts;
    int weight_on_input;
    Activation activation;
    // Places of the warps' rings, and how many warps (as powers of two) share a unit of work.
    int first_depth, second_depth, first_split, second_split;
    // Whether the groups of the first kernel's blocks take units a grid apart, else neighbours; and sending for
    // which of its units a group lets the second kernel start.
    int spread, release;
    // Slabs that a cluster of the second kernel takes, and its blocks, as a power of two, which share their columns.
    int second_each, second_parts;
};
// src/cuda/decode.rs has the same.
static_assert(sizeof(DecodeParams) == 216, "");

// The local expert of a global id, -1 if it is not here.
__device__ __forceinline__ int local_expert(const DecodeParams& p, int id) {
    if (id < 0 || id >= p.experts) return -1;
    return p.map != nullptr ? p.map[id] : id;
}

}  // namespace moe
