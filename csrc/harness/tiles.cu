// Harness of the tile layer: each piece against its definition, one line a piece; exits with the
// number of pieces that differ.
#include "harness/tiles.h"

namespace {

// 1. Register tiles to and from shared memory, by element address, for a layout and a swizzle.
template <typename T, typename L, int bytes>
__global__ void MoveTile(T* loaded, T* stored) {
  using Shared = st<T, 64, 128, true, bytes>;
  __shared__ alignas(1024) Shared tile;
  rt<T, 16, 128, L> registers;
  const int first = 16 * warpgroup::warpid();
  for (int i = threadIdx.x; i < 64 * 128; i += 128) tile[{i / 128, i % 128}] = Round<T>(i % 251);
  warpgroup::sync(1);
  warpgroup::load(registers, tile);
  ForEach(registers, [&](int r, int c, T& x) { loaded[(first + r) * 128 + c] = x; });
  warpgroup::sync(1);
  ForEach(registers, [&](int r, int c, T& x) { x = Round<T>((first + r) * 3 + c); });
  warpgroup::store(tile, registers);
  warpgroup::sync(1);
  for (int i = threadIdx.x; i < 64 * 128; i += 128) stored[i] = tile[{i / 128, i % 128}];
}

template <typename T, typename L, int bytes>
void TestMove() {
  Array<T> loaded(64 * 128), stored(64 * 128);
  MoveTile<T, L, bytes><<<1, 128>>>(loaded.data, stored.data);
  Report(std::string("load, store ") + Name<T>() + (std::is_same_v<L, row_l> ? " row" : " col") +
             " layout, swizzle " + std::to_string(bytes),
         loaded.Wrong([](int i) { return i % 251; }) +
             stored.Wrong([](int i) { return Widen(Round<T>(i / 128 * 3 + i % 128)); }));
}

// 2. The shared image of a TMA load: 16-byte chunk q of a row of S bytes lies at chunk
// q ^ (address / 128) % (S / 16). Then the tile goes back by TMA, clipped at the tensor's rows.
template <typename Global, typename Tile, int axis>
__global__ void TmaTile(const __grid_constant__ Global from, const __grid_constant__ Global to,
                        typename Tile::T* image, typename Tile::T* through) {
  __shared__ alignas(1024) Tile tile;
  __shared__ semaphore arrived;
  if (threadIdx.x == 0) {
    init_semaphore(arrived, 0, 1);
    tma::expect(arrived, tile);
    tma::load_async<axis, NORMAL>(tile, from, {0, 0, 1, 1}, arrived);
  }
  __syncthreads();
  wait(arrived, 0);
  for (int i = threadIdx.x; i < Tile::num_elements; i += blockDim.x) {
    image[i] = tile.data[i];
    through[i] = tile[{i / Tile::cols, i % Tile::cols}];
  }
  warpgroup::tma::store_async<axis, NORMAL>(to, tile, coord<Tile>{0, 0, 1, 1});
  warpgroup::tma::store_async_wait();
}

template <int bytes>
void TestTma() {
  // Rows 32.. of 45 and columns 64.. of 128: 13 rows exist, the others load as zero.
  using Tile = st<bf16, 32, 64, true, bytes>;
  using Global = gl<bf16, 1, 1, -1, 128, Tile>;
  constexpr int kRows = 45, group = bytes / 2;
  Array<bf16> from(kRows * 128), to(kRows * 128 + 4096), image(32 * 64), through(32 * 64);
  from.Set([](int i) { return Round<bf16>(i % 253); });
  const Global source(from.data, nullptr, nullptr, size_t{kRows}, nullptr);
  const Global target(to.data, nullptr, nullptr, size_t{kRows}, nullptr);
  TmaTile<Global, Tile, dim::ROW><<<1, 128>>>(source, target, image.data, through.data);
  const auto element = [&](int row, int column) {
    return row + 32 < kRows ? float((row + 32) * 128 + column + 64) : 0.f;
  };
  const auto value = [&](int row, int column) {
    return row + 32 < kRows ? float(int(element(row, column)) % 253) : 0.f;
  };
  Report("TMA load, image of swizzle " + std::to_string(bytes) + ", zero rows past the end",
         image.Wrong([&](int i) {
           const int row = i / group % 32, outer = i / group / 32;
           const int chunk = i % group / 8 ^ (2 * i / 128 % (bytes / 16));
           return value(row, outer * group + chunk * 8 + i % 8);
         }));
  Report("TMA load, element addresses, swizzle " + std::to_string(bytes),
         through.Wrong([&](int i) { return value(i / 64, i % 64); }));
  int64_t wrong = 0;
  const auto got = to.Get();
  for (int i = 0; i < static_cast<int>(got.size()); ++i) {
    const int row = i / 128 - 32, column = i % 128 - 64;
    const bool written = row >= 0 && row + 32 < kRows && column >= 0;
    const float x = Widen(got[i]);
    wrong += written ? x != value(row, column) : x == x;  // what is not written stays NaN
  }
  Report("TMA store clips rows past the end, swizzle " + std::to_string(bytes), wrong);
}

// Tile rows along the depth: tile (d, r, c) of a [2, 80, 3, 128] tensor.
void TestTmaDepth() {
  using Tile = st<half, 64, 64>;
  using Global = gl<half, -1, -1, -1, -1, tma::descriptor<Tile, dim::DEPTH>>;
  constexpr int kDepth = 80, kRows = 3, kSize = 2 * kDepth * kRows * 128;
  Array<half> from(kSize), to(kSize), image(64 * 64), through(64 * 64);
  from.Set([](int i) { return Round<half>(i % 2039); });
  const Global source(from.data, size_t{2}, size_t{kDepth}, size_t{kRows}, size_t{128});
  const Global target(to.data, size_t{2}, size_t{kDepth}, size_t{kRows}, size_t{128});
  TmaTile<Global, Tile, dim::DEPTH><<<1, 128>>>(source, target, image.data, through.data);
  const auto at = [](int d, int c) { return (d * kRows + 1) * 128 + 64 + c; };
  Report("TMA load with rows along the depth",
         through.Wrong([&](int i) { return at(i / 64, i % 64) % 2039; }));
  int64_t wrong = 0;
  const auto got = to.Get();
  for (int i = 0; i < kSize; ++i) {
    const int d = i / (kRows * 128), r = i / 128 % kRows, c = i % 128;
    const float x = Widen(got[i]);
    wrong += d < 64 && r == 1 && c >= 64 ? x != i % 2039 : x == x;
  }
  Report("TMA store with rows along the depth", wrong);
}

// 3. d = A B or A B^T on top of ones, with A from shared memory and from registers.
template <typename T, int K, bool transposed, bool registers, int bytes>
__global__ void Multiply(float* out) {
  using B = std::conditional_t<transposed, st<T, 64, K, true, bytes>, st<T, K, 64, true, bytes>>;
  __shared__ alignas(1024) st<T, 64, K, true, bytes> a;
  __shared__ alignas(1024) B b;
  for (int i = threadIdx.x; i < 64 * K; i += 128) {
    a[{i / K, i % K}] = Round<T>(Draw(1, i));
    b[{i / B::cols, i % B::cols}] = Round<T>(Draw(2, i));
  }
  genie::FenceAsyncProxy();
  warpgroup::sync(1);
  rt_fl<16, 64> d;
  ForEach(d, [](int, int, float& x) { x = 1.f; });
  const auto multiply = [&](const auto& left) {
    if constexpr (transposed) {
      warpgroup::mm_ABt(d, left, b);
      warpgroup::mma_ABt(d, left, b);
    } else {
      warpgroup::mma_AB(d, left, b);
    }
  };
  rt<T, 16, K> fragment;
  if constexpr (registers) {
    warpgroup::load(fragment, a);
    multiply(fragment);
  } else {
    multiply(a);
  }
  warpgroup::mma_async_wait();
  genie::Pin(d);
  const int first = 16 * warpgroup::warpid();
  ForEach(d, [&](int r, int c, float& x) { out[(first + r) * 64 + c] = x; });
}

template <typename T, int K, bool transposed, bool registers, int bytes = 0>
void TestMultiply() {
  Array<float> out(64 * 64);
  Multiply<T, K, transposed, registers, bytes><<<1, 128>>>(out.data);
  const auto value = [](uint32_t seed, int i) { return Widen(Round<T>(Draw(seed, i))); };
  Report(std::string("WGMMA ") + (transposed ? "ABt " : "AB ") + Name<T>() +
             " K=" + std::to_string(K) + (registers ? " A registers" : " A shared") + ", swizzle " +
             std::to_string(bytes ? bytes : 128),
         out.Wrong(
             [&](int i) {
               double sum = 0;
               for (int k = 0; k < K; ++k) {
                 sum += double(value(1, i / 64 * K + k)) *
                        value(2, transposed ? i % 64 * K + k : k * 64 + i % 64);
               }
               return float(transposed ? 2 * sum : sum + 1);
             },
             2e-3f));
}

// 4. Maps, sums and vectors.
__global__ void Maps(float* normalised, float* product, bf16* transposed, bf16* kept) {
  __shared__ sv_fl<64> scale;
  __shared__ alignas(1024) st<bf16, 64, 16> turned;
  if (threadIdx.x < 32) {
    for (int i = threadIdx.x; i < 64; i += 32) scale[i] = i;
    __syncwarp();
    rt_fl<16, 64> x, y;
    ForEach(x, [](int r, int c, float& v) { v = r * r + c; });
    col_vec<rt_fl<16, 64>> mean;
    row_vec<rt_fl<16, 64>> columns;
    warp::row_sum(mean, x);
    warp::mul(mean, mean, 1.f / 64);
    warp::sub_row(y, x, mean);  // c - 31.5
    mean = warp::apply(mean, [](int row, float) { return float(row); });
    warp::mul_row(y, y, mean);
    warp::load(columns, scale);
    warp::mul_col(y, y, columns);
    warp::add_col(y, y, columns);  // (c - 31.5) r c + c
    ForEach(y, [&](int r, int c, float& v) { normalised[r * 64 + c] = v; });
    warp::mul(y, x, x);
    warp::add(y, y, x);
    ForEach(y, [&](int r, int c, float& v) { product[r * 64 + c] = v; });
    rt_bf<16, 64> low;
    warp::copy(low, x);
    warp::store(turned, genie::Transposed(low));
    __syncwarp();
    for (int i = threadIdx.x; i < 64 * 16; i += 32) transposed[i] = turned[{i / 16, i % 16}];
    const unsigned keep[2] = {laneid() / 4 % 2u, 1u};  // rows 1, 3, 5, 7 and all of 8..
    genie::KeepRows(low, keep);
    ForEach(low, [&](int r, int c, bf16& v) { kept[r * 64 + c] = v; });
  }
}

void TestMaps() {
  Array<float> normalised(1024), product(1024);
  Array<bf16> transposed(1024), kept(1024);
  Maps<<<1, 32>>>(normalised.data, product.data, transposed.data, kept.data);
  const auto x = [](int r, int c) { return float(r * r + c); };
  Report("row_sum, row and column maps, apply, vector load",
         normalised.Wrong([&](int i) { return (i % 64 - 31.5f) * (i / 64) * (i % 64) + i % 64; }));
  Report("mul, add",
         product.Wrong([&](int i) { return x(i / 64, i % 64) * (x(i / 64, i % 64) + 1); }));
  Report("free transpose through a shared subtile",
         transposed.Wrong([&](int i) { return Widen(Round<bf16>(x(i % 16, i / 16))); }));
  Report("KeepRows", kept.Wrong([&](int i) {
    return i / 64 >= 8 || i / 64 % 2 ? Widen(Round<bf16>(x(i / 64, i % 64))) : 0.f;
  }));
}

// 5. Parity: a fresh semaphore has completed parity 1 and not 0; each completion flips both.
__global__ void Parity(int* seen) {
  __shared__ semaphore s;
  if (threadIdx.x == 0) init_semaphore(s, 2, 0);
  __syncthreads();
  for (int phase = 0; phase < 4; ++phase) {
    if (threadIdx.x == 0) {
      seen[4 * phase] = try_wait(s, phase % 2);
      seen[4 * phase + 1] = try_wait(s, 1 - phase % 2);
      arrive(s);
      seen[4 * phase + 2] = try_wait(s, phase % 2);
    }
    __syncthreads();
    if (threadIdx.x == 32) arrive(s);
    wait(s, phase % 2);
    if (threadIdx.x == 0) seen[4 * phase + 3] = try_wait(s, phase % 2);
    __syncthreads();
  }
}

template <typename T>
void TestType() {
  TestMove<T, row_l, 32>(), TestMove<T, row_l, 64>(), TestMove<T, row_l, 128>();
  TestMove<T, col_l, 32>(), TestMove<T, col_l, 64>(), TestMove<T, col_l, 128>();
  TestMultiply<T, 64, false, false>(), TestMultiply<T, 128, false, true>();
  TestMultiply<T, 128, true, false>(), TestMultiply<T, 128, true, true>();
}

}  // namespace

int main() {
  TestType<bf16>();
  TestType<half>();
  TestMultiply<bf16, 64, true, false, 32>(), TestMultiply<bf16, 64, true, false, 64>();
  TestMultiply<bf16, 64, false, true, 32>(), TestMultiply<bf16, 64, false, true, 64>();
  TestMultiply<bf16, 16, false, true>();
  TestTma<32>(), TestTma<64>(), TestTma<128>();
  TestTmaDepth();
  TestMaps();
  Array<int> seen(16);
  Parity<<<1, 64>>>(seen.data);
  int64_t wrong = 0;
  const std::vector<int> got = seen.Get();
  for (int i = 0; i < 16; ++i) wrong += got[i] != i % 2;
  Report("semaphore parity and arrival count", wrong);
  std::printf("failures: %d\n", failures);
  return failures;
}
