// Routing: logits [T, E] to expert ids and weights [T, k], one warp per token.
//
// Gives the very bits of src/kernel/routing.rs on the CPU: the same operations in the same order, none of them fused
// (the __f*_rn functions never are). Equal scores go to the lowest index.

#include <cstdint>

namespace {

constexpr unsigned FULL = 0xffffffffu;
constexpr int WARPS = 4;  // tokens of a block
constexpr float INF = __builtin_huge_valf();

// The order of RoutingMethod::ALL.
enum Method {
    DEFAULT,
    RENORMALIZE,
    RENORMALIZE_NAIVE,
    TOP_K,
    SIGMOID,
    SIGMOID_RENORM,
    LLAMA4,
    DEEPSEEK_V3,
    MINIMAX2,
    DEEPSEEK_V4
};

struct Params {
    int tokens, experts, topk, method;
    int groups, topk_groups, normalize;
    float scaling;
};

__device__ __forceinline__ float power_of_two(int n) { return __int_as_float((n + 127) << 23); }

__device__ __forceinline__ float exp_rn(float x) {
    if (x != x) return x;
    if (x > 88.72284f) return INF;
    if (x < -103.97208f) return 0.0f;
    const float round = 12582912.0f;
    const float n = __fsub_rn(__fadd_rn(__fmul_rn(x, 1.4426950408889634f), round), round);
    const float r = __fsub_rn(__fsub_rn(x, __fmul_rn(n, 0.693359375f)), __fmul_rn(n, -2.1219444e-4f));
    float p = 1.9875691e-4f;
    p = __fadd_rn(__fmul_rn(p, r), 1.3982e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 8.333452e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 4.1665796e-2f);
    p = __fadd_rn(__fmul_rn(p, r), 1.6666665e-1f);
    p = __fadd_rn(__fmul_rn(p, r), 0.5f);
    const float y = __fadd_rn(__fadd_rn(__fmul_rn(p, __fmul_rn(r, r)), r), 1.0f);
    const int i = static_cast<int>(n), half = i >> 1;
    return __fmul_rn(__fmul_rn(y, power_of_two(half)), power_of_two(i - half));
}

__device__ __forceinline__ float sigmoid(float x) { return __fdiv_rn(1.0f, __fadd_rn(1.0f, exp_rn(-x))); }

__device__ __forceinline__ float ln_1p(float x) {
    const float u = __fadd_rn(1.0f, x);
    if (u == 1.0f || x != x) return x;
    const float lost = x < 1.0f ? __fsub_rn(x, __fsub_rn(u, 1.0f)) : __fsub_rn(1.0f, __fsub_rn(u, x));
    const int bits = __float_as_int(u), n = (bits - 0x3f3504f3) >> 23;
    const float f = __fsub_rn(__int_as_float(bits - (n << 23)), 1.0f);
    const float s = __fdiv_rn(f, __fadd_rn(2.0f, f)), z = __fmul_rn(s, s);
    float p = 0.22222222f;
    p = __fadd_rn(__fmul_rn(p, z), 0.2857143f);
    p = __fadd_rn(__fmul_rn(p, z), 0.4f);
    p = __fadd_rn(__fmul_rn(p, z), 0.6666667f);
    const float ln_m = __fsub_rn(f, __fmul_rn(s, __fsub_rn(f, __fmul_rn(p, z))));
    return __fadd_rn(__fmul_rn(static_cast<float>(n), 0.6931471805599453f), __fadd_rn(ln_m, __fdiv_rn(lost, u)));
}

__device__ __forceinline__ float softplus(float x) { return x > 20.0f ? x : ln_1p(exp_rn(x)); }

// A float32 as an integer of the same order, above 0; a NaN counts as minus infinity, and both zeros are one.
__device__ __forceinline__ unsigned ordered(float x) {
    x = x != x ? -INF : __fadd_rn(x, 0.0f);
    const unsigned bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// max of the warp; a NaN loses.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL, x, step));
    return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) x = __fadd_rn(x, __shfl_xor_sync(FULL, x, step));
    return x;
}

// The two largest of a set, in any order of adding.
struct TopTwo {
    float first = -INF, second = -INF;
    __device__ __forceinline__ void add(float x) {
        if (x > first) {
            second = first;
            first = x;
        } else if (x > second) {
            second = x;
        }
    }
};

// Sets the scores outside the best groups to minus infinity, in `choice` [experts] of shared memory; `scores` [groups]
// is scratch beside it. A group's score is the sum of its two best.
__device__ void keep_groups(float* choice, float* scores, int experts, int groups, int keep, int lane) {
    const int size = experts / groups;
    int lanes = 1;  // per group: as many as there are, a power of two
    while (2 * lanes * groups <= 32) lanes *= 2;
    const int mine = lane % lanes, steps = (size + lanes - 1) / lanes, together = 32 / lanes;
    for (int base = 0; base < groups; base += together) {
        const int group = base + lane / lanes;
        TopTwo top;
        // Each group starts elsewhere, so that groups of 32 do not meet in one bank.
        int step = group % steps;
        for (int i = 0; i < steps && group < groups; ++i) {
            const int at = mine + lanes * step;
            if (at < size) top.add(choice[group * size + at]);
            step = step + 1 < steps ? step + 1 : 0;
        }
        for (int apart = 1; apart < lanes; apart *= 2) {
            const float first = __shfl_xor_sync(FULL, top.first, apart);
            const float second = __shfl_xor_sync(FULL, top.second, apart);
            top.add(first);
            top.add(second);
        }
        if (mine == 0 && group < groups) scores[group] = size > 1 ? __fadd_rn(top.first, top.second) : top.first;
    }
    __syncwarp();
    for (int base = 0; base < groups; base += together) {
        const int group = base + lane / lanes;
        if (group >= groups) continue;
        const float score = scores[group];
        int better = 0;
        for (int other = 0; other < groups; ++other) {
            const float s = scores[other];
            better += s > score || (s == score && other < group);
        }
        for (int at = mine; at < size && better >= keep; at += lanes) choice[group * size + at] = -INF;
    }
    __syncwarp();
}

// V: scores of a lane, so that up to 32 V experts fit. Expert v * 32 + lane lies in register v.
template <int V>
__device__ void route(const Params& p, const float* __restrict__ logits, const float* __restrict__ bias,
                      int* __restrict__ ids, float* __restrict__ weights) {
    extern __shared__ float shared[];
#if __CUDA_ARCH__ >= 900
    // The kernel before may still be writing the logits; the one after may start up, and waits for us in its turn.
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int token = blockIdx.x * WARPS + warp;
    if (token >= p.tokens) return;  // the whole warp
    const float* x = logits + static_cast<int64_t>(token) * p.experts;
    const bool by_score = p.method >= DEEPSEEK_V3;
    const bool softmax = p.method == DEFAULT || p.method == RENORMALIZE_NAIVE;

    const auto score = [&](float logit) { return p.method == DEEPSEEK_V4 ? __fsqrt_rn(softplus(logit)) : sigmoid(logit); };

    // What decides, as integers; 0 is below every score: no expert, or one that is taken.
    unsigned key[V];
    float most = -INF, sum = 0.0f;
    {
        float choice[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const int e = v * 32 + lane;
            choice[v] = e < p.experts ? x[e] : -INF;
        }
        if (softmax) {
#pragma unroll
            for (int v = 0; v < V; ++v) most = fmaxf(most, choice[v]);
            most = warp_max(most);
#pragma unroll
            for (int v = 0; v < V; ++v) sum = __fadd_rn(sum, v * 32 + lane < p.experts ? exp_rn(__fsub_rn(choice[v], most)) : 0.0f);
            sum = warp_sum(sum);
        }
        if (by_score) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const int e = v * 32 + lane;
                choice[v] = score(choice[v]);
                if (bias != nullptr && e < p.experts) choice[v] = __fadd_rn(choice[v], bias[e]);
            }
        }
        if (p.method == DEEPSEEK_V3 && p.groups > 1) {
            float* mine = shared + warp * (p.experts + p.groups);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const int e = v * 32 + lane;
                if (e < p.experts) mine[e] = choice[v] != choice[v] ? -INF : choice[v];
            }
            __syncwarp();
            keep_groups(mine, mine + p.experts, p.experts, p.groups, p.topk_groups, lane);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const int e = v * 32 + lane;
                if (e < p.experts) choice[v] = mine[e];
            }
        }
#pragma unroll
        for (int v = 0; v < V; ++v) key[v] = v * 32 + lane < p.experts ? ordered(choice[v]) : 0u;
    }

    // The lane's best: the lowest index of the highest key.
    const auto best_of_lane = [&](unsigned& best, int& at) {
        best = key[0];
        at = 0;
#pragma unroll
        for (int v = 1; v < V; ++v) {
            if (key[v] > best) {
                best = key[v];
                at = v;
            }
        }
    };
    unsigned best;
    int at, chosen = 0;
    best_of_lane(best, at);
    for (int j = 0; j < p.topk; ++j) {
        const unsigned top = __reduce_max_sync(FULL, best);
        const int e = __reduce_min_sync(FULL, best == top ? static_cast<unsigned>(at * 32 + lane) : FULL);
        if (lane == j) chosen = e;
        if (lane == e % 32) {
#pragma unroll
            for (int v = 0; v < V; ++v) key[v] = v == at ? 0u : key[v];
            best_of_lane(best, at);
        }
    }

    // Lane j has the j-th expert, and makes its weight.
    const bool has = lane < p.topk;
    const float logit = has ? x[chosen] : -INF;
    float w = 0.0f;
    const auto over_sum = [&](float eps) { w = __fdiv_rn(w, __fadd_rn(warp_sum(has ? w : 0.0f), eps)); };
    switch (p.method) {
        case DEFAULT:
            w = __fdiv_rn(exp_rn(__fsub_rn(logit, most)), sum);
            break;
        case RENORMALIZE_NAIVE:
            w = __fdiv_rn(exp_rn(__fsub_rn(logit, most)), sum);
            over_sum(0.0f);
            break;
        case RENORMALIZE:
            w = exp_rn(__fsub_rn(logit, warp_max(logit)));
            over_sum(0.0f);
            break;
        case TOP_K:
            w = logit;
            break;
        case SIGMOID_RENORM:
            w = sigmoid(logit);
            over_sum(0.0f);
            break;
        case SIGMOID:
        case LLAMA4:
            w = sigmoid(logit);
            break;
        default:
            w = score(logit);
            if (p.normalize) over_sum(1e-20f);
    }
    if (has) {
        const int64_t to = static_cast<int64_t>(token) * p.topk + lane;
        ids[to] = chosen;
        weights[to] = __fmul_rn(w, p.scaling);
    }
}

}  // namespace

// One block per multiprocessor is all that is asked for: left alone, the compiler saves registers and spills.
#define ROUTE(V)                                                                                \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)                                 \
        route_##V(Params p, const float* logits, const float* bias, int* ids, float* weights) { \
        route<V>(p, logits, bias, ids, weights);                                                \
    }

ROUTE(1)
ROUTE(2)
ROUTE(4)
ROUTE(8)
ROUTE(16)
ROUTE(32)
