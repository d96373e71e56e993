// Persistent blocks whose weights stay in shared memory: how these get there, the phases of rings
// of tiles, and the launch.
#pragma once

#include <type_traits>

#include "floats.h"
#include "kittens.cuh"

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

// Fills `count` tiles by all threads: tile n with the block of a matrix that source(n) points to
// and whose rows are `stride` apart, each element w being f(w, n, row, column).
template <int kThreads, typename Weight, typename F, typename Source>
__device__ void FillWeights(Weight* tiles, int count, int stride, F&& f, Source&& source) {
  using T = typename Weight::T;
  constexpr int kVectors = Weight::num_elements / 8, kRowVectors = Weight::cols / 8;
#pragma unroll 4
  for (int i = threadIdx.x; i < count * kVectors; i += kThreads) {
    const int n = i / kVectors, row = i % kVectors / kRowVectors, column = i % kRowVectors * 8;
    float w[8];
    LoadEight(w, source(n) + row * stride + column);
    uint4 packed;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      reinterpret_cast<T*>(&packed)[j] =
          kittens::base_types::convertor<T, float>::convert(f(w[j], n, row, column + j));
    }
    *reinterpret_cast<uint4*>(&tiles[n][{row, column}]) = packed;
  }
}

// The same with all elements times `factor`.
template <int kThreads, typename Weight, typename Source>
__device__ void FillWeights(Weight* tiles, int count, int stride, float factor, Source&& source) {
  FillWeights<kThreads>(
      tiles, count, stride, [&](float w, int, int, int) { return factor * w; }, source);
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

// Tensors are described to kernels as what may be written.
template <typename T>
T* Data(const void* pointer) {
  return static_cast<T*>(const_cast<void*>(pointer));
}

// Calls f(N) for the N equal to n, as a constant; any other n is served by nothing.
template <int... Ns, typename F>
cudaError_t ForSize(int n, F&& f) {
  cudaError_t status = cudaErrorInvalidValue;
  ((n == Ns && (status = f(std::integral_constant<int, Ns>{}), true)) || ...);
  return status;
}

// Lets `kernel` use `shared` bytes and counts the device's processors.
template <typename Kernel>
cudaError_t Prepare(Kernel kernel, int shared, int* processors) {
  int device;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
}

}  // namespace genie
