// Attention projection: reads z once (per slice of hidden columns), writes q, k, v and the bias
// once, and multiplies every pair by a [C, 3 H D + H] matrix; at C = H D = 128 that is 1,032 bytes
// and 99 kFLOP a pair, so HBM is busy for three times as long as the tensor cores.
//
// Persistent blocks. The weights stay in shared memory; a producer thread loads tiles of 64 pairs
// ahead through a ring, for the ending node down a column of z; each consumer warpgroup takes whole
// tiles: LayerNorm in registers makes the A operand, and every chunk of 64 hidden columns is a
// product and a store. The consumers keep out of step, so that one's stores hide another's loads.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "kittens.cuh"
#include "triangle_attention/project_bias.cuh"
#include "triangle_attention/project_sm90.h"

namespace genie {
namespace {

using namespace kittens;

// Sizes by channels; chunks divide 3 H D / 64, which is 3, 6 or 12.
template <typename T, int C>
struct Shape {
  static constexpr int kConsumers = C == 256 ? 2 : 3;
  static constexpr int kThreads = (kConsumers + 1) * WARPGROUP_THREADS;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 160;
  static constexpr int kProducerRegisters = 24;
  static_assert(kConsumers * kConsumerRegisters + kProducerRegisters <= 512);

  using Pairs = st<T, kPairs, C>;
  using Weight = st<T, C, kHidden>;
  using BiasWeight = st<T, C, kHeads>;
  using Output = st<T, kPairs, kHidden>;
  using BiasOutput = st<T, kHeads, kPairs>;
  static constexpr int kChunks = C == 64 ? 12 : C == 128 ? 6 : 4;
  static constexpr int kStages = C == 256 ? 1 : 64 * 1024 / sizeof(Pairs);
  // Tile n has the semaphores n % kTurns, so that one consumer sees every phase of them in order.
  static constexpr int kTurns = (kStages + kConsumers - 1) / kConsumers * kConsumers;

  struct Shared {
    Weight weight[kChunks];
    Pairs z[kStages];
    Output out[kConsumers][2];
    BiasWeight bias_weight;
    BiasOutput bias[kConsumers];
    sv_fl<C> norm_scale, norm_bias;
    semaphore arrived[kTurns], finished[kTurns];
  };
  static_assert(sizeof(Shared) + 1024 <= MAX_SHARED_MEMORY);
};

template <typename T, int C>
struct Globals {
  using S = Shape<T, C>;
  // [B, N1, N2, C], read along a row or down a column.
  gl<T, -1, -1, -1, C, tma::descriptor<typename S::Pairs, dim::ROW>,
     tma::descriptor<typename S::Pairs, dim::DEPTH>>
      z;
  gl<T, 1, -1, -1, -1, typename S::Output> q, k, v;                                 // [B I, J, H D]
  gl<T, -1, -1, -1, -1, tma::descriptor<typename S::BiasOutput, dim::DEPTH>> bias;  // [B, H, Q, Kp]
  AttentionProjection given;
  int tiles, rows, columns, column_tiles;  // of [B, I, J]
  int slices, chunks;                      // of the hidden columns, and chunks in a slice
  float query_factor;
};

// The block's weights and LayerNorm parameters, by all threads.
template <typename T, int C, typename Stored>
__device__ void FillParameters(typename Shape<T, C>::Shared& shared, const Globals<T, C>& g,
                               int first_chunk) {
  constexpr int kThreads = Shape<T, C>::kThreads;
  const AttentionProjection& given = g.given;
  const int hidden = given.heads * given.head_width, tensor_chunks = hidden / kHidden;
  FillWeights<kThreads>(shared.weight, g.chunks, hidden, 1.f, [&](int chunk) {
    const int at = first_chunk + chunk, tensor = at / tensor_chunks;
    const void* kernel = tensor == 0   ? given.q_kernel
                         : tensor == 1 ? given.k_kernel
                                       : given.v_kernel;
    return static_cast<const Stored*>(kernel) + at % tensor_chunks * kHidden;
  });
  FillBiasWeight<kThreads>(shared.bias_weight, static_cast<const Stored*>(given.bias_kernel),
                           given.heads, 1.f);
  FillVector<kThreads>(shared.norm_scale, given.norm_scale);
  FillVector<kThreads>(shared.norm_bias, given.norm_bias);
  FenceAsyncProxy();
}

template <typename T, int C, typename S = Shape<T, C>>
__global__ __launch_bounds__(S::kThreads, 1) void Project(const __grid_constant__ Globals<T, C> g) {
  extern __shared__ alignment_dummy __shm[];
  shared_allocator allocator(reinterpret_cast<int*>(&__shm[0]));
  auto& shared = allocator.template allocate<typename S::Shared>();

  // The slices of the hidden columns share positions: z then comes from L2 for all but one.
  const int first_tile = blockIdx.x / g.slices, tile_step = gridDim.x / g.slices;
  const int own_tiles = (g.tiles - first_tile + tile_step - 1) / tile_step;
  const int first_chunk = blockIdx.x % g.slices * g.chunks;
  const bool ending = g.given.ending, scatters = ending && g.given.bias_as_z;
  const auto place = [&](int n) {
    return Place(first_tile + n * tile_step, g.rows, g.column_tiles, ending);
  };
  const auto load = [&](int n) {
    const Place at = place(n);
    auto& z = shared.z[n % S::kStages];
    auto& arrived = shared.arrived[n % S::kTurns];
    tma::expect(arrived, z);
    if (ending) {
      tma::load_async<dim::DEPTH, NORMAL>(z, g.z, {at.batch, at.tile, at.row, 0}, arrived);
    } else {
      tma::load_async<dim::ROW, NORMAL>(z, g.z, {at.batch, at.row, at.tile, 0}, arrived);
    }
  };

  // 1. The first tiles are on their way while the weights are converted.
  if (threadIdx.x == S::kConsumers * WARPGROUP_THREADS) {
    for (int turn = 0; turn < S::kTurns; ++turn) {
      init_semaphore(shared.arrived[turn], 0, 1);
      init_semaphore(shared.finished[turn], WARPGROUP_WARPS, 0);
    }
    for (int n = 0; n < S::kStages && n < own_tiles; ++n) load(n);
  }
  if (g.given.kernel_dtype == Float::kF32) {
    FillParameters<T, C, float>(shared, g, first_chunk);
  } else {
    FillParameters<T, C, T>(shared, g, first_chunk);
  }
  everyone::sync(0);

  if (warpgroupid() == S::kConsumers) {  // 2. The producer refills the ring.
    warpgroup::decrease_registers<S::kProducerRegisters>();
    if (warpgroup::laneid() == 0) {
      for (int n = S::kStages; n < own_tiles; ++n) {
        const int last = n - S::kStages;  // the stage's last tile
        wait(shared.finished[last % S::kTurns], last / S::kTurns % 2);
        load(n);
      }
    }
  } else {  // 3. Consumer w takes tiles w, w + kConsumers, ... of the block.
    warpgroup::increase_registers<S::kConsumerRegisters>();
    const int consumer = warpgroupid();
    int buffer = 0;
    for (int n = consumer; n < own_tiles; n += S::kConsumers) {
      const Place at = place(n);
      rt<T, 16, C> x;
      {
        rt_fl<16, C> z;
        wait(shared.arrived[n % S::kTurns], n / S::kTurns % 2);
        warpgroup::load(z, shared.z[n % S::kStages]);
        warp::sync();
        warp::arrive(shared.finished[n % S::kTurns]);
        LayerNorm<T, C>(x, z, shared.norm_scale, shared.norm_bias, g.given.epsilon);
        bool garbage[2];
        ReplaceGarbage(x, shared.norm_bias, garbage, [&](int i) {
          return IsValid(g.given.mask, ending, at.batch, g.given.rows, g.given.columns, at.row,
                         at.position(i));
        });
      }

      if (first_chunk == 0) {
        rt_fl<16, kHeads> sums;
        rt<T, 16, kHeads> bias;
        warpgroup::mm_AB(sums, x, shared.bias_weight);
        warpgroup::mma_async_wait();
        Pin(sums);
        warp::mul(sums, sums, kLog2E);
        warp::copy(bias, sums);
        if (scatters) {
          ScatterBias(g, bias, at);
        } else {
          StageBias(shared.bias[consumer], bias, at, g.columns);
        }
      }

      const int tensor_chunks = g.given.heads * g.given.head_width / kHidden;
      for (int chunk = 0; chunk < g.chunks; ++chunk) {
        rt_fl<16, kHidden> sums;
        warpgroup::mm_AB(sums, x, shared.weight[chunk]);
        warpgroup::mma_async_wait();
        Pin(sums);
        const int tensor = (first_chunk + chunk) / tensor_chunks;
        const int tensor_chunk = (first_chunk + chunk) % tensor_chunks;
        if (tensor == 0) warp::mul(sums, sums, g.query_factor);
        auto& staged = shared.out[consumer][buffer];
        warpgroup::store(staged, sums);
        FenceAsyncProxy();
        warpgroup::tma::store_async_read_wait();  // the other buffer is free past the barrier
        warpgroup::sync(consumer + 1);
        if (first_chunk + chunk == 0 && !scatters) {
          warpgroup::tma::store_async<dim::DEPTH, NORMAL>(g.bias, shared.bias[consumer],
                                                          {at.batch, 0, at.row, at.tile});
        }
        warpgroup::tma::store_async<dim::ROW, NORMAL>(
            tensor == 0   ? g.q
            : tensor == 1 ? g.k
                          : g.v,
            staged, {at.batch * g.rows + at.row, at.tile, tensor_chunk});
        buffer ^= 1;
      }
    }
    warpgroup::tma::store_async_wait();
  }
}

template <typename T, int C>
cudaError_t LaunchFor(const AttentionProjection& p, cudaStream_t stream) {
  using S = Shape<T, C>;
  constexpr int kShared = sizeof(typename S::Shared) + 1024;
  const auto kernel = Project<T, C>;
  int processors;
  if (cudaError_t status = Prepare(kernel, kShared, &processors)) return status;

  const size_t batch = p.batch, heads = p.heads, hidden = heads * p.head_width;
  const size_t rows = p.ending ? p.columns : p.rows, columns = p.ending ? p.rows : p.columns;
  const size_t queries = p.bias_as_z ? p.rows : rows, keys = p.bias_as_z ? p.columns : columns;
  const int64_t column_tiles = (columns + kPairs - 1) / kPairs, tiles = batch * rows * column_tiles;
  if (tiles >= int64_t{1} << 30) return cudaErrorInvalidValue;
  // As few slices as hold the weights, more where positions alone leave processors idle.
  const int all_chunks = 3 * hidden / kHidden;
  int slices = (all_chunks + S::kChunks - 1) / S::kChunks;
  if (3 * tiles <= processors) slices = std::max(slices, 3);
  const int groups = std::min<int64_t>(tiles, std::max(1, processors / slices));

  const auto attended = [&](void* to) {
    return gl<T, 1, -1, -1, -1, typename S::Output>(static_cast<T*>(to), nullptr, batch * rows,
                                                    columns, hidden);
  };
  const size_t z_rows = p.rows, z_columns = p.columns, bias_columns = BiasColumns(keys);
  try {
    const Globals<T, C> globals = {
        .z = {Data<T>(p.z), batch, z_rows, z_columns, nullptr},
        .q = attended(p.q),
        .k = attended(p.k),
        .v = attended(p.v),
        .bias = {static_cast<T*>(p.bias), batch, heads, queries, bias_columns},
        .given = p,
        .tiles = static_cast<int>(tiles),
        .rows = static_cast<int>(rows),
        .columns = static_cast<int>(columns),
        .column_tiles = static_cast<int>(column_tiles),
        .slices = slices,
        .chunks = all_chunks / slices,
        .query_factor = kLog2E / std::sqrt(static_cast<float>(p.head_width))};
    kernel<<<groups * slices, S::kThreads, kShared, stream>>>(globals);
  } catch (const std::runtime_error&) {  // a stride or a size is beyond TMA
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t LaunchFor(const AttentionProjection& p, cudaStream_t stream) {
  return ForSize<64, 128, 256>(p.channels, [&](auto c) { return LaunchFor<T, c>(p, stream); });
}

}  // namespace

cudaError_t Launch(const AttentionProjection& p, cudaStream_t stream) {
  const int hidden = p.heads * p.head_width;
  const bool widths =
      p.heads >= 1 && p.heads <= kHeads && (hidden == 64 || hidden == 128 || hidden == 256);
  const bool sizes = p.batch >= 0 && p.rows >= 0 && p.columns >= 0 &&
                     std::max(p.rows, p.columns) < int64_t{1} << 31;
  const bool types = p.kernel_dtype == Float::kF32 || p.kernel_dtype == p.dtype;
  const auto kernels = reinterpret_cast<uintptr_t>(p.q_kernel) |
                       reinterpret_cast<uintptr_t>(p.k_kernel) |
                       reinterpret_cast<uintptr_t>(p.v_kernel);
  if (!widths || !sizes || !types || kernels % sizeof(uint4) != 0) return cudaErrorInvalidValue;
  if (p.batch == 0 || p.rows == 0 || p.columns == 0) return cudaSuccess;
  if (p.dtype == Float::kBf16) return LaunchFor<bf16>(p, stream);
  if (p.dtype == Float::kF16) return LaunchFor<half>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace genie
