// What the harnesses of the stages share: masks, weights known to both sides, results that are run
// twice, and errors against float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <thread>
#include <vector>

#include "floats.h"
#include "harness/device.h"

using genie::Float;

enum class Mask { kNone, kRandom, kEmpty };
constexpr const char* kMaskNames[] = {"none", "random", "empty"};

constexpr float kEpsilon = 1e-5f;

__host__ __device__ inline bool Valid(Mask mask, int64_t pair) {
  return mask == Mask::kNone || (mask == Mask::kRandom && Draw(2, pair) > -1.f);
}

template <typename T>
constexpr Float kFloat = std::is_same_v<T, __half> ? Float::kF16 : Float::kBf16;
template <typename T>
constexpr const char* kName = std::is_same_v<T, __half> ? "f16 " : "bf16";

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
  float* floats() const { return static_cast<float*>(device); }

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

struct Faults {
  unsigned long long nan, differ;  // 16-bit elements that are NaN, as poison is; of two runs
  unsigned long long guard;        // bytes written past an end
  bool any() const { return nan || differ || guard; }
};

// Compares 16-bit words; those of elements of 32 bits have `infinity` 0xFFFF.
static __global__ void Inspect(const uint16_t* first, const uint16_t* second, int64_t size,
                               uint16_t infinity, Faults* faults) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += step) {
    if ((first[i] & 0x7FFF) > infinity) atomicAdd(&faults->nan, 1ull);
    if (first[i] != second[i]) atomicAdd(&faults->differ, 1ull);
  }
}

// The results of a problem, each with a guard behind it.
class Results {
 public:
  template <typename P>
  void Add(Memory& memory, P** to, int64_t size) {
    const int64_t bytes = size * sizeof(P);
    memory.Allocate(to, bytes + kGuard);
    const uint16_t infinity = sizeof(P) != 2 ? 0xFFFF : std::is_same_v<P, __half> ? 0x7C00 : 0x7F80;
    results_.push_back({reinterpret_cast<char*>(*to), bytes, infinity});
  }

  // Runs twice into poison.
  Faults RunTwice(const std::function<void()>& run) const {
    Memory memory;
    Faults* faults;
    memory.Allocate(&faults, sizeof(Faults));
    Check(cudaMemset(faults, 0, sizeof(Faults)), "faults");
    std::vector<char*> kept(results_.size());
    unsigned long long guard = 0;
    for (int round = 0; round < 2; ++round) {
      for (const Result& r : results_) Check(cudaMemset(r.data, 0xFF, r.bytes + kGuard), "poison");
      run();
      Check(cudaDeviceSynchronize(), "run");
      for (size_t i = 0; i < results_.size(); ++i) {
        const auto& [data, bytes, infinity] = results_[i];
        for (char x : Memory::ToHost(data + bytes, kGuard)) guard += x != char(0xFF);
        if (round == 0) {
          memory.Allocate(&kept[i], bytes);
          Check(cudaMemcpy(kept[i], data, bytes, cudaMemcpyDeviceToDevice), "keep");
        } else {
          Inspect<<<4096, 256>>>(reinterpret_cast<uint16_t*>(data),
                                 reinterpret_cast<uint16_t*>(kept[i]), bytes / 2, infinity, faults);
        }
      }
    }
    Faults found = Memory::ToHost(faults, 1)[0];
    found.guard = guard;
    return found;
  }

 private:
  static constexpr int64_t kGuard = 4096;  // bytes
  struct Result {
    char* data;
    int64_t bytes;
    uint16_t infinity;
  };
  std::vector<Result> results_;
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

// Squared errors of the kernel and of a layer that rounds after every step, and squares.
struct Errors {
  double kernel = 0, layer = 0, square = 0;
  void Add(double got, double rounded, double want) {
    const double wrong = std::isfinite(got) ? got - want : 1e30;
    kernel += wrong * wrong;
    layer += (rounded - want) * (rounded - want);
    square += want * want;
  }
  void Add(const Errors& other) {
    kernel += other.kernel, layer += other.layer, square += other.square;
  }
  double error() const { return square > 0 ? std::sqrt(kernel / square) : std::sqrt(kernel); }
  double yardstick() const { return square > 0 ? std::sqrt(layer / square) : 0; }
  bool good() const { return error() <= 1.05 * yardstick(); }
};

// Calls work(thread) on many threads.
constexpr int kHostThreads = 16;
inline void OnThreads(const std::function<void(int)>& work) {
  std::vector<std::thread> threads;
  for (int t = 0; t < kHostThreads; ++t) threads.emplace_back(work, t);
  for (auto& thread : threads) thread.join();
}

// Compares samples on many threads: compare(sample, errors).
template <int count>
void Compare(int samples, Errors (&errors)[count],
             const std::function<void(int, Errors*)>& compare) {
  Errors partial[kHostThreads][count];
  OnThreads([&](int t) {
    for (int i = t; i < samples; i += kHostThreads) compare(i, partial[t]);
  });
  for (auto& p : partial) {
    for (int i = 0; i < count; ++i) errors[i].Add(p[i]);
  }
}

// How many inputs and outputs of these bytes outgrow L2 together.
inline int Copies(double bytes) { return std::clamp(static_cast<int>(3e8 / bytes) + 1, 1, 8); }

// How many cases fail.
template <typename Problem, typename Case>
int Failures(const std::vector<Case>& cases) {
  int failures = 0;
  for (const Case& c : cases) failures += !Problem(c, 1).Verify();
  return failures;
}
