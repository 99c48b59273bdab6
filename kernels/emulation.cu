// Emulation: the layer from its definition, in float32 over canonical weights (src/weights.rs), one warp per result. The
// input of both projections is quantised as the activation key says, if there is one. What the fast kernels are compared
// with; it knows nothing of their packed formats. In the batched format every slot of an expert is a token with that expert
// alone and no routing weight.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/activation.cuh"
#include "common/quantize.cuh"

namespace {

constexpr int LANES = 32;

enum Elem : int { BF16, F16, E4M3, E2M1, INT8, U4, U8 };
enum ScaleType : int { SCALE_F32, SCALE_E8M0, SCALE_E4M3 };
// The order of InputType::ALL.
enum Input : int { INPUT_BF16, INPUT_F16, INPUT_F32 };

// A matrix, row-major. One scale, and one zero point, for `scale_rows` x `scale_cols` elements.
struct Matrix {
    const uint8_t* codes;
    const void* scales;
    const uint8_t* zeros;    // null: `middle` is every element's zero point
    const uint32_t* groups;  // of each column; null: column / scale_cols
    float global, middle;
    int elem, scale;
    int scale_rows, scale_cols;
};

// `gate` and the biases may be null.
struct Expert {
    Matrix gate, up, down;
    const float *gate_bias, *up_bias, *down_bias;
    float input_scale, down_input_scale;  // of keys that have stored scales
};

struct Layer {
    const Expert* local;
    int hidden, inter;
    int experts, local_experts, topk;
    int input;            // an Input
    int weight_on_input;  // 0 or 1
    moe::Activation activation;
    int key;  // what activations become, by its place in MOE_ACTIVATION_KEYS; -1: they stay exact
};

// The call, and the tokens of this launch. T tokens; in the batched format local experts * max slots, k being 1.
struct Call {
    const void* hidden;      // [T, H] of the input type
    const int* ids;          // [T, k]
    const float* weights;    // [T, k]; null in the batched format
    const int* map;          // [E], local ids; null: every expert is local
    const int* counts;       // [local experts], tokens in an expert's slots; null in the standard format
    float* middle;           // [tokens of the launch, k, I]
    float* quantized;        // [tokens of the launch, k, H], used if there is a key
    void* output;            // [T, H] of the input type
    int64_t first, tokens;
    int64_t max;             // slots of an expert in the batched format
};

// src/cuda/emulation.rs has the same.
static_assert(sizeof(Expert) == 200 && sizeof(Layer) == 56 && sizeof(Call) == 88, "");

__device__ float half_value(bool bf16, uint16_t bits) {
    return bf16 ? __bfloat162float(__ushort_as_bfloat16(bits)) : __half2float(__ushort_as_half(bits));
}

__device__ float read(int input, const void* rows, int64_t at) {
    if (input == INPUT_F32) return static_cast<const float*>(rows)[at];
    return half_value(input == INPUT_BF16, static_cast<const uint16_t*>(rows)[at]);
}

__device__ void write(int input, void* rows, int64_t at, float x) {
    switch (input) {
        case INPUT_BF16: static_cast<__nv_bfloat16*>(rows)[at] = __float2bfloat16_rn(x); break;
        case INPUT_F16: static_cast<__half*>(rows)[at] = __float2half_rn(x); break;
        default: static_cast<float*>(rows)[at] = x;
    }
}

// A number of 1 + exponent + mantissa bits, subnormals included. The formats have neither infinities nor, in checked
// weights, NaNs.
template <int kExponent, int kMantissa>
__device__ float minifloat(unsigned code) {
    constexpr int bias = (1 << (kExponent - 1)) - 1;
    const unsigned mantissa = code & ((1 << kMantissa) - 1), exponent = code >> kMantissa & ((1 << kExponent) - 1);
    const float smallest = __uint_as_float(static_cast<unsigned>(127 + 1 - bias - kMantissa) << 23);
    const float magnitude = exponent == 0
                                ? static_cast<float>(mantissa) * smallest
                                : __uint_as_float((exponent + 127 - bias) << 23 | mantissa << (23 - kMantissa));
    return code >> (kExponent + kMantissa) & 1 ? -magnitude : magnitude;
}

// The low nibble first.
__device__ unsigned nibble(const uint8_t* codes, int64_t at) { return codes[at / 2] >> (at % 2 * 4) & 15; }

__device__ float element(const Matrix& m, int64_t at) {
    switch (m.elem) {
        case BF16:
        case F16: return half_value(m.elem == BF16, reinterpret_cast<const uint16_t*>(m.codes)[at]);
        case E4M3: return minifloat<4, 3>(m.codes[at]);
        case E2M1: return minifloat<2, 1>(nibble(m.codes, at));
        case INT8: return static_cast<int8_t>(m.codes[at]);
        case U4: return nibble(m.codes, at);
        default: return m.codes[at];
    }
}

__device__ float scale(const Matrix& m, int64_t at) {
    const uint8_t* codes = static_cast<const uint8_t*>(m.scales);
    switch (m.scale) {
        case SCALE_F32: return static_cast<const float*>(m.scales)[at];
        // 2^(code - 127), of which the first is a subnormal.
        case SCALE_E8M0: return __uint_as_float(codes[at] == 0 ? 1u << 22 : static_cast<unsigned>(codes[at]) << 23);
        default: return minifloat<4, 3>(codes[at]);
    }
}

// One weight of a matrix with `cols` columns.
__device__ float value(const Matrix& m, int row, int col, int cols) {
    const int64_t per_row = (cols + m.scale_cols - 1) / m.scale_cols;
    const int64_t group = m.groups != nullptr ? m.groups[col] : col / m.scale_cols;
    const int64_t at = row / m.scale_rows * per_row + group;
    const float zero = m.zeros != nullptr ? static_cast<float>(m.zeros[at]) : m.middle;
    return (element(m, static_cast<int64_t>(row) * cols + col) - zero) * scale(m, at) * m.global;
}

// Row `row` times x plus its bias; the warp's lanes all get it. x gives the vector's elements.
template <class X>
__device__ float project(const Matrix& m, const float* bias, int row, int cols, X x) {
    float sum = 0.f;
    for (int col = threadIdx.x % LANES; col < cols; col += LANES) sum = fmaf(value(m, row, col, cols), x(col), sum);
    for (int step = LANES / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return bias != nullptr ? sum + bias[row] : sum;
}

// The expert of a slot, null where it is not on this rank or does not exist, or where the slot is empty.
__device__ const Expert* expert(const Layer& layer, const Call& call, int64_t slot) {
    if (call.counts != nullptr) {
        const int64_t local = slot / call.max;
        return slot % call.max < call.counts[local] ? layer.local + local : nullptr;
    }
    const int id = call.ids[slot];
    if (id < 0 || id >= layer.experts) return nullptr;
    const int local = call.map != nullptr ? call.map[id] : id;
    return local < 0 || local >= layer.local_experts ? nullptr : layer.local + local;
}

// What a slot's input is multiplied by, and its result.
__device__ float input_factor(const Layer& layer, const Call& call, int64_t slot) {
    return call.weights != nullptr && layer.weight_on_input ? call.weights[slot] : 1.f;
}
__device__ float result_factor(const Layer& layer, const Call& call, int64_t slot) {
    return call.weights != nullptr && !layer.weight_on_input ? call.weights[slot] : 1.f;
}

__device__ uint32_t warp_max(uint32_t x) { return __reduce_max_sync(0xffffffffu, x); }

// Replaces a row by its quantised values.
template <class K>
__device__ void quantize(float* row, int cols, float stored) {
    const int lane = threadIdx.x % LANES, size = K::kGroup > 0 ? K::kGroup : cols;
    float second = stored;
    if constexpr (K::kSecond) {
        uint32_t top = 0;
        for (int col = lane; col < cols; col += LANES) top = max(top, moe::magnitude(row[col]));
        second = moe::second_scale(warp_max(top));
    }
    for (int begin = 0; begin < cols; begin += size) {
        const int end = min(begin + size, cols);
        moe::Scale scale;
        if constexpr (K::kScale == moe::ScaleKind::kStored) {
            scale = moe::stored_scale(stored);
        } else {
            uint32_t top = 0;
            for (int col = begin + lane; col < end; col += LANES) top = max(top, moe::magnitude(row[col]));
            scale = moe::group_scale<K>(warp_max(top), second);
        }
        for (int col = begin + lane; col < end; col += LANES) row[col] = moe::quantized<K>(row[col], scale);
    }
}

__device__ void quantize_as(int key, float* row, int cols, float stored) {
    using namespace moe;
    int place = 0;
#define MOE_TRY(name, ...) \
    if (key == place++) quantize<__VA_ARGS__>(row, cols, stored);
    MOE_ACTIVATION_KEYS(MOE_TRY)
#undef MOE_TRY
}

__device__ int64_t warp() { return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / LANES; }
__device__ int64_t warps() { return static_cast<int64_t>(gridDim.x) * blockDim.x / LANES; }

}  // namespace

// With a key: what the experts of a slot get, weighted if need be, and quantised.
extern "C" __global__ void emulation_input(Layer layer, Call call) {
    for (int64_t n = warp(); n < call.tokens * layer.topk; n += warps()) {
        const int64_t slot = call.first * layer.topk + n;
        const Expert* e = expert(layer, call, slot);
        if (e == nullptr) continue;
        float* row = call.quantized + n * layer.hidden;
        const int64_t first = slot / layer.topk * layer.hidden;
        const float factor = input_factor(layer, call, slot);
        for (int col = threadIdx.x % LANES; col < layer.hidden; col += LANES) {
            row[col] = read(layer.input, call.hidden, first + col) * factor;
        }
        // A column's group may begin in another lane.
        __syncwarp();
        quantize_as(layer.key, row, layer.hidden, e->input_scale);
    }
}

// With a key: the activations between the projections, quantised in their place.
extern "C" __global__ void emulation_middle(Layer layer, Call call) {
    for (int64_t n = warp(); n < call.tokens * layer.topk; n += warps()) {
        const Expert* e = expert(layer, call, call.first * layer.topk + n);
        if (e != nullptr) quantize_as(layer.key, call.middle + n * layer.inter, layer.inter, e->down_input_scale);
    }
}

// Both projections of H and the activation: one element of `middle` at a time. Those of absent experts stay unwritten.
extern "C" __global__ void emulation_first(Layer layer, Call call) {
    const int64_t results = call.tokens * layer.topk * layer.inter;
    for (int64_t n = warp(); n < results; n += warps()) {
        const int64_t slot = call.first * layer.topk + n / layer.inter;
        const int row = static_cast<int>(n % layer.inter);
        const Expert* e = expert(layer, call, slot);
        if (e == nullptr) continue;
        const int64_t first = slot / layer.topk * layer.hidden;
        const float factor = input_factor(layer, call, slot);
        const float* quantized = call.quantized + n / layer.inter * layer.hidden;
        const auto x = [&](int col) {
            return layer.key >= 0 ? quantized[col] : read(layer.input, call.hidden, first + col) * factor;
        };
        const float gate = moe::gated(layer.activation) ? project(e->gate, e->gate_bias, row, layer.hidden, x) : 0.f;
        const float up = project(e->up, e->up_bias, row, layer.hidden, x);
        if (threadIdx.x % LANES == 0) call.middle[n] = moe::apply(layer.activation, gate, up);
    }
}

// The projection of I, summed over a token's slots in their order: one element of the output at a time. Empty slots' rows stay
// unwritten.
extern "C" __global__ void emulation_second(Layer layer, Call call) {
    const int64_t results = call.tokens * layer.hidden;
    for (int64_t n = warp(); n < results; n += warps()) {
        const int64_t token = n / layer.hidden;
        const int row = static_cast<int>(n % layer.hidden);
        if (call.counts != nullptr && expert(layer, call, call.first + token) == nullptr) continue;
        float sum = 0.f;
        for (int64_t k = token * layer.topk; k < (token + 1) * layer.topk; ++k) {
            const int64_t slot = call.first * layer.topk + k;
            const Expert* e = expert(layer, call, slot);
            if (e == nullptr) continue;
            const float* middle = call.middle + k * layer.inter;
            const float y = project(e->down, e->down_bias, row, layer.inter, [&](int col) { return middle[col]; });
            sum += result_factor(layer, call, slot) * y;
        }
        if (threadIdx.x % LANES == 0) {
            write(layer.input, call.output, (call.first + token) * layer.hidden + row, sum);
        }
    }
}
