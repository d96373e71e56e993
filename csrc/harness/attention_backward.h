// One problem of the backward of the stages around the attention core: inputs, a checked run,
// times.
#pragma once

#include "harness/attention_pairs.h"
#include "triangle_attention/backward_sm90.h"

constexpr double kLog2E = 1.4426950408889634;
constexpr float kBiasScale = 0.7731f;  // rounding draws of multiples of 1 / 128 would be biased

template <typename T>
class Problem {
 public:
  Problem(const Case& c, int copies)
      : c_(c),
        copies_(copies),
        parts_(std::max<int64_t>(1, 132 / c.batch)),
        norm_scale_(memory_, c.channels, true, 20, 0.3f, 1.f),
        norm_bias_(memory_, c.channels, true, 21, 0.3f),
        gate_bias_(memory_, c.hidden(), true, 22, 0.3f),
        out_(memory_, int64_t{c.channels} * c.hidden(), c.float_weights, 11,
             1 / std::sqrt(float(c.hidden()))) {
    const float scale = 1 / std::sqrt(float(c.channels));
    for (int i = 0; i < 5; ++i) {
      kernels_.emplace_back(memory_, int64_t{c.channels} * Width(i), c.float_weights, 12 + i,
                            scale);
    }
    memory_.Allocate(&mask_, c.pairs());
    Pairs(&z_), Pairs(&d_out_), Hidden(&o_);
    for (int i = 0; i < 3; ++i) Hidden(&d_[i]);
    results_.Add(memory_, &d_o_, HiddenSize() * copies);
    results_.Add(memory_, &d_[3], HiddenSize() * copies);
    results_.Add(memory_, &dz_, PairsSize() * copies);
    memory_.Allocate(&d_bias_, BiasSize() * sizeof(float));
    memory_.Allocate(&statistics_, c.pairs() * sizeof(float2));
    const int64_t square = int64_t{c.channels} * c.hidden();
    for (int64_t size : {square, int64_t{c.channels}, 4 * square, int64_t{4} * c.hidden(),
                         int64_t{16} * c.channels, int64_t{16}}) {
      part_sizes_.push_back(size);
      part_sums_.emplace_back();
      results_.Add(memory_, &part_sums_.back(), c.batch * parts_ * size);
    }
    for (int i = 0; i < copies; ++i) {
      FillPairs<<<4096, 256>>>(z_ + i * PairsSize(), mask_, c.pairs(), c.channels, c.mask);
      FillDraws<<<4096, 256>>>(d_out_ + i * PairsSize(), PairsSize(), 4, 1.f, 0.1f);
      FillDraws<<<4096, 256>>>(o_ + i * HiddenSize(), HiddenSize(), 3, 1.f, 0.2f);
      for (int k = 0; k < 3; ++k) {
        FillDraws<<<4096, 256>>>(d_[k] + i * HiddenSize(), HiddenSize(), 5 + k, 1.f, 0.1f);
      }
    }
    FillDraws<<<4096, 256>>>(d_bias_, BiasSize(), 9, kBiasScale, 0.1f);
    Check(cudaDeviceSynchronize(), "fill");
  }

  void Run(int which, int copy) const {
    const int64_t pairs = copy * PairsSize(), hidden = copy * HiddenSize();
    const T* d[4] = {d_[0] + hidden, d_[1] + hidden, d_[2] + hidden, d_[3] + hidden};
    if (which == 0) {
      genie::AttentionOutputBackward p = {};
      Common(p, copy);
      p.mask = c_.mask == Mask::kNone ? nullptr : mask_, p.epsilon = kEpsilon;
      p.o = o_ + hidden, p.d_out = d_out_ + pairs, p.d_o = d_o_ + hidden, p.d_gate = (void*)d[3];
      p.out_kernel_sums = part_sums_[0], p.out_bias_sums = part_sums_[1];
      p.norm_scale = norm_scale_.floats(), p.norm_bias = norm_bias_.floats();
      p.gate_kernel = kernels_[3].device, p.out_kernel = out_.device;
      p.kernel_dtype = c_.float_weights ? Float::kF32 : kFloat<T>;
      p.gate_bias = gate_bias_.floats(), p.parts = parts_, p.hidden = c_.hidden();
      Check(genie::Launch(p, nullptr), "output backward");
    } else if (which == 1) {
      genie::AttentionProjectionBackward p = {};
      Common(p, copy);
      Heads(p, d);
      p.d_out = c_.residual ? d_out_ + pairs : nullptr, p.dz = dz_ + pairs;
      p.norm_scale = norm_scale_.floats(), p.statistics = statistics_;
      p.mask = c_.mask == Mask::kNone ? nullptr : mask_, p.epsilon = kEpsilon;
      for (int i = 0; i < 4; ++i) p.kernel[i] = kernels_[i].device;
      p.bias_kernel = kernels_[4].device;
      p.kernel_dtype = c_.float_weights ? Float::kF32 : kFloat<T>;
      Check(genie::Launch(p, nullptr), "projection backward");
    } else {
      genie::AttentionWeightsBackward p = {};
      Common(p, copy);
      Heads(p, d);
      p.statistics = statistics_;
      p.kernel_sums = part_sums_[2], p.sums = part_sums_[3];
      p.bias_kernel_sums = part_sums_[4], p.bias_sums = part_sums_[5];
      p.parts = Parts(2);
      Check(genie::Launch(p, nullptr), "weights backward");
    }
  }

  // Runs twice into poisoned results; returns whether all is well and prints a line.
  bool Verify() {
    const Faults faults = results_.RunTwice([&] {
      for (int which = 0; which < 3; ++which) Run(which, 0);
    });
    std::vector<std::vector<float>> sums;
    for (size_t i = 0; i < part_sums_.size(); ++i) {
      const int64_t count = c_.batch * Parts(i < 2 ? 0 : 2);
      const auto found = Memory::ToHost(part_sums_[i], count * part_sizes_[i]);
      sums.emplace_back(part_sizes_[i]);
      for (size_t k = 0; k < found.size(); ++k) sums[i][k % part_sizes_[i]] += found[k];
    }
    Errors errors[kChecks];
    ComparePairs(errors);
    if (c_.pairs() <= 2500) CompareSums(errors, sums);
    bool good = !faults.any();
    PrintCase(kName<T>, c_);
    const char* names[] = {"d_o", "d_gate", "dz", "dWo", "dW", "dnorm"};
    for (int i = 0; i < kChecks; ++i) {
      good &= errors[i].good();
      std::printf("%s %.2e of %.2e ", names[i], errors[i].error(), errors[i].yardstick());
    }
    std::printf("NaN %llu differ %llu guard %llu %s\n", faults.nan, faults.differ, faults.guard,
                good ? "pass" : "FAIL");
    return good;
  }

  float Time(int which) const {
    return MedianTime([&](int i) { Run(which, i % copies_); });
  }

 private:
  static constexpr int kChecks = 6;
  int64_t PairsSize() const { return c_.pairs() * c_.channels; }
  int64_t HiddenSize() const { return c_.pairs() * c_.hidden(); }
  int64_t queries() const { return c_.node == Node::kEnding ? c_.columns : c_.rows; }
  int64_t keys() const { return c_.node == Node::kEnding ? c_.rows : c_.columns; }
  int64_t BiasColumns() const { return (keys() + 7) / 8 * 8; }
  int64_t BiasSize() const { return c_.batch * c_.heads * queries() * BiasColumns(); }
  int64_t Parts(int which) const { return which == 0 ? parts_ : std::max<int64_t>(1, parts_ / 2); }
  int Width(int i) const { return i < 4 ? c_.hidden() : c_.heads; }
  void Pairs(T** to) { memory_.Allocate(to, PairsSize() * sizeof(T) * copies_); }
  void Hidden(T** to) { memory_.Allocate(to, HiddenSize() * sizeof(T) * copies_); }

  template <typename P>
  void Common(P& p, int copy) const {
    p.z = z_ + copy * PairsSize(), p.channels = c_.channels, p.ending = c_.ending();
    p.dtype = kFloat<T>, p.batch = c_.batch, p.rows = c_.rows, p.columns = c_.columns;
  }
  template <typename P>
  void Heads(P& p, const T* const (&d)[4]) const {
    for (int i = 0; i < 4; ++i) p.d[i] = d[i];
    p.d_bias = d_bias_, p.heads = c_.heads, p.head_width = c_.width;
    p.bias_as_z = c_.node == Node::kUnswapped;
  }

  // The gradient of projection i's output `column` at a pair, without the forward's factor.
  double Gradient(int64_t pair, int i, int column) const {
    const int64_t at = c_.attended(pair);
    if (i < 3) {
      const double d = Low<T>(0.1f + Draw(5 + i, at * c_.hidden() + column));
      return i == 0 ? d * kLog2E / std::sqrt(double(c_.width)) : d;
    }
    const int64_t order = c_.node == Node::kUnswapped ? pair : at;
    const int64_t query = order / keys() % queries(), b = order / keys() / queries();
    const int64_t row = (b * c_.heads + column) * queries() + query;
    return kLog2E * (0.1f + kBiasScale * Draw(9, row * BiasColumns() + order % keys()));
  }

  struct Pair {
    std::vector<double> z, x, exact_d_o, low_d_o, exact_gate, low_gate, exact_a, low_a, d_out;
    // Gradients of all projections, of x and of z.
    std::vector<double> d[5], low_d[5], dx, low_dx, y, dz, low_dz;
  };
  Pair Reference(int64_t pair) const;
  void Norm(Pair& p, const std::vector<double>& dx, std::vector<double>& dz, int64_t pair) const;
  void ComparePairs(Errors (&errors)[kChecks]);
  void CompareSums(Errors (&errors)[kChecks], const std::vector<std::vector<float>>& sums);

  Case c_;
  int copies_;
  int64_t parts_;
  Memory memory_;
  Results results_;
  Weight<T> norm_scale_, norm_bias_, gate_bias_, out_;
  std::vector<Weight<T>> kernels_;  // q, k, v, gate, bias
  T *z_, *d_out_, *o_, *d_[4], *d_o_, *dz_;
  float* d_bias_;
  float2* statistics_;
  std::vector<float*> part_sums_;
  std::vector<int64_t> part_sizes_;
  uint8_t* mask_;
};
