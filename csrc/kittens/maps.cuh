// Elementwise maps, row and column maps and row sums on the registers of one warp.
#pragma once

#include "register.cuh"

namespace kittens {
namespace detail {

template <typename X>
concept register_tile = requires { X::packed_per_tile; };
template <typename X>
concept register_vector = requires { X::inner_dim; };

struct warp_maps {
  // dst = op(lhs, rhs) on every pair; rhs is a tile like dst, or a scalar.
  template <typename Op, register_tile Tile>
  static __device__ void bin_map(Tile& dst, const Tile& lhs, const Tile& rhs) {
#pragma unroll
    for (int i = 0; i < Tile::height; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::width; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          dst.tiles[i][j].data[k] = Op::op(lhs.tiles[i][j].data[k], rhs.tiles[i][j].data[k]);
        }
      }
    }
  }
  template <typename Op, register_vector Vector>
  static __device__ void bin_map(Vector& dst, const Vector& lhs, typename Vector::T2 rhs) {
#pragma unroll
    for (int i = 0; i < Vector::outer_dim; ++i) {
#pragma unroll
      for (int j = 0; j < Vector::inner_dim; ++j) dst[i][j] = Op::op(lhs[i][j], rhs);
    }
  }

  template <register_tile Tile>
  static __device__ void zero(Tile& dst) {
#pragma unroll
    for (int i = 0; i < Tile::height; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::width; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) dst.tiles[i][j].data[k] = {};
      }
    }
  }

  template <register_tile Tile>
  static __device__ void add(Tile& dst, const Tile& lhs, const Tile& rhs) {
    bin_map<base_ops::sum>(dst, lhs, rhs);
  }
  template <register_tile Tile>
  static __device__ void mul(Tile& dst, const Tile& lhs, const Tile& rhs) {
    bin_map<base_ops::mul>(dst, lhs, rhs);
  }
  template <register_tile Tile>
  static __device__ void mul(Tile& dst, const Tile& lhs, float rhs) {
#pragma unroll
    for (int i = 0; i < Tile::height; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::width; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float2 x = lhs.tiles[i][j].data[k];
          dst.tiles[i][j].data[k] = {x.x * rhs, x.y * rhs};
        }
      }
    }
  }
  template <register_vector Vector>
  static __device__ void mul(Vector& dst, const Vector& lhs, float rhs) {
    bin_map<base_ops::mul>(dst, lhs, float2{rhs, rhs});
  }

  template <typename Op, register_tile Tile>
  static __device__ void unary_map(Tile& dst, const Tile& src) {
#pragma unroll
    for (int i = 0; i < Tile::height; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::width; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          dst.tiles[i][j].data[k] = Op::template op<typename Tile::dtype>(src.tiles[i][j].data[k]);
        }
      }
    }
  }

  // v[index] = f(index, v[index]) for every element of an ortho vector.
  template <register_vector Vector, typename F>
  static __device__ Vector apply(const Vector& src, F&& f) {
    static_assert(!Vector::aligned, "one value a row");
    const int lane = threadIdx.x % WARP_THREADS / 4;
    Vector dst;
#pragma unroll
    for (int i = 0; i < Vector::outer_dim; ++i) {
      dst[i][0] = {f(TILE_DIM * i + lane, src[i][0].x), f(TILE_DIM * i + lane + 8, src[i][0].y)};
    }
    return dst;
  }

  // Converts the element type.
  template <register_tile To, register_tile From>
  static __device__ void copy(To& dst, const From& src) {
    static_assert(To::rows == From::rows && To::cols == From::cols);
    static_assert(std::is_same_v<typename To::layout, typename From::layout>);
    using convert = base_types::convertor<typename To::dtype, typename From::dtype>;
#pragma unroll
    for (int i = 0; i < To::height; ++i) {
#pragma unroll
      for (int j = 0; j < To::width; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          dst.tiles[i][j].data[k] = convert::convert(src.tiles[i][j].data[k]);
        }
      }
    }
  }

  // Row maps take one value a row, column maps one a column, of a row-layout tile.
  template <typename Op, register_tile Tile>
  static __device__ void row_map(Tile& dst, const Tile& src, const col_vec<Tile>& v) {
    static_assert(Tile::row_layout, "row layout only");
#pragma unroll
    for (int i = 0; i < Tile::height; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::width; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float value = k % 2 ? v[i][0].y : v[i][0].x;
          dst.tiles[i][j].data[k] = Op::op(src.tiles[i][j].data[k], float2{value, value});
        }
      }
    }
  }
  template <typename Op, register_tile Tile>
  static __device__ void col_map(Tile& dst, const Tile& src, const row_vec<Tile>& v) {
    static_assert(Tile::row_layout, "row layout only");
#pragma unroll
    for (int i = 0; i < Tile::height; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::width; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          dst.tiles[i][j].data[k] = Op::op(src.tiles[i][j].data[k], v[j][k / 2]);
        }
      }
    }
  }
  template <register_tile Tile>
  static __device__ void sub_row(Tile& dst, const Tile& src, const col_vec<Tile>& v) {
    row_map<base_ops::sub>(dst, src, v);
  }
  template <register_tile Tile>
  static __device__ void mul_row(Tile& dst, const Tile& src, const col_vec<Tile>& v) {
    row_map<base_ops::mul>(dst, src, v);
  }
  template <register_tile Tile>
  static __device__ void add_col(Tile& dst, const Tile& src, const row_vec<Tile>& v) {
    col_map<base_ops::sum>(dst, src, v);
  }
  // Every row becomes v.
  template <register_tile Tile>
  static __device__ void broadcast_col(Tile& dst, const row_vec<Tile>& v) {
    static_assert(Tile::row_layout, "row layout only");
#pragma unroll
    for (int i = 0; i < Tile::height; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::width; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) dst.tiles[i][j].data[k] = v[j][k / 2];
      }
    }
  }
  template <register_tile Tile>
  static __device__ void mul_col(Tile& dst, const Tile& src, const row_vec<Tile>& v) {
    col_map<base_ops::mul>(dst, src, v);
  }

  // Every lane gets the sums of the rows it holds.
  template <register_tile Tile>
  static __device__ void row_sum(col_vec<Tile>& sums, const Tile& src) {
    static_assert(Tile::row_layout, "row layout only");
#pragma unroll
    for (int i = 0; i < Tile::height; ++i) {
      float2 rows[2] = {};  // columns 0 and 1 of a pair, for rows l / 4 and l / 4 + 8
#pragma unroll
      for (int j = 0; j < Tile::width; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          rows[k % 2] = base_ops::sum::op(rows[k % 2], src.tiles[i][j].data[k]);
        }
      }
      float2 total = {rows[0].x + rows[0].y, rows[1].x + rows[1].y};
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        total.x += __shfl_xor_sync(~0u, total.x, lanes);
        total.y += __shfl_xor_sync(~0u, total.y, lanes);
      }
      sums[i][0] = total;
    }
  }
};

}  // namespace detail
}  // namespace kittens
