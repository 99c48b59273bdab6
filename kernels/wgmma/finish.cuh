// From a warpgroup's sums to results: scales, routing weight, bias, activation, rounding, and out through shared memory, a
// piece of the tile's tokens at a time.
#pragma once
#include "codes.cuh"
#include "schedule.cuh"

namespace moe {

__device__ __forceinline__ void warpgroup_barrier(int warpgroup) { group_barrier(1 + warpgroup, kWarpgroup); }

// Stores four 8x8 matrices with rows and columns exchanged; lane 8 i + r gives row r of matrix i.
__device__ __forceinline__ void store_turned(uint32_t at, const uint32_t (&v)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v[0]), "r"(v[1]),
                 "r"(v[2]), "r"(v[3])
                 : "memory");
}

template <int kN>
struct Finish {
    using L = Layout<kN>;
    static constexpr int kPieces = kN / kPiece;
    static_assert(L::kWidth % kPiece == 0, "");
    const GemmParams& p;
    const L& memory;
    const int warpgroup, warp, lane;  // warp of the warpgroup

    // A thread's sums of the columns from 8 * `eight` on.
    static __device__ __forceinline__ const Sum* sums_of(const Sums<kN>& acc, int eight) {
        return &acc[8 * eight / L::kWidth][8 * eight % L::kWidth / 2];
    }
    // Of a thread's two rows.
    struct Rows {
        float low, high, low_bias, high_bias;
        bool inside;
    };

    __device__ __forceinline__ Rows rows_of(const Task& task, uint32_t facts) const {
        const uint32_t at = facts + 8 * (kN + 16 * (4 * warpgroup + warp) + lane / 4);
        const Fact low = read_fact(at), high = read_fact(at + 64);
        const bool inside = task.row_tile * kSlabs + 4 * warpgroup + warp < p.weights.slabs;
        return {low.factor, high.factor, __uint_as_float(low.other), __uint_as_float(high.other), inside};
    }
    static __device__ __forceinline__ uint32_t staged_at(uint32_t base, int token, int chunk) {
        return base + token * 128 + ((chunk ^ (token & 7)) << 4);
    }
    static __device__ __forceinline__ uint32_t pair(float a, float b) {
        __align__(4) const typename C::T two[2] = {C::between(a), C::between(b)};
        return *reinterpret_cast<const uint32_t*>(two);
    }

    // Two neighbouring tokens' sums of a row times what belongs to them, and its bias.
    struct Two {
        float first, second;
    };
    // Of two neighbouring columns, whose facts begin at `column`.
    static __device__ __forceinline__ Two factors(uint32_t column) {
        const uint4 v = read_shared<uint4>(column);
        return {__uint_as_float(v.x), __uint_as_float(v.z)};
    }
    static __device__ __forceinline__ Two scaled(const Sum* sums, float row, float bias, const Two& columns) {
        return {fmaf(static_cast<float>(sums[0]) * row, columns.first, bias),
                fmaf(static_cast<float>(sums[1]) * row, columns.second, bias)};
    }
    // Gate, up and activation of two neighbouring tokens, whose facts begin at `column`, from a thread's four sums.
    __device__ __forceinline__ uint32_t joined(const Sum* sums, const Rows& rows, uint32_t column) const {
        const Two columns = factors(column);
        const Two gates = scaled(sums, rows.low, rows.low_bias, columns);
        const Two ups = scaled(sums + 2, rows.high, rows.high_bias, columns);
        const float limit = p.activation.limit;
        return pair(silu(smaller(gates.first, limit)) * clamp(ups.first, limit),
                    silu(smaller(gates.second, limit)) * clamp(ups.second, limit));
    }

    // A piece's sums, of `count` tokens, to results in shared memory: [token][16 of each warp], or eight where gates and ups
    // are joined.
    template <bool kJoined>
    __device__ __forceinline__ void stage(const Sums<kN>& acc, int nth, int count, const Rows& rows, uint32_t columns,
                                          uint32_t to) const {
        uint32_t out[2][4];  // rows g, rows g + 8; of four eights of tokens
#pragma unroll
        for (int i = 0; i < kPiece / 8; i++) {
            // Few tokens leave most of a piece empty.
            if (kN <= 64 && i > 0 && 8 * i >= count) {
                out[0][i] = out[1][i] = 0;
                continue;
            }
            const Sum* sums = sums_of(acc, kPiece / 8 * nth + i);
            const uint32_t column = columns + 8 * (8 * i + 2 * (lane & 3));
            if constexpr (kJoined) {
                out[0][i] = joined(sums, rows, column), out[1][i] = 0;
            } else {
                const Two both = factors(column);
                const Two low = scaled(sums, rows.low, rows.low_bias, both);
                const Two high = scaled(sums + 2, rows.high, rows.high_bias, both);
                out[0][i] = pair(low.first, low.second), out[1][i] = pair(high.first, high.second);
            }
            // Rows beyond the matrix are columns beyond the result, or zeros that fill a plane.
            if (kJoined && !rows.inside) out[0][i] = 0;
        }
        if (kJoined) {
            store_turned(staged_at(to, lane, warp), out[0]);
        } else {
            store_turned(staged_at(to, lane, 2 * warp), out[0]);
            store_turned(staged_at(to, lane, 2 * warp + 1), out[1]);
        }
    }

    // Whether a result is planes of the next products' operands: of 16 bits, the first kind's.
    __device__ __forceinline__ bool in_planes() const { return kHalf && p.kind == kFirst; }
    // Eight columns of a row of the result.
    __device__ __forceinline__ uint4* out_at(uint32_t row, int column, bool planes) const {
        if (planes) return static_cast<uint4*>(p.out) + ordered_place(column / 8, row, p.count);
        typename C::T* out = static_cast<typename C::T*>(p.out) + column;
        return reinterpret_cast<uint4*>(out + static_cast<uint64_t>(row) * static_cast<uint32_t>(p.out_columns));
    }
    // Columns that the warpgroup's part of a row tile has, and its first one.
    __device__ __forceinline__ static int width(bool joined) { return joined ? 32 : 64; }
    __device__ __forceinline__ int first_column(const Task& task, bool joined) const {
        return (kMathGroups * task.row_tile + warpgroup) * width(joined);
    }

    // From there to rows, in the order of columns or in the products' (kernels/common/order.cuh), 16 bytes at a time.
    template <bool kJoined>
    __device__ __forceinline__ void copy_out(const Task& task, int count, uint32_t columns, uint32_t from) const {
        constexpr int kEights = kJoined ? 4 : 8, kTokens = kWarpgroup / kEights;
        const int thread = 32 * warp + lane, eight = thread % kEights, column = first_column(task, kJoined) + 8 * eight;
        if (column >= p.out_columns) return;
        constexpr bool kOrdered = kHalf && kJoined;
#pragma unroll
        for (int i = 0; i < kPiece / kTokens; i++) {
            const int token = kTokens * i + thread / kEights;
            if (token >= count) break;
            uint4 v;
            if constexpr (kOrdered) {
                const int group = eight & 4, word = 4 * (eight & 3);
                v.x = read_shared<uint32_t>(staged_at(from, token, group) + word);
                v.y = read_shared<uint32_t>(staged_at(from, token, group + 1) + word);
                v.z = read_shared<uint32_t>(staged_at(from, token, group + 2) + word);
                v.w = read_shared<uint32_t>(staged_at(from, token, group + 3) + word);
            } else {
                v = read_shared<uint4>(staged_at(from, token, eight));
            }
            *out_at(read_shared<uint32_t>(columns + 8 * token + 4), column, kOrdered) = v;
        }
    }

    // From there to codes by a stored scale.
    __device__ __forceinline__ void copy_codes(const Task& task, int count, uint32_t columns, uint32_t from,
                                               uint32_t divisor) const {
        using K = Key<std::conditional_t<kInt8, Int8, E4m3>, ScaleKind::kStored, 0>;
        const int thread = 32 * warp + lane, token = thread / 4, eight = thread % 4;
        const uint4 results = read_shared<uint4>(staged_at(from, token, eight));
        const int row = read_fact(columns + 8 * token).other;
        write_codes<K>(p, results, read_divisor(divisor), first_column(task, true) / 16, eight, row, token < count);
    }

    // A piece's sums, before the activation, as floats: [token][16 of each warp], of which eight gates come before their
    // ups.
    __device__ __forceinline__ void stage_raw(const Sums<kN>& acc, int nth, const Rows& rows, uint32_t columns,
                                              uint32_t to) const {
#pragma unroll
        for (int i = 0; i < kPiece / 8; i++) {
            const Sum* sums = sums_of(acc, kPiece / 8 * nth + i);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int token = 8 * i + 2 * (lane & 3) + e;
                const float f = read_float(columns + 8 * token);
                const uint32_t there = to + token * 256 + 64 * warp + lane / 4 * 4;
                const float low = fmaf(static_cast<float>(sums[e]) * rows.low, f, rows.low_bias);
                store_4(there, __float_as_uint(low));
                const float high = fmaf(static_cast<float>(sums[2 + e]) * rows.high, f, rows.high_bias);
                store_4(there + 32, __float_as_uint(high));
            }
        }
    }
    // From there through the activation to rows, eight columns of a token at a time.
    __device__ __forceinline__ void copy_raw(const Task& task, int count, uint32_t columns, uint32_t from) const {
        const bool joined = gated(p.activation);
        const int eights = width(joined) / 8, first = first_column(task, joined);
        const int filled = p.weights.slabs * (joined ? 8 : 16);
        for (int i = 32 * warp + lane; i < count * eights; i += kWarpgroup) {
            const int token = i / eights, eight = i % eights, column = first + 8 * eight;
            if (column >= p.out_columns) continue;
            uint32_t out[4] = {};
            // One by one: the activations' code is long.
#pragma unroll 1
            for (int e = 0; e < 8; e++) {
                // A column, or, in the products' order, one of a pair of each eight.
                const int at = in_planes() ? (eight & 4) * 8 + e / 2 * 8 + 2 * (eight & 3) + e % 2 : 8 * eight + e;
                const uint32_t slot = from + token * 256 + 4 * (joined ? at + at / 8 * 8 : at);
                const float g = read_float(slot), u = joined ? read_float(slot + 32) : g;
                const uint32_t code = first + at < filled ? pair(apply(p.activation, g, u), 0.f) << 16 : 0;
#pragma unroll
                for (int i = 0; i < 3; i++) out[i] = __funnelshift_r(out[i], out[i + 1], 16);
                out[3] = out[3] >> 16 | code;
            }
            *out_at(read_fact(columns + 8 * token).other, column, in_planes()) = make_uint4(out[0], out[1], out[2], out[3]);
        }
    }

    // Results of the second kind, or of the first with the commonest activation: one half of the room may still be read
    // while the other is filled.
    template <bool kJoined, bool kCodes = false>
    __device__ __forceinline__ void write_pieces(const Sums<kN>& acc, const Task& task, const Rows& rows, uint32_t facts) const {
#pragma unroll
        for (int i = 0; i < kPieces; i++) {
            if (kPiece * i >= task.count) break;
            const uint32_t columns = facts + 8 * kPiece * i, at = memory.staged(warpgroup) + i % 2 * (L::kStaged / 2);
            stage<kJoined>(acc, i, task.count - kPiece * i, rows, columns, at);
            warpgroup_barrier(warpgroup);
            if constexpr (kCodes) {
                copy_codes(task, task.count - kPiece * i, columns, at, facts + 8 * (kN + kRows));
            } else {
                copy_out<kJoined>(task, task.count - kPiece * i, columns, at);
            }
        }
    }
    // Of the first kind with any activation.
    __device__ __forceinline__ void write_raw(const Sums<kN>& acc, const Task& task, const Rows& rows, uint32_t facts) const {
        const uint32_t room = memory.staged(warpgroup);
#pragma unroll
        for (int i = 0; i < kPieces; i++) {
            if (kPiece * i >= task.count) break;
            const uint32_t columns = facts + 8 * kPiece * i;
            stage_raw(acc, i, rows, columns, room);
            warpgroup_barrier(warpgroup);
            copy_raw(task, min(kPiece, task.count - kPiece * i), columns, room);
            warpgroup_barrier(warpgroup);
        }
    }
    __device__ __forceinline__ void write(const Sums<kN>& acc, const Task& task, uint32_t facts) const {
        const Rows rows = rows_of(task, facts);
        // The last task's results may still be read.
        warpgroup_barrier(warpgroup);
        if (p.kind == kSecond) {
            write_pieces<false>(acc, task, rows, facts);
        } else if (p.activation.kind == kSilu) {
            if (kStoredScales && p.stored != nullptr) return write_pieces<true, kStoredScales>(acc, task, rows, facts);
            write_pieces<true>(acc, task, rows, facts);
        } else {
            write_raw(acc, task, rows, facts);
        }
    }
};

}  // namespace moe
