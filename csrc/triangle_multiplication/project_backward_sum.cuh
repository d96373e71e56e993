// The Sum warpgroups of the gated projection's backward; see project_backward_block.cuh.
#pragma once

#include "triangle_multiplication/project_backward_block.cuh"

namespace genie {

template <typename T, int C>
struct SumRole : Block<T, C> {
  using Base = Block<T, C>;
  using S = typename Base::S;
  using Packed = typename Base::Packed;
  using Narrow = typename Base::Narrow;
  using Wide = typename Base::Wide;
  using Base::g, Base::shared, Base::share;

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
    const Position at = this->Locate(n);
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
      this->ExpectPart();
      tma::cluster::arrive(shared.part_left, share.rank ^ 1);
    }
  }

  // The projection's gradients, or the gate's.
  __device__ void Run(bool of_gate) const {
    using Channels = st<T, kPairs, 64>;  // a column group of x
    rt_fl<16, kSlice> sums[C / 64] = {};
    unsigned valid[2];
    for (int n = 0; n < 2 && n < share.count; ++n) {
      this->LoadValid(valid, n, SumRow(), 32);
      Normalize(n, valid);
    }
    for (int n = 0; n < share.count; ++n) {
      this->LoadValid(valid, n + 2, SumRow(), 32);
      const int turn = n % S::kTurns;
      const auto* chunks = of_gate ? shared.gradient.gate[n % 2] : shared.gradient.proj[turn];
      const auto& gradient = reinterpret_cast<const typename S::Gradient&>(chunks[0]);
      const auto* x = reinterpret_cast<const Channels*>(&shared.x[n % S::kStages]);
      wait(shared.gradient_ready[n % 2], n / 2 % 2);
#pragma unroll
      for (int i = 0; i < C / 64; ++i) warpgroup::mma_AtBt(sums[i], x[i], gradient);
      if (threadIdx.x == WARPGROUP_THREADS && n > 0 && n + 2 < share.count)
        this->LoadUpstream(n + 2);
      if (n + 2 < share.count) Normalize(n + 2, valid);
      if (threadIdx.x == 0 && n > 0 && n + 3 < share.count) {
        tma::store_async_read_wait();  // dz of tile n - 1 has left the place of z
        this->LoadPairs(n + 3);
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
