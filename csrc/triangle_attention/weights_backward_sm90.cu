// Backward of attention's projections, weights: reads z twice (from L2 once) and the gradients of
// q, k, v, gate and bias once: 1,304 bytes a pair at C = H D = 128 against 132 kFLOP, so HBM is
// busy for twice as long as the tensor cores.
//
//   dW = sum of y^T d over pairs, y = LayerNorm(z) before scale and bias, and sum of d
//
// The sums of four projections fill a register file twice over, so blocks come in two kinds: one
// sums for q and k, the other for v, gate and bias. Persistent blocks, each of one batch entry: one
// warpgroup overwrites z by y in its stage, two keep [C, H D] of float32 each in their registers
// and take every stage after it. Partial sums are one for each block.
#include <algorithm>
#include <stdexcept>

#include "kittens.cuh"
#include "triangle_attention/backward_sm90.h"
#include "triangle_attention/pairs.cuh"

namespace genie {
namespace {

using namespace kittens;

constexpr int kKinds = 2;    // of blocks
constexpr int kSummers = 2;  // warpgroups that sum, a projection each

template <typename T, int C, int HD>
struct Shape {
  static constexpr int kThreads = (kSummers + 2) * WARPGROUP_THREADS;
  static constexpr int kNormRegisters = 152, kSumRegisters = 168, kProducerRegisters = 24;
  static_assert(kSummers * kSumRegisters + kNormRegisters + kProducerRegisters <= 512);
  static constexpr int kBlocks = C / kPairs;  // of 64 rows of a sum

  using Pairs = st<T, kPairs, C>;
  using Hidden = st<T, kPairs, HD>;
  using Heads = st<T, kPairs, kHeads>;
  struct Stage {
    Pairs z;  // then y
    Hidden d[kSummers];
  };
  static constexpr int kStages = 4;
  struct Shared {
    Stage stage[kStages];
    Heads d_bias;
    float scratch[kSummers + 1][8 * WARPGROUP_THREADS];
    semaphore arrived[kStages], normed[kStages], finished[kStages];
  };
  static_assert(sizeof(Shared) + 1024 <= MAX_SHARED_MEMORY);
};

template <typename T, int C, int HD>
struct Globals {
  using S = Shape<T, C, HD>;
  using Hidden = gl<T, 1, -1, -1, HD, typename S::Hidden>;  // [1, B I, J, H D]
  // [B, N1, N2, C], along a row or down a column.
  gl<T, -1, -1, -1, C, tma::descriptor<typename S::Pairs, dim::ROW>,
     tma::descriptor<typename S::Pairs, dim::DEPTH>>
      z;
  Hidden d[kKinds * kSummers];
  AttentionWeightsBackward given;
  int tiles, rows, columns, column_tiles;  // of one batch entry's [I, J]
};

// The rows of a 64-row block of y^T are 64 columns of y: a whole swizzle group.
template <typename Pairs>
__device__ auto& Block(Pairs& y, int block) {
  using Group = st<typename Pairs::T, kPairs, kPairs>;
  return reinterpret_cast<Group*>(&y)[block];
}

// The sums of projection `which` over all tiles of the block.
template <typename T, int C, int HD, typename S = Shape<T, C, HD>>
__device__ void Sum(const Globals<T, C, HD>& g, typename S::Shared& shared, int which, int part,
                    int own_tiles) {
  const int summer = which % kSummers;
  rt_fl<16, HD> kernel[S::kBlocks];
  float sums[8] = {};
#pragma unroll
  for (int block = 0; block < S::kBlocks; ++block) warp::zero(kernel[block]);
  for (int n = 0; n < own_tiles; ++n) {
    const int stage = n % S::kStages, parity = n / S::kStages % 2;
    auto& [y, d] = shared.stage[stage];
    wait(shared.arrived[stage], parity);
    wait(shared.normed[stage], parity);
#pragma unroll
    for (int block = 0; block < S::kBlocks; ++block) {
      warpgroup::mma_AtB(kernel[block], Block(y, block), d[summer]);
    }
    AddColumns(sums, d[summer], warpgroup::laneid());
    warpgroup::mma_async_wait();
#pragma unroll
    for (int block = 0; block < S::kBlocks; ++block) Pin(kernel[block]);
    warp::sync();
    warp::arrive(shared.finished[stage]);
  }
  const int64_t entry = int64_t{part} * kKinds * kSummers + which;
  float* to = g.given.kernel_sums + (entry * C + 16 * warpgroup::warpid()) * HD;
#pragma unroll
  for (int block = 0; block < S::kBlocks; ++block) {
    WriteRows(to + kPairs * block * HD, kernel[block], HD);
  }
  WriteColumns<HD>(g.given.sums + entry * HD, sums, shared.scratch[summer], summer + 1);
}

// What a lane reads of a tile from memory, a tile ahead: the statistics of its two rows, d_bias.
template <bool with_bias, typename T>
struct Ahead {
  float2 statistics[2];
  rt<T, 16, kHeads> d_bias;

  template <int C, int HD>
  __device__ void Load(const Globals<T, C, HD>& g, const Place& at) {
    const float2* row = g.given.statistics + (int64_t{at.batch} * g.rows + at.row) * g.columns;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = at.position(i);
      statistics[i] = column < g.columns ? __ldg(row + column) : float2{0, 0};
    }
    if constexpr (with_bias) LoadBiasGradient<T>(d_bias, g.given, at, g.rows, g.columns);
  }
};

// Overwrites z by y in every stage, and, with the bias, sums what its kernel's gradient needs.
template <bool with_bias, typename T, int C, int HD, typename FindPlace,
          typename S = Shape<T, C, HD>>
__device__ void Norm(const Globals<T, C, HD>& g, typename S::Shared& shared, int part,
                     int own_tiles, FindPlace&& place) {
  constexpr int kBarrier = kSummers + 1;
  rt_fl<16, kHeads> kernel[S::kBlocks];
  float sums[8] = {};
#pragma unroll
  for (int block = 0; block < S::kBlocks; ++block) warp::zero(kernel[block]);
  Ahead<with_bias, T> next;
  if (own_tiles > 0) next.Load(g, place(0));
  for (int n = 0; n < own_tiles; ++n) {
    const int stage = n % S::kStages;
    auto& pairs = shared.stage[stage].z;
    const Ahead<with_bias, T> now = next;
    if (n + 1 < own_tiles) next.Load(g, place(n + 1));
    {
      rt_fl<16, C> z;
      rt<T, 16, C> y;
      wait(shared.arrived[stage], n / S::kStages % 2);
      warpgroup::load(z, pairs);
      Normalise(y, z, now.statistics);
      warpgroup::store(pairs, y);
      if constexpr (with_bias) warpgroup::store(shared.d_bias, now.d_bias);
    }
    FenceAsyncProxy();
    warp::sync();
    warp::arrive(shared.normed[stage]);
    if constexpr (with_bias) {
      warpgroup::sync(kBarrier);
#pragma unroll
      for (int block = 0; block < S::kBlocks; ++block) {
        warpgroup::mma_AtB(kernel[block], Block(pairs, block), shared.d_bias);
      }
      AddColumns(sums, shared.d_bias, warpgroup::laneid());
      warpgroup::mma_async_wait();
#pragma unroll
      for (int block = 0; block < S::kBlocks; ++block) Pin(kernel[block]);
      warpgroup::sync(kBarrier);  // the tile of d_bias is free
    }
    warp::arrive(shared.finished[stage]);
  }
  if constexpr (with_bias) {
    float* to = g.given.bias_kernel_sums + (int64_t{part} * C + 16 * warpgroup::warpid()) * kHeads;
#pragma unroll
    for (int block = 0; block < S::kBlocks; ++block) {
      WriteRows(to + kPairs * block * kHeads, kernel[block], kHeads);
    }
    WriteColumns<kHeads>(g.given.bias_sums + int64_t{part} * kHeads, sums, shared.scratch[kSummers],
                         kBarrier);
  }
}

template <typename T, int C, int HD, typename S = Shape<T, C, HD>>
__global__ __launch_bounds__(S::kThreads,
                             1) void WeightsBackward(const __grid_constant__ Globals<T, C, HD> g) {
  extern __shared__ alignment_dummy __shm[];
  shared_allocator allocator(reinterpret_cast<int*>(&__shm[0]));
  auto& shared = allocator.template allocate<typename S::Shared>();

  // Both kinds of block pass over the same tiles at one time: z comes from L2 for the second.
  const int kind = blockIdx.x % kKinds, part = blockIdx.x / kKinds;
  const int parts = g.given.parts, batch = part / parts, first_tile = part % parts;
  const int own_tiles = std::max(0, (g.tiles - first_tile + parts - 1) / parts);
  const bool ending = g.given.ending;
  const auto place = [&](int n) {
    Place at(first_tile + n * parts, g.rows, g.column_tiles, ending);
    at.batch = batch;
    return at;
  };
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < S::kStages; ++stage) {
      init_semaphore(shared.arrived[stage], 0, 1);
      init_semaphore(shared.normed[stage], WARPGROUP_WARPS, 0);
      init_semaphore(shared.finished[stage], (kSummers + 1) * WARPGROUP_WARPS, 0);
    }
  }
  everyone::sync(0);

  if (warpgroupid() == kSummers + 1) {  // 1. The producer fills the stages.
    warpgroup::decrease_registers<S::kProducerRegisters>();
    if (warpgroup::laneid() == 0) {
      for (int n = 0; n < own_tiles; ++n) {
        const Place at = place(n);
        auto& stage = shared.stage[n % S::kStages];
        auto& arrived = shared.arrived[n % S::kStages];
        wait(shared.finished[n % S::kStages], n / S::kStages % 2 ^ 1);
        tma::expect(arrived, stage);
        if (ending) {
          tma::load_async<dim::DEPTH, NORMAL>(stage.z, g.z, {batch, at.tile, at.row, 0}, arrived);
        } else {
          tma::load_async<dim::ROW, NORMAL>(stage.z, g.z, {batch, at.row, at.tile, 0}, arrived);
        }
        for (int i = 0; i < kSummers; ++i) {
          tma::load_async(stage.d[i], g.d[kSummers * kind + i],
                          {batch * g.rows + at.row, at.tile, 0}, arrived);
        }
      }
    }
  } else if (warpgroupid() == kSummers) {  // 2. One warpgroup normalises, and sums for the bias.
    warpgroup::increase_registers<S::kNormRegisters>();
    if (kind == kKinds - 1) {
      Norm<true>(g, shared, part, own_tiles, place);
    } else {
      Norm<false>(g, shared, part, own_tiles, place);
    }
  } else {  // 3. Two sum.
    warpgroup::increase_registers<S::kSumRegisters>();
    Sum(g, shared, kSummers * kind + warpgroupid(), part, own_tiles);
  }
}

template <typename T, int C, int HD>
cudaError_t LaunchFor(const AttentionWeightsBackward& p, cudaStream_t stream) {
  using S = Shape<T, C, HD>;
  constexpr int kShared = sizeof(typename S::Shared) + 1024;
  const auto kernel = WeightsBackward<T, C, HD>;
  int processors;
  if (cudaError_t status = Prepare(kernel, kShared, &processors)) return status;

  const size_t batch = p.batch, z_rows = p.rows, z_columns = p.columns;
  const size_t rows = p.ending ? z_columns : z_rows, columns = p.ending ? z_rows : z_columns;
  const int64_t column_tiles = (columns + kPairs - 1) / kPairs, tiles = rows * column_tiles;
  if (tiles >= int64_t{1} << 30 || kKinds * p.batch * p.parts >= int64_t{1} << 31) {
    return cudaErrorInvalidValue;
  }
  const auto hidden = [&](const void* d) {
    return typename Globals<T, C, HD>::Hidden(Data<T>(d), nullptr, batch * rows, columns, nullptr);
  };
  try {
    const Globals<T, C, HD> globals = {
        .z = {Data<T>(p.z), batch, z_rows, z_columns, nullptr},
        .d = {hidden(p.d[0]), hidden(p.d[1]), hidden(p.d[2]), hidden(p.d[3])},
        .given = p,
        .tiles = static_cast<int>(tiles),
        .rows = static_cast<int>(rows),
        .columns = static_cast<int>(columns),
        .column_tiles = static_cast<int>(column_tiles)};
    kernel<<<kKinds * p.batch * p.parts, S::kThreads, kShared, stream>>>(globals);
  } catch (const std::runtime_error&) {  // a stride or a size is beyond TMA
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t LaunchFor(const AttentionWeightsBackward& p, cudaStream_t stream) {
  if (p.channels != p.heads * p.head_width) return cudaErrorInvalidValue;
  return ForSize<64, 128>(p.channels, [&](auto c) { return LaunchFor<T, c, c>(p, stream); });
}

}  // namespace

cudaError_t Launch(const AttentionWeightsBackward& p, cudaStream_t stream) {
  const bool sizes = p.batch >= 0 && p.rows >= 0 && p.columns >= 0 && p.parts >= 1 &&
                     p.heads <= kHeads && std::max(p.rows, p.columns) < int64_t{1} << 31;
  if (!sizes) return cudaErrorInvalidValue;
  if (p.batch == 0 || p.rows == 0 || p.columns == 0) return cudaSuccess;
  if (p.dtype == Float::kBf16) return LaunchFor<bf16>(p, stream);
  if (p.dtype == Float::kF16) return LaunchFor<half>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace genie
