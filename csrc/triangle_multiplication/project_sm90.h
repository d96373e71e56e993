// LayerNorm, four projections, gates and mask of triangle multiplication, for sm_90a.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "floats.h"

namespace genie {

// a, b = mask * sigmoid(x Wg + bg) * (x Wp + bp) with x = LayerNorm(z), written channel-first.
struct GatedProjection {
  const void* z;                 // [B, I, K, C], 16 bit
  const uint8_t* mask;           // [B, I, K], valid where not 0; or nullptr: all are valid
  void* a;                       // [B, Hm, Ip, Kp]: the first Hm hidden columns; zero past I and K
  void* b;                       // [B, Hm, Ip, Kp]: the last Hm
  Float dtype;                   // of z, a and b
  const float* norm_scale;       // [C]
  const float* norm_bias;        // [C]
  const void* proj_kernel;       // [C, 2 Hm]
  const void* gate_kernel;       // [C, 2 Hm]
  Float kernel_dtype;            // float32 or z's
  const float* proj_bias;        // [2 Hm] or nullptr
  const float* gate_bias;        // [2 Hm] or nullptr
  int64_t batch, rows, columns;  // B, I, K
  int64_t rows_padded, columns_padded;  // Ip, Kp
  int channels, hidden;                 // C, Hm
  float epsilon;
};

// Launches on `stream`. Serves C and Hm of 64, 128 and 256, z in bf16 and fp16, Ip and Kp multiples
// of 8, tensors at multiples of 16 bytes; for anything else it returns cudaErrorInvalidValue.
cudaError_t Launch(const GatedProjection& projection, cudaStream_t stream);

}  // namespace genie
