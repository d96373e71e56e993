// Derivative of the gated output: reads z, t and d_out once, writes dz and dt once; at C = Hm = 128
// that is 1280 bytes and 197 kFLOP a pair, so HBM sets the time if the products hide behind it.
//
// With x = normal(z) and y = normal(t), LayerNorm without scale and bias, which go into the
// weights:
//   s = x Wg, p = y Wo, g = sigmoid(s), dp = d_out g, ds = d_out p g (1 - g),
//   dz = (ds Wg^T - x mean(ds s)) / deviation, dt = (dp Wo^T - y mean(dp p)) / deviation.
// The columns of both weights are centred: x and y sum to zero over channels, so that s and p stay
// as they are, and the derivative's mean over channels is zero already.
//
// Persistent blocks of two kinds of warpgroups. Mains take whole tiles of 64 pairs: they write x, y
// and dp over z, t and d_out in shared memory, ds beside them, and at last dz and dt over x and y,
// from where they leave. Summers keep x^T ds and y^T dp of all the block's tiles in registers; a
// kernel of its own adds the blocks' sums and makes the gradients of the weights.
#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "kittens.cuh"
#include "kittens/extensions.cuh"
#include "triangle_multiplication/output_backward_sm90.h"
#include "triangle_multiplication/rows.cuh"
#include "triangle_multiplication/weights.cuh"

namespace genie {
namespace {

using namespace kittens;

constexpr int kPairs = 64;    // of a tile: the rows of one WGMMA
constexpr int kColumns = 32;  // of a chunk of channels: one 64-byte swizzled row of B

// Sizes by channels and hidden channels. Two summers take 160 registers of a thread each, which
// leaves 96 to each of two mains. float32 t fills the space of a second main.
template <typename T, int C, int H>
struct Shape {
  using Contracted = std::conditional_t<std::is_same_v<T, bf16>, bf16, float>;
  static constexpr bool kInPlace = std::is_same_v<T, Contracted>;  // y over t
  static constexpr int kMains = kInPlace ? 2 : 1;
  static constexpr int kThreads = (kMains + 2) * WARPGROUP_THREADS;
  static constexpr int kMainRegisters = 96, kSummerRegisters = 160;  // where there are two mains
  static_assert(2 * kMainRegisters + 2 * kSummerRegisters <= 512);
  static constexpr int kStages = kMains + 1, kHiddenStages = kMains + 1;
  static constexpr int kTurns = (kStages + kMains - 1) / kMains * kMains;
  static constexpr int kChunks = C / kColumns;

  using Pairs = st<T, kPairs, C>;
  using Block = st<T, kPairs, 64>;        // 64 columns of Pairs, or 64 rows of Normal
  using Chunk = st<T, kPairs, kColumns>;  // d_out and what comes of it go by chunks
  using Chunks = st<T, kPairs, C, true, 64>;
  using Hidden = st<Contracted, H, 128 / sizeof(Contracted)>;  // one swizzle group of pairs
  static constexpr int kHiddenTiles = kPairs / Hidden::cols;
  using Normal = st<T, H, kPairs>;
  using Gate = st<T, C, kColumns>;
  using Proj = st<T, H, kColumns>;

  struct Nothing {};
  struct Shared {
    Gate gate[kChunks];
    Proj proj[kChunks];
    Pairs z[kStages];
    Hidden t[kHiddenStages][kHiddenTiles];
    Chunk d[kMains][kChunks], ds[kMains][kChunks];
    std::conditional_t<kInPlace, Nothing, Normal[kMains]> y;
    sv_fl<kColumns> gate_bias[kChunks], proj_bias[kChunks];
    semaphore z_arrived[kTurns], t_arrived[kTurns], d_arrived[kMains];
    semaphore ready[kMains], x_summed[kMains], y_summed[kMains];

    __device__ Normal& Y(int n) {
      if constexpr (kInPlace) {
        return t[n % kHiddenStages][0];
      } else {
        return y[n % kMains];
      }
    }
  };
  static_assert(sizeof(Shared) + 1024 <= MAX_SHARED_MEMORY);
};

template <typename T, int C, int H>
struct Globals {
  using S = Shape<T, C, H>;
  template <typename Tile>
  using Image = gl<T, 1, -1, -1, C, Tile>;  // [1, B I, J, C]
  using Contraction =
      gl<typename S::Contracted, -1, H, -1, -1, tma::descriptor<typename S::Hidden, dim::DEPTH>>;
  Image<typename S::Pairs> z, dz;
  Image<typename S::Chunk> d_out;
  Contraction t, dt;
  GatedOutputBackward given;
  int tiles, column_tiles;  // of one batch entry, and of one row
};

// Sums over the rows of a [K, C] matrix of scale W / K and of bias W, by 2 C threads: each sums
// K / 16 rows of eight columns, then a thread a column adds what the 16 found.
template <int K, int C, typename Stored>
__device__ void SumColumns(float* parts, int thread, const Stored* matrix, const float* scale,
                           const float* bias) {
  const int column = thread % (C / 8) * 8, part = thread / (C / 8);
  float scaled[8] = {}, shifted[8] = {};
#pragma unroll
  for (int i = 0; i < K / 16; ++i) {
    const int row = part * (K / 16) + i;
    float w[8];
    LoadEight(w, matrix + row * C + column);
    for (int j = 0; j < 8; ++j) {
      scaled[j] += __ldg(scale + row) * (1.f / K) * w[j];
      shifted[j] += __ldg(bias + row) * w[j];
    }
  }
  for (int j = 0; j < 8; ++j) {
    parts[2 * part * C + column + j] = scaled[j];
    parts[(2 * part + 1) * C + column + j] = shifted[j];
  }
}

// The block's weights and biases, by all threads, with the norms' scales and biases in them.
template <typename T, int C, int H, typename S = Shape<T, C, H>>
__device__ void FillParameters(typename S::Shared& shared, const GatedOutput& given) {
  constexpr int kThreads = S::kThreads;
  // ds and the weights' own place are free until they are filled.
  float* parts[2] = {reinterpret_cast<float*>(shared.ds), reinterpret_cast<float*>(shared.gate)};
  for (int i = threadIdx.x; i < 4 * C; i += kThreads) {
    if (i < 2 * C) {
      AsStored<T>(given.proj_kernel, given.kernel_dtype, [&](auto* stored) {
        SumColumns<H, C>(parts[0], i, stored, given.norm_out_scale, given.norm_out_bias);
      });
    } else {
      AsStored<T>(given.gate_kernel, given.kernel_dtype, [&](auto* stored) {
        SumColumns<C, C>(parts[1], i - 2 * C, stored, given.norm_in_scale, given.norm_in_bias);
      });
    }
  }
  everyone::sync(0);
  for (int c = threadIdx.x; c < C; c += kThreads) {
    for (int gate = 0; gate < 2; ++gate) {
      const float* bias = gate ? given.gate_bias : given.proj_bias;
      float mean = 0.f, offset = bias ? bias[c] : 0.f;
      for (int part = 0; part < 16; ++part) {
        mean += parts[gate][2 * part * C + c];
        offset += parts[gate][(2 * part + 1) * C + c];
      }
      parts[0][gate * C + c] = mean;  // this thread alone reads column c
      (gate ? shared.gate_bias : shared.proj_bias)[c / kColumns][c % kColumns] = offset;
    }
  }
  everyone::sync(0);
  const auto fill = [&](auto* tiles, const void* matrix, const float* scale, const float* mean) {
    AsStored<T>(matrix, given.kernel_dtype, [&](auto* stored) {
      FillWeights<kThreads>(tiles, S::kChunks, stored, C, [&](float w, int row, int column) {
        return __ldg(scale + row) * w - mean[column];
      });
    });
  };
  fill(shared.proj, given.proj_kernel, given.norm_out_scale, parts[0]);
  fill(shared.gate, given.gate_kernel, given.norm_in_scale, parts[0] + C);
  FenceAsyncProxy();
}

// This warp's 16 rows of s and p without their biases, and of d_out: d becomes dp, and with ds come
// the row sums of ds s and dp p.
template <typename Sums, typename Tile>
__device__ inline void Gate(Tile& d, Tile& ds, const Sums& s, const Sums& p,
                            const sv_fl<Sums::cols>& s_bias, const sv_fl<Sums::cols>& p_bias,
                            float (&ds_s)[2], float (&dp_p)[2]) {
  using T2 = typename Tile::dtype;
#pragma unroll
  for (int j = 0; j < Sums::width; ++j) {
    const Columns s_biases(s_bias, j), p_biases(p_bias, j);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 s0 = s.tiles[0][j].data[k], p0 = p.tiles[0][j].data[k];
      const float2 d1 = Unpack(d.tiles[0][j].data[k]);
      const float2 tanh =
          Tanh::op(float2{0.5f * (s0.x + s_biases.of(k).x), 0.5f * (s0.y + s_biases.of(k).y)});
      const float2 dp = {d1.x * (0.5f * tanh.x + 0.5f), d1.y * (0.5f * tanh.y + 0.5f)};
      const float2 slope = {0.25f - 0.25f * tanh.x * tanh.x, 0.25f - 0.25f * tanh.y * tanh.y};
      const float2 to_s = {d1.x * (p0.x + p_biases.of(k).x) * slope.x,
                           d1.y * (p0.y + p_biases.of(k).y) * slope.y};
      ds_s[k % 2] += to_s.x * s0.x + to_s.y * s0.y;
      dp_p[k % 2] += dp.x * p0.x + dp.y * p0.y;
      d.tiles[0][j].data[k] = Pack<T2>(dp);
      ds.tiles[0][j].data[k] = Pack<T2>(to_s);
    }
  }
}

// d becomes (d - normal * slope) * scale, the derivative of `normal`.
template <typename Sums, typename Tile>
__device__ inline void NormDerivative(Sums& d, const Tile& normal, const float (&slope)[2],
                                      const float (&scale)[2]) {
#pragma unroll
  for (int j = 0; j < Sums::width; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float2& pair = d.tiles[0][j].data[k];
      const float2 x = Unpack(normal.tiles[0][j].data[k]);
      pair = {(pair.x - x.x * slope[k % 2]) * scale[k % 2],
              (pair.y - x.y * slope[k % 2]) * scale[k % 2]};
    }
  }
}

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

// d = a W^T for inputs 64 part .. of W, over all chunks of its columns.
template <typename Sums, typename Chunk, typename Weight, size_t kChunks>
__device__ inline void MultiplyTransposed(Sums& d, Chunk (&a)[kChunks], Weight (&w)[kChunks],
                                          int part) {
  warpgroup::mm_ABt(d, a[0], reinterpret_cast<Chunk*>(&w[0])[part]);
#pragma unroll
  for (int chunk = 1; chunk < kChunks; ++chunk) {
    warpgroup::mma_ABt(d, a[chunk], reinterpret_cast<Chunk*>(&w[chunk])[part]);
  }
}

// Adds d_out's rows from L2; `from` is this lane's first row, `stride` apart from others, of
// `left`.
template <typename Sums, typename T>
__device__ inline void AddResidual(Sums& d, const T* from, int stride, int64_t left) {
  using T2 = typename base_types::packing<T>::packed_type;
#pragma unroll
  for (int j = 0; j < Sums::width; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int row = 8 * (k % 2), column = 16 * j + 8 * (k / 2) + 2 * (laneid() % 4);
      if (row >= left) continue;
      const auto raw = __ldg(reinterpret_cast<const unsigned*>(from + row * stride + column));
      const float2 pair = Unpack(reinterpret_cast<const T2&>(raw));
      d.tiles[0][j].data[k].x += pair.x;
      d.tiles[0][j].data[k].y += pair.y;
    }
  }
}

// Rows past I of this batch entry's dt, by all threads of its blocks.
template <typename Contraction>
__device__ void ZeroPaddedRows(const Contraction& dt, int batch, int rows) {
  const int64_t row_vectors = dt.cols() * sizeof(typename Contraction::T) / sizeof(uint4);
  const int64_t padded = dt.rows() - rows, size = dt.depth() * padded * row_vectors;
  auto* base = reinterpret_cast<uint4*>(dt.raw_ptr) + batch * dt.depth() * dt.rows() * row_vectors;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t h = i / (padded * row_vectors), at = i % (padded * row_vectors);
    base[(h * dt.rows() + rows) * row_vectors + at] = uint4{};
  }
}

template <typename T, int C, int H, typename S = Shape<T, C, H>>
__global__ __launch_bounds__(S::kThreads,
                             1) void OutputBackward(const __grid_constant__ Globals<T, C, H> g) {
  extern __shared__ alignment_dummy __shm[];
  shared_allocator allocator(reinterpret_cast<int*>(&__shm[0]));
  auto& shared = allocator.template allocate<typename S::Shared>();
  const GatedOutput& of = g.given.of;
  const int batch = blockIdx.y, rows = of.rows, columns = of.columns;
  const int own_tiles = (g.tiles - blockIdx.x + gridDim.x - 1) / gridDim.x;
  const auto row_of = [&](int n) { return (blockIdx.x + n * gridDim.x) / g.column_tiles; };
  const auto column_of = [&](int n) { return (blockIdx.x + n * gridDim.x) % g.column_tiles; };
  const auto load_z = [&](int n) {
    if (n >= own_tiles) return;
    auto& to = shared.z[n % S::kStages];
    auto& arrived = shared.z_arrived[n % S::kTurns];
    tma::expect(arrived, to);
    tma::load_async(to, g.z, {batch * rows + row_of(n), column_of(n), 0}, arrived);
  };
  const auto load_d = [&](int n) {
    if (n >= own_tiles) return;
    auto& to = shared.d[n % S::kMains];
    auto& arrived = shared.d_arrived[n % S::kMains];
    tma::expect(arrived, to);
    for (int i = 0; i < S::kChunks; ++i) {
      tma::load_async(to[i], g.d_out, {batch * rows + row_of(n), column_of(n), i}, arrived);
    }
  };
  const auto load_t = [&](int n) {
    if (n >= own_tiles) return;
    auto& to = shared.t[n % S::kHiddenStages];
    auto& arrived = shared.t_arrived[n % S::kTurns];
    tma::expect(arrived, to);
    for (int i = 0; i < S::kHiddenTiles; ++i) {
      tma::load_async<dim::DEPTH, NORMAL>(
          to[i], g.t, {batch, 0, row_of(n), column_of(n) * S::kHiddenTiles + i}, arrived);
    }
  };

  // 1. The first tiles are on their way while the weights are converted.
  if (threadIdx.x == 0) {
    for (auto& s : shared.z_arrived) init_semaphore(s, 0, 1);
    for (auto& s : shared.t_arrived) init_semaphore(s, 0, 1);
    for (auto& s : shared.d_arrived) init_semaphore(s, 0, 1);
    for (auto& s : shared.ready) init_semaphore(s, 1, 0);
    for (auto& s : shared.x_summed) init_semaphore(s, WARPGROUP_WARPS, 0);
    for (auto& s : shared.y_summed) init_semaphore(s, WARPGROUP_WARPS, 0);
    for (int n = 0; n < S::kStages; ++n) load_z(n);
    for (int n = 0; n < S::kHiddenStages; ++n) load_t(n);
    for (int n = 0; n < S::kMains; ++n) load_d(n);
  }
  FillParameters<T, C, H>(shared, of);
  ZeroPaddedRows(g.dt, batch, rows);
  everyone::sync(0);

  if (warpgroupid() >= S::kMains) {  // 2. The summers, one for each weight.
    if constexpr (S::kMains == 2) warpgroup::increase_registers<S::kSummerRegisters>();
    const bool gate = warpgroupid() == S::kMains;
    float* partial =
        g.given.partials + (int64_t{batch} * gridDim.x + blockIdx.x) * OutputPartial(C, H);
    float* columns_at = partial + OutputPartial(C, H) - 512;
    if (gate) {
      const auto add = [&](auto& sums, int n) {
        auto* x = reinterpret_cast<typename S::Block*>(&shared.z[n % S::kStages]);
#pragma unroll
        for (int i = 0; i < C / 64; ++i) {
          warpgroup::mma_AtB(sums[i], x[i], Whole<S>(shared.ds[n % S::kMains]));
        }
      };
      Sum<S::kMains, C, C>(add, shared.ds, shared.ready, shared.x_summed, own_tiles,
                           partial + H * C, columns_at + 256);
    } else {
      const auto add = [&](auto& sums, int n) {
        auto* y = reinterpret_cast<typename S::Block*>(&shared.Y(n));
#pragma unroll
        for (int i = 0; i < H / 64; ++i) {
          warpgroup::mma_AB(sums[i], y[i], Whole<S>(shared.d[n % S::kMains]));
        }
      };
      Sum<S::kMains, H, C>(add, shared.d, shared.ready, shared.y_summed, own_tiles, partial,
                           columns_at);
    }
  } else {  // 3. Main w takes tiles w, w + kMains, ... of the block.
    if constexpr (S::kMains == 2) warpgroup::decrease_registers<S::kMainRegisters>();
    const int main = Uniform(warpgroupid()), warp_row = Uniform(warpgroup::warpid());
    const bool leads = warpgroup::laneid() == 0;
    auto& ds_tile = shared.ds[main];
    auto& d_tile = shared.d[main];
    for (int n = main; n < own_tiles; n += S::kMains) {
      const int parity = n / S::kMains % 2;
      const int column = kPairs * column_of(n) + 16 * warp_row + laneid() / 4;
      const int64_t pair = int64_t{batch * rows + row_of(n)} * columns + column;
      auto& z_tile = shared.z[n % S::kStages];
      auto& t_tile = shared.t[n % S::kHiddenStages];
      auto& y_tile = shared.Y(n);
      const T* d_out = static_cast<const T*>(g.given.d_out) + pair * C;
      float x_scale[2], y_scale[2];  // 1 / deviation

      unsigned readable[2] = {1, 1};
      if (of.mask) {
        if (column < columns) readable[0] = __ldg(of.mask + pair);
        if (column + 8 < columns) readable[1] = __ldg(of.mask + pair + 8);
      }
      {
        rt<T, 16, C> x;
        wait(shared.z_arrived[n % S::kTurns], n / S::kTurns % 2);
        warpgroup::load(x, z_tile);
        KeepReadable(x, readable);
        Standardize(x, x, x_scale, of.epsilon);
        warpgroup::store(z_tile, x);
      }
      if (leads && n >= S::kMains) {  // by now the last results have left their tiles
        tma::store_async_read_wait();
        load_z(n - S::kMains + S::kStages);
        load_t(n - S::kMains + S::kHiddenStages);
      }
      {
        rt<typename S::Contracted, 16, H> t;
        wait(shared.t_arrived[n % S::kTurns], n / S::kTurns % 2);
        LoadTransposed(t, t_tile, warp_row);
        rt<T, 16, H> y;
        Standardize(y, t, y_scale, of.epsilon);
        auto at = y_tile.template subtile<H, 16>({0, warp_row});
        warp::store(at, Transposed(y));
      }
      FenceAsyncProxy();
      warpgroup::sync(main + 1);

      float ds_s[2] = {}, dp_p[2] = {};
      wait(shared.d_arrived[main], parity);
#pragma unroll 1
      for (int chunk = 0; chunk < S::kChunks; ++chunk) {
        rt_fl<16, kColumns> s, p;
        warpgroup::mm_AB(s, z_tile, shared.gate[chunk]);
        warpgroup::mm_AtB(p, y_tile, shared.proj[chunk]);
        rt<T, 16, kColumns> d, ds;
        warpgroup::load(d, d_tile[chunk]);
        warpgroup::mma_async_wait();
        Pin(s);
        Pin(p);
        Gate(d, ds, s, p, shared.gate_bias[chunk], shared.proj_bias[chunk], ds_s, dp_p);
        warpgroup::store(d_tile[chunk], d);
        warpgroup::store(ds_tile[chunk], ds);
      }
      FenceAsyncProxy();
      warpgroup::sync(main + 1);
      if (leads) arrive(shared.ready[main]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ds_s[i] = RowTotal(ds_s[i]) * (1.f / C);
        dp_p[i] = RowTotal(dp_p[i]) * (1.f / H);
      }

      // Both derivatives come 64 channels at a time.
#pragma unroll 1
      for (int part = 0; part < C / 64; ++part) {
        rt_fl<16, 64> dx;
        MultiplyTransposed(dx, ds_tile, shared.gate, part);
        auto& block = reinterpret_cast<typename S::Block*>(&z_tile)[part];
        rt<T, 16, 64> x;
        warpgroup::load(x, block);
        warpgroup::mma_async_wait();
        Pin(dx);
        NormDerivative(dx, x, ds_s, x_scale);
        if (of.residual) AddResidual(dx, d_out + 64 * part, C, columns - column);
        warp::copy(x, dx);
        KeepRows(x, readable);
        wait(shared.x_summed[main], parity);
        warpgroup::store(block, x);
      }
#pragma unroll 1
      for (int part = 0; part < H / 64; ++part) {
        rt_fl<16, 64> dy;
        MultiplyTransposed(dy, d_tile, shared.proj, part);
        auto at = reinterpret_cast<typename S::Block*>(&y_tile)[part].template subtile<64, 16>(
            {0, warp_row});
        rt<T, 16, 64> y;
        warp::load(Transposed(y), at);
        warpgroup::mma_async_wait();
        Pin(dy);
        NormDerivative(dy, y, dp_p, y_scale);
        wait(shared.y_summed[main], parity);
        StoreTransposed(t_tile, dy, warp_row, part);
      }
      FenceAsyncProxy();
      warpgroup::sync(main + 1);
      if (leads) {
        tma::store_async(g.dz, z_tile, {batch * rows + row_of(n), column_of(n), 0});
        for (int i = 0; i < S::kHiddenTiles; ++i) {
          tma::store_async<dim::DEPTH, NORMAL>(
              g.dt, t_tile[i], {batch, 0, row_of(n), column_of(n) * S::kHiddenTiles + i});
        }
        load_d(n + S::kMains);
      }
    }
    if (leads) tma::store_async_wait();
  }
}

template <typename T, int C, int H>
cudaError_t LaunchFor(const GatedOutputBackward& p, cudaStream_t stream) {
  using S = Shape<T, C, H>;
  using G = Globals<T, C, H>;
  constexpr int kShared = sizeof(typename S::Shared) + 1024;
  const auto kernel = OutputBackward<T, C, H>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (status != cudaSuccess) return status;

  const GatedOutput& of = p.of;
  const int column_tiles = (of.columns + kPairs - 1) / kPairs;
  const int64_t tiles = of.rows * column_tiles;
  if (tiles * of.batch >= int64_t{1} << 30) return cudaErrorInvalidValue;
  const size_t all_rows = of.batch * of.rows, columns = of.columns, batch = of.batch;
  const size_t rows_padded = of.rows_padded, columns_padded = of.columns_padded;
  const auto pairs = [](const void* pointer) {
    return static_cast<T*>(const_cast<void*>(pointer));
  };
  const auto contraction = [&](const void* t) -> typename G::Contraction {
    using Contracted = typename S::Contracted;
    return {static_cast<Contracted*>(const_cast<void*>(t)), batch, nullptr, rows_padded,
            columns_padded};
  };
  try {
    const G globals = {.z = {pairs(of.z), nullptr, all_rows, columns, nullptr},
                       .dz = {pairs(p.dz), nullptr, all_rows, columns, nullptr},
                       .d_out = {pairs(p.d_out), nullptr, all_rows, columns, nullptr},
                       .t = contraction(of.t),
                       .dt = contraction(p.dt),
                       .given = p,
                       .tiles = static_cast<int>(tiles),
                       .column_tiles = column_tiles};
    const dim3 grid(p.blocks, of.batch);
    kernel<<<grid, S::kThreads, kShared, stream>>>(globals);
  } catch (const std::runtime_error&) {  // a stride or a size is beyond TMA
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t LaunchFor(const GatedOutputBackward& p, cudaStream_t stream) {
  const int channels = p.of.channels, hidden = p.of.hidden;
  if (channels == 64 && hidden == 64) return LaunchFor<T, 64, 64>(p, stream);
  if (channels == 64 && hidden == 128) return LaunchFor<T, 64, 128>(p, stream);
  if (channels == 128 && hidden == 64) return LaunchFor<T, 128, 64>(p, stream);
  if (channels == 128 && hidden == 128) return LaunchFor<T, 128, 128>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t Launch(const GatedOutputBackward& p, cudaStream_t stream) {
  const GatedOutput& of = p.of;
  const bool sizes = of.batch >= 1 && of.batch < 65536 && of.rows >= 0 && of.columns >= 0 &&
                     of.rows_padded == (of.rows + 7) / 8 * 8 &&
                     of.columns_padded == (of.columns + 7) / 8 * 8 &&
                     of.columns < int64_t{1} << 31 && p.blocks >= 1;
  const bool types = of.kernel_dtype == Float::kF32 || of.kernel_dtype == of.dtype;
  const auto kernels =
      reinterpret_cast<uintptr_t>(of.proj_kernel) | reinterpret_cast<uintptr_t>(of.gate_kernel);
  if (!sizes || !types || kernels % sizeof(uint4) != 0) return cudaErrorInvalidValue;
  if (of.rows == 0 || of.columns == 0) {  // the reduction then adds nothing but zeros
    GatedOutputBackward empty = p;
    empty.blocks = 0;
    return LaunchReduction(empty, stream);
  }
  const cudaError_t status = of.dtype == Float::kBf16  ? LaunchFor<bf16>(p, stream)
                             : of.dtype == Float::kF16 ? LaunchFor<half>(p, stream)
                                                       : cudaErrorInvalidValue;
  return status == cudaSuccess ? LaunchReduction(p, stream) : status;
}

}  // namespace genie
