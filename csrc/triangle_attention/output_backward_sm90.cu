// Backward of attention's output up to the gate's pre-activation: reads o, z and d_out once, writes
// d_o and d_gate once: 1,280 bytes a pair at C = H D = 128 against 98 kFLOP, so HBM is busy for
// twice as long as the tensor cores.
//
//   s = sigmoid(x Wg + bg)    a = s o    d_a = d_out Wo^T
//   d_o = s d_a    d_gate = d_a o s (1 - s)    dWo = sum a^T d_out    dbo = sum d_out
//
// Persistent blocks, each of one batch entry. Two consumer warpgroups take tiles of 64 pairs in
// turn, each with its own stage; a third keeps dWo in its registers, [H D, C] of float32, and takes
// every stage after them: x overwrites z there, which saves the consumers registers, and a
// overwrites o. Partial sums are one for each block.
#include <algorithm>
#include <stdexcept>

#include "kittens.cuh"
#include "triangle_attention/backward_sm90.h"
#include "triangle_attention/pairs.cuh"

namespace genie {
namespace {

using namespace kittens;

template <typename T, int C, int HD>
struct Shape {
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = (kConsumers + 2) * WARPGROUP_THREADS;
  static constexpr int kConsumerRegisters = 160, kSumRegisters = 168, kProducerRegisters = 24;
  static_assert(kConsumers * kConsumerRegisters + kSumRegisters + kProducerRegisters <= 512);
  static constexpr int kChunks = HD / kHidden;

  using Pairs = st<T, kPairs, C>;
  using Hidden = st<T, kPairs, kHidden>;
  struct Stage {
    Pairs z, d_out;
    Hidden o[kChunks];
  };
  struct Shared {
    st<T, C, kHidden> gate_weight[kChunks];
    st<T, kHidden, C> out_weight[kChunks];
    Stage stage[kConsumers];
    Hidden d_o[kConsumers], d_gate[kConsumers];
    sv_fl<C> norm_scale, norm_bias;
    sv_fl<kHidden> gate_bias[kChunks];
    semaphore arrived[kConsumers], gated[kConsumers], finished[kConsumers];
  };
  static_assert(sizeof(Shared) + 1024 <= MAX_SHARED_MEMORY);
};

template <typename T, int C, int HD>
struct Globals {
  using S = Shape<T, C, HD>;
  // [B, N1, N2, C], along a row or down a column.
  gl<T, -1, -1, -1, C, tma::descriptor<typename S::Pairs, dim::ROW>,
     tma::descriptor<typename S::Pairs, dim::DEPTH>>
      z, d_out;
  gl<T, 1, -1, -1, HD, typename S::Hidden> o, d_o, d_gate;  // [1, B I, J, H D]
  AttentionOutputBackward given;
  int tiles, rows, columns, column_tiles;  // of one batch entry's [I, J]
};

template <typename T, int C, int HD, typename Stored, typename S = Shape<T, C, HD>>
__device__ void FillParameters(typename S::Shared& shared, const AttentionOutputBackward& given) {
  FillWeights<S::kThreads>(shared.gate_weight, S::kChunks, HD, 0.5f, [&](int chunk) {
    return static_cast<const Stored*>(given.gate_kernel) + chunk * kHidden;
  });
  FillWeights<S::kThreads>(shared.out_weight, S::kChunks, C, 1.f, [&](int chunk) {
    return static_cast<const Stored*>(given.out_kernel) + chunk * kHidden * C;
  });
  for (int i = threadIdx.x; i < HD; i += S::kThreads) {
    shared.gate_bias[i / kHidden][i % kHidden] = given.gate_bias ? 0.5f * given.gate_bias[i] : 0.f;
  }
  for (int i = threadIdx.x; i < C; i += S::kThreads) {
    shared.norm_scale[i] = given.norm_scale[i];
    shared.norm_bias[i] = given.norm_bias[i];
  }
  FenceAsyncProxy();
}

// From tanh(pre-activation / 2), o and d_a: a into `gate`, d_o into `d_a`, d_gate into `o`.
__device__ inline void Differentiate(rt_fl<16, kHidden>& gate, rt_fl<16, kHidden>& o,
                                     rt_fl<16, kHidden>& d_a) {
  const auto each = [](float& gate, float& o, float& d_a) {
    const float s = 0.5f * gate + 0.5f, value = o;
    o = d_a * value * (0.25f - 0.25f * gate * gate);
    d_a *= s;
    gate = s * value;
  };
#pragma unroll
  for (int j = 0; j < kHidden / TILE_DIM; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float2 &g = gate.tiles[0][j].data[k], &x = o.tiles[0][j].data[k],
             &d = d_a.tiles[0][j].data[k];
      each(g.x, x.x, d.x);
      each(g.y, x.y, d.y);
    }
  }
}

template <typename T, int C, int HD, typename S = Shape<T, C, HD>>
__global__ __launch_bounds__(S::kThreads,
                             1) void OutputBackward(const __grid_constant__ Globals<T, C, HD> g) {
  extern __shared__ alignment_dummy __shm[];
  shared_allocator allocator(reinterpret_cast<int*>(&__shm[0]));
  auto& shared = allocator.template allocate<typename S::Shared>();

  const int parts = g.given.parts, batch = blockIdx.x / parts, part = blockIdx.x % parts;
  const int own_tiles = std::max(0, (g.tiles - part + parts - 1) / parts);
  const bool ending = g.given.ending;
  const auto place = [&](int n) { return Place(part + n * parts, g.rows, g.column_tiles, ending); };
  const auto load = [&](int n) {
    const Place at = place(n);
    auto& stage = shared.stage[n % S::kConsumers];
    auto& arrived = shared.arrived[n % S::kConsumers];
    tma::expect(arrived, stage);
    if (ending) {
      tma::load_async<dim::DEPTH, NORMAL>(stage.z, g.z, {batch, at.tile, at.row, 0}, arrived);
      tma::load_async<dim::DEPTH, NORMAL>(stage.d_out, g.d_out, {batch, at.tile, at.row, 0},
                                          arrived);
    } else {
      tma::load_async<dim::ROW, NORMAL>(stage.z, g.z, {batch, at.row, at.tile, 0}, arrived);
      tma::load_async<dim::ROW, NORMAL>(stage.d_out, g.d_out, {batch, at.row, at.tile, 0}, arrived);
    }
    for (int chunk = 0; chunk < S::kChunks; ++chunk) {
      tma::load_async(stage.o[chunk], g.o, {batch * g.rows + at.row, at.tile, chunk}, arrived);
    }
  };

  // 1. The first tiles are on their way while the weights are converted.
  if (threadIdx.x == (S::kConsumers + 1) * WARPGROUP_THREADS) {
    for (int consumer = 0; consumer < S::kConsumers; ++consumer) {
      init_semaphore(shared.arrived[consumer], 0, 1);
      init_semaphore(shared.gated[consumer], WARPGROUP_WARPS, 0);
      init_semaphore(shared.finished[consumer], WARPGROUP_WARPS, 0);
    }
    for (int n = 0; n < S::kConsumers && n < own_tiles; ++n) load(n);
  }
  if (g.given.kernel_dtype == Float::kF32) {
    FillParameters<T, C, HD, float>(shared, g.given);
  } else {
    FillParameters<T, C, HD, T>(shared, g.given);
  }
  everyone::sync(0);

  if (warpgroupid() == S::kConsumers + 1) {  // 2. The producer refills the stages.
    warpgroup::decrease_registers<S::kProducerRegisters>();
    if (warpgroup::laneid() == 0) {
      for (int n = S::kConsumers; n < own_tiles; ++n) {
        wait(shared.finished[n % S::kConsumers], n / S::kConsumers % 2 ^ 1);
        load(n);
      }
    }
  } else if (warpgroupid() == S::kConsumers) {  // 3. The sums over all tiles of the block.
    warpgroup::increase_registers<S::kSumRegisters>();
    rt_fl<16, C> kernel_sums[S::kChunks];
    float bias_sums[8] = {};
#pragma unroll
    for (int chunk = 0; chunk < S::kChunks; ++chunk) warp::zero(kernel_sums[chunk]);
    for (int n = 0; n < own_tiles; ++n) {
      auto& stage = shared.stage[n % S::kConsumers];
      wait(shared.arrived[n % S::kConsumers], n / S::kConsumers % 2);
      wait(shared.gated[n % S::kConsumers], n / S::kConsumers % 2);
#pragma unroll
      for (int chunk = 0; chunk < S::kChunks; ++chunk) {
        warpgroup::mma_AtB(kernel_sums[chunk], stage.o[chunk], stage.d_out);
      }
      AddColumns(bias_sums, stage.d_out, warpgroup::laneid());
      warpgroup::mma_async_wait();
#pragma unroll
      for (int chunk = 0; chunk < S::kChunks; ++chunk) Pin(kernel_sums[chunk]);
      warp::sync();
      warp::arrive(shared.finished[n % S::kConsumers]);
    }
#pragma unroll
    for (int chunk = 0; chunk < S::kChunks; ++chunk) {
      const int row = chunk * kHidden + 16 * warpgroup::warpid();
      WriteRows(g.given.out_kernel_sums + (int64_t{blockIdx.x} * HD + row) * C, kernel_sums[chunk],
                C);
    }
    // Everyone is past the weights once the last tile has been gated.
    WriteColumns<C>(g.given.out_bias_sums + int64_t{blockIdx.x} * C, bias_sums,
                    reinterpret_cast<float*>(shared.gate_weight), S::kConsumers + 1);
  } else {  // 4. Consumer w takes tiles w, w + kConsumers, ... of the block.
    warpgroup::increase_registers<S::kConsumerRegisters>();
    const int consumer = warpgroupid();
    auto& stage = shared.stage[consumer];
    for (int n = consumer; n < own_tiles; n += S::kConsumers) {
      const Place at = place(n);
      {
        rt_fl<16, C> z;
        rt<T, 16, C> x;
        wait(shared.arrived[consumer], n / S::kConsumers % 2);
        warpgroup::load(z, stage.z);
        LayerNorm<T, C>(x, z, shared.norm_scale, shared.norm_bias, g.given.epsilon);
        bool garbage[2];
        ReplaceGarbage(x, shared.norm_bias, garbage, [&](int i) {
          return IsValid(g.given.mask, ending, batch, g.given.rows, g.given.columns, at.row,
                         at.position(i));
        });
        warpgroup::store(stage.z, x);
      }
      FenceAsyncProxy();
      warpgroup::sync(consumer + 1);
      for (int chunk = 0; chunk < S::kChunks; ++chunk) {
        rt_fl<16, kHidden> gate, d_a, o;
        row_vec<rt_fl<16, kHidden>> bias;
        warpgroup::mm_AB(gate, stage.z, shared.gate_weight[chunk]);
        warpgroup::mm_ABt(d_a, stage.d_out, shared.out_weight[chunk]);
        warpgroup::load(o, stage.o[chunk]);
        warpgroup::mma_async_wait();
        Pin(gate);
        Pin(d_a);
        warp::load(bias, shared.gate_bias[chunk]);
        warp::add_col(gate, gate, bias);
        warp::unary_map<Tanh>(gate, gate);
        Differentiate(gate, o, d_a);
        warpgroup::tma::store_async_read_wait();
        warpgroup::sync(consumer + 1);
        warpgroup::store(stage.o[chunk], gate);
        warpgroup::store(shared.d_o[consumer], d_a);
        warpgroup::store(shared.d_gate[consumer], o);
        FenceAsyncProxy();
        warpgroup::sync(consumer + 1);
        if (warpgroup::laneid() == 0) {
          const int row = batch * g.rows + at.row;
          tma::store_async(g.d_o, shared.d_o[consumer], {row, at.tile, chunk});
          tma::store_async(g.d_gate, shared.d_gate[consumer], {row, at.tile, chunk});
        }
      }
      warp::arrive(shared.gated[consumer]);
    }
    warpgroup::tma::store_async_wait();
  }
}

template <typename T, int C, int HD>
cudaError_t LaunchFor(const AttentionOutputBackward& p, cudaStream_t stream) {
  using S = Shape<T, C, HD>;
  constexpr int kShared = sizeof(typename S::Shared) + 1024;
  const auto kernel = OutputBackward<T, C, HD>;
  int processors;
  if (cudaError_t status = Prepare(kernel, kShared, &processors)) return status;

  const size_t batch = p.batch, z_rows = p.rows, z_columns = p.columns;
  const size_t rows = p.ending ? z_columns : z_rows, columns = p.ending ? z_rows : z_columns;
  const int64_t column_tiles = (columns + kPairs - 1) / kPairs, tiles = rows * column_tiles;
  if (tiles >= int64_t{1} << 30 || p.batch * p.parts >= int64_t{1} << 31) {
    return cudaErrorInvalidValue;
  }
  try {
    const Globals<T, C, HD> globals = {
        .z = {Data<T>(p.z), batch, z_rows, z_columns, nullptr},
        .d_out = {Data<T>(p.d_out), batch, z_rows, z_columns, nullptr},
        .o = {Data<T>(p.o), nullptr, batch * rows, columns, nullptr},
        .d_o = {Data<T>(p.d_o), nullptr, batch * rows, columns, nullptr},
        .d_gate = {Data<T>(p.d_gate), nullptr, batch * rows, columns, nullptr},
        .given = p,
        .tiles = static_cast<int>(tiles),
        .rows = static_cast<int>(rows),
        .columns = static_cast<int>(columns),
        .column_tiles = static_cast<int>(column_tiles)};
    kernel<<<p.batch * p.parts, S::kThreads, kShared, stream>>>(globals);
  } catch (const std::runtime_error&) {  // a stride or a size is beyond TMA
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t LaunchFor(const AttentionOutputBackward& p, cudaStream_t stream) {
  if (p.channels != p.hidden) return cudaErrorInvalidValue;
  return ForSize<64, 128>(p.channels, [&](auto c) { return LaunchFor<T, c, c>(p, stream); });
}

}  // namespace

cudaError_t Launch(const AttentionOutputBackward& p, cudaStream_t stream) {
  const bool sizes = p.batch >= 0 && p.rows >= 0 && p.columns >= 0 && p.parts >= 1 &&
                     std::max(p.rows, p.columns) < int64_t{1} << 31;
  const bool types = p.kernel_dtype == Float::kF32 || p.kernel_dtype == p.dtype;
  const auto kernels =
      reinterpret_cast<uintptr_t>(p.gate_kernel) | reinterpret_cast<uintptr_t>(p.out_kernel);
  if (!sizes || !types || kernels % sizeof(uint4) != 0) return cudaErrorInvalidValue;
  if (p.batch == 0 || p.rows == 0 || p.columns == 0) return cudaSuccess;
  if (p.dtype == Float::kBf16) return LaunchFor<bf16>(p, stream);
  if (p.dtype == Float::kF16) return LaunchFor<half>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace genie
