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
  // Hands a warp's 16 rows of dx to the Sum warps of the block that finishes them.
  __device__ void HandOver(int n, const rt_fl<16, C>& dx) const {
    const int warp = warpgroup::warpid();
    const bool here = share.members == 1 || warp / 2 == share.rank;
    auto& pieces = shared.dx[share.members == 1 ? warp : here ? warp % 2 : 2 + warp % 2];
    if (n > 0) wait(here ? shared.dx_left : shared.part_left, (n - 1) % 2);
    const auto piece = [&](int j) {
      uint4 packed;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        reinterpret_cast<Packed*>(&packed)[k] = Narrow::convert(dx.tiles[0][j].data[k]);
      }
      return packed;
    };
    if (here) {
#pragma unroll
      for (int j = 0; j < C / 16; ++j) pieces[j][laneid()] = piece(j);
    } else {
#pragma unroll
      for (int j = 0; j < C / 16; ++j) {
        StoreRemote(&pieces[j][laneid()], share.rank ^ 1, piece(j), shared.part_arrived);
      }
    }
    warp::sync();
    warp::arrive(shared.dx_ready);
  }

  // Of da or db, zero for pairs that are not valid.
  __device__ void LoadBlock(rt<T, 16, 16>& upstream, int n, int chunk, int block,
                            const unsigned (&valid)[2]) const {
    auto& tile = shared.gradient.proj[n % S::kTurns][chunk];
    warp::load(Transposed(upstream), tile.template subtile<16, 16>({block, warpgroup::warpid()}));
    KeepRows(upstream, valid);
  }

  // 2 dp and 2 ds of 16 hidden columns, to shared memory as [hidden, pairs].
  __device__ void GateBlock(int n, int chunk, int block, const rt_base<float, row_l>& gate,
                            const rt_base<float, row_l>& proj,
                            const rt_base<T, row_l>& upstream) const {
    rt<T, 16, 16> dp, ds;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 d = Wide::convert(upstream.data[k]), p = proj.data[k];
      const float2 t = Tanh::op(gate.data[k]), u = {d.x * p.x, d.y * p.y};
      dp.tiles[0][0].data[k] = Narrow::convert({fmaf(d.x, t.x, d.x), fmaf(d.y, t.y, d.y)});
      ds.tiles[0][0].data[k] =
          Narrow::convert({fmaf(-u.x * t.x, t.x, u.x), fmaf(-u.y * t.y, t.y, u.y)});
    }
    auto proj_place = shared.gradient.proj[n % S::kTurns][chunk].template subtile<16, 16>(
        {block, warpgroup::warpid()});
    auto gate_place =
        shared.gradient.gate[n % 2][chunk].template subtile<16, 16>({block, warpgroup::warpid()});
    warp::store(proj_place, Transposed(dp));
    warp::store(gate_place, Transposed(ds));
  }

  // Starts the products of a chunk, [gate, proj] of 64 columns each.
  __device__ void Project(rt_fl<16, 2 * kHidden>& both, int n, int chunk) const {
    row_vec<rt_fl<16, 2 * kHidden>> bias;
    warp::load(bias, shared.bias[chunk]);
    warp::broadcast_col(both, bias);
    const auto& weights = reinterpret_cast<const st<T, C, 2 * kHidden>&>(shared.weight[chunk].gate);
    warpgroup::mma_AB(both, shared.x[n % S::kStages], weights);
  }

  __device__ void Gate() const {
    rt_fl<16, 2 * kHidden> both;
    rt_fl<16, C> dx;
    wait(shared.x_ready[0], 0);
    Project(both, 0, 0);
    const int row = 16 * warpgroup::warpid() + laneid() / 4;
    unsigned valid[2], next_valid[2];
    LoadValid(valid, 0, row, 8);
    for (int n = 0; n < share.count; ++n) {
      wait(shared.upstream_arrived[n % S::kTurns], n / S::kTurns % 2);
      const auto gate = [&](int chunk) {
        rt<T, 16, 16> upstream[2];  // a block ahead
        LoadBlock(upstream[0], n, chunk, 0, valid);
        warpgroup::mma_async_wait();
        Pin(both);
#pragma unroll
        for (int j = 0; j < kHidden / 16; ++j) {
          if (j + 1 < kHidden / 16) LoadBlock(upstream[(j + 1) % 2], n, chunk, j + 1, valid);
          GateBlock(n, chunk, j, both.tiles[0][j], both.tiles[0][kHidden / 16 + j],
                    upstream[j % 2].tiles[0][0]);
        }
        FenceAsyncProxy();
        warpgroup::sync(1);
      };
      auto& proj = shared.gradient.proj[n % S::kTurns];
      auto& gates = shared.gradient.gate[n % 2];
      gate(0);
      Project(both, n, 1);
      warpgroup::mm_AtBt(dx, proj[0], shared.weight[0].proj);
      warpgroup::mma_AtBt(dx, gates[0], shared.weight[0].gate);
      LoadValid(next_valid, n + 1, row, 8);
      gate(1);
      if (warpgroup::laneid() == 0) arrive(shared.gradient_ready[n % 2]);
      warpgroup::mma_AtBt(dx, proj[1], shared.weight[1].proj);
      warpgroup::mma_AtBt(dx, gates[1], shared.weight[1].gate);
      // The last one multiplies what lies there, for nothing.
      if (n + 1 < share.count) wait(shared.x_ready[(n + 1) % S::kStages], (n + 1) / S::kStages % 2);
      Project(both, n + 1, 0);
      warpgroup::mma_async_wait<1>();
      Pin(dx);
      HandOver(n, dx);
      valid[0] = next_valid[0], valid[1] = next_valid[1];
    }
    warpgroup::mma_async_wait();
  }

  // The first of the two rows, 32 apart, that a Sum thread normalises.
  __device__ static int SumRow() { return threadIdx.x % S::kSumThreads / 8; }

  // x = (z - mean) / deviation in place of tile n by all Sum threads, eight lanes a row; zero in
  // masked rows, whatever z holds there.
  __device__ void Normalize(int n, const unsigned (&valid)[2]) const {
    constexpr int kGroups = C / 64, kPacked = 4 * kGroups;
    auto& tile = shared.x[n % S::kStages];
    uint4 raw[2][kGroups];
    float mean[2] = {}, square[2] = {};
    T* const start = &tile[{SumRow(), static_cast<int>(threadIdx.x) % 8 * 8}];
    const auto place = [&](int r, int i) -> uint4& {  // 32 rows further is the same swizzle
      return *reinterpret_cast<uint4*>(start + 64 * (32 * r + kPairs * i));
    };
    wait(shared.z_arrived[n % S::kStages], n / S::kStages % 2);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) raw[r][i] = place(r, i);
    }
    const auto z = [&](int r, int i) -> Packed& { return reinterpret_cast<Packed*>(raw[r])[i]; };
#pragma unroll
    for (int i = 0; i < kPacked; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) mean[r] += Wide::convert(z(r, i)).x + Wide::convert(z(r, i)).y;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) mean[r] *= 1.f / (2 * kPacked);
#pragma unroll
    for (int i = 0; i < kPacked; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float2 pair = Wide::convert(z(r, i));
        const float2 centred = {pair.x - mean[r], pair.y - mean[r]};
        square[r] = fmaf(centred.x, centred.x, fmaf(centred.y, centred.y, square[r]));
      }
    }
    // Each lane's mean and squares about it become those of two, four and eight lanes.
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float other = __shfl_xor_sync(~0u, mean[r], lanes), apart = other - mean[r];
        square[r] += __shfl_xor_sync(~0u, square[r], lanes);
        square[r] = fmaf(apart * apart, kPacked * lanes, square[r]);
        mean[r] = 0.5f * (mean[r] + other);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float scale = rsqrtf(fmaf(square[r], 1.f / C, g.given.forward.epsilon));
      const float shift = -mean[r] * scale;
#pragma unroll
      for (int i = 0; i < kPacked; ++i) {
        const float2 pair = Wide::convert(z(r, i));
        z(r, i) = Narrow::convert({fmaf(pair.x, scale, shift), fmaf(pair.y, scale, shift)});
      }
#pragma unroll
      for (int i = 0; i < kGroups; ++i) place(r, i) = valid[r] ? raw[r][i] : uint4{0, 0, 0, 0};
      if (threadIdx.x % 8 == 0) {
        shared.inverse_deviation[n % S::kTurns][SumRow() + 32 * r] = valid[r] ? scale : 0.f;
      }
    }
    FenceAsyncProxy();
    warp::sync();
    warp::arrive(shared.x_ready[n % S::kStages]);
  }

  // Adds a tile's sums over pairs to those of the tiles before, in shared memory for want of room
  // beside the other sums.
  __device__ void AddColumnSums(int n, bool of_gate, const typename S::Chunk* chunks) const {
    const int warp = warpgroup::warpid();
    auto& chunk = const_cast<typename S::Chunk&>(chunks[warp / 2]);
    float* totals = &shared.totals[of_gate][32 * warp + laneid() / 4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sums[4] = {};
#pragma unroll
      for (int j = 0; j < kPairs / 16; ++j) {
        rt<T, 16, 16> block;
        warp::load(block, chunk.template subtile<16, 16>({2 * (warp % 2) + i, j}));
        AddRowSums(sums, block);
      }
      if (laneid() % 4 == 0) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& total = totals[16 * i + 8 * e];
          total = n == 0 ? sums[2 * e] : total + sums[2 * e];
        }
      }
    }
  }

  // dz = (dx - mean(dx) - x mean(x dx)) / deviation in place of x, for the rows `half` of tile n,
  // by all Sum threads: sixteen lanes hold two rows as Gate's warps did.
  __device__ void LayerNormBackward(int n, int half) const {
    constexpr int kGroups = C / 64;
    const int pair = threadIdx.x % S::kSumThreads / WARP_THREADS * 2 + laneid() / 4 % 2;
    const int warp = pair / 8, lane = pair % 8 * 4 + laneid() % 4, block = laneid() / 8;
    const int row = 32 * half + 16 * warp + pair % 8, column = 16 * block + 2 * (laneid() % 4);
    auto& tile = shared.x[n % S::kStages];
    T* const start[2] = {&tile[{row, column}], &tile[{row, column + 8}]};
    const auto x = [&](int i, int k) -> Packed& {  // 8 rows further is the same swizzle
      return *reinterpret_cast<Packed*>(start[k / 2] + 64 * (8 * (k % 2) + kPairs * i));
    };
    float2 dx[kGroups][4];
    float mean[2] = {}, along[2] = {};
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const bool both = share.members > 1;
      const uint4 own = shared.dx[both ? warp : 2 * half + warp][4 * i + block][lane];
      uint4 other = {0, 0, 0, 0};
      if (both) other = shared.dx[2 + warp][4 * i + block][lane];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 d =
            base_ops::sum::op(Wide::convert(reinterpret_cast<const Packed*>(&own)[k]),
                              Wide::convert(reinterpret_cast<const Packed*>(&other)[k]));
        const float2 v = Wide::convert(x(i, k));
        mean[k % 2] += d.x + d.y;
        along[k % 2] = fmaf(d.x, v.x, fmaf(d.y, v.y, along[k % 2]));
        dx[i][k] = d;
      }
    }
    SumOver<1, 2, 8, 16>(mean);
    SumOver<1, 2, 8, 16>(along);
    float scale[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      scale[e] = shared.inverse_deviation[n % S::kTurns][row + 8 * e];
      mean[e] *= -scale[e] / C, along[e] *= -scale[e] / C;
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 d = dx[i][k], v = Wide::convert(x(i, k));
        const float m = mean[k % 2], a = along[k % 2], s = scale[k % 2];
        x(i, k) = Narrow::convert({fmaf(d.x, s, fmaf(v.x, a, m)), fmaf(d.y, s, fmaf(v.y, a, m))});
      }
    }
  }

  // One thread sends dz of tile n on its way.
  __device__ void Store(int n) const {
    const Position at = Locate(n);
    for (int half = 0; half < 2; ++half) {
      if (share.members > 1 && half != share.rank) continue;
      for (int group = 0; group < C / 64; ++group) {
        const auto& from = reinterpret_cast<const typename S::Half&>(
            shared.x[n % S::kStages].data[64 * (kPairs * group + kPairs / 2 * half)]);
        const coord<typename S::Half> to = {at.any_row, 2 * at.column_tile + half, group};
        if (g.adds) {
          tma::store_add_async(g.dz, from, to);
        } else {
          tma::store_async(g.dz, from, to);
        }
      }
    }
  }
  __device__ void ExpectPart() const {
    tma::expect_bytes(shared.part_arrived, sizeof(shared.dx) / 2);
  }

  __device__ void Finish(int n) const {
    wait(shared.dx_ready, n % 2);
    if (share.members > 1) {
      wait(shared.part_arrived, n % 2);
      LayerNormBackward(n, share.rank);
    } else {
      for (int half = 0; half < 2; ++half) LayerNormBackward(n, half);
    }
    FenceAsyncProxy();
    warp::sync();
    warp::arrive(shared.dx_left);
    group<S::kSumWarps>::sync(2);
    if (threadIdx.x == 0) Store(n);
    if (threadIdx.x == WARPGROUP_THREADS && share.members > 1) {  // for the other's next part
      ExpectPart();
      tma::cluster::arrive(shared.part_left, share.rank ^ 1);
    }
  }

  // The projection's gradients, or the gate's.
  __device__ void Sum(bool of_gate) const {
    using Channels = st<T, kPairs, 64>;  // a column group of x
    rt_fl<16, kSlice> sums[C / 64] = {};
    unsigned valid[2];
    for (int n = 0; n < 2 && n < share.count; ++n) {
      LoadValid(valid, n, SumRow(), 32);
      Normalize(n, valid);
    }
    for (int n = 0; n < share.count; ++n) {
      LoadValid(valid, n + 2, SumRow(), 32);
      const int turn = n % S::kTurns;
      const auto* chunks = of_gate ? shared.gradient.gate[n % 2] : shared.gradient.proj[turn];
      const auto& gradient = reinterpret_cast<const typename S::Gradient&>(chunks[0]);
      const auto* x = reinterpret_cast<const Channels*>(&shared.x[n % S::kStages]);
      wait(shared.gradient_ready[n % 2], n / 2 % 2);
#pragma unroll
      for (int i = 0; i < C / 64; ++i) warpgroup::mma_AtBt(sums[i], x[i], gradient);
      if (threadIdx.x == WARPGROUP_THREADS && n > 0 && n + 2 < share.count) LoadUpstream(n + 2);
      if (n + 2 < share.count) Normalize(n + 2, valid);
      if (threadIdx.x == 0 && n > 0 && n + 3 < share.count) {
        tma::store_async_read_wait();  // dz of tile n - 1 has left the place of z
        LoadPairs(n + 3);
      }
      AddColumnSums(n, of_gate, chunks);
      warpgroup::mma_async_wait();
      group<S::kSumWarps>::sync(2);  // both have multiplied x
      Finish(n);
    }
#pragma unroll
    for (int i = 0; i < C / 64; ++i) Pin(sums[i]);
    if (threadIdx.x == 0) tma::store_async_wait();
    warpgroup::sync(3 + of_gate);
    Write(of_gate, sums);
  }

  __device__ void Write(bool of_gate, const rt_fl<16, kSlice> (&sums)[C / 64]) const {
    const int64_t width = 2 * g.given.forward.hidden;
    const int64_t part = (share.batch * g.given.parts + share.first) * 2 + of_gate;
    float* to = g.given.partials + part * (C + 1) * width + kSlice * share.slice;
#pragma unroll
    for (int i = 0; i < C / 64; ++i) {
#pragma unroll
      for (int j = 0; j < kSlice / 16; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int row = 64 * i + 16 * warpgroup::warpid() + 8 * (k % 2) + laneid() / 4;
          const int column = 16 * j + 8 * (k / 2) + 2 * (laneid() % 4);
          *reinterpret_cast<float2*>(to + row * width + column) = sums[i].tiles[0][j].data[k];
        }
      }
    }
    const int column = warpgroup::laneid();
    to[C * width + column] = share.count ? shared.totals[of_gate][column] : 0.f;
  }
};

}  // namespace genie
