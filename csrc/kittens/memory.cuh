// Moves tiles and vectors between registers and shared memory. A group's tile is its warps' row
// blocks in order.
#pragma once

#include "sync.cuh"

namespace kittens {
namespace detail {

// Four 8 x 8 matrices at once; lane l gives the address of row l % 8 of matrix l / 8.
template <bool transposed>
__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t address) {
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  }
}
template <bool transposed>
__device__ inline void store_matrices(uint32_t address, const uint32_t (&from)[4]) {
  if constexpr (transposed) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
        "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
        : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
                 : "memory");
  }
}

// Where lane l's matrix row of a base tile starts: matrix m = l / 8 is data[m] of the lane map.
template <bool row_layout>
__device__ inline int2 matrix_row(int lane) {
  const int matrix = lane / 8, row = lane % 8;
  return row_layout ? int2{8 * (matrix % 2) + row, 8 * (matrix / 2)}
                    : int2{8 * (matrix / 2) + row, 8 * (matrix % 2)};
}

template <int N_WARPS>
struct group_memory {
  // 16-bit shared tiles; the element types may differ.
  template <register_tile Tile, typename Shared>
  static __device__ void load(Tile& dst, const Shared& src) {
    using T = typename Shared::T;
    using packed = typename base_types::packing<T>::packed_type;
    static_assert(sizeof(T) == 2 && Shared::rows == N_WARPS * Tile::rows &&
                  Shared::cols == Tile::cols);
    const int2 at = matrix_row<Tile::row_layout>(threadIdx.x % WARP_THREADS);
    const int row = first_row<Tile>() + at.x;
    const uint32_t base = shared_address(src.data);
#pragma unroll
    for (int i = 0; i < Tile::height; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::width; ++j) {
        uint32_t raw[4];
        load_matrices<!Tile::row_layout>(raw,
                                         src.idx(base, {TILE_DIM * i + row, TILE_DIM * j + at.y}));
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          dst.tiles[i][j].data[k] = base_types::convertor<typename Tile::dtype, packed>::convert(
              reinterpret_cast<const packed&>(raw[k]));
        }
      }
    }
  }
  template <register_tile Tile, typename Shared>
    requires requires { Shared::cols; }
  static __device__ void store(Shared& dst, const Tile& src) {
    using T = typename Shared::T;
    using packed = typename base_types::packing<T>::packed_type;
    static_assert(sizeof(T) == 2 && Shared::rows == N_WARPS * Tile::rows &&
                  Shared::cols == Tile::cols);
    const int2 at = matrix_row<Tile::row_layout>(threadIdx.x % WARP_THREADS);
    const int row = first_row<Tile>() + at.x;
    const uint32_t base = shared_address(dst.data);
#pragma unroll
    for (int i = 0; i < Tile::height; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::width; ++j) {
        uint32_t raw[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const packed value =
              base_types::convertor<packed, typename Tile::dtype>::convert(src.tiles[i][j].data[k]);
          raw[k] = reinterpret_cast<const uint32_t&>(value);
        }
        store_matrices<!Tile::row_layout>(dst.idx(base, {TILE_DIM * i + row, TILE_DIM * j + at.y}),
                                          raw);
      }
    }
  }

  // An align vector of a warp from a float shared vector.
  template <register_vector Vector>
  static __device__ void load(Vector& dst, const sv<float, Vector::length>& src) {
    static_assert(N_WARPS == 1 && Vector::aligned, "one value a column of a row-layout tile");
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < Vector::outer_dim; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        dst[i][j] = *reinterpret_cast<const float2*>(&src.data[TILE_DIM * i + 8 * j + 2 * lane]);
      }
    }
  }

 private:
  template <typename Tile>
  static __device__ int first_row() {
    return threadIdx.x / WARP_THREADS % N_WARPS * Tile::rows;
  }
};

}  // namespace detail
}  // namespace kittens
