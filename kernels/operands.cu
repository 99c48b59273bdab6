// Activations quantised to 8 bits as operands of Hopper's products: rows of bf16 or f16 to planes of codes
// (common/order.cuh), each row to one place or to those of all its experts, with the values of quantize.cu to the bit. A warp
// to a row, or where there are few rows a block.
#include "common/chunk.cuh"
#include "common/order.cuh"

namespace {

using namespace moe;

constexpr int kWarps = 8, kThreads = 32 * kWarps;
// What a warp takes at once: two steps of eight columns a lane, which make four lanes' 16-byte words after an exchange.
constexpr int kSteps = 2, kColumns = kSteps * 32 * CHUNK;
// Times that in registers while the row's largest magnitude is found; longer rows are read again.
constexpr int kKept = 2;

// src/cuda/operands.rs has the same.
struct OperandsParams {
    const void* input;   // [sources, columns], 16-bit
    const int* places;   // [sources, copies] rows of the planes, -1 for none; null: row r to row r
    const int* present;  // [sources] or null: rows with a negative number here are not written
    const float* stored; // the scale of static keys
    uint4* codes;        // [planes][rows] lines of 128 bytes
    float* scales;       // [groups][rows], written for dynamic keys; read where experts have stored scales of their own
    int columns;         // a multiple of 8
    int planes, rows;
    int sources, copies;
    int warps;  // to a row: 1 or kWarps
};
static_assert(sizeof(OperandsParams) == 72, "");

// Four lanes' four words exchanged: lane t gets word t of each.
__device__ __forceinline__ uint4 exchanged(const uint32_t (&w)[4], int lane) {
    const bool odd = lane & 1, upper = lane & 2;
    const uint32_t a = __shfl_xor_sync(~0u, odd ? w[0] : w[1], 1), b = __shfl_xor_sync(~0u, odd ? w[2] : w[3], 1);
    const uint32_t n[4] = {odd ? a : w[0], odd ? w[1] : a, odd ? b : w[2], odd ? w[3] : b};
    const uint32_t c = __shfl_xor_sync(~0u, upper ? n[0] : n[2], 2), d = __shfl_xor_sync(~0u, upper ? n[1] : n[3], 2);
    return upper ? make_uint4(c, d, n[2], n[3]) : make_uint4(n[0], n[1], c, d);
}

// The row's places: lane i has the ith.
struct Places {
    int mine, count;
    template <class F>
    __device__ __forceinline__ void for_each(F f) const {
#pragma unroll 4
        for (int i = 0; i < count; i++) {
            const int row = __shfl_sync(~0u, mine, i);
            if (row >= 0) f(row);
        }
    }
};

// kByRow: the stored scale is that of the row that codes go to.
template <class T, class K, bool kByRow = false>
__device__ __forceinline__ void operands(const OperandsParams& p) {
    static_assert(!kByRow || K::kScale == ScaleKind::kStored, "");
    constexpr bool kOfRow = K::kScale == ScaleKind::kF32 && K::kGroup == 0;
    __shared__ uint32_t tops[kWarps];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const bool shared = p.warps > 1;
    const int source = shared ? blockIdx.x : blockIdx.x * kWarps + warp;
    const T* from = static_cast<const T*>(p.input) + static_cast<int64_t>(source) * p.columns;
    const int times = (p.planes * 128 + kColumns - 1) / kColumns, begin = shared ? warp : 0;
    const auto load_step = [&](int time, int step, Raw<T>& raw) {
        load(from, (kSteps * time + step) * 32 * CHUNK + lane * CHUNK, p.columns, true, raw);
    };
    // Rows that go to places are the layer's own input: that was complete when the plan was begun, which is the grid ahead,
    // so that their first columns are on their way before the places are known.
    const bool early = p.places != nullptr && p.present == nullptr && source < p.sources && begin < times;
    Raw<T> kept[kKept][kSteps];
    if (early) {
#pragma unroll
        for (int s = 0; s < kSteps; s++) load_step(begin, s, kept[0][s]);
    }
    wait_for_previous_grid();
    release_next_grid();
    // The whole block where it shares a row.
    if (source >= p.sources || (p.present != nullptr && __ldcg(p.present + source) < 0)) return;
    Places places{source, 1};
    if (p.places != nullptr) {
        places.mine = lane < p.copies ? __ldcg(p.places + static_cast<int64_t>(source) * p.copies + lane) : -1;
        places.count = p.copies;
    }

    Scale scale = {0.f, 0};
    if constexpr (K::kStored && !kByRow) scale = stored_scale(__ldcg(p.stored));
    if constexpr (kOfRow) {
        uint32_t top = 0;
#pragma unroll
        for (int i = 0; i < kKept; i++) {
            if (begin + i * p.warps >= times) break;
#pragma unroll
            for (int s = 0; s < kSteps; s++) {
                if (i > 0 || !early) load_step(begin + i * p.warps, s, kept[i][s]);
                top = largest(kept[i][s], top);
            }
        }
#pragma unroll 2
        for (int time = begin + kKept * p.warps; time < times; time += p.warps) {
#pragma unroll
            for (int s = 0; s < kSteps; s++) {
                Raw<T> raw;
                load_step(time, s, raw);
                top = largest(raw, top);
            }
        }
        top = __reduce_max_sync(~0u, one<T>(top));
        if (shared) {
            if (lane == 0) tops[warp] = top;
            __syncthreads();
#pragma unroll
            for (int i = 0; i < kWarps; i++) top = max(top, tops[i]);
        }
        scale = group_scale<K>(top, 1.f);
        if (begin == 0) {
            places.for_each([&](int row) {
                if (lane == 0) p.scales[row] = scale.value;
            });
        }
    }

    // Of the lane's columns of each step: what divides them, which has no inverse where they have no codes.
    const auto divisors_of = [&](int time, const Raw<T> (&raw)[kSteps], Divisor (&of)[kSteps]) {
        if constexpr (K::kGroup == 0) {
            of[0] = of[1] = coding_divisor(scale);
        } else {
            // Sixteen lanes share a scale: eight of them find that of the first step's columns, eight that of the second's.
            static_assert(K::kGroup == 16 * CHUNK && kSteps == 2, "");
            const bool second = lane & 8;
            const uint32_t first_top = one<T>(largest(raw[0])), second_top = one<T>(largest(raw[1]));
            uint32_t top = __shfl_xor_sync(~0u, second ? first_top : second_top, 8);
            top = max(top, second ? second_top : first_top);
#pragma unroll
            for (int step = 1; step < 8; step *= 2) top = max(top, __shfl_xor_sync(~0u, top, step));
            const Scale mine = group_scale<K>(top, 1.f);
            // The group's first one: it may end before this lane's.
            const int column = ((kSteps * time + second) * 32 + (lane & 16)) * CHUNK;
            float* scales = p.scales + static_cast<int64_t>(column / K::kGroup) * p.rows;
            places.for_each([&](int row) {
                if (lane % 8 == 0 && column < p.columns) scales[row] = mine.value;
            });
            const Divisor own = coding_divisor(mine);
            const auto other = [&](float x) { return __shfl_xor_sync(~0u, x, 8); };
            const Divisor theirs = {other(own.power), other(own.scale), other(own.inverse)};
            of[0] = second ? theirs : own, of[1] = second ? own : theirs;
        }
    };
    // A lane's 16 bytes of codes: lane t of four has the first or second of 32 columns of either step.
    const auto codes_of = [&](int time, const Raw<T> (&raw)[kSteps], const Divisor (&by)[kSteps]) {
        uint32_t words[4];
#pragma unroll
        for (int s = 0; s < kSteps; s++) {
            words[2 * s] = words[2 * s + 1] = 0;
            if ((kSteps * time + s) * 32 * CHUNK >= p.columns) continue;
            float v[CHUNK], q[CHUNK];
            widen(raw[s], v);
            divide<K, K::kScale == ScaleKind::kF32>(v, by[s], q);
            if (by[s].inverse != 0) words[2 * s] = four_codes<K>(q), words[2 * s + 1] = four_codes<K>(q + 4);
        }
        return exchanged(words, lane);
    };
    const auto emit = [&](int time, const Raw<T> (&raw)[kSteps]) {
        const int group = (kSteps * time + lane % 4 / 2) * 8 + lane / 4, chunk = 2 * group + lane % 2;
        const auto store = [&](int row, const uint4& v) {
            if (chunk < 8 * p.planes) p.codes[ordered_place(chunk, row, p.rows)] = v;
        };
        if constexpr (kByRow) {
#pragma unroll 1
            for (int i = 0; i < places.count; i++) {
                const int row = __shfl_sync(~0u, places.mine, i);
                if (row < 0) continue;
                const Scale stored = stored_scale(__ldcg(p.scales + row));
                const Divisor by = coding_divisor(stored), both[kSteps] = {by, by};
                store(row, codes_of(time, raw, both));
            }
        } else {
            Divisor by[kSteps];
            divisors_of(time, raw, by);
            const uint4 v = codes_of(time, raw, by);
            places.for_each([&](int row) { store(row, v); });
        }
    };
    if constexpr (kOfRow) {
#pragma unroll
        for (int i = 0; i < kKept; i++) {
            if (begin + i * p.warps >= times) break;
            emit(begin + i * p.warps, kept[i]);
        }
    }
    // The next columns are on their way while these are quantised.
    int time = begin + (kOfRow ? kKept * p.warps : 0);
    if (time >= times) return;
    Raw<T> (&now)[kSteps] = kept[0], (&next)[kSteps] = kept[1];
    const auto load_time = [&](int time, Raw<T> (&raw)[kSteps]) {
#pragma unroll
        for (int s = 0; s < kSteps; s++) load_step(time, s, raw[s]);
    };
    if (kOfRow || !early) load_time(time, now);
#pragma unroll 1
    for (; time < times; time += p.warps) {
        if (time + p.warps < times) load_time(time + p.warps, next);
        emit(time, now);
#pragma unroll
        for (int s = 0; s < kSteps; s++) now[s] = next[s];
    }
}

}  // namespace

// grid (rows, or rows / kWarps)
#define MOE_ENTRY(name, suffix, ...)                                                        \
    extern "C" __global__ void __launch_bounds__(kThreads, 5) operands_##name##_##suffix(   \
        const __grid_constant__ OperandsParams p) {                                         \
        operands<__VA_ARGS__>(p);                                                           \
    }
#define MOE_ENTRIES(name, ...)                                                              \
    MOE_ENTRY(name, bf16, __nv_bfloat16, Key<__VA_ARGS__>)                                  \
    MOE_ENTRY(name, f16, __half, Key<__VA_ARGS__>)
#define MOE_BY_ROW(name, Elem)                                                              \
    MOE_ENTRY(name, bf16, __nv_bfloat16, Key<Elem, ScaleKind::kStored, 0>, true)            \
    MOE_ENTRY(name, f16, __half, Key<Elem, ScaleKind::kStored, 0>, true)

MOE_ENTRIES(fp8_tensor, E4m3, ScaleKind::kStored, 0)
MOE_ENTRIES(fp8_token, E4m3, ScaleKind::kF32, 0)
MOE_ENTRIES(fp8_128, E4m3, ScaleKind::kF32, 128)
MOE_ENTRIES(int8_tensor, Int8, ScaleKind::kStored, 0)
MOE_ENTRIES(int8_token, Int8, ScaleKind::kF32, 0)
MOE_BY_ROW(fp8_expert, E4m3)
MOE_BY_ROW(int8_expert, Int8)
