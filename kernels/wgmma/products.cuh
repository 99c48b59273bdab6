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

#define MOE_D8(i)                                                                                     \
    MOE_SUM(d[i]), MOE_SUM(d[i + 1]), MOE_SUM(d[i + 2]), MOE_SUM(d[i + 3]), MOE_SUM(d[i + 4]),        \
        MOE_SUM(d[i + 5]), MOE_SUM(d[i + 6]), MOE_SUM(d[i + 7])
#define MOE_D16(i) MOE_D8(i), MOE_D8(i + 8)
#define MOE_D32(i) MOE_D16(i), MOE_D16(i + 16)
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

#define MOE_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MOE_R16 MOE_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MOE_R24 MOE_R16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define MOE_R32 MOE_R24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define MOE_R40 MOE_R32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define MOE_R48 MOE_R40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define MOE_R56 MOE_R48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define MOE_R64 MOE_R56 ", %56, %57, %58, %59, %60, %61, %62, %63"
MOE_PRODUCT(16, MOE_R8, "%8", "%9", "%10", "%11", "%12", "%13", MOE_D8(0));
MOE_PRODUCT(32, MOE_R16, "%16", "%17", "%18", "%19", "%20", "%21", MOE_D16(0));
MOE_PRODUCT(48, MOE_R24, "%24", "%25", "%26", "%27", "%28", "%29", MOE_D16(0), MOE_D8(16));
MOE_PRODUCT(64, MOE_R32, "%32", "%33", "%34", "%35", "%36", "%37", MOE_D32(0));
MOE_PRODUCT(80, MOE_R40, "%40", "%41", "%42", "%43", "%44", "%45", MOE_D32(0), MOE_D8(32));
MOE_PRODUCT(96, MOE_R48, "%48", "%49", "%50", "%51", "%52", "%53", MOE_D32(0), MOE_D16(32));
MOE_PRODUCT(112, MOE_R56, "%56", "%57", "%58", "%59", "%60", "%61", MOE_D32(0), MOE_D16(32), MOE_D8(48));
MOE_PRODUCT(128, MOE_R64, "%64", "%65", "%66", "%67", "%68", "%69", MOE_D32(0), MOE_D32(32));

}  // namespace moe
