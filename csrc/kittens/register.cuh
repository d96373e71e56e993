// Register tiles and vectors of one warp.
//
// A base tile is 16 x 16. Lane l holds the pairs data[0..3]; element e of data[k] sits at
//   row layout: row 8 (k % 2) + l / 4,               column 8 (k / 2) + 2 (l % 4) + e
//   col layout: row 8 (k / 2) + 2 (l % 4) + e,       column 8 (k % 2) + l / 4
// so a row-layout tile read as a col-layout tile is its transpose.
#pragma once

#include "types.cuh"

namespace kittens {
namespace ducks {
namespace rt_layout {
struct row {};
struct col {};
}  // namespace rt_layout
namespace rv_layout {
struct align {};  // eight copies: data[i][j] holds elements 16 i + 8 j + 2 (l % 4) + {0, 1}
struct ortho {};  // four copies: data[i][0] holds elements 16 i + l / 4 + {0, 8}
}  // namespace rv_layout
}  // namespace ducks

using row_l = ducks::rt_layout::row;
using col_l = ducks::rt_layout::col;
using align_l = ducks::rv_layout::align;
using ortho_l = ducks::rv_layout::ortho;

template <typename T, size_t length_, typename layout_>
struct rv {
  static_assert(length_ % TILE_DIM == 0, "vectors are counted in 16 elements");
  using T2 = typename base_types::packing<T>::packed_type;
  using dtype = T2;
  using layout = layout_;
  static constexpr bool aligned = std::is_same_v<layout, align_l>;
  static constexpr int length = length_;
  static constexpr int outer_dim = length_ / TILE_DIM;
  static constexpr int inner_dim = aligned ? 2 : 1;

  dtype data[outer_dim][inner_dim];

  __device__ dtype* operator[](int i) { return data[i]; }
  __device__ const dtype* operator[](int i) const { return data[i]; }
};

template <typename T_, typename layout_>
struct rt_base {
  using T = T_;
  using T2 = typename base_types::packing<T>::packed_type;
  using dtype = T2;
  static constexpr int packed_per_tile = 4;
  dtype data[packed_per_tile];
};

template <typename T_, int rows_, int cols_, typename layout_ = row_l>
struct rt {
  static_assert(rows_ % TILE_DIM == 0 && cols_ % TILE_DIM == 0, "tiles are made of 16 x 16 tiles");
  using T = T_;
  using T2 = typename base_types::packing<T>::packed_type;
  using dtype = T2;
  using layout = layout_;
  static constexpr bool row_layout = std::is_same_v<layout, row_l>;
  static constexpr int rows = rows_, cols = cols_;
  static constexpr int height = rows / TILE_DIM, width = cols / TILE_DIM;
  static constexpr int packed_per_tile = 4;
  using row_vec = rv<T, cols_, std::conditional_t<row_layout, align_l, ortho_l>>;
  using col_vec = rv<T, rows_, std::conditional_t<row_layout, ortho_l, align_l>>;

  rt_base<T, layout> tiles[height][width];
};

template <int rows, int cols, typename layout = row_l>
using rt_fl = rt<float, rows, cols, layout>;

template <typename Tile>
using row_vec = typename Tile::row_vec;
template <typename Tile>
using col_vec = typename Tile::col_vec;

}  // namespace kittens
