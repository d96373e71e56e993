// Attention along every row of a pair representation, one bias for all rows, for sm_90a.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace genie {

// o[i, q] = sum_k softmax_k(scale q[i, q] . k[i, k] + bias[q, k]) v[i, k] over the valid keys k of
// row i, a head at a time; zeros for a row without valid keys.
struct PairAttention {
  const void* q;        // [B, I, Q, H, D], 16 bit
  const void* k;        // [B, I, K, H, D]
  const void* v;        // [B, I, K, H, D]
  const void* bias;     // [B, H, Q, Kp], Kp = K rounded up to 8; or nullptr
  const uint8_t* mask;  // [B, I, K], valid where not 0; or nullptr: all are valid
  void* o;              // [B, I, Q, H, D]
  float* lse;           // [B, I, H, Q], log-sum-exp of the logits in nats, -inf without valid keys;
                        // or nullptr
  bool half;            // fp16 rather than bf16
  bool folded;          // q carries 1 / sqrt(D) and, like the bias, log2(e)
  int64_t batch, rows, queries, keys;  // B, I, Q, K
  int64_t heads, head_dim;             // H, D
};

// Launches on `stream`. Serves D of 16, 32 and 64, with tensors at multiples of 16 bytes; for
// anything else it returns cudaErrorInvalidValue.
cudaError_t Launch(const PairAttention& attention, cudaStream_t stream);

}  // namespace genie
