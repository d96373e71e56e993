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
#include <type_traits>

#include "kittens.cuh"
#include "kittens/extensions.cuh"
#include "triangle_multiplication/contract_sm90.h"

#ifndef POLICY
#define POLICY NORMAL
#endif
#ifndef SUPER
#define SUPER 16
#endif

namespace genie {
namespace {

using namespace kittens;

constexpr int kBlock = 64;                  // rows and columns of a block, the depth of a step
constexpr int kConsumers = 2;               // warpgroups
constexpr int kRows = kConsumers * kBlock;  // of a tile
constexpr int kSuperRows =
    SUPER;  // tiles are walked in bands of so many, down each column of a band
constexpr int kThreads = (kConsumers + 1) * WARPGROUP_THREADS;
constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;
static_assert(kConsumers * kConsumerRegisters + kProducerRegisters <= 504);

// Sizes by the columns of a tile. The ring takes 192 KiB, whatever the tile. The blocks of a
// cluster multiply rows one below the other by the same columns, of which each loads its share for
// all.
template <typename T, int kColumns_, int kCluster_>
struct Shape {
  static constexpr int kColumns = kColumns_, kCluster = kCluster_;
  using Block = st<T, kBlock, kBlock>;
  using Output = st<T, TILE_DIM, kBlock>;  // of one warp
  static constexpr int kColumnBlocks = kColumns / kBlock, kShare = kColumnBlocks / kCluster;

  struct Stage {
    Block a[kConsumers], b[kColumnBlocks];
  };
  static constexpr int kStages = 192 * 1024 / sizeof(Stage);

  struct Shared {
    Stage stages[kStages];
    Output out[kConsumers * WARPGROUP_WARPS][2];
    semaphore arrived[kStages], finished[kStages];
  };
  static_assert(sizeof(Shared) + 1024 <= MAX_SHARED_MEMORY && kColumnBlocks % kCluster == 0);
};

// The blocks of a mask, or nullptr.
struct Live {
  LiveBlocks blocks;
  int rows, columns;

  // Whether any block of a rectangle is live.
  __device__ bool Any(int entry, int2 first, int2 size) const {
    if (!blocks) return true;
    bool any = false;
    for (int row = first.x; row < min(first.x + size.x, rows); ++row) {
      for (int column = first.y; column < min(first.y + size.y, columns); ++column) {
        any |= __ldg(blocks + (int64_t{entry} * rows + row) * columns + column) != 0;
      }
    }
    return any;
  }
};

// A product with its descriptors, in tiles and steps.
template <typename T, typename Out>
struct Operation {
  using Block = st<T, kBlock, kBlock>;
  using Store = st<T, TILE_DIM, kBlock>;
  gl<T, 1, -1, -1, -1, Block> a, b;  // [1, B Hm, rows, columns], as stored
  std::conditional_t<std::is_same_v<T, Out>, gl<Out, 1, -1, -1, -1, Store>, gl<Out, 1, -1, -1, -1>>
      out;
  bool a_transposed, b_transposed, masked;
  Live a_live, b_live, out_live;
  int steps, row_tiles, column_tiles;
};

template <typename T, typename Out>
struct Globals {
  Operation<T, Out> operations[2];
  int channels, tiles_of_first, tiles_of_both;  // of one channel
  int tiles;
};

// Where a tile lies.
struct Place {
  int operation, batch, entry, row,
      column;  // entry: of the masks; row and column in tiles of a cluster
};

template <typename G>
__device__ Place Locate(const G& g, int tile) {
  const int batch = tile / g.tiles_of_both, of_both = tile % g.tiles_of_both;
  const int operation = of_both >= g.tiles_of_first;
  const int rest = of_both - operation * g.tiles_of_first;
  const int rows = g.operations[operation].row_tiles;
  const int columns = g.operations[operation].column_tiles;
  const int band = rest / (kSuperRows * columns), within = rest % (kSuperRows * columns);
  const int height = min(kSuperRows, rows - band * kSuperRows);
  return {operation, batch, batch / g.channels, band * kSuperRows + within % height,
          within / height};
}

// Which of the 32 steps from `first` on have terms, a bit each; all lanes of a warp call it.
template <typename S, typename O>
__device__ unsigned LiveSteps(const O& o, const Place& at, int first) {
  const int step = first + laneid();
  bool live = step < o.steps;
  if (o.masked && live) {
    constexpr int kRowBlocks = S::kCluster * kConsumers, kColumnBlocks = S::kColumnBlocks;
    const int row = kRowBlocks * at.row, column = kColumnBlocks * at.column;
    live = o.out_live.Any(at.entry, {row, column}, {kRowBlocks, kColumnBlocks}) &&
           (o.a_transposed ? o.a_live.Any(at.entry, {step, row}, {1, kRowBlocks})
                           : o.a_live.Any(at.entry, {row, step}, {kRowBlocks, 1})) &&
           (o.b_transposed ? o.b_live.Any(at.entry, {column, step}, {kColumnBlocks, 1})
                           : o.b_live.Any(at.entry, {step, column}, {1, kColumnBlocks}));
  }
  return __ballot_sync(~0u, live);
}

// A stage of the ring, and the parity of its phase.
template <int kStages>
struct Turn {
  int stage = 0, parity = 0;
  __device__ void Advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// One thread loads a step: the block's rows of A, and its share of B for the whole cluster.
template <typename S, typename O>
__device__ void Load(const O& o, const Place& at, int rank, int step, typename S::Shared& shared,
                     int turn) {
  using Coord = coord<typename S::Block>;
  auto& stage = shared.stages[turn];
  auto& arrived = shared.arrived[turn];
  tma::expect(arrived, stage);
  for (int i = 0; i < kConsumers; ++i) {
    const int row = kConsumers * (S::kCluster * at.row + rank) + i;
    tma::load_async(stage.a[i], o.a,
                    o.a_transposed ? Coord{at.batch, step, row} : Coord{at.batch, row, step},
                    arrived);
  }
  for (int i = rank * S::kShare; i < (rank + 1) * S::kShare; ++i) {
    const int column = S::kColumnBlocks * at.column + i;
    const Coord from =
        o.b_transposed ? Coord{at.batch, column, step} : Coord{at.batch, step, column};
    if constexpr (S::kCluster == 1) {
      tma::load_async(stage.b[i], o.b, from, arrived);
    } else {
      tma::cluster::load_async(stage.b[i], o.b, from, arrived, (1 << S::kCluster) - 1);
    }
  }
}

// A warp is done with a stage, which every block of the cluster writes to.
template <int kCluster>
__device__ void Release(semaphore& finished) {
  if constexpr (kCluster == 1) {
    warp::arrive(finished);
  } else {
    if (laneid() < kCluster) ArriveAsReader(finished, laneid());
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
    Release<S::kCluster>(shared.finished[previous]);
  }
  warpgroup::mma_async_wait<0>();
  Pin(sums);
  Release<S::kCluster>(shared.finished[turn.stage]);
  turn.Advance();
}

// 16-bit results leave by TMA through the warp's two buffers, float32 ones straight.
template <typename Sums, typename O, typename Output>
__device__ void Store(const O& o, const Place& at, int row_tile, Sums& sums, bool zero,
                      Output (&buffers)[2]) {
  const int row = WARPGROUP_WARPS * (kConsumers * row_tile + warpgroupid()) + warpgroup::warpid();
  if constexpr (std::is_same_v<typename Output::T, typename decltype(o.out)::T>) {
#pragma unroll
    for (int block = 0; block < Sums::cols / kBlock; ++block) {
      auto& buffer = buffers[zero ? 0 : block % 2];  // zeros need to be written once
      if (block == 0 || !zero) {
        block == 0 ? warp::tma::store_async_read_wait<0>() : warp::tma::store_async_read_wait<1>();
        warp::sync();
        warp::store(buffer, reinterpret_cast<rt_fl<TILE_DIM, kBlock>&>(
                                sums.tiles[0][block * kBlock / TILE_DIM]));
        FenceAsyncProxy();
        warp::sync();
      }
      warp::tma::store_async<dim::ROW, POLICY>(
          o.out, buffer, {0, at.batch, row, Sums::cols / kBlock * at.column + block});
    }
  } else {
    const int64_t rows = o.out.rows(), columns = o.out.cols();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t r = TILE_DIM * row + 8 * (k % 2) + laneid() / 4;
      float* to = o.out.raw_ptr + (at.batch * rows + r) * columns;
#pragma unroll
      for (int j = 0; j < Sums::width; ++j) {
        const int64_t c = Sums::cols * at.column + TILE_DIM * j + 8 * (k / 2) + laneid() % 4 * 2;
        if (r < rows && c < columns) {
          *reinterpret_cast<float2*>(to + c) = sums.tiles[0][j].data[k];
        }
      }
    }
  }
}

template <typename T, typename Out, typename S>
__global__ __cluster_dims__(S::kCluster)
    __launch_bounds__(kThreads, 1) void Contract(const __grid_constant__ Globals<T, Out> g) {
  extern __shared__ alignment_dummy __shm[];
  shared_allocator allocator(reinterpret_cast<int*>(&__shm[0]));
  auto& shared = allocator.template allocate<typename S::Shared>();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < S::kStages; ++stage) {
      init_semaphore(shared.arrived[stage], 0, 1);
      init_semaphore(shared.finished[stage], S::kCluster * kConsumers * WARPGROUP_WARPS, 0);
    }
  }
  everyone::tma::cluster::sync();
  const int rank = blockIdx.x % S::kCluster, clusters = gridDim.x / S::kCluster;
  Turn<S::kStages> turn;

  if (warpgroupid() == kConsumers) {  // 1. The producer runs ahead, through the epilogues too.
    warpgroup::decrease_registers<kProducerRegisters>();
    if (warpgroup::warpid() == 0) {
      for (int tile = blockIdx.x / S::kCluster; tile < g.tiles; tile += clusters) {
        const Place at = Locate(g, tile);
        const auto& o = g.operations[at.operation];
        for (int first = 0; first < o.steps; first += WARP_THREADS) {
          for (unsigned live = LiveSteps<S>(o, at, first); live; live &= live - 1) {
            wait(shared.finished[turn.stage], turn.parity ^ 1);
            if (laneid() == 0) Load<S>(o, at, rank, first + __ffs(live) - 1, shared, turn.stage);
            turn.Advance();
          }
        }
      }
    }
  } else {  // 2. Each consumer multiplies its 64 rows and stores them.
    warpgroup::increase_registers<kConsumerRegisters>();
    for (int tile = blockIdx.x / S::kCluster; tile < g.tiles; tile += clusters) {
      const Place at = Locate(g, tile);
      const auto& o = g.operations[at.operation];
      int steps = 0;
      for (int first = 0; first < o.steps; first += WARP_THREADS) {
        steps += __popc(LiveSteps<S>(o, at, first));
      }
      rt_fl<TILE_DIM, S::kColumns> sums;
      if (steps == 0) {
        warp::zero(sums);
      } else if (o.a_transposed) {
        Multiply<S, true, false>(sums, shared, turn, steps);
      } else if (o.b_transposed) {
        Multiply<S, false, true>(sums, shared, turn, steps);
      } else {
        Multiply<S, false, false>(sums, shared, turn, steps);
      }
      Store(o, at, S::kCluster * at.row + rank, sums, steps == 0, shared.out[warpid()]);
    }
    warp::tma::store_async_wait();
  }
  everyone::tma::cluster::sync();  // no block leaves while another may still write to it
}

// One thread block a mask block: whether any of its pairs is valid.
__global__ void Summarise(const uint8_t* mask, uint8_t* live, int rows, int columns, int row_blocks,
                          int column_blocks) {
  const int64_t any_row = blockIdx.x / column_blocks, entry = any_row / row_blocks;
  const int column = blockIdx.x % column_blocks * kBlock + threadIdx.x % kBlock;
  int found = 0;
#pragma unroll 8
  for (int i = threadIdx.x / kBlock; i < kBlock; i += blockDim.x / kBlock) {
    const int64_t row = any_row % row_blocks * kBlock + i;
    if (row < rows && column < columns)
      found |= __ldg(mask + (entry * rows + row) * columns + column);
  }
  found = __syncthreads_or(found);
  if (threadIdx.x == 0) live[blockIdx.x] = found != 0;
}

int Blocks(int64_t size, int block) { return static_cast<int>((size + block - 1) / block); }

// What a kernel is chosen by.
struct TileShape {
  int columns, cluster;
};
constexpr TileShape kTileShapes[] = {{256, 2}, {256, 1}, {192, 1}, {128, 1}, {64, 1}};

int64_t Tiles(const Product& p, TileShape shape) {
  return int64_t{Blocks(p.rows, kRows * shape.cluster)} * Blocks(p.columns, shape.columns);
}

// The shape whose waves over the processors take the least time, where a tile costs its columns and
// about 80 more, and a cluster saves a twentieth. Results do not depend on it.
TileShape Best(const Contraction& c, int processors) {
  TileShape best = {};
  int64_t least = 0;
  for (const TileShape shape : kTileShapes) {
    const int64_t tiles =
        c.batch * c.channels * (Tiles(c.products[0], shape) + Tiles(c.products[1], shape));
    const int64_t at_once = processors / shape.cluster;
    const int64_t cost =
        (tiles + at_once - 1) / at_once * (shape.columns + 80) * (shape.cluster > 1 ? 21 : 20);
    if (least == 0 || cost < least) best = shape, least = cost;
  }
  return best;
}

template <typename T, typename Out>
Operation<T, Out> Described(const Product& p, int64_t batch, TileShape shape) {
  using Element = std::remove_cv_t<T>;
  const size_t matrices = batch, rows = p.rows, cols = p.columns, depth = p.depth;
  const auto live = [](LiveBlocks blocks, int64_t rows, int64_t columns) {
    return Live{blocks, Blocks(rows, kBlock), Blocks(columns, kBlock)};
  };
  T* a = static_cast<Element*>(const_cast<void*>(p.a));
  T* b = static_cast<Element*>(const_cast<void*>(p.b));
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
          .row_tiles = Blocks(p.rows, kRows * shape.cluster),
          .column_tiles = Blocks(p.columns, shape.columns)};
}

template <typename T, typename Out, int kColumns, int kCluster>
cudaError_t LaunchFor(const Contraction& c, int processors, cudaStream_t stream) {
  using S = Shape<T, kColumns, kCluster>;
  constexpr TileShape kShape = {kColumns, kCluster};
  constexpr int kShared = sizeof(typename S::Shared) + 1024;
  const auto kernel = Contract<T, Out, S>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (status != cudaSuccess) return status;
  const bool two = c.products[1].rows > 0;
  const int64_t matrices = c.batch * c.channels, first = Tiles(c.products[0], kShape);
  const int64_t both = first + (two ? Tiles(c.products[1], kShape) : 0);
  if (matrices * both >= int64_t{1} << 30) return cudaErrorInvalidValue;
  try {
    const Globals<T, Out> globals = {
        .operations = {Described<T, Out>(c.products[0], matrices, kShape),
                       Described<T, Out>(c.products[two], matrices, kShape)},
        .channels = static_cast<int>(c.channels),
        .tiles_of_first = static_cast<int>(first),
        .tiles_of_both = static_cast<int>(both),
        .tiles = static_cast<int>(matrices * both)};
    int at_once = processors / kCluster;
#ifdef ALIGN
    if (both <= at_once) at_once -= at_once % both;
#endif
    const int blocks = kCluster * std::min(globals.tiles, at_once);
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
#ifdef ONLY
  return LaunchFor<T, Out, ONLY, CL>(c, processors, stream);
#else
  const TileShape shape = Best(c, processors);
  if (shape.cluster == 2) return LaunchFor<T, Out, 256, 2>(c, processors, stream);
  if (shape.columns == 256) return LaunchFor<T, Out, 256, 1>(c, processors, stream);
  if (shape.columns == 192) return LaunchFor<T, Out, 192, 1>(c, processors, stream);
  if (shape.columns == 128) return LaunchFor<T, Out, 128, 1>(c, processors, stream);
  return LaunchFor<T, Out, 64, 1>(c, processors, stream);
#endif
}

// A and B as stored, and out, start and continue at multiples of 16 bytes.
bool Aligned(const Product& p, Float out_dtype) {
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
    if (p.columns <= 0 || p.depth <= 0 || !Aligned(p, c.out_dtype)) return cudaErrorInvalidValue;
  }
  if (c.batch == 0 || c.channels == 0 || c.products[0].rows == 0) return cudaSuccess;
  if (c.dtype == Float::kBf16 && c.out_dtype == Float::kBf16) {
    return LaunchFor<bf16, bf16>(c, stream);
  }
#ifndef ONLY
  if (c.dtype == Float::kF16 && c.out_dtype == Float::kF32) {
    return LaunchFor<half, float>(c, stream);
  }
#endif
  return cudaErrorInvalidValue;
}

cudaError_t FindLive(const uint8_t* mask, uint8_t* live, int64_t batch, int64_t rows,
                     int64_t columns, cudaStream_t stream) {
  const int64_t blocks = LiveSize(batch, rows, columns);
  if (blocks >= int64_t{1} << 31) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  Summarise<<<static_cast<unsigned>(blocks), 256, 0, stream>>>(
      mask, live, rows, columns, Blocks(rows, kBlock), Blocks(columns, kBlock));
  return cudaGetLastError();
}

}  // namespace genie
