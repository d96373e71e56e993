// Gated output: reads z and t once (per slice of output columns) and writes the update; at C = Hm =
// 128 that is 768 bytes and 66 kFLOP a pair, so HBM sets the time and all else hides behind it.
//
// Persistent blocks. The weights stay in shared memory; two producer threads load tiles of 64 pairs
// of z and t ahead through rings; each consumer warpgroup takes whole tiles. t is channel-first:
// read as a column-layout tile it arrives transposed. LayerNorm in registers makes both A operands;
// each chunk of 64 output columns takes the place of its columns of z, and leaves from there.
#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "kittens.cuh"
#include "kittens/extensions.cuh"
#include "resident.cuh"
#include "triangle_multiplication/output_sm90.h"
#include "triangle_multiplication/rows.cuh"

namespace genie {
namespace {

using namespace kittens;

constexpr int kPairs = 64;    // of a tile: the rows of one WGMMA
constexpr int kColumns = 64;  // of a chunk of the output: one 128-byte swizzled row of B

// Sizes by channels and hidden channels: what the weights leave of shared memory goes to the rings,
// which hold t until it is in registers and z until the output has left.
template <typename T, int C, int H>
struct Shape {
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = (kConsumers + 1) * WARPGROUP_THREADS;
  static constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;

  using Contracted = std::conditional_t<std::is_same_v<T, bf16>, bf16, float>;
  using Pairs = st<T, kPairs, C>;
  using Hidden = st<Contracted, H, 128 / sizeof(Contracted)>;  // one swizzle group of pairs
  static constexpr int kHiddenTiles = kPairs / Hidden::cols;
  using Gate = st<T, C, kColumns>;
  using Proj = st<T, H, kColumns>;
  using Rows = st<T, TILE_DIM, kColumns>;  // one warp's part of a chunk

  static constexpr int kChunks = C < 256 ? C / kColumns : H < 256 ? 2 : 1;
  static constexpr int kRoom =
      MAX_SHARED_MEMORY - 8 * 1024 - kChunks * (sizeof(Gate) + sizeof(Proj));
  static constexpr int kHiddenBytes = kHiddenTiles * sizeof(Hidden);
  static constexpr int kHiddenStages =
      std::clamp<int>(kRoom / (sizeof(Pairs) + kHiddenBytes), 1, 4);
  static constexpr int kStages =
      std::min<int>((kRoom - kHiddenStages * kHiddenBytes) / sizeof(Pairs), 6);
  static_assert(kStages >= 1 && kHiddenStages >= 1);

  struct Shared {
    Gate gate[kChunks];
    Proj proj[kChunks];
    Pairs z[kStages];
    Hidden t[kHiddenStages][kHiddenTiles];
    sv_fl<kColumns> gate_bias[kChunks], proj_bias[kChunks];
    sv_fl<C> norm_in_scale, norm_in_bias;
    sv_fl<H> norm_out_scale, norm_out_bias;
    Phases<kStages, kConsumers> z_phases;
    Phases<kHiddenStages, kConsumers> t_phases;
  };
  static_assert(sizeof(Shared) + 1024 <= MAX_SHARED_MEMORY);
};

template <typename T, int C, int H>
struct Globals {
  using S = Shape<T, C, H>;
  gl<T, 1, -1, -1, C, typename S::Pairs> z;   // [1, B I, J, C]
  gl<T, 1, -1, -1, C, typename S::Rows> out;  // [1, B I, J, C]
  gl<typename S::Contracted, -1, H, -1, -1, tma::descriptor<typename S::Hidden, dim::DEPTH>> t;
  GatedOutput given;
  int tiles, column_tiles;  // of all positions, and of one row
  int slices, chunks;       // of the output columns, and chunks in a slice
};

// The block's weights, biases and LayerNorm parameters, by all threads. Both products are halved:
// p sigmoid(g) = p / 2 tanh(g / 2) + p / 2.
template <typename S, typename Shared>
__device__ void FillParameters(Shared& shared, const GatedOutput& given, int first_column,
                               int chunks) {
  constexpr int kThreads = S::kThreads;
  const auto fill = [&](auto* tiles, const void* matrix) {
    AsStored<typename S::Gate::T>(matrix, given.kernel_dtype, [&](auto* stored) {
      FillWeights<kThreads>(tiles, chunks, given.channels, 0.5f,
                            [&](int chunk) { return stored + first_column + chunk * kColumns; });
    });
  };
  fill(shared.gate, given.gate_kernel);
  fill(shared.proj, given.proj_kernel);
  for (int i = threadIdx.x; i < kColumns * chunks; i += kThreads) {
    const int column = first_column + i, chunk = i / kColumns, at = i % kColumns;
    shared.gate_bias[chunk][at] = given.gate_bias ? 0.5f * given.gate_bias[column] : 0.f;
    shared.proj_bias[chunk][at] = given.proj_bias ? 0.5f * given.proj_bias[column] : 0.f;
  }
  FillVector<kThreads>(shared.norm_in_scale, given.norm_in_scale);
  FillVector<kThreads>(shared.norm_in_bias, given.norm_in_bias);
  FillVector<kThreads>(shared.norm_out_scale, given.norm_out_scale);
  FillVector<kThreads>(shared.norm_out_bias, given.norm_out_bias);
  FenceAsyncProxy();
}

template <typename T, int C, int H, typename S = Shape<T, C, H>>
__global__ __launch_bounds__(S::kThreads,
                             1) void Output(const __grid_constant__ Globals<T, C, H> g) {
  extern __shared__ alignment_dummy __shm[];
  shared_allocator allocator(reinterpret_cast<int*>(&__shm[0]));
  auto& shared = allocator.template allocate<typename S::Shared>();
  auto& z_phases = shared.z_phases;
  auto& t_phases = shared.t_phases;

  // The slices of the output columns share positions: z and t then come from L2 for all but one.
  const int first_tile = blockIdx.x / g.slices, tile_step = gridDim.x / g.slices;
  const int own_tiles = (g.tiles - first_tile + tile_step - 1) / tile_step;
  const int first_chunk = blockIdx.x % g.slices * g.chunks;
  const int columns = g.given.columns, rows = g.given.rows;
  const auto load_z = [&](int n) {
    const int tile = first_tile + n * tile_step;
    auto& z = shared.z[n % S::kStages];
    tma::expect(z_phases.Arrived(n), z);
    tma::load_async(z, g.z, {tile / g.column_tiles, tile % g.column_tiles, 0}, z_phases.Arrived(n));
  };
  const auto load_t = [&](int n) {
    const int tile = first_tile + n * tile_step, any_row = tile / g.column_tiles;
    auto& t = shared.t[n % S::kHiddenStages];
    tma::expect(t_phases.Arrived(n), t);
#pragma unroll
    for (int i = 0; i < S::kHiddenTiles; ++i) {
      tma::load_async<dim::DEPTH, NORMAL>(
          t[i], g.t,
          {any_row / rows, 0, any_row % rows, tile % g.column_tiles * S::kHiddenTiles + i},
          t_phases.Arrived(n));
    }
  };

  // 1. The first tiles are on their way while the weights are converted.
  if (threadIdx.x == S::kConsumers * WARPGROUP_THREADS) {
    z_phases.Init(WARPGROUP_WARPS);
    t_phases.Init(WARPGROUP_WARPS);
    for (int n = 0; n < S::kStages && n < own_tiles; ++n) load_z(n);
    for (int n = 0; n < S::kHiddenStages && n < own_tiles; ++n) load_t(n);
  }
  FillParameters<S>(shared, g.given, kColumns * first_chunk, g.chunks);
  everyone::sync(0);

  if (warpgroupid() == S::kConsumers) {  // 2. The producers refill the rings.
    warpgroup::decrease_registers<S::kProducerRegisters>();
    if (warpgroup::laneid() == 0) {
      for (int n = S::kStages; n < own_tiles; ++n) {
        z_phases.WaitFinished(n - S::kStages);
        load_z(n);
      }
    } else if (warpgroup::laneid() == WARP_THREADS) {
      for (int n = S::kHiddenStages; n < own_tiles; ++n) {
        t_phases.WaitFinished(n - S::kHiddenStages);
        load_t(n);
      }
    }
  } else {  // 3. Consumer w takes tiles w, w + kConsumers, ... of the block.
    warpgroup::increase_registers<S::kConsumerRegisters>();
    const int warp_row = Uniform(warpgroup::warpid());
    for (int n = Uniform(warpgroupid()); n < own_tiles; n += S::kConsumers) {
      const int tile = first_tile + n * tile_step, column_tile = tile % g.column_tiles;
      const int any_row = tile / g.column_tiles;
      auto& z_tile = shared.z[n % S::kStages];

      unsigned readable[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = kPairs * column_tile + 16 * warp_row + 8 * i + laneid() / 4;
        readable[i] = 1;
        if (column < columns && g.given.mask) {
          readable[i] = MaskAt(g.given.mask + int64_t{any_row} * columns + column);
        }
      }

      rt<T, 16, H> y;
      {
        rt<typename S::Contracted, 16, H> t;
        t_phases.WaitArrived(n);
        LoadTransposed(t, shared.t[n % S::kHiddenStages], warp_row);
        warp::sync();
        warp::arrive(t_phases.Finished(n));
        Normalize(y, t, MomentsOf<true>(t, g.given.epsilon), shared.norm_out_scale,
                  shared.norm_out_bias);
      }
      if (n >= S::kConsumers) {  // by now the last output has left its tile of z
        warp::tma::store_async_read_wait();
        warp::arrive(z_phases.Finished(n - S::kConsumers));
      }
      rt<T, 16, C> x;
      z_phases.WaitArrived(n);
      warpgroup::load(x, z_tile);
      const Moments moments = MomentsOfReadable(x, readable, g.given.epsilon);
      Normalize(x, x, moments, shared.norm_in_scale, shared.norm_in_bias);

      for (int chunk = 0; chunk < g.chunks; ++chunk) {
        rt_fl<16, kColumns> gate, proj;
        warpgroup::mm_AB(gate, x, shared.gate[chunk]);
        warpgroup::mm_AB(proj, y, shared.proj[chunk]);
        warpgroup::mma_async_wait<1>();
        Pin(gate);
        AddToRows(gate, shared.gate_bias[chunk]);
        warp::unary_map<Tanh>(gate, gate);
        warpgroup::mma_async_wait<0>();
        Pin(proj);
        AddToRows(proj, shared.proj_bias[chunk]);
        warp::mul(gate, gate, proj);
        warp::add(proj, proj, gate);

        const int at = first_chunk + chunk;
        auto& staged =
            reinterpret_cast<typename S::Rows*>(z_tile.data)[WARPGROUP_WARPS * at + warp_row];
        if (g.given.residual) {
          rt<T, 16, kColumns> z;
          warp::load(z, staged);
          KeepRows(z, readable);
          warp::copy(gate, z);
          warp::add(proj, proj, gate);
        }
        warp::store(staged, proj);
        FenceAsyncProxy();
        warp::sync();
        warp::tma::store_async<dim::ROW, NORMAL>(
            g.out, staged, {any_row, WARPGROUP_WARPS * column_tile + warp_row, at});
      }
    }
    warp::tma::store_async_wait();
  }
}

template <typename T, int C, int H>
cudaError_t LaunchFor(const GatedOutput& p, cudaStream_t stream) {
  using S = Shape<T, C, H>;
  constexpr int kShared = sizeof(typename S::Shared) + 1024;
  const auto kernel = Output<T, C, H>;
  int processors;
  if (cudaError_t status = Prepare(kernel, kShared, &processors)) return status;

  const int column_tiles = (p.columns + kPairs - 1) / kPairs;
  const int64_t tiles = p.batch * p.rows * column_tiles;
  if (tiles >= int64_t{1} << 30) return cudaErrorInvalidValue;
  // As few slices as hold the weights, more where positions alone leave processors idle.
  constexpr int kAllChunks = C / kColumns;
  int slices = kAllChunks / S::kChunks;
  while (2 * slices <= kAllChunks && 2 * slices * tiles <= processors) slices *= 2;
  const int groups = std::min<int64_t>(tiles, std::max(1, processors / slices));

  const size_t all_rows = p.batch * p.rows, columns = p.columns;
  const size_t batch = p.batch, rows_padded = p.rows_padded, columns_padded = p.columns_padded;
  using Contracted = typename S::Contracted;
  T* z = Data<T>(p.z);
  auto* t = Data<Contracted>(p.t);
  try {
    const Globals<T, C, H> globals = {
        .z = {z, nullptr, all_rows, columns, nullptr},
        .out = {static_cast<T*>(p.out), nullptr, all_rows, columns, nullptr},
        .t = {t, batch, nullptr, rows_padded, columns_padded},
        .given = p,
        .tiles = static_cast<int>(tiles),
        .column_tiles = column_tiles,
        .slices = slices,
        .chunks = kAllChunks / slices};
    kernel<<<groups * slices, S::kThreads, kShared, stream>>>(globals);
  } catch (const std::runtime_error&) {  // a stride or a size is beyond TMA
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t LaunchFor(const GatedOutput& p, cudaStream_t stream) {
  return ForSize<64, 128, 256>(p.channels, [&](auto c) {
    return ForSize<64, 128, 256>(p.hidden, [&](auto h) { return LaunchFor<T, c, h>(p, stream); });
  });
}

}  // namespace

cudaError_t Launch(const GatedOutput& p, cudaStream_t stream) {
  const bool sizes = p.batch >= 0 && p.rows >= 0 && p.columns >= 0 && p.rows_padded >= p.rows &&
                     p.columns_padded >= p.columns && p.columns_padded % 8 == 0 &&
                     p.columns_padded < int64_t{1} << 31;
  const bool types = p.kernel_dtype == Float::kF32 || p.kernel_dtype == p.dtype;
  const auto kernels =
      reinterpret_cast<uintptr_t>(p.proj_kernel) | reinterpret_cast<uintptr_t>(p.gate_kernel);
  if (!sizes || !types || kernels % sizeof(uint4) != 0) return cudaErrorInvalidValue;
  if (p.batch == 0 || p.rows == 0 || p.columns == 0) return cudaSuccess;
  if (p.dtype == Float::kBf16) return LaunchFor<bf16>(p, stream);
  if (p.dtype == Float::kF16) return LaunchFor<half>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace genie
