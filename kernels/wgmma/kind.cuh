// What is multiplied: MOE_KIND is 16 for the 16-bit type, 8 for e4m3, 9 for the same with sums that stay in the tensor
// cores, 128 for e4m3 with scales that change every 128 columns, 1 for int8. kernels/common/format.cuh says how weights are
// packed.
#pragma once
#include "common/activation.cuh"
#include "common/compute.cuh"
#include "common/matrix.cuh"
#include "common/ptx.cuh"

namespace moe {

using C = MOE_COMPUTE;

constexpr bool kHalf = MOE_KIND == 16, kInt8 = MOE_KIND == 1, kBlockScales = MOE_KIND == 128;
// Sums of e4m3 products lose low bits in the tensor cores: they are added up in float32 every 128 columns, unless asked
// not to.
constexpr bool kPromoted = MOE_KIND == 8 || kBlockScales;
// Results may be quantised by stored scales.
constexpr bool kStoredScales = !kHalf && !kBlockScales;

// A stage is 128 bytes of a token's row: one block (64 columns) of 16 bits, two of 8.
constexpr int kRowBytes = 128, kBlocks = kHalf ? 1 : 2, kCodeBytes = kHalf ? 2048 : 1024;
// A slab's stage, and what of it are scales: those of rows g and g + 8 for each g.
constexpr int kScaleBytes = kBlockScales ? 64 : 0, kSlabStage = kBlocks * kCodeBytes + kScaleBytes;
// Products over K in a stage.
constexpr int kSteps = 4;

#define MOE_NAME_Bf16 "bf16"
#define MOE_NAME_F16 "f16"
#define MOE_NAME_(compute) MOE_NAME_##compute
#define MOE_NAME(compute) MOE_NAME_(compute)

// The products' operands in their names, and what stands behind the predicate.
#if MOE_KIND == 16
#define MOE_PRODUCT_TYPES "k16.f32." MOE_NAME(MOE_COMPUTE) "." MOE_NAME(MOE_COMPUTE)
#define MOE_PRODUCT_REST ", 1, 1, 0"
#elif MOE_KIND == 1
#define MOE_PRODUCT_TYPES "k32.s32.s8.s8"
#define MOE_PRODUCT_REST ""
#else
#define MOE_PRODUCT_TYPES "k32.f32.e4m3.e4m3"
#define MOE_PRODUCT_REST ", 1, 1"
#endif

#if MOE_KIND == 1
using Sum = int;
#define MOE_SUM(x) "+r"(x)
#else
using Sum = float;
#define MOE_SUM(x) "+f"(x)
#endif

}  // namespace moe
