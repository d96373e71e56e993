// The producer warps of the attention core.
#pragma once

#include "triangle_attention/attend_block.cuh"

namespace genie::attend {

// Producer warp `row` of the block: scans the mask of its row, and loads its keys and values; that
// of row 0 loads the bias as well.
template <typename T, int D>
struct KeyLoader {
  using S = Shape<T, D>;
  const Globals<T, D>& g;
  typename S::Shared& shared;
  int row;
  Ring<S::kStages> ring = {};
  Ring<S::kRequests> request = {};
  int parity = 0;  // of the chunk in `valid`

  // Tells whether the row's queries of a unit are to be loaded: not if no row has keys.
  __device__ void Request(bool wanted) {
    if (laneid() == 0) {
      wait(shared.taken[request.stage], request.parity ^ 1);
      shared.wanted[request.stage][row] = wanted;
      arrive(shared.posted[request.stage]);
    }
    request.Advance();
  }

  // Fetches the mask of a row whose scan comes soon; nothing waits for it.
  __device__ void Prefetch(const Unit& unit) const {
    const int at = laneid() * 128;
    if (!g.given.mask || unit.row + row >= g.given.rows || at >= g.given.keys) return;
    const int64_t pair_row = unit.batch * g.given.rows + unit.row + row;
    unsigned unused;
    asm volatile("ld.global.u8 %0, [%1];"
                 : "=r"(unused)
                 : "l"(g.given.mask + pair_row * g.given.keys + at));
  }

  // Puts the mask of keys chunk * kChunk and on into `valid`, as do the other rows' warps.
  __device__ void Scan(int chunk, int pair_row, int own_keys) {
    parity ^= 1;
    const int first = chunk * kChunk + laneid();
    bool valid[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) valid[i] = first + i * WARP_THREADS < own_keys;
    if (g.given.mask && own_keys > 0) {  // all loads are on their way at once: none is left out
      const uint8_t* mask = g.given.mask + int64_t{pair_row} * own_keys;
      uint8_t bytes[kWords];
#pragma unroll
      for (int i = 0; i < kWords; ++i) bytes[i] = mask[valid[i] ? first + i * WARP_THREADS : 0];
#pragma unroll
      for (int i = 0; i < kWords; ++i) valid[i] = valid[i] && bytes[i] != 0;
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const unsigned word = __ballot_sync(~0u, valid[i]);
      if (laneid() == 0) shared.valid[parity][row][i] = word;
    }
    asm volatile("bar.sync 1, %0;" ::"n"(kRows * WARP_THREADS) : "memory");
  }
  __device__ uint2 Words(int tile, int of_row) const {
    return reinterpret_cast<const uint2&>(shared.valid[parity][of_row][tile * kTileWords % kWords]);
  }
  __device__ bool Any(int tile) const {
    unsigned all = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) all |= Words(tile, r).x | Words(tile, r).y;
    return all != 0;
  }

  // One copy for a whole unit: large copies are faster.
  __device__ void LoadBias(const Unit& unit, int stage, int tile) const {
    const int query_tile = unit.query / kQueries;
    auto& arrived = shared.arrived[stage];
    if (unit.tiles == S::kTiles) {
      auto& bias = reinterpret_cast<typename S::BiasBlock&>(shared.bias[stage]);
      tma::load_async(bias, g.bias, {unit.batch, unit.head, query_tile / S::kTiles, tile}, arrived);
      return;
    }
#pragma unroll 1
    for (int t = 0; t < unit.tiles; ++t) {
      tma::load_async(shared.bias[stage][t], g.bias, {unit.batch, unit.head, query_tile + t, tile},
                      arrived);
    }
  }

  // One stage of the ring: what the warp's row makes of keys 64 tile and on.
  __device__ void Load(const Unit& unit, int pair_row, int tile, uint2 valid, bool wanted,
                       bool last) {
    const int kind = (valid.x | valid.y) == 0 ? kNone : (valid.x & valid.y) == ~0u ? kAll : kSome;
    const int stage = ring.stage;
    int lane = laneid();
    asm volatile("" : "+r"(lane));  // so that no register keeps what follows from it
    auto& arrived = shared.arrived[stage];
    wait(shared.finished[stage], ring.parity ^ 1);
    if (kind == kSome) {
      shared.mask[stage][row].Set(lane, valid.x >> lane & 1);
      shared.mask[stage][row].Set(lane + WARP_THREADS, valid.y >> lane & 1);
    }
    __syncwarp();
    if (lane == 0) {
      const bool with_bias = row == 0 && wanted && g.given.bias;
      shared.kind[stage][row] = kind | (last ? kLast : 0);
      tma::expect_bytes(arrived, (kind ? 2 * sizeof(typename S::Keys) : 0) +
                                     (with_bias ? unit.tiles * sizeof(typename S::Bias) : 0));
      if (kind) {
        auto &k = shared.k[stage][row], &v = shared.v[stage][row];
        tma::load_async<dim::DEPTH, NORMAL>(k, g.k, {pair_row, tile, unit.head, 0}, arrived);
        tma::load_async<dim::DEPTH, NORMAL>(v, g.v, {pair_row, tile, unit.head, 0}, arrived);
      }
      if (with_bias) LoadBias(unit, stage, tile);
    }
    ring.Advance();
  }

  // Tile 0 always makes a stage, others where a row has a valid key.
  __device__ void LoadUnit(int n) {
    const Unit unit = g.unit(n);
    if (n + gridDim.x < g.units) Prefetch(g.unit(n + gridDim.x));
    const int rows = g.given.rows, keys = g.given.keys, tiles = (keys + kKeys - 1) / kKeys;
    const int pair_row = unit.batch * rows + unit.row + row;
    const int own_keys = unit.row + row < rows ? keys : 0;
    Scan(0, pair_row, own_keys);
    for (int tile = 0, next; tile < tiles; tile = next) {
      const uint2 valid = Words(tile, row);
      const bool wanted = Any(tile);
      for (next = tile + 1; next < tiles; ++next) {
        if (next % (kChunk / kKeys) == 0) Scan(next / (kChunk / kKeys), pair_row, own_keys);
        if (Any(next)) break;
      }
      const bool any = valid.x | valid.y, last = next >= tiles;
      if (tile == 0) Request(any || !last);
      Load(unit, pair_row, tile, valid, wanted, last);
    }
  }
};

// One thread: the queries of every row of each unit that has keys, each tile as soon as its last is
// read.
template <typename T, int D>
__device__ void LoadQueries(const Globals<T, D>& g, typename Shape<T, D>::Shared& shared) {
  using S = Shape<T, D>;
  Ring<S::kRequests> request;
  unsigned parities = ~0u;  // a bit a tile of a row
  for (int n = blockIdx.x; n < g.units; n += gridDim.x) {
    const Unit unit = g.unit(n);
    wait(shared.posted[request.stage], request.parity);
    for (int t = 0; t < unit.tiles; ++t) {
      for (int row = 0; row < kRows; ++row) {
        if (!shared.wanted[request.stage][row]) continue;
        const int bit = row * S::kTiles + t;
        wait(shared.q_finished[row][t], parities >> bit & 1);
        parities ^= 1u << bit;
        tma::expect(shared.q_arrived[row][t], shared.q[row][t]);
        const int i = static_cast<int>(unit.batch * g.given.rows + unit.row + row);
        tma::load_async<dim::DEPTH, NORMAL>(shared.q[row][t], g.q,
                                            {i, unit.query / kQueries + t, unit.head, 0},
                                            shared.q_arrived[row][t]);
      }
    }
    arrive(shared.taken[request.stage]);
    request.Advance();
  }
}

}  // namespace genie::attend
