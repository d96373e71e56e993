// What a consumer of the queries pass sums over the keys, for 64 queries of one row i.
#pragma once

#include "triangle_attention/attend_backward.cuh"

namespace genie::attend_backward {

// What a consumer holds of one row i: sums, and values of the thread's two queries.
template <int D>
struct Row {
  rt_fl<16, D> dq, weighed_k;  // dS' k and P k
  float low_excess[4];         // the sum over keys of dS' as dq has it, rounded
  float excess[2];             // and exactly
  float negative_lse[2], negative_delta[2], scale[2];  // the last: of dS', and of -delta, in fp16
};

// -delta0 = -sum(d_o o) of each row, and the scale.
template <typename T, int D>
__device__ void Begin(Row<D>& row, const Side<T, D>& o, const Side<T, D>& d_o,
                      const float (&lse)[2]) {
  rt_fl<16, D> product, other;
  warpgroup::load(product, o);
  warpgroup::load(other, d_o);
  warp::mul(product, product, other);
  col_vec<rt_fl<16, D>> delta;
  warp::row_sum(delta, product);
  row.negative_delta[0] = -delta[0][0].x, row.negative_delta[1] = -delta[0][0].y;
  if constexpr (kScaled<T>) {
    warp::mul(product, other, other);
    warp::row_sum(delta, product);
    row.scale[0] = ScaleOf(delta[0][0].x), row.scale[1] = ScaleOf(delta[0][0].y);
    row.negative_delta[0] *= row.scale[0], row.negative_delta[1] *= row.scale[1];
  } else {
    row.scale[0] = row.scale[1] = 1;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    row.negative_lse[i] = -kLog2E * lse[i];
    row.excess[i] = 0;
  }
  warp::zero(row.dq);
  warp::zero(row.weighed_k);
  for (float& sum : row.low_excess) sum = 0;
}

// One tile of keys for one row.
template <typename T, int D>
__device__ void Add(Row<D>& row, const Side<T, D>& q, const Side<T, D>& d_o, const Side<T, D>& k,
                    const Side<T, D>& v, Bias<T>& bias, const T* hidden, const Ones<T>& ones,
                    const AttendBackward& given) {
  rt_fl<16, kTile> p, ds;
  WeighPairs(p, ds, q, d_o, k, v, bias, hidden, row.negative_lse, given);
#pragma unroll
  for (int j = 0; j < kTile / 16; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 weight = p.tiles[0][j].data[i];
      float2& x = ds.tiles[0][j].data[i];
      x.x = weight.x * fmaf(x.x, row.scale[i % 2], row.negative_delta[i % 2]);
      x.y = weight.y * fmaf(x.y, row.scale[i % 2], row.negative_delta[i % 2]);
      row.excess[i % 2] += x.x + x.y;
    }
  }
  rt<T, 16, kTile> low_p, low_ds;
  warp::copy(low_p, p);
  warp::copy(low_ds, ds);
  warpgroup::mma_AB(row.dq, low_ds, k);
  StartRowSums(row.low_excess, low_ds, ones);
  warpgroup::mma_AB(row.weighed_k, low_p, k);
  warpgroup::mma_async_wait<0>();
}

// Moves dq and delta from delta0 to delta, and writes the row's float32 values for later passes.
// dq gives up what its own, rounded dS sum to: so their errors sum to zero, as those of plain XLA
// do.
template <typename T, int D>
__device__ void End(Row<D>& row, float* query_rows, int query, int queries_padded, float scale) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float excess = row.excess[i];
    excess += __shfl_xor_sync(~0u, excess, 1);
    excess += __shfl_xor_sync(~0u, excess, 2);
    if (laneid() % 4 == 0 && query + 8 * i < queries_padded) {
      query_rows[query + 8 * i] = row.negative_lse[i];
      query_rows[queries_padded + query + 8 * i] = (row.negative_delta[i] - excess) / row.scale[i];
    }
  }
  if constexpr (kScaled<T>) {
    float least = fminf(row.scale[0], row.scale[1]);
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      least = fminf(least, __shfl_xor_sync(~0u, least, lanes));
    }
    if (laneid() == 0 && query < queries_padded) {
      query_rows[2 * queries_padded + query / 16] = least;
    }
  }
#pragma unroll
  for (int j = 0; j < D / 16; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float2& x = row.dq.tiles[0][j].data[k];
      const float2 y = row.weighed_k.tiles[0][j].data[k];
      const float excess = row.low_excess[k % 2 * 2];
      const float factor = scale / row.scale[k % 2];
      x.x = factor * (x.x - excess * y.x);
      x.y = factor * (x.y - excess * y.y);
    }
  }
}

}  // namespace genie::attend_backward
