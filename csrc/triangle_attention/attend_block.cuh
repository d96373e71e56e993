// A block of the attention core: its sizes, its shared memory and its share of the work.
#pragma once

#include "kittens.cuh"
#include "triangle_attention/attend_logits.cuh"
#include "triangle_attention/attend_sm90.h"
#include "triangle_attention/attend_units.cuh"

namespace genie::attend {

using namespace kittens;

constexpr int kRows = 3;  // rows i of a block, each with its consumer warpgroup
constexpr int kThreads = (kRows + 1) * WARPGROUP_THREADS;
constexpr int kConsumerRegisters = 152, kProducerRegisters = 56;
static_assert(kRows * kConsumerRegisters + kProducerRegisters <= 512);
static_assert(kRows < WARPGROUP_WARPS, "a producer warp a row, and one for the queries");

constexpr int kChunk = 256;  // keys whose mask is read at once
constexpr int kWords = kChunk / WARP_THREADS, kTileWords = kKeys / WARP_THREADS;

// What a row makes of a stage: none, some or all of its keys are valid; it is the unit's last, or
// not.
enum Kind { kNone = 0, kSome = 1, kAll = 2, kKeyed = kSome | kAll, kLast = 4, kMore = 8 };

template <typename T, int D>
struct Shape {
  static constexpr int kTiles = D == 64 ? 2 : 4;  // of queries
  static constexpr int kStages = D == 64 ? 2 : 3;
  static constexpr int kRequests = kStages;  // loads of queries that may wait
  using Queries = st<T, kQueries, D>;
  using Keys = st<T, kKeys, D>;
  using Bias = st<T, kQueries, kKeys>;
  using BiasBlock = st<T, kTiles * kQueries, kKeys>;  // tiles of queries one after the other
  using Logits = rt_fl<16, kKeys>;
  using Sums = rt_fl<16, D>;

  struct Shared {
    Bias bias[kStages][kTiles];
    Queries q[kRows][kTiles];
    Keys k[kStages][kRows], v[kStages][kRows];
    MaskTile<T> mask[kStages][kRows];  // where the row's kind is kSome
    int kind[kStages][kRows];
    alignas(8) unsigned valid[2][kRows][kWords];  // bits of the mask, of two chunks
    semaphore arrived[kStages], finished[kStages];
    bool wanted[kRequests][kRows];  // whether queries are to be loaded
    semaphore posted[kRequests], taken[kRequests];
    semaphore q_arrived[kRows][kTiles], q_finished[kRows][kTiles];
  };
  static_assert(sizeof(Shared) + 1024 <= MAX_SHARED_MEMORY);
};

// A block's share of the work.
struct Unit {
  int batch, row, head, query;  // the first row and query
  int tiles;                    // of queries, from 1 to kTiles
};

template <typename T, int D>
struct Globals {
  using S = Shape<T, D>;
  using Pairs = gl<T, -1, -1, -1, D, tma::descriptor<typename S::Keys, dim::DEPTH>>;
  Pairs q, k, v;                                                        // [B I, Q or K, H, D]
  gl<T, -1, -1, -1, -1, typename S::BiasBlock, typename S::Bias> bias;  // [B, H, Q, Kp]
  PairAttention given;
  Units<S::kTiles> cut;
  int units, row_groups;

  __device__ Unit unit(int n) const {
    const auto [line, first, tiles] = cut[n];
    const int heads = given.heads, group = line / heads;
    return {group / row_groups, group % row_groups * kRows, line % heads, first * kQueries, tiles};
  }
};

// A place in a ring of stages, and the parity of its turn.
template <int kStages>
struct Ring {
  int stage = 0, parity = 0;
  __device__ void Advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

}  // namespace genie::attend
