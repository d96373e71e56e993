// Contraction: batches of M x N x K products, 2 M N K operations on (M K + K N + M N) numbers, so
// the tensor cores set the time from about 200 rows and columns on and HBM below.
//
// Persistent blocks walk the tiles of all products in order, channel by channel, so that the blocks
// at work share operands in L2. A producer warp loads steps of 64 along the depth through a ring;
// two consumer warpgroups multiply 64 rows of the tile each. All that moves between memories is
// blocks of 64 x 64: a transposed operand differs in the coordinates of its blocks and in WGMMA's
// transpose bits only. The sum runs over the depth in order, 16 at a time, whatever the tile.
#include <algorithm>
#include <stdexcept>

#include "triangle_multiplication/contract_store.cuh"
#include "triangle_multiplication/contract_tiles.cuh"

namespace genie {
namespace {

using namespace contraction;

// One thread loads a step.
template <typename S, typename O>
__device__ void Load(const O& o, const Place& at, int step, typename S::Shared& shared, int turn) {
  using Coord = coord<typename S::Block>;
  auto& stage = shared.stages[turn];
  auto& arrived = shared.arrived[turn];
  tma::expect(arrived, stage);
  for (int i = 0; i < kConsumers; ++i) {
    const int row = kConsumers * at.row + i;
    tma::load_async(stage.a[i], o.a,
                    o.a_transposed ? Coord{at.batch, step, row} : Coord{at.batch, row, step},
                    arrived);
  }
  for (int i = 0; i < S::kColumnBlocks; ++i) {
    const int column = S::kColumnBlocks * at.column + i;
    tma::load_async(stage.b[i], o.b,
                    o.b_transposed ? Coord{at.batch, column, step} : Coord{at.batch, step, column},
                    arrived);
  }
}

// sums = the product of the consumer's rows over the next `steps` stages, at least one.
template <typename S, bool a_transposed, bool b_transposed, typename Sums>
__device__ void Multiply(Sums& sums, typename S::Shared& shared, Turn<S::kStages>& turn,
                         int steps) {
  using Block = typename S::Block;
  using B = std::conditional_t<b_transposed, st<typename Block::T, Sums::cols, kBlock>,
                               st<typename Block::T, kBlock, Sums::cols>>;
  const auto issue = [&](auto first) {
    constexpr int accumulate = !decltype(first)::value;
    auto& stage = shared.stages[turn.stage];
    const Block& a = stage.a[warpgroupid()];
    const B& b = reinterpret_cast<const B&>(stage.b);  // a row or a column of blocks is a tile
    wait(shared.arrived[turn.stage], turn.parity);
    if constexpr (a_transposed) {
      warpgroup::mma_AtB<Sums, Block, B, 1, accumulate>(sums, a, b);
    } else if constexpr (b_transposed) {
      warpgroup::mma_ABt<Sums, Block, B, 1, accumulate>(sums, a, b);
    } else {
      warpgroup::mma_AB<Sums, Block, B, 1, accumulate>(sums, a, b);
    }
  };
  issue(std::true_type());
  for (int n = 1; n < steps; ++n) {
    const int previous = turn.stage;
    turn.Advance();
    issue(std::false_type());
    warpgroup::mma_async_wait<1>();
    warp::arrive(shared.finished[previous]);
  }
  warpgroup::mma_async_wait<0>();
  Pin(sums);
  warp::arrive(shared.finished[turn.stage]);
  turn.Advance();
}

template <typename T, typename Out, typename S>
__global__ __launch_bounds__(kThreads, 1) void Contract(const __grid_constant__ Globals<T, Out> g) {
  extern __shared__ alignment_dummy __shm[];
  shared_allocator allocator(reinterpret_cast<int*>(&__shm[0]));
  auto& shared = allocator.template allocate<typename S::Shared>();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < S::kStages; ++stage) {
      init_semaphore(shared.arrived[stage], 0, 1);
      init_semaphore(shared.finished[stage], kConsumers * WARPGROUP_WARPS, 0);
    }
    init_semaphore(shared.all_loaded, 1, 0);
  }
  everyone::sync(0);
  const bool masked = g.masked();
  Turn<S::kStages> turn;

  if (warpgroupid() == kConsumers) {  // 1. The producer runs ahead, through the epilogues too.
    warpgroup::decrease_registers<kProducerRegisters>();
    if (warpgroup::warpid() == 0) {
      ForEachTile<S>(g, [&](const Place& at, int steps) {
        const auto& o = g.operations[at.operation];
        for (int first = 0; steps > 0 && first < o.steps; first += WARP_THREADS) {
          for (unsigned live = LiveSteps<S>(o, at, first); live; live &= live - 1) {
            wait(shared.finished[turn.stage], turn.parity ^ 1);
            if (laneid() == 0) Load<S>(o, at, first + __ffs(live) - 1, shared, turn.stage);
            turn.Advance();
          }
        }
      });
      warp::arrive(shared.all_loaded);
    } else if (masked) {  // Zeros come last: beside the loads, they delay them.
      wait(shared.all_loaded, 0);
      ForEachTile<S>(g, [&](const Place& at, int steps) {
        if (steps == 0) StoreZeros<S>(g.operations[at.operation], at);
      });
    }
  } else {  // 2. Each consumer multiplies its 64 rows and stores them.
    warpgroup::increase_registers<kConsumerRegisters>();
    ForEachTile<S>(g, [&](const Place& at, int steps) {
      if (steps == 0) return;  // the producer's warpgroup writes zeros
      const auto& o = g.operations[at.operation];
      rt_fl<TILE_DIM, S::kColumns> sums;
      if (o.a_transposed) {
        Multiply<S, true, false>(sums, shared, turn, steps);
      } else if (o.b_transposed) {
        Multiply<S, false, true>(sums, shared, turn, steps);
      } else {
        Multiply<S, false, false>(sums, shared, turn, steps);
      }
      Store(o, at, sums, shared.out[warpid()]);
    });
    warp::tma::store_async_wait();
  }
}

int Blocks(int64_t size, int block) { return static_cast<int>((size + block - 1) / block); }

int64_t Tiles(const Product& p, int columns) {
  return int64_t{Blocks(p.rows, kRows)} * Blocks(p.columns, columns);
}

// The columns of a tile: those whose waves over the processors take the least time, where a tile
// costs its columns and about 80 more. Results do not depend on them.
int TileColumns(const Contraction& c, int processors) {
  int best = 0;
  int64_t least = 0;
  for (const int columns : {256, 192, 128, 64}) {
    const int64_t tiles = Tiles(c.products[0], columns) + Tiles(c.products[1], columns);
    const int64_t waves = (c.batch * c.channels * tiles + processors - 1) / processors;
    const int64_t cost = waves * (columns + 80);
    if (best == 0 || cost < least) best = columns, least = cost;
  }
  return best;
}

template <typename T, typename Out>
Operation<T, Out> Described(const Product& p, int64_t batch, int columns) {
  const size_t matrices = batch, rows = p.rows, cols = p.columns, depth = p.depth;
  const auto live = [](LiveBlocks blocks, int64_t rows, int64_t columns) {
    return Live{blocks, Blocks(rows, kBlock), Blocks(columns, kBlock)};
  };
  T* a = static_cast<T*>(const_cast<void*>(p.a));
  T* b = static_cast<T*>(const_cast<void*>(p.b));
  const size_t a_rows = p.a_transposed ? depth : rows, a_cols = p.a_transposed ? rows : depth;
  const size_t b_rows = p.b_transposed ? cols : depth, b_cols = p.b_transposed ? depth : cols;
  return {.a = {a, nullptr, matrices, a_rows, a_cols},
          .b = {b, nullptr, matrices, b_rows, b_cols},
          .out = {static_cast<Out*>(p.out), nullptr, matrices, rows, cols},
          .a_transposed = p.a_transposed,
          .b_transposed = p.b_transposed,
          .masked = p.a_live || p.b_live || p.out_live,
          .a_live = live(p.a_live, a_rows, a_cols),
          .b_live = live(p.b_live, b_rows, b_cols),
          .out_live = live(p.out_live, rows, cols),
          .steps = Blocks(p.depth, kBlock),
          .row_tiles = Blocks(p.rows, kRows),
          .column_tiles = Blocks(p.columns, columns)};
}

template <typename T, typename Out, int kColumns>
cudaError_t LaunchFor(const Contraction& c, int processors, cudaStream_t stream) {
  using S = Shape<T, kColumns>;
  constexpr int kShared = sizeof(typename S::Shared) + 1024;
  const auto kernel = Contract<T, Out, S>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (status != cudaSuccess) return status;
  const bool two = c.products[1].rows > 0;
  const int64_t matrices = c.batch * c.channels, first = Tiles(c.products[0], kColumns);
  const int64_t both = first + Tiles(c.products[1], kColumns);
  if (matrices * both >= int64_t{1} << 30) return cudaErrorInvalidValue;
  try {
    const int tiles = static_cast<int>(matrices * both), blocks = std::min(tiles, processors);
    Globals<T, Out> globals = {
        .operations = {Described<T, Out>(c.products[0], matrices, kColumns),
                       Described<T, Out>(c.products[two], matrices, kColumns)},
        .channels = static_cast<int>(c.channels),
        .tiles_of_first = static_cast<int>(first),
        .tiles_of_both = static_cast<int>(both),
        .tiles = tiles};
    if (globals.masked()) globals.shift = Shift(blocks, globals.tiles_of_both);
    kernel<<<blocks, kThreads, kShared, stream>>>(globals);
  } catch (const std::runtime_error&) {  // a stride or a size is beyond TMA
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

template <typename T, typename Out>
cudaError_t LaunchFor(const Contraction& c, cudaStream_t stream) {
  int device, processors;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  const int columns = TileColumns(c, processors);
  if (columns == 256) return LaunchFor<T, Out, 256>(c, processors, stream);
  if (columns == 192) return LaunchFor<T, Out, 192>(c, processors, stream);
  if (columns == 128) return LaunchFor<T, Out, 128>(c, processors, stream);
  return LaunchFor<T, Out, 64>(c, processors, stream);
}

// A and B as stored, and out, start and continue at multiples of 16 bytes.
bool Aligned(const Product& p) {
  const int64_t lengths =
      (p.a_transposed ? p.rows : p.depth) | (p.b_transposed ? p.depth : p.columns) | p.columns;
  const auto addresses = reinterpret_cast<uintptr_t>(p.a) | reinterpret_cast<uintptr_t>(p.b) |
                         reinterpret_cast<uintptr_t>(p.out);
  return lengths % 8 == 0 && addresses % 16 == 0;
}

}  // namespace

cudaError_t Launch(const Contraction& c, cudaStream_t stream) {
  for (const Product& p : c.products) {
    if (p.rows == 0) continue;
    if (p.columns <= 0 || p.depth <= 0 || !Aligned(p)) return cudaErrorInvalidValue;
  }
  if (c.batch == 0 || c.channels == 0 || c.products[0].rows == 0) return cudaSuccess;
  if (c.dtype == Float::kBf16 && c.out_dtype == Float::kBf16) {
    return LaunchFor<bf16, bf16>(c, stream);
  }
  if (c.dtype == Float::kF16 && c.out_dtype == Float::kF32) {
    return LaunchFor<half, float>(c, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace genie
