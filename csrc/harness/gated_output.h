// One problem of the gated output: its inputs on the device, a checked run and its time.
#pragma once

#include "harness/problem.h"
#include "triangle_multiplication/output_sm90.h"

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
class Problem {
 public:
  using Contracted = std::conditional_t<std::is_same_v<T, __half>, float, T>;

  Problem(const Case& c, int copies) : c_(c), copies_(copies) {
    memory_.Allocate(&z_, c.elements() * sizeof(T) * copies);
    memory_.Allocate(&t_, c.contracted() * sizeof(Contracted) * copies);
    memory_.Allocate(&mask_, c.pairs());
    results_.Add(memory_, &out_, c.elements() * copies);
    for (int i = 0; i < copies; ++i) {
      FillPairs<<<4096, 256>>>(z_ + i * c.elements(), mask_, c);
      FillContracted<<<4096, 256>>>(t_ + i * c.contracted(), c);
    }
    for (int i = 0; i < 2; ++i) {
      const int64_t inputs = i == 0 ? c.hidden : c.channels;
      kernels_.emplace_back(memory_, inputs * c.channels, c.float_weights, 10 + i,
                            1 / std::sqrt(float(inputs)));
      biases_.emplace_back(memory_, 256, true, 20 + i, 0.3f);
    }
    for (int i = 0; i < 4; ++i) {
      norms_.emplace_back(memory_, 256, true, 22 + i, 0.3f, i % 2 == 0 ? 1.f : 0.f);
    }
    Check(cudaDeviceSynchronize(), "fill");
  }

  genie::GatedOutput Arguments(int copy) const {
    genie::GatedOutput p = {};
    p.z = z_ + copy * c_.elements(), p.t = t_ + copy * c_.contracted();
    p.out = out_ + copy * c_.elements(), p.dtype = kFloat<T>;
    p.mask = c_.mask == Mask::kNone ? nullptr : mask_;
    p.proj_kernel = kernels_[0].device, p.gate_kernel = kernels_[1].device;
    p.kernel_dtype = c_.float_weights ? Float::kF32 : kFloat<T>;
    if (c_.bias) p.proj_bias = biases_[0].floats(), p.gate_bias = biases_[1].floats();
    p.norm_in_scale = norms_[0].floats(), p.norm_in_bias = norms_[1].floats();
    p.norm_out_scale = norms_[2].floats(), p.norm_out_bias = norms_[3].floats();
    p.batch = c_.batch, p.rows = c_.rows, p.columns = c_.columns;
    p.rows_padded = c_.rows_padded(), p.columns_padded = c_.columns_padded();
    p.channels = c_.channels, p.hidden = c_.hidden;
    p.residual = c_.residual, p.epsilon = kEpsilon;
    return p;
  }

  // Runs twice into poisoned outputs; returns whether all is well and prints a line.
  bool Verify() {
    const Faults faults =
        results_.RunTwice([&] { Check(genie::Launch(Arguments(0), nullptr), "launch"); });
    const auto pairs = Samples(c_.pairs());
    std::vector<std::vector<T>> got;
    for (int64_t pair : pairs)
      got.push_back(Memory::ToHost(out_ + pair * c_.channels, c_.channels));
    Errors errors[1];
    Compare(pairs.size(), errors,
            [&](int i, Errors* errors) { ComparePair(pairs[i], got[i], errors); });
    const bool good = !faults.any() && errors[0].good();
    std::printf(
        "%s B=%-2ld I=%-5ld J=%-5ld C=%-4d Hm=%-4d mask=%-6s bias=%d weights=%s residual=%d  "
        "error %.3e  16-bit layer %.3e  NaN %llu  differ %llu  guard %llu  %s\n",
        kName<T>, c_.batch, c_.rows, c_.columns, c_.channels, c_.hidden,
        kMaskNames[static_cast<int>(c_.mask)], c_.bias, c_.float_weights ? "f32" : "16b",
        c_.residual, errors[0].error(), errors[0].yardstick(), faults.nan, faults.differ,
        faults.guard, good ? "pass" : "FAIL");
    return good;
  }

  float Time() const {
    return MedianTime([&](int i) { Check(genie::Launch(Arguments(i % copies_), nullptr), "go"); });
  }

 protected:
  // Layer norm of v in place, and rounded.
  static std::vector<double> Normalize(std::vector<double>& v, const std::vector<float>& scale,
                                       const std::vector<float>& bias) {
    double mean = 0, variance = 0;
    for (double x : v) mean += x / v.size();
    for (double x : v) variance += (x - mean) * (x - mean) / v.size();
    std::vector<double> rounded(v.size());
    for (size_t i = 0; i < v.size(); ++i) {
      v[i] = (v[i] - mean) / std::sqrt(variance + double{kEpsilon}) * scale[i] + bias[i];
      rounded[i] = Low<T>(v[i]);
    }
    return rounded;
  }

  void ComparePair(int64_t pair, const std::vector<T>& got, Errors* errors) const {
    const int channels = c_.channels, hidden = c_.hidden;
    std::vector<double> z(channels), in[2];  // in: of projection and gate
    for (int c = 0; c < channels; ++c) {
      z[c] = Readable(c_.mask, pair) ? PairValue<T>(pair * channels + c) : 0;
    }
    for (int h = 0; h < hidden; ++h) in[0].push_back(ContractedValue<Contracted>(c_.at(pair, h)));
    in[1] = z;
    const std::vector<double> rounded[2] = {Normalize(in[0], norms_[2].host, norms_[3].host),
                                            Normalize(in[1], norms_[0].host, norms_[1].host)};
    for (int c = 0; c < channels; ++c) {
      double exact[2], coarse[2];
      for (int i = 0; i < 2; ++i) {
        double sum = 0, rounded_sum = 0;
        for (size_t k = 0; k < in[i].size(); ++k) {
          const double weight = kernels_[i].host[k * channels + c];
          sum += in[i][k] * weight;
          rounded_sum += rounded[i][k] * Low<T>(weight);
        }
        const double bias = c_.bias ? biases_[i].host[c] : 0;
        exact[i] = sum + bias;
        coarse[i] = c_.bias ? Low<T>(Low<T>(rounded_sum) + bias) : Low<T>(rounded_sum);
      }
      double want = exact[0] / (1 + std::exp(-exact[1]));
      double layer = Low<T>(coarse[0] * Low<T>(1 / (1 + std::exp(-coarse[1]))));
      if (c_.residual) want += z[c], layer = Low<T>(z[c] + layer);
      errors[0].Add(Widen(got[c]), layer, want);
    }
  }

  Case c_;
  int copies_;
  Memory memory_;
  Results results_;
  std::vector<Weight<T>> kernels_, biases_;  // of projection and gate
  std::vector<Weight<T>> norms_;             // scale and bias, of z and of t
  T *z_, *out_;
  Contracted* t_;
  uint8_t* mask_;
};
