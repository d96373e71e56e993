// The backward of attention along every row of a pair, one bias for all rows, for sm_90a.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "floats.h"

namespace genie {

// Gradients of o = softmax_k(x ln 2) v with x = scale q.k + bias_scale bias, keys masked. A row
// without a valid key has lse -inf, o zero and zero gradients.
struct AttendBackward {
  const void *q, *k, *v;  // [B, I, Q, H, D] and twice [B, I, K, H, D], 16 bit
  const void* bias;       // [B, H, Q, Kp], 16 bit, columns K.. finite; or nullptr
  const uint8_t* mask;    // [B, I, K], valid where not 0; or nullptr: all are valid
  const void* o;          // like q
  const float* lse;       // [B, I, H, Q], in nats
  const void* d_o;        // like q
  void *dq, *dk, *dv;     // like q, k, v
  float* d_bias;          // [B, H, Q, Kp], columns K.. are written as zero; or nullptr
  float* query_rows;      // workspace [B, I, H, QueryWords]
  float* chunk_sums;      // workspace [chunks, B, H, Q, Kp]; or nullptr if there is one chunk
  Float dtype;
  int64_t batch, rows, queries, keys, keys_padded;  // B, I, Q, K, Kp = K up to a multiple of 8
  int heads, head_dim, chunks;                      // H, D, and of the rows that dbias sums over
  float scale, bias_scale;
};

// Qp: queries up to a multiple of 64.
constexpr int64_t PaddedQueries(int64_t queries) { return (queries + 63) / 64 * 64; }

// Floats of a row i and head in query_rows: Qp times -lse log2 e, Qp times -delta, and in fp16 the
// power of two by which dS may be multiplied, for every 16 queries.
constexpr int64_t QueryWords(int64_t queries, Float dtype) {
  return PaddedQueries(queries) * 2 + (dtype == Float::kF16 ? PaddedQueries(queries) / 16 : 0);
}

// Launches on `stream`. Serves D of 16, 32 and 64, bf16 and fp16, tensors at multiples of 16 bytes;
// for anything else it returns cudaErrorInvalidValue.
cudaError_t Launch(const AttendBackward& attend, cudaStream_t stream);

}  // namespace genie
