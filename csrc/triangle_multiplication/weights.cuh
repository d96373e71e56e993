// How a persistent block fills its shared memory, and the phases of its rings.
#pragma once

#include "kittens.cuh"
#include "triangle_multiplication/project_sm90.h"

namespace genie {

// Eight consecutive elements as floats.
template <typename Stored>
__device__ inline void LoadEight(float (&to)[8], const Stored* from) {
  constexpr int kLoads = 8 * sizeof(Stored) / sizeof(uint4);
  uint4 raw[kLoads];
#pragma unroll
  for (int j = 0; j < kLoads; ++j) raw[j] = __ldg(reinterpret_cast<const uint4*>(from) + j);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    to[j] = kittens::base_types::convertor<float, Stored>::convert(
        reinterpret_cast<const Stored*>(raw)[j]);
  }
}

// Calls f with a matrix as it is stored: of float32, or of T.
template <typename T, typename F>
__device__ inline void AsStored(const void* matrix, Float dtype, F&& f) {
  if (dtype == Float::kF32) {
    f(static_cast<const float*>(matrix));
  } else {
    f(static_cast<const T*>(matrix));
  }
}

// Fills `chunks` tiles with the [rows, cols] blocks of a matrix whose rows are `stride` apart, each
// element w being f(w, row, column).
template <int kThreads, typename Weight, typename Stored, typename F>
__device__ void FillWeights(Weight* tiles, int chunks, const Stored* matrix, int stride, F&& f) {
  using T = typename Weight::T;
  constexpr int kVectors = Weight::num_elements / 8, kRowVectors = Weight::cols / 8;
#pragma unroll 4
  for (int i = threadIdx.x; i < chunks * kVectors; i += kThreads) {
    const int chunk = i / kVectors, row = i % kVectors / kRowVectors, at = i % kRowVectors * 8;
    const int column = chunk * Weight::cols + at;
    float w[8];
    LoadEight(w, matrix + row * stride + column);
    uint4 packed;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      reinterpret_cast<T*>(&packed)[j] =
          kittens::base_types::convertor<T, float>::convert(f(w[j], row, column + j));
    }
    *reinterpret_cast<uint4*>(&tiles[chunk][{row, at}]) = packed;
  }
}

// Element `at` of a kernel as float.
__device__ inline float WeightAt(const void* kernel, Float kernel_dtype, Float dtype, int64_t at) {
  if (kernel_dtype == Float::kF32) return static_cast<const float*>(kernel)[at];
  if (dtype == Float::kBf16) return __bfloat162float(static_cast<const kittens::bf16*>(kernel)[at]);
  return __half2float(static_cast<const kittens::half*>(kernel)[at]);
}

template <int kThreads, size_t length>
__device__ void FillVector(kittens::sv_fl<length>& to, const float* from) {
  for (int i = threadIdx.x; i < length; i += kThreads) to[i] = from[i];
}

// A ring of kStages tiles that kConsumers take in turn. Tile n has the semaphores n % kTurns, so
// that one consumer sees every phase of them in order: with a semaphore a stage, a consumer two
// phases ahead of a slow one would mistake the parity.
template <int kStages, int kConsumers>
struct Phases {
  static constexpr int kTurns = (kStages + kConsumers - 1) / kConsumers * kConsumers;
  kittens::semaphore arrived[kTurns], finished[kTurns];

  __device__ void Init(int readers) {  // by one thread; `readers` finish each tile
    for (int turn = 0; turn < kTurns; ++turn) {
      kittens::init_semaphore(arrived[turn], 0, 1);
      kittens::init_semaphore(finished[turn], readers, 0);
    }
  }
  __device__ auto& Arrived(int n) { return arrived[n % kTurns]; }
  __device__ auto& Finished(int n) { return finished[n % kTurns]; }
  __device__ void WaitArrived(int n) { kittens::wait(Arrived(n), n / kTurns % 2); }
  __device__ void WaitFinished(int n) { kittens::wait(Finished(n), n / kTurns % 2); }
};

}  // namespace genie
