// Gradients of the gated output's weights from the sums that each block made: reads the partials
// once, in a fixed order, so that same inputs give the same bits.
//
// With normal = LayerNorm without scale and bias, G = sum of normal^T d and e = sum of d over
// pairs, d the gradient of a projection: everything that the projection and its norm want follows,
//   dW = scale G + bias e,  d scale = rows of (W * G),  d norm bias = rows of (W * e),  d bias = e.
#include "triangle_multiplication/output_backward_sm90.h"
#include "triangle_multiplication/weights.cuh"

namespace genie {
namespace {

constexpr int kThreads = 512;

// Four neighbouring columns of every `step`-th of `count` rows from `first` on, summed: the loads
// of many rows are on their way together, where waiting for each of them took three times as long.
template <typename Row>
__device__ float4 SumRows(int first, int count, int step, Row&& row) {
  float4 sum = {};
#pragma unroll 8
  for (int i = first; i < count; i += step) {
    const float4 x = *reinterpret_cast<const float4*>(row(i));
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
  }
  return sum;
}

// Block (k, b) makes row k of [Wo; Wg] for batch entry b: groups of C / 4 threads take the partials
// in turn, then C threads a column each.
__global__ __launch_bounds__(kThreads, 2) void Reduce(const GatedOutputBackward g) {
  __shared__ float4 products[kThreads], totals[kThreads];
  __shared__ float2 warps[kThreads / 32];
  const int channels = g.of.channels, hidden = g.of.hidden, c = threadIdx.x;
  const bool proj = blockIdx.x < hidden;
  const int k = proj ? blockIdx.x : blockIdx.x - hidden, inputs = proj ? hidden : channels;
  const int64_t b = blockIdx.y, size = OutputPartial(channels, hidden);
  {
    const int quads = channels / 4, groups = kThreads / quads, group = c / quads;
    const float* from = g.partials + b * g.blocks * size + c % quads * 4;
    const float* columns = from + int64_t{channels} * (hidden + channels) + (proj ? 0 : 256);
    products[c] = SumRows(group, g.blocks, groups,
                          [&](int p) { return from + p * size + blockIdx.x * channels; });
    const int folds = 256 / channels;  // sums of a column in a partial
    totals[c] = SumRows(group, g.blocks * folds, groups,
                        [&](int p) { return columns + p / folds * size + p % folds * channels; });
  }
  __syncthreads();
  float2 of_row = {};
  if (c < channels) {
    float product = 0, total = 0;
    for (int i = c; i < 4 * kThreads; i += channels) {
      product += reinterpret_cast<const float*>(products)[i];
      total += reinterpret_cast<const float*>(totals)[i];
    }
    const float scale = (proj ? g.of.norm_out_scale : g.of.norm_in_scale)[k];
    const float bias = (proj ? g.of.norm_out_bias : g.of.norm_in_bias)[k];
    float* d_kernel = proj ? g.d_proj_kernel : g.d_gate_kernel;
    float* d_bias = proj ? g.d_proj_bias : g.d_gate_bias;
    d_kernel[(b * inputs + k) * channels + c] = scale * product + bias * total;
    if (k == 0 && d_bias) d_bias[b * channels + c] = total;
    const float weight = WeightAt(proj ? g.of.proj_kernel : g.of.gate_kernel, g.of.kernel_dtype,
                                  g.of.dtype, int64_t{k} * channels + c);
    of_row = {weight * product, weight * total};
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    of_row.x += __shfl_xor_sync(~0u, of_row.x, lanes);
    of_row.y += __shfl_xor_sync(~0u, of_row.y, lanes);
  }
  if (c % 32 == 0) warps[c / 32] = of_row;
  __syncthreads();
  if (c != 0) return;
  for (int warp = 1; warp < channels / 32; ++warp) {
    of_row.x += warps[warp].x, of_row.y += warps[warp].y;
  }
  (proj ? g.d_norm_out_scale : g.d_norm_in_scale)[b * inputs + k] = of_row.x;
  (proj ? g.d_norm_out_bias : g.d_norm_in_bias)[b * inputs + k] = of_row.y;
}

}  // namespace

cudaError_t LaunchReduction(const GatedOutputBackward& p, cudaStream_t stream) {
  Reduce<<<dim3(p.of.hidden + p.of.channels, p.of.batch), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace genie
