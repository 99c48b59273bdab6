// Streaming packed weights through the tensor cores: the loop that every decode kernel is.
//
// A warp brings chunks of a slab to a ring of its own in shared memory and multiplies them some chunks later. The bulk
// copies need no registers while they are under way, and warps never wait for one another. Few large copies: with
// more than about a hundred under way in a multiprocessor, all of them become several times slower.
#pragma once
#include "format.cuh"
#include "matrix.cuh"
#include "ptx.cuh"

namespace moe {

constexpr int kStage = 128;

template <class Q, class S>
struct StageBytes {
    static constexpr int kCodes = Q::kWords * 512;  // of a block
    static constexpr int kScales = 8 * 4 * S::kRegisters;
    static constexpr int kAll = 2 * kCodes + kScales;
};

// A block's part of the other operand: x[2 s], x[2 s + 1] for step s.
struct Operand {
    uint32_t x[8];
};

// Whether products need the sums of the tokens' scale groups: codes have an offset or zero points.
template <class Q, class S>
constexpr bool kNeedsSums = S::kZero || Q::kOffset != 0.f;

// 2^80, twice, as bf16: see kLift.
constexpr uint32_t kLiftPair = 0x67806780u;

// Columns far away, in global memory: every chunk's part is loaded before the wait for the chunk's weights.
template <class C, class Q, class S, int kStages, bool kLift>
struct FarTokens {
    static constexpr bool kPrepared = false, kDigits = false, kApart = false;
    const char* row;  // the lane's column; null for zeros
    int length;       // elements that exist
    Operand o[kStages][2];

    __device__ __forceinline__ void load(int chunk, int t) {
#pragma unroll
        for (int f = 0; f < kStages; f++) {
#pragma unroll
            for (int b = 0; b < 2; b++) {
                const int first = ((chunk * kStages + f) * 2 + b) * kBlock, left = row != nullptr ? length - first : 0;
                const char* from = row + 2 * first;
                uint32_t(&x)[8] = o[f][b].x;
                if constexpr (S::kGroups == 8) {
#pragma unroll
                    for (int s = 0; s < 4; s++) {
                        uint2 v = make_uint2(0, 0);
                        if (16 * s + 4 * t < left) v = load_8(from + 32 * s + 8 * t);
                        x[2 * s] = v.x, x[2 * s + 1] = v.y;
                    }
                } else {
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        uint4 v = make_uint4(0, 0, 0, 0);
                        if (32 * j + 8 * t < left) v = load_16(from + 64 * j + 16 * t);
                        x[4 * j] = v.x, x[4 * j + 1] = v.y, x[4 * j + 2] = v.z, x[4 * j + 3] = v.w;
                    }
                }
            }
        }
    }
    __device__ __forceinline__ Operand operand(int, int f, int b, int) const {
        Operand x = o[f][b];
        if constexpr (kLift) {
#pragma unroll
            for (int i = 0; i < 8; i++) x.x[i] = C::mul(x.x[i], kLiftPair);
        }
        return x;
    }
    __device__ __forceinline__ float sum(int, int) const { return 0.f; }
};

// Columns in shared memory, prepared (decode/tokens.cuh): whole blocks, lifted, with the sums of their scale groups.
template <class S>
struct NearTokens {
    static constexpr bool kPrepared = true, kDigits = false, kApart = false;
    uint32_t row;      // the lane's column
    uint32_t sums[2];  // of the columns whose results the lane holds

    __device__ __forceinline__ void load(int, int) {}
    __device__ __forceinline__ Operand operand(int stage, int, int b, int t) const {
        const uint32_t at = row + stage * (2 * kStage) + b * (2 * kBlock);
        Operand o;
        if constexpr (S::kGroups == 8) {
#pragma unroll
            for (int s = 0; s < 4; s++) {
                const uint2 v = read_shared<uint2>(at + 32 * s + 8 * t);
                o.x[2 * s] = v.x, o.x[2 * s + 1] = v.y;
            }
        } else {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const uint4 v = read_shared<uint4>(at + 64 * j + 16 * t);
                o.x[4 * j] = v.x, o.x[4 * j + 1] = v.y, o.x[4 * j + 2] = v.z, o.x[4 * j + 3] = v.w;
            }
        }
        return o;
    }
    // Of a scale group, counted from the row's first; with kHalves a stage's unit.
    __device__ __forceinline__ float sum(int column, int group) const {
        return read_float(sums[column] + 4 * group);
    }
};

// Whether a lone token's scale groups of 16 get columns of the product for themselves, with zeros for the others' numbers: a
// lane then scales what two columns hold of a stage, where it would scale eight groups' sums.
template <class S>
constexpr bool kGroupsApart = S::kGroups == 8;

// Such a token's row in shared memory, and 128 bytes of zeros. Of each group, what the four lanes of a column hold in one
// register of the operand lies in 16 bytes, the other register's behind it.
struct ApartTokens {
    static constexpr bool kPrepared = true, kDigits = false, kApart = true;
    // A lane gives the address of every fourth line of 16 bytes for one column: the row's where the group is the column's.
    uint32_t own, zeros[2];
    int mine;  // which of a stage's four loads has the lane's own line; none if negative

    // `all` are the rows of which one is at `row`, a multiple of 64 bytes further on.
    __device__ __forceinline__ ApartTokens(uint32_t row, uint32_t all, uint32_t zero, int lane) {
        const int line = lane >> 3, step = (lane & 7) - (line >> 1);
        mine = step & 1 ? -1 : step >> 1;
        own = row + 16 * (4 * mine + line);
        // In other banks than the line that is not zeros.
        const uint32_t bank = (line + 1 + ((all - zero) >> 4)) & 7;
        zeros[0] = zero + 16 * bank, zeros[1] = zero + 16 * (bank ^ 4);
    }
    __device__ __forceinline__ void load(int, int) {}
    __device__ __forceinline__ Operand operand(int stage, int b) const {
        Operand o;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const uint32_t at = mine == 2 * b + j ? own + stage * (2 * kStage) : zeros[j];
            load_matrices(at, o.x[4 * j], o.x[4 * j + 1], o.x[4 * j + 2], o.x[4 * j + 3]);
        }
        return o;
    }

    // Eight columns, a group's first or (`odd`) last, as they go into such a row: `at` is where they would lie in their order.
    // Who moves the others must have read them.
    static __device__ __forceinline__ void store(uint32_t at, int odd, const uint4& x) {
        const uint32_t to = at - 8 * odd;
        store_8(to, make_uint2(x.x, x.z)), store_8(to + 16, make_uint2(x.y, x.w));
    }
    // The sum of what the columns hold, in the lanes with t = 0.
    static __device__ __forceinline__ void combine(float (&acc)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            acc[i] += __shfl_down_sync(~0u, acc[i], 2);
            acc[i] += __shfl_down_sync(~0u, acc[i], 1);
        }
    }
};

// c += a (16 rows x 32, bytes, signed or not) * b (32 x 8 columns, signed bytes), in the register layout of the
// instruction.
template <bool kSigned>
__device__ __forceinline__ void mma_bytes(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (kSigned) {
        asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// A lone token in shared memory, as three signed digits of base 256 (decode/digits.cuh), of which columns 0, 1 and 3 of
// the product hold one each.
struct DigitTokens {
    static constexpr bool kPrepared = true, kDigits = true, kApart = false;
    uint32_t row;    // the lane's digit, and its columns of a stage
    uint32_t units;  // of a stage: what the first digit counts
    uint32_t sums;   // of a scale group, in those units

    __device__ __forceinline__ void load(int, int) {}
};

// A warp's ring, whose places hold chunks of kStages stages. Behind a chunk's weights there is room for kExtra bytes.
template <class C, class Q, class S, int kStages, int kExtra>
struct Ring {
    using Bytes = StageBytes<Q, S>;
    static constexpr int kChunk = kStages * Bytes::kAll, kPlace = kChunk + kExtra;
    uint32_t base, barriers;
    int depth;
    // The place of the next chunk to multiply, and whether it came round an odd number of times.
    int place = 0, phase = 0;

    // What a warp needs of shared memory.
    static __device__ __forceinline__ int bytes(int depth) { return depth * (kPlace + 16); }

    __device__ __forceinline__ Ring(uint32_t memory, int depth, int lane) : base(memory), depth(depth) {
        barriers = base + depth * kPlace;
#if MOE_BULK
        if (lane < depth) {
            barrier_init(barriers + 8 * lane, 1);
            barrier_init_done();
        }
        __syncwarp();
#endif
    }

    static __device__ __forceinline__ int chunks(const Matrix& m) { return (m.blocks + 2 * kStages - 1) / (2 * kStages); }

    // Sends for a chunk of a slab, to a place that all lanes have left; for its rows' factors, too, if given. Where the
    // engine copies, a lane that is told 0 does, and lanes may be told so for a place each; else all of the warp do.
    __device__ __forceinline__ void fetch(int to, const Matrix& m, const char* slab, int chunk, const float* factors,
                                          const float* bias, int lane) const {
        const uint32_t at = base + to * kPlace;
        const char* from = slab + chunk * kChunk;
        const int bytes = min(kChunk, m.slab_bytes - chunk * kChunk);
#if MOE_BULK
        if (lane == 0) {
            const uint32_t barrier = barriers + 8 * to;
            if (kExtra == 0 || factors == nullptr) {
                barrier_expect(barrier, bytes);
            } else {
                barrier_expect(barrier, bytes + (bias != nullptr ? 128 : 64));
            }
            copy_bulk_once(at, from, bytes, barrier);
            if (kExtra > 0 && factors != nullptr) {
                copy_bulk(at + kChunk, factors, 64, barrier);
                if (bias != nullptr) copy_bulk(at + kChunk + 64, bias, 64, barrier);
            }
        }
#else
        for (int i = lane * 16; i < bytes; i += 512) copy_16(at + i, from + i);
        if (kExtra > 0 && factors != nullptr && lane < 4) {
            copy_16(at + kChunk + 16 * lane, factors + 4 * lane);
            if (bias != nullptr) copy_16(at + kChunk + 64 + 16 * lane, bias + 4 * lane);
        }
#endif
    }

    // Ends the fetch of one chunk, or of none.
    __device__ __forceinline__ void commit() const {
#if !MOE_BULK
        commit_copies();
#endif
    }

    // Waits for the next chunk; `depth` were committed, this one first.
    __device__ __forceinline__ void wait() const {
#if MOE_BULK
        barrier_wait(barriers + 8 * place, phase);
#else
        wait_for_copies(depth - 1);
#endif
        __syncwarp();
    }

    // What came behind the chunk.
    __device__ __forceinline__ uint32_t extra() const { return base + place * kPlace + kChunk; }

    // All lanes are done with the chunk: `refill` may send for another to its place.
    template <class F>
    __device__ __forceinline__ void leave(F refill) {
        __syncwarp();
        refill(place);
        if (++place == depth) place = 0, phase ^= 1;
    }

    // acc += 16 rows times the tokens' columns, for the slab's `stage`th stage, the chunk's `f`th, at `at`. kBlocks is
    // 2, or 1 for the end of a slab. kOne: a single token, which all columns hold.
    template <bool kOne, int kBlocks, class X>
    static __device__ __forceinline__ void multiply(uint32_t at, const Matrix& m, const X& tokens, int stage, int f,
                                                    int lane, float (&acc)[4]) {
        constexpr bool kSums = kNeedsSums<Q, S>, kHalves = Q::kHalves && X::kPrepared;
        static_assert(!kSums || !kHalves, "");
        // Steps per scale group; products of a group are summed apart and then scaled.
        constexpr int kGroupSteps = S::kGroups == 0 ? 8 : 8 / S::kGroups;
        const uint32_t codes = at + lane * 16;
        uint32_t scales[S::kRegisters + 1];
        read_scales(at + kBlocks * Bytes::kCodes + (lane >> 2) * (4 * S::kRegisters), scales);
        float part[4] = {0.f, 0.f, 0.f, 0.f}, sums[4] = {0.f, 0.f, 0.f, 0.f};
        auto scale_group = [&](int i) {
            float scale[2] = {1.f, 1.f}, zero[2] = {8.f, 8.f};
            S::get(scales, i, m.scale_bf16, scale, zero);
            if constexpr (kHalves) {
                // `sums` is the stage's sum in its unit.
#pragma unroll
                for (int j = 0; j < (kOne ? 1 : 2); j++) {
                    sums[j] = S::kGroups == 0 ? part[j] : fmaf(part[j], scale[0], sums[j]);
                    sums[2 + j] = S::kGroups == 0 ? part[2 + j] : fmaf(part[2 + j], scale[1], sums[2 + j]);
                }
                part[0] = part[1] = part[2] = part[3] = 0.f;
                return;
            }
            if constexpr (kSums) {
                if constexpr (X::kPrepared) {
                    sums[0] = sums[2] = tokens.sum(0, stage * S::kGroups + i);
                    if constexpr (!kOne) sums[1] = sums[3] = tokens.sum(1, stage * S::kGroups + i);
                }
                const float off[2] = {-(zero[0] + Q::kOffset), -(zero[1] + Q::kOffset)};
                part[0] = fmaf(off[0], sums[0], part[0]), part[1] = fmaf(off[0], sums[1], part[1]);
                part[2] = fmaf(off[1], sums[2], part[2]), part[3] = fmaf(off[1], sums[3], part[3]);
                sums[0] = sums[1] = sums[2] = sums[3] = 0.f;
            }
            acc[0] = fmaf(part[0], scale[0], acc[0]), acc[2] = fmaf(part[2], scale[1], acc[2]);
            if constexpr (!kOne) acc[1] = fmaf(part[1], scale[0], acc[1]), acc[3] = fmaf(part[3], scale[1], acc[3]);
            part[0] = part[1] = part[2] = part[3] = 0.f;
        };
        // Everything of the stage first, where registers allow it.
        constexpr int kHeld = Q::kWords > 2 || S::kGroups > 4 ? 1 : kBlocks;
        uint4 w[kHeld][Q::kWords];
        Operand o[kHeld];
        auto read = [&](int b) {
#pragma unroll
            for (int i = 0; i < Q::kWords; i++) w[b % kHeld][i] = read_shared<uint4>(codes + b * Bytes::kCodes + i * 512);
            o[b % kHeld] = tokens.operand(stage, f, b, lane & 3);
        };
#pragma unroll
        for (int b = 0; b < kHeld; b++) read(b);
#pragma unroll
        for (int b = 0; b < kBlocks; b++) {
            if (b >= kHeld) read(b);
            const uint32_t(&x)[8] = o[b % kHeld].x;
#pragma unroll
            for (int s = 0; s < 4; s++) {
                uint32_t a[4];
                if constexpr (kHalves) {
                    Q::halves(w[b % kHeld], s, a);
                    F16::mma(part, a, x[2 * s], x[2 * s + 1]);
                } else {
                    Q::step(w[b % kHeld], s, a);
                    C::mma(S::kGroups == 0 ? acc : part, a, x[2 * s], x[2 * s + 1]);
                }
                if constexpr (kSums && !X::kPrepared) {
                    const uint32_t ones[4] = {C::kOnes, C::kOnes, C::kOnes, C::kOnes};
                    C::mma(sums, ones, x[2 * s], x[2 * s + 1]);
                }
                if constexpr (S::kGroups > 1) {
                    if ((4 * b + s + 1) % kGroupSteps == 0) scale_group((4 * b + s) / kGroupSteps);
                }
            }
        }
        if constexpr (S::kGroups == 1 || (S::kGroups == 0 && kHalves)) scale_group(0);
        if constexpr (kHalves) {
#pragma unroll
            for (int j = 0; j < (kOne ? 1 : 2); j++) {
                const float unit = tokens.sum(j, stage);
                acc[j] = fmaf(sums[j], unit, acc[j]), acc[2 + j] = fmaf(sums[2 + j], unit, acc[2 + j]);
            }
        }
    }

    // The same of a lone token whose scale groups have columns of their own. acc[0] and acc[2] then hold what the lane's two
    // columns have of rows g and g + 8.
    template <int kBlocks, class X>
    static __device__ __forceinline__ void multiply_apart(uint32_t at, const X& tokens, int stage, int lane, float (&acc)[4]) {
        static_assert(!kNeedsSums<Q, S> && !Q::kHalves && S::kGroups == 8 && S::kRegisters == 4, "");
        uint4 w[kBlocks][Q::kWords];
        Operand o[kBlocks];
#pragma unroll
        for (int b = 0; b < kBlocks; b++) {
#pragma unroll
            for (int i = 0; i < Q::kWords; i++) w[b][i] = read_shared<uint4>(at + lane * 16 + b * Bytes::kCodes + i * 512);
            o[b] = tokens.operand(stage, b);
        }
        // Of columns 2 t and 2 t + 1.
        const uint32_t from = at + kBlocks * Bytes::kCodes + (lane >> 2) * 16 + 2 * (lane & 3);
        const uint32_t codes[2] = {read_shared_16(from), read_shared_16(from + 8)};
        // Two sums, as one would be a chain of eight products.
        float even[4] = {0.f, 0.f, 0.f, 0.f}, odd[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int b = 0; b < kBlocks; b++) {
#pragma unroll
            for (int s = 0; s < 4; s++) {
                uint32_t a[4];
                Q::step(w[b], s, a);
                C::mma(s % 2 == 0 ? even : odd, a, o[b].x[2 * s], o[b].x[2 * s + 1]);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float2 scale = S::two(codes[i]);
            acc[2 * i] = fmaf(even[2 * i] + odd[2 * i], scale.x, acc[2 * i]);
            acc[2 * i] = fmaf(even[2 * i + 1] + odd[2 * i + 1], scale.y, acc[2 * i]);
        }
    }

    // The same of a lone token's digits: exact products of integers, of a scale group at a time. acc: (row g, columns 2 t and
    // 2 t + 1), (row g + 8, the same).
    template <int kBlocks, class X>
    static __device__ __forceinline__ void multiply_digits(uint32_t at, const Matrix& m, const X& tokens, int stage, int lane,
                                                           float (&acc)[4]) {
        constexpr bool kSums = kNeedsSums<Q, S>;
        constexpr int kGroups = S::kGroups == 0 ? 1 : S::kGroups;
        constexpr int kProducts = 4 / kGroups;  // of a scale group
        uint32_t scales[S::kRegisters + 1];
        read_scales(at + kBlocks * Bytes::kCodes + (lane >> 2) * (4 * S::kRegisters), scales);
        const float unit = read_float(tokens.units + 4 * stage);
        uint4 w[kBlocks][Q::kWords], x[kBlocks];
#pragma unroll
        for (int b = 0; b < kBlocks; b++) {
#pragma unroll
            for (int i = 0; i < Q::kWords; i++) w[b][i] = read_shared<uint4>(at + lane * 16 + b * Bytes::kCodes + i * 512);
            x[b] = read_shared<uint4>(tokens.row + stage * kStage + 16 * b);
        }
        int part[4] = {0, 0, 0, 0};
        auto scale_group = [&](int i) {
            float scale[2] = {1.f, 1.f}, zero[2] = {Q::kZeroCode, Q::kZeroCode}, n[4];
            S::get(scales, i, m.scale_bf16, scale, zero);
#pragma unroll
            for (int k = 0; k < 4; k++) n[k] = (float)part[k], part[k] = 0;
            scale[0] *= unit, scale[1] *= unit * Q::kSecondRow;
            if constexpr (kSums) {
                const float sum = read_float(tokens.sums + 4 * (stage * kGroups + i));
                n[0] = fmaf(-zero[0], sum, n[0]), n[2] = fmaf(-zero[1] / Q::kSecondRow, sum, n[2]);
            }
            acc[0] = fmaf(n[0], scale[0], acc[0]), acc[1] = fmaf(n[1], scale[0], acc[1]);
            acc[2] = fmaf(n[2], scale[1], acc[2]), acc[3] = fmaf(n[3], scale[1], acc[3]);
        };
#pragma unroll
        for (int b = 0; b < kBlocks; b++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                uint32_t a[4];
                Q::bytes(w[b], j, a);
                mma_bytes<Q::kSigned>(part, a, word(x[b], 2 * j), word(x[b], 2 * j + 1));
                if constexpr (kGroups > 1) {
                    if ((2 * b + j + 1) % kProducts == 0) scale_group((2 * b + j) / kProducts);
                }
            }
        }
        if constexpr (kGroups == 1) scale_group(0);
    }

    // One chunk: waits for it and multiplies. The place is to be left then.
    template <bool kOne, class X>
    __device__ __forceinline__ void turn(const Matrix& m, int chunk, X& tokens, int lane, float (&acc)[4]) const {
        tokens.load(chunk, lane & 3);
        int blocks = m.blocks - 2 * kStages * chunk;  // that are left
        wait();
        uint32_t at = base + place * kPlace;
        // Prepared tokens want no registers of their own, so that the code can be short: what a kernel runs for the first
        // time comes slowly.
#pragma unroll(X::kPrepared ? 1 : kStages)
        for (int f = 0; f < kStages; f++) {
            const int stage = chunk * kStages + f;
            if constexpr (X::kDigits) {
                if (blocks >= 2) {
                    multiply_digits<2>(at, m, tokens, stage, lane, acc);
                } else if (blocks == 1) {
                    multiply_digits<1>(at, m, tokens, stage, lane, acc);
                }
            } else if constexpr (X::kApart) {
                if (blocks >= 2) {
                    multiply_apart<2>(at, tokens, stage, lane, acc);
                } else if (blocks == 1) {
                    multiply_apart<1>(at, tokens, stage, lane, acc);
                }
            } else if (blocks >= 2) {
                multiply<kOne, 2>(at, m, tokens, stage, f, lane, acc);
            } else if (blocks == 1) {
                multiply<kOne, 1>(at, m, tokens, stage, f, lane, acc);
            }
            at += Bytes::kAll, blocks -= 2;
        }
    }

    static __device__ __forceinline__ void read_scales(uint32_t at, uint32_t (&r)[S::kRegisters + 1]) {
        if constexpr (S::kRegisters == 1) {
            r[0] = read_shared<uint32_t>(at);
        } else if constexpr (S::kRegisters == 2) {
            const uint2 v = read_shared<uint2>(at);
            r[0] = v.x, r[1] = v.y;
        } else {
#pragma unroll
            for (int i = 0; i < S::kRegisters; i += 4) {
                const uint4 v = read_shared<uint4>(at + 4 * i);
                r[i] = v.x, r[i + 1] = v.y, r[i + 2] = v.z, r[i + 3] = v.w;
            }
        }
    }
};

}  // namespace moe
