// The geometry of the contraction: tiles, the steps along their depth, and the ring they go
// through.
#pragma once

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
constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;
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
  };
  static_assert(sizeof(Shared) + 1024 <= MAX_SHARED_MEMORY);
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

// Which of the 32 steps from `first` on have terms, a bit each; all lanes of a warp call it.
template <typename S, typename O>
__device__ unsigned LiveSteps(const O& o, const Place& at, int first) {
  const int step = first + laneid();
  bool live = step < o.steps;
  if (o.masked && live) {
    constexpr int kRowBlocks = kConsumers, kColumnBlocks = S::kColumnBlocks;
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

}  // namespace contraction
}  // namespace genie
