// Gradients of the gated projection of triangle multiplication, for sm_90a.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "triangle_multiplication/project_sm90.h"

namespace genie {

// With a, b of GatedProjection and their gradients da, db; every gradient of a parameter is
// float32 and one for each batch entry.
struct GatedProjectionBackward {
  GatedProjection forward;           // its inputs; a and b are not read
  const void *da, *db;               // [B, Hm, Ip, Kp] in z's dtype
  void* dz;                          // [B, I, K, C] in z's dtype
  bool adds;                         // to what dz holds
  float *d_scale, *d_bias;           // [B, C]
  float *d_proj, *d_gate;            // [B, C, 2 Hm]
  float *d_proj_bias, *d_gate_bias;  // [B, 2 Hm]
  float* partials;                   // [B, P, 2, C + 1, 2 Hm], overwritten
  int64_t parts;                     // P, at least 1: how many blocks share one slice's pairs
};

// Launches on `stream`. Serves C of 64 and 128, Hm of 64, 128 and 256, z in bf16 and fp16, tensors
// at multiples of 16 bytes; for anything else it returns cudaErrorInvalidValue.
cudaError_t Launch(const GatedProjectionBackward& projection, cudaStream_t stream);

// Its second half: sums the partials and writes the gradients of all parameters.
cudaError_t LaunchReduction(const GatedProjectionBackward& projection, cudaStream_t stream);

}  // namespace genie
