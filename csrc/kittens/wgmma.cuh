// Asynchronous warpgroup matrix products, 64 x N x 16 a step: A of 64 rows from shared memory or
// as each warp's 16 rows in registers, B from shared memory, float32 sums in registers.
#pragma once

#include "wgmma_steps.cuh"

namespace kittens {
namespace detail {

// The descriptor of a swizzled tile: address, leading and stride offsets in 16 bytes, swizzle mode.
template <typename Tile, bool column_major>
__device__ inline uint64_t matrix_descriptor(const Tile& tile) {
  constexpr uint64_t bytes = Tile::swizzle_bytes;
  constexpr uint64_t leading = column_major ? Tile::rows * bytes : 16;
  constexpr uint64_t mode = bytes == 128 ? 1 : bytes == 64 ? 2 : 3;
  constexpr uint64_t fixed = leading / 16 % (1 << 14) << 16 | 8 * bytes / 16 << 32 | mode << 62;
  return fixed | (shared_address(tile.data) & 0x3FFFF) >> 4;
}

// How far step `j` of 16 along the summed dimension lies from the tile's start, in 16 bytes.
template <typename Tile, bool column_major>
constexpr uint32_t step_offset(int j) {
  constexpr int bytes = Tile::swizzle_bytes, steps = bytes / 32;
  return (column_major ? TILE_DIM * bytes * j : j % steps * 32 + j / steps * Tile::rows * bytes) /
         16;
}

// Adds in the low word, which holds the address and cannot overflow: the high one stays constant.
__device__ inline uint64_t advanced(uint64_t descriptor, uint32_t offset) {
  return (descriptor >> 32 << 32) | (static_cast<uint32_t>(descriptor) + offset);
}

template <int N_WARPS>
struct group_wgmma {};

template <>
struct group_wgmma<WARPGROUP_WARPS> {
  // d (+)= A B with B stored [k, n], A B^T with B stored [n, k], A^T B and A^T B^T with A stored
  // [k, 64] in shared memory. A call is one commit group and needs mma_async_wait before d, a
  // register A or the shared operands are touched again. `fence` orders earlier register accesses
  // before the product; whoever wrote a shared operand has fenced the async proxy before the
  // barrier that led here (genie::FenceAsyncProxy).
  template <typename D, typename A, typename B, int fence = 1, int accumulate = 1>
  static __device__ void mma_AB(D& d, const A& a, const B& b) {
    multiply<false, true, fence, accumulate>(d, a, b);
  }
  template <typename D, typename A, typename B, int fence = 1>
  static __device__ void mm_AB(D& d, const A& a, const B& b) {
    multiply<false, true, fence, 0>(d, a, b);
  }
  template <typename D, typename A, typename B, int fence = 1, int accumulate = 1>
  static __device__ void mma_ABt(D& d, const A& a, const B& b) {
    multiply<false, false, fence, accumulate>(d, a, b);
  }
  template <typename D, typename A, typename B, int fence = 1>
  static __device__ void mm_ABt(D& d, const A& a, const B& b) {
    multiply<false, false, fence, 0>(d, a, b);
  }
  template <typename D, typename A, typename B, int fence = 1, int accumulate = 1>
  static __device__ void mma_AtB(D& d, const A& a, const B& b) {
    multiply<true, true, fence, accumulate>(d, a, b);
  }
  template <typename D, typename A, typename B, int fence = 1>
  static __device__ void mm_AtB(D& d, const A& a, const B& b) {
    multiply<true, true, fence, 0>(d, a, b);
  }
  template <typename D, typename A, typename B, int fence = 1, int accumulate = 1>
  static __device__ void mma_AtBt(D& d, const A& a, const B& b) {
    multiply<true, false, fence, accumulate>(d, a, b);
  }
  template <typename D, typename A, typename B, int fence = 1>
  static __device__ void mm_AtBt(D& d, const A& a, const B& b) {
    multiply<true, false, fence, 0>(d, a, b);
  }

  // At most N groups are unfinished.
  template <int N = 0>
  static __device__ void mma_async_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
  }

 private:
  template <bool a_column_major, bool b_column_major, int fence, int accumulate, typename D,
            typename A, typename B>
  static __device__ void multiply(D& d, const A& a, const B& b) {
    using T = typename B::T;
    constexpr int k = b_column_major ? B::rows : B::cols;
    constexpr int n = b_column_major ? B::cols : B::rows;
    using step = wgmma_step<T, n>;
    static_assert(D::rows == TILE_DIM && D::row_layout && sizeof(typename D::T) == 4);
    static_assert(D::cols == n && std::is_same_v<typename A::T, T>);
    static_assert((a_column_major ? A::rows : A::cols) == k);
    float* sums = reinterpret_cast<float*>(&d.tiles[0][0].data[0]);
    if constexpr (fence) {
#pragma unroll
      for (int i = 0; i < n / 2; ++i) asm volatile("" : "+f"(sums[i]));
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    }
    const uint64_t b_start = matrix_descriptor<B, b_column_major>(b);
#pragma unroll
    for (int j = 0; j < k / TILE_DIM; ++j) {
      const uint64_t b_step = advanced(b_start, step_offset<B, b_column_major>(j));
      if constexpr (register_tile<A>) {
        static_assert(A::rows == TILE_DIM && A::row_layout && !a_column_major);
        step::template run<b_column_major>(sums,
                                           reinterpret_cast<const uint32_t*>(a.tiles[0][j].data),
                                           b_step, accumulate || j > 0);
      } else {
        static_assert((a_column_major ? A::cols : A::rows) == 64);
        const uint64_t a_step =
            advanced(matrix_descriptor<A, a_column_major>(a), step_offset<A, a_column_major>(j));
        step::template run<a_column_major, b_column_major>(sums, a_step, b_step,
                                                           accumulate || j > 0);
      }
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }
};

}  // namespace detail
}  // namespace kittens
