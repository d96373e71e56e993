// How a persistent block fills its shared memory, and the phases of its rings.
#pragma once

#include "kittens.cuh"
#include "triangle_multiplication/project_sm90.h"

namespace genie {

// Fills `chunks` tiles with the [rows, cols] blocks, from `first_column` on, of a matrix whose rows
// are `stride` apart, times a power of two.
template <int kThreads, typename Weight, typename Stored>
__device__ void FillWeights(Weight* tiles, int chunks, const Stored* kernel, int stride,
                            float factor) {
  using namespace kittens;
  using T = typename Weight::T;
  constexpr int kVector = 8;  // elements of a 16-byte chunk of a tile's row
  constexpr int kVectors = Weight::num_elements / kVector, kRowVectors = Weight::cols / kVector;
  constexpr int kLoads = kVector * sizeof(Stored) / sizeof(uint4);
#pragma unroll 4
  for (int i = threadIdx.x; i < chunks * kVectors; i += kThreads) {
    const int chunk = i / kVectors, row = i % kVectors / kRowVectors;
    const int column = i % kRowVectors * kVector;
    const Stored* from = kernel + row * stride + chunk * Weight::cols + column;
    uint4 raw[kLoads], packed;
#pragma unroll
    for (int j = 0; j < kLoads; ++j) raw[j] = __ldg(reinterpret_cast<const uint4*>(from) + j);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float x =
          base_types::convertor<float, Stored>::convert(reinterpret_cast<const Stored*>(raw)[j]);
      reinterpret_cast<T*>(&packed)[j] = base_types::convertor<T, float>::convert(factor * x);
    }
    *reinterpret_cast<uint4*>(&tiles[chunk][{row, column}]) = packed;
  }
}
template <int kThreads, typename Weight>
__device__ void FillWeights(Weight* tiles, int chunks, const void* kernel, Float dtype,
                            int first_column, int stride, float factor) {
  using T = typename Weight::T;
  if (dtype == Float::kF32) {
    FillWeights<kThreads>(tiles, chunks, static_cast<const float*>(kernel) + first_column, stride,
                          factor);
  } else {
    FillWeights<kThreads>(tiles, chunks, static_cast<const T*>(kernel) + first_column, stride,
                          factor);
  }
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
