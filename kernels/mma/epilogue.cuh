// From a block's sums to results: bias, routing weight, activation, rounding.
#pragma once
#include "operand.cuh"

namespace moe {

template <int kN>
struct Epilogue {
    using S = Shape<kN>;
    const GemmParams& p;
    const Task task;
    const int warp, lane, first_slab;

    // The sums as projections, to shared memory: [tokens][kPitch], the block's rows.
    __device__ __forceinline__ void stage_sums(const D (&dequant)[S::kWarpSlabs],
                                               const Sum (&acc)[S::kWarpSlabs][S::kTiles][4]) const {
        const int g = lane >> 2, t = lane & 3;
        float* staged = reinterpret_cast<float*>(shared_memory + kRingAt) + (S::column(warp, 0) + 2 * t) * S::kPitch + g;
        float routing[S::kTiles][2];
#pragma unroll
        for (int n = 0; n < S::kTiles; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int c = S::column(warp, n) + 2 * t + i;
                if constexpr (kWhole) {
                    routing[n][i] = c < task.count ? p.units[task.start + c] : 0.f;
                } else {
                    routing[n][i] = p.routing != nullptr && c < task.count ? p.routing[p.rows[task.start + c]] : 1.f;
                }
            }
        }
#pragma unroll
        for (int s = 0; s < S::kWarpSlabs; s++) {
            const int slab = warp / S::kWarpColumns * S::kWarpSlabs + s;
            if (first_slab + slab >= p.weights.slabs) break;
            const long long at = ((long long)task.expert * p.weights.slabs + first_slab + slab) * 16 + g;
#pragma unroll
            for (int high = 0; high < 2; high++) {
                const float factor = p.weights.factors[at + 8 * high] * sum_scale<Q>() * dequant[s].unit[high];
                const float bias = p.weights.bias != nullptr ? p.weights.bias[at + 8 * high] : 0.f;
#pragma unroll
                for (int n = 0; n < S::kTiles; n++) {
                    const int column = S::column(0, n);
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        staged[(column + i) * S::kPitch + 16 * slab + 8 * high] =
                            fmaf(static_cast<float>(acc[s][n][2 * high + i]) * factor, routing[n][i], bias);
                    }
                }
            }
        }
    }

    __device__ __forceinline__ float4 staged(int token, int row) const {
        return *reinterpret_cast<const float4*>(shared_memory + kRingAt + 4 * (token * S::kPitch + row));
    }

    static __device__ __forceinline__ uint2 rounded(float a, float b, float c, float d, bool final) {
        const auto one = [&](float x) { return final ? C::from_float(x) : C::between(x); };
        __align__(8) const C::T four[4] = {one(a), one(b), one(c), one(d)};
        return *reinterpret_cast<const uint2*>(four);
    }

    // Four results to a plane.
    __device__ __forceinline__ void write_plane(const float (&v)[4], int row, int column) const {
        char* to = static_cast<char*>(p.out) + column / kBlock * p.plane + (long long)row * kRowBytes +
                   ((column % kBlock / 8 ^ swizzle(row)) << 4) + column % 8 * 2;
        *reinterpret_cast<uint2*>(to) = rounded(v[0], v[1], v[2], v[3], false);
    }
    // Four results to a row, with the largest of its 64 columns, which sixteen lanes have; what quantises them wants both.
    __device__ __forceinline__ void write_float_row(const float (&v)[4], int row, int column) const {
        const long long at = (long long)row * p.out_columns + column;
        *reinterpret_cast<float4*>(static_cast<float*>(p.out) + at) = make_float4(v[0], v[1], v[2], v[3]);
        // As integers: a NaN is the largest of all.
        unsigned top = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) top = max(top, __float_as_uint(v[i]) & 0x7fffffffu);
        const unsigned all = __reduce_max_sync(0xffffu << (lane & 16), top);
        if (lane % 16 == 0) p.tops[at / kBlock] = all;
    }

    // From there through the activation, four results at a time; the last block fills the last 64 columns up.
    template <int kUnroll, class F>
    __device__ __forceinline__ void write_results(F activation) const {
        const bool pairs = gated(p.activation);
        const int slab_width = pairs ? 8 : 16, first = first_slab * slab_width;
        const int filled = p.weights.slabs * slab_width - first, shift = pairs ? S::kFours - 1 : S::kFours;
#pragma unroll kUnroll
        for (int i = threadIdx.x; i < task.count << shift; i += S::kThreads) {
            const int c = i >> shift, at = (i - (c << shift)) * 4, column = first + at, row = task.start + c;
            if (column >= p.out_columns) continue;
            float v[4] = {};
            if (at < filled) {
                // A slab holds eight gates, then their ups.
                const float4 gate = staged(c, pairs ? at + at / 8 * 8 : at);
                const float4 up = pairs ? staged(c, at + at / 8 * 8 + 8) : gate;
                v[0] = activation(gate.x, up.x), v[1] = activation(gate.y, up.y);
                v[2] = activation(gate.z, up.z), v[3] = activation(gate.w, up.w);
            }
            if (D::kLift) v[0] *= 0x1p80f, v[1] *= 0x1p80f, v[2] *= 0x1p80f, v[3] *= 0x1p80f;
            if constexpr (kWhole) {
                write_float_row(v, row, column);
            } else {
                write_plane(v, row, column);
            }
        }
    }
    __device__ __forceinline__ void write_activated() const {
        // The usual one without branches in the loop.
        if (p.activation.kind == kSilu) {
            write_results<2>([&](float g, float u) { return apply({kSilu, 0.f, 0.f, p.activation.limit}, g, u); });
        } else {
            write_results<1>([&](float g, float u) { return apply(p.activation, g, u); });
        }
    }

    // From there to rows.
    __device__ __forceinline__ void write_rows() const {
        const int first = first_slab * 16;
#pragma unroll 4
        for (int i = threadIdx.x; i < task.count << S::kFours; i += S::kThreads) {
            const int c = i >> S::kFours, at = (i - (c << S::kFours)) * 4;
            if (first + at >= p.out_columns) continue;
            const long long row = p.kind == kSecond ? p.rows[task.start + c] : task.start + c;
            C::T* to = static_cast<C::T*>(p.out) + row * p.out_columns + first + at;
            const float4 v = staged(c, at);
            *reinterpret_cast<uint2*>(to) = rounded(v.x, v.y, v.z, v.w, p.kind == kBatched);
        }
    }

    // All warps, when nobody reads the ring any more.
    __device__ __forceinline__ void write(const D (&dequant)[S::kWarpSlabs],
                                          const Sum (&acc)[S::kWarpSlabs][S::kTiles][4]) const {
        __syncthreads();
        stage_sums(dequant, acc);
        __syncthreads();
        if (p.kind == kFirst) {
            write_activated();
        } else {
            write_rows();
        }
    }
};

// A task that waits in shared memory while sums take all registers.
__device__ __forceinline__ void keep_task(uint32_t at, const Task& task) {
    if (threadIdx.x == 0) store_16(at, make_uint4(task.expert, task.start, task.count, task.row_tile));
}
// By all threads, when the sums are done: the results of the task that was kept there.
template <int kN, class Gemm>
__device__ __forceinline__ void write_kept(const GemmParams& p, uint32_t at, Gemm& gemm) {
    __syncthreads();
    const uint4 kept = read_shared<uint4>(at);
    const Task same{static_cast<int>(kept.x), static_cast<int>(kept.y), static_cast<int>(kept.z), static_cast<int>(kept.w)};
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    Epilogue<kN>{p, same, warp, lane, same.row_tile * Shape<kN>::kSlabs}.write(gemm.dequant, gemm.acc);
}

}  // namespace moe
