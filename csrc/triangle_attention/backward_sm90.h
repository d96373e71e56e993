// The backward of the stages around the attention core, for sm_90a.
//
// The gate's pre-activation counts as a fourth projection: `OutputBackward` gives its gradient, and
// the gradients of all projections of x = LayerNorm(z) meet in `ProjectionBackward`, which makes
// dz, and in `WeightsBackward`. Attention order and masks are those of the forward.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "floats.h"

namespace genie {

struct AttentionOutputBackward {
  const void* o;        // [B, I, J, H, D], 16 bit
  const void* z;        // [B, N1, N2, C]
  const uint8_t* mask;  // [B, N1, N2] or nullptr
  const void* d_out;    // [B, N1, N2, C]
  void* d_o;            // [B, I, J, H, D]
  void* d_gate;         // [B, I, J, H, D], of the gate before its sigmoid
  float*
      out_kernel_sums;   // [B, P, H D, C]: the gradient of the output's kernel is their sum over P
  float* out_bias_sums;  // [B, P, C]
  Float dtype;           // of o, z, d_out, d_o and d_gate
  const float* norm_scale;              // [C]
  const float* norm_bias;               // [C]
  const void* gate_kernel;              // [C, H, D]
  const void* out_kernel;               // [H, D, C]
  Float kernel_dtype;                   // of both: float32 or z's
  const float* gate_bias;               // [H, D] or nullptr
  int64_t batch, rows, columns, parts;  // B, N1, N2, P
  int channels, hidden;                 // C, H D
  bool ending;
  float epsilon;
};

// With d the gradients of q, k, v, gate and bias; q and the bias carry the forward's factors.
struct AttentionProjectionBackward {
  const void* z;        // [B, N1, N2, C], 16 bit
  const uint8_t* mask;  // [B, N1, N2] or nullptr
  const void* d[4];     // of q, k, v and gate, [B, I, J, H, D]
  const float* d_bias;  // [B, H, Q, Kp]
  const void* d_out;    // [B, N1, N2, C], added to dz; or nullptr: the layer has no residual
  void* dz;             // [B, N1, N2, C]
  float2* statistics;  // [B, I, J], for the weights: z x + y is LayerNorm(z) before scale and bias,
                       // and x is zero where z reads as zeros
  Float dtype;         // of z, d, d_out and dz
  const float* norm_scale;          // [C]
  const void* kernel[4];            // of q, k, v and gate, [C, H, D]
  const void* bias_kernel;          // [C, H]
  Float kernel_dtype;               // of all five: float32 or z's
  int64_t batch, rows, columns;     // B, N1, N2
  int channels, heads, head_width;  // C, H, D
  bool ending, bias_as_z;
  float epsilon;
};

// With y = LayerNorm(z) before scale and bias: sums over pairs of y d and of d, which make the
// gradients of the kernels and of the LayerNorm.
struct AttentionWeightsBackward {
  const void* z;                        // [B, N1, N2, C], 16 bit
  const float2* statistics;             // [B, I, J], of the projections' backward
  const void* d[4];                     // of q, k, v and gate, [B, I, J, H, D]
  const float* d_bias;                  // [B, H, Q, Kp]
  float* kernel_sums;                   // [B, P, 4, C, H D]
  float* sums;                          // [B, P, 4, H D]
  float* bias_kernel_sums;              // [B, P, C, 16], of which H columns count
  float* bias_sums;                     // [B, P, 16]
  Float dtype;                          // of z and d
  int64_t batch, rows, columns, parts;  // B, N1, N2, P
  int channels, heads, head_width;      // C, H, D
  bool ending, bias_as_z;
};

// Launch on `stream`. They serve C = H D of 64 and 128, H up to 16, bf16 and fp16, tensors at
// multiples of 16 bytes; for anything else they return cudaErrorInvalidValue.
cudaError_t Launch(const AttentionOutputBackward& backward, cudaStream_t stream);
cudaError_t Launch(const AttentionProjectionBackward& backward, cudaStream_t stream);
cudaError_t Launch(const AttentionWeightsBackward& backward, cudaStream_t stream);

}  // namespace genie
