// LayerNorm, output projection and gate of triangle multiplication, for sm_90a.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "triangle_multiplication/project_sm90.h"

namespace genie {

// out = sigmoid(LayerNorm(z) Wg + bg) * (LayerNorm(t) Wo + bo), plus z if `residual`. A masked pair
// whose z holds infinity or NaN reads as zeros.
struct GatedOutput {
  const void* z;                // [B, I, J, C], 16 bit
  const void* t;                // [B, Hm, Ip, Jp], bf16 where z is, float32 where z is fp16
  const uint8_t* mask;          // [B, I, J], valid where not 0; or nullptr: all are valid
  void* out;                    // [B, I, J, C]
  Float dtype;                  // of z and out
  const float* norm_in_scale;   // [C]
  const float* norm_in_bias;    // [C]
  const float* norm_out_scale;  // [Hm]
  const float* norm_out_bias;   // [Hm]
  const void* proj_kernel;      // Wo [Hm, C]
  const void* gate_kernel;      // Wg [C, C]
  Float kernel_dtype;           // float32 or z's
  const float* proj_bias;       // [C] or nullptr
  const float* gate_bias;       // [C] or nullptr
  int64_t batch, rows, columns, rows_padded, columns_padded;  // B, I, J, Ip, Jp
  int channels, hidden;                                       // C, Hm
  bool residual;
  float epsilon;
};

// Launches on `stream`. Serves C and Hm of 64, 128 and 256, Jp a multiple of 8, tensors at
// multiples of 16 bytes; for anything else it returns cudaErrorInvalidValue.
cudaError_t Launch(const GatedOutput& output, cudaStream_t stream);

}  // namespace genie
