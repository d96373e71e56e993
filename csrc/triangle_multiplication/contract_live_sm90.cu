// Sums up a mask by blocks, which the contraction skips where no pair is valid: one byte a pair
// read.
#include "triangle_multiplication/contract_sm90.h"

namespace genie {
namespace {

constexpr int kBlock = 64;  // rows and columns of a mask block

// One thread block a mask block: whether any of its pairs is valid.
__global__ void Summarise(const uint8_t* mask, uint8_t* live, int rows, int columns, int row_blocks,
                          int column_blocks) {
  const int64_t any_row = blockIdx.x / column_blocks, entry = any_row / row_blocks;
  const int column = blockIdx.x % column_blocks * kBlock + threadIdx.x % kBlock;
  int found = 0;
#pragma unroll 8
  for (int i = threadIdx.x / kBlock; i < kBlock; i += blockDim.x / kBlock) {
    const int64_t row = any_row % row_blocks * kBlock + i;
    if (row < rows && column < columns)
      found |= __ldg(mask + (entry * rows + row) * columns + column);
  }
  found = __syncthreads_or(found);
  if (threadIdx.x == 0) live[blockIdx.x] = found != 0;
}

}  // namespace

cudaError_t FindLive(const uint8_t* mask, uint8_t* live, int64_t batch, int64_t rows,
                     int64_t columns, cudaStream_t stream) {
  const int64_t blocks = LiveSize(batch, rows, columns);
  if (blocks >= int64_t{1} << 31) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  Summarise<<<static_cast<unsigned>(blocks), 256, 0, stream>>>(
      mask, live, rows, columns, (rows + kBlock - 1) / kBlock, (columns + kBlock - 1) / kBlock);
  return cudaGetLastError();
}

}  // namespace genie
