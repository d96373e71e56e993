// One problem of the gated projection: its inputs on the device, a checked run and its time.
#pragma once

#include "harness/problem.h"
#include "triangle_multiplication/project_sm90.h"

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

// Counts elements that should be exact zeros and are not.
static __global__ void InspectZeros(const uint16_t* out, Case c, unsigned long long* wrong) {
  const int64_t padded = c.padded(), step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < c.outputs(); i += step) {
    const int64_t column = i % padded, row = i / padded % c.rows_padded();
    const int64_t batch = i / padded / c.rows_padded() / c.hidden;
    const int64_t pair = (batch * c.rows + row) * c.columns + column;
    const bool zero = column >= c.columns || row >= c.rows || !Valid(c.mask, pair);
    if (zero && out[i] != 0) atomicAdd(wrong, 1ull);
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
    memory_.Allocate(&z_, c.pairs() * c.channels * sizeof(T) * copies);
    memory_.Allocate(&mask_, c.pairs());
    for (auto& out : out_) results_.Add(memory_, &out, c.outputs() * copies);
    for (int i = 0; i < copies; ++i) {
      FillPairs<<<4096, 256>>>(z_ + i * c.pairs() * c.channels, mask_, c.pairs(), c.channels,
                               c.mask);
    }
    for (int i = 0; i < 2; ++i) {
      weights_.emplace_back(memory_, int64_t{c.channels} * 2 * c.hidden, c.float_weights, 10 + i,
                            1 / std::sqrt(float(c.channels)));
    }
    for (int i = 0; i < 4; ++i) {
      vectors_.emplace_back(memory_, 512, true, 20 + i, 0.3f, i == 0 ? 1.f : 0.f);
    }
    Check(cudaDeviceSynchronize(), "fill");
  }

  genie::GatedProjection Arguments(int copy) const {
    const int64_t in = c_.pairs() * c_.channels, out = c_.outputs();
    genie::GatedProjection p = {};
    p.z = z_ + copy * in, p.a = out_[0] + copy * out, p.b = out_[1] + copy * out;
    p.dtype = kFloat<T>, p.mask = c_.mask == Mask::kNone ? nullptr : mask_;
    p.norm_scale = vectors_[0].floats(), p.norm_bias = vectors_[1].floats(), p.epsilon = kEpsilon;
    p.proj_kernel = weights_[0].device, p.gate_kernel = weights_[1].device;
    p.kernel_dtype = c_.float_weights ? Float::kF32 : kFloat<T>;
    if (c_.bias) p.proj_bias = vectors_[2].floats(), p.gate_bias = vectors_[3].floats();
    p.batch = c_.batch, p.rows = c_.rows, p.columns = c_.columns, p.columns_padded = c_.padded();
    p.rows_padded = c_.rows_padded();
    p.channels = c_.channels, p.hidden = c_.hidden;
    return p;
  }

  // Runs twice into poisoned outputs; returns whether all is well and prints a line.
  bool Verify() {
    const Faults faults =
        results_.RunTwice([&] { Check(genie::Launch(Arguments(0), nullptr), "launch"); });
    unsigned long long* wrong_zeros;
    memory_.Allocate(&wrong_zeros, 8);
    Check(cudaMemset(wrong_zeros, 0, 8), "zeros");
    for (const T* out : out_) {
      InspectZeros<<<4096, 256>>>(reinterpret_cast<const uint16_t*>(out), c_, wrong_zeros);
    }
    const auto zeros = Memory::ToHost(wrong_zeros, 1)[0];
    Errors errors[1];
    CompareSamples(errors);
    const bool good = !faults.any() && !zeros && errors[0].good();
    std::printf(
        "%s B=%-2ld I=%-5ld K=%-5ld Kp=%-5ld C=%-4d Hm=%-4d mask=%-6s bias=%d weights=%s  "
        "error %.3e  16-bit layer %.3e  not zero %llu  NaN %llu  differ %llu  guard %llu  %s\n",
        kName<T>, c_.batch, c_.rows, c_.columns, c_.padded(), c_.channels, c_.hidden,
        kMaskNames[static_cast<int>(c_.mask)], c_.bias, c_.float_weights ? "f32" : "16b",
        errors[0].error(), errors[0].yardstick(), zeros, faults.nan, faults.differ, faults.guard,
        good ? "pass" : "FAIL");
    return good;
  }

  float Time() const {
    return MedianTime([&](int i) { Check(genie::Launch(Arguments(i % copies_), nullptr), "go"); });
  }

 private:
  void CompareSamples(Errors (&errors)[1]) {
    const auto pairs = Samples(c_.pairs());
    const int64_t samples = pairs.size(), width = 2 * c_.hidden;
    int64_t* device_pairs;
    float* gathered;
    memory_.Allocate(&device_pairs, samples * sizeof(int64_t));
    memory_.Allocate(&gathered, samples * width * sizeof(float));
    Check(cudaMemcpy(device_pairs, pairs.data(), samples * 8, cudaMemcpyHostToDevice), "pairs");
    Gather<<<samples, 128>>>(out_[0], out_[1], device_pairs, gathered, c_);
    const auto got = Memory::ToHost(gathered, samples * width);
    Compare(samples, errors,
            [&](int i, Errors* errors) { ComparePair(pairs[i], &got[i * width], errors); });
  }

  void ComparePair(int64_t pair, const float* got, Errors* errors) const {
    const int channels = c_.channels, width = 2 * c_.hidden;
    std::vector<double> x(channels), rounded(channels);
    double mean = 0, variance = 0;
    for (int c = 0; c < channels; ++c) {
      x[c] = Widen(Round<T>(0.5f + 2 * Draw(1, pair * channels + c)));
      mean += x[c] / channels;
    }
    for (int c = 0; c < channels; ++c) variance += (x[c] - mean) * (x[c] - mean) / channels;
    for (int c = 0; c < channels; ++c) {
      x[c] = (x[c] - mean) / std::sqrt(variance + double{kEpsilon}) * vectors_[0].host[c] +
             vectors_[1].host[c];
      rounded[c] = Low<T>(x[c]);
    }
    const bool valid = Valid(c_.mask, pair);
    for (int h = 0; h < width; ++h) {
      double exact[2], coarse[2];
      for (int i = 0; i < 2; ++i) {
        const double bias = c_.bias ? vectors_[2 + i].host[h] : 0;
        double sum = 0, rounded_sum = 0;
        for (int c = 0; c < channels; ++c) {
          const double w = weights_[i].host[int64_t{c} * width + h];
          sum += x[c] * w;
          rounded_sum += rounded[c] * Low<T>(w);
        }
        exact[i] = sum + bias;
        coarse[i] = c_.bias ? Low<T>(Low<T>(rounded_sum) + Low<T>(bias)) : Low<T>(rounded_sum);
      }
      const double want = valid ? exact[0] / (1 + std::exp(-exact[1])) : 0;
      const double layer = valid ? Low<T>(coarse[0] * Low<T>(1 / (1 + std::exp(-coarse[1])))) : 0;
      errors[0].Add(got[h], layer, want);
    }
  }

  Case c_;
  int copies_;
  Memory memory_;
  Results results_;
  std::vector<Weight<T>> weights_, vectors_;
  T *z_, *out_[2];
  uint8_t* mask_;
};
