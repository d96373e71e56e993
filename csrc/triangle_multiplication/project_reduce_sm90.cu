// Sums the partial gradients of the gated projection's weights in a fixed order: reads them once,
// one block for each channel and batch entry, one thread for each of the 4 Hm columns.
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

__global__ void Reduce(const GatedProjectionBackward given, int parts) {
  __shared__ float scale_sums[32], bias_sums[32];
  const GatedProjection& p = given.forward;
  const int width = 2 * p.hidden, which = threadIdx.x / width, column = threadIdx.x % width;
  const int channel = blockIdx.x;
  const int64_t batch = blockIdx.y, rows = p.channels + 1, step = 2 * rows * width;
  const float* from = given.partials + (batch * given.parts * 2 + which) * rows * width + column;
  float product = 0, total = 0;
#pragma unroll 8
  for (int part = 0; part < parts; ++part) {
    product += from[part * step + channel * width];
    total += from[part * step + p.channels * width];
  }
  product *= 0.5f, total *= 0.5f;

  const float weight =
      LoadKernel(p, which ? p.gate_kernel : p.proj_kernel, int64_t{channel} * width + column);
  (which ? given.d_gate : given.d_proj)[(batch * p.channels + channel) * width + column] =
      p.norm_scale[channel] * product + p.norm_bias[channel] * total;
  if (channel == 0) (which ? given.d_gate_bias : given.d_proj_bias)[batch * width + column] = total;
  const float scale_sum = BlockSum(weight * product, scale_sums);
  const float bias_sum = BlockSum(weight * total, bias_sums);
  if (threadIdx.x == 0) {
    given.d_scale[batch * p.channels + channel] = scale_sum;
    given.d_bias[batch * p.channels + channel] = bias_sum;
  }
}

}  // namespace

cudaError_t LaunchReduction(const GatedProjectionBackward& given, cudaStream_t stream) {
  const GatedProjection& p = given.forward;
  Reduce<<<dim3(p.channels, p.batch), 4 * p.hidden, 0, stream>>>(given, given.parts);
  return cudaGetLastError();
}

}  // namespace genie
