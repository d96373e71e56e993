// What the stages around the attention core share: where a tile of pairs lies, how weights enter
// shared memory, and what is read of a masked pair that holds garbage. Include kittens.cuh first.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kittens/extensions.cuh"
#include "resident.cuh"

namespace genie {

constexpr int kPairs = 64;   // of a tile: the rows of one WGMMA
constexpr int kHidden = 64;  // hidden columns of a chunk: one 128-byte swizzled row
constexpr int kHeads = 16;   // columns of the bias product, of which H are used
constexpr float kLog2E = 1.4426950408889634f;

// Tile `index` of [B, rows, tiles of columns]. Neighbours run along the columns, or along the rows
// where one side of a stage is read by columns: what blocks read at one time then lies together.
struct Place {
  int batch, row, tile;
  __device__ Place(int index, int rows, int column_tiles, bool along_rows) {
    const int inner = along_rows ? rows : column_tiles, outer = along_rows ? column_tiles : rows;
    const int rest = index / inner;
    const int first = index % inner, second = rest % outer;
    batch = rest / outer;
    row = along_rows ? first : second;
    tile = along_rows ? second : first;
  }
  // The position along the row of this lane's pair `i`, 0 or 1, in the registers of its warp.
  __device__ int position(int i) const {
    return kPairs * tile + 16 * kittens::warpgroup::warpid() + 8 * i + kittens::laneid() / 4;
  }
};

// Whether the pair at position `column` of row `row` of attention is valid; those past the end are.
__device__ inline bool IsValid(const uint8_t* mask, bool ending, int batch, int64_t rows,
                               int64_t columns, int row, int column) {
  if (!mask || column >= (ending ? rows : columns)) return true;
  const int64_t z_row = ending ? column : row, z_column = ending ? row : column;
  return mask[(batch * rows + z_row) * columns + z_column] != 0;
}

// Fills a tile with `factor` times the bias' [C, heads] kernel; columns past the heads are zero.
template <int kThreads, typename Weight, typename Stored>
__device__ void FillBiasWeight(Weight& tile, const Stored* kernel, int heads, float factor) {
  using namespace kittens;
  for (int i = threadIdx.x; i < Weight::num_elements; i += kThreads) {
    const int channel = i / kHeads, head = i % kHeads;
    float weight = 0;
    if (head < heads) {
      weight = base_types::convertor<float, Stored>::convert(kernel[channel * heads + head]);
    }
    tile[{channel, head}] =
        base_types::convertor<typename Weight::T, float>::convert(factor * weight);
  }
}

// The gradient of the bias [B, H, Q, Kp] at the pairs of a tile of [rows, columns], a head a
// column.
template <typename T, typename Given>
__device__ void LoadBiasGradient(kittens::rt<T, 16, kHeads>& to, const Given& given,
                                 const Place& at, int rows, int columns) {
  using namespace kittens;
  const bool turned = given.ending && given.bias_as_z;
  const int64_t queries = turned ? columns : rows, keys = turned ? rows : columns;
  const int64_t padded = (keys + 7) / 8 * 8;
  const int64_t row_step = turned ? 1 : padded, step = turned ? padded : 1;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int column = at.position(k % 2);
    float pair[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int head = 8 * (k / 2) + 2 * (laneid() % 4) + e;
      const float* plane =
          given.d_bias + (int64_t{at.batch} * given.heads + head) * queries * padded;
      const bool is_there = head < given.heads && column < columns;
      pair[e] = is_there ? __ldg(plane + at.row * row_step + column * step) : 0.f;
    }
    using convert = base_types::convertor<typename rt<T, 16, kHeads>::dtype, float2>;
    to.tiles[0][0].data[k] = convert::convert({pair[0], pair[1]});
  }
}

// Columns 64 chunk.. of a warpgroup's rows of a wider register tile.
template <int C, typename Chunk>
__device__ void LoadColumns(kittens::rt_fl<16, C>& to, const Chunk& from, int chunk) {
  using namespace kittens;
  auto& part = reinterpret_cast<rt_fl<16, kHidden>&>(to.tiles[0][chunk * kHidden / TILE_DIM]);
  warpgroup::load(part, from);
}
template <typename T, int C, typename Chunk>
__device__ void StoreColumns(Chunk& to, const kittens::rt<T, 16, C>& from, int chunk) {
  using namespace kittens;
  warpgroup::store(
      to, reinterpret_cast<const rt<T, 16, kHidden>&>(from.tiles[0][chunk * kHidden / TILE_DIM]));
}

// Makes x, the LayerNorm of 16 pairs, what it is for zeros at masked pairs that hold inf or NaN:
// the norm's bias. Those rows, and no others, are NaN throughout. valid(i) is whether this lane's
// pair i is valid, and asked for NaN only; `garbage` says which pairs were replaced.
template <typename T, int C, typename Valid>
__device__ void ReplaceGarbage(kittens::rt<T, 16, C>& x,
                               const std::type_identity_t<kittens::sv_fl<C>>& norm_bias,
                               bool (&garbage)[2], Valid&& valid) {
  using namespace kittens;
#pragma unroll
  for (int i = 0; i < 2; ++i) garbage[i] = __hisnan(x.tiles[0][0].data[i].x);
  if (!__any_sync(~0u, garbage[0] || garbage[1])) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) garbage[i] = garbage[i] && !valid(i);
  using convert = base_types::convertor<typename rt<T, 16, C>::dtype, float2>;
  row_vec<rt_fl<16, C>> bias;
  warp::load(bias, norm_bias);
#pragma unroll
  for (int j = 0; j < C / TILE_DIM; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (garbage[k % 2]) x.tiles[0][j].data[k] = convert::convert(bias[j][k / 2]);
    }
  }
}

// Adds to `update` what the block holds of z, garbage read as zero.
template <typename T, int width, typename Block>
__device__ void AddPairs(kittens::rt_fl<16, width>& update, const Block& block,
                         const bool (&garbage)[2]) {
  using namespace kittens;
  rt<T, 16, width> z;
  rt_fl<16, width> wide;
  const unsigned keep[2] = {!garbage[0], !garbage[1]};
  warp::load(z, block);
  KeepRows(z, keep);
  warp::copy(wide, z);
  warp::add(update, update, wide);
}

// z becomes its LayerNorm before scale and bias, (z - mean) inverse_deviation.
template <int C, typename Vector>
__device__ void Normalise(kittens::rt_fl<16, C>& z, Vector& mean, Vector& inverse_deviation,
                          float epsilon) {
  using namespace kittens;
  Vector variance;
  warp::row_sum(mean, z);
  warp::mul(mean, mean, 1.f / C);
  warp::sub_row(z, z, mean);
  rt_fl<16, C> square;
  warp::mul(square, z, z);
  warp::row_sum(variance, square);
  inverse_deviation =
      warp::apply(variance, [&](int, float sum) { return rsqrtf(sum * (1.f / C) + epsilon); });
  warp::mul_row(z, z, inverse_deviation);
}

// The same from its statistics: y = z statistics.x + statistics.y, row by row.
template <typename T, int C>
__device__ void Normalise(kittens::rt<T, 16, C>& y, kittens::rt_fl<16, C>& z,
                          const float2 (&statistics)[2]) {
  using namespace kittens;
  const unsigned keep[2] = {statistics[0].x != 0, statistics[1].x != 0};
#pragma unroll
  for (int j = 0; j < C / TILE_DIM; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const auto [factor, offset] = statistics[k % 2];
      float2& pair = z.tiles[0][j].data[k];
      pair = {fmaf(pair.x, factor, offset), fmaf(pair.y, factor, offset)};
    }
  }
  warp::copy(y, z);
  KeepRows(y, keep);
}

// dx becomes dz, given y = LayerNorm(z) before scale and bias and the deviation's inverse.
template <int C>
__device__ void DifferentiateNorm(
    kittens::rt_fl<16, C>& dx, kittens::rt_fl<16, C>& y,
    const std::type_identity_t<kittens::sv_fl<C>>& norm_scale,
    const kittens::col_vec<kittens::rt_fl<16, C>>& inverse_deviation) {
  using namespace kittens;
  row_vec<rt_fl<16, C>> scale;
  col_vec<rt_fl<16, C>> mean, along;
  rt_fl<16, C> product;
  warp::load(scale, norm_scale);
  warp::mul_col(dx, dx, scale);
  warp::row_sum(mean, dx);
  warp::mul(mean, mean, 1.f / C);
  warp::mul(product, dx, y);
  warp::row_sum(along, product);
  warp::mul(along, along, 1.f / C);
  warp::sub_row(dx, dx, mean);
  warp::mul_row(y, y, along);
  warp::bin_map<base_ops::sub>(dx, dx, y);
  warp::mul_row(dx, dx, inverse_deviation);
}

// Which of this lane's pairs are garbage under the mask, given what Normalise made of them.
template <int C, typename Valid>
__device__ void FindGarbage(bool (&garbage)[2], const kittens::rt_fl<16, C>& y, Valid&& valid) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    garbage[i] = isnan(y.tiles[0][0].data[i].x);
    if (garbage[i]) garbage[i] = !valid(i);
  }
}

// Adds to `sums` the columns 8 (thread % (cols / 8)).. of this thread's share of a tile's rows.
template <typename Tile>
__device__ void AddColumns(float (&sums)[8], const Tile& tile, int thread) {
  using namespace kittens;
  using T = typename Tile::T;
  using packed = typename base_types::packing<T>::packed_type;
  constexpr int kChunks = Tile::cols / 8, kRows = Tile::rows * kChunks / WARPGROUP_THREADS;
  const int column = thread % kChunks * 8, first_row = thread / kChunks * kRows;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const uint4 raw = *reinterpret_cast<const uint4*>(&tile[{first_row + row, column}]);
    const auto* pairs = reinterpret_cast<const packed*>(&raw);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 x = base_types::convertor<float2, packed>::convert(pairs[k]);
      sums[2 * k] += x.x;
      sums[2 * k + 1] += x.y;
    }
  }
}

// Writes what AddColumns left in the threads of a warpgroup, added in order, through `scratch` of
// 8 x 128 floats. `barrier` is the warpgroup's.
template <int cols>
__device__ void WriteColumns(float* to, const float (&sums)[8], float* scratch, int barrier) {
  using namespace kittens;
  constexpr int kChunks = cols / 8, kGroups = WARPGROUP_THREADS / kChunks;
  const int thread = warpgroup::laneid();
  for (int i = 0; i < 8; ++i) {
    scratch[thread / kChunks * cols + thread % kChunks * 8 + i] = sums[i];
  }
  warpgroup::sync(barrier);
  for (int column = thread; column < cols; column += WARPGROUP_THREADS) {
    float total = 0;
    for (int group = 0; group < kGroups; ++group) total += scratch[group * cols + column];
    to[column] = total;
  }
  warpgroup::sync(barrier);
}

// Writes a warp's rows of a [.., stride] matrix at `to`.
template <int cols>
__device__ void WriteRows(float* to, const kittens::rt_fl<16, cols>& tile, int stride) {
  using namespace kittens;
#pragma unroll
  for (int j = 0; j < cols / TILE_DIM; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int row = 8 * (k % 2) + laneid() / 4,
                column = 16 * j + 8 * (k / 2) + 2 * (laneid() % 4);
      *reinterpret_cast<float2*>(&to[row * stride + column]) = tile.tiles[0][j].data[k];
    }
  }
}

}  // namespace genie
