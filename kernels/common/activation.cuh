// The functions between the two projections; src/config.rs defines them.
#pragma once

namespace moe {

enum ActivationKind : int {
    kSilu, kGelu, kGeluTanh, kSwigluOai, kSwigluStep, kSitu, kRelu2, kSiluNoMul, kGeluNoMul, kGeluTanhNoMul, kRelu2NoMul
};

// `limit` is infinite where there is none. Situ has its second parameter in `alpha`, 0 for none.
struct Activation {
    int kind;
    float alpha, beta, limit;
};

// The smaller and the larger one, or a NaN where either is, which fminf and fmaxf would lose.
__device__ __forceinline__ float smaller(float a, float b) {
    float least;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(a), "f"(b));
    return least;
}
__device__ __forceinline__ float larger(float a, float b) {
    float most;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
    return most;
}
// As smaller(), by an instruction more and, in decode's kernels, a register less, of which some have none to spare.
__device__ __forceinline__ float at_most(float x, float limit) { return x > limit ? limit : x; }
__device__ __forceinline__ float clamp(float x, float limit) { return larger(smaller(x, limit), -limit); }
__device__ __forceinline__ float positive(float x) { return larger(x, 0.f); }

// Powers too small for a normal number may be lost: they are added to one.
__device__ __forceinline__ float power_of_two(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}
// x times the sigmoid of y, by a quotient that is off by two units of the last place at most; zero where the sigmoid is
// below 2^-126.
__device__ __forceinline__ float times_sigmoid(float x, float y) {
    return __fdividef(x, 1.f + power_of_two(y * -1.4426950408889634f));
}
__device__ __forceinline__ float silu(float x) { return times_sigmoid(x, x); }
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678118654752f)); }
__device__ __forceinline__ float gelu_tanh(float x) {
    return 0.5f * x * (1.f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

__device__ __forceinline__ bool gated(const Activation& a) { return a.kind < kSiluNoMul; }

__device__ __forceinline__ float apply(const Activation& a, float g, float u) {
    switch (a.kind) {
        case kSilu: return silu(at_most(g, a.limit)) * clamp(u, a.limit);
        case kGelu: return gelu(g) * u;
        case kGeluTanh: return gelu_tanh(g) * u;
        case kSwigluOai: g = at_most(g, a.limit); return times_sigmoid(g, a.alpha * g) * (clamp(u, a.limit) + a.beta);
        case kSwigluStep: return smaller(silu(g), a.limit) * clamp(u, a.limit);
        case kSitu: return times_sigmoid(a.beta * tanhf(g / a.beta), g) * (a.alpha > 0.f ? a.alpha * tanhf(u / a.alpha) : u);
        case kRelu2: g = positive(g); return g * g * u;
        case kSiluNoMul: return silu(u);
        case kGeluNoMul: return gelu(u);
        case kGeluTanhNoMul: return gelu_tanh(u);
        default: u = positive(u); return u * u;
    }
}

}  // namespace moe
