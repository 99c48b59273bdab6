// From a warpgroup's sums to results: scales, routing weight, bias, activation, rounding, and out through shared memory.
#pragma once
#include "common/order.cuh"
#include "task.cuh"

namespace moe {

// What a column has of its own: what multiplies its sums, and its row of the result.
struct Fact {
    float factor;
    int row;
};

// A chunk's part of a tile.
struct Columns {
    int first, count;
};

// Barriers of the warps that multiply: all, and each warpgroup.
__device__ __forceinline__ void math_barrier() { group_barrier(1, kMathThreads); }
__device__ __forceinline__ void warpgroup_barrier(int warpgroup) { group_barrier(2 + warpgroup, kWarpgroup); }

// Stores 8x8 elements with rows and columns exchanged; lanes 0 to 7 (and 8 to 15 of a second matrix) give the rows.
__device__ __forceinline__ void store_turned(uint32_t at, uint32_t first, uint32_t second) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(first), "r"(second)
                 : "memory");
}

template <int kN>
struct Finish {
    using L = Layout<kN>;
    static constexpr int kRawTokens = L::kWidth / 2;
    const GemmParams& p;
    const L& memory;
    const int warpgroup, warp, lane;  // warp of the warpgroup

    // By all threads that multiply, for a column each; nobody reads the last task's any more.
    __device__ __forceinline__ void write_facts(const Task& task) const {
        for (int column = threadIdx.x - kWarpgroup; column < task.count; column += kMathThreads) {
            const int row = task.start + column, assignment = __ldcg(p.rows + row);
            float factor = p.scale;
            if (!kBlockScales && p.scales != nullptr) {
                const long long source = p.topk > 0 ? assignment / p.topk : row;
                factor *= __ldcg(p.scales + source * p.scale_stride);
            }
            if (p.routing != nullptr) factor *= __ldcg(p.routing + assignment);
            store_8(memory.fact(column), make_uint2(__float_as_uint(factor), p.kind == kSecond ? assignment : row));
        }
    }
    __device__ __forceinline__ Fact fact(int column) const {
        const uint2 v = read_shared<uint2>(memory.fact(column));
        return {__uint_as_float(v.x), static_cast<int>(v.y)};
    }
    __device__ __forceinline__ static uint32_t staged_at(uint32_t base, int token, int chunk) {
        return base + token * 128 + ((chunk ^ (token & 7)) << 4);
    }

    static __device__ __forceinline__ uint32_t pair(float a, float b) {
        __align__(4) const typename C::T two[2] = {C::between(a), C::between(b)};
        return *reinterpret_cast<const uint32_t*>(two);
    }

    // Of a thread's two rows.
    struct Rows {
        float low, high, low_bias, high_bias;
        bool inside;
    };
    __device__ __forceinline__ Rows rows_of(const Task& task) const {
        const int slab = task.row_tile * kSlabs + 4 * warpgroup + warp;
        const bool inside = slab < p.weights.slabs, biased = p.weights.bias != nullptr;
        const long long at = (static_cast<long long>(task.expert) * p.weights.slabs + (inside ? slab : 0)) * 16 + lane / 4;
        return {__ldg(p.weights.factors + at), __ldg(p.weights.factors + at + 8), biased ? __ldg(p.weights.bias + at) : 0.f,
                biased ? __ldg(p.weights.bias + at + 8) : 0.f, inside};
    }

    // A chunk's sums to results in shared memory: [token][16 of each warp], or eight where gates and ups are joined.
    template <bool kJoined>
    __device__ __forceinline__ void stage(const Sum (&acc)[L::kWidth / 2], const Task& task, const Columns& columns) const {
        const Rows rows = rows_of(task);
        const uint32_t base = memory.staged(warpgroup);
        const Activation silu{kSilu, 0.f, 0.f, p.activation.limit};
#pragma unroll
        for (int j = 0; j < L::kWidth / 8; j += 2) {
            if (8 * j >= columns.count) break;
            uint32_t out[2][2];  // rows g, rows g + 8; of eight tokens, of the next
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int column = 8 * (j + i) + 2 * (lane & 3);
                const float f0 = fact(columns.first + column).factor, f1 = fact(columns.first + column + 1).factor;
                const Sum* sums = acc + 4 * (j + i);
                const float g0 = fmaf(static_cast<float>(sums[0]) * rows.low, f0, rows.low_bias);
                const float g1 = fmaf(static_cast<float>(sums[1]) * rows.low, f1, rows.low_bias);
                const float u0 = fmaf(static_cast<float>(sums[2]) * rows.high, f0, rows.high_bias);
                const float u1 = fmaf(static_cast<float>(sums[3]) * rows.high, f1, rows.high_bias);
                out[0][i] = kJoined ? pair(apply(silu, g0, u0), apply(silu, g1, u1)) : pair(g0, g1);
                out[1][i] = kJoined ? 0 : pair(u0, u1);
                if (!rows.inside) out[0][i] = out[1][i] = 0;
            }
            const int token = 8 * j + (lane & 15);
            if (kJoined) {
                store_turned(staged_at(base, token, warp), out[0][0], out[0][1]);
            } else {
                store_turned(staged_at(base, token, 2 * warp), out[0][0], out[0][1]);
                store_turned(staged_at(base, token, 2 * warp + 1), out[1][0], out[1][1]);
            }
        }
    }

    // From there to rows, in the order of columns or in the products' (kernels/common/order.cuh).
    __device__ __forceinline__ void copy_out(const Task& task, const Columns& columns, bool joined) const {
        const uint32_t base = memory.staged(warpgroup);
        const int thread = 32 * warp + lane, tokens = columns.count;
        const int width = joined ? 32 : 64, first = (kMathGroups * task.row_tile + warpgroup) * width;
        if (p.kind == kFirst && p.ordered) {
            const int groups = width / 32;
            for (int i = thread; i < tokens * groups; i += kWarpgroup) {
                const int token = i / groups, group = i % groups, column = first + 32 * group;
                if (column >= p.out_columns) continue;
                uint4 v[4];
#pragma unroll
                for (int c = 0; c < 4; c++) v[c] = read_shared<uint4>(staged_at(base, token, 4 * group + c));
                uint4 out[4];
                reorder(v, out);
                uint4* to = row_at(fact(columns.first + token).row, column);
#pragma unroll
                for (int c = 0; c < 4; c++) to[c] = out[c];
            }
        } else {
            const int eights = width / 8;
            for (int i = thread; i < tokens * eights; i += kWarpgroup) {
                const int token = i / eights, eight = i % eights, column = first + 8 * eight;
                if (column >= p.out_columns) continue;
                *row_at(fact(columns.first + token).row, column) = read_shared<uint4>(staged_at(base, token, eight));
            }
        }
    }
    __device__ __forceinline__ uint4* row_at(int row, int column) const {
        typename C::T* out = static_cast<typename C::T*>(p.out) + static_cast<long long>(row) * p.out_columns + column;
        return reinterpret_cast<uint4*>(out);
    }

    // Half of a chunk's sums, before the activation, as floats: [token][16 of each warp], of which eight gates come before
    // their ups.
    __device__ __forceinline__ void stage_raw(const Sum (&acc)[L::kWidth / 2], const Task& task, const Columns& columns,
                                              int half) const {
        const Rows rows = rows_of(task);
        const uint32_t base = memory.staged(warpgroup) + 64 * warp + lane / 4 * 4;
#pragma unroll
        for (int j = 0; j < L::kWidth / 8; j++) {
            if (8 * j / kRawTokens != half) continue;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int token = 8 * j + 2 * (lane & 3) + i;
                const float f = fact(columns.first + token).factor;
                const uint32_t at = base + (token - half * kRawTokens) * 256;
                const float low = fmaf(static_cast<float>(acc[4 * j + i]) * rows.low, f, rows.low_bias);
                store_4(at, __float_as_uint(low));
                const float high = fmaf(static_cast<float>(acc[4 * j + 2 + i]) * rows.high, f, rows.high_bias);
                store_4(at + 32, __float_as_uint(high));
            }
        }
    }
    // From there through the activation to rows, four columns of a token at a time.
    __device__ __forceinline__ void copy_raw(const Task& task, const Columns& columns, int half, bool joined) const {
        const int skipped = half * kRawTokens, tokens = min(kRawTokens, columns.count - skipped);
        const int width = joined ? 32 : 64, first = (kMathGroups * task.row_tile + warpgroup) * width, fours = width / 4;
        const int filled = p.weights.slabs * (joined ? 8 : 16);
        for (int i = 32 * warp + lane; i < tokens * fours; i += kWarpgroup) {
            const int token = i / fours, four = i % fours * 4, column = first + four;
            if (column >= p.out_columns) continue;
            const int slot = joined ? four + four / 8 * 8 : four;
            float v[4] = {};
#pragma unroll 1
            for (int e = 0; e < 4; e++) {
                const uint32_t at = memory.staged(warpgroup) + token * 256 + 4 * (slot + e);
                const float g = read_float(at), u = joined ? read_float(at + 32) : g;
                v[0] = v[1], v[1] = v[2], v[2] = v[3];
                v[3] = column < filled ? apply(p.activation, g, u) : 0.f;
            }
            const int to = fact(columns.first + skipped + token).row;
            const uint32_t low = pair(v[0], v[1]), high = pair(v[2], v[3]);
            if (p.ordered) {
                // Pairs 4 t + r of the group's sixteen stand at 4 r + t.
                const int t = four % 32 / 8, r = four % 8 / 2;
                uint32_t* group = reinterpret_cast<uint32_t*>(row_at(to, column - four % 32));
                group[4 * r + t] = low, group[4 * r + 4 + t] = high;
            } else {
                *reinterpret_cast<uint2*>(row_at(to, column)) = make_uint2(low, high);
            }
        }
    }

    // What the last row tile leaves of the first kind's rows is zeros: the second projection reads whole stages.
    __device__ __forceinline__ void fill_up(const Task& task, bool joined) const {
        const int filled = p.row_tiles * kMathGroups * (joined ? 32 : 64), rest = (p.out_columns - filled) / 8;
        if (p.kind != kFirst || rest <= 0 || task.row_tile != p.row_tiles - 1) return;
        for (int i = threadIdx.x - kWarpgroup; i < task.count * rest; i += kMathThreads) {
            *row_at(fact(i / rest).row, filled + i % rest * 8) = make_uint4(0, 0, 0, 0);
        }
    }

    // All of the tile's columns, `width` to a chunk.
    __device__ __forceinline__ void write(const Sum (&acc)[L::kChunks][L::kWidth / 2], const Task& task, int width) const {
        const bool joined = p.kind == kFirst && gated(p.activation);
        math_barrier();
#pragma unroll
        for (int c = 0; c < L::kChunks; c++) {
            const Columns columns{c * width, min(width, task.count - c * width)};
            if (columns.count <= 0) break;
            // The last chunk's results have gone out.
            if (c > 0) warpgroup_barrier(warpgroup);
            if (p.kind == kSecond || p.activation.kind == kSilu) {
                if (p.kind == kSecond) {
                    stage<false>(acc[c], task, columns);
                } else {
                    stage<true>(acc[c], task, columns);
                }
                warpgroup_barrier(warpgroup);
                copy_out(task, columns, joined);
            } else {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    if (half > 0) warpgroup_barrier(warpgroup);
                    stage_raw(acc[c], task, columns, half);
                    warpgroup_barrier(warpgroup);
                    copy_raw(task, columns, half, joined);
                }
            }
        }
        fill_up(task, joined);
        // Before the next task's facts.
        math_barrier();
    }
};

}  // namespace moe
