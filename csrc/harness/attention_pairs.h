// What the harnesses of the stages around the attention core share: a case, and its pairs on both
// sides.
#pragma once

#include "harness/problem.h"

enum class Node { kStarting, kEnding, kUnswapped };  // the last: ending, with the bias as z

struct Case {
  int64_t batch, rows, columns;
  int channels, heads, width;
  Node node = Node::kStarting;
  Mask mask = Mask::kRandom;
  bool bias = true;
  bool residual = false;
  bool float_weights = true;
  __host__ __device__ int hidden() const { return heads * width; }
  __host__ __device__ int64_t pairs() const { return batch * rows * columns; }
  __host__ __device__ bool ending() const { return node != Node::kStarting; }
  // Where pair `p` of z stands in attention order.
  __host__ __device__ int64_t attended(int64_t p) const {
    if (!ending()) return p;
    const int64_t column = p % columns, row = p / columns % rows, b = p / columns / rows;
    return (b * columns + column) * rows + row;
  }
};

// A masked pair is like any other, or holds NaN throughout, or infinity in one channel.
__host__ __device__ inline bool Garbage(Mask mask, int64_t pair) {
  return !Valid(mask, pair) && pair % 3 != 0;
}
__host__ __device__ inline float Input(Mask mask, int64_t pair, int channel, int channels) {
  if (Garbage(mask, pair) && pair % 3 == 1) return NAN;
  if (Garbage(mask, pair) && channel == pair % channels) return INFINITY;
  return 0.5f + 2 * Draw(1, pair * channels + channel);
}

template <typename T>
__global__ void FillPairs(T* z, uint8_t* valid, int64_t pairs, int channels, Mask mask) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < pairs * channels;
       i += step) {
    const int64_t pair = i / channels;
    z[i] = Round<T>(Input(mask, pair, i % channels, channels));
    if (i % channels == 0) valid[pair] = Valid(mask, pair) ? 1 + pair % 7 : 0;
  }
}

// LayerNorm of a pair as the layer reads it, exactly; `z` gets what is read.
template <typename T>
std::vector<double> Normed(const Case& c, int64_t pair, const std::vector<float>& scale,
                           const std::vector<float>& bias, std::vector<double>* z) {
  std::vector<double> x(c.channels);
  double mean = 0, variance = 0;
  for (int i = 0; i < c.channels; ++i) {
    x[i] = Garbage(c.mask, pair) ? 0 : Low<T>(Input(c.mask, pair, i, c.channels));
    mean += x[i] / c.channels;
  }
  *z = x;
  for (double value : x) variance += (value - mean) * (value - mean) / c.channels;
  for (int i = 0; i < c.channels; ++i) {
    x[i] = (x[i] - mean) / std::sqrt(variance + double{kEpsilon}) * scale[i] + bias[i];
  }
  return x;
}

inline void PrintCase(const char* name, const Case& c) {
  const char* nodes[] = {"starting", "ending", "unswapped"};
  std::printf("%s %-9s B=%-2ld %4ldx%-4ld C=%-3d H=%-2d D=%-3d mask=%-6s bias=%d z=%d %s ", name,
              nodes[static_cast<int>(c.node)], c.batch, c.rows, c.columns, c.channels, c.heads,
              c.width, kMaskNames[static_cast<int>(c.mask)], c.bias, c.residual,
              c.float_weights ? "f32" : "16b");
}
