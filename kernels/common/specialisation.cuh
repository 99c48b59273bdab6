// The specialisation that this translation unit is compiled for: MOE_COMPUTE names the 16-bit type, MOE_FORMAT the
// packed format. The names are the table's.
#pragma once
#include "stream.cuh"

namespace moe {

#define MOE_CASE(name, codes, scale) \
    struct Format_##name {           \
        using Q = codes;             \
        using S = scale;             \
    }

using C = MOE_COMPUTE;
#define MOE_HALF_SCALES(name, codes)                     \
    using HalfScale1_##name = ScaleHalf<1, false>;       \
    using HalfScale2_##name = ScaleHalf<2, false>;       \
    using HalfScale4_##name = ScaleHalf<4, false>;       \
    using HalfZero1_##name = ScaleHalf<1, true>;         \
    using HalfZero2_##name = ScaleHalf<2, true>;         \
    using HalfZero4_##name = ScaleHalf<4, true>;         \
    MOE_CASE(name##_g128, codes, HalfScale1_##name);     \
    MOE_CASE(name##_g64, codes, HalfScale2_##name);      \
    MOE_CASE(name##_g32, codes, HalfScale4_##name);      \
    MOE_CASE(name##_g128_zero, codes, HalfZero1_##name); \
    MOE_CASE(name##_g64_zero, codes, HalfZero2_##name);  \
    MOE_CASE(name##_g32_zero, codes, HalfZero4_##name)

MOE_CASE(half, Codes16<C>, NoScale);
MOE_CASE(fp8, CodesE4m3<C>, NoScale);
MOE_CASE(fp8_block128, CodesE4m3<C>, ScaleF32<1>);
MOE_CASE(fp8_block64, CodesE4m3<C>, ScaleF32<2>);
MOE_CASE(fp8_block32, CodesE4m3<C>, ScaleF32<4>);
MOE_CASE(mxfp8, CodesE4m3<C>, ScaleE8m0);
MOE_CASE(int8, CodesInt8<C>, NoScale);
MOE_CASE(mxfp4, CodesE2m1<C>, ScaleE8m0);
MOE_CASE(nvfp4, CodesE2m1<C>, ScaleE4m3);
MOE_HALF_SCALES(int8, CodesInt8<C>);
MOE_HALF_SCALES(int4, CodesU4<C>);

#define MOE_PASTE_(a, b) a##b
#define MOE_PASTE(a, b) MOE_PASTE_(a, b)
using Q = MOE_PASTE(Format_, MOE_FORMAT)::Q;
using S = MOE_PASTE(Format_, MOE_FORMAT)::S;

}  // namespace moe
