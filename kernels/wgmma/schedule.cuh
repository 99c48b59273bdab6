// Two warps that find out ahead of time what the others would have to wait for: the block's tasks, and what is needed to make
// results of their sums.
#pragma once
#include "common/quantize.cuh"
#include "task.cuh"

namespace moe {

// What a column's sums are multiplied by and its row of the result, or what a row's are and what is added.
struct Fact {
    float factor;
    uint32_t other;
};
__device__ __forceinline__ void write_fact(uint32_t at, float factor, uint32_t other) {
    store_8(at, make_uint2(__float_as_uint(factor), other));
}
__device__ __forceinline__ Fact read_fact(uint32_t at) {
    const uint2 v = read_shared<uint2>(at);
    return {__uint_as_float(v.x), v.y};
}

// What divides results.
__device__ __forceinline__ void write_divisor(uint32_t at, const Scale& scale) {
    const Divisor by = coding_divisor(scale);
    store_16(at, make_uint4(__float_as_uint(by.power), __float_as_uint(by.scale), __float_as_uint(by.inverse), 0));
}
__device__ __forceinline__ Divisor read_divisor(uint32_t at) {
    const uint4 v = read_shared<uint4>(at);
    return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z)};
}

// The nth of a queue of kOf: its place, and which time round.
template <int kOf>
__device__ __forceinline__ int place_of(int n) {
    return n % kOf;
}
template <int kOf>
__device__ __forceinline__ uint32_t round_of(int n) {
    return n / kOf & 1;
}

// The block's nth task, by all lanes of a warp.
template <int kN>
__device__ __forceinline__ Task take(const Layout<kN>& memory, int n, int lane) {
    const int at = place_of<kTasks>(n);
    barrier_wait(memory.task_full(at), round_of<kTasks>(n));
    const uint4 v = read_shared<uint4>(memory.task(at));
    // All lanes' reads have been sent for when the arrival is, which is what the next task waits for on its way here: it is
    // written by the engine between blocks, also to the block that sends it.
    __syncwarp();
    if (lane == 0) barrier_arrive_remote(memory.task_free(at), 0);
    const auto number = [](uint32_t x) { return uniform(static_cast<int>(x)); };
    return {number(v.x), number(v.y), number(v.z & 0xffff), number(v.w), number(v.z) >> 16 != 0};
}

// A cluster's tasks in turn: which they are, a warp finds out 32 at a time.
class InTurn {
    Task mine;
    int begin = -1;

public:
    __device__ __forceinline__ Task nth(const GemmParams& p, int n, int lane) {
        if (begin < 0 || n == begin + 32) {
            begin = n;
            mine = task_of(p, blockIdx.x / kCluster + (n + lane) * (gridDim.x / kCluster));
        }
        const auto from = [&](int x) { return __shfl_sync(~0u, x, n - begin); };
        return {from(mine.expert), from(mine.start), from(mine.count), from(mine.row_tile), from(mine.once) != 0};
    }
};

// Where tasks are asked for, clusters that had small ones get more. The next one when the last has been begun, for what is
// asked for early is not shared out evenly.
template <int kN>
__device__ __forceinline__ Task ask(const GemmParams& p, const Layout<kN>& memory, int n, int lane) {
    const int cluster = blockIdx.x / kCluster, clusters = gridDim.x / kCluster;
    if (n == 0) return task_of(p, cluster);
    barrier_wait(memory.task_free(place_of<kTasks>(n - 1)), round_of<kTasks>(n - 1));
    return task_of(p, clusters + uniform(lane == 0 ? static_cast<int>(atomicAdd(p.taken, 1u)) : 0));
}

// By a warp of the cluster's first block: its tasks, to all blocks. The list of tiles is of a grid that ended before the one
// ahead was let past its own wait.
template <int kN>
__device__ __forceinline__ void share_out(const GemmParams& p, const Layout<kN>& memory, int lane) {
    InTurn in_turn;
    for (int n = 0;; n++) {
        const Task task = p.taken != nullptr ? ask(p, memory, n, lane) : in_turn.nth(p, n, lane);
        const int at = place_of<kTasks>(n);
        barrier_wait(memory.task_free(at), round_of<kTasks>(n) ^ 1);
        if (lane == 0) barrier_expect(memory.task_full(at), kTaskBytes);
        __syncwarp();
        if (lane < kCluster) {
            const uint32_t count = task.count | task.once << 16;
            const uint4 v = make_uint4(task.expert, task.start, count, task.row_tile + lane);
            store_16_remote(memory.task(at), v, memory.task_full(at), lane);
        }
        if (task.expert < 0) break;
    }
}

// By a warp of any other block: says for every task that one is waited for.
template <int kN>
__device__ __forceinline__ void expect_tasks(const Layout<kN>& memory, int lane) {
    for (int n = 0;; n++) {
        if (lane == 0) barrier_expect(memory.task_full(place_of<kTasks>(n)), kTaskBytes);
        __syncwarp();
        if (take(memory, n, lane).expert < 0) break;
    }
}

// Of up to kEach times 32 columns, by a warp's lanes.
template <int kEach>
struct ColumnFacts {
    int assignment[kEach];
    float factor[kEach];

    __device__ __forceinline__ void load(const GemmParams& p, const Task& task, int first, int lane) {
        const bool scaled = !kBlockScales && p.scales != nullptr, assigned = p.kind == kSecond || p.routing != nullptr;
#pragma unroll
        for (int i = 0; i < kEach; i++) {
            const int column = first + 32 * i + lane, row = task.start + column;
            const bool exists = column < task.count;
            assignment[i] = exists && assigned ? __ldcg(p.rows + row) : 0;
            factor[i] = exists && scaled ? __ldcg(p.scales + row) : 1.f;
        }
    }
    __device__ __forceinline__ void write(const GemmParams& p, const Task& task, int first, uint32_t to, int lane) {
        // Not where they are loaded, one after the other then: each would be waited for there.
#pragma unroll
        for (int i = 0; i < kEach; i++) factor[i] *= p.scale;
        if (p.routing != nullptr) {
#pragma unroll
            for (int i = 0; i < kEach; i++) {
                if (first + 32 * i + lane < task.count) factor[i] *= __ldcg(p.routing + assignment[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < kEach; i++) {
            const int column = first + 32 * i + lane;
            if (column >= task.count) break;
            write_fact(to + 8 * column, factor[i], p.kind == kSecond ? assignment[i] : task.start + column);
        }
    }
};

// Of a block's rows.
struct RowFacts {
    static constexpr int kEach = kRows / 32;
    float factor[kEach], bias[kEach];

    __device__ __forceinline__ void load(const Matrix& weights, const Task& task, int lane) {
        const int first = task.row_tile * kRows + lane, rows = 16 * weights.slabs;
        const long long at = static_cast<long long>(task.expert) * rows + first;
        const float *factors = weights.factors + at, *biases = weights.bias + at;
#pragma unroll
        for (int i = 0; i < kEach; i++) {
            const bool exists = first + 32 * i < rows;
            factor[i] = exists ? __ldg(factors + 32 * i) : 0.f;
            bias[i] = exists && weights.bias != nullptr ? __ldg(biases + 32 * i) : 0.f;
        }
    }
    __device__ __forceinline__ void write(uint32_t to, int lane) const {
#pragma unroll
        for (int i = 0; i < kEach; i++) write_fact(to + 8 * (32 * i + lane), factor[i], __float_as_uint(bias[i]));
    }
};

// By a warp: of every task, whose loads are under way together.
template <int kN>
__device__ __forceinline__ void find_facts(const GemmParams& p, const Layout<kN>& memory, int lane) {
    // Where sums take most registers, few are left here.
    constexpr int kAtOnce = kN < 128 ? kN : kN == 128 || !kPromoted ? 128 : kBlockScales ? 32 : 64;
    wait_for_previous_grid();
    release_next_grid();
    for (int n = 0;; n++) {
        const Task task = take(memory, n, lane);
        if (task.expert < 0) break;
        const int at = place_of<kFacts>(n);
        const uint32_t to = memory.facts(at);
        RowFacts rows;
        ColumnFacts<kAtOnce / 32> columns;
        const bool codes = kStoredScales && p.stored != nullptr;
        const float scale = codes ? __ldcg(p.stored + task.expert * p.stored_step) : 0.f;
        rows.load(p.weights, task, lane);
        columns.load(p, task, 0, lane);
        barrier_wait(memory.facts_free(at), round_of<kFacts>(n) ^ 1);
        rows.write(to + 8 * kN, lane);
        if (codes && lane == 0) write_divisor(to + 8 * (kN + kRows), stored_scale(scale));
        columns.write(p, task, 0, to, lane);
#pragma unroll 1
        for (int first = kAtOnce; first < task.count; first += kAtOnce) {
            columns.load(p, task, first, lane);
            columns.write(p, task, first, to, lane);
        }
        // Every lane: whoever checks for races follows no arrival of one lane for what others wrote.
        barrier_arrive(memory.facts_full(at));
    }
}

}  // namespace moe
