// One problem of attention's core: its inputs on the device, a checked run and its time.
#pragma once

#include <algorithm>
#include <cmath>
#include <thread>
#include <vector>

#include "harness/device.h"
#include "triangle_attention/attend_sm90.h"

// kRandom leaves every fifth row without keys, kTenth hides a tenth of the keys, kSingle one key a
// row, kPadding the first half of the keys of the first half of the rows, kEnds the last keys of
// odd rows and the first of even ones.
enum class Mask { kNone, kRandom, kSingle, kPadding, kEmpty, kEnds, kTenth };
constexpr const char* kMaskNames[] = {"none", "random", "single", "half", "empty", "ends", "tenth"};

struct Case {
  int64_t batch, rows, queries, keys;
  int heads, dim;
  Mask mask = Mask::kRandom;
  bool bias = true, folded = false, lse = true;
  float spread = 1.f;       // of the bias
  float shift = 0.f;        // of all logits, in nats
  int64_t valid_keys = -1;  // keys beyond are masked: padding that must not change a bit
  __host__ __device__ int64_t outputs() const { return batch * rows * queries * heads * dim; }
  __host__ __device__ int64_t padded() const { return (keys + 7) / 8 * 8; }
};

// Values belong to coordinates, so that a larger problem holds a smaller one.
__host__ __device__ inline uint64_t Index(int64_t b, int64_t i, int64_t j, int h, int d) {
  return (((uint64_t(b) * 8192 + i) * 8192 + j) * 16 + h) * 64 + d;
}
__host__ __device__ inline bool Valid(const Case& c, int64_t b, int64_t i, int64_t k) {
  if (c.valid_keys >= 0 && k >= c.valid_keys) return false;
  if (c.mask == Mask::kNone) return true;
  if (c.mask == Mask::kEmpty) return false;
  if (c.mask == Mask::kSingle) return k == (7 * i + b) % c.keys;
  if (c.mask == Mask::kEnds) return i % 2 ? k >= c.keys - 3 : k < 5;
  if (c.mask == Mask::kPadding) return i < (c.rows + 1) / 2 && k < (c.keys + 1) / 2;
  const float drawn = Draw(5, (uint64_t(b) * 8192 + i) * 8192 + k);
  return c.mask == Mask::kTenth ? drawn > -1.48f : i % 5 != 3 && drawn > -1.f;
}
template <typename T>
__host__ __device__ T Query(const Case& c, int64_t b, int64_t i, int64_t q, int h, int d) {
  const float scale = c.folded ? 1.4426950408889634f / sqrtf(float(c.dim)) : 1.f;
  return Round<T>(scale * Draw(1, Index(b, i, q, h, d)));
}
// Masked keys and their values are large, so that a leak shows.
template <typename T>
__host__ __device__ T Key(const Case& c, int64_t b, int64_t i, int64_t k, int h, int d, int seed) {
  return Round<T>((Valid(c, b, i, k) ? 1.f : 2000.f) * Draw(seed, Index(b, i, k, h, d)));
}
template <typename T>
__host__ __device__ T Bias(const Case& c, int64_t b, int h, int64_t q, int64_t k) {
  const float nats = c.spread * Draw(4, Index(b, q, k, h, 0)) + c.shift;
  return Round<T>(nats * (c.folded ? 1.4426950408889634f : 1.f));
}

template <typename T>
__global__ void FillRows(T* to, Case c, int64_t columns, int seed) {  // of q (seed 1), k, v
  const int64_t size = c.batch * c.rows * columns * c.heads * c.dim;
  for (int64_t n = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; n < size;
       n += int64_t{gridDim.x} * blockDim.x) {
    const int d = n % c.dim, h = n / c.dim % c.heads;
    const int64_t j = n / c.dim / c.heads % columns, row = n / c.dim / c.heads / columns;
    const int64_t b = row / c.rows, i = row % c.rows;
    to[n] = seed == 1 ? Query<T>(c, b, i, j, h, d) : Key<T>(c, b, i, j, h, d, seed);
  }
}
template <typename T>
__global__ void FillBias(T* to, Case c) {
  const int64_t size = c.batch * c.heads * c.queries * c.padded();
  for (int64_t n = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; n < size;
       n += int64_t{gridDim.x} * blockDim.x) {
    const int64_t k = n % c.padded(), q = n / c.padded() % c.queries;
    const int64_t h = n / c.padded() / c.queries % c.heads,
                  b = n / c.padded() / c.queries / c.heads;
    to[n] = k < c.keys ? Bias<T>(c, b, h, q, k) : Round<T>(0.f);
  }
}
static __global__ void FillMask(uint8_t* to, Case c) {
  const int64_t size = c.batch * c.rows * c.keys;
  for (int64_t n = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; n < size;
       n += int64_t{gridDim.x} * blockDim.x) {
    const int64_t k = n % c.keys, i = n / c.keys % c.rows, b = n / c.keys / c.rows;
    to[n] = Valid(c, b, i, k) ? 1 + n % 7 : 0;
  }
}
// Counts 16-bit elements that are NaN (never written) and that differ from another run's.
static __global__ void Inspect(const uint16_t* first, const uint16_t* second, int64_t size,
                               uint16_t infinity, unsigned long long* faults) {
  for (int64_t n = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; n < size;
       n += int64_t{gridDim.x} * blockDim.x) {
    if ((first[n] & 0x7FFF) > infinity) atomicAdd(&faults[0], 1ull);
    if (first[n] != second[n]) atomicAdd(&faults[1], 1ull);
  }
}

struct Place {
  int64_t b, i, q;
  int h;
};
template <typename T>
__global__ void Gather(const T* o, const float* lse, const Place* places, float* to, Case c) {
  const Place p = places[blockIdx.x];
  const int64_t row = p.b * c.rows + p.i;
  float* out = to + int64_t{blockIdx.x} * (c.dim + 1);
  for (int d = threadIdx.x; d < c.dim; d += blockDim.x) {
    out[d] = Widen(o[((row * c.queries + p.q) * c.heads + p.h) * c.dim + d]);
  }
  if (threadIdx.x == 0) out[c.dim] = c.lse ? lse[(row * c.heads + p.h) * c.queries + p.q] : 0.f;
}

template <typename T>
class Problem {
 public:
  explicit Problem(const Case& c) : c_(c) {
    const int64_t width = c.batch * c.rows * c.heads * c.dim;
    memory_.Allocate(&q_, width * c.queries * sizeof(T));
    memory_.Allocate(&k_, width * c.keys * sizeof(T));
    memory_.Allocate(&v_, width * c.keys * sizeof(T));
    memory_.Allocate(&bias_, c.batch * c.heads * c.queries * c.padded() * sizeof(T));
    memory_.Allocate(&mask_, c.batch * c.rows * c.keys);
    memory_.Allocate(&o_, o_bytes() + kGuard);
    memory_.Allocate(&lse_, lse_bytes() + kGuard);
    FillRows<<<4096, 256>>>(q_, c, c.queries, 1);
    FillRows<<<4096, 256>>>(k_, c, c.keys, 2);
    FillRows<<<4096, 256>>>(v_, c, c.keys, 3);
    FillBias<<<4096, 256>>>(bias_, c);
    FillMask<<<4096, 256>>>(mask_, c);
    Check(cudaDeviceSynchronize(), "fill");
  }

  void Run() {
    const bool masked = c_.mask != Mask::kNone || c_.valid_keys >= 0;
    const genie::PairAttention p = {.q = q_,
                                    .k = k_,
                                    .v = v_,
                                    .bias = c_.bias ? bias_ : nullptr,
                                    .mask = masked ? mask_ : nullptr,
                                    .o = o_,
                                    .lse = c_.lse ? lse_ : nullptr,
                                    .half = std::is_same_v<T, __half>,
                                    .folded = c_.folded,
                                    .batch = c_.batch,
                                    .rows = c_.rows,
                                    .queries = c_.queries,
                                    .keys = c_.keys,
                                    .heads = c_.heads,
                                    .head_dim = c_.dim};
    Check(genie::Launch(p, nullptr), "launch");
  }

  // Runs twice into poisoned outputs; prints a line and returns whether all is well.
  bool Verify() {
    T* kept;
    memory_.Allocate(&kept, o_bytes());
    bool guarded = true;
    for (int run = 0; run < 2; ++run) {
      Check(cudaMemset(o_, 0xFF, o_bytes() + kGuard), "poison");
      Check(cudaMemset(lse_, 0xFF, lse_bytes() + kGuard), "poison");
      Run();
      Check(cudaDeviceSynchronize(), "run");
      guarded &= Guarded(o_, o_bytes()) && Guarded(lse_, c_.lse ? lse_bytes() : 0);
      if (run == 0) Check(cudaMemcpy(kept, o_, o_bytes(), cudaMemcpyDeviceToDevice), "keep");
    }
    unsigned long long *device_faults, faults[2];
    memory_.Allocate(&device_faults, 16);
    Check(cudaMemset(device_faults, 0, 16), "faults");
    Inspect<<<4096, 256>>>(reinterpret_cast<uint16_t*>(o_), reinterpret_cast<uint16_t*>(kept),
                           c_.outputs(), std::is_same_v<T, __half> ? 0x7C00 : 0x7F80,
                           device_faults);
    Check(cudaMemcpy(faults, device_faults, 16, cudaMemcpyDeviceToHost), "faults");
    double error, yardstick, lse_error;
    Compare(&error, &yardstick, &lse_error);
    const bool good =
        guarded && !faults[0] && !faults[1] && error <= 1.05 * yardstick && lse_error < 1e-4;
    std::printf(
        "%s B=%-2ld I=%-4ld Q=%-4ld K=%-4ld H=%-2d D=%-2d mask=%-7s bias=%d spread=%-3.0f "
        "shift=%-3.0f folded=%d  error %.3e  16-bit core %.3e  lse %.1e  NaN %llu  runs differ "
        "%llu  guard %s  %s\n",
        std::is_same_v<T, __half> ? "f16 " : "bf16", c_.batch, c_.rows, c_.queries, c_.keys,
        c_.heads, c_.dim, kMaskNames[int(c_.mask)], c_.bias, c_.spread, c_.shift, c_.folded, error,
        yardstick, lse_error, faults[0], faults[1], guarded ? "ok" : "BROKEN",
        good ? "pass" : "FAIL");
    return good;
  }

  // The output, for a comparison of bits.
  std::vector<uint16_t> Output() {
    Run();
    return Memory::ToHost(reinterpret_cast<uint16_t*>(o_), c_.outputs());
  }

  // Median milliseconds of a call.
  float Time() {
    const double logits = double(c_.batch) * c_.rows * c_.queries * c_.keys * c_.heads;
    return MedianTime([&](int) { Run(); }, 11, std::clamp(int(3e9 / logits), 1, 50));
  }

 private:
  static constexpr int64_t kGuard = 4096;  // poisoned bytes after each output

  int64_t o_bytes() const { return c_.outputs() * sizeof(T); }
  int64_t lse_bytes() const { return c_.outputs() / c_.dim * sizeof(float); }
  bool Guarded(const void* data, int64_t bytes) {
    const auto guard = Memory::ToHost(static_cast<const uint8_t*>(data) + bytes, kGuard);
    return std::all_of(guard.begin(), guard.end(), [](uint8_t x) { return x == 0xFF; });
  }

  // Relative errors against float64 of the kernel and of a core that rounds weights and output.
  void Compare(double* error, double* yardstick, double* lse_error) {
    const int64_t all = c_.batch * c_.rows * c_.queries * c_.heads;
    const int samples = std::min<int64_t>(all, 1500);
    std::vector<Place> places(samples);
    for (int n = 0; n < samples; ++n) {  // both ends and what lies between
      uint64_t at = samples == all ? n
                    : n < 300      ? n
                    : n < 600      ? all - 1 - (n - 300)
                                   : n * 0x9E3779B97F4A7C15ull % all;
      places[n].h = at % c_.heads, at /= c_.heads;
      places[n].q = at % c_.queries, at /= c_.queries;
      places[n].i = at % c_.rows, places[n].b = at / c_.rows;
    }
    Place* device_places;
    float* gathered;
    memory_.Allocate(&device_places, samples * sizeof(Place));
    memory_.Allocate(&gathered, int64_t{samples} * (c_.dim + 1) * sizeof(float));
    Check(cudaMemcpy(device_places, places.data(), samples * sizeof(Place), cudaMemcpyHostToDevice),
          "places");
    Gather<<<samples, 64>>>(o_, lse_, device_places, gathered, c_);
    const auto got = Memory::ToHost(gathered, int64_t{samples} * (c_.dim + 1));
    constexpr int kThreads = 16;
    double sums[kThreads][4] = {};
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        for (int n = t; n < samples; n += kThreads) {
          CompareQuery(places[n], &got[int64_t{n} * (c_.dim + 1)], sums[t]);
        }
      });
    }
    for (auto& thread : threads) thread.join();
    double total[4] = {};
    for (auto& s : sums) {
      for (int i = 0; i < 3; ++i) total[i] += s[i];
      total[3] = std::max(total[3], s[3]);
    }
    const double size = std::max(total[2], 1e-30);
    *error = std::sqrt(total[0] / size), *yardstick = std::sqrt(total[1] / size);
    *lse_error = total[3];
  }

  void CompareQuery(const Place& p, const float* got, double* sums) {
    constexpr double kLn2 = 0.6931471805599453;
    std::vector<double> logits(c_.keys), o(c_.dim);
    std::vector<float> plain(c_.dim);
    double peak = -INFINITY, total = 0;
    for (int64_t k = 0; k < c_.keys; ++k) {
      logits[k] = -INFINITY;
      if (!Valid(c_, p.b, p.i, k)) continue;
      double x = 0;
      for (int d = 0; d < c_.dim; ++d) {
        x += double(Widen(Query<T>(c_, p.b, p.i, p.q, p.h, d))) *
             Widen(Key<T>(c_, p.b, p.i, k, p.h, d, 2));
      }
      x *= c_.folded ? kLn2 : 1 / std::sqrt(double(c_.dim));
      if (c_.bias) x += (c_.folded ? kLn2 : 1) * Widen(Bias<T>(c_, p.b, p.h, p.q, k));
      logits[k] = x, peak = std::max(peak, x);
    }
    for (double x : logits) total += x == -INFINITY ? 0 : std::exp(x - peak);
    for (int64_t k = 0; k < c_.keys; ++k) {
      if (logits[k] == -INFINITY) continue;
      const double weight = std::exp(logits[k] - peak) / total;
      const float rounded = Widen(Round<T>(float(weight)));
      for (int d = 0; d < c_.dim; ++d) {
        const float v = Widen(Key<T>(c_, p.b, p.i, k, p.h, d, 3));
        o[d] += weight * v, plain[d] += rounded * v;
      }
    }
    for (int d = 0; d < c_.dim; ++d) {
      const double difference = got[d] - o[d], plain_difference = Widen(Round<T>(plain[d])) - o[d];
      sums[0] += difference * difference;
      sums[1] += plain_difference * plain_difference;
      sums[2] += o[d] * o[d];
    }
    if (!c_.lse) return;
    const double lse = total > 0 ? peak + std::log(total) : -INFINITY;
    const double wrong = got[c_.dim] == lse ? 0 : std::abs(got[c_.dim] - lse) / (1 + std::abs(lse));
    sums[3] = std::max(sums[3], std::isnan(wrong) ? INFINITY : wrong);
  }

  Case c_;
  Memory memory_;
  T *q_, *k_, *v_, *bias_, *o_;
  uint8_t* mask_;
  float* lse_;
};
