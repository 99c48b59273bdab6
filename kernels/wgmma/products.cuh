// Tensor-core products of a warpgroup: 64 rows of an operand in registers by kN columns of one in shared memory, summed
// into registers, in the background. Register 4 j + 2 h + i of a thread's sum is row g + 8 h of its warp's sixteen,
// column 8 j + 2 t + i, where its lane is 4 g + t.
#pragma once
#include "kind.cuh"

namespace moe {

// Registers that were written by other instructions may be read by products from here on.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes a group of products.
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kPending groups are under way.
template <int kPending>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// d = a * b + (add ? d : 0)
template <int kN>
struct Product;

#define MOE_D4(i) MOE_SUM(d[i]), MOE_SUM(d[i + 1]), MOE_SUM(d[i + 2]), MOE_SUM(d[i + 3])
#define MOE_D8(i)                                                                                     \
    MOE_SUM(d[i]), MOE_SUM(d[i + 1]), MOE_SUM(d[i + 2]), MOE_SUM(d[i + 3]), MOE_SUM(d[i + 4]),        \
        MOE_SUM(d[i + 5]), MOE_SUM(d[i + 6]), MOE_SUM(d[i + 7])
#define MOE_D16(i) MOE_D8(i), MOE_D8(i + 8)
#define MOE_D32(i) MOE_D16(i), MOE_D16(i + 16)
#define MOE_D64(i) MOE_D32(i), MOE_D32(i + 32)
#define MOE_PRODUCT(n, registers, a0, a1, a2, a3, b, add, ...)                                                   \
    template <>                                                                                                  \
    struct Product<n> {                                                                                          \
        template <int kLength>                                                                                   \
        static __device__ __forceinline__ void run(Sum (&d)[kLength], const uint32_t (&a)[4], uint64_t columns,  \
                                                   int more) {                                                   \
            static_assert(kLength >= n / 2, "");                                                                 \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n      \
                         MOE_PRODUCT_TYPES " {" registers "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b                  \
                         ", p" MOE_PRODUCT_REST ";\n}"                                                           \
                         : __VA_ARGS__                                                                           \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(columns), "r"(more));                 \
        }                                                                                                        \
    }

#define MOE_R4 "%0, %1, %2, %3"
#define MOE_R8 MOE_R4 ", %4, %5, %6, %7"
#define MOE_R12 MOE_R8 ", %8, %9, %10, %11"
#define MOE_R16 MOE_R12 ", %12, %13, %14, %15"
#define MOE_R20 MOE_R16 ", %16, %17, %18, %19"
#define MOE_R24 MOE_R20 ", %20, %21, %22, %23"
#define MOE_R28 MOE_R24 ", %24, %25, %26, %27"
#define MOE_R32 MOE_R28 ", %28, %29, %30, %31"
#define MOE_R40 MOE_R32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define MOE_R48 MOE_R40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define MOE_R56 MOE_R48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define MOE_R64 MOE_R56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define MOE_R72 MOE_R64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define MOE_R80 MOE_R72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define MOE_R88 MOE_R80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define MOE_R96 MOE_R88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define MOE_R104 MOE_R96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define MOE_R112 MOE_R104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define MOE_R120 MOE_R112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define MOE_R128 MOE_R120 ", %120, %121, %122, %123, %124, %125, %126, %127"
MOE_PRODUCT(8, MOE_R4, "%4", "%5", "%6", "%7", "%8", "%9", MOE_D4(0));
MOE_PRODUCT(16, MOE_R8, "%8", "%9", "%10", "%11", "%12", "%13", MOE_D8(0));
MOE_PRODUCT(24, MOE_R12, "%12", "%13", "%14", "%15", "%16", "%17", MOE_D8(0), MOE_D4(8));
MOE_PRODUCT(32, MOE_R16, "%16", "%17", "%18", "%19", "%20", "%21", MOE_D16(0));
MOE_PRODUCT(40, MOE_R20, "%20", "%21", "%22", "%23", "%24", "%25", MOE_D16(0), MOE_D4(16));
MOE_PRODUCT(48, MOE_R24, "%24", "%25", "%26", "%27", "%28", "%29", MOE_D16(0), MOE_D8(16));
MOE_PRODUCT(56, MOE_R28, "%28", "%29", "%30", "%31", "%32", "%33", MOE_D16(0), MOE_D8(16), MOE_D4(24));
MOE_PRODUCT(64, MOE_R32, "%32", "%33", "%34", "%35", "%36", "%37", MOE_D32(0));
MOE_PRODUCT(80, MOE_R40, "%40", "%41", "%42", "%43", "%44", "%45", MOE_D32(0), MOE_D8(32));
MOE_PRODUCT(96, MOE_R48, "%48", "%49", "%50", "%51", "%52", "%53", MOE_D32(0), MOE_D16(32));
MOE_PRODUCT(112, MOE_R56, "%56", "%57", "%58", "%59", "%60", "%61", MOE_D32(0), MOE_D16(32), MOE_D8(48));
MOE_PRODUCT(128, MOE_R64, "%64", "%65", "%66", "%67", "%68", "%69", MOE_D64(0));
MOE_PRODUCT(144, MOE_R72, "%72", "%73", "%74", "%75", "%76", "%77", MOE_D64(0), MOE_D8(64));
MOE_PRODUCT(160, MOE_R80, "%80", "%81", "%82", "%83", "%84", "%85", MOE_D64(0), MOE_D16(64));
MOE_PRODUCT(176, MOE_R88, "%88", "%89", "%90", "%91", "%92", "%93", MOE_D64(0), MOE_D16(64), MOE_D8(80));
MOE_PRODUCT(192, MOE_R96, "%96", "%97", "%98", "%99", "%100", "%101", MOE_D64(0), MOE_D32(64));
MOE_PRODUCT(208, MOE_R104, "%104", "%105", "%106", "%107", "%108", "%109", MOE_D64(0), MOE_D32(64), MOE_D8(96));
MOE_PRODUCT(224, MOE_R112, "%112", "%113", "%114", "%115", "%116", "%117", MOE_D64(0), MOE_D32(64), MOE_D16(96));
MOE_PRODUCT(240, MOE_R120, "%120", "%121", "%122", "%123", "%124", "%125", MOE_D64(0), MOE_D32(64), MOE_D16(96), MOE_D8(112));
MOE_PRODUCT(256, MOE_R128, "%128", "%129", "%130", "%131", "%132", "%133", MOE_D64(0), MOE_D64(64));

}  // namespace moe
