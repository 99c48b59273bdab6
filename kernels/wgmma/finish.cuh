// From a warpgroup's sums to results: scales, routing weight, bias, activation, rounding, and out through shared memory, a
// piece of the tile's tokens at a time.
#pragma once
#include "common/order.cuh"
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
    using Chunk = Sum[L::kWidth / 2];
    static constexpr int kPieces = (L::kWidth + kPiece - 1) / kPiece;
    const GemmParams& p;
    const L& memory;
    const int warpgroup, warp, lane;  // warp of the warpgroup
    int staged = 0;                   // which half of the room is next

    // A piece's place in the tile and its tokens.
    struct Piece {
        int first, count;
    };
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

    // As apply() of common/activation.cuh, with a quotient that is off by two units of float32's last place at most.
    __device__ __forceinline__ float silu(float g, float u) const {
        const float limit = p.activation.limit;
        g = at_most(g, limit);
        return __fdividef(g, 1.f + __expf(-g)) * clamp(u, limit);
    }

    // Two neighbouring tokens' sums of a row times what belongs to them, and its bias.
    struct Two {
        float first, second;
    };
    static __device__ __forceinline__ Two scaled(const Sum* sums, float row, float bias, const Two& columns) {
        return {fmaf(static_cast<float>(sums[0]) * row, columns.first, bias),
                fmaf(static_cast<float>(sums[1]) * row, columns.second, bias)};
    }
    // Gate, up and activation of two neighbouring tokens, whose facts begin at `column`, from a thread's four sums.
    __device__ __forceinline__ uint32_t joined(const Sum* sums, const Rows& rows, uint32_t column) const {
        const Two columns = {read_float(column), read_float(column + 8)};
        const Two gates = scaled(sums, rows.low, rows.low_bias, columns);
        const Two ups = scaled(sums + 2, rows.high, rows.high_bias, columns);
        return pair(silu(gates.first, ups.first), silu(gates.second, ups.second));
    }

    // A piece's sums to results in shared memory: [token][16 of each warp], or eight where gates and ups are joined.
    template <bool kJoined>
    __device__ __forceinline__ void stage(const Chunk& acc, int nth, const Rows& rows, uint32_t columns, uint32_t to) const {
        uint32_t out[2][4];  // rows g, rows g + 8; of four eights of tokens
#pragma unroll
        for (int i = 0; i < kPiece / 8; i++) {
            const Sum* sums = acc + 4 * min(kPiece / 8 * nth + i, L::kWidth / 8 - 1);
            const uint32_t column = columns + 8 * (8 * i + 2 * (lane & 3));
            if constexpr (kJoined) {
                out[0][i] = joined(sums, rows, column), out[1][i] = 0;
            } else {
                const Two both = {read_float(column), read_float(column + 8)};
                const Two low = scaled(sums, rows.low, rows.low_bias, both);
                const Two high = scaled(sums + 2, rows.high, rows.high_bias, both);
                out[0][i] = pair(low.first, low.second), out[1][i] = pair(high.first, high.second);
            }
            if (!rows.inside) out[0][i] = out[1][i] = 0;
        }
        if (kJoined) {
            store_turned(staged_at(to, lane, warp), out[0]);
        } else {
            store_turned(staged_at(to, lane, 2 * warp), out[0]);
            store_turned(staged_at(to, lane, 2 * warp + 1), out[1]);
        }
    }

    // Eight columns of a row of the result.
    __device__ __forceinline__ uint4* out_at(int row, int column) const {
        if (p.kind == kFirst && p.planes) {
            return static_cast<uint4*>(p.out) + ordered_place(column / 8, row, p.count);
        }
        typename C::T* out = static_cast<typename C::T*>(p.out) + static_cast<long long>(row) * p.out_columns + column;
        return reinterpret_cast<uint4*>(out);
    }
    // Columns that the warpgroup's part of a row tile has, and its first one.
    __device__ __forceinline__ static int width(bool joined) { return joined ? 32 : 64; }
    __device__ __forceinline__ int first_column(const Task& task, bool joined) const {
        return (kMathGroups * task.row_tile + warpgroup) * width(joined);
    }

    // From there to rows, in the order of columns or in the products' (kernels/common/order.cuh), 16 bytes at a time.
    template <bool kJoined>
    __device__ __forceinline__ void copy_out(const Task& task, const Piece& piece, uint32_t columns, uint32_t from) const {
        constexpr int kEights = kJoined ? 4 : 8, kTokens = kWarpgroup / kEights;
        const int thread = 32 * warp + lane, eight = thread % kEights, column = first_column(task, kJoined) + 8 * eight;
        if (column >= p.out_columns) return;
        const bool ordered = p.kind == kFirst && p.planes;
#pragma unroll
        for (int i = 0; i < kPiece / kTokens; i++) {
            const int token = kTokens * i + thread / kEights;
            if (token >= piece.count) break;
            uint4 v;
            if (ordered) {
                const int group = eight & 4, word = 4 * (eight & 3);
                v.x = read_shared<uint32_t>(staged_at(from, token, group) + word);
                v.y = read_shared<uint32_t>(staged_at(from, token, group + 1) + word);
                v.z = read_shared<uint32_t>(staged_at(from, token, group + 2) + word);
                v.w = read_shared<uint32_t>(staged_at(from, token, group + 3) + word);
            } else {
                v = read_shared<uint4>(staged_at(from, token, eight));
            }
            *out_at(read_shared<uint32_t>(columns + 8 * token + 4), column) = v;
        }
    }

    // A piece's sums, before the activation, as floats: [token][16 of each warp], of which eight gates come before their
    // ups.
    __device__ __forceinline__ void stage_raw(const Chunk& acc, int nth, const Rows& rows, uint32_t columns,
                                              uint32_t to) const {
#pragma unroll
        for (int i = 0; i < kPiece / 8; i++) {
            const int at = min(kPiece / 8 * nth + i, L::kWidth / 8 - 1);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int token = 8 * i + 2 * (lane & 3) + e;
                const float f = read_float(columns + 8 * token);
                const uint32_t there = to + token * 256 + 64 * warp + lane / 4 * 4;
                const float low = fmaf(static_cast<float>(acc[4 * at + e]) * rows.low, f, rows.low_bias);
                store_4(there, __float_as_uint(low));
                const float high = fmaf(static_cast<float>(acc[4 * at + 2 + e]) * rows.high, f, rows.high_bias);
                store_4(there + 32, __float_as_uint(high));
            }
        }
    }
    // From there through the activation to rows, eight columns of a token at a time.
    __device__ __forceinline__ void copy_raw(const Task& task, const Piece& piece, uint32_t columns, uint32_t from) const {
        const bool joined = gated(p.activation);
        const int eights = width(joined) / 8, first = first_column(task, joined);
        const int filled = p.weights.slabs * (joined ? 8 : 16);
        for (int i = 32 * warp + lane; i < piece.count * eights; i += kWarpgroup) {
            const int token = i / eights, eight = i % eights, column = first + 8 * eight;
            if (column >= p.out_columns) continue;
            uint32_t out[4] = {};
#pragma unroll 1
            for (int e = 0; e < 4; e++) {
                // Two columns: neighbours, or, in the products' order, a pair of each eight.
                const int at = p.planes ? (eight & 4) * 8 + 8 * e + 2 * (eight & 3) : 8 * eight + 2 * e;
                const uint32_t slot = from + token * 256 + 4 * (joined ? at + at / 8 * 8 : at);
                const float g0 = read_float(slot), g1 = read_float(slot + 4);
                const float u0 = joined ? read_float(slot + 32) : g0, u1 = joined ? read_float(slot + 36) : g1;
                const bool inside = first + at < filled;
                out[0] = out[1], out[1] = out[2], out[2] = out[3];
                out[3] = inside ? pair(apply(p.activation, g0, u0), apply(p.activation, g1, u1)) : 0;
            }
            *out_at(read_fact(columns + 8 * token).other, column) = make_uint4(out[0], out[1], out[2], out[3]);
        }
    }

    // What a launch makes of sums: results of the second kind, of the first with the commonest activation, or with others.
    enum Way { kDown, kGated, kRaw };

    template <Way kWay>
    __device__ __forceinline__ void write_piece(const Chunk& acc, int nth, const Task& task, const Rows& rows,
                                                const Piece& piece, uint32_t facts) {
        const uint32_t columns = facts + 8 * piece.first, room = memory.staged(warpgroup);
        if constexpr (kWay == kRaw) {
            warpgroup_barrier(warpgroup);
            stage_raw(acc, nth, rows, columns, room);
            warpgroup_barrier(warpgroup);
            copy_raw(task, piece, columns, room);
        } else {
            // The other half may still be read.
            const uint32_t half = room + staged * (L::kStaged / 2);
            staged ^= 1;
            stage<kWay == kGated>(acc, nth, rows, columns, half);
            warpgroup_barrier(warpgroup);
            copy_out<kWay == kGated>(task, piece, columns, half);
        }
    }

    // All of the tile's columns, `width` to a chunk.
    template <Way kWay>
    __device__ __forceinline__ void write_all(const Sum (&acc)[L::kChunks][L::kWidth / 2], const Task& task, int width,
                                              uint32_t facts) {
        const Rows rows = rows_of(task, facts);
#pragma unroll
        for (int c = 0; c < L::kChunks; c++) {
            const int count = min(width, task.count - c * width);
#pragma unroll
            for (int n = 0; n < kPieces; n++) {
                if (kPiece * n >= count) break;
                write_piece<kWay>(acc[c], n, task, rows, {c * width + kPiece * n, min(kPiece, count - kPiece * n)}, facts);
            }
        }
    }
    __device__ __forceinline__ void write(const Sum (&acc)[L::kChunks][L::kWidth / 2], const Task& task, int width,
                                          uint32_t facts) {
        if (p.kind == kSecond) {
            write_all<kDown>(acc, task, width, facts);
        } else if (p.activation.kind == kSilu) {
            write_all<kGated>(acc, task, width, facts);
        } else {
            write_all<kRaw>(acc, task, width, facts);
        }
    }
};

}  // namespace moe
