// One problem of the attention backward: inputs on the device, a checked run and its time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "harness/device.h"
#include "triangle_attention/attend_backward_sm90.h"

enum class Mask { kNone, kRandom, kPadded, kEmpty };

struct Case {
  int64_t batch, rows, queries, keys;
  int heads, dim;
  Mask mask = Mask::kRandom;
  float bias = 1;       // amplitude; 0 is no bias
  float sharp = 1;      // amplitude of q
  float upstream = 1;   // amplitude of d_o
  bool folded = false;  // scale and log2 e are in q and the bias
  int chunks = 1;
  int64_t padded() const { return (keys + 7) / 8 * 8; }
  int64_t q_size() const { return batch * rows * queries * heads * dim; }
  int64_t k_size() const { return batch * rows * keys * heads * dim; }
  int64_t bias_size() const { return batch * heads * queries * padded(); }
  __host__ __device__ int64_t row_size() const { return batch * rows * heads * queries; }
  double scale() const { return folded ? 1 : 1.4426950408889634 / std::sqrt(double(dim)); }
  double bias_scale() const { return folded ? 1 : 1.4426950408889634; }
};

__host__ __device__ inline bool Valid(Mask mask, int64_t row, int64_t key, int64_t keys) {
  if (mask == Mask::kNone) return true;
  if (mask == Mask::kEmpty || row % 7 == 3) return false;
  if (mask == Mask::kPadded) return key < (keys * 3 + 4) / 5;
  return Draw(5, row * keys + key) > -1.4f;
}

template <typename T>
__global__ void Fill(T* to, int64_t size, uint32_t seed, float amplitude) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += step) {
    to[i] = Round<T>(amplitude * Draw(seed, i));
  }
}

static __global__ void FillMask(uint8_t* to, int64_t rows, int64_t keys, Mask mask) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < rows * keys; i += step) {
    to[i] = Valid(mask, i / keys, i % keys, keys) ? 1 + i % 7 : 0;
  }
}

// The plain forward in float32, a warp a query: o and lse.
template <typename T>
__global__ void Forward(const T* q, const T* k, const T* v, const T* bias, const uint8_t* mask,
                        T* o, float* lse, Case c, float scale, float bias_scale) {
  const int64_t warps = int64_t{gridDim.x} * blockDim.x / 32;
  const int lane = threadIdx.x % 32;
  for (int64_t n = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32; n < c.row_size();
       n += warps) {
    const int64_t query = n % c.queries, head = n / c.queries % c.heads,
                  row = n / c.queries / c.heads, batch = row / c.rows;
    const T* own = q + ((row * c.queries + query) * c.heads + head) * c.dim;
    const T* biases =
        bias + ((batch * c.heads + head) * c.queries + query) * ((c.keys + 7) / 8 * 8);
    const auto logit = [&](int64_t key) {
      if (!mask[row * c.keys + key]) return -INFINITY;
      const T* other = k + ((row * c.keys + key) * c.heads + head) * c.dim;
      float sum = 0;
      for (int d = 0; d < c.dim; ++d) sum += Widen(own[d]) * Widen(other[d]);
      return sum * scale + (c.bias != 0 ? bias_scale * Widen(biases[key]) : 0.f);
    };
    float peak = -INFINITY, total = 0, sums[64] = {};
    for (int64_t key = lane; key < c.keys; key += 32) peak = fmaxf(peak, logit(key));
    for (int lanes = 16; lanes; lanes /= 2) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, lanes));
    for (int64_t key = lane; key < c.keys; key += 32) {
      const float x = logit(key), weight = x == -INFINITY ? 0.f : exp2f(x - peak);
      total += weight;
      const T* value = v + ((row * c.keys + key) * c.heads + head) * c.dim;
      for (int d = 0; d < c.dim; ++d) sums[d] += weight * Widen(value[d]);
    }
    for (int lanes = 16; lanes; lanes /= 2) {
      total += __shfl_xor_sync(~0u, total, lanes);
      for (int d = 0; d < c.dim; ++d) sums[d] += __shfl_xor_sync(~0u, sums[d], lanes);
    }
    if (lane != 0) continue;
    lse[n] = total > 0 ? (peak + log2f(total)) * 0.69314718f : -INFINITY;
    T* to = o + ((row * c.queries + query) * c.heads + head) * c.dim;
    for (int d = 0; d < c.dim; ++d) to[d] = Round<T>(total > 0 ? sums[d] / total : 0.f);
  }
}

// Squared errors of a gradient, of the 16-bit layer's, and squares of what both should be.
struct Sums {
  double ours = 0, layer = 0, want = 0;
  void Add(double got, double low, double exact) {
    const double wrong = std::isfinite(got) ? got - exact : 1e30;
    ours += wrong * wrong, layer += (low - exact) * (low - exact), want += exact * exact;
  }
  void Add(const Sums& s) { ours += s.ours, layer += s.layer, want += s.want; }
};

// The float64 gradients of one row i and head, query after query, and those of a layer that rounds
// P and dP to 16 bits.
template <typename T>
class Slice {
 public:
  Slice(const Case& c, int64_t batch, int64_t row, int head)
      : c_(c), batch_(batch), any_row_(batch * c.rows + row), head_(head) {
    for (int64_t i = 0; i < c.keys * c.dim; ++i) {
      const int64_t at = ((any_row_ * c.keys + i / c.dim) * c.heads + head) * c.dim + i % c.dim;
      k_.push_back(Value(2, at, 1));
      v_.push_back(Value(3, at, 1));
    }
  }
  static double Low(double x) { return Widen(Round<T>(static_cast<float>(x))); }

  // dS exactly and as the layer has it, P likewise, dq likewise, for one query.
  std::vector<double> ds, low_ds, p, low_p;
  double q[64], d_o[64], dq[64], low_dq[64];
  void Query(int64_t query) {
    const int dim = c_.dim;
    constexpr double kLn2 = 0.6931471805599453;
    for (int d = 0; d < dim; ++d) {
      const int64_t at = ((any_row_ * c_.queries + query) * c_.heads + head_) * dim + d;
      q[d] = Value(1, at, c_.sharp), d_o[d] = Value(4, at, c_.upstream);
      dq[d] = low_dq[d] = 0;
    }
    std::vector<double> dp(c_.keys), low_dp(c_.keys);
    for (auto* x : {&ds, &low_ds, &p, &low_p}) x->assign(c_.keys, 0);
    double peak = -INFINITY, total = 0, delta = 0, low_delta = 0;
    const int64_t biases = ((batch_ * c_.heads + head_) * c_.queries + query) * c_.padded();
    for (int64_t key = 0; key < c_.keys; ++key) {
      double sum = 0;
      for (int d = 0; d < dim; ++d) {
        sum += q[d] * k_[key * dim + d], dp[key] += d_o[d] * v_[key * dim + d];
      }
      low_dp[key] = Low(dp[key]);
      if (!Valid(c_.mask, any_row_, key, c_.keys)) continue;
      p[key] = sum * c_.scale();
      if (c_.bias != 0) p[key] += c_.bias_scale() * Value(6, biases + key, c_.bias);
      peak = std::max(peak, p[key]);
    }
    for (int64_t key = 0; key < c_.keys; ++key) {
      p[key] = Valid(c_.mask, any_row_, key, c_.keys) ? std::exp2(p[key] - peak) : 0;
      total += p[key];
    }
    for (int64_t key = 0; key < c_.keys; ++key) {
      p[key] = total > 0 ? p[key] / total : 0, low_p[key] = Low(p[key]);
      delta += p[key] * dp[key], low_delta += p[key] * low_dp[key];
    }
    for (int64_t key = 0; key < c_.keys; ++key) {
      ds[key] = p[key] * (dp[key] - delta), low_ds[key] = p[key] * (low_dp[key] - low_delta);
      for (int d = 0; d < dim; ++d) {
        dq[d] += c_.scale() * kLn2 * ds[key] * k_[key * dim + d];
        low_dq[d] += c_.scale() * kLn2 * low_ds[key] * k_[key * dim + d];
      }
    }
    for (int d = 0; d < dim; ++d) low_dq[d] = Low(low_dq[d]);
  }

 private:
  static double Value(uint32_t seed, int64_t at, float amplitude) {
    return Widen(Round<T>(amplitude * Draw(seed, at)));
  }
  Case c_;
  int64_t batch_, any_row_;
  int head_;
  std::vector<double> k_, v_;
};

// As many chunks of rows as make whole waves of 132 blocks.
inline int Chunks(int64_t n, int heads) {
  const int64_t tiles = (n + 127) / 128 * ((n + 127) / 128) * heads;
  int best = 1;
  double least = 1e30;
  for (int chunks = 1; chunks <= std::min<int64_t>(n, 16); ++chunks) {
    const double waves = double((tiles * chunks + 131) / 132) / chunks + 0.02 * chunks;
    if (waves < least) least = waves, best = chunks;
  }
  return best;
}
