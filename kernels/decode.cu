// Decode: a handful of tokens, whose experts are read straight from the ids; no sorting, two launches a layer.
//
// Tokens are the eight columns of the tensor-core product, weight rows its sixteen rows. All add the warps' parts in one
// order: same bits always.
#include "decode/first.cuh"
#include "decode/second.cuh"

// Blocks per multiprocessor that the registers must allow: two where they do without spills, so that the second kernel's
// blocks can wait beside the first's.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr bool kManyScales = moe::S::kGroups > 2 && moe::S::kRegisters >= moe::S::kGroups;
constexpr int kBlocks = moe::S::kZero || kManyScales || (moe::Q::kOffset != 0.f && moe::S::kGroups > 1) ? 1 : 2;
constexpr int kBlocksOne = moe::Q::kDigits ? 2 : moe::Q::kHalves && !moe::C::kBf16 && moe::S::kGroups > 2 ? 1 : kBlocks;
#else
constexpr int kBlocks = 1, kBlocksOne = 1;
#endif

// grid (any number, 1, 1): the blocks share the units
extern "C" __global__ void __launch_bounds__(512, kBlocksOne)
    moe_decode_first_one(const __grid_constant__ moe::DecodeParams p) {
    moe::first<moe::Mode::kOne>(p);
}
extern "C" __global__ void __launch_bounds__(512, kBlocks) moe_decode_first_near(const __grid_constant__ moe::DecodeParams p) {
    moe::first<moe::Mode::kNear>(p);
}
// batched: grid (any number, local experts, max_tokens / 8 rounded up)
extern "C" __global__ void __launch_bounds__(256, 1) moe_decode_first_far(const __grid_constant__ moe::DecodeParams p) {
    moe::first<moe::Mode::kFar>(p);
}
// grid (second.slabs shared by blocks, tokens): a block has one token, whose bits then do not depend on the others
extern "C" __global__ void __launch_bounds__(512, kBlocksOne)
    moe_decode_second_one(const __grid_constant__ moe::DecodeParams p) {
    moe::second<moe::Mode::kOne, false>(p);
}
// grid (second.slabs shared by blocks)
extern "C" __global__ void __launch_bounds__(512, kBlocks)
    moe_decode_second_near(const __grid_constant__ moe::DecodeParams p) {
    moe::second<moe::Mode::kNear, false>(p);
}
// batched: grid (second.slabs shared by blocks, local experts, max_tokens / 8 rounded up)
extern "C" __global__ void __launch_bounds__(512, 1) moe_decode_second_far(const __grid_constant__ moe::DecodeParams p) {
    moe::second<moe::Mode::kFar, false>(p);
}
// grid (second.slabs shared by clusters of 2^second_parts blocks); from Hopper on
extern "C" __global__ void __launch_bounds__(512, 1)
    moe_decode_second_shared(const __grid_constant__ moe::DecodeParams p) {
#if MOE_BULK
    moe::second<moe::Mode::kNear, true>(p);
#endif
}
// The same of a lone token; grid (as above, tokens). Only e2m1's wins by it.
extern "C" __global__ void __launch_bounds__(512, kBlocksOne)
    moe_decode_second_lone(const __grid_constant__ moe::DecodeParams p) {
#if MOE_BULK
    if constexpr (moe::Q::kWords == 1 && !moe::Q::kDigits) moe::second<moe::Mode::kOne, true>(p);
#endif
}
