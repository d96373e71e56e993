// One problem of the gated output: its inputs on the device, a checked run and its time.
#pragma once

#include <algorithm>
#include <cmath>
#include <thread>
#include <vector>

#include "harness/check.h"
#include "triangle_multiplication/output_sm90.h"

using genie::Float;

enum class Mask { kNone, kRandom, kEmpty };

struct Case {
  int64_t batch, rows, columns;
  int channels, hidden;
  Mask mask = Mask::kRandom;
  bool bias = true;
  bool float_weights = true;
  bool residual = true;
  __host__ __device__ int64_t rows_padded() const { return (rows + 7) / 8 * 8; }
  __host__ __device__ int64_t columns_padded() const { return (columns + 7) / 8 * 8; }
  __host__ __device__ int64_t pairs() const { return batch * rows * columns; }
  __host__ __device__ int64_t elements() const { return pairs() * channels; }
  __host__ __device__ int64_t contracted() const {
    return batch * hidden * rows_padded() * columns_padded();
  }
  __host__ __device__ int64_t at(int64_t pair, int h) const {  // of t
    const int64_t column = pair % columns, row = pair / columns % rows;
    const int64_t b = pair / columns / rows;
    return ((b * hidden + h) * rows_padded() + row) * columns_padded() + column;
  }
};

constexpr float kEpsilon = 1e-5f;
constexpr int64_t kGuard = 4096;  // poisoned bytes after the output

__host__ __device__ inline bool Valid(Mask mask, int64_t pair) {
  return mask == Mask::kNone || (mask == Mask::kRandom && Draw(2, pair) > -1.f);
}

// Of every three masked pairs one is finite, one holds NaN and one infinity.
__host__ __device__ inline bool Readable(Mask mask, int64_t pair) {
  return Valid(mask, pair) || pair % 3 == 0;
}

template <typename T>
__host__ __device__ inline float PairValue(int64_t i) {
  return Widen(Round<T>(0.5f + 2 * Draw(1, i)));
}
template <typename T>
__host__ __device__ inline float ContractedValue(int64_t i) {
  const float scale = sizeof(T) == 4 ? 30000.f : 4.f;  // float32 goes beyond fp16
  return Widen(Round<T>(scale * (0.25f + Draw(3, i))));
}

template <typename T>
__global__ void FillPairs(T* z, uint8_t* valid, Case c) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < c.elements(); i += step) {
    const int64_t pair = i / c.channels;
    z[i] = Round<T>(Readable(c.mask, pair) ? PairValue<T>(i) : pair % 3 == 1 ? NAN : INFINITY);
    if (i % c.channels == 0) valid[pair] = Valid(c.mask, pair) ? 1 + pair % 7 : 0;
  }
}

template <typename T>
__global__ void FillContracted(T* t, Case c) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < c.contracted(); i += step) {
    const bool pad =
        i % c.columns_padded() >= c.columns || i / c.columns_padded() % c.rows_padded() >= c.rows;
    t[i] = Round<T>(pad ? 0.f : ContractedValue<T>(i));
  }
}

template <typename T>
__global__ void FillParameter(T* to, int64_t size, uint32_t seed, float scale, float offset) {
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
    to[i] = Round<T>(offset + scale * Draw(seed, i));
  }
}

// Counts elements that differ between two runs.
static __global__ void Inspect(const uint16_t* first, const uint16_t* second, int64_t size,
                               unsigned long long* faults) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += step) {
    if (first[i] != second[i]) atomicAdd(faults, 1ull);
  }
}

// The weights as the host reads them: kernels of projection and gate, their biases, both norms.
struct Weights {
  std::vector<float> kernel[2], bias[2], norm[4];
};

template <typename T>
class Problem {
 public:
  using Contracted = std::conditional_t<std::is_same_v<T, __half>, float, T>;

  Problem(const Case& c, int copies) : c_(c), copies_(copies) {
    Allocate(&z_, c.elements() * sizeof(T) * copies);
    Allocate(&t_, c.contracted() * sizeof(Contracted) * copies);
    Allocate(&mask_, c.pairs());
    Allocate(&out_, c.elements() * sizeof(T) * copies + kGuard);
    for (auto& k : kernel_) Allocate(&k, 256 * 256 * sizeof(float));
    for (auto& v : vector_) Allocate(&v, 256 * sizeof(float));
    for (int i = 0; i < copies; ++i) {
      FillPairs<<<4096, 256>>>(z_ + i * c.elements(), mask_, c);
      FillContracted<<<4096, 256>>>(t_ + i * c.contracted(), c);
    }
    for (int i = 0; i < 2; ++i) {
      const int64_t inputs = i == 0 ? c.hidden : c.channels, size = inputs * c.channels;
      const float scale = 1 / std::sqrt(float(inputs));
      if (c.float_weights) {
        FillParameter<<<1, 1024>>>(reinterpret_cast<float*>(kernel_[i]), size, 10 + i, scale, 0);
      } else {
        FillParameter<<<1, 1024>>>(reinterpret_cast<T*>(kernel_[i]), size, 10 + i, scale, 0);
      }
    }
    for (int i = 0; i < 6; ++i) {
      FillParameter<<<1, 256>>>(vector_[i], 256, 20 + i, 0.3f, i == 2 || i == 4 ? 1.f : 0.f);
    }
    Check(cudaDeviceSynchronize(), "fill");
  }
  ~Problem() {
    for (void* p : allocations_) cudaFree(p);
  }

  genie::GatedOutput Arguments(int copy) const {
    const Float dtype = std::is_same_v<T, __half> ? Float::kF16 : Float::kBf16;
    genie::GatedOutput p = {};
    p.z = z_ + copy * c_.elements(), p.t = t_ + copy * c_.contracted();
    p.out = out_ + copy * c_.elements(), p.dtype = dtype;
    p.mask = c_.mask == Mask::kNone ? nullptr : mask_;
    p.proj_kernel = kernel_[0], p.gate_kernel = kernel_[1];
    p.kernel_dtype = c_.float_weights ? Float::kF32 : dtype;
    if (c_.bias) p.proj_bias = vector_[0], p.gate_bias = vector_[1];
    p.norm_in_scale = vector_[2], p.norm_in_bias = vector_[3];
    p.norm_out_scale = vector_[4], p.norm_out_bias = vector_[5];
    p.batch = c_.batch, p.rows = c_.rows, p.columns = c_.columns;
    p.rows_padded = c_.rows_padded(), p.columns_padded = c_.columns_padded();
    p.channels = c_.channels, p.hidden = c_.hidden;
    p.residual = c_.residual, p.epsilon = kEpsilon;
    return p;
  }

  // Runs twice into poisoned outputs; returns whether all is well and prints a line.
  bool Verify() {
    const int64_t bytes = c_.elements() * sizeof(T);
    T* kept;
    Allocate(&kept, bytes);
    bool guarded = true;
    for (int run = 0; run < 2; ++run) {
      Check(cudaMemset(out_, 0xFF, bytes + kGuard), "poison");
      Check(genie::Launch(Arguments(0), nullptr), "launch");
      Check(cudaDeviceSynchronize(), "run");
      for (uint8_t x : ToHost(reinterpret_cast<uint8_t*>(out_) + bytes, kGuard)) {
        guarded &= x == 0xFF;
      }
      if (run == 0) Check(cudaMemcpy(kept, out_, bytes, cudaMemcpyDeviceToDevice), "keep");
    }
    unsigned long long* faults;
    Allocate(&faults, 8);
    Check(cudaMemset(faults, 0, 8), "faults");
    Inspect<<<4096, 256>>>(reinterpret_cast<uint16_t*>(out_), reinterpret_cast<uint16_t*>(kept),
                           c_.elements(), faults);
    const auto differ = ToHost(faults, 1)[0];
    double error, yardstick;
    Compare(&error, &yardstick);
    const bool good = guarded && !differ && error <= 1.05 * yardstick;
    std::printf(
        "%s B=%-2ld I=%-5ld J=%-5ld C=%-4d Hm=%-4d mask=%-6s bias=%d weights=%s residual=%d  "
        "error %.3e  16-bit layer %.3e  runs differ %llu  guard %s  %s\n",
        std::is_same_v<T, __half> ? "f16 " : "bf16", c_.batch, c_.rows, c_.columns, c_.channels,
        c_.hidden,
        c_.mask == Mask::kNone     ? "none"
        : c_.mask == Mask::kRandom ? "random"
                                   : "empty",
        c_.bias, c_.float_weights ? "f32" : "16b", c_.residual, error, yardstick, differ,
        guarded ? "ok" : "BROKEN", good ? "pass" : "FAIL");
    return good;
  }

  // Median milliseconds of a call, over inputs and outputs that together outgrow L2.
  float Time() {
    constexpr int kRepeats = 15, kCalls = 8;
    cudaEvent_t start, stop;
    cudaEventCreate(&start);
    cudaEventCreate(&stop);
    std::vector<float> times;
    for (int r = -3; r < kRepeats; ++r) {
      cudaEventRecord(start);
      for (int i = 0; i < kCalls; ++i) {
        Check(genie::Launch(Arguments(i % copies_), nullptr), "launch");
      }
      cudaEventRecord(stop);
      Check(cudaEventSynchronize(stop), "time");
      float milliseconds;
      cudaEventElapsedTime(&milliseconds, start, stop);
      if (r >= 0) times.push_back(milliseconds / kCalls);
    }
    std::sort(times.begin(), times.end());
    return times[kRepeats / 2];
  }

 protected:
  template <typename P>
  void Allocate(P** to, int64_t bytes) {
    Check(cudaMalloc(reinterpret_cast<void**>(to), std::max<int64_t>(bytes, 16)), "cudaMalloc");
    allocations_.push_back(*to);
  }
  template <typename P>
  std::vector<P> ToHost(const P* from, int64_t size) {
    std::vector<P> to(size);
    Check(cudaMemcpy(to.data(), from, size * sizeof(P), cudaMemcpyDeviceToHost), "to host");
    return to;
  }

  Weights ToHost() {
    Weights w;
    for (int i = 0; i < 2; ++i) {
      const int64_t size = int64_t{i == 0 ? c_.hidden : c_.channels} * c_.channels;
      if (c_.float_weights) {
        w.kernel[i] = ToHost(reinterpret_cast<float*>(kernel_[i]), size);
      } else {
        for (T x : ToHost(reinterpret_cast<T*>(kernel_[i]), size)) w.kernel[i].push_back(Widen(x));
      }
      w.bias[i] = ToHost(vector_[i], 256);
    }
    for (int i = 0; i < 4; ++i) w.norm[i] = ToHost(vector_[2 + i], 256);
    return w;
  }

  // Relative errors against float64 of the kernel and of a layer that rounds after every step.
  void Compare(double* error, double* yardstick) {
    const int samples = std::min<int64_t>(c_.pairs(), 600);
    const Weights weights = ToHost();
    std::vector<int64_t> pairs(samples);
    std::vector<std::vector<T>> got(samples);
    for (int i = 0; i < samples; ++i) {  // both ends and what lies between
      pairs[i] = samples == c_.pairs() ? i
                 : i < 100             ? i
                 : i < 200             ? c_.pairs() - 1 - (i - 100)
                                       : (uint64_t)(i * 0x9E3779B97F4A7C15ull) % c_.pairs();
      got[i] = ToHost(out_ + pairs[i] * c_.channels, c_.channels);
    }
    constexpr int kThreads = 16;
    double sums[kThreads][3] = {}, total[3] = {};
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        for (int i = t; i < samples; i += kThreads) ComparePair(pairs[i], got[i], weights, sums[t]);
      });
    }
    for (auto& thread : threads) thread.join();
    for (auto& s : sums) {
      for (int i = 0; i < 3; ++i) total[i] += s[i];
    }
    *error = std::sqrt(total[0] / total[2]);
    *yardstick = std::sqrt(total[1] / total[2]);
  }

  static double Low(double x) { return Widen(Round<T>(static_cast<float>(x))); }

  // Layer norm of v in place, and rounded.
  static std::vector<double> Normalize(std::vector<double>& v, const std::vector<float>& scale,
                                       const std::vector<float>& bias) {
    double mean = 0, variance = 0;
    for (double x : v) mean += x / v.size();
    for (double x : v) variance += (x - mean) * (x - mean) / v.size();
    std::vector<double> rounded(v.size());
    for (size_t i = 0; i < v.size(); ++i) {
      v[i] = (v[i] - mean) / std::sqrt(variance + double{kEpsilon}) * scale[i] + bias[i];
      rounded[i] = Low(v[i]);
    }
    return rounded;
  }

  void ComparePair(int64_t pair, const std::vector<T>& got, const Weights& w, double* sums) const {
    const int channels = c_.channels, hidden = c_.hidden;
    std::vector<double> z(channels), in[2];  // in: of projection and gate
    for (int c = 0; c < channels; ++c) {
      z[c] = Readable(c_.mask, pair) ? PairValue<T>(pair * channels + c) : 0;
    }
    for (int h = 0; h < hidden; ++h) in[0].push_back(ContractedValue<Contracted>(c_.at(pair, h)));
    in[1] = z;
    const std::vector<double> rounded[2] = {Normalize(in[0], w.norm[2], w.norm[3]),
                                            Normalize(in[1], w.norm[0], w.norm[1])};
    for (int c = 0; c < channels; ++c) {
      double exact[2], coarse[2];
      for (int i = 0; i < 2; ++i) {
        double sum = 0, rounded_sum = 0;
        for (size_t k = 0; k < in[i].size(); ++k) {
          const double weight = w.kernel[i][k * channels + c];
          sum += in[i][k] * weight;
          rounded_sum += rounded[i][k] * Low(weight);
        }
        const double bias = c_.bias ? w.bias[i][c] : 0;
        exact[i] = sum + bias;
        coarse[i] = c_.bias ? Low(Low(rounded_sum) + bias) : Low(rounded_sum);
      }
      double want = exact[0] / (1 + std::exp(-exact[1]));
      double layer = Low(coarse[0] * Low(1 / (1 + std::exp(-coarse[1]))));
      if (c_.residual) want += z[c], layer = Low(z[c] + layer);
      const double wrong = std::isfinite(Widen(got[c])) ? Widen(got[c]) - want : 1e30;
      sums[0] += wrong * wrong;
      sums[1] += (layer - want) * (layer - want);
      sums[2] += want * want;
    }
  }

  Case c_;
  int copies_;
  T* z_;
  Contracted* t_;
  uint8_t* mask_;
  T* out_;
  char* kernel_[2];
  float* vector_[6];
  std::vector<void*> allocations_;
};
