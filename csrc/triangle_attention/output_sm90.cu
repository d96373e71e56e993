// Attention output: reads o and z once, writes out once, and multiplies every pair by [C, H D] and
// [H D, C] matrices; at C = H D = 128 that is 768 bytes and 66 kFLOP a pair, so HBM is busy for
// three times as long as the tensor cores.
//
// Persistent blocks. Both weights stay in shared memory; a producer thread loads tiles of 64 pairs
// ahead through a ring, z along its rows and o, for the ending node, down its columns; each
// consumer warpgroup takes whole tiles: LayerNorm in registers makes the first product's A operand,
// and each chunk of 64 hidden columns of gate * o that of the second's. The result overwrites z in
// its stage and leaves from there, so the stage is free once the store has read it.
#include <algorithm>
#include <stdexcept>

#include "kittens.cuh"
#include "triangle_attention/output_sm90.h"
#include "triangle_attention/pairs.cuh"

namespace genie {
namespace {

using namespace kittens;

// Sizes by channels. Of 256 channels the sums of half are kept at a time, and the gate made twice.
template <typename T, int C>
struct Shape {
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = (kConsumers + 1) * WARPGROUP_THREADS;
  static constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;
  static constexpr int kWidth = C == 256 ? 128 : C;
  static constexpr int kHalves = C / kWidth;

  using Pairs = st<T, kPairs, C>;
  using Attended = st<T, kPairs, kHidden>;
  using GateWeight = st<T, C, kHidden>;
  using OutWeight = st<T, kHidden, kWidth>;
  static constexpr int kMaxStages = 4;
  static constexpr int kMaxHidden = 256;

  struct Parameters {
    sv_fl<C> norm_scale, norm_bias;
    sv_fl<kHidden> gate_bias[kMaxHidden / kHidden];
    sv_fl<kWidth> out_bias[kHalves];
    // Tile n has the semaphores n % turns, so that one consumer sees every phase of them in order.
    semaphore arrived[kMaxStages], finished[kMaxStages];
  };
  static_assert(kMaxStages % kConsumers == 0);

  // What the weights of a hidden width leave room for.
  static constexpr int WeightBytes(int chunks) {
    return chunks * (sizeof(GateWeight) + kHalves * sizeof(OutWeight));
  }
  static constexpr int StageBytes(int chunks) { return sizeof(Pairs) + chunks * sizeof(Attended); }
  static constexpr int Stages(int chunks) {
    const int free = MAX_SHARED_MEMORY - 1024 - sizeof(Parameters) - WeightBytes(chunks);
    return std::min(free / StageBytes(chunks), kMaxStages);
  }
};

template <typename T, int C>
struct Globals {
  using S = Shape<T, C>;
  gl<T, 1, -1, -1, C, typename S::Pairs> z, out;  // [1, B N1, N2, C]
  // [B, I, J, H D], read along a row or down a column.
  gl<T, -1, -1, -1, -1, tma::descriptor<typename S::Attended, dim::ROW>,
     tma::descriptor<typename S::Attended, dim::DEPTH>>
      o;
  AttentionOutput given;
  int tiles, column_tiles;  // of [B, N1, N2]
  int chunks, stages;
};

// Where things lie in shared memory.
template <typename T, int C, typename S = Shape<T, C>>
struct Shared {
  typename S::GateWeight* gate_weight;  // [chunks]
  typename S::OutWeight* out_weight;    // [chunks][kHalves]
  typename S::Pairs* z;                 // [stages]
  typename S::Attended* o;              // [stages][chunks]
  typename S::Parameters* parameters;

  __device__ Shared(int* base, int chunks, int stages) {
    shared_allocator allocator(base);
    gate_weight = &allocator.template allocate<typename S::GateWeight>();
    out_weight = reinterpret_cast<typename S::OutWeight*>(gate_weight + chunks);
    z = reinterpret_cast<typename S::Pairs*>(out_weight + chunks * S::kHalves);
    o = reinterpret_cast<typename S::Attended*>(z + stages);
    parameters = reinterpret_cast<typename S::Parameters*>(o + stages * chunks);
  }
};

// Weights, biases and LayerNorm parameters, by all threads. sigmoid(g) = (tanh(g / 2) + 1) / 2: the
// halving of g is done in its weights, which is exact but for fp16 subnormals.
template <typename T, int C, typename Stored, typename S = Shape<T, C>>
__device__ void FillParameters(const Shared<T, C>& shared, const Globals<T, C>& g) {
  const AttentionOutput& given = g.given;
  FillWeights<S::kThreads>(shared.gate_weight, g.chunks, given.hidden, 0.5f, [&](int chunk) {
    return static_cast<const Stored*>(given.gate_kernel) + chunk * kHidden;
  });
  FillWeights<S::kThreads>(shared.out_weight, g.chunks * S::kHalves, C, 1.f, [&](int n) {
    return static_cast<const Stored*>(given.out_kernel) + n / S::kHalves * kHidden * C +
           n % S::kHalves * S::kWidth;
  });
  auto& parameters = *shared.parameters;
  for (int i = threadIdx.x; i < given.hidden; i += S::kThreads) {
    parameters.gate_bias[i / kHidden][i % kHidden] =
        given.gate_bias ? 0.5f * given.gate_bias[i] : 0.f;
  }
  for (int i = threadIdx.x; i < C; i += S::kThreads) {
    parameters.norm_scale[i] = given.norm_scale[i];
    parameters.norm_bias[i] = given.norm_bias[i];
    parameters.out_bias[i / S::kWidth][i % S::kWidth] = given.out_bias ? given.out_bias[i] : 0.f;
  }
  FenceAsyncProxy();
}

// gated = sigmoid(2 gate) * o, rounded once.
template <typename T>
__device__ void Gate(rt<T, 16, kHidden>& gated, rt_fl<16, kHidden>& gate, rt_fl<16, kHidden>& o) {
  warp::unary_map<Tanh>(gate, gate);
  warp::mul(o, o, 0.5f);
  warp::mul(gate, gate, o);
  warp::add(gate, gate, o);
  warp::copy(gated, gate);
}

template <typename T, int C, typename S = Shape<T, C>>
__global__ __launch_bounds__(S::kThreads, 1) void Output(const __grid_constant__ Globals<T, C> g) {
  extern __shared__ alignment_dummy __shm[];
  const Shared<T, C> shared(reinterpret_cast<int*>(&__shm[0]), g.chunks, g.stages);
  auto& parameters = *shared.parameters;
  auto &arrived = parameters.arrived, &finished = parameters.finished;

  const int rows = g.given.rows, columns = g.given.columns;
  const int turns = (g.stages + 1) / S::kConsumers * S::kConsumers;
  const int own_tiles = (g.tiles - static_cast<int>(blockIdx.x) + gridDim.x - 1) / gridDim.x;
  const auto place = [&](int n) {
    return Place(blockIdx.x + n * gridDim.x, rows, g.column_tiles, g.given.ending);
  };
  const auto load = [&](int n) {
    const Place at = place(n);
    const int stage = n % g.stages;
    auto& ready = arrived[n % turns];
    tma::expect_bytes(ready, S::StageBytes(g.chunks));
    tma::load_async(shared.z[stage], g.z, {at.batch * rows + at.row, at.tile, 0}, ready);
    for (int chunk = 0; chunk < g.chunks; ++chunk) {
      auto& o = shared.o[stage * g.chunks + chunk];
      if (g.given.ending) {
        tma::load_async<dim::DEPTH, NORMAL>(o, g.o, {at.batch, at.tile, at.row, chunk}, ready);
      } else {
        tma::load_async<dim::ROW, NORMAL>(o, g.o, {at.batch, at.row, at.tile, chunk}, ready);
      }
    }
  };

  // 1. The first tiles are on their way while the weights are converted.
  if (threadIdx.x == S::kConsumers * WARPGROUP_THREADS) {
    for (int turn = 0; turn < turns; ++turn) {
      init_semaphore(arrived[turn], 0, 1);
      init_semaphore(finished[turn], 1, 0);
    }
    for (int n = 0; n < g.stages && n < own_tiles; ++n) load(n);
  }
  if (g.given.kernel_dtype == Float::kF32) {
    FillParameters<T, C, float>(shared, g);
  } else {
    FillParameters<T, C, T>(shared, g);
  }
  everyone::sync(0);

  if (warpgroupid() == S::kConsumers) {  // 2. The producer refills the ring.
    warpgroup::decrease_registers<S::kProducerRegisters>();
    if (warpgroup::laneid() == 0) {
      for (int n = g.stages; n < own_tiles; ++n) {
        const int last = n - g.stages;  // the stage's last tile
        wait(finished[last % turns], last / turns % 2);
        load(n);
      }
    }
  } else {  // 3. Consumer w takes tiles w, w + kConsumers, ... of the block.
    warpgroup::increase_registers<S::kConsumerRegisters>();
    const int consumer = warpgroupid();
    for (int n = consumer; n < own_tiles; n += S::kConsumers) {
      const Place at = place(n);
      const int stage = n % g.stages;
      auto& pairs = shared.z[stage];
      rt<T, 16, C> x;
      bool garbage[2];
      {
        rt_fl<16, C> z;
        wait(arrived[n % turns], n / turns % 2);
        warpgroup::load(z, pairs);
        LayerNorm<T, C>(x, z, parameters.norm_scale, parameters.norm_bias, g.given.epsilon);
        ReplaceGarbage(x, parameters.norm_bias, garbage, [&](int i) {
          const int column = at.position(i);
          const int64_t row = int64_t{at.batch} * rows + at.row;
          return !g.given.mask || column >= columns || g.given.mask[row * columns + column] != 0;
        });
      }

#pragma unroll
      for (int half = 0; half < S::kHalves; ++half) {
        rt_fl<16, S::kWidth> update;
        rt<T, 16, kHidden> gated;
        warp::zero(update);
        for (int chunk = 0; chunk < g.chunks; ++chunk) {
          rt_fl<16, kHidden> gate, o;
          row_vec<rt_fl<16, kHidden>> bias;
          warpgroup::mm_AB(gate, x, shared.gate_weight[chunk]);
          warpgroup::load(o, shared.o[stage * g.chunks + chunk]);
          warpgroup::mma_async_wait();  // for the chunk before, too
          Pin(gate);
          Pin(update);
          warp::load(bias, parameters.gate_bias[chunk]);
          warp::add_col(gate, gate, bias);
          Gate(gated, gate, o);
          warpgroup::mma_AB(update, gated, shared.out_weight[chunk * S::kHalves + half]);
        }
        warpgroup::mma_async_wait();
        Pin(update);
        row_vec<rt_fl<16, S::kWidth>> bias;
        warp::load(bias, parameters.out_bias[half]);
        warp::add_col(update, update, bias);
        auto block = pairs.template subtile<16, S::kWidth>({warpgroup::warpid(), half});
        if (g.given.residual) AddPairs<T>(update, block, garbage);
        warp::store(block, update);
      }
      FenceAsyncProxy();
      warpgroup::sync(consumer + 1);
      if (warpgroup::laneid() == 0) {
        tma::store_async(g.out, pairs, {at.batch * rows + at.row, at.tile, 0});
        tma::store_async_read_wait();
        arrive(finished[n % turns]);
      }
    }
    warpgroup::tma::store_async_wait();
  }
}

template <typename T, int C>
cudaError_t LaunchFor(const AttentionOutput& p, cudaStream_t stream) {
  using S = Shape<T, C>;
  const int chunks = p.hidden / kHidden, stages = S::Stages(chunks);
  if (stages < 1) return cudaErrorInvalidValue;
  const int shared = 1024 + sizeof(typename S::Parameters) + S::WeightBytes(chunks) +
                     stages * S::StageBytes(chunks);
  const auto kernel = Output<T, C>;
  int processors;
  if (cudaError_t status = Prepare(kernel, shared, &processors)) return status;

  const size_t batch = p.batch, rows = p.rows, columns = p.columns, hidden = p.hidden;
  const size_t attended_rows = p.ending ? columns : rows, positions = p.ending ? rows : columns;
  const int64_t column_tiles = (columns + kPairs - 1) / kPairs, tiles = batch * rows * column_tiles;
  if (tiles >= int64_t{1} << 30) return cudaErrorInvalidValue;
  try {
    const Globals<T, C> globals = {.z = {Data<T>(p.z), nullptr, batch * rows, columns, nullptr},
                                   .out = {Data<T>(p.out), nullptr, batch * rows, columns, nullptr},
                                   .o = {Data<T>(p.o), batch, attended_rows, positions, hidden},
                                   .given = p,
                                   .tiles = static_cast<int>(tiles),
                                   .column_tiles = static_cast<int>(column_tiles),
                                   .chunks = chunks,
                                   .stages = stages};
    kernel<<<std::min<int64_t>(tiles, processors), S::kThreads, shared, stream>>>(globals);
  } catch (const std::runtime_error&) {  // a stride or a size is beyond TMA
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t LaunchFor(const AttentionOutput& p, cudaStream_t stream) {
  return ForSize<64, 128, 256>(p.channels, [&](auto c) { return LaunchFor<T, c>(p, stream); });
}

}  // namespace

cudaError_t Launch(const AttentionOutput& p, cudaStream_t stream) {
  const bool widths = p.hidden == 64 || p.hidden == 128 || p.hidden == 256;
  const bool sizes = p.batch >= 0 && p.rows >= 0 && p.columns >= 0 &&
                     std::max(p.rows, p.columns) < int64_t{1} << 31;
  const bool types = p.kernel_dtype == Float::kF32 || p.kernel_dtype == p.dtype;
  const auto kernels =
      reinterpret_cast<uintptr_t>(p.gate_kernel) | reinterpret_cast<uintptr_t>(p.out_kernel);
  if (!widths || !sizes || !types || kernels % sizeof(uint4) != 0) return cudaErrorInvalidValue;
  if (p.batch == 0 || p.rows == 0 || p.columns == 0) return cudaSuccess;
  if (p.dtype == Float::kBf16) return LaunchFor<bf16>(p, stream);
  if (p.dtype == Float::kF16) return LaunchFor<half>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace genie
