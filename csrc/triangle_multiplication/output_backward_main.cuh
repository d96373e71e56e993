// The mains of the gated output's backward.
#pragma once

#include "triangle_multiplication/output_backward_block.cuh"
#include "triangle_multiplication/rows.cuh"

namespace genie::output_backward {

// This warp's 16 rows of s and p without their biases, and of d_out: d becomes dp, and with ds come
// the row sums of ds s and dp p.
template <typename Sums, typename Tile>
__device__ inline void Gate(Tile& d, Tile& ds, const Sums& s, const Sums& p,
                            const sv_fl<Sums::cols>& s_bias, const sv_fl<Sums::cols>& p_bias,
                            float (&ds_s)[2], float (&dp_p)[2]) {
  using T2 = typename Tile::dtype;
#pragma unroll
  for (int j = 0; j < Sums::width; ++j) {
    const Columns s_biases(s_bias, j), p_biases(p_bias, j);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 s0 = s.tiles[0][j].data[k], p0 = p.tiles[0][j].data[k];
      const float2 d1 = Unpack(d.tiles[0][j].data[k]);
      const float2 tanh =
          Tanh::op(float2{0.5f * (s0.x + s_biases.of(k).x), 0.5f * (s0.y + s_biases.of(k).y)});
      const float2 dp = {d1.x * (0.5f * tanh.x + 0.5f), d1.y * (0.5f * tanh.y + 0.5f)};
      const float2 slope = {0.25f - 0.25f * tanh.x * tanh.x, 0.25f - 0.25f * tanh.y * tanh.y};
      const float2 to_s = {d1.x * (p0.x + p_biases.of(k).x) * slope.x,
                           d1.y * (p0.y + p_biases.of(k).y) * slope.y};
      ds_s[k % 2] += to_s.x * s0.x + to_s.y * s0.y;
      dp_p[k % 2] += dp.x * p0.x + dp.y * p0.y;
      d.tiles[0][j].data[k] = Pack<T2>(dp);
      ds.tiles[0][j].data[k] = Pack<T2>(to_s);
    }
  }
}

// d becomes (d - normal * slope) * scale, the derivative of `normal`.
template <typename Sums, typename Tile>
__device__ inline void NormDerivative(Sums& d, const Tile& normal, const float (&slope)[2],
                                      const float (&scale)[2]) {
#pragma unroll
  for (int j = 0; j < Sums::width; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float2& pair = d.tiles[0][j].data[k];
      const float2 x = Unpack(normal.tiles[0][j].data[k]);
      pair = {(pair.x - x.x * slope[k % 2]) * scale[k % 2],
              (pair.y - x.y * slope[k % 2]) * scale[k % 2]};
    }
  }
}

// d = a W^T for inputs 64 part .. of W, over all chunks of its columns.
template <typename Sums, typename Chunk, typename Weight, size_t kChunks>
__device__ inline void MultiplyTransposed(Sums& d, Chunk (&a)[kChunks], Weight (&w)[kChunks],
                                          int part) {
  warpgroup::mm_ABt(d, a[0], reinterpret_cast<Chunk*>(&w[0])[part]);
#pragma unroll
  for (int chunk = 1; chunk < kChunks; ++chunk) {
    warpgroup::mma_ABt(d, a[chunk], reinterpret_cast<Chunk*>(&w[chunk])[part]);
  }
}

// Adds d_out's rows from L2; `from` is this lane's first row, `stride` apart from others, of
// `left`.
template <typename Sums, typename T>
__device__ inline void AddResidual(Sums& d, const T* from, int stride, int64_t left) {
  using T2 = typename base_types::packing<T>::packed_type;
#pragma unroll
  for (int j = 0; j < Sums::width; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int row = 8 * (k % 2), column = 16 * j + 8 * (k / 2) + 2 * (laneid() % 4);
      if (row >= left) continue;
      const auto raw = __ldg(reinterpret_cast<const unsigned*>(from + row * stride + column));
      const float2 pair = Unpack(reinterpret_cast<const T2&>(raw));
      d.tiles[0][j].data[k].x += pair.x;
      d.tiles[0][j].data[k].y += pair.y;
    }
  }
}

// Main w takes tiles w, w + kMains, ... of the block: x over z, y over t, dp over d_out and ds,
// then dz over x and dt over y.
template <typename T, int C, int H>
struct MainRole : Block<T, C, H> {
  using S = Shape<T, C, H>;
  using Block<T, C, H>::g, Block<T, C, H>::shared;

  // One thread sends off the results of tile n, and asks for the main's next d_out.
  __device__ void Send(int n) const {
    tma::store_async(g.dz, shared.z[n % S::kStages], {this->AnyRow(n), this->Column(n), 0});
    for (int i = 0; i < S::kHiddenTiles; ++i) {
      tma::store_async<dim::DEPTH, NORMAL>(
          g.dt, shared.t[n % S::kHiddenStages][i],
          {this->batch, 0, this->Row(n), this->Column(n) * S::kHiddenTiles + i});
    }
    this->LoadD(n + S::kMains);
  }

  __device__ void Run() const {
    const GatedOutput& of = g.given.of;
    const int columns = of.columns;
    const int main = Uniform(warpgroupid()), warp_row = Uniform(warpgroup::warpid());
    const bool leads = warpgroup::laneid() == 0;
    auto& ds_tile = shared.ds[main];
    auto& d_tile = shared.d[main];
    for (int n = main; n < this->own_tiles; n += S::kMains) {
      const int parity = n / S::kMains % 2;
      const int column = kPairs * this->Column(n) + 16 * warp_row + laneid() / 4;
      const int64_t pair = int64_t{this->AnyRow(n)} * columns + column;
      auto& z_tile = shared.z[n % S::kStages];
      auto& t_tile = shared.t[n % S::kHiddenStages];
      auto& y_tile = shared.Y(n);
      const T* d_out = static_cast<const T*>(g.given.d_out) + pair * C;
      Moments x_moments, y_moments;

      unsigned readable[2] = {1, 1};
      if (of.mask) {
        if (column < columns) readable[0] = MaskAt(of.mask + pair);
        if (column + 8 < columns) readable[1] = MaskAt(of.mask + pair + 8);
      }
      {
        rt<T, 16, C> x;
        wait(shared.z_arrived[n % S::kTurns], n / S::kTurns % 2);
        warpgroup::load(x, z_tile);
        x_moments = MomentsOfReadable(x, readable, of.epsilon);
        Standardize(x, x, x_moments);
        warpgroup::store(z_tile, x);
      }
      if (leads && n >= S::kMains) {  // by now the last results have left their tiles
        tma::store_async_read_wait();
        this->LoadZ(n - S::kMains + S::kStages);
        this->LoadT(n - S::kMains + S::kHiddenStages);
      }
      {
        rt<typename S::Contracted, 16, H> t;
        wait(shared.t_arrived[n % S::kTurns], n / S::kTurns % 2);
        LoadTransposed(t, t_tile, warp_row);
        rt<T, 16, H> y;
        y_moments = MomentsOf<true>(t, of.epsilon);
        Standardize(y, t, y_moments);
        auto at = y_tile.template subtile<H, 16>({0, warp_row});
        warp::store(at, Transposed(y));
      }
      FenceAsyncProxy();
      warpgroup::sync(main + 1);

      float ds_s[2] = {}, dp_p[2] = {};
      wait(shared.d_arrived[main], parity);
#pragma unroll 1
      for (int chunk = 0; chunk < S::kChunks; ++chunk) {
        rt_fl<16, kColumns> s, p;
        warpgroup::mm_AB(s, z_tile, shared.gate[chunk]);
        warpgroup::mm_AtB(p, y_tile, shared.proj[chunk]);
        rt<T, 16, kColumns> d, ds;
        warpgroup::load(d, d_tile[chunk]);
        warpgroup::mma_async_wait();
        Pin(s);
        Pin(p);
        Gate(d, ds, s, p, shared.gate_bias[chunk], shared.proj_bias[chunk], ds_s, dp_p);
        warpgroup::store(d_tile[chunk], d);
        warpgroup::store(ds_tile[chunk], ds);
      }
      FenceAsyncProxy();
      warpgroup::sync(main + 1);
      if (leads) arrive(shared.ready[main]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ds_s[i] = RowTotal(ds_s[i]) * (1.f / C);
        dp_p[i] = RowTotal(dp_p[i]) * (1.f / H);
      }

      // Both derivatives come 64 channels at a time.
#pragma unroll 1
      for (int part = 0; part < C / 64; ++part) {
        rt_fl<16, 64> dx;
        MultiplyTransposed(dx, ds_tile, shared.gate, part);
        auto& block = reinterpret_cast<typename S::Block*>(&z_tile)[part];
        rt<T, 16, 64> x;
        warpgroup::load(x, block);
        warpgroup::mma_async_wait();
        Pin(dx);
        NormDerivative(dx, x, ds_s, x_moments.scale);
        if (of.residual) AddResidual(dx, d_out + 64 * part, C, columns - column);
        warp::copy(x, dx);
        KeepRows(x, readable);
        wait(shared.x_summed[main], parity);
        warpgroup::store(block, x);
      }
#pragma unroll 1
      for (int part = 0; part < H / 64; ++part) {
        rt_fl<16, 64> dy;
        MultiplyTransposed(dy, d_tile, shared.proj, part);
        auto at = reinterpret_cast<typename S::Block*>(&y_tile)[part].template subtile<64, 16>(
            {0, warp_row});
        rt<T, 16, 64> y;
        warp::load(Transposed(y), at);
        warpgroup::mma_async_wait();
        Pin(dy);
        NormDerivative(dy, y, dp_p, y_moments.scale);
        wait(shared.y_summed[main], parity);
        StoreTransposed(t_tile, dy, warp_row, part);
      }
      FenceAsyncProxy();
      warpgroup::sync(main + 1);
      if (leads) Send(n);
    }
    if (leads) tma::store_async_wait();
  }
};

}  // namespace genie::output_backward
