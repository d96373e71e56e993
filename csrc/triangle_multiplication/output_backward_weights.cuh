// The weights of the gated output's backward in a block's shared memory.
#pragma once

#include "resident.cuh"
#include "triangle_multiplication/output_backward_block.cuh"

namespace genie::output_backward {

// Sums over the rows of a [K, C] matrix of scale W / K and of bias W, by 2 C threads: each sums
// K / 16 rows of eight columns, then a thread a column adds what the 16 found.
template <int K, int C, typename Stored>
__device__ void SumColumns(float* parts, int thread, const Stored* matrix, const float* scale,
                           const float* bias) {
  const int column = thread % (C / 8) * 8, part = thread / (C / 8);
  float scaled[8] = {}, shifted[8] = {};
#pragma unroll
  for (int i = 0; i < K / 16; ++i) {
    const int row = part * (K / 16) + i;
    float w[8];
    LoadEight(w, matrix + row * C + column);
    for (int j = 0; j < 8; ++j) {
      scaled[j] += __ldg(scale + row) * (1.f / K) * w[j];
      shifted[j] += __ldg(bias + row) * w[j];
    }
  }
  for (int j = 0; j < 8; ++j) {
    parts[2 * part * C + column + j] = scaled[j];
    parts[(2 * part + 1) * C + column + j] = shifted[j];
  }
}

// The block's weights and biases, by all threads, with the norms' scales and biases in them.
template <typename T, int C, int H, typename S = Shape<T, C, H>>
__device__ void FillParameters(typename S::Shared& shared, const GatedOutput& given) {
  constexpr int kThreads = S::kThreads;
  // ds and the weights' own place are free until they are filled.
  float* parts[2] = {reinterpret_cast<float*>(shared.ds), reinterpret_cast<float*>(shared.gate)};
  for (int i = threadIdx.x; i < 4 * C; i += kThreads) {
    if (i < 2 * C) {
      AsStored<T>(given.proj_kernel, given.kernel_dtype, [&](auto* stored) {
        SumColumns<H, C>(parts[0], i, stored, given.norm_out_scale, given.norm_out_bias);
      });
    } else {
      AsStored<T>(given.gate_kernel, given.kernel_dtype, [&](auto* stored) {
        SumColumns<C, C>(parts[1], i - 2 * C, stored, given.norm_in_scale, given.norm_in_bias);
      });
    }
  }
  everyone::sync(0);
  for (int c = threadIdx.x; c < C; c += kThreads) {
    for (int gate = 0; gate < 2; ++gate) {
      const float* bias = gate ? given.gate_bias : given.proj_bias;
      float mean = 0.f, offset = bias ? bias[c] : 0.f;
      for (int part = 0; part < 16; ++part) {
        mean += parts[gate][2 * part * C + c];
        offset += parts[gate][(2 * part + 1) * C + c];
      }
      parts[0][gate * C + c] = mean;  // this thread alone reads column c
      (gate ? shared.gate_bias : shared.proj_bias)[c / kColumns][c % kColumns] = offset;
    }
  }
  everyone::sync(0);
  const auto fill = [&](auto* tiles, const void* matrix, const float* scale, const float* mean) {
    AsStored<T>(matrix, given.kernel_dtype, [&](auto* stored) {
      const auto centred = [&](float w, int chunk, int row, int column) {
        return __ldg(scale + row) * w - mean[chunk * kColumns + column];
      };
      FillWeights<kThreads>(tiles, S::kChunks, C, centred,
                            [&](int chunk) { return stored + chunk * kColumns; });
    });
  };
  fill(shared.proj, given.proj_kernel, given.norm_out_scale, parts[0]);
  fill(shared.gate, given.gate_kernel, given.norm_in_scale, parts[0] + C);
  FenceAsyncProxy();
}

}  // namespace genie::output_backward
