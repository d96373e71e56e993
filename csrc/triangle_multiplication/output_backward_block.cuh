// A block of the gated output's backward: its sizes, its shared memory and its loads.
#pragma once

#include <type_traits>

#include "kittens.cuh"
#include "kittens/extensions.cuh"
#include "triangle_multiplication/output_backward_sm90.h"

namespace genie::output_backward {

using namespace kittens;

constexpr int kPairs = 64;    // of a tile: the rows of one WGMMA
constexpr int kColumns = 32;  // of a chunk of channels: one 64-byte swizzled row of B

// Sizes by channels and hidden channels. Two summers take 160 registers of a thread each, which
// leaves 96 to each of two mains. float32 t fills the space of a second main.
template <typename T, int C, int H>
struct Shape {
  using Contracted = std::conditional_t<std::is_same_v<T, bf16>, bf16, float>;
  static constexpr bool kInPlace = std::is_same_v<T, Contracted>;  // y over t
  static constexpr int kMains = kInPlace ? 2 : 1;
  static constexpr int kThreads = (kMains + 2) * WARPGROUP_THREADS;
  static constexpr int kMainRegisters = 96, kSummerRegisters = 160;  // where there are two mains
  static_assert(2 * kMainRegisters + 2 * kSummerRegisters <= 512);
  static constexpr int kStages = kMains + 1, kHiddenStages = kMains + 1;
  static constexpr int kTurns = (kStages + kMains - 1) / kMains * kMains;
  static constexpr int kChunks = C / kColumns;

  using Pairs = st<T, kPairs, C>;
  using Block = st<T, kPairs, 64>;        // 64 columns of Pairs, or 64 rows of Normal
  using Chunk = st<T, kPairs, kColumns>;  // d_out and what comes of it go by chunks
  using Chunks = st<T, kPairs, C, true, 64>;
  using Hidden = st<Contracted, H, 128 / sizeof(Contracted)>;  // one swizzle group of pairs
  static constexpr int kHiddenTiles = kPairs / Hidden::cols;
  using Normal = st<T, H, kPairs>;
  using Gate = st<T, C, kColumns>;
  using Proj = st<T, H, kColumns>;

  struct Nothing {};
  struct Shared {
    Gate gate[kChunks];
    Proj proj[kChunks];
    Pairs z[kStages];
    Hidden t[kHiddenStages][kHiddenTiles];
    Chunk d[kMains][kChunks], ds[kMains][kChunks];
    std::conditional_t<kInPlace, Nothing, Normal[kMains]> y;
    sv_fl<kColumns> gate_bias[kChunks], proj_bias[kChunks];
    semaphore z_arrived[kTurns], t_arrived[kTurns], d_arrived[kMains];
    semaphore ready[kMains], x_summed[kMains], y_summed[kMains];

    __device__ Normal& Y(int n) {
      if constexpr (kInPlace) {
        return t[n % kHiddenStages][0];
      } else {
        return y[n % kMains];
      }
    }
  };
  static_assert(sizeof(Shared) + 1024 <= MAX_SHARED_MEMORY);
};

template <typename T, int C, int H>
struct Globals {
  using S = Shape<T, C, H>;
  template <typename Tile>
  using Image = gl<T, 1, -1, -1, C, Tile>;  // [1, B I, J, C]
  using Contraction =
      gl<typename S::Contracted, -1, H, -1, -1, tma::descriptor<typename S::Hidden, dim::DEPTH>>;
  Image<typename S::Pairs> z, dz;
  Image<typename S::Chunk> d_out;
  Contraction t, dt;
  GatedOutputBackward given;
  int tiles, column_tiles;  // of one batch entry, and of one row
};

// What both roles know of their block: tiles n of the batch entry's that are the block's own.
template <typename T, int C, int H>
struct Block {
  using S = Shape<T, C, H>;
  typename S::Shared& shared;
  const Globals<T, C, H>& g;
  int batch, own_tiles;

  __device__ Block(typename S::Shared& shared, const Globals<T, C, H>& g)
      : shared(shared),
        g(g),
        batch(blockIdx.y),
        own_tiles((g.tiles - blockIdx.x + gridDim.x - 1) / gridDim.x) {}

  __device__ int Row(int n) const { return (blockIdx.x + n * gridDim.x) / g.column_tiles; }
  __device__ int AnyRow(int n) const { return batch * static_cast<int>(g.given.of.rows) + Row(n); }
  __device__ int Column(int n) const { return (blockIdx.x + n * gridDim.x) % g.column_tiles; }

  // One thread asks for the parts of tile n.
  __device__ void LoadZ(int n) const {
    if (n >= own_tiles) return;
    auto& to = shared.z[n % S::kStages];
    auto& arrived = shared.z_arrived[n % S::kTurns];
    tma::expect(arrived, to);
    tma::load_async(to, g.z, {AnyRow(n), Column(n), 0}, arrived);
  }
  __device__ void LoadT(int n) const {
    if (n >= own_tiles) return;
    auto& to = shared.t[n % S::kHiddenStages];
    auto& arrived = shared.t_arrived[n % S::kTurns];
    tma::expect(arrived, to);
    for (int i = 0; i < S::kHiddenTiles; ++i) {
      tma::load_async<dim::DEPTH, NORMAL>(
          to[i], g.t, {batch, 0, Row(n), Column(n) * S::kHiddenTiles + i}, arrived);
    }
  }
  __device__ void LoadD(int n) const {
    if (n >= own_tiles) return;
    auto& to = shared.d[n % S::kMains];
    auto& arrived = shared.d_arrived[n % S::kMains];
    tma::expect(arrived, to);
    for (int i = 0; i < S::kChunks; ++i) {
      tma::load_async(to[i], g.d_out, {AnyRow(n), Column(n), i}, arrived);
    }
  }

  __device__ void Start() const {
    for (auto& s : shared.z_arrived) init_semaphore(s, 0, 1);
    for (auto& s : shared.t_arrived) init_semaphore(s, 0, 1);
    for (auto& s : shared.d_arrived) init_semaphore(s, 0, 1);
    for (auto& s : shared.ready) init_semaphore(s, 1, 0);
    for (auto& s : shared.x_summed) init_semaphore(s, WARPGROUP_WARPS, 0);
    for (auto& s : shared.y_summed) init_semaphore(s, WARPGROUP_WARPS, 0);
    for (int n = 0; n < S::kStages; ++n) LoadZ(n);
    for (int n = 0; n < S::kHiddenStages; ++n) LoadT(n);
    for (int n = 0; n < S::kMains; ++n) LoadD(n);
  }
};

}  // namespace genie::output_backward
