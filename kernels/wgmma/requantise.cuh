// From sums to operands of the second projection at once, where those have a scale to each token and 128 columns: that is
// what the gates and ups of a cluster's task make of a token. Results are rounded to 16 bits first, as if they had been
// written and quantised by a kernel of their own (kernels/operands.cu), with the same bits.
//
// A warpgroup's largest magnitudes go to both blocks, which then know those of all 128 columns.
#pragma once
#include "finish.cuh"

namespace moe {

template <int kN>
struct Requantise {
    using L = Layout<kN>;
    using K = Key<E4m3, ScaleKind::kF32, 128>;
    static constexpr int kPieceEights = kPiece / 8;
    // A thread holds results of one column, two tokens to a register; after an exchange a part of all lanes' largest.
    static constexpr int kHeld = kN / 8, kEach = kHeld / 8;
    static constexpr int kPairs = kN / 2;
    static_assert(L::kChunks == 1 && kRows * kCluster == 256 && kPairs <= kWarpgroup && kPiece * 4 == kWarpgroup, "");
    // Of a warpgroup's room: results of two pieces on their way out, a divisor for each token, the largest magnitudes of
    // its warps.
    static constexpr int kHalfRoom = kPiece * 64, kDivisors = 2 * kHalfRoom, kTops = kDivisors + 16 * kN;
    static_assert(kTops + 4 * 4 * kPairs <= L::kStaged, "");

    const Finish<kN>& finish;

    __device__ __forceinline__ uint32_t room() const { return finish.memory.staged(finish.warpgroup); }
    __device__ __forceinline__ int thread() const { return 32 * finish.warp + finish.lane; }
    static __device__ __forceinline__ uint32_t staged_at(uint32_t base, int token, int chunk) {
        return base + token * 64 + ((chunk ^ (token / 2 & 3)) << 4);
    }

    // Results, rounded.
    __device__ __forceinline__ void activate(const Sums<kN>& acc, const Task& task, uint32_t facts,
                                             uint32_t (&held)[kHeld]) const {
        const auto rows = finish.rows_of(task, facts);
        const uint32_t columns = facts + 16 * (finish.lane & 3);
#pragma unroll
        for (int j = 0; j < kHeld; j++) {
            held[j] = 0;
            if (j / kPieceEights * kPiece < task.count && rows.inside) {
                held[j] = finish.joined(&acc[0][4 * j], rows, columns + 64 * j);
            }
        }
    }

    // The larger ones of two lanes, each of which goes on with a half of them.
    template <int kHalf>
    __device__ __forceinline__ void fold(uint32_t (&top)[kHeld], int step) const {
        const bool upper = finish.lane & step;
#pragma unroll
        for (int i = 0; i < kHalf; i++) {
            const uint32_t theirs = __shfl_xor_sync(~0u, upper ? top[i] : top[i + kHalf], step);
            top[i] = __vmaxu2(upper ? top[i + kHalf] : top[i], theirs);
        }
    }
    // The largest magnitudes of a warp's eight columns: lane 4 g + t gets those of the registers from g * kEach on.
    __device__ __forceinline__ void largest_of(const uint32_t (&held)[kHeld], uint32_t (&top)[kHeld]) const {
#pragma unroll
        for (int i = 0; i < kHeld; i++) top[i] = held[i] & 0x7fff7fffu;
        fold<kHeld / 2>(top, 16);
        fold<kHeld / 4>(top, 8);
        fold<kHeld / 8>(top, 4);
    }

    // A warpgroup's, to every block of the cluster.
    __device__ __forceinline__ void tell(const uint32_t (&top)[kHeld], int nth) const {
        const uint32_t tops = room() + kTops;
#pragma unroll
        for (int i = 0; i < kEach; i++) store_4(tops + 4 * (kEach * thread() + i), top[i]);
        // Of the task before nobody reads divisors any more, either.
        warpgroup_barrier(finish.warpgroup);
        const uint32_t full = finish.memory.largest_full(nth & 1);
        if (finish.warpgroup == 0 && thread() == 0) barrier_expect(full, 4 * kPairs * kMathGroups * kCluster);
        if (thread() >= kPairs) return;
        uint32_t all = 0;
#pragma unroll
        for (int w = 0; w < 4; w++) all = __vmaxu2(all, read_shared<uint32_t>(tops + 4 * (w * kPairs + thread())));
        const int from = blockIdx.x % kCluster * kMathGroups + finish.warpgroup;
        const uint32_t to = finish.memory.largest(nth & 1) + 4 * (from * kPairs + thread());
#pragma unroll
        for (int b = 0; b < kCluster; b++) store_4_remote(to, all, full, b);
    }

    // Tokens' scales, from all of theirs.
    __device__ __forceinline__ void find_scales(const Task& task, int nth) const {
        barrier_wait(finish.memory.largest_full(nth & 1), nth / 2 & 1);
        const int pair = thread(), group = pair / kEach / 4, held = group * kEach + pair % kEach;
        const int token = 8 * held + pair / kEach % 4 * 2;
        if (pair < kPairs && token < task.count) {
            uint32_t top = 0;
#pragma unroll
            for (int i = 0; i < kMathGroups * kCluster; i++) {
                top = __vmaxu2(top, read_shared<uint32_t>(finish.memory.largest(nth & 1) + 4 * (i * kPairs + pair)));
            }
            float* scales = finish.p.out_scales + static_cast<long long>(task.row_tile / kCluster) * finish.p.count;
            const bool writes = finish.warpgroup == 0 && blockIdx.x % kCluster == 0;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const Scale scale = group_scale<K>(one<C::T>(i == 0 ? top & 0xffffu : top >> 16), 1.f);
                write_divisor(room() + kDivisors + 16 * (token + i), scale);
                if (writes && token + i < task.count) scales[task.start + token + i] = scale.value;
            }
        }
        warpgroup_barrier(finish.warpgroup);
    }

    // A piece's results to codes.
    __device__ __forceinline__ void write_piece(const uint32_t (&held)[4], int nth, const Task& task, int first,
                                                int count) const {
        const uint32_t half = room() + (nth & 1) * kHalfRoom;
        store_turned(staged_at(half, finish.lane, finish.warp), held);
        warpgroup_barrier(finish.warpgroup);
        // Of a token, eight of the warpgroup's 32 columns.
        const int token = thread() / 4, eight = thread() % 4;
        const Divisor by = read_divisor(room() + kDivisors + 16 * (first + token));
        const uint4 results = read_shared<uint4>(staged_at(half, token, eight));
        const int chunk = finish.first_column(task, true) / 16, row = task.start + first + token;
        write_codes<K>(finish.p, results, by, chunk, eight, row, token < count);
    }

    // The block's `nth` task.
    __device__ __forceinline__ void write(const Sums<kN>& acc, const Task& task, uint32_t facts, int nth) const {
        uint32_t held[kHeld];
        activate(acc, task, facts, held);
        {
            uint32_t top[kHeld];
            largest_of(held, top);
            tell(top, nth);
        }
        find_scales(task, nth);
#pragma unroll
        for (int n = 0; n < kN / kPiece; n++) {
            const int at = kPieceEights * n, first = kPiece * n;
            const uint32_t of[4] = {held[at], held[at + 1], held[at + 2], held[at + 3]};
            if (first < task.count) write_piece(of, n, task, first, task.count - first);
        }
    }
};

}  // namespace moe
