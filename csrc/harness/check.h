// What the harnesses share: checked CUDA calls and inputs that both sides compute from an index.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

inline void Check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(status));
  std::exit(2);
}

// Roughly normal with variance 1.33, the same bits on host and device.
__host__ __device__ inline float Draw(uint32_t seed, uint64_t index) {
  uint64_t x = (index + 1) * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ x >> 27) * 0x94D049BB133111EBull;
  const uint32_t bits = static_cast<uint32_t>(x >> 32);
  const int sum = (bits & 255) + (bits >> 8 & 255) + (bits >> 16 & 255) + (bits >> 24);
  return static_cast<float>(sum - 510) / 128.f;
}

template <typename T>
__host__ __device__ inline T Round(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}
__host__ __device__ inline float Widen(float x) { return x; }
__host__ __device__ inline float Widen(__half x) { return __half2float(x); }
__host__ __device__ inline float Widen(__nv_bfloat16 x) { return __bfloat162float(x); }
