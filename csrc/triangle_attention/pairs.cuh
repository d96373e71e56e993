// What the stages around the attention core share: where a tile of pairs lies, how weights enter
// shared memory, and what is read of a masked pair that holds garbage. Include kittens.cuh first.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kittens/extensions.cuh"

namespace genie {

constexpr int kPairs = 64;   // of a tile: the rows of one WGMMA
constexpr int kHidden = 64;  // hidden columns of a chunk: one 128-byte swizzled row

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

// Fills `count` tiles by all threads: tile n with `factor` times the block of a kernel that
// source(n) points to and whose rows are `stride` apart.
template <int kThreads, typename Weight, typename Source>
__device__ void FillWeights(Weight* tiles, int count, int stride, float factor, Source&& source) {
  using namespace kittens;
  using T = typename Weight::T;
  using Stored = std::remove_const_t<std::remove_pointer_t<decltype(source(0))>>;
  constexpr int kVector = 8;  // elements of a 16-byte chunk of a tile's row
  constexpr int kVectors = Weight::num_elements / kVector, kRowVectors = Weight::cols / kVector;
  constexpr int kLoads = kVector * sizeof(Stored) / sizeof(uint4);
#pragma unroll 4
  for (int i = threadIdx.x; i < count * kVectors; i += kThreads) {
    const int n = i / kVectors, row = i % kVectors / kRowVectors;
    const int column = i % kRowVectors * kVector;
    const Stored* from = source(n) + row * stride + column;
    uint4 raw[kLoads], packed;
#pragma unroll
    for (int j = 0; j < kLoads; ++j) raw[j] = __ldg(reinterpret_cast<const uint4*>(from) + j);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float x =
          base_types::convertor<float, Stored>::convert(reinterpret_cast<const Stored*>(raw)[j]);
      reinterpret_cast<T*>(&packed)[j] = base_types::convertor<T, float>::convert(factor * x);
    }
    *reinterpret_cast<uint4*>(&tiles[n][{row, column}]) = packed;
  }
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

// Lets `kernel` use `shared` bytes and counts the device's processors.
template <typename Kernel>
cudaError_t Prepare(Kernel kernel, int shared, int* processors) {
  int device;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
}

}  // namespace genie
