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

constexpr int kParts = 4;  // threads that share the sum of one element

// The sums of one thread for column c of row k: e[c] and G[k, c], over every kParts-th partial.
__device__ float2 SumPartials(const float* partials, int64_t size, int blocks, int64_t product,
                              int64_t column, int channels) {
  float2 sum = {};
  for (int p = threadIdx.y; p < blocks; p += kParts) {
    const float* from = partials + p * size;
    sum.x += from[product];
    for (int i = 0; i < 256; i += channels) sum.y += from[column + i];
  }
  return sum;
}

// Block (k, b) makes row k of [Wo; Wg] for batch entry b; thread (c, part).
__global__ void Reduce(const GatedOutputBackward g) {
  const int channels = g.of.channels, hidden = g.of.hidden;
  const bool proj = blockIdx.x < hidden;
  const int k = proj ? blockIdx.x : blockIdx.x - hidden, c = threadIdx.x;
  const int64_t b = blockIdx.y, size = OutputPartial(channels, hidden);
  const int64_t products = int64_t{channels} * (hidden + channels);
  __shared__ float2 parts[kParts][128], rows[128];

  parts[threadIdx.y][c] =
      SumPartials(g.partials + b * g.blocks * size, size, g.blocks,
                  int64_t{blockIdx.x} * channels + c, products + (proj ? 0 : 256) + c, channels);
  __syncthreads();
  if (threadIdx.y != 0) return;
  float2 sum = {};
  for (int i = 0; i < kParts; ++i) {
    sum.x += parts[i][c].x;
    sum.y += parts[i][c].y;
  }
  const int inputs = proj ? hidden : channels;
  const float scale = (proj ? g.of.norm_out_scale : g.of.norm_in_scale)[k];
  const float bias = (proj ? g.of.norm_out_bias : g.of.norm_in_bias)[k];
  float* d_kernel = proj ? g.d_proj_kernel : g.d_gate_kernel;
  float* d_bias = proj ? g.d_proj_bias : g.d_gate_bias;
  d_kernel[(b * inputs + k) * channels + c] = scale * sum.x + bias * sum.y;
  if (k == 0 && d_bias) d_bias[b * channels + c] = sum.y;

  const float weight = WeightAt(proj ? g.of.proj_kernel : g.of.gate_kernel, g.of.kernel_dtype,
                                g.of.dtype, int64_t{k} * channels + c);
  rows[c] = {weight * sum.x, weight * sum.y};
  for (int half = channels / 2; half > 0; half /= 2) {
    asm volatile("bar.sync 1, %0;" ::"r"(channels) : "memory");
    if (c < half) {
      rows[c].x += rows[c + half].x;
      rows[c].y += rows[c + half].y;
    }
  }
  if (c != 0) return;
  (proj ? g.d_norm_out_scale : g.d_norm_in_scale)[b * inputs + k] = rows[0].x;
  (proj ? g.d_norm_out_bias : g.d_norm_in_bias)[b * inputs + k] = rows[0].y;
}

}  // namespace

cudaError_t LaunchReduction(const GatedOutputBackward& p, cudaStream_t stream) {
  const dim3 grid(p.of.hidden + p.of.channels, p.of.batch), block(p.of.channels, kParts);
  Reduce<<<grid, block, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace genie
