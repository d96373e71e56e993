// The derivative of triangle multiplication's gated output, for sm_90a.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "triangle_multiplication/output_sm90.h"

namespace genie {

// Gradients of GatedOutput's operands from that of its result.
struct GatedOutputBackward {
  GatedOutput of;     // the operands; `out` is not read
  const void* d_out;  // [B, I, J, C], z's dtype
  void* dz;           // [B, I, J, C], z's dtype
  void* dt;           // [B, Hm, Ip, Jp], t's dtype; rows I.. and columns J.. are zero
  float* partials;    // [B, P, OutputPartial(C, Hm)]: workspace
  int blocks;         // P, of each batch entry: at least 1
  // Gradients of weights, [B, ...] each.
  float *d_norm_in_scale, *d_norm_in_bias;    // [C]
  float *d_norm_out_scale, *d_norm_out_bias;  // [Hm]
  float *d_proj_kernel, *d_gate_kernel;       // [Hm, C], [C, C]
  float *d_proj_bias, *d_gate_bias;           // [C] or nullptr
};

// Floats of one block's sums over pairs: [Hm, C] and [C, C] of products, 2 x 256 of column sums.
constexpr int64_t OutputPartial(int64_t channels, int64_t hidden) {
  return (hidden + channels) * channels + 2 * 256;
}

// Launches on `stream`. Serves C and Hm of 64 and 128, Ip and Jp the multiples of 8 above I and J,
// t zero past I and J, tensors at multiples of 16 bytes; for anything else it returns
// cudaErrorInvalidValue.
cudaError_t Launch(const GatedOutputBackward& backward, cudaStream_t stream);

// Its second half: gradients of weights from the partials.
cudaError_t LaunchReduction(const GatedOutputBackward& backward, cudaStream_t stream);

}  // namespace genie
