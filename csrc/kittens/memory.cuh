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

// The address of base tile (i, j) of a 16-bit tile, given that of (0, 0): column bits below the
// permuted ones' reach are XORed like the rest, so a lane keeps one address for all base tiles.
template <typename Shared>
__device__ inline uint32_t base_tile_address(uint32_t first, int i, int j) {
  using whole = typename Shared::whole;
  static_assert((Shared::cols & (Shared::cols - 1)) == 0,
                "or a tile's first column has other bits");
  constexpr int per_group = whole::group_cols / TILE_DIM;
  const uint32_t address = first ^ (j % per_group * TILE_DIM * sizeof(typename Shared::T));
  return address + (j / per_group * whole::rows + TILE_DIM * i) * whole::swizzle_bytes;
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
    const uint32_t first = src.idx(shared_address(src.data), first_element<Tile>());
#pragma unroll
    for (int i = 0; i < Tile::height; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::width; ++j) {
        uint32_t raw[4];
        load_matrices<!Tile::row_layout>(raw, base_tile_address<Shared>(first, i, j));
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
    const uint32_t first = dst.idx(shared_address(dst.data), first_element<Tile>());
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
        store_matrices<!Tile::row_layout>(base_tile_address<Shared>(first, i, j), raw);
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
  // Of this lane's matrix row in base tile (0, 0).
  template <typename Tile>
  static __device__ int2 first_element() {
    const int2 at = matrix_row<Tile::row_layout>(threadIdx.x % WARP_THREADS);
    const int warp = threadIdx.x / WARP_THREADS % N_WARPS;
    return {warp * Tile::rows + at.x, at.y};
  }
};

}  // namespace detail
}  // namespace kittens
