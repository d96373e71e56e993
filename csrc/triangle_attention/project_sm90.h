// LayerNorm and the projections to q, k, v and the pair bias of triangle attention, for sm_90a.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "floats.h"

namespace genie {

// x = LayerNorm(z); q = x Wq log2(e) / sqrt(D), k = x Wk, v = x Wv, bias = x Wb log2(e): the core's
// logits q k + bias are then in units of log 2.
//
// Row i of attention and position j along it are pair [i, j] of z, or [j, i] for the ending node.
// A masked pair that holds inf or NaN reads as zeros.
struct AttentionProjection {
  const void* z;            // [B, N1, N2, C], 16 bit
  const uint8_t* mask;      // [B, N1, N2], valid where not 0; or nullptr: all are valid
  void *q, *k, *v;          // [B, I, J, H, D]
  void* bias;               // [B, H, Q, Kp], columns K.. are zero
  Float dtype;              // of z and the results
  const float* norm_scale;  // [C]
  const float* norm_bias;   // [C]
  const void *q_kernel, *k_kernel, *v_kernel;  // [C, H, D]
  const void* bias_kernel;                     // [C, H]
  Float kernel_dtype;                          // of all four: float32 or z's
  int64_t batch, rows, columns;                // B, N1, N2
  int channels, heads, head_width;             // C, H, D
  bool ending;                                 // else starting
  bool bias_as_z;  // the bias' [Q, K] are [N1, N2], else [I, J]; one for the starting node
  float epsilon;
};

// Kp: rows of the bias are multiples of 16 bytes.
constexpr int64_t BiasColumns(int64_t keys) { return (keys + 7) / 8 * 8; }

// Launches on `stream`. Serves C and H D of 64, 128 and 256, H up to 16, z in bf16 and fp16,
// tensors at multiples of 16 bytes; for anything else it returns cudaErrorInvalidValue.
cudaError_t Launch(const AttentionProjection& projection, cudaStream_t stream);

}  // namespace genie
