// Tiles of 64 tokens of unpacked weights, which wait for the tensor cores. Each of four warps takes 64 rows of its own by all
// of the tile's columns, so that an unpacked weight is used up to eight times.
//
// Two warps share a scheduler, and a product keeps its warp for six cycles: nothing else may stand in its way. The loop goes
// over whole stages with addresses that only constants are added to, is made for every number of columns and has next to no
// branches; what a step needs was read and unpacked in the step before. Two blocks on a multiprocessor: one multiplies while
// the other begins or ends.
//
// A lane reads no weights but those that it sent for itself: it sends for a stage's words one by one as those in their places
// have been read, and waits for its own copies alone. (Straight to registers they came too late: their loads outnumber what
// a warp can tell apart when it waits.) Tokens, which all warps read, have a ring of two stages; scales, too.
#pragma once
#include "epilogue.cuh"

namespace moe {

// copy_16 where `wanted`.
__device__ __forceinline__ void copy_16_if(uint32_t to, const void* from, bool wanted) {
    asm volatile(
        "{\n.reg .pred wanted;\nsetp.ne.s32 wanted, %2, 0;\n"
        "@wanted cp.async.cg.shared.global.L2::256B [%0], [%1], 16;\n}" ::"r"(to),
        "l"(from), "r"(static_cast<int>(wanted))
        : "memory");
}

template <int kN>
struct OwnRows {
    using S = Shape<kN>;
    static_assert(S::kWarpColumns == 1 && S::kWarpSlabs == 4 && kBlocks == 2, "");
    static constexpr int kSlabs = S::kWarpSlabs, kSteps = 4 * kSlabs;
    // A unit is half a block of a slab.
    static constexpr int kUnits = kSteps / 2;
    static constexpr int kBlockBytes = kN * kRowBytes, kStageBytes = kBlocks * kBlockBytes, kRingBytes = 2 * kStageBytes;
    // 16 rows of tokens are a group.
    static constexpr int kGroups = kN / 16, kGroupBytes = 16 * kRowBytes;
    // A warp's weights and scales of a stage.
    static constexpr int kSlabBytes = kBlocks * kCodeBytes, kWarpBytes = kSlabs * kSlabBytes, kWarpScales = kSlabs * kScaleBytes;
    static constexpr int kWeightsAt = kRingAt + kRingBytes, kScalesAt = kWeightsAt + S::kWarps * kWarpBytes;
    static constexpr int kKeptAt = kScalesAt + 2 * S::kWarps * kWarpScales;
    // Scales that belong to an operand wait in registers for the block's steps.
    static constexpr bool kOperandScales = Format::kScale == Scale::kE8m0 || Format::kScale == Scale::kE4m3;

    const GemmParams& p;
    const uint32_t memory;
    const int warp, lane;
    D dequant[kSlabs];
    Sum acc[kSlabs][S::kTiles][4];

    // Blocks from the one being multiplied on; the place of its stage in the ring.
    int left;
    uint32_t place;
    // Where this lane's words of the slabs come from next, and where they and its tokens lie.
    const char* codes[kSlabs];
    uint32_t words, from_token;
    uint4 w[Q::kWords];
    uint2 operand_scales[kSlabs];

    __device__ __forceinline__ OwnRows(const GemmParams& params, const Task& task, uint32_t shared, int its_warp)
        : p(params), memory(shared), warp(its_warp), lane(threadIdx.x & 31), acc{}, left(params.weights.blocks), place(0),
          words(shared + kWeightsAt + its_warp * kWarpBytes + lane * 16),
          from_token(shared + kRingAt + token_offset(task.start, lane >> 2, lane)), w{}, operand_scales{} {
        const Slabs slab{p.weights, task.expert, task.row_tile * S::kSlabs + warp * kSlabs};
#pragma unroll
        for (int s = 0; s < kSlabs; s++) {
            codes[s] = slab(s) + lane * 16;
            dequant[s].begin();
            if constexpr (D::kUnits) store_unit(s);
        }
        keep({p.x + (long long)(task.start + row()) * kRowBytes + lane % 8 * 16, slab(lane / 8) + kSlabBytes + lane % 8 * 16});
    }

    __device__ __forceinline__ int stage_bytes() const { return kSlabBytes + 8 * p.scales.stride; }
    // The thread's row of every group of tokens.
    __device__ __forceinline__ int row() const { return warp * 4 + lane / 8; }

    // What a thread sends for next: its part of the first group of tokens, and of its warp's scales, where there are such.
    // In shared memory, since registers are scarce; the sums' units, too, but where they change.
    struct Unsent {
        const char *tokens, *scales;
    };
    static constexpr int kUnitsAt = kKeptAt + S::kThreads * sizeof(Unsent);
    __device__ __forceinline__ void keep(Unsent u) const {
        const unsigned long long t = reinterpret_cast<unsigned long long>(u.tokens), s = reinterpret_cast<unsigned long long>(u.scales);
        store_16(memory + kKeptAt + threadIdx.x * sizeof(Unsent), make_uint4(t, t >> 32, s, s >> 32));
    }
    __device__ __forceinline__ Unsent kept() const {
        const uint4 v = read_shared<uint4>(memory + kKeptAt + threadIdx.x * sizeof(Unsent));
        return {reinterpret_cast<const char*>(v.x | static_cast<unsigned long long>(v.y) << 32),
                reinterpret_cast<const char*>(v.z | static_cast<unsigned long long>(v.w) << 32)};
    }
    __device__ __forceinline__ uint32_t unit_at(int s) const { return memory + kUnitsAt + (S::kThreads * s + threadIdx.x) * 8; }
    __device__ __forceinline__ void load_unit(int s) {
        const uint2 v = read_shared<uint2>(unit_at(s));
        dequant[s].unit[0] = __uint_as_float(v.x), dequant[s].unit[1] = __uint_as_float(v.y);
    }
    __device__ __forceinline__ void store_unit(int s) const {
        store_8(unit_at(s), make_uint2(__float_as_uint(dequant[s].unit[0]), __float_as_uint(dequant[s].unit[1])));
    }

    // A block's tokens, a group at a time, of which every warp sends for four. Where a tile is made for its number of columns,
    // only its last group may lack rows.
    template <int kUsed, bool kRegular>
    static __device__ __forceinline__ void send_block(uint32_t to, const char* from, int rows) {
#pragma unroll
        for (int i = 0; i < (kRegular ? kUsed / 2 : kGroups); i++) {
            if ((kRegular && i < kUsed / 2 - 1) || 16 * i < rows) copy_16(to + i * kGroupBytes, from + i * kGroupBytes);
        }
    }
    // Tokens and scales of the stage that begins so many blocks before the end, as far as there is one, to a place.
    template <int kUsed, bool kRegular>
    __device__ __forceinline__ void send_stage(int blocks, uint32_t to_place) {
        if (blocks <= 0) return;
        Unsent u = kept();
        const uint32_t to = memory + kRingAt + to_place + warp * (4 * kRowBytes) + lane * 16;
        const int rows = read_shared<uint32_t>(memory + 8) - row();
        send_block<kUsed, kRegular>(to, u.tokens, rows);
        u.tokens += p.plane;
        if (blocks > 1) send_block<kUsed, kRegular>(to + kBlockBytes, u.tokens, rows);
        u.tokens += p.plane;
        if constexpr (kScaleBytes > 0) {
            // A last stage of one block has its scales behind that one.
            if (blocks == 1) u.scales -= kCodeBytes;
            const uint32_t at = scales_at(to_place) + lane / 8 * kScaleBytes + lane % 8 * 16;
            if (lane % 8 * 2 < p.scales.stride) copy_16(at, u.scales);
            if (kScaleBytes > 128 && lane % 8 * 2 + 16 < p.scales.stride) copy_16(at + 128, u.scales + 128);
            u.scales += stage_bytes();
        }
        keep(u);
    }
    static __device__ __forceinline__ constexpr int offset_of(int nth, int unit) {
        return unit % kSlabs * kSlabBytes + nth * kCodeBytes;
    }
    // Sends for what goes to the place of a unit of a stage's block kNth when that has been read.
    template <int kNth>
    __device__ __forceinline__ void send_unit(int unit, bool exists) {
        const int s = unit % kSlabs, half = unit / kSlabs;
        // A lane's words of 4-bit codes are a whole block's.
        const int part = Q::kWords == 1 ? 0 : half * 512;
        if (Q::kWords > 1 || half == 1) {
            copy_16_if(words + offset_of(kNth, unit) + part, codes[s] + kNth * kCodeBytes + part, exists);
        }
        if (kNth == kBlocks - 1 && half == 1) codes[s] += stage_bytes();
    }
    template <int kNth>
    __device__ __forceinline__ void load_words(int unit) {
        codes_of(words + offset_of(kNth, unit), unit / kSlabs, w);
    }

    // The first stage, and the second one's tokens.
    template <int kUsed, bool kRegular>
    __device__ __forceinline__ void fill() {
#pragma unroll
        for (int unit = 0; unit < kUnits; unit++) send_unit<0>(unit, true);
        send_stage<kUsed, kRegular>(left, 0);
        commit_copies();
#pragma unroll
        for (int unit = 0; unit < kUnits; unit++) send_unit<1>(unit, left > 1);
        send_stage<kUsed, kRegular>(left - kBlocks, kStageBytes);
        commit_copies();
        wait_for_copies<1>();
        __syncthreads();
    }
    // What the next block needs is there: it was sent for at least a block ago. When all warps have read a stage's tokens, the
    // one after the next goes to their place.
    template <int kUsed, bool kRegular, bool kStageEnds>
    __device__ __forceinline__ void turn() {
        wait_for_copies<0>();
        if constexpr (kStageEnds) {
            __syncthreads();
            send_stage<kUsed, kRegular>(left - 1 - kBlocks, place);
            place = kStageBytes - place;
        }
        commit_copies();
    }

    __device__ __forceinline__ uint32_t scales_at(uint32_t of_place) const {
        return memory + kScalesAt + (of_place > 0 ? S::kWarps * kWarpScales : 0) + warp * kWarpScales;
    }
    // Of the stage in place.
    __device__ __forceinline__ uint32_t lane_scales() const { return scales_at(place) + (lane >> 2) * p.scales.stride; }
    template <int kNth>
    __device__ __forceinline__ void load_operand_scales() {
        if constexpr (kOperandScales) {
            const uint32_t at = lane_scales();
#pragma unroll
            for (int s = 0; s < kSlabs; s++) operand_scales[s] = D::operand_scales_of(at + s * kScaleBytes, kNth);
        }
    }
    // Enters the scales of the stage's 32 columns `quarter` of all slabs, as far as the sums change their units there and
    // there are such columns. Without branches, across which the compiler would move what it has no registers for.
    template <bool kRegular>
    __device__ __forceinline__ void enter_sums(int quarter, bool exist) {
        if constexpr (D::kUnits) {
            if (kRegular && quarter > 0) return;
            const bool moves = exist && (kRegular || D::moves(quarter, p.scales));
            const uint32_t at = lane_scales();
            uint2 of[kSlabs];
#pragma unroll
            for (int s = 0; s < kSlabs; s++) {
                of[s] = D::scales_of(at + s * kScaleBytes, quarter, p.scales);
                // As where there is no scale.
                if (!moves) of[s] = make_uint2(0, 0);
            }
#pragma unroll
            for (int s = 0; s < kSlabs; s++) {
                const uint32_t low = dequant[s].factor[0], high = dequant[s].factor[1];
                load_unit(s);
                enter(dequant[s], of[s], quarter, p.scales, acc[s]);
                store_unit(s);
                if (D::kZeros && !kRegular && !moves) dequant[s].factor[0] = low, dequant[s].factor[1] = high;
            }
        }
    }
    // A step's operand: 16 rows by 16 columns.
    template <int kNth>
    __device__ __forceinline__ void unpack(int step, uint32_t (&a)[4]) {
        const int half = step / (2 * kSlabs), s = step / 2 % kSlabs, h = step % 2;
        operand_of<Q>(w, 2 * half + h, a);
        dequant[s].enter_operand(operand_scales[s], kNth, 2 * half + h);
        dequant[s].finish(a);
    }
    static __device__ __forceinline__ void load_token(uint32_t from, int n, uint32_t (&b)[4]) {
        token_of(from + S::column(0, n) * kRowBytes, b);
    }

    // Block kNth of a stage. The next one's first tokens and operand are there in the end; where there is no next one, they
    // are old bytes, and not used.
    template <int kUsed, bool kRegular, int kNth>
    __device__ __forceinline__ void multiply_block(uint32_t (&b)[kUsed][4], uint32_t (&a)[2][4]) {
        constexpr int kNext = (kNth + 1) % kBlocks;
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
            const int h = step % 2, then = step / 2 + 1;
            // The last steps that read a half's tokens.
            const bool half_ends = step == kSteps / 2 - 1, ends = step == kSteps - 1;
            if (step == kSteps - 2) turn<kUsed, kRegular, kNext == 0>();
            const uint32_t from = half_ends ? ((from_token + place) ^ 64) + kNth * kBlockBytes
                                            : from_token + place + kNext * kBlockBytes;
#pragma unroll
            for (int n = 0; n < kUsed; n++) {
                Product::mma(acc[step / 2 % kSlabs][n], a[h], b[n][2 * h], b[n][2 * h + 1]);
                if (half_ends || ends) load_token(from, n, b[n]);
            }
            if (half_ends) enter_sums<kRegular>(2 * kNth + 1, true);
            if (ends) enter_sums<kRegular>(2 * kNext, left > 1);
            if (ends) {
                unpack<kNext>(0, a[0]);
            } else {
                unpack<kNth>(step + 1, a[(step + 1) % 2]);
            }
            if (step == kSteps - 2) load_operand_scales<kNext>();
            if (h == 0 && then < kUnits) load_words<kNth>(then);
            if (h == 0 && then == kUnits) load_words<kNext>(0);
            if (h == 1 && then < kUnits) send_unit<kNth>(then, left > kBlocks);
            if (h == 1 && then == kUnits) send_unit<kNext>(0, left > kBlocks + 1);
        }
        left--;
    }

    // The sums, of kUsed times eight columns. kRegular: sums change their units with stages alone.
    template <int kUsed, bool kRegular = true>
    __device__ __forceinline__ void multiply() {
        fill<kUsed, kRegular>();
        load_words<0>(0);
        uint32_t b[kUsed][4], a[2][4];
#pragma unroll
        for (int n = 0; n < kUsed; n++) load_token(from_token, n, b[n]);
        load_operand_scales<0>();
        enter_sums<kRegular>(0, true);
        unpack<0>(0, a[0]);
        send_unit<0>(0, left > kBlocks);
#pragma unroll 1
        while (true) {
            multiply_block<kUsed, kRegular, 0>(b, a);
            if (left == 0) break;
            multiply_block<kUsed, kRegular, 1>(b, a);
            if (left == 0) break;
        }
        if constexpr (D::kUnits) {
#pragma unroll
            for (int s = 0; s < kSlabs; s++) load_unit(s);
        }
    }
};

template <int kN>
__device__ __forceinline__ void own_rows(const GemmParams& p) {
    const uint32_t memory = static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
    wait_for_previous_grid();
    release_next_grid();
    const Task task = task_of(p);
    if (task.expert < 0) return;
    // Before the ring until the sums are done: registers are scarce.
    keep_task(memory, task);
    __syncthreads();
    OwnRows<kN> gemm(p, task, memory, uniform(threadIdx.x >> 5));
    // Pairs of eight columns that hold tokens.
    const int pairs = (task.count + 15) / 16;
    if (D::kUnits && p.scales.groups > 1) {
        gemm.template multiply<8, false>();
    } else {
        switch (pairs) {
            case 1: gemm.template multiply<2>(); break;
            case 2: gemm.template multiply<4>(); break;
            case 3: gemm.template multiply<6>(); break;
            default: gemm.template multiply<8>();
        }
    }
    write_kept<kN>(p, memory, gemm);
}

}  // namespace moe
