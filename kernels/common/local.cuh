// Which expert of this rank an id names.
#pragma once

namespace moe {

// -1 for none: -1 itself, ids that no expert has, and experts of other ranks. `map` is null where every expert is local.
__device__ __forceinline__ int local_expert(int id, const int* map, int experts, int local_experts) {
    if (id < 0 || id >= experts) return -1;
    const int local = map != nullptr ? map[id] : id;
    return local < local_experts ? local : -1;
}

}  // namespace moe
