// The running softmax of the attention core, for the 16 queries of a warp.
#pragma once

#include "kittens.cuh"
#include "triangle_attention/attend_sm90.h"

namespace genie::attend {

using namespace kittens;

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
// Peaks follow the logits only when a lane's sum passes this, so that most tiles rescale nothing;
// what is summed stays far from the limits of fp16.
constexpr float kOutgrown = 256.f;

__device__ inline float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The largest of the four lanes that share a row.
__device__ inline float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ inline float QuadSum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// p = 2^(factor s - peak), rounded; returns what the lane's columns sum to in both of its rows.
template <typename P, typename Logits>
__device__ float2 Exponentiate(P& p, const Logits& s, float factor, float2 peak) {
  float2 sums[2] = {};
#pragma unroll
  for (int j = 0; j < Logits::width; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float offset = k % 2 ? -peak.y : -peak.x;
      float2 x = s.tiles[0][j].data[k];
      x = {fmaf(x.x, factor, offset), fmaf(x.y, factor, offset)};
      const float2 y = {Exp2(x.x), Exp2(x.y)};
      sums[k % 2] = base_ops::sum::op(sums[k % 2], y);
      p.tiles[0][j].data[k] = base_types::convertor<typename P::dtype, float2>::convert(y);
    }
  }
  return {sums[0].x + sums[0].y, sums[1].x + sums[1].y};
}

// The unnormalised output of a warp's 16 queries, each row relative to 2^peak.
template <typename Sums>
struct Softmax {
  Sums o;
  float2 peak, total;  // a lane's total is of its own columns

  __device__ void Clear() {
    warp::zero(o);
    peak = {-INFINITY, -INFINITY};
    total = {0.f, 0.f};
  }

  // Raises the peak of rows whose `sums` outgrew it to their largest logit.
  template <typename Logits>
  __device__ void Raise(const Logits& s, float factor, float2 sums) {
    float2 largest = {-1e30f, -1e30f};  // finite, even if all logits are -inf
#pragma unroll
    for (int j = 0; j < Logits::width; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float& to = k % 2 ? largest.y : largest.x;
        to = fmaxf(to, fmaxf(s.tiles[0][j].data[k].x, s.tiles[0][j].data[k].y));
      }
    }
    const auto raise = [factor](float& peak, float& total, float largest, float sum) {
      const float found = QuadMax(largest) * factor;
      const float raised = QuadMax(sum) > kOutgrown ? fmaxf(peak, found) : peak;
      const float shrink = Exp2(peak - raised);
      peak = raised;
      total *= shrink;
      return shrink;
    };
    col_vec<Sums> shrink;
    shrink[0][0] = {raise(peak.x, total.x, largest.x, sums.x),
                    raise(peak.y, total.y, largest.y, sums.y)};
    warp::mul_row(o, o, shrink);
  }

  // p = the weights of logits s, and their total.
  template <typename P, typename Logits>
  __device__ void Add(P& p, const Logits& s, float factor, bool first) {
    float2 sums = {INFINITY, INFINITY};
    bool outgrown = first;
    while (true) {
      if (outgrown) Raise(s, factor, sums);
      sums = Exponentiate(p, s, factor, peak);
      outgrown = __any_sync(~0u, fmaxf(sums.x, sums.y) > kOutgrown);
      if (!outgrown) break;
    }
    total.x += sums.x, total.y += sums.y;
  }
};

}  // namespace genie::attend
