// One WGMMA instruction, m64nNk16, for every N that a kernel uses: wgmma_step<T, N>::run.
#pragma once

#include "memory.cuh"

namespace kittens {
namespace detail {

// The N / 2 float32 sums of a thread, eight at a time: as operands and by their numbers.
#define KITTENS_D8(i)                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define KITTENS_D16_OPERANDS KITTENS_D8(0)
#define KITTENS_D16_NAMES "%0, %1, %2, %3, %4, %5, %6, %7"
#define KITTENS_D32_OPERANDS KITTENS_D16_OPERANDS, KITTENS_D8(8)
#define KITTENS_D32_NAMES KITTENS_D16_NAMES ", %8, %9, %10, %11, %12, %13, %14, %15"
#define KITTENS_D48_OPERANDS KITTENS_D32_OPERANDS, KITTENS_D8(16)
#define KITTENS_D48_NAMES KITTENS_D32_NAMES ", %16, %17, %18, %19, %20, %21, %22, %23"
#define KITTENS_D64_OPERANDS KITTENS_D48_OPERANDS, KITTENS_D8(24)
#define KITTENS_D64_NAMES KITTENS_D48_NAMES ", %24, %25, %26, %27, %28, %29, %30, %31"
#define KITTENS_D96_OPERANDS KITTENS_D64_OPERANDS, KITTENS_D8(32), KITTENS_D8(40)
#define KITTENS_D96_NAMES \
  KITTENS_D64_NAMES       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define KITTENS_D128_OPERANDS KITTENS_D96_OPERANDS, KITTENS_D8(48), KITTENS_D8(56)
#define KITTENS_D128_NAMES \
  KITTENS_D96_NAMES        \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define KITTENS_D192_OPERANDS \
  KITTENS_D128_OPERANDS, KITTENS_D8(64), KITTENS_D8(72), KITTENS_D8(80), KITTENS_D8(88)
#define KITTENS_D192_NAMES                                                                  \
  KITTENS_D128_NAMES                                                                        \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, " \
  "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define KITTENS_D256_OPERANDS \
  KITTENS_D192_OPERANDS, KITTENS_D8(96), KITTENS_D8(104), KITTENS_D8(112), KITTENS_D8(120)
#define KITTENS_D256_NAMES                                                                     \
  KITTENS_D192_NAMES                                                                           \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "   \
  "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, " \
  "%126, %127"

template <typename T, int n>
struct wgmma_step;

// d (+)= A B: `accumulate` false overwrites d. t0.. are the numbers of the operands behind d.
#define KITTENS_WGMMA(T, name, n, t0, t1, t2, t3, t4, t5, t6)                                     \
  template <>                                                                                     \
  struct wgmma_step<T, n> {                                                                       \
    template <bool a_column_major, bool b_column_major>                                           \
    static __device__ void run(float* d, uint64_t a, uint64_t b, bool accumulate) {               \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #t2                                       \
                   ", 0;\n"                                                                       \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name                \
                   " {" KITTENS_D##n##_NAMES "}, %" #t0 ", %" #t1 ", p, 1, 1, %" #t3 ", %" #t4    \
                                             ";\n}"                                               \
                   : KITTENS_D##n##_OPERANDS                                                      \
                   : "l"(a), "l"(b), "r"(int{accumulate}), "n"(int{a_column_major}),              \
                     "n"(int{b_column_major}));                                                   \
    }                                                                                             \
    template <bool b_column_major>                                                                \
    static __device__ void run(float* d, const uint32_t* a, uint64_t b, bool accumulate) {        \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #t5                                       \
                   ", 0;\n"                                                                       \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name                \
                   " {" KITTENS_D##n##_NAMES "}, {%" #t0 ", %" #t1 ", %" #t2 ", %" #t3 "}, %" #t4 \
                                             ", p, 1, 1, %" #t6 ";\n}"                            \
                   : KITTENS_D##n##_OPERANDS                                                      \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{accumulate}),    \
                     "n"(int{b_column_major}));                                                   \
    }                                                                                             \
  };
#define KITTENS_WGMMA_BOTH(n, ...)            \
  KITTENS_WGMMA(bf16, "bf16", n, __VA_ARGS__) \
  KITTENS_WGMMA(half, "f16", n, __VA_ARGS__)

KITTENS_WGMMA_BOTH(16, 8, 9, 10, 11, 12, 13, 14)
KITTENS_WGMMA_BOTH(32, 16, 17, 18, 19, 20, 21, 22)
KITTENS_WGMMA_BOTH(64, 32, 33, 34, 35, 36, 37, 38)
KITTENS_WGMMA_BOTH(128, 64, 65, 66, 67, 68, 69, 70)
KITTENS_WGMMA_BOTH(192, 96, 97, 98, 99, 100, 101, 102)
KITTENS_WGMMA_BOTH(256, 128, 129, 130, 131, 132, 133, 134)

#undef KITTENS_WGMMA_BOTH
#undef KITTENS_WGMMA
#undef KITTENS_D256_NAMES
#undef KITTENS_D256_OPERANDS
#undef KITTENS_D192_NAMES
#undef KITTENS_D192_OPERANDS
#undef KITTENS_D128_NAMES
#undef KITTENS_D128_OPERANDS
#undef KITTENS_D96_NAMES
#undef KITTENS_D96_OPERANDS
#undef KITTENS_D64_NAMES
#undef KITTENS_D64_OPERANDS
#undef KITTENS_D48_NAMES
#undef KITTENS_D48_OPERANDS
#undef KITTENS_D32_NAMES
#undef KITTENS_D32_OPERANDS
#undef KITTENS_D16_NAMES
#undef KITTENS_D16_OPERANDS
#undef KITTENS_D8

}  // namespace detail
}  // namespace kittens
