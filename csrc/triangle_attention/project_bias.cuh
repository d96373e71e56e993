// How attention's projection writes the bias [B, H, Q, Kp].
#pragma once

#include "kittens.cuh"
#include "triangle_attention/pairs.cuh"
#include "triangle_attention/project_sm90.h"

namespace genie {

using namespace kittens;

// Stages the transposed bias of a tile for one store of rows of keys; pads are zero.
template <typename Staged, typename T>
__device__ void StageBias(Staged& staged, rt<T, 16, kHeads>& bias, const Place& at, int columns) {
  const unsigned keep[2] = {at.position(0) < columns, at.position(1) < columns};
  KeepRows(bias, keep);
  auto block = staged.template subtile<kHeads, 16>({0, warpgroup::warpid()});
  warp::store(block, Transposed(bias));
}

// Writes the bias of a tile whose pairs share a key, each to its query's row. Neighbouring blocks
// write neighbouring keys at about the same time, so L2 joins them. The last key writes the pads.
template <typename T, typename Globals>
__device__ void ScatterBias(const Globals& g, const rt<T, 16, kHeads>& bias, const Place& at) {
  const int64_t padded = BiasColumns(g.rows);
  const int pads = at.row == g.rows - 1 ? padded - g.rows : 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int head = 8 * (k / 2) + 2 * (laneid() % 4), query = at.position(k % 2);
    const auto pair = bias.tiles[0][0].data[k];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (head + e >= g.given.heads || query >= g.columns) continue;
      T* to = static_cast<T*>(g.given.bias) +
              ((int64_t{at.batch} * g.given.heads + head + e) * g.columns + query) * padded +
              at.row;
      *to = e ? pair.y : pair.x;
      for (int pad = 1; pad <= pads; ++pad) to[pad] = base_types::convertor<T, float>::convert(0);
    }
  }
}

}  // namespace genie
