// Register tiles: to and from shared memory, by element address, and what is computed on them.
#pragma once

#include "harness/tiles.h"

// A warpgroup loads and stores a tile of 64 rows, by registers of type R.
template <typename T, typename R, typename L, int cols, int bytes>
__global__ void MoveTile(float* loaded, T* stored) {
  __shared__ alignas(1024) st<T, 64, cols, true, bytes> tile;
  rt<R, 16, cols, L> registers;
  const int first = 16 * warpgroup::warpid();
  for (int i = threadIdx.x; i < 64 * cols; i += 128) {
    tile[{i / cols, i % cols}] = Round<T>(i % 251);
  }
  warpgroup::sync(1);
  warpgroup::load(registers, tile);
  ForEach(registers, [&](int r, int c, R& x) { loaded[(first + r) * cols + c] = Widen(x); });
  warpgroup::sync(1);
  ForEach(registers, [&](int r, int c, R& x) { x = Round<R>((first + r) * 3 + c); });
  warpgroup::store(tile, registers);
  warpgroup::sync(1);
  for (int i = threadIdx.x; i < 64 * cols; i += 128) stored[i] = tile[{i / cols, i % cols}];
}

template <typename T, typename R, typename L, int cols, int bytes>
void TestMove() {
  Array<float> loaded(64 * cols);
  Array<T> stored(64 * cols);
  MoveTile<T, R, L, cols, bytes><<<1, 128>>>(loaded.data, stored.data);
  Report(std::string("load, store ") + Name<T>() + " as " + Name<R>() +
             (std::is_same_v<L, row_l> ? " row" : " col") + " layout, " + std::to_string(cols) +
             " columns, swizzle " + std::to_string(bytes),
         loaded.Wrong([](int i) { return i % 251; }) +
             stored.Wrong([](int i) { return Widen(Round<T>(i / cols * 3 + i % cols)); }));
}

// A warp transposes one R x C block of a tile into another.
template <typename T, int R, int C, int bytes>
__global__ void MoveBlock(T* stored) {
  constexpr int kRows = 2 * R, kCols = 128;
  __shared__ alignas(1024) st<T, kRows, kCols, true, bytes> tile;
  __shared__ alignas(1024) st<T, 2 * C, 2 * R> turned;
  for (int i = threadIdx.x; i < kRows * kCols; i += 32) {
    tile[{i / kCols, i % kCols}] = Round<T>(i % 251);
  }
  for (int i = threadIdx.x; i < 4 * R * C; i += 32) turned[{i / (2 * R), i % (2 * R)}] = T(0.f);
  warp::sync();
  rt<T, R, C> block;
  warp::load(block, tile.template subtile<R, C>({1, 128 / C - 1}));
  auto to = turned.template subtile<C, R>({1, 1});
  warp::store(to, reinterpret_cast<rt<T, C, R, col_l>&>(block));
  warp::sync();
  for (int i = threadIdx.x; i < 4 * R * C; i += 32) stored[i] = turned[{i / (2 * R), i % (2 * R)}];
}

template <typename T, int R, int C, int bytes>
void TestBlock() {
  static_assert(R == 16);
  Array<T> stored(4 * R * C);
  MoveBlock<T, R, C, bytes><<<1, 32>>>(stored.data);
  Report(std::string("transpose a block ") + Name<T>() + " " + std::to_string(R) + "x" +
             std::to_string(C) + ", swizzle " + std::to_string(bytes),
         stored.Wrong([](int i) {
           const int row = i / (2 * R) - C, column = i % (2 * R) - R;
           return row < 0 || column < 0 ? 0 : ((R + column) * 128 + 128 - C + row) % 251;
         }));
}

// One map a result: out[n] is the n-th, a [16, 64] tile.
constexpr int kMaps = 12;
template <typename T>
__global__ void Maps(float* out) {
  using Tile = rt_fl<16, 64>;
  __shared__ sv_fl<64> scale, bias;
  for (int i = threadIdx.x; i < 64; i += 32) scale[i] = i, bias[i] = 1 - i;
  warp::sync();
  Tile x, y;
  row_vec<Tile> columns;
  col_vec<Tile> rows;
  const auto result = [&](int n, auto& tile) {
    ForEach(tile, [&](int r, int c, auto& v) { out[(n * 16 + r) * 64 + c] = Widen(v); });
  };
  ForEach(x, [](int r, int c, float& v) { v = Draw(1, r * 64 + c); });
  warp::row_sum(rows, x);
  warp::zero(y);
  rows = warp::apply(rows, [](int row, float sum) { return row + sum; });
  warp::sub_row(y, y, rows), result(0, y);
  warp::mul(rows, rows, 3.f);
  warp::mul_row(y, x, rows), result(1, y);
  warp::load(columns, scale);
  warp::broadcast_col(y, columns), result(2, y);
  warp::mul_col(y, x, columns), result(3, y);
  warp::add_col(y, x, columns), result(4, y);
  warp::mul(y, x, x), warp::add(y, y, x), result(5, y);
  warp::bin_map<base_ops::sub>(y, y, x), warp::mul(y, y, 0.5f), result(6, y);
  warp::unary_map<genie::Tanh>(y, x), result(7, y);
  rt<T, 16, 64> low;
  warp::copy(low, x), result(8, low);
  warp::copy(y, low), result(9, y);
  const unsigned keep[2] = {laneid() / 4 % 2u, 1u};  // rows 1, 3, 5, 7 and all of 8..
  genie::KeepRows(low, keep), result(10, low);
  warp::copy(y, x);
  genie::LayerNorm<T, 64>(low, y, scale, bias, 1e-5f), result(11, low);
}

template <typename T>
void TestMaps() {
  Array<float> out(kMaps * 16 * 64);
  Maps<T><<<1, 32>>>(out.data);
  const auto got = out.Get();
  const auto x = [](int r, int c) { return Draw(1, r * 64 + c); };
  const auto low = [&](int r, int c) { return Widen(Round<T>(x(r, c))); };
  float sums[16] = {}, squares[16] = {};
  for (int i = 0; i < 1024; ++i) sums[i / 64] += x(i / 64, i % 64);
  for (int i = 0; i < 1024; ++i) {
    const float centred = x(i / 64, i % 64) - sums[i / 64] / 64;
    squares[i / 64] += centred * centred;
  }
  const struct {
    const char* name;
    float tolerance;  // relative to 1 + |want|
    std::function<float(int, int)> want;
  } maps[kMaps] = {
      {"row_sum, apply, zero, sub_row", 1e-5f, [&](int r, int) { return -(r + sums[r]); }},
      {"mul of a vector, mul_row", 1e-5f,
       [&](int r, int c) { return x(r, c) * 3 * (r + sums[r]); }},
      {"load of a vector, broadcast_col", 0, [&](int, int c) { return float(c); }},
      {"mul_col", 0, [&](int r, int c) { return x(r, c) * c; }},
      {"add_col", 0, [&](int r, int c) { return x(r, c) + c; }},
      {"mul, add", 1e-6f, [&](int r, int c) { return x(r, c) * x(r, c) + x(r, c); }},
      {"bin_map, mul by a number", 1e-6f, [&](int r, int c) { return x(r, c) * x(r, c) / 2; }},
      {"unary_map, Tanh", 1e-3f, [&](int r, int c) { return std::tanh(x(r, c)); }},
      {"copy to 16 bits", 0, low},
      {"copy from 16 bits", 0, low},
      {"KeepRows", 0, [&](int r, int c) { return r >= 8 || r % 2 ? low(r, c) : 0.f; }},
      {"LayerNorm", std::is_same_v<T, half> ? 1e-3f : 8e-3f,
       [&](int r, int c) {
         return (x(r, c) - sums[r] / 64) / std::sqrt(squares[r] / 64 + 1e-5f) * c + 1 - c;
       }},
  };
  for (int n = 0; n < kMaps; ++n) {
    int64_t wrong = 0;
    for (int i = 0; i < 1024; ++i) {
      const float want = maps[n].want(i / 64, i % 64);
      const float error = std::abs(got[n * 1024 + i] - want);
      wrong += !(error <= maps[n].tolerance * (1 + std::abs(want)));
    }
    Report(std::string(maps[n].name) + " " + Name<T>(), wrong);
  }
}

// Sums over lanes and over rows.
template <typename T>
__global__ void Sums(float* over_lanes, float* over_rows) {
  float x[2] = {float(threadIdx.x), 1.f};
  genie::SumOver<1, 2, 8>(x);
  for (int i = 0; i < 2; ++i) over_lanes[2 * threadIdx.x + i] = x[i];
  rt<T, 16, 16> tile;
  ForEach(tile, [](int r, int c, T& v) { v = Round<T>(r * 2 + c); });
  float sums[4] = {1, 2, 3, 4};
  genie::AddRowSums(sums, tile);
  for (int i = 0; i < 4; ++i) over_rows[4 * threadIdx.x + i] = sums[i];
}

template <typename T>
void TestSums() {
  Array<float> over_lanes(64), over_rows(128);
  Sums<T><<<1, 32>>>(over_lanes.data, over_rows.data);
  // Lanes 4 and 16 stay apart: eight lanes whose other bits are 0, 1, 2, 3, 8, 9, 10, 11.
  Report(std::string("SumOver ") + Name<T>(), over_lanes.Wrong([](int i) {
    return i % 2 ? 8 : 44 + i / 2 / 4 % 2 * 32 + i / 2 / 16 * 128;
  }));
  Report(std::string("AddRowSums ") + Name<T>(), over_rows.Wrong([](int i) {
    const int row = i / 4 / 4 + i % 4 / 2 * 8;
    return i % 4 + 1 + 16 * 2 * row + 120;
  }));
}

// Objects in shared memory start at multiples of 1024 bytes, in order and behind one another.
__global__ void Allocate(int* offsets) {
  extern __shared__ alignment_dummy __shm[];
  shared_allocator allocator(reinterpret_cast<int*>(&__shm[0]) + 5);
  const auto offset = [](auto& object) {
    return static_cast<int>(reinterpret_cast<char*>(&object) - reinterpret_cast<char*>(__shm) +
                            __cvta_generic_to_shared(__shm) % 1024);
  };
  offsets[0] = offset(allocator.template allocate<st<bf16, 16, 16>>());
  offsets[1] = offset(allocator.template allocate<sv_fl<512>>());
  offsets[2] = offset(allocator.template allocate<semaphore>());
}

template <typename T>
void TestRegisters() {
  TestMove<T, T, row_l, 128, 32>(), TestMove<T, T, row_l, 128, 64>();
  TestMove<T, T, row_l, 128, 128>(), TestMove<T, T, row_l, 16, 32>();
  TestMove<T, T, col_l, 128, 32>(), TestMove<T, T, col_l, 128, 64>();
  TestMove<T, T, col_l, 128, 128>(), TestMove<T, T, col_l, 16, 32>();
  TestMove<T, float, row_l, 128, 128>(), TestMove<T, float, col_l, 64, 128>();
  TestBlock<T, 16, 16, 128>(), TestBlock<T, 16, 64, 128>(), TestBlock<T, 16, 32, 64>();
  TestBlock<T, 16, 128, 128>();
  TestMaps<T>();
  TestSums<T>();
}

inline void TestAllocator() {
  Array<int> offsets(3);
  Allocate<<<1, 1, 8192>>>(offsets.data);
  Report("shared_allocator", offsets.Wrong([](int i) { return 1024 * (i == 2 ? 4 : i + 1); }));
}
