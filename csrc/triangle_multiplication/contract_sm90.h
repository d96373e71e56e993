// Batched matrix products of triangle multiplication's contraction and of its gradients, for
// sm_90a.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "triangle_multiplication/project_sm90.h"

namespace genie {

// Masks are summed up by blocks of 64 x 64 pairs: one byte each, [B, ceil(rows / 64),
// ceil(columns / 64)] for matrices of the stored shape, and 0 where no pair of the block is valid.
using LiveBlocks = const uint8_t*;

// out = A B for every matrix of a batch, summed in ascending order of the depth. Matrices are
// row-major; a transposed one is stored as its transpose, so A as [depth, rows], B as
// [columns, depth].
struct Product {
  const void *a, *b;
  void* out;
  bool a_transposed, b_transposed;
  int64_t rows, columns, depth;
  // Operands hold zeros outside live blocks, which are then not read. Of out, blocks that are not
  // live may be left as zeros. nullptr: all blocks are live.
  LiveBlocks a_live, b_live, out_live;
};

// One or two products in one launch; a second one without rows is none.
struct Contraction {
  Product products[2];
  int64_t batch, channels;  // B and Hm: there are B Hm matrices
  Float dtype, out_dtype;   // of operands, and of results: the same or float32
};

// Launch on `stream`. Rows as stored are a multiple of 16 bytes long, as pads make them, and
// tensors start at one; for anything else, and other dtypes than bf16 and fp16,
// cudaErrorInvalidValue.
cudaError_t Launch(const Contraction& contraction, cudaStream_t stream);
// mask [batch, rows, columns], valid where not 0.
cudaError_t FindLive(const uint8_t* mask, uint8_t* live, int64_t batch, int64_t rows,
                     int64_t columns, cudaStream_t stream);

// The operands of a contraction: outgoing a [I, K] and b [J, K], incoming a [K, I] and b [K, J].
struct Edges {
  bool incoming;
  const void *a, *b;
  int64_t i, j, k;
  LiveBlocks a_live = nullptr, b_live = nullptr;
};

// t [I, J]: a b^T or a^T b.
inline Product Forward(const Edges& e, void* t) {
  return {e.a, e.b, t, e.incoming, !e.incoming, e.i, e.j, e.k, e.a_live, e.b_live, nullptr};
}
// dt b, or b dt^T.
inline Product GradientOfA(const Edges& e, const void* dt, void* da) {
  if (e.incoming) return {e.b, dt, da, false, true, e.k, e.i, e.j, e.b_live, nullptr, e.a_live};
  return {dt, e.b, da, false, false, e.i, e.k, e.j, nullptr, e.b_live, e.a_live};
}
// dt^T a, or a dt.
inline Product GradientOfB(const Edges& e, const void* dt, void* db) {
  if (e.incoming) return {e.a, dt, db, false, false, e.k, e.j, e.i, e.a_live, nullptr, e.b_live};
  return {dt, e.a, db, true, false, e.j, e.k, e.i, nullptr, e.a_live, e.b_live};
}

// How many bytes describe a mask [batch, rows, columns].
constexpr int64_t LiveSize(int64_t batch, int64_t rows, int64_t columns) {
  return batch * ((rows + 63) / 64) * ((columns + 63) / 64);
}

}  // namespace genie
