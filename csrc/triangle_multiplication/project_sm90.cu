// Gated projection: reads z once (per slice of hidden columns), writes a and b once, and multiplies
// every pair by a [C, 4 Hm] matrix; at C = Hm = 128 that is 768 bytes and 131 kFLOP a pair, so HBM
// and the tensor cores are about equally busy.
//
// Persistent blocks. The weights stay in shared memory; a producer thread loads tiles of 64 pairs
// ahead through a ring; each consumer warpgroup takes whole tiles: LayerNorm in registers makes the
// A operand, and for every chunk of 64 hidden columns two products, the gate and the channel-first
// store follow. While one warpgroup works on its registers the others keep the tensor cores busy.
#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "kittens.cuh"
#include "kittens/extensions.cuh"
#include "resident.cuh"
#include "triangle_multiplication/project_sm90.h"

namespace genie {
namespace {

using namespace kittens;

constexpr int kPairs = 64;   // of a tile: the rows of one WGMMA
constexpr int kPadding = 8;  // rows and columns of a and b are multiples of it
constexpr int kHidden = 64;  // hidden columns of a chunk: one 128-byte swizzled row of B

// Sizes by channels. The weights of one block fill 128 KiB; 256 channels leave room for two
// consumers, whose A operand takes 64 registers.
template <typename T, int C>
struct Shape {
  static constexpr int kConsumers = C == 256 ? 2 : 3;
  static constexpr int kThreads = (kConsumers + 1) * WARPGROUP_THREADS;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 160;
  static constexpr int kProducerRegisters = 24;
  static_assert(kConsumers * kConsumerRegisters + kProducerRegisters <= 512);

  using Pairs = st<T, kPairs, C>;
  using Weight = st<T, C, kHidden>;
  using Output = st<T, kHidden, kPairs>;
  static constexpr int kChunks = 128 * 1024 / (2 * sizeof(Weight));
  static constexpr int kStages = 32 * 1024 / sizeof(Pairs);
  // Tile n has the semaphores n % kTurns, so that one consumer sees every phase of them in order:
  // with a semaphore a stage, a consumer two phases ahead of a slow one would mistake the parity.
  static constexpr int kTurns = (kStages + kConsumers - 1) / kConsumers * kConsumers;

  struct Shared {
    Weight gate[kChunks], proj[kChunks];
    Pairs z[kStages];
    Output out[kConsumers][2];
    sv_fl<kHidden> gate_bias[kChunks], proj_bias[kChunks];
    sv_fl<C> norm_scale, norm_bias;
    semaphore arrived[kTurns], finished[kTurns];
  };
  static_assert(sizeof(Shared) + 1024 <= MAX_SHARED_MEMORY);
};

template <typename T, int C>
struct Globals {
  using S = Shape<T, C>;
  gl<T, 1, -1, -1, C, typename S::Pairs> z;                                     // [1, B I, K, C]
  gl<T, -1, -1, -1, -1, tma::descriptor<typename S::Output, dim::DEPTH>> a, b;  // [B, Hm, Ip, Kp]
  GatedProjection given;
  int tiles, column_tiles;  // of all padded positions, and of one row
  int slices, chunks;       // of the hidden columns, and chunks in a slice
};

struct Position {
  int batch, row, column_tile, source_row;
};

// The block's weights, biases and LayerNorm parameters, by all threads. Both halvings of
// p (tanh(g / 2) + 1) / 2 are done in the weights, which is exact but for fp16 subnormals.
template <typename T, int C>
__device__ void FillParameters(typename Shape<T, C>::Shared& shared, const GatedProjection& given,
                               int first_column, int chunks) {
  constexpr int kThreads = Shape<T, C>::kThreads;
  const auto fill = [&](auto* tiles, const void* kernel) {
    AsStored<T>(kernel, given.kernel_dtype, [&](auto* stored) {
      FillWeights<kThreads>(tiles, chunks, 2 * given.hidden, 0.5f,
                            [&](int chunk) { return stored + first_column + chunk * kHidden; });
    });
  };
  fill(shared.gate, given.gate_kernel);
  fill(shared.proj, given.proj_kernel);
  for (int i = threadIdx.x; i < kHidden * chunks; i += kThreads) {
    const int column = first_column + i, chunk = i / kHidden, at = i % kHidden;
    shared.gate_bias[chunk][at] = given.gate_bias ? 0.5f * given.gate_bias[column] : 0.f;
    shared.proj_bias[chunk][at] = given.proj_bias ? 0.5f * given.proj_bias[column] : 0.f;
  }
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
  const int columns = g.given.columns, rows = g.given.rows;
  const int rows_padded = g.given.rows_padded;
  // Where tile n lies in a and b, and the row of z that it reads: a row of padding reads the last
  // one, and its mask is empty.
  const auto locate = [&](int n) {
    const int tile = first_tile + n * tile_step, any_row = tile / g.column_tiles;
    const int batch = any_row / rows_padded, row = any_row % rows_padded;
    return Position{batch, row, tile % g.column_tiles, batch * rows + min(row, rows - 1)};
  };
  const auto load = [&](int n) {
    const Position at = locate(n);
    auto& z = shared.z[n % S::kStages];
    auto& arrived = shared.arrived[n % S::kTurns];
    tma::expect(arrived, z);
    tma::load_async(z, g.z, {at.source_row, at.column_tile, 0}, arrived);
  };

  // 1. The first tiles are on their way while the weights are converted.
  if (threadIdx.x == S::kConsumers * WARPGROUP_THREADS) {
    for (int turn = 0; turn < S::kTurns; ++turn) {
      init_semaphore(shared.arrived[turn], 0, 1);
      init_semaphore(shared.finished[turn], WARPGROUP_WARPS, 0);
    }
    for (int n = 0; n < S::kStages && n < own_tiles; ++n) load(n);
  }
  FillParameters<T, C>(shared, g.given, kHidden * first_chunk, g.chunks);
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
      const Position at = locate(n);

      // Read here, so that it has arrived by the first epilogue.
      unsigned valid[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column =
            kPairs * at.column_tile + 16 * warpgroup::warpid() + 8 * i + laneid() / 4;
        valid[i] = column < columns && at.row < rows;
        if (valid[i] && g.given.mask) {
          valid[i] = __ldg(g.given.mask + int64_t{at.source_row} * columns + column);
        }
      }

      rt<T, 16, C> x;
      {
        rt_fl<16, C> z;
        wait(shared.arrived[n % S::kTurns], n / S::kTurns % 2);
        warpgroup::load(z, shared.z[n % S::kStages]);
        warp::sync();
        warp::arrive(shared.finished[n % S::kTurns]);
        LayerNorm<T, C>(x, z, shared.norm_scale, shared.norm_bias, g.given.epsilon);
      }

      // Lane maps make the product's registers those of its transpose: [hidden, pairs] as stored.
      rt<T, 16, kHidden> out;
      const auto store = [&](int chunk) {
        auto& staged = shared.out[consumer][buffer];
        auto block = staged.template subtile<kHidden, 16>({0, warpgroup::warpid()});
        warp::store(block, Transposed(out));
        FenceAsyncProxy();
        warpgroup::tma::store_async_read_wait();  // the other buffer is free past the barrier
        warpgroup::sync(consumer + 1);
        const int hidden_tile = first_chunk + chunk, half = g.given.hidden / kHidden;
        const bool first = hidden_tile < half;
        warpgroup::tma::store_async<dim::DEPTH, NORMAL>(
            first ? g.a : g.b, staged,
            {at.batch, first ? hidden_tile : hidden_tile - half, at.row, at.column_tile});
        buffer ^= 1;
      };

      for (int chunk = 0; chunk < g.chunks; ++chunk) {
        rt_fl<16, kHidden> gate, proj;
        row_vec<rt_fl<16, kHidden>> bias;
        warpgroup::mm_AB(gate, x, shared.gate[chunk]);
        warpgroup::mm_AB(proj, x, shared.proj[chunk]);
        if (chunk > 0) store(chunk - 1);

        warpgroup::mma_async_wait<1>();
        Pin(gate);
        warp::load(bias, shared.gate_bias[chunk]);
        warp::add_col(gate, gate, bias);
        warp::unary_map<Tanh>(gate, gate);

        warpgroup::mma_async_wait<0>();
        Pin(proj);
        warp::load(bias, shared.proj_bias[chunk]);
        warp::add_col(proj, proj, bias);
        warp::mul(gate, gate, proj);
        warp::add(proj, proj, gate);
        warp::copy(out, proj);
        KeepRows(out, valid);
      }
      store(g.chunks - 1);
    }
    warpgroup::tma::store_async_wait();
  }
}

template <typename T, int C>
cudaError_t LaunchFor(const GatedProjection& p, cudaStream_t stream) {
  using S = Shape<T, C>;
  constexpr int kShared = sizeof(typename S::Shared) + 1024;
  const auto kernel = Project<T, C>;
  int processors;
  if (cudaError_t status = Prepare(kernel, kShared, &processors)) return status;

  const int column_tiles = (p.columns_padded + kPairs - 1) / kPairs;
  const int64_t tiles = p.batch * p.rows_padded * column_tiles;
  if (tiles >= int64_t{1} << 30) return cudaErrorInvalidValue;
  // As few slices as hold the weights, more where positions alone leave processors idle.
  const int all_chunks = 2 * p.hidden / kHidden;
  int slices = std::max(1, all_chunks / S::kChunks);
  while (2 * slices <= all_chunks && 2 * slices * tiles <= processors) slices *= 2;
  const int groups = std::min<int64_t>(tiles, std::max(1, processors / slices));

  const size_t batch = p.batch, rows = p.rows, columns = p.columns;
  const size_t hidden = p.hidden, rows_padded = p.rows_padded, columns_padded = p.columns_padded;
  T* z = Data<T>(p.z);
  try {
    const Globals<T, C> globals = {
        .z = {z, nullptr, batch * rows, columns, nullptr},
        .a = {static_cast<T*>(p.a), batch, hidden, rows_padded, columns_padded},
        .b = {static_cast<T*>(p.b), batch, hidden, rows_padded, columns_padded},
        .given = p,
        .tiles = static_cast<int>(tiles),
        .column_tiles = column_tiles,
        .slices = slices,
        .chunks = all_chunks / slices};
    kernel<<<groups * slices, S::kThreads, kShared, stream>>>(globals);
  } catch (const std::runtime_error&) {  // a stride or a size is beyond TMA
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t LaunchFor(const GatedProjection& p, cudaStream_t stream) {
  return ForSize<64, 128, 256>(p.channels, [&](auto c) { return LaunchFor<T, c>(p, stream); });
}

}  // namespace

cudaError_t Launch(const GatedProjection& p, cudaStream_t stream) {
  const bool widths = p.hidden == 64 || p.hidden == 128 || p.hidden == 256;
  const bool sizes = p.batch >= 0 && p.rows >= 0 && p.columns >= 1 && p.rows_padded >= p.rows &&
                     p.columns_padded >= p.columns && p.rows_padded % kPadding == 0 &&
                     p.columns_padded % kPadding == 0 && p.columns_padded < int64_t{1} << 31;
  const bool types = p.kernel_dtype == Float::kF32 || p.kernel_dtype == p.dtype;
  const auto kernels =
      reinterpret_cast<uintptr_t>(p.proj_kernel) | reinterpret_cast<uintptr_t>(p.gate_kernel);
  if (!widths || !sizes || !types || kernels % sizeof(uint4) != 0) return cudaErrorInvalidValue;
  if (p.batch == 0 || p.rows == 0) return cudaSuccess;
  if (p.dtype == Float::kBf16) return LaunchFor<bf16>(p, stream);
  if (p.dtype == Float::kF16) return LaunchFor<half>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace genie
