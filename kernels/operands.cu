// Activations quantised to 8 bits as operands of Hopper's products: rows of bf16 or f16 to planes of codes
// (common/order.cuh), each row to one place or to those of all its experts, with the values of quantize.cu to the bit. A warp
// has four loads under way: of a row that it may share with others, or of up to four short rows.
#include "common/chunk.cuh"
#include "common/order.cuh"

namespace {

using namespace moe;

constexpr int kWarps = 8, kThreads = 32 * kWarps;
// A step is eight columns a lane of one row. Two make four lanes' 16-byte words of codes after an exchange; four are under
// way together, and have their scales found together.
constexpr int kStep = 32 * CHUNK, kSteps = 4;

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
    int warp_bits;  // a row's warps, as a power of two
    int row_bits;   // a warp's rows, likewise; without places, and one warp to a row
    int unused;
};
static_assert(sizeof(OperandsParams) == 80, "");

// Four lanes' four words exchanged: lane t gets word t of each.
__device__ __forceinline__ uint4 exchanged(const uint32_t (&w)[4], int lane) {
    const bool odd = lane & 1, upper = lane & 2;
    const uint32_t a = __shfl_xor_sync(~0u, odd ? w[0] : w[1], 1), b = __shfl_xor_sync(~0u, odd ? w[2] : w[3], 1);
    const uint32_t n[4] = {odd ? a : w[0], odd ? w[1] : a, odd ? b : w[2], odd ? w[3] : b};
    const uint32_t c = __shfl_xor_sync(~0u, upper ? n[0] : n[2], 2), d = __shfl_xor_sync(~0u, upper ? n[1] : n[3], 2);
    return upper ? make_uint4(c, d, n[2], n[3]) : make_uint4(n[0], n[1], c, d);
}

// The largest of four values over kLanes lanes: the lane's own one is that of value `held_by`.
template <int kLanes>
__device__ __forceinline__ uint32_t fold(const uint32_t (&top)[kSteps], int lane) {
    const bool upper = lane & kLanes / 2, odd = lane & kLanes / 4;
    const auto other = [](uint32_t x, int step) { return __shfl_xor_sync(~0u, x, step); };
    const uint32_t even_theirs = other(upper ? top[0] : top[2], kLanes / 2);
    const uint32_t odd_theirs = other(upper ? top[1] : top[3], kLanes / 2);
    const uint32_t a = __vmaxu2(upper ? top[2] : top[0], even_theirs), b = __vmaxu2(upper ? top[3] : top[1], odd_theirs);
    uint32_t all = __vmaxu2(odd ? b : a, other(odd ? a : b, kLanes / 4));
#pragma unroll
    for (int step = kLanes / 8; step > 0; step /= 2) all = __vmaxu2(all, other(all, step));
    return all;
}
template <int kLanes>
__device__ __forceinline__ int held_by(int lane) {
    return (lane & kLanes / 2 ? 2 : 0) + (lane & kLanes / 4 ? 1 : 0);
}
// The first of kLanes lanes that holds value s.
template <int kLanes>
__device__ __forceinline__ constexpr int holder(int s) {
    return (s & 2 ? kLanes / 2 : 0) + (s & 1 ? kLanes / 4 : 0);
}

// group_scale of quantize.cuh by products, which make the same quotient of every float32 (src/cuda/quantize.rs tries some).
template <class K>
__device__ __forceinline__ Scale found_scale(uint32_t top) {
    constexpr float kLargest = K::Elem::kLargest, kInverse = 1.f / kLargest;
    const float amax = __uint_as_float(top), near = __fmul_rn(amax, kInverse);
    const float value = __fmaf_rn(__fmaf_rn(-near, kLargest, amax), kInverse, near);
    return {is_normal(value) ? value : top > kInfinityBits ? amax : 0.f, 0};
}

// A scale's inverse in two parts, for 16-bit numbers whose scale is made of the largest of them: quotients that have the code
// of a division's (src/cuda/quantize.rs tries all of them). Zeros where there are no codes.
struct Inverse {
    float high, low;
};
__device__ __forceinline__ Inverse inverse_of(const Scale& scale) {
    float high;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(high) : "f"(scale.value));
    // Off by one unit of the last place; two below it the second part is positive, and a negative zero stays one.
    high = __uint_as_float(__float_as_uint(high) - 2);
    const float low = __fmul_rn(__fmaf_rn(-high, scale.value, 1.f), high);
    return has_codes(scale) ? Inverse{high, low} : Inverse{0.f, 0.f};
}
template <int kCount>
__device__ __forceinline__ void quotients(const float (&x)[kCount], const Inverse& by, float (&q)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; i++) q[i] = __fmaf_rn(x[i], by.high, __fmul_rn(x[i], by.low));
}

// Codes of quotients that a scale of their own makes no larger than the largest.
template <class E>
__device__ __forceinline__ uint32_t found_codes(const float* q) {
    if constexpr (E::kMantissa != 0) {
        return four_codes<Key<E, ScaleKind::kF32, 0>>(q);
    } else {
        // As encoded().
        const auto bits = [&](int i) { return __float_as_uint(__fadd_rn(q[i], 12582912.f)); };
        return __byte_perm(__byte_perm(bits(0), bits(1), 0x0040), __byte_perm(bits(2), bits(3), 0x0040), 0x5410);
    }
}

// Numbers times 2^-64, or as they are: what becomes of small ones is no matter where the largest need it.
__device__ __forceinline__ void lowered(Raw<__nv_bfloat16>& raw, bool much) {
    const uint32_t by = much ? 0x1f801f80u : 0x3f803f80u;
#pragma unroll
    for (uint32_t& w : raw.words) {
        const __nv_bfloat162 v = __hmul2(reinterpret_cast<const __nv_bfloat162&>(w), reinterpret_cast<const __nv_bfloat162&>(by));
        w = reinterpret_cast<const uint32_t&>(v);
    }
}

// A warp's part of a launch. kByRow: the stored scale is that of the row that codes go to.
template <class T, class K, bool kByRow>
struct Rows {
    static_assert(!kByRow || K::kScale == ScaleKind::kStored, "");
    static constexpr bool kFound = K::kScale == ScaleKind::kF32, kOfRow = kFound && K::kGroup == 0;
    static_assert(kOfRow || !kFound || K::kGroup == 16 * CHUNK, "");
    // Lanes that share a scale.
    static constexpr int kLanes = kOfRow ? 32 : 16;
    static_assert(kLanes <= 32, "");

    const OperandsParams& p;
    const int lane, share, source;  // of the row's warps; the first row
    const int steps;                // of all its rows
    unsigned present;               // a bit for each row
    Raw<T> raw[kSteps];
    uint4 codes[kSteps / 2];
    // What the lane found: of its row, or of one of the steps.
    Scale found;

    __device__ __forceinline__ int row_of(int step) const { return step & (1 << p.row_bits) - 1; }
    __device__ __forceinline__ int column_of(int step) const {
        return ((step >> p.row_bits << p.warp_bits) + share) * kStep;
    }
    __device__ __forceinline__ bool exists(int step) const { return step < steps && present >> row_of(step) & 1; }

    __device__ __forceinline__ void find_present() {
        bool mine = lane < 1 << p.row_bits && source + lane < p.sources;
        if (mine && p.present != nullptr) mine = __ldcg(p.present + source + lane) >= 0;
        present = __ballot_sync(~0u, mine);
    }
    __device__ __forceinline__ void load(Raw<T>& to, int step) const {
        const int column = column_of(step) + lane * CHUNK;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (exists(step) && column < p.columns) {
            v = load_16(static_cast<const T*>(p.input) + static_cast<int64_t>(source + row_of(step)) * p.columns + column);
        }
        to.words[0] = v.x, to.words[1] = v.y, to.words[2] = v.z, to.words[3] = v.w;
    }
    __device__ __forceinline__ void load_all(int first) {
#pragma unroll
        for (int s = 0; s < kSteps; s++) load(raw[s], first + s);
    }

    // The scales of rows, by all of their warps.
    __device__ __forceinline__ void find_scales(uint32_t (&tops)[kWarps]) {
        uint32_t top[kSteps];
#pragma unroll
        for (int s = 0; s < kSteps; s++) top[s] = largest(raw[s]);
        // What is not kept is read again.
#pragma unroll 1
        for (int first = kSteps; first < steps; first += kSteps) {
            Raw<T> more[kSteps];
#pragma unroll
            for (int s = 0; s < kSteps; s++) load(more[s], first + s);
#pragma unroll
            for (int s = 0; s < kSteps; s++) top[s] = largest(more[s], top[s]);
        }
        uint32_t all = fold<kLanes>(top, lane);
        if (p.row_bits < 2) all = __vmaxu2(all, __shfl_xor_sync(~0u, all, kLanes / 2));
        if (p.row_bits < 1) all = __vmaxu2(all, __shfl_xor_sync(~0u, all, kLanes / 4));
        if (p.warp_bits > 0) {
            const int warp = threadIdx.x / 32, row = warp >> p.warp_bits, first = row << p.warp_bits;
            if (lane == 0) tops[warp] = all;
            // Absent rows' warps are gone.
            group_barrier(1 + row, 32 << p.warp_bits);
            for (int i = 0; i < 1 << p.warp_bits; i++) all = __vmaxu2(all, tops[first + i]);
        }
        found = found_scale<K>(one<T>(all));
    }

    // Codes of a step's columns.
    template <class Quotients>
    __device__ __forceinline__ void encode(const Raw<T>& of, bool has, uint32_t (&words)[2], Quotients quotients) const {
        float v[CHUNK], q[CHUNK];
        widen(of, v);
        quotients(v, q);
        if constexpr (kFound) {
            words[0] = found_codes<typename K::Elem>(q), words[1] = found_codes<typename K::Elem>(q + 4);
        } else {
            words[0] = four_codes<K>(q), words[1] = four_codes<K>(q + 4);
        }
        if (!has) words[0] = words[1] = 0;
    }
    __device__ __forceinline__ void encode(const Raw<T>& of, const Inverse& by, uint32_t (&words)[2]) const {
        encode(of, by.high != 0.f, words, [&](const float (&v)[CHUNK], float (&q)[CHUNK]) { quotients(v, by, q); });
    }
    __device__ __forceinline__ void encode(const Raw<T>& of, const Divisor& by, uint32_t (&words)[2]) const {
        encode(of, by.inverse != 0.f, words, [&](const float (&v)[CHUNK], float (&q)[CHUNK]) { divide<K, false>(v, by, q); });
    }

    // What the steps' columns are multiplied by, from the scales that lanes hold.
    __device__ __forceinline__ void invert(Inverse (&by)[kSteps]) {
        Scale reduced = found;
        const auto from = [&](float x, int s) { return __shfl_sync(~0u, x, (lane & ~(kLanes - 1)) + holder<kLanes>(s)); };
        if constexpr (std::is_same_v<T, __nv_bfloat16>) {
            // The second part of an inverse is no normal number where the first one is small.
            constexpr float kMuch = 0x1p80f;
            if (__any_sync(~0u, found.value >= kMuch)) {
#pragma unroll
                for (int s = 0; s < kSteps; s++) lowered(raw[s], from(found.value, s) >= kMuch);
                if (found.value >= kMuch) reduced.value *= 0x1p-64f;
            }
        }
        const Inverse own = inverse_of(reduced);
#pragma unroll
        for (int s = 0; s < kSteps; s++) by[s] = {from(own.high, s), from(own.low, s)};
    }
    __device__ __forceinline__ void encode_all() {
        uint32_t words[kSteps][2];
        if constexpr (kFound) {
            if constexpr (!kOfRow) {
                uint32_t top[kSteps];
#pragma unroll
                for (int s = 0; s < kSteps; s++) top[s] = largest(raw[s]);
                found = found_scale<K>(one<T>(fold<kLanes>(top, lane)));
            }
            Inverse by[kSteps];
            invert(by);
#pragma unroll
            for (int s = 0; s < kSteps; s++) encode(raw[s], by[s], words[s]);
        } else {
            const Divisor by = coding_divisor(found);
#pragma unroll
            for (int s = 0; s < kSteps; s++) encode(raw[s], by, words[s]);
        }
#pragma unroll
        for (int s = 0; s < kSteps; s += 2) {
            const uint32_t both[4] = {words[s][0], words[s][1], words[s + 1][0], words[s + 1][1]};
            codes[s / 2] = exchanged(both, lane);
        }
    }

    // Places that the row goes to, by lanes, and how many.
    __device__ __forceinline__ int2 places() const {
        if (p.places == nullptr) return make_int2(source, 1);
        const int mine = lane < p.copies ? __ldcg(p.places + static_cast<int64_t>(source) * p.copies + lane) : -1;
        return make_int2(mine, p.copies);
    }

    // Of a pair of steps a lane has 16 bytes of either; the rest of their place is the same for all pairs.
    __device__ __forceinline__ void store(int first, int row) const {
        const bool alone = p.row_bits == 0;
        const int half = lane % 4 / 2, chunk = lane / 4 * 2 + lane % 2, own_row = alone ? 0 : half;
        const int plane = chunk / 8 + 2 * (share + (alone ? half << p.warp_bits : 0)), line = row + own_row;
        uint4* to = p.codes + (static_cast<int64_t>(plane) * p.rows + line) * 8;
#pragma unroll
        for (int s = 0; s < kSteps; s += 2) {
            const int planes = 2 * (first + s >> p.row_bits << p.warp_bits), rows = row_of(s);
            const int64_t there = (static_cast<int64_t>(planes) * p.rows + rows) * 8;
            if (exists(first + s + half) && plane + planes < p.planes) to[there + (chunk % 8 ^ (line + rows & 7))] = codes[s / 2];
        }
    }
    __device__ __forceinline__ void store_scales(int first, int row) const {
        if constexpr (kOfRow) {
            // A lane for each row.
            const int of = held_by<kLanes>(lane) & (1 << p.row_bits) - 1;
            const bool writes = first == 0 && share == 0 && lane == holder<kLanes>(of);
            if (writes && present >> of & 1) p.scales[row + of] = found.value;
        } else if constexpr (kFound) {
            const int step = first + held_by<kLanes>(lane), column = column_of(step) + (lane & 16) * CHUNK;
            if (lane % 4 == 0 && exists(step) && column < p.columns) {
                p.scales[static_cast<int64_t>(column / K::kGroup) * p.rows + row + row_of(step)] = found.value;
            }
        }
    }
    __device__ __forceinline__ void write(int first, int2 places) {
#pragma unroll 1
        for (int i = 0; i < places.y; i++) {
            const int row = __shfl_sync(~0u, places.x, i);
            if (row < 0) continue;
            if constexpr (kByRow) {
                found = stored_scale(__ldcg(p.scales + row));
                encode_all();
            } else {
                store_scales(first, row);
            }
            store(first, row);
        }
    }
};

template <class T, class K, bool kByRow = false>
__device__ __forceinline__ void operands(const OperandsParams& p) {
    using R = Rows<T, K, kByRow>;
    __shared__ uint32_t tops[kWarps];
    const int warp = threadIdx.x / 32, share = warp & (1 << p.warp_bits) - 1;
    // What the grid ahead wrote last is what L2 still has.
    const int block = p.places != nullptr ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    const int source = (block * (kWarps >> p.warp_bits) + (warp >> p.warp_bits)) << p.row_bits;
    const int steps = (p.planes * 128 + kStep - 1) / kStep;
    const int own = (steps - share + (1 << p.warp_bits) - 1) >> p.warp_bits << p.row_bits;
    R rows{p, static_cast<int>(threadIdx.x % 32), share, source, own};
    // Rows that go to places are the layer's own input: that was complete when the plan was begun, which is the grid ahead,
    // so that their codes are made while it runs.
    const bool early = p.places != nullptr && p.present == nullptr;
    if (!early) {
        wait_for_previous_grid();
        release_next_grid();
    }
    rows.find_present();
    if (rows.present == 0) return;
    rows.load_all(0);
    if constexpr (K::kStored && !kByRow) rows.found = stored_scale(__ldcg(p.stored));
    if constexpr (R::kOfRow) rows.find_scales(tops);
    int2 places;
#pragma unroll 1
    for (int first = 0; first < own; first += kSteps) {
        const bool more = first + kSteps < own;
        if constexpr (!kByRow) {
            rows.encode_all();
            if (more) rows.load_all(first + kSteps);
        }
        if (first == 0) {
            if (early) {
                wait_for_previous_grid();
                release_next_grid();
            }
            places = rows.places();
        }
        rows.write(first, places);
        if (kByRow && more) rows.load_all(first + kSteps);
    }
}

}  // namespace

// grid (rows / those of a block)
#define MOE_ENTRY(name, suffix, ...)                                                        \
    extern "C" __global__ void __launch_bounds__(kThreads, 4) operands_##name##_##suffix(   \
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
