// Sums the partial gradients of the gated projection's weights in a fixed order: reads them once,
// one block for each channel and batch entry. Groups of Hm threads, four of the 4 Hm columns each,
// take turns at the parts, so that all their loads are on their way together.
//
// With u the unit-variance x and G = u^T d for the gradients d of each projection, x = scale u +
// bias gives W's gradient as scale G + bias sum(d), and dx W's as the norm's: d_scale sums W G over
// the columns of both projections, d_bias W sum(d). The partials hold twice G and twice sum(d).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "triangle_multiplication/project_backward_sm90.h"

namespace genie {
namespace {

__device__ float LoadKernel(const GatedProjection& p, const void* kernel, int64_t at) {
  if (p.kernel_dtype == Float::kF32) return static_cast<const float*>(kernel)[at];
  if (p.kernel_dtype == Float::kF16) return __half2float(static_cast<const __half*>(kernel)[at]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(kernel)[at]);
}

__device__ void Add(float4& sum, const float* from) {
  const float4 x = *reinterpret_cast<const float4*>(from);
  sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
}

// The sum over the block, in thread 0. Every warp is whole.
__device__ float BlockSum(float x, float (&warps)[32]) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < blockDim.x / 32; ++warp) sum += warps[warp];
  }
  return sum;
}

constexpr int kThreads = 1024;

__global__ __launch_bounds__(kThreads) void Reduce(const GatedProjectionBackward given) {
  __shared__ float4 products[kThreads], totals[kThreads];
  __shared__ float scale_sums[32], bias_sums[32];
  const GatedProjection& p = given.forward;
  const int width = 2 * p.hidden, channel = blockIdx.x;
  const int groups = kThreads / p.hidden, group = threadIdx.x / p.hidden;
  const int64_t batch = blockIdx.y, size = int64_t{p.channels + 1} * width;
  {
    const int first = threadIdx.x % p.hidden * 4;
    const float* from =
        given.partials + (batch * given.parts * 2 + first / width) * size + first % width;
    float4 product = {}, total = {};
#pragma unroll 4
    for (int part = group; part < given.parts; part += groups) {
      Add(product, from + 2 * part * size + channel * width);
      Add(total, from + 2 * part * size + p.channels * width);
    }
    products[threadIdx.x] = product, totals[threadIdx.x] = total;
  }
  __syncthreads();

  float scale_sum = 0, bias_sum = 0;
  if (threadIdx.x < 2 * width) {
    const int which = threadIdx.x / width, column = threadIdx.x % width;
    float product = 0, total = 0;
    for (int i = 0; i < groups; ++i) {
      product += 0.5f * reinterpret_cast<const float*>(products + i * p.hidden)[threadIdx.x];
      total += 0.5f * reinterpret_cast<const float*>(totals + i * p.hidden)[threadIdx.x];
    }
    const float weight =
        LoadKernel(p, which ? p.gate_kernel : p.proj_kernel, int64_t{channel} * width + column);
    (which ? given.d_gate : given.d_proj)[(batch * p.channels + channel) * width + column] =
        p.norm_scale[channel] * product + p.norm_bias[channel] * total;
    if (channel == 0) {
      (which ? given.d_gate_bias : given.d_proj_bias)[batch * width + column] = total;
    }
    scale_sum = weight * product, bias_sum = weight * total;
  }
  scale_sum = BlockSum(scale_sum, scale_sums), bias_sum = BlockSum(bias_sum, bias_sums);
  if (threadIdx.x == 0) {
    given.d_scale[batch * p.channels + channel] = scale_sum;
    given.d_bias[batch * p.channels + channel] = bias_sum;
  }
}

}  // namespace

cudaError_t LaunchReduction(const GatedProjectionBackward& given, cudaStream_t stream) {
  const GatedProjection& p = given.forward;
  Reduce<<<dim3(p.channels, p.batch), kThreads, 0, stream>>>(given);
  return cudaGetLastError();
}

}  // namespace genie
