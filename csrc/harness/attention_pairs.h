// What the harnesses of the stages around the attention core share: a case, its pairs and masks on
// both sides, device memory with guards, and time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "floats.h"
#include "harness/check.h"

using genie::Float;

enum class Node { kStarting, kEnding, kUnswapped };  // the last: ending, with the bias as z
enum class Mask { kNone, kRandom, kEmpty };

struct Case {
  int64_t batch, rows, columns;
  int channels, heads, width;
  Node node = Node::kStarting;
  Mask mask = Mask::kRandom;
  bool bias = true;
  bool residual = false;
  bool float_weights = true;
  __host__ __device__ int hidden() const { return heads * width; }
  __host__ __device__ int64_t pairs() const { return batch * rows * columns; }
  __host__ __device__ bool ending() const { return node != Node::kStarting; }
  // Where pair `p` of z stands in attention order.
  __host__ __device__ int64_t attended(int64_t p) const {
    if (!ending()) return p;
    const int64_t column = p % columns, row = p / columns % rows, b = p / columns / rows;
    return (b * columns + column) * rows + row;
  }
};

constexpr float kEpsilon = 1e-5f;
constexpr int64_t kGuard = 4096;  // poisoned bytes after each output

__host__ __device__ inline bool Valid(Mask mask, int64_t pair) {
  return mask == Mask::kNone || (mask == Mask::kRandom && Draw(2, pair) > -1.f);
}
// A masked pair is like any other, or holds NaN throughout, or infinity in one channel.
__host__ __device__ inline bool Garbage(Mask mask, int64_t pair) {
  return !Valid(mask, pair) && pair % 3 != 0;
}
__host__ __device__ inline float Input(Mask mask, int64_t pair, int channel, int channels) {
  if (Garbage(mask, pair) && pair % 3 == 1) return NAN;
  if (Garbage(mask, pair) && channel == pair % channels) return INFINITY;
  return 0.5f + 2 * Draw(1, pair * channels + channel);
}

template <typename T>
__global__ void FillPairs(T* z, uint8_t* valid, int64_t pairs, int channels, Mask mask) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < pairs * channels;
       i += step) {
    const int64_t pair = i / channels;
    z[i] = Round<T>(Input(mask, pair, i % channels, channels));
    if (i % channels == 0) valid[pair] = Valid(mask, pair) ? 1 + pair % 7 : 0;
  }
}

template <typename T>
__global__ void FillDraws(T* to, int64_t size, uint32_t seed, float scale, float offset) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += step) {
    to[i] = Round<T>(offset + scale * Draw(seed, i));
  }
}

// Counts elements that are NaN, as poison is, or that differ between two runs.
template <typename T>
__global__ void Inspect(const T* first, const T* second, int64_t size, unsigned long long* faults) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += step) {
    if (isnan(Widen(first[i]))) atomicAdd(&faults[0], 1ull);
    if (reinterpret_cast<const uint16_t*>(first)[i] != reinterpret_cast<const uint16_t*>(second)[i])
      atomicAdd(&faults[1], 1ull);
  }
}

// Device memory that is freed with its owner.
class Memory {
 public:
  ~Memory() {
    for (void* p : allocations_) cudaFree(p);
  }
  template <typename P>
  void Allocate(P** to, int64_t bytes) {
    Check(cudaMalloc(reinterpret_cast<void**>(to), std::max<int64_t>(bytes, 16)), "cudaMalloc");
    allocations_.push_back(*to);
  }
  template <typename P>
  static std::vector<P> ToHost(const P* from, int64_t size) {
    std::vector<P> to(size);
    Check(cudaMemcpy(to.data(), from, size * sizeof(P), cudaMemcpyDeviceToHost), "to host");
    return to;
  }

 private:
  std::vector<void*> allocations_;
};

// A weight, stored as float32 or T and known to the host.
template <typename T>
struct Weight {
  void* device;
  std::vector<float> host;
  Weight(Memory& memory, int64_t size, bool floats, uint32_t seed, float scale, float offset = 0) {
    if (floats) {
      host = Fill<float>(memory, size, seed, scale, offset);
    } else {
      for (T w : Fill<T>(memory, size, seed, scale, offset)) host.push_back(Widen(w));
    }
  }

 private:
  template <typename Stored>
  std::vector<Stored> Fill(Memory& memory, int64_t size, uint32_t seed, float scale, float offset) {
    Stored* to;
    memory.Allocate(&to, size * sizeof(Stored));
    FillDraws<<<64, 256>>>(to, size, seed, scale, offset);
    device = to;
    return Memory::ToHost(to, size);
  }
};

// Pairs to compare: all, or both ends and what lies between.
inline std::vector<int64_t> Samples(int64_t pairs) {
  std::vector<int64_t> samples(std::min<int64_t>(pairs, 600));
  for (int64_t i = 0; i < static_cast<int64_t>(samples.size()); ++i) {
    const auto mixed = static_cast<uint64_t>(i * 0x9E3779B97F4A7C15ull);
    samples[i] = pairs <= 600 || i < 100 ? i : i < 200 ? pairs - 1 - (i - 100) : mixed % pairs;
  }
  return samples;
}

// Rounds to T.
template <typename T>
double Low(double x) {
  return double{Widen(Round<T>(static_cast<float>(x)))};
}

// LayerNorm of a pair as the layer reads it, exactly; `z` gets what is read.
template <typename T>
std::vector<double> Normed(const Case& c, int64_t pair, const std::vector<float>& scale,
                           const std::vector<float>& bias, std::vector<double>* z) {
  std::vector<double> x(c.channels);
  double mean = 0, variance = 0;
  for (int i = 0; i < c.channels; ++i) {
    x[i] = Garbage(c.mask, pair) ? 0 : Low<T>(Input(c.mask, pair, i, c.channels));
    mean += x[i] / c.channels;
  }
  *z = x;
  for (double value : x) variance += (value - mean) * (value - mean) / c.channels;
  for (int i = 0; i < c.channels; ++i) {
    x[i] = (x[i] - mean) / std::sqrt(variance + double{kEpsilon}) * scale[i] + bias[i];
  }
  return x;
}

// Squared errors of the kernel and of a layer that rounds after every step, and squares.
struct Errors {
  double kernel = 0, layer = 0, square = 0;
  void Add(double got, double rounded, double want) {
    const double wrong = std::isfinite(got) ? got - want : 1e30;
    kernel += wrong * wrong;
    layer += (rounded - want) * (rounded - want);
    square += want * want;
  }
  double error() const { return square > 0 ? std::sqrt(kernel / square) : std::sqrt(kernel); }
  double yardstick() const { return square > 0 ? std::sqrt(layer / square) : 0; }
  bool good() const { return error() <= 1.05 * yardstick(); }
};

// Compares samples on many threads: compare(sample, errors).
template <int count>
void Compare(int samples, Errors (&errors)[count],
             const std::function<void(int, Errors*)>& compare) {
  constexpr int kThreads = 16;
  Errors partial[kThreads][count];
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = t; i < samples; i += kThreads) compare(i, partial[t]);
    });
  }
  for (auto& thread : threads) thread.join();
  for (auto& p : partial) {
    for (int i = 0; i < count; ++i) {
      errors[i].kernel += p[i].kernel;
      errors[i].layer += p[i].layer;
      errors[i].square += p[i].square;
    }
  }
}

// Median milliseconds of call(i), i counting calls.
inline float MedianTime(const std::function<void(int)>& call) {
  constexpr int kRepeats = 15, kCalls = 8;
  cudaEvent_t start, stop;
  cudaEventCreate(&start);
  cudaEventCreate(&stop);
  std::vector<float> times;
  for (int r = -3; r < kRepeats; ++r) {
    cudaEventRecord(start);
    for (int i = 0; i < kCalls; ++i) call(i);
    cudaEventRecord(stop);
    Check(cudaEventSynchronize(stop), "time");
    float milliseconds;
    cudaEventElapsedTime(&milliseconds, start, stop);
    if (r >= 0) times.push_back(milliseconds / kCalls);
  }
  std::sort(times.begin(), times.end());
  return times[kRepeats / 2];
}

template <typename T>
constexpr Float kFloat = std::is_same_v<T, __half> ? Float::kF16 : Float::kBf16;
template <typename T>
constexpr const char* kName = std::is_same_v<T, __half> ? "f16 " : "bf16";

inline void PrintCase(const char* name, const Case& c) {
  const char* nodes[] = {"starting", "ending", "unswapped"};
  const char* masks[] = {"none", "random", "empty"};
  std::printf("%s %-9s B=%-2ld %4ldx%-4ld C=%-3d H=%-2d D=%-3d mask=%-6s bias=%d z=%d %s ", name,
              nodes[static_cast<int>(c.node)], c.batch, c.rows, c.columns, c.channels, c.heads,
              c.width, masks[static_cast<int>(c.mask)], c.bias, c.residual,
              c.float_weights ? "f32" : "16b");
}
