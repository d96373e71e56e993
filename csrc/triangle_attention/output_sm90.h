// Gate and output projection of triangle attention, for sm_90a.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "floats.h"

namespace genie {

// out = (sigmoid(x Wg + bg) * o) Wo + bo, or z + that, with x = LayerNorm(z).
//
// Row i of attention and position j along it are pair [i, j] of z, or [j, i] for the ending node.
// A masked pair that holds inf or NaN reads as zeros.
struct AttentionOutput {
  const void* o;                 // [B, I, J, H, D], 16 bit
  const void* z;                 // [B, N1, N2, C]
  const uint8_t* mask;           // [B, N1, N2], valid where not 0; or nullptr: all are valid
  void* out;                     // [B, N1, N2, C]
  Float dtype;                   // of o, z and out
  const float* norm_scale;       // [C]
  const float* norm_bias;        // [C]
  const void* gate_kernel;       // [C, H, D]
  const void* out_kernel;        // [H, D, C]
  Float kernel_dtype;            // of both: float32 or z's
  const float* gate_bias;        // [H, D] or nullptr
  const float* out_bias;         // [C] or nullptr
  int64_t batch, rows, columns;  // B, N1, N2
  int channels, hidden;          // C, H D
  bool ending;                   // else starting
  bool residual;                 // add z
  float epsilon;
};

// Launches on `stream`. Serves C and H D of 64, 128 and 256 but not 256 both, whose weights outgrow
// shared memory, z in bf16 and fp16, tensors at multiples of 16 bytes; for anything else it returns
// cudaErrorInvalidValue.
cudaError_t Launch(const AttentionOutput& output, cudaStream_t stream);

}  // namespace genie
