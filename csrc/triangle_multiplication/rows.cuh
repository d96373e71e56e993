// What a warp does to 16 pairs, one a row of its tile: statistics over channels, masks, transposes.
#pragma once

#include "kittens.cuh"
#include "kittens/extensions.cuh"

namespace genie {

// A value that all lanes share, told to the compiler so that what follows from it takes uniform
// registers.
__device__ inline int Uniform(int x) { return __shfl_sync(~0u, x, 0); }

// Registers and element (of a row-layout tile of 16 rows) as floats, rounded on the way back.
template <typename T2>
__device__ inline float2 Unpack(T2 pair) {
  return kittens::base_types::convertor<float2, T2>::convert(pair);
}
template <typename T2>
__device__ inline T2 Pack(float2 pair) {
  return kittens::base_types::convertor<T2, float2>::convert(pair);
}

// A pair's mask, asked for where this stands: the compiler would move the load behind the waits
// that hide it.
__device__ inline unsigned MaskAt(const uint8_t* at) {
  unsigned valid;
  asm volatile("ld.volatile.global.u8 %0, [%1];" : "=r"(valid) : "l"(at));
  return valid;
}

// The sum over the four lanes that share a row.
__device__ inline float RowTotal(float part) {
  part += __shfl_xor_sync(~0u, part, 1);
  return part + __shfl_xor_sync(~0u, part, 2);
}

// Columns 16 j .. 16 j + 15 of a vector as a row-layout tile holds them: for data[0..1],
// data[2..3].
struct Columns {
  float2 halves[2];
  template <size_t length>
  __device__ Columns(const kittens::sv_fl<length>& v, int j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      halves[i] =
          *reinterpret_cast<const float2*>(&v.data[16 * j + 8 * i + 2 * (kittens::laneid() % 4)]);
    }
  }
  __device__ const float2& of(int k) const { return halves[k / 2]; }
};

// Has the compiler unpack a 16-bit tile again in the next pass over it rather than keep floats.
template <typename Tile>
__device__ inline void Forget(Tile& tile) {
  if constexpr (sizeof(typename Tile::dtype) == 4) {
#pragma unroll
    for (int j = 0; j < Tile::width; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        asm volatile("" : "+r"(reinterpret_cast<unsigned&>(tile.tiles[0][j].data[k])));
      }
    }
  }
}

// Mean and 1 / deviation of the rows lane / 4 and lane / 4 + 8, two passes in float32. Between the
// passes `repair` may change the tile and its means.
struct Moments {
  float mean[2], scale[2];
};
template <bool kForget = false, typename Tile, typename Repair>
__device__ inline Moments MomentsOf(Tile& tile, float epsilon, const Repair& repair) {
  Moments m;
  float sum[2] = {}, square[2] = {};
#pragma unroll
  for (int j = 0; j < Tile::width; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 z = Unpack(tile.tiles[0][j].data[k]);
      sum[k % 2] += z.x + z.y;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) m.mean[i] = RowTotal(sum[i]) * (1.f / Tile::cols);
  repair(m.mean);
  if constexpr (kForget) Forget(tile);
#pragma unroll
  for (int j = 0; j < Tile::width; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 z = Unpack(tile.tiles[0][j].data[k]);
      const float2 centred = {z.x - m.mean[k % 2], z.y - m.mean[k % 2]};
      square[k % 2] += centred.x * centred.x + centred.y * centred.y;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    m.scale[i] = rsqrtf(RowTotal(square[i]) * (1.f / Tile::cols) + epsilon);
  }
  if constexpr (kForget) Forget(tile);
  return m;
}

template <bool kForget = false, typename Tile>
__device__ inline Moments MomentsOf(Tile& tile, float epsilon) {
  return MomentsOf<kForget>(tile, epsilon, [](float (&)[2]) {});
}

// x = (z - mean) / deviation * scale + bias, rounded once; z may be x.
template <typename X, typename Z>
__device__ inline void Normalize(X& x, const Z& z, const Moments& m,
                                 const kittens::sv_fl<X::cols>& scale,
                                 const kittens::sv_fl<X::cols>& bias) {
#pragma unroll
  for (int j = 0; j < X::width; ++j) {
    if (j % 4 == 0) kittens::warp::sync();  // loads of vectors stay behind, and few
    const Columns scales(scale, j), biases(bias, j);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 pair = Unpack(z.tiles[0][j].data[k]);
      const float2 normal = {(pair.x - m.mean[k % 2]) * m.scale[k % 2],
                             (pair.y - m.mean[k % 2]) * m.scale[k % 2]};
      x.tiles[0][j].data[k] = Pack<typename X::dtype>(
          {normal.x * scales.of(k).x + biases.of(k).x, normal.y * scales.of(k).y + biases.of(k).y});
    }
  }
}

// x = (z - mean) / deviation, rounded once; z may be x.
template <typename X, typename Z>
__device__ inline void Standardize(X& x, Z& z, const Moments& m) {
#pragma unroll
  for (int j = 0; j < X::width; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 pair = Unpack(z.tiles[0][j].data[k]);
      x.tiles[0][j].data[k] = Pack<typename X::dtype>(
          {(pair.x - m.mean[k % 2]) * m.scale[k % 2], (pair.y - m.mean[k % 2]) * m.scale[k % 2]});
    }
  }
}

// The moments of a 16-bit tile whose rows that are not `readable` read as zeros if their sum is
// infinity or NaN. `readable`, as KeepRows takes it, then says which rows were kept.
template <typename Tile>
__device__ inline Moments MomentsOfReadable(Tile& z, unsigned (&readable)[2], float epsilon) {
  return MomentsOf<true>(z, epsilon, [&](float (&mean)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      readable[i] |= isfinite(mean[i]);
      if (!readable[i]) mean[i] = 0;
    }
    if (!__all_sync(~0u, readable[0] && readable[1])) KeepRows(z, readable);
  });
}

// Adds the vector to every row.
template <typename Tile>
__device__ inline void AddToRows(Tile& tile, const kittens::sv_fl<Tile::cols>& row) {
#pragma unroll
  for (int j = 0; j < Tile::width; ++j) {
    const Columns values(row, j);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      tile.tiles[0][j].data[k].x += values.of(k).x;
      tile.tiles[0][j].data[k].y += values.of(k).y;
    }
  }
}

// The transpose of columns 16 w .. 16 w + 15 of a shared tile of H rows and 64 columns, which for
// float32 are two tiles of one swizzle group each.
template <typename T, int H>
__device__ inline void LoadTransposed(kittens::rt<T, 16, H>& dst, kittens::st<T, H, 64> (&src)[1],
                                      int w) {
  const auto columns = src[0].template subtile<H, 16>({0, w});
  kittens::warp::load(Transposed(dst), columns);
}
// Where this lane's elements of such a tile in float32 lie: of column half k % 2 and of row e of a
// pair; further rows of eight keep the permutation.
struct TransposedFloats {
  float* at[2][2];
  template <int H>
  __device__ TransposedFloats(kittens::st<float, H, 32> (&tile)[2], int w) {
    const int lane = kittens::laneid(), row = 2 * (lane % 4), column = 16 * (w % 2) + lane / 4;
    char* base = reinterpret_cast<char*>(tile[w / 2].data);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int bytes = (128 * (row + e) + 4 * (column + 8 * half)) ^ (row + e) << 4;
        at[half][e] = reinterpret_cast<float*>(base + bytes);
      }
    }
  }
  __device__ float& of(int j, int k, int e) const {
    return at[k % 2][e][(16 * j + 8 * (k / 2)) * 32];
  }
};
template <int H>
__device__ inline void LoadTransposed(kittens::rt_fl<16, H>& dst,
                                      kittens::st<float, H, 32> (&src)[2], int w) {
  const TransposedFloats from(src, w);
#pragma unroll
  for (int j = 0; j < H / 16; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) dst.tiles[0][j].data[k] = {from.of(j, k, 0), from.of(j, k, 1)};
  }
}

// The way back, of rows 64 part .. 64 part + 63.
template <typename T, int H>
__device__ inline void StoreTransposed(kittens::st<T, H, 64> (&dst)[1], kittens::rt_fl<16, 64>& src,
                                       int w, int part) {
  auto& rows = reinterpret_cast<kittens::st<T, 64, 64>*>(dst)[part];
  auto columns = rows.template subtile<64, 16>({0, w});
  kittens::warp::store(columns, Transposed(src));
}
template <int H>
__device__ inline void StoreTransposed(kittens::st<float, H, 32> (&dst)[2],
                                       kittens::rt_fl<16, 64>& src, int w, int part) {
  const TransposedFloats to(dst, w);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      to.of(4 * part + j, k, 0) = src.tiles[0][j].data[k].x;
      to.of(4 * part + j, k, 1) = src.tiles[0][j].data[k].y;
    }
  }
}

}  // namespace genie
