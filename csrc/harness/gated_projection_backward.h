// One problem of the gated projection's backward: inputs on the device, a checked run, its time.
#pragma once

#include <string>

#include "harness/gated_projection.h"
#include "triangle_multiplication/project_backward_sm90.h"

struct BackwardCase {
  Case forward;
  bool adds = true;
  int64_t parts = 0;  // 0: what the op would ask for
  int64_t all_parts() const {
    if (parts) return parts;
    const int64_t tiles = forward.rows * ((forward.columns + 63) / 64);
    const int64_t members = forward.hidden == 64 ? 1 : 2;
    return std::clamp<int64_t>(tiles / 2, 1, std::max<int64_t>(1, 132 / members / forward.batch));
  }
};

// What the reference keeps of every pair, in float64; `coarse` rounds to T after every step.
struct Reference {
  bool coarse;
  double *x, *unit, *dx, *dz;         // [pairs, C]
  double *dp, *ds;                    // [pairs, 2 Hm]
  double *d_proj, *d_gate;            // [B, C, 2 Hm]
  double *d_proj_bias, *d_gate_bias;  // [B, 2 Hm]
  double *d_scale, *d_bias;           // [B, C]
};

template <typename T>
__device__ double Low(const Reference& r, double x) {
  return r.coarse ? double{Widen(Round<T>(static_cast<float>(x)))} : x;
}

template <typename T>
__device__ double Kernel(const Reference& r, const genie::GatedProjection& p, const void* kernel,
                         int64_t at) {
  if (p.kernel_dtype != Float::kF32) return Widen(static_cast<const T*>(kernel)[at]);
  return Low<T>(r, static_cast<const float*>(kernel)[at]);
}

__device__ inline double ThreadsSum(double x) {
  __shared__ double sums[128];
  __syncthreads();
  sums[threadIdx.x] = x;
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < 128; ++i) sum += sums[i];
  return sum;
}

// 128 threads a pair.
template <typename T>
__global__ void ReferencePairs(Reference r, genie::GatedProjectionBackward given, Mask mask,
                               const T* dz_in) {
  __shared__ double x[256], dx[256], dp[512], ds[512];
  const genie::GatedProjection& p = given.forward;
  const int channels = p.channels, width = 2 * p.hidden;
  for (int64_t pair = blockIdx.x; pair < p.batch * p.rows * p.columns; pair += gridDim.x) {
    const bool valid = Valid(mask, pair);
    const T* z = static_cast<const T*>(p.z) + pair * channels;
    double sum = 0, square = 0;
    for (int c = threadIdx.x; c < channels; c += 128) sum += valid ? Widen(z[c]) : 0;
    const double mean = ThreadsSum(sum) / channels;
    for (int c = threadIdx.x; c < channels; c += 128) {
      const double centred = (valid ? Widen(z[c]) : 0) - mean;
      square += centred * centred;
    }
    const double scale = 1 / sqrt(ThreadsSum(square) / channels + double{p.epsilon});
    for (int c = threadIdx.x; c < channels; c += 128) {
      const double unit = ((valid ? Widen(z[c]) : 0) - mean) * scale;
      r.unit[pair * channels + c] = unit;
      r.x[pair * channels + c] = x[c] = Low<T>(r, unit * p.norm_scale[c] + p.norm_bias[c]);
    }
    __syncthreads();
    const int64_t column = pair % p.columns, row = pair / p.columns % p.rows;
    const int64_t batch = pair / p.columns / p.rows;
    for (int h = threadIdx.x; h < width; h += 128) {
      double proj = 0, gate = 0;
      for (int c = 0; c < channels; ++c) {
        proj += x[c] * Kernel<T>(r, p, p.proj_kernel, int64_t{c} * width + h);
        gate += x[c] * Kernel<T>(r, p, p.gate_kernel, int64_t{c} * width + h);
      }
      proj = Low<T>(r, proj), gate = Low<T>(r, gate);
      if (p.proj_bias) proj = Low<T>(r, proj + p.proj_bias[h]);
      if (p.gate_bias) gate = Low<T>(r, gate + p.gate_bias[h]);
      const double open = Low<T>(r, 1 / (1 + exp(-gate)));
      const T* from = static_cast<const T*>(h < p.hidden ? given.da : given.db);
      const double d =
          valid ? double{Widen(from[((batch * p.hidden + h % p.hidden) * p.rows_padded + row) *
                                        p.columns_padded +
                                    column])}
                : 0;
      r.dp[pair * width + h] = dp[h] = Low<T>(r, d * open);
      r.ds[pair * width + h] = ds[h] = Low<T>(r, Low<T>(r, d * proj) * open * (1 - open));
    }
    __syncthreads();
    double mean_dx = 0, along = 0;
    for (int c = threadIdx.x; c < channels; c += 128) {
      double from_proj = 0, from_gate = 0;
      for (int h = 0; h < width; ++h) {
        from_proj += dp[h] * Kernel<T>(r, p, p.proj_kernel, int64_t{c} * width + h);
        from_gate += ds[h] * Kernel<T>(r, p, p.gate_kernel, int64_t{c} * width + h);
      }
      r.dx[pair * channels + c] = dx[c] = Low<T>(r, Low<T>(r, from_proj) + Low<T>(r, from_gate));
      mean_dx += dx[c] * p.norm_scale[c];
      along += dx[c] * p.norm_scale[c] * r.unit[pair * channels + c];
    }
    mean_dx = ThreadsSum(mean_dx) / channels, along = ThreadsSum(along) / channels;
    for (int c = threadIdx.x; c < channels; c += 128) {
      const double unit = r.unit[pair * channels + c];
      const double dz = Low<T>(r, scale * (dx[c] * p.norm_scale[c] - mean_dx - unit * along));
      const double before = dz_in ? Widen(dz_in[pair * channels + c]) : 0;
      r.dz[pair * channels + c] = Low<T>(r, before + (valid ? dz : 0));
    }
    __syncthreads();
  }
}

// grid (C + 1, 2 Hm / 128 rounded up, B), 128 threads; row C sums the columns of dp and ds.
__global__ void ReferenceWeights(Reference r, genie::GatedProjection p) {
  const int width = 2 * p.hidden, h = blockIdx.y * 128 + threadIdx.x, c = blockIdx.x;
  const int64_t batch = blockIdx.z, pairs = p.rows * p.columns;
  if (h >= width) return;
  double proj = 0, gate = 0;
  for (int64_t pair = batch * pairs; pair < (batch + 1) * pairs; ++pair) {
    const double x = c < p.channels ? r.x[pair * p.channels + c] : 1;
    proj += x * r.dp[pair * width + h], gate += x * r.ds[pair * width + h];
  }
  if (c < p.channels) {
    r.d_proj[(batch * p.channels + c) * width + h] = proj;
    r.d_gate[(batch * p.channels + c) * width + h] = gate;
  } else {
    r.d_proj_bias[batch * width + h] = proj, r.d_gate_bias[batch * width + h] = gate;
  }
}

// grid (C, B), 128 threads.
__global__ void ReferenceNorm(Reference r, genie::GatedProjection p) {
  const int64_t c = blockIdx.x, batch = blockIdx.y, pairs = p.rows * p.columns;
  double scale = 0, bias = 0;
  for (int64_t pair = batch * pairs + threadIdx.x; pair < (batch + 1) * pairs; pair += 128) {
    const double dx = r.dx[pair * p.channels + c];
    scale += dx * r.unit[pair * p.channels + c], bias += dx;
  }
  scale = ThreadsSum(scale), bias = ThreadsSum(bias);
  if (threadIdx.x == 0) r.d_scale[batch * p.channels + c] = scale;
  if (threadIdx.x == 0) r.d_bias[batch * p.channels + c] = bias;
}

// Adds ||got - want||^2 and ||want||^2 to sums; what is not finite is far from anything.
template <typename Got>
__global__ void Distance(const Got* got, const double* want, int64_t size, double* sums) {
  double wrong = 0, norm = 0;
  for (int64_t i = int64_t{blockIdx.x} * 128 + threadIdx.x; i < size; i += gridDim.x * 128) {
    double difference;
    if constexpr (sizeof(Got) == 8) {
      difference = got[i] - want[i];
    } else {
      difference = Widen(got[i]) - want[i];
    }
    wrong += isfinite(difference) ? difference * difference : 1e30;
    norm += want[i] * want[i];
  }
  atomicAdd(&sums[0], wrong), atomicAdd(&sums[1], norm);
}

template <typename T>
__global__ void FillGradient(T* to, int64_t rows, int64_t columns, int64_t rows_padded,
                             int64_t padded, int64_t size, uint32_t seed, float scale) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += step) {
    const bool inside = i % padded < columns && i / padded % rows_padded < rows;
    to[i] = Round<T>(inside ? scale * Draw(seed, i) : 0.f);
  }
}
