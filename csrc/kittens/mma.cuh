// Matrix products of one warp on its registers: D = A B + C by mma.sync, 16 x 8 x 16 a step.
#pragma once

#include "register.cuh"

namespace kittens {
namespace detail {

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

template <int N_WARPS>
struct group_mma {};

template <>
struct group_mma<1> {
  // a row layout, b column layout, float32 sums; d may be c.
  template <typename D, typename A, typename B>
  static __device__ void mma_AB(D& d, const A& a, const B& b, const D& c) {
    static_assert(A::row_layout && !B::row_layout && D::row_layout && sizeof(typename D::T) == 4);
    static_assert(D::rows == A::rows && A::cols == B::rows && D::cols == B::cols);
#pragma unroll
    for (int i = 0; i < D::height; ++i) {
#pragma unroll
      for (int j = 0; j < D::width; ++j) {
#pragma unroll
        for (int k = 0; k < A::width; ++k) {
          const auto& left = reinterpret_cast<const uint32_t (&)[4]>(a.tiles[i][k].data);
          const auto& right = reinterpret_cast<const uint32_t (&)[4]>(b.tiles[k][j].data);
          auto& to = d.tiles[i][j].data;
          const auto& from = (k == 0 ? c : d).tiles[i][j].data;
          mma_step<typename A::T>(to[0], to[1], left, right[0], right[2], from[0], from[1]);
          mma_step<typename A::T>(to[2], to[3], left, right[1], right[3], from[2], from[3]);
        }
      }
    }
  }
};

}  // namespace detail
}  // namespace kittens
