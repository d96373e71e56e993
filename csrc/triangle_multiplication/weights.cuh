// A weight by its place.
#pragma once

#include "kittens.cuh"
#include "triangle_multiplication/project_sm90.h"

namespace genie {

// Element `at` of a kernel as float.
__device__ inline float WeightAt(const void* kernel, Float kernel_dtype, Float dtype, int64_t at) {
  if (kernel_dtype == Float::kF32) return static_cast<const float*>(kernel)[at];
  if (dtype == Float::kBf16) return __bfloat162float(static_cast<const kittens::bf16*>(kernel)[at]);
  return __half2float(static_cast<const kittens::half*>(kernel)[at]);
}

}  // namespace genie
