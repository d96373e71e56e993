// The summers of the gated output's backward.
#pragma once

#include "triangle_multiplication/output_backward_block.cuh"
#include "triangle_multiplication/rows.cuh"

namespace genie::output_backward {

// A thread's share of the sums over a tile's pairs of two columns. Rows of one remainder by 8 have
// their chunks at one place.
template <typename Chunk, size_t kChunks>
__device__ inline void AddColumns(float2& sum, Chunk (&chunks)[kChunks]) {
  constexpr int kPairsOfColumns = kChunks * kColumns / 2;
  constexpr int kRows = kPairs * kPairsOfColumns / WARPGROUP_THREADS;
  const int at = warpgroup::laneid() % kPairsOfColumns;
  const int first = warpgroup::laneid() / kPairsOfColumns * kRows;
  auto& chunk = chunks[at / (kColumns / 2)];
  using T2 = typename base_types::packing<typename Chunk::T>::packed_type;
#pragma unroll 2
  for (int remainder = 0; remainder < 8; ++remainder) {
    const auto* from =
        reinterpret_cast<const T2*>(&chunk[int2{first + remainder, at % (kColumns / 2) * 2}]);
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      const float2 pair = Unpack(from[i * 8 * kColumns / 2]);
      sum.x += pair.x;
      sum.y += pair.y;
    }
  }
}

// Writes a warpgroup's products [64 per tile, C] and column sums to the block's partial.
template <int kTiles, int C>
__device__ void StoreSums(float* products, float* columns, const rt_fl<16, C> (&sums)[kTiles],
                          float2 column_sum) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < C / 16; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int row = 64 * i + 16 * warpgroup::warpid() + 8 * (k % 2) + laneid() / 4;
        const int column = 16 * j + 8 * (k / 2) + 2 * (laneid() % 4);
        *reinterpret_cast<float2*>(products + row * C + column) = sums[i].tiles[0][j].data[k];
      }
    }
  }
  *reinterpret_cast<float2*>(columns + 2 * warpgroup::laneid()) = column_sum;
}

// The chunks of all columns as one tile: the same bytes.
template <typename S>
__device__ inline auto& Whole(typename S::Chunk (&chunks)[S::kChunks]) {
  return reinterpret_cast<typename S::Chunks&>(chunks);
}

// A summer's work: `add` multiplies what a tile brings to the products; see StoreSums.
template <int kMains, int K, int C, typename Add, typename Tile>
__device__ void Sum(Add&& add, Tile* d, semaphore* ready, semaphore* summed, int tiles,
                    float* products, float* columns) {
  rt_fl<16, C> sums[K / 64] = {};
  float2 column_sum = {};
  for (int n = 0; n < tiles; ++n) {
    const int main = n % kMains;
    wait(ready[main], n / kMains % 2);
    add(sums, n);
    AddColumns(column_sum, d[main]);
    warpgroup::mma_async_wait();
#pragma unroll
    for (auto& tile : sums) Pin(tile);
    warp::arrive(summed[main]);
  }
  StoreSums<K / 64, C>(products, columns, sums, column_sum);
}

// One of them sums x^T ds for the gate's weight, the other y^T dp for the projection's.
template <typename T, int C, int H>
struct SumRole : Block<T, C, H> {
  using S = Shape<T, C, H>;
  using Block<T, C, H>::g, Block<T, C, H>::shared;

  __device__ void Run(bool gate) const {
    float* partial =
        g.given.partials + (int64_t{this->batch} * gridDim.x + blockIdx.x) * OutputPartial(C, H);
    float* columns = partial + OutputPartial(C, H) - 512;
    if (gate) {
      const auto add = [&](auto& sums, int n) {
        auto* x = reinterpret_cast<typename S::Block*>(&shared.z[n % S::kStages]);
#pragma unroll
        for (int i = 0; i < C / 64; ++i) {
          warpgroup::mma_AtB(sums[i], x[i], Whole<S>(shared.ds[n % S::kMains]));
        }
      };
      Sum<S::kMains, C, C>(add, shared.ds, shared.ready, shared.x_summed, this->own_tiles,
                           partial + H * C, columns + 256);
    } else {
      const auto add = [&](auto& sums, int n) {
        auto* y = reinterpret_cast<typename S::Block*>(&shared.Y(n));
#pragma unroll
        for (int i = 0; i < H / 64; ++i) {
          warpgroup::mma_AB(sums[i], y[i], Whole<S>(shared.d[n % S::kMains]));
        }
      };
      Sum<S::kMains, H, C>(add, shared.d, shared.ready, shared.y_summed, this->own_tiles, partial,
                           columns);
    }
  }
};

}  // namespace genie::output_backward
