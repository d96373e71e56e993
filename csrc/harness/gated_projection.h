// One problem of the gated projection: its inputs on the device, a checked run and its time.
#pragma once

#include <algorithm>
#include <cmath>
#include <thread>
#include <vector>

#include "harness/check.h"
#include "triangle_multiplication/project_sm90.h"

using genie::Float;

enum class Mask { kNone, kRandom, kEmpty };

struct Case {
  int64_t batch, rows, columns;
  int channels, hidden;
  Mask mask = Mask::kRandom;
  bool bias = true;
  bool float_weights = true;
  int64_t extra = 0;  // columns of padding beyond the next multiple of 8
  __host__ __device__ int64_t padded() const { return (columns + 7) / 8 * 8 + extra; }
  __host__ __device__ int64_t rows_padded() const { return (rows + 7) / 8 * 8; }
  __host__ __device__ int64_t pairs() const { return batch * rows * columns; }
  __host__ __device__ int64_t outputs() const { return batch * hidden * rows_padded() * padded(); }
};

constexpr float kEpsilon = 1e-5f;
constexpr int64_t kGuard = 4096;  // poisoned bytes after each output

__host__ __device__ inline bool Valid(Mask mask, int64_t pair) {
  return mask == Mask::kNone || (mask == Mask::kRandom && Draw(2, pair) > -1.f);
}

// A masked pair holds NaN or infinity.
template <typename T>
__global__ void FillPairs(T* z, uint8_t* valid, int64_t pairs, int channels, Mask mask) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < pairs * channels;
       i += step) {
    const int64_t pair = i / channels;
    const bool is_valid = Valid(mask, pair);
    z[i] = Round<T>(is_valid ? 0.5f + 2 * Draw(1, i) : pair % 2 ? NAN : INFINITY);
    if (i % channels == 0) valid[pair] = is_valid ? 1 + pair % 7 : 0;
  }
}

template <typename T>
__global__ void FillParameter(T* to, int64_t size, uint32_t seed, float scale, float offset) {
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
    to[i] = Round<T>(offset + scale * Draw(seed, i));
  }
}

// Counts elements that should be exact zeros and are not, or that differ between two runs.
static __global__ void Inspect(const uint16_t* first, const uint16_t* second, Case c,
                               unsigned long long* faults) {
  const int64_t padded = c.padded(), step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < c.outputs(); i += step) {
    const int64_t column = i % padded, row = i / padded % c.rows_padded();
    const int64_t batch = i / padded / c.rows_padded() / c.hidden;
    const int64_t pair = (batch * c.rows + row) * c.columns + column;
    const bool zero = column >= c.columns || row >= c.rows || !Valid(c.mask, pair);
    if (zero && first[i] != 0) atomicAdd(&faults[0], 1ull);
    if (first[i] != second[i]) atomicAdd(&faults[1], 1ull);
  }
}

template <typename T>
__global__ void Gather(const T* a, const T* b, const int64_t* pairs, float* to, Case c) {
  const int64_t pair = pairs[blockIdx.x], column = pair % c.columns,
                row = pair / c.columns % c.rows;
  const int64_t batch = pair / c.columns / c.rows;
  for (int h = threadIdx.x; h < 2 * c.hidden; h += blockDim.x) {
    const T* from = h < c.hidden ? a : b;
    const int64_t at =
        ((batch * c.hidden + h % c.hidden) * c.rows_padded() + row) * c.padded() + column;
    to[int64_t{blockIdx.x} * 2 * c.hidden + h] = Widen(from[at]);
  }
}

template <typename T>
class Problem {
 public:
  Problem(const Case& c, int copies) : c_(c), copies_(copies) {
    const int64_t weights = int64_t{c.channels} * 2 * c.hidden;
    Allocate(&z_, c.pairs() * c.channels * sizeof(T) * copies);
    Allocate(&mask_, c.pairs());
    for (auto& out : out_) Allocate(&out, c.outputs() * sizeof(T) * copies + kGuard);
    for (auto& w : weight_) Allocate(&w, weights * sizeof(float));
    for (auto& v : vector_) Allocate(&v, 2 * 256 * sizeof(float));
    for (int i = 0; i < copies; ++i) {
      FillPairs<<<4096, 256>>>(z_ + i * c.pairs() * c.channels, mask_, c.pairs(), c.channels,
                               c.mask);
    }
    const float scale = 1 / std::sqrt(float(c.channels));
    for (int i = 0; i < 2; ++i) {
      if (c.float_weights) {
        FillParameter<<<1, 1024>>>(reinterpret_cast<float*>(weight_[i]), weights, 10 + i, scale, 0);
      } else {
        FillParameter<<<1, 1024>>>(reinterpret_cast<T*>(weight_[i]), weights, 10 + i, scale, 0);
      }
    }
    for (int i = 0; i < 4; ++i) {
      FillParameter<<<1, 512>>>(vector_[i], 512, 20 + i, 0.3f, i == 0 ? 1.f : 0.f);
    }
    Check(cudaDeviceSynchronize(), "fill");
  }
  ~Problem() {
    for (void* p : allocations_) cudaFree(p);
  }

  genie::GatedProjection Arguments(int copy) const {
    const Float dtype = std::is_same_v<T, __half> ? Float::kF16 : Float::kBf16;
    const int64_t in = c_.pairs() * c_.channels, out = c_.outputs();
    genie::GatedProjection p = {};
    p.z = z_ + copy * in, p.a = out_[0] + copy * out, p.b = out_[1] + copy * out, p.dtype = dtype;
    p.mask = c_.mask == Mask::kNone ? nullptr : mask_;
    p.norm_scale = vector_[0], p.norm_bias = vector_[1], p.epsilon = kEpsilon;
    p.proj_kernel = weight_[0], p.gate_kernel = weight_[1];
    p.kernel_dtype = c_.float_weights ? Float::kF32 : dtype;
    if (c_.bias) p.proj_bias = vector_[2], p.gate_bias = vector_[3];
    p.batch = c_.batch, p.rows = c_.rows, p.columns = c_.columns, p.columns_padded = c_.padded();
    p.rows_padded = c_.rows_padded();
    p.channels = c_.channels, p.hidden = c_.hidden;
    return p;
  }

  // Runs twice into differently poisoned outputs; returns whether all is well and prints a line.
  bool Verify() {
    const int64_t bytes = c_.outputs() * sizeof(T);
    T* kept[2];
    for (auto& k : kept) Allocate(&k, bytes);
    bool guarded = true;
    for (int run = 0; run < 2; ++run) {
      for (T* out : out_) Check(cudaMemset(out, 0xFF, bytes + kGuard), "poison");
      Check(genie::Launch(Arguments(0), nullptr), "launch");
      Check(cudaDeviceSynchronize(), "run");
      for (int i = 0; i < 2; ++i) {
        std::vector<uint8_t> guard(kGuard);
        Check(cudaMemcpy(guard.data(), reinterpret_cast<char*>(out_[i]) + bytes, kGuard,
                         cudaMemcpyDeviceToHost),
              "guard");
        guarded &= std::all_of(guard.begin(), guard.end(), [](uint8_t x) { return x == 0xFF; });
        if (run == 0) Check(cudaMemcpy(kept[i], out_[i], bytes, cudaMemcpyDeviceToDevice), "keep");
      }
    }
    unsigned long long* device_faults;
    Allocate(&device_faults, 16);
    Check(cudaMemset(device_faults, 0, 16), "faults");
    for (int i = 0; i < 2; ++i) {
      Inspect<<<4096, 256>>>(reinterpret_cast<uint16_t*>(out_[i]),
                             reinterpret_cast<uint16_t*>(kept[i]), c_, device_faults);
    }
    unsigned long long faults[2];
    Check(cudaMemcpy(faults, device_faults, 16, cudaMemcpyDeviceToHost), "faults");
    double error, yardstick;
    Compare(&error, &yardstick);
    const bool good = guarded && !faults[0] && !faults[1] && error <= 1.05 * yardstick;
    std::printf(
        "%s B=%-2ld I=%-5ld K=%-5ld Kp=%-5ld C=%-4d Hm=%-4d mask=%-6s bias=%d weights=%s  "
        "error %.3e  16-bit layer %.3e  not zero %llu  runs differ %llu  guard %s  %s\n",
        std::is_same_v<T, __half> ? "f16 " : "bf16", c_.batch, c_.rows, c_.columns, c_.padded(),
        c_.channels, c_.hidden,
        c_.mask == Mask::kNone     ? "none"
        : c_.mask == Mask::kRandom ? "random"
                                   : "empty",
        c_.bias, c_.float_weights ? "f32" : "16b", error, yardstick, faults[0], faults[1],
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

 private:
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

  // Relative errors against float64 of the kernel and of a layer that rounds after every step.
  void Compare(double* error, double* yardstick) {
    const int samples = std::min<int64_t>(c_.pairs(), 600), width = 2 * c_.hidden;
    std::vector<int64_t> pairs(samples);
    for (int i = 0; i < samples; ++i) {  // both ends and what lies between
      pairs[i] = samples == c_.pairs() ? i
                 : i < 100             ? i
                 : i < 200             ? c_.pairs() - 1 - (i - 100)
                                       : (uint64_t)(i * 0x9E3779B97F4A7C15ull) % c_.pairs();
    }
    int64_t* device_pairs;
    float* gathered;
    Allocate(&device_pairs, samples * sizeof(int64_t));
    Allocate(&gathered, int64_t{samples} * width * sizeof(float));
    Check(cudaMemcpy(device_pairs, pairs.data(), samples * 8, cudaMemcpyHostToDevice), "pairs");
    Gather<<<samples, 128>>>(out_[0], out_[1], device_pairs, gathered, c_);
    const auto got = ToHost(gathered, int64_t{samples} * width);
    std::vector<std::vector<float>> weights(2), vectors(4);
    for (int i = 0; i < 2; ++i) {
      const int64_t size = int64_t{c_.channels} * width;
      if (c_.float_weights) {
        weights[i] = ToHost(reinterpret_cast<float*>(weight_[i]), size);
      } else {
        for (T w : ToHost(reinterpret_cast<T*>(weight_[i]), size)) weights[i].push_back(Widen(w));
      }
    }
    for (int i = 0; i < 4; ++i) vectors[i] = ToHost(vector_[i], 512);

    constexpr int kThreads = 16;
    double sums[kThreads][3] = {};
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        for (int i = t; i < samples; i += kThreads) {
          ComparePair(pairs[i], &got[int64_t{i} * width], weights, vectors, sums[t]);
        }
      });
    }
    for (auto& thread : threads) thread.join();
    double total[3] = {};
    for (auto& s : sums) {
      for (int i = 0; i < 3; ++i) total[i] += s[i];
    }
    *error = total[2] > 0 ? std::sqrt(total[0] / total[2]) : std::sqrt(total[0]);
    *yardstick = total[2] > 0 ? std::sqrt(total[1] / total[2]) : 0;
  }

  void ComparePair(int64_t pair, const float* got, const std::vector<std::vector<float>>& weights,
                   const std::vector<std::vector<float>>& vectors, double* sums) const {
    const int channels = c_.channels, width = 2 * c_.hidden;
    const auto low = [](double x) { return double{Widen(Round<T>(static_cast<float>(x)))}; };
    std::vector<double> x(channels), rounded(channels);
    double mean = 0, variance = 0;
    for (int c = 0; c < channels; ++c) {
      x[c] = Widen(Round<T>(0.5f + 2 * Draw(1, pair * channels + c)));
      mean += x[c] / channels;
    }
    for (int c = 0; c < channels; ++c) variance += (x[c] - mean) * (x[c] - mean) / channels;
    for (int c = 0; c < channels; ++c) {
      x[c] = (x[c] - mean) / std::sqrt(variance + double{kEpsilon}) * vectors[0][c] + vectors[1][c];
      rounded[c] = low(x[c]);
    }
    const bool valid = Valid(c_.mask, pair);
    for (int h = 0; h < width; ++h) {
      double exact[2], coarse[2];
      for (int i = 0; i < 2; ++i) {
        const double bias = c_.bias ? vectors[2 + i][h] : 0;
        double sum = 0, rounded_sum = 0;
        for (int c = 0; c < channels; ++c) {
          const double w = weights[i][int64_t{c} * width + h];
          sum += x[c] * w;
          rounded_sum += rounded[c] * low(w);
        }
        exact[i] = sum + bias;
        coarse[i] = c_.bias ? low(low(rounded_sum) + low(bias)) : low(rounded_sum);
      }
      const double want = valid ? exact[0] / (1 + std::exp(-exact[1])) : 0;
      const double layer = valid ? low(coarse[0] * low(1 / (1 + std::exp(-coarse[1])))) : 0;
      const double wrong = std::isfinite(got[h]) ? got[h] - want : 1e30;
      sums[0] += wrong * wrong;
      sums[1] += (layer - want) * (layer - want);
      sums[2] += want * want;
    }
  }

  Case c_;
  int copies_;
  T* z_;
  uint8_t* mask_;
  T* out_[2];
  char* weight_[2];
  float* vector_[4];
  std::vector<void*> allocations_;
};
