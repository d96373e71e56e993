// TMA: the shared image of a tile, its tails, and the way back.
#pragma once

#include "harness/tiles.h"

enum class Back { kStore, kAdd };

template <typename Global, typename Tile, int axis, cache_policy policy, Back back>
__global__ void MoveByTma(const __grid_constant__ Global from, const __grid_constant__ Global to,
                          int4 at, typename Tile::T* image, typename Tile::T* through) {
  __shared__ alignas(1024) Tile tile;
  __shared__ semaphore arrived;
  const coord<Tile> place(at.x, at.y, at.z, at.w);
  if (threadIdx.x == 0) {
    init_semaphore(arrived, 0, 1);
    tma::expect(arrived, tile);
    tma::load_async<axis, policy>(tile, from, place, arrived);
  }
  __syncthreads();
  wait(arrived, 0);
  for (int i = threadIdx.x; i < Tile::num_elements; i += blockDim.x) {
    image[i] = tile.data[i];
    through[i] = tile[{i / Tile::cols, i % Tile::cols}];
  }
  if constexpr (back == Back::kStore) {
    warpgroup::tma::store_async<axis, NORMAL>(to, tile, place);
    warpgroup::tma::store_async_read_wait();
    warpgroup::tma::store_async_wait();
  } else if (threadIdx.x == 0) {
    tma::store_add_async(to, tile, place);
    tma::store_async_wait();
  }
}

struct TensorSize {
  int b, d, r, c;
};

// A tile of a [b, d, r, c] tensor whose rows run along `axis`, at `at` in units of the tile. What
// lies past an end loads as zero and is not stored. 16-byte chunk q of a row of S bytes lies at
// chunk q ^ (address / 128) % (S / 16).
template <typename Tile, int axis, cache_policy policy = NORMAL, Back back = Back::kStore>
void TestTma(TensorSize size, int4 at) {
  using T = typename Tile::T;
  using Global = gl<T, -1, -1, -1, -1, tma::descriptor<Tile, axis>>;
  const int elements = size.b * size.d * size.r * size.c;
  const auto value = [](int i) { return i % 127; };
  const auto old = [](int i) { return i % 61; };
  Array<T> from(elements), to(elements + 4096), image(Tile::num_elements),
      through(Tile::num_elements);
  from.Set([&](int i) { return Round<T>(value(i)); });
  if (back == Back::kAdd) to.Set([&](int i) { return Round<T>(old(i)); });
  const auto tensor = [&](Array<T>& array) {
    return Global(array.data, size_t(size.b), size_t(size.d), size_t(size.r), size_t(size.c));
  };
  MoveByTma<Global, Tile, axis, policy, back>
      <<<1, 128>>>(tensor(from), tensor(to), at, image.data, through.data);

  // Where an element of the tile lies in the tensor, or -1.
  const auto index = [&](int row, int column) {
    const int d = axis == dim::DEPTH ? at.y * Tile::rows + row : at.y;
    const int r = axis == dim::ROW ? at.z * Tile::rows + row : at.z;
    const int c = at.w * Tile::cols + column;
    if (d >= size.d || r >= size.r || c >= size.c) return -1;
    return ((at.x * size.d + d) * size.r + r) * size.c + c;
  };
  const auto loaded = [&](int row, int column) {
    const int i = index(row, column);
    return i < 0 ? 0.f : float(value(i));
  };
  std::vector<bool> covered(to.size);
  for (int i = 0; i < Tile::num_elements; ++i) {
    const int place = index(i / Tile::cols, i % Tile::cols);
    if (place >= 0) covered[place] = true;
  }
  const std::string name =
      std::string(Name<T>()) + " " + std::to_string(Tile::rows) + "x" + std::to_string(Tile::cols) +
      ", swizzle " + std::to_string(Tile::swizzle_bytes) +
      (axis == dim::ROW ? "" : ", along the depth") + (policy == NORMAL ? "" : ", evict first");
  constexpr int kGroup = Tile::group_cols, kChunk = 16 / sizeof(T);
  Report("TMA image " + name, image.Wrong([&](int i) {
    const int row = i / kGroup % Tile::rows, group = i / kGroup / Tile::rows;
    const int chunk = i % kGroup / kChunk ^ (i * int(sizeof(T)) / 128 % (Tile::swizzle_bytes / 16));
    return loaded(row, group * kGroup + chunk * kChunk + i % kChunk);
  }));
  Report("TMA load " + name,
         through.Wrong([&](int i) { return loaded(i / Tile::cols, i % Tile::cols); }));
  int64_t wrong = 0;
  const auto got = to.Get();
  for (int i = 0; i < static_cast<int>(got.size()); ++i) {
    const float x = Widen(got[i]);
    if (back == Back::kAdd) {
      wrong += x != Widen(Round<T>(old(i) + (covered[i] ? value(i) : 0)));
    } else {
      wrong += covered[i] ? x != value(i) : x == x;  // what is not written stays NaN
    }
  }
  Report((back == Back::kAdd ? "TMA add " : "TMA store ") + name, wrong);
}

// The second tile along each axis, with 13 rows and 8 columns left at most.
inline void TestAllTma() {
  TestTma<st<bf16, 32, 64, true, 32>, dim::ROW>({1, 1, 45, 128}, {0, 0, 1, 1});
  TestTma<st<bf16, 32, 64, true, 64>, dim::ROW>({1, 1, 45, 128}, {0, 0, 1, 1});
  TestTma<st<bf16, 32, 64>, dim::ROW>({2, 3, 45, 72}, {1, 2, 1, 1});
  TestTma<st<half, 16, 32>, dim::ROW>({2, 3, 20, 40}, {1, 2, 1, 1});
  TestTma<st<half, 64, 16>, dim::ROW>({2, 3, 77, 24}, {1, 2, 1, 1});
  TestTma<st<bf16, 64, 256>, dim::ROW>({1, 3, 77, 256}, {0, 2, 1, 0});
  TestTma<st<half, 64, 64>, dim::DEPTH>({2, 80, 3, 72}, {1, 1, 2, 1});
  TestTma<st<bf16, 64, 128>, dim::DEPTH>({2, 77, 3, 128}, {1, 1, 2, 0});
  TestTma<st<bf16, 16, 64>, dim::DEPTH>({2, 20, 3, 72}, {1, 1, 2, 1});
  TestTma<st<float, 64, 32>, dim::DEPTH>({2, 64, 3, 40}, {1, 0, 2, 1});
  TestTma<st<bf16, 64, 32>, dim::DEPTH, EVICT_FIRST>({2, 77, 3, 32}, {1, 1, 2, 0});
  TestTma<st<half, 64, 16>, dim::DEPTH, EVICT_FIRST>({2, 77, 3, 16}, {1, 1, 2, 0});
  TestTma<st<bf16, 32, 64>, dim::ROW, NORMAL, Back::kAdd>({1, 3, 45, 128}, {0, 2, 1, 1});
  TestTma<st<half, 32, 64>, dim::ROW, NORMAL, Back::kAdd>({1, 3, 45, 128}, {0, 2, 1, 1});
}
