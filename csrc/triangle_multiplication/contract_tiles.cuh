// The geometry of the contraction: tiles, the steps along their depth, and the ring they go
// through.
#pragma once

#include <numeric>
#include <type_traits>

#include "kittens.cuh"
#include "kittens/extensions.cuh"
#include "triangle_multiplication/contract_sm90.h"

namespace genie {
namespace contraction {

using namespace kittens;

constexpr int kBlock = 64;                  // rows and columns of a block, the depth of a step
constexpr int kConsumers = 2;               // warpgroups
constexpr int kRows = kConsumers * kBlock;  // of a tile
constexpr int kBand = 16;  // rows of tiles walked together, down one column after the other
constexpr int kThreads = (kConsumers + 1) * WARPGROUP_THREADS;
constexpr int kConsumerRegisters = 224, kProducerRegisters = 56;
static_assert(kConsumers * kConsumerRegisters + kProducerRegisters <= 504);

// Sizes by the columns of a tile. The ring takes 192 KiB, whatever the tile.
template <typename T, int kColumns_>
struct Shape {
  static constexpr int kColumns = kColumns_, kColumnBlocks = kColumns / kBlock;
  using Block = st<T, kBlock, kBlock>;
  using Output = st<T, TILE_DIM, kBlock>;  // of one warp

  struct Stage {
    Block a[kConsumers], b[kColumnBlocks];
  };
  static constexpr int kStages = 192 * 1024 / sizeof(Stage);

  struct Shared {
    Stage stages[kStages];
    Output out[kConsumers * WARPGROUP_WARPS][2];
    semaphore arrived[kStages], finished[kStages];
    semaphore all_loaded;
  };
  static_assert(sizeof(Shared) + 1024 <= MAX_SHARED_MEMORY);
};

// The blocks of a mask, or nullptr.
struct Live {
  LiveBlocks blocks;
  int rows, columns;

  // Whether any block of a rectangle is live; one that ends past the last block ends there.
  template <int height, int width>
  __device__ bool Any(int entry, int row, int column) const {
    if (!blocks) return true;
    unsigned any = 0;
#pragma unroll
    for (int i = 0; i < height; ++i) {
      const int64_t at = (int64_t{entry} * rows + min(row + i, rows - 1)) * columns;
#pragma unroll
      for (int j = 0; j < width; ++j) any |= __ldg(blocks + at + min(column + j, columns - 1));
    }
    return any != 0;
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
  int shift = 0;  // from round to round, of which block takes which tile

  __host__ __device__ bool masked() const { return operations[0].masked || operations[1].masked; }
};

// Where masks leave some of a channel's tiles without terms, all blocks should have about as many
// with: blocks that would come back to fewer than eight places of a channel meet all of them with
// this shift.
inline int Shift(int blocks, int places) {
  if (places / std::gcd(blocks, places) >= 8) return 0;
  int shift = 0;
  while (std::gcd(blocks + shift, places) != 1) ++shift;
  return shift;
}

// Where a tile lies.
struct Place {
  int operation, batch, entry;  // entry: of the masks' batch
  int row, column;              // in tiles
};

template <typename G>
__device__ Place Locate(const G& g, int tile) {
  const int batch = tile / g.tiles_of_both, of_both = tile % g.tiles_of_both;
  const int operation = of_both >= g.tiles_of_first;
  const int rest = of_both - operation * g.tiles_of_first;
  const int rows = g.operations[operation].row_tiles;
  const int columns = g.operations[operation].column_tiles;
  const int band = rest / (kBand * columns), within = rest % (kBand * columns);
  const int height = min(kBand, rows - band * kBand);
  return {operation, batch, batch / g.channels, band * kBand + within % height, within / height};
}

// Whether a step of a masked tile has terms.
template <typename S, typename O>
__device__ bool HasTerms(const O& o, const Place& at, int step) {
  constexpr int kRowBlocks = kConsumers, kColumnBlocks = S::kColumnBlocks;
  const int row = kRowBlocks * at.row, column = kColumnBlocks * at.column;
  const bool a = o.a_transposed ? o.a_live.template Any<1, kRowBlocks>(at.entry, step, row)
                                : o.a_live.template Any<kRowBlocks, 1>(at.entry, row, step);
  const bool b = o.b_transposed ? o.b_live.template Any<kColumnBlocks, 1>(at.entry, column, step)
                                : o.b_live.template Any<1, kColumnBlocks>(at.entry, step, column);
  return a & b;  // the loads of both are on their way together
}

// How many steps of a tile have terms.
template <typename S, typename G>
__device__ int CountSteps(const G& g, int tile) {
  if (tile >= g.tiles) return 0;
  const Place at = Locate(g, tile);
  const auto& o = g.operations[at.operation];
  if (!o.masked) return o.steps;
  constexpr int kRowBlocks = kConsumers, kColumnBlocks = S::kColumnBlocks;
  if (!o.out_live.template Any<kRowBlocks, kColumnBlocks>(at.entry, kRowBlocks * at.row,
                                                          kColumnBlocks * at.column)) {
    return 0;
  }
  int steps = 0;
#pragma unroll 4
  for (int step = 0; step < o.steps; ++step) steps += HasTerms<S>(o, at, step);
  return steps;
}

// Calls f(place, steps) for each of the block's tiles; all lanes of a warp call it. The steps of 32
// masked tiles are counted at once, a tile a lane: the mask comes from L2, and tile by tile it took
// a fifth of the consumers' time.
template <typename S, typename G, typename F>
__device__ void ForEachTile(const G& g, F&& f) {
  const auto tile_of = [&](int n) {
    return n * gridDim.x + (blockIdx.x + n * g.shift) % gridDim.x;
  };
  int counts = 0;
  for (int n = 0; n * gridDim.x < g.tiles; ++n) {
    if (g.masked() && n % WARP_THREADS == 0) counts = CountSteps<S>(g, tile_of(n + laneid()));
    const int count = __shfl_sync(~0u, counts, n % WARP_THREADS), tile = tile_of(n);
    if (tile >= g.tiles) return;  // of the last round
    const Place at = Locate(g, tile);
    f(at, g.masked() ? count : g.operations[at.operation].steps);
  }
}

// Which of the 32 steps from `first` on have terms, a bit each; all lanes of a warp call it.
template <typename S, typename O>
__device__ unsigned LiveSteps(const O& o, const Place& at, int first) {
  const int step = first + laneid();
  return __ballot_sync(~0u, step < o.steps && (!o.masked || HasTerms<S>(o, at, step)));
}

// A stage of the ring, and the parity of its phase.
template <int kStages>
struct Turn {
  int stage = 0, parity = 0;
  __device__ void Advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

}  // namespace contraction
}  // namespace genie
