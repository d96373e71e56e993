// One matrix product of a warp on its registers by mma.sync: d = a b + c, 16 x 8 x 16.
#pragma once

#include "register.cuh"

namespace kittens {
namespace detail {

// `a` is a base tile in row layout; b0 and b1 are half of one in column layout, d0 and d1 half of
// one in row layout: data[0] and [2] of b with data[0] and [1] of d, or data[1] and [3] with [2]
// and [3].
template <typename T>
__device__ inline void mma_step(float2& d0, float2& d1, const uint32_t (&a)[4], uint32_t b0,
                                uint32_t b1, float2 c0, float2 c1) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d0.x), "=f"(d0.y), "=f"(d1.x), "=f"(d1.y)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c0.x), "f"(c0.y),
          "f"(c1.x), "f"(c1.y));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d0.x), "=f"(d0.y), "=f"(d1.x), "=f"(d1.y)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c0.x), "f"(c0.y),
          "f"(c1.x), "f"(c1.y));
  }
}

}  // namespace detail
}  // namespace kittens
