// Backward of attention's projections, dz: reads z and the gradients of q, k, v, gate and bias
// once, writes dz once: 1,560 bytes a pair at C = H D = 128 (256 more with a residual) against 132
// kFLOP, so HBM is busy for three times as long as the tensor cores.
//
//   dx = sum d W^T over the projections    dz = LayerNorm's backward of dx    (+ d_out)
//
// Persistent blocks. The weights stay in shared memory; tiles of 128 pairs pass in chunks of 64
// columns through a ring: the gradients, which are A operands as they come, then z and d_out. Two
// consumer warpgroups each own 64 of the pairs and take every chunk. dz overwrites z in the ring.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "kittens.cuh"
#include "triangle_attention/backward_sm90.h"
#include "triangle_attention/pairs.cuh"

namespace genie {
namespace {

using namespace kittens;

constexpr int kProjections = 4;  // q, k, v and gate

template <typename T, int C, int HD>
struct Shape {
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = (kConsumers + 1) * WARPGROUP_THREADS;
  static constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;
  static constexpr int kGradients = kProjections * HD / kHidden, kPairChunks = C / kHidden;
  static constexpr int kSlots = 5;

  using Chunk = st<T, kPairs, kHidden>;
  struct Slot {
    Chunk half[kConsumers];
  };
  struct Shared {
    st<T, C, kHidden> weight[kGradients];
    Slot slot[kSlots];
    st<T, C, kHeads> bias_weight;
    sv_fl<C> norm_scale;
    semaphore arrived[kSlots], finished[kSlots];
  };
  static_assert(sizeof(Shared) + 1024 <= MAX_SHARED_MEMORY);
};

template <typename T, int C, int HD>
struct Globals {
  using Chunk = typename Shape<T, C, HD>::Chunk;
  using Hidden = gl<T, 1, -1, -1, HD, Chunk>;  // [1, B I, J, H D]
  // [B, N1, N2, C], along a row or down a column.
  using Pairs =
      gl<T, -1, -1, -1, C, tma::descriptor<Chunk, dim::ROW>, tma::descriptor<Chunk, dim::DEPTH>>;
  Hidden d[kProjections];
  Pairs z, d_out, dz;
  AttentionProjectionBackward given;
  int tiles, rows, columns, column_tiles;  // of [B, I, J], 128 pairs each
  float query_factor;
};

template <typename T, int C, int HD, typename Stored, typename S = Shape<T, C, HD>>
__device__ void FillParameters(typename S::Shared& shared, const Globals<T, C, HD>& g) {
  constexpr int kChunks = HD / kHidden;
  for (int i = 0; i < kProjections; ++i) {
    FillWeights<S::kThreads>(
        shared.weight + i * kChunks, kChunks, HD, i == 0 ? g.query_factor : 1.f,
        [&](int chunk) { return static_cast<const Stored*>(g.given.kernel[i]) + chunk * kHidden; });
  }
  FillBiasWeight<S::kThreads>(shared.bias_weight, static_cast<const Stored*>(g.given.bias_kernel),
                              g.given.heads, kLog2E);
  for (int i = threadIdx.x; i < C; i += S::kThreads) shared.norm_scale[i] = g.given.norm_scale[i];
  FenceAsyncProxy();
}

template <typename T, int C, int HD>
__device__ void WriteStatistics(const Globals<T, C, HD>& g, const Place& at, float2 mean,
                                float2 inverse_deviation, const bool (&garbage)[2]) {
  if (laneid() % 4 != 0) return;
  float2* row = g.given.statistics + (int64_t{at.batch} * g.rows + at.row) * g.columns;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float factor = garbage[i] ? 0.f : i ? inverse_deviation.y : inverse_deviation.x;
    const float product = (i ? mean.y : mean.x) * factor;
    if (at.position(i) < g.columns) row[at.position(i)] = {factor, garbage[i] ? 0.f : -product};
  }
}

template <typename T, int C, int HD, typename S = Shape<T, C, HD>>
__global__ __launch_bounds__(S::kThreads, 1) void ProjectionBackward(
    const __grid_constant__ Globals<T, C, HD> g) {
  extern __shared__ alignment_dummy __shm[];
  shared_allocator allocator(reinterpret_cast<int*>(&__shm[0]));
  auto& shared = allocator.template allocate<typename S::Shared>();

  const bool ending = g.given.ending, residual = g.given.d_out != nullptr;
  const int tile_chunks = S::kGradients + (residual ? 2 : 1) * S::kPairChunks;
  const int own_tiles = (g.tiles - static_cast<int>(blockIdx.x) + gridDim.x - 1) / gridDim.x;
  const auto place = [&](int n) {
    return Place(blockIdx.x + n * gridDim.x, g.rows, g.column_tiles, ending);
  };

  if (threadIdx.x == S::kConsumers * WARPGROUP_THREADS) {
    for (int slot = 0; slot < S::kSlots; ++slot) {
      init_semaphore(shared.arrived[slot], 0, 1);
      init_semaphore(shared.finished[slot], S::kConsumers * WARPGROUP_WARPS, 0);
    }
  }
  if (g.given.kernel_dtype == Float::kF32) {
    FillParameters<T, C, HD, float>(shared, g);
  } else {
    FillParameters<T, C, HD, T>(shared, g);
  }
  everyone::sync(0);

  if (warpgroupid() == S::kConsumers) {  // 1. The producer passes chunk after chunk.
    warpgroup::decrease_registers<S::kProducerRegisters>();
    if (warpgroup::laneid() == 0) {
      int slot = 0, parity = 1;
      for (int n = 0; n < own_tiles; ++n) {
        const Place at = place(n);
        for (int chunk = 0; chunk < tile_chunks; ++chunk) {
          auto& arrived = shared.arrived[slot];
          wait(shared.finished[slot], parity);
          tma::expect(arrived, shared.slot[slot]);
#pragma unroll
          for (int half = 0; half < S::kConsumers; ++half) {
            auto& to = shared.slot[slot].half[half];
            const int tile = S::kConsumers * at.tile + half;
            if (chunk < S::kGradients) {
              constexpr int kChunks = HD / kHidden;
              tma::load_async(to, g.d[chunk / kChunks],
                              {at.batch * g.rows + at.row, tile, chunk % kChunks}, arrived);
            } else {
              const int past = chunk - S::kGradients, column = past % S::kPairChunks;
              const auto& from = past < S::kPairChunks ? g.z : g.d_out;
              if (ending) {
                tma::load_async<dim::DEPTH, NORMAL>(to, from, {at.batch, tile, at.row, column},
                                                    arrived);
              } else {
                tma::load_async<dim::ROW, NORMAL>(to, from, {at.batch, at.row, tile, column},
                                                  arrived);
              }
            }
          }
          if (++slot == S::kSlots) slot = 0, parity ^= 1;
        }
      }
    }
  } else {  // 2. Each consumer owns half of every tile.
    warpgroup::increase_registers<S::kConsumerRegisters>();
    const int consumer = warpgroupid();
    int slot = 0, parity = 0;
    const auto step = [&] {
      if (++slot == S::kSlots) slot = 0, parity ^= 1;
    };
    for (int n = 0; n < own_tiles; ++n) {
      Place at = place(n);
      at.tile = S::kConsumers * at.tile + consumer;
      rt_fl<16, C> dx;
      rt<T, 16, kHeads> d_bias;
      LoadBiasGradient<T>(d_bias, g.given, at, g.rows, g.columns);
      warpgroup::mm_ABt(dx, d_bias, shared.bias_weight);
      int last = slot;
#pragma unroll 1
      for (int chunk = 0; chunk < S::kGradients; ++chunk) {
        wait(shared.arrived[slot], parity);
        warpgroup::mma_ABt(dx, shared.slot[slot].half[consumer], shared.weight[chunk]);
        if (chunk > 0) {
          warpgroup::mma_async_wait<1>();
          warp::arrive(shared.finished[last]);
        }
        last = slot;
        step();
      }
      warpgroup::mma_async_wait();
      Pin(dx);
      warp::arrive(shared.finished[last]);

      rt_fl<16, C> y;
      bool garbage[2];
      int z_slot[S::kPairChunks];
#pragma unroll
      for (int chunk = 0; chunk < S::kPairChunks; ++chunk) {
        wait(shared.arrived[slot], parity);
        z_slot[chunk] = slot;
        LoadColumns(y, shared.slot[slot].half[consumer], chunk);
        step();
      }
      col_vec<rt_fl<16, C>> mean, inverse_deviation;
      Normalise(y, mean, inverse_deviation, g.given.epsilon);
      FindGarbage<C>(garbage, y, [&](int i) {
        return IsValid(g.given.mask, ending, at.batch, g.given.rows, g.given.columns, at.row,
                       at.position(i));
      });
      WriteStatistics(g, at, mean[0][0], inverse_deviation[0][0], garbage);
      DifferentiateNorm(dx, y, shared.norm_scale, inverse_deviation);
      if (residual) {
#pragma unroll
        for (int chunk = 0; chunk < S::kPairChunks; ++chunk) {
          wait(shared.arrived[slot], parity);
          LoadColumns(y, shared.slot[slot].half[consumer], chunk);
          warp::sync();
          warp::arrive(shared.finished[slot]);
          step();
        }
        warp::add(dx, dx, y);
      }
      rt<T, 16, C> dz;
      const unsigned keep[2] = {!garbage[0], !garbage[1]};
      warp::copy(dz, dx);
      KeepRows(dz, keep);
#pragma unroll
      for (int chunk = 0; chunk < S::kPairChunks; ++chunk) {
        StoreColumns(shared.slot[z_slot[chunk]].half[consumer], dz, chunk);
      }
      FenceAsyncProxy();
      warpgroup::sync(consumer + 1);
      if (warpgroup::laneid() == 0) {
#pragma unroll
        for (int chunk = 0; chunk < S::kPairChunks; ++chunk) {
          auto& from = shared.slot[z_slot[chunk]].half[consumer];
          if (ending) {
            tma::store_async<dim::DEPTH, NORMAL>(g.dz, from, {at.batch, at.tile, at.row, chunk});
          } else {
            tma::store_async<dim::ROW, NORMAL>(g.dz, from, {at.batch, at.row, at.tile, chunk});
          }
        }
        tma::store_async_read_wait();
      }
#pragma unroll
      for (int chunk = 0; chunk < S::kPairChunks; ++chunk) {
        warp::arrive(shared.finished[z_slot[chunk]]);
      }
    }
    warpgroup::tma::store_async_wait();
  }
}

template <typename T, int C, int HD>
cudaError_t LaunchFor(const AttentionProjectionBackward& p, cudaStream_t stream) {
  using S = Shape<T, C, HD>;
  constexpr int kShared = sizeof(typename S::Shared) + 1024;
  const auto kernel = ProjectionBackward<T, C, HD>;
  int processors;
  if (cudaError_t status = Prepare(kernel, kShared, &processors)) return status;

  const size_t batch = p.batch, z_rows = p.rows, z_columns = p.columns;
  const size_t rows = p.ending ? z_columns : z_rows, columns = p.ending ? z_rows : z_columns;
  constexpr int kTilePairs = S::kConsumers * kPairs;
  const int64_t column_tiles = (columns + kTilePairs - 1) / kTilePairs;
  const int64_t tiles = batch * rows * column_tiles;
  if (tiles >= int64_t{1} << 30) return cudaErrorInvalidValue;
  const auto hidden = [&](const void* d) {
    return typename Globals<T, C, HD>::Hidden(Data<T>(d), nullptr, batch * rows, columns, nullptr);
  };
  const auto pairs = [&](const void* z) {
    return typename Globals<T, C, HD>::Pairs(Data<T>(z), batch, z_rows, z_columns, nullptr);
  };
  try {
    const Globals<T, C, HD> globals = {
        .d = {hidden(p.d[0]), hidden(p.d[1]), hidden(p.d[2]), hidden(p.d[3])},
        .z = pairs(p.z),
        .d_out = pairs(p.d_out ? p.d_out : p.z),
        .dz = pairs(p.dz),
        .given = p,
        .tiles = static_cast<int>(tiles),
        .rows = static_cast<int>(rows),
        .columns = static_cast<int>(columns),
        .column_tiles = static_cast<int>(column_tiles),
        .query_factor = kLog2E / std::sqrt(static_cast<float>(p.head_width))};
    kernel<<<std::min<int64_t>(tiles, processors), S::kThreads, kShared, stream>>>(globals);
  } catch (const std::runtime_error&) {  // a stride or a size is beyond TMA
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t LaunchFor(const AttentionProjectionBackward& p, cudaStream_t stream) {
  if (p.channels != p.heads * p.head_width) return cudaErrorInvalidValue;
  return ForSize<64, 128>(p.channels, [&](auto c) { return LaunchFor<T, c, c>(p, stream); });
}

}  // namespace

cudaError_t Launch(const AttentionProjectionBackward& p, cudaStream_t stream) {
  const bool sizes = p.batch >= 0 && p.rows >= 0 && p.columns >= 0 && p.heads <= kHeads &&
                     std::max(p.rows, p.columns) < int64_t{1} << 31;
  const bool types = p.kernel_dtype == Float::kF32 || p.kernel_dtype == p.dtype;
  uintptr_t kernels = 0;
  for (const void* kernel : p.kernel) kernels |= reinterpret_cast<uintptr_t>(kernel);
  if (!sizes || !types || kernels % sizeof(uint4) != 0) return cudaErrorInvalidValue;
  if (p.batch == 0 || p.rows == 0 || p.columns == 0) return cudaSuccess;
  if (p.dtype == Float::kBf16) return LaunchFor<bf16>(p, stream);
  if (p.dtype == Float::kF16) return LaunchFor<half>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace genie
