// How the contraction writes a tile: what the consumers summed, or zeros.
#pragma once

#include "triangle_multiplication/contract_tiles.cuh"

namespace genie {
namespace contraction {

// 16-bit results leave by TMA through the warp's two buffers, float32 ones straight.
template <typename Sums, typename O, typename Output>
__device__ void Store(const O& o, const Place& at, Sums& sums, Output (&buffers)[2]) {
  const int row = WARPGROUP_WARPS * (kConsumers * at.row + warpgroupid()) + warpgroup::warpid();
  if constexpr (std::is_same_v<typename Output::T, typename decltype(o.out)::T>) {
#pragma unroll
    for (int block = 0; block < Sums::cols / kBlock; ++block) {
      auto& buffer = buffers[block % 2];
      block == 0 ? warp::tma::store_async_read_wait<0>() : warp::tma::store_async_read_wait<1>();
      warp::sync();
      warp::store(buffer, reinterpret_cast<rt_fl<TILE_DIM, kBlock>&>(
                              sums.tiles[0][block * kBlock / TILE_DIM]));
      FenceAsyncProxy();
      warp::sync();
      warp::tma::store_async<dim::ROW, NORMAL>(
          o.out, buffer, {0, at.batch, row, Sums::cols / kBlock * at.column + block});
    }
  } else {
    const int64_t rows = o.out.rows(), columns = o.out.cols();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t r = TILE_DIM * row + 8 * (k % 2) + laneid() / 4;
      float* to = o.out.raw_ptr + (at.batch * rows + r) * columns;
#pragma unroll
      for (int j = 0; j < Sums::width; ++j) {
        const int64_t c = Sums::cols * at.column + TILE_DIM * j + 8 * (k / 2) + laneid() % 4 * 2;
        if (r < rows && c < columns) {
          *reinterpret_cast<float2*>(to + c) = sums.tiles[0][j].data[k];
        }
      }
    }
  }
}

// Zeros for a tile, by the threads of the producer's warpgroup that load nothing: eight elements a
// thread and row.
template <typename S, typename O>
__device__ void StoreZeros(const O& o, const Place& at) {
  using Out = typename decltype(o.out)::T;
  constexpr int kVector = 8, kVectors = S::kColumns / kVector;
  constexpr int kThreads = WARPGROUP_THREADS - WARP_THREADS, kStep = kThreads / kVectors;
  static_assert(kThreads % kVectors == 0);
  const int thread = warpgroup::laneid() - WARP_THREADS;
  const int64_t rows = o.out.rows(), columns = o.out.cols(), step = kStep * columns;
  const int64_t column = S::kColumns * at.column + thread % kVectors * kVector;
  if (column >= columns) return;
  const int first = kRows * at.row + thread / kVectors;
  const int last = min(kRows * (at.row + 1), static_cast<int>(rows));
  Out* to = o.out.raw_ptr + (at.batch * rows + first) * columns + column;
#pragma unroll 4
  for (int row = first; row < last; row += kStep, to += step) {
#pragma unroll
    for (int i = 0; i < kVector * sizeof(Out) / sizeof(uint4); ++i) {
      reinterpret_cast<uint4*>(to)[i] = {};
    }
  }
}

}  // namespace contraction
}  // namespace genie
