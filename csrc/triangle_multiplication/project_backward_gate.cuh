// The Gate warpgroup of the gated projection's backward; see project_backward_block.cuh.
#pragma once

#include "triangle_multiplication/project_backward_block.cuh"

namespace genie {

template <typename T, int C>
struct GateRole : Block<T, C> {
  using Base = Block<T, C>;
  using S = typename Base::S;
  using Packed = typename Base::Packed;
  using Narrow = typename Base::Narrow;
  using Wide = typename Base::Wide;
  using Base::g, Base::shared, Base::share;

  // Hands a warp's 16 rows of dx to the Sum warps of the block that finishes them.
  __device__ void HandOver(int n, const rt_fl<16, C>& dx) const {
    const int warp = warpgroup::warpid();
    const bool here = share.members == 1 || warp / 2 == share.rank;
    auto& pieces = shared.dx[share.members == 1 ? warp : here ? warp % 2 : 2 + warp % 2];
    if (n > 0) {
      wait(shared.dx_left, (n - 1) % 2);  // by all: the next tile's ds goes where Sum read this
      if (!here) wait(shared.part_left, (n - 1) % 2);
    }
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

  __device__ void Run() const {
    rt_fl<16, 2 * kHidden> both;
    rt_fl<16, C> dx;
    wait(shared.x_ready[0], 0);
    Project(both, 0, 0);
    const int row = 16 * warpgroup::warpid() + laneid() / 4;
    unsigned valid[2], next_valid[2];
    this->LoadValid(valid, 0, row, 8);
    for (int n = 0; n < share.count; ++n) {
      wait(shared.upstream_arrived[n % S::kTurns], n / S::kTurns % 2);
      const auto gate = [&](auto chunk) {
        rt<T, 16, 16> upstream[2];  // a block ahead
        LoadBlock(upstream[0], n, chunk, 0, valid);
        warpgroup::mma_async_wait<2 * chunk>();  // both, and not the products behind it
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
      gate(std::integral_constant<int, 0>());
      Project(both, n, 1);
      warpgroup::mm_AtBt(dx, proj[0], shared.weight[0].proj);
      warpgroup::mma_AtBt(dx, gates[0], shared.weight[0].gate);
      this->LoadValid(next_valid, n + 1, row, 8);
      gate(std::integral_constant<int, 1>());
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
};

}  // namespace genie
