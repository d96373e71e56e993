// What each warpgroup of the gated projection's backward does with its tiles of pairs.
//   Gate, one of them, multiplies x by the weights, makes dp in place of da or db, and ds, and from
//     them dx = dp Wp' + ds Wg', of which it hands on half of the rows to the other block.
//   Sum, two of them, add x^T dp and x^T ds to their registers, and the column sums; they normalise
//     z two tiles ahead, in place, go back through LayerNorm with both parts of dx, in place of x,
//     and refill the rings.
//
// x has unit variance here: the norm's scale is folded into the weights and its bias into theirs.
// The weights are halved, so that with t = tanh(gate) and p = proj, 2 dp = da (1 + t) and
// 2 ds = da p (1 - t^2), exact but for fp16 subnormals. All products take 2 dp and 2 ds; the
// reduction halves the sums.
#pragma once

#include "kittens.cuh"
#include "kittens/extensions.cuh"
#include "triangle_multiplication/project_backward_sm90.h"

namespace genie {

using namespace kittens;

constexpr int kPairs = 64;   // of a tile: the rows of one WGMMA
constexpr int kHidden = 64;  // hidden columns of a chunk
constexpr int kChunks = 2;   // of a block: its x^T dp and x^T ds fill half of the registers
constexpr int kSlice = kChunks * kHidden;

template <typename T, int C>
struct BackwardShape {
  static constexpr int kThreads = 3 * WARPGROUP_THREADS;
  static constexpr int kSumThreads = 2 * WARPGROUP_THREADS, kSumWarps = 2 * WARPGROUP_WARPS;
  static constexpr int kGateRegisters = 168, kSumRegisters = 168;
  static_assert(kGateRegisters + 2 * kSumRegisters <= 504);  // 168 for each of 384 threads
  static constexpr int kStages = 4;  // of x: loading, ready, in Gate and in Sum
  static constexpr int kTurns = 3;   // of dp: loading as da or db, in Gate and in Sum

  using Pairs = st<T, kPairs, C>;
  using Weight = st<T, C, kHidden>;
  using Chunk = st<T, kHidden, kPairs>;
  using Gradient = st<T, kSlice, kPairs>;
  using Half = st<T, kPairs / 2, 64>;  // of a column group of x, which then holds dz

  struct Shared {
    struct {
      Weight gate, proj;
    } weight[kChunks];
    Pairs x[kStages];  // z, then x
    union {
      struct {
        Chunk proj[kTurns][kChunks];  // da or db, then 2 dp
        Chunk gate[2][kChunks];       // 2 ds
      } gradient;
      float scratch[2][kThreads / 16][kSlice];
    };
    // dx as Gate's threads hold it, by its warps: two warps' rows and then the other block's part
    // of them, or all four warps' rows where there is no other block.
    uint4 dx[WARPGROUP_WARPS][C / 16][WARP_THREADS];
    sv_fl<2 * kHidden> bias[kChunks];         // gate, proj
    float inverse_deviation[kTurns][kPairs];  // zero where masked
    float totals[2][kSlice];                  // column sums of 2 dp and 2 ds
    semaphore z_arrived[kStages], x_ready[kStages], upstream_arrived[kTurns], gradient_ready[2];
    semaphore dx_ready, dx_left;        // of this block
    semaphore part_arrived, part_left;  // part of the other's dx here, of this one's there
  };
  static_assert(sizeof(Shared) <= MAX_SHARED_MEMORY);
};

template <typename T, int C>
struct BackwardGlobals {
  using S = BackwardShape<T, C>;
  using PairTensor = gl<T, 1, -1, -1, C, typename S::Pairs>;  // [1, B I, K, C]
  using Upstream = gl<T, -1, -1, -1, -1, tma::descriptor<typename S::Chunk, dim::DEPTH>>;
  PairTensor z;
  gl<T, 1, -1, -1, C, typename S::Half> dz;
  Upstream da, db;  // [B, Hm, Ip, Kp]
  GatedProjectionBackward given;
  int tiles, column_tiles;        // of one batch entry, and of one row
  unsigned column_tiles_inverse;  // (2^32 - 1) / column_tiles
  int first_slice;                // of the hidden columns, that of the first block of a cluster
  bool adds;                      // dz holds what this adds to
};

// A block's work: tiles first, first + step, ... of one batch entry, for one slice of the hidden
// columns. Of two members that share the tiles, each finishes half of the rows.
struct Share {
  int batch, first, step, count, members, rank, slice;
};

struct Position {
  int batch, row, any_row, column_tile;
};

// What every role knows of its block, and does.
template <typename T, int C>
struct Block {
  using S = BackwardShape<T, C>;
  using Packed = typename base_types::packing<T>::packed_type;
  using Narrow = base_types::convertor<Packed, float2>;
  using Wide = base_types::convertor<float2, Packed>;
  typename S::Shared& shared;
  const BackwardGlobals<T, C>& g;
  const Share& share;

  __device__ Position Locate(int n) const {
    const int tile = share.first + n * share.step, columns = g.column_tiles;
    int row = __umulhi(tile, g.column_tiles_inverse);  // or one too few
    row += tile - row * columns >= columns;
    return {share.batch, row, static_cast<int>(share.batch * g.given.forward.rows) + row,
            tile - row * columns};
  }

  // Whether rows `row` and `row` + `apart` of tile n are valid pairs; of no tile, none.
  __device__ void LoadValid(unsigned (&valid)[2], int n, int row, int apart) const {
    const GatedProjection& p = g.given.forward;
    const Position at = Locate(n);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = kPairs * at.column_tile + row + i * apart;
      valid[i] = n < share.count && column < p.columns;
      if (valid[i] && p.mask) valid[i] = __ldg(p.mask + int64_t{at.any_row} * p.columns + column);
    }
  }

  // One thread asks for z of tile n, or for its da or db.
  __device__ void LoadPairs(int n) const {
    const Position at = Locate(n);
    auto& arrived = shared.z_arrived[n % S::kStages];
    tma::expect(arrived, shared.x[n % S::kStages]);
    tma::load_async(shared.x[n % S::kStages], g.z, {at.any_row, at.column_tile, 0}, arrived);
  }
  __device__ void LoadUpstream(int n) const {
    const Position at = Locate(n);
    auto& arrived = shared.upstream_arrived[n % S::kTurns];
    auto& chunks = shared.gradient.proj[n % S::kTurns];
    const int half = g.given.forward.hidden / kHidden;
    tma::expect(arrived, chunks);
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      const int chunk = kChunks * share.slice + j;
      const bool first = chunk < half;
      tma::load_async<dim::DEPTH, NORMAL>(
          chunks[j], first ? g.da : g.db,
          {at.batch, first ? chunk : chunk - half, at.row, at.column_tile}, arrived);
    }
  }
  // One thread makes ready for the other block's part of a tile's dx.
  __device__ void ExpectPart() const {
    tma::expect_bytes(shared.part_arrived, sizeof(shared.dx) / 2);
  }
};

}  // namespace genie
