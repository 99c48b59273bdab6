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

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678118654752f)); }
__device__ __forceinline__ float gelu_tanh(float x) {
    return 0.5f * x * (1.f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}
// fminf and fmaxf would lose a NaN.
__device__ __forceinline__ float at_most(float x, float limit) { return x > limit ? limit : x; }
__device__ __forceinline__ float clamp(float x, float limit) { return x < -limit ? -limit : at_most(x, limit); }
__device__ __forceinline__ float positive(float x) { return x < 0.f ? 0.f : x; }

__device__ __forceinline__ bool gated(const Activation& a) { return a.kind < kSiluNoMul; }

__device__ __forceinline__ float apply(const Activation& a, float g, float u) {
    switch (a.kind) {
        case kSilu: g = at_most(g, a.limit); return g * sigmoid(g) * clamp(u, a.limit);
        case kGelu: return gelu(g) * u;
        case kGeluTanh: return gelu_tanh(g) * u;
        case kSwigluOai: g = at_most(g, a.limit); return g * sigmoid(a.alpha * g) * (clamp(u, a.limit) + a.beta);
        case kSwigluStep: return at_most(g * sigmoid(g), a.limit) * clamp(u, a.limit);
        case kSitu: return a.beta * tanhf(g / a.beta) * sigmoid(g) * (a.alpha > 0.f ? a.alpha * tanhf(u / a.alpha) : u);
        case kRelu2: g = positive(g); return g * g * u;
        case kSiluNoMul: return u * sigmoid(u);
        case kGeluNoMul: return gelu(u);
        case kGeluTanhNoMul: return gelu_tanh(u);
        default: u = positive(u); return u * u;
    }
}

}  // namespace moe
