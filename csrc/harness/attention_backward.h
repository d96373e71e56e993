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
    memory_.Allocate(&d_o_, HiddenSize() * sizeof(T) * copies + kGuard);
    memory_.Allocate(&d_[3], HiddenSize() * sizeof(T) * copies + kGuard);
    memory_.Allocate(&dz_, PairsSize() * sizeof(T) * copies + kGuard);
    memory_.Allocate(&d_bias_, BiasSize() * sizeof(float));
    memory_.Allocate(&statistics_, c.pairs() * sizeof(float2));
    const int64_t square = int64_t{c.channels} * c.hidden();
    for (int64_t size : {square, int64_t{c.channels}, 4 * square, int64_t{4} * c.hidden(),
                         int64_t{16} * c.channels, int64_t{16}}) {
      part_sizes_.push_back(size);
      part_sums_.emplace_back();
      memory_.Allocate(&part_sums_.back(), c.batch * parts_ * size * sizeof(float));
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
      p.norm_scale = Data(norm_scale_), p.norm_bias = Data(norm_bias_);
      p.gate_kernel = kernels_[3].device, p.out_kernel = out_.device;
      p.kernel_dtype = c_.float_weights ? Float::kF32 : kFloat<T>;
      p.gate_bias = Data(gate_bias_), p.parts = parts_, p.hidden = c_.hidden();
      Check(genie::Launch(p, nullptr), "output backward");
    } else if (which == 1) {
      genie::AttentionProjectionBackward p = {};
      Common(p, copy);
      Heads(p, d);
      p.d_out = c_.residual ? d_out_ + pairs : nullptr, p.dz = dz_ + pairs;
      p.norm_scale = Data(norm_scale_), p.statistics = statistics_;
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
    unsigned long long* faults;
    memory_.Allocate(&faults, 16);
    Check(cudaMemset(faults, 0, 16), "faults");
    struct Result {
      T *data, *kept;
      int64_t size;
    } results[] = {
        {d_o_, nullptr, HiddenSize()}, {d_[3], nullptr, HiddenSize()}, {dz_, nullptr, PairsSize()}};
    bool guarded = true, same = true;
    std::vector<std::vector<float>> sums[2];
    for (int run = 0; run < 2; ++run) {
      for (auto& [data, kept, size] : results) {
        Check(cudaMemset(data, 0xFF, size * sizeof(T) + kGuard), "poison");
      }
      for (size_t i = 0; i < part_sums_.size(); ++i) {
        Check(cudaMemset(part_sums_[i], 0xFF, c_.batch * parts_ * part_sizes_[i] * 4), "poison");
      }
      for (int which = 0; which < 3; ++which) Run(which, 0);
      Check(cudaDeviceSynchronize(), "run");
      for (auto& [data, kept, size] : results) {
        for (uint8_t x :
             Memory::ToHost(reinterpret_cast<uint8_t*>(data) + size * sizeof(T), kGuard)) {
          guarded &= x == 0xFF;
        }
        if (run == 1) {
          Inspect<<<4096, 256>>>(data, kept, size, faults);
        } else {
          memory_.Allocate(&kept, size * sizeof(T));
          Check(cudaMemcpy(kept, data, size * sizeof(T), cudaMemcpyDeviceToDevice), "keep");
        }
      }
      for (size_t i = 0; i < part_sums_.size(); ++i) {
        const int64_t count = c_.batch * Parts(i < 2 ? 0 : 2);
        const auto found = Memory::ToHost(part_sums_[i], count * part_sizes_[i]);
        std::vector<float> total(part_sizes_[i]);
        for (size_t k = 0; k < found.size(); ++k) total[k % part_sizes_[i]] += found[k];
        sums[run].push_back(total);
      }
    }
    for (size_t i = 0; i < sums[0].size(); ++i) {
      same &= !std::memcmp(sums[0][i].data(), sums[1][i].data(), sums[0][i].size() * 4);
    }
    const auto found = Memory::ToHost(faults, 2);
    Errors errors[kChecks];
    ComparePairs(errors);
    if (c_.pairs() <= 20000) CompareSums(errors, sums[0]);
    bool good = guarded && same && !found[0] && !found[1];
    PrintCase(kName<T>, c_);
    const char* names[] = {"d_o", "d_gate", "dz", "dWo", "dW", "dnorm"};
    for (int i = 0; i < kChecks; ++i) {
      good &= errors[i].good();
      std::printf("%s %.2e of %.2e ", names[i], errors[i].error(), errors[i].yardstick());
    }
    std::printf("NaN %llu differ %llu %s %s %s\n", found[0], found[1], same ? "" : "SUMS DIFFER",
                guarded ? "" : "GUARD", good ? "pass" : "FAIL");
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
  static float* Data(const Weight<T>& w) { return static_cast<float*>(w.device); }
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
  Weight<T> norm_scale_, norm_bias_, gate_bias_, out_;
  std::vector<Weight<T>> kernels_;  // q, k, v, gate, bias
  T *z_, *d_out_, *o_, *d_[4], *d_o_, *dz_;
  float* d_bias_;
  float2* statistics_;
  std::vector<float*> part_sums_;
  std::vector<int64_t> part_sizes_;
  uint8_t* mask_;
};

template <typename T>
typename Problem<T>::Pair Problem<T>::Reference(int64_t pair) const {
  const int channels = c_.channels, hidden = c_.hidden();
  Pair p;
  p.x = Normed<T>(c_, pair, norm_scale_.host, norm_bias_.host, &p.z);
  for (int c = 0; c < channels; ++c) {
    p.y.push_back((p.x[c] - norm_bias_.host[c]) / norm_scale_.host[c]);
    p.d_out.push_back(Low<T>(0.1f + Draw(4, pair * channels + c)));
  }
  for (int h = 0; h < hidden; ++h) {
    double pre = gate_bias_.host[h], low_pre = 0, d_a = 0, low_d_a = 0;
    for (int c = 0; c < channels; ++c) {
      const double weight = kernels_[3].host[int64_t{c} * hidden + h];
      pre += p.x[c] * weight, low_pre += Low<T>(p.x[c]) * Low<T>(weight);
      const double out = out_.host[int64_t{h} * channels + c];
      d_a += p.d_out[c] * out, low_d_a += p.d_out[c] * Low<T>(out);
    }
    const double o = Low<T>(0.2f + Draw(3, c_.attended(pair) * hidden + h));
    const double s = 1 / (1 + std::exp(-pre));
    const double low_s = Low<T>(1 / (1 + std::exp(-Low<T>(Low<T>(low_pre) + gate_bias_.host[h]))));
    low_d_a = Low<T>(low_d_a);
    p.exact_a.push_back(s * o), p.low_a.push_back(Low<T>(low_s * o));
    p.exact_d_o.push_back(s * d_a), p.low_d_o.push_back(Low<T>(low_s * low_d_a));
    p.d[3].push_back(d_a * o * s * (1 - s));
    p.low_d[3].push_back(Low<T>(Low<T>(low_d_a * o) * Low<T>(low_s * Low<T>(1 - low_s))));
  }
  for (int i : {0, 1, 2, 4}) {
    for (int h = 0; h < Width(i); ++h) {
      p.d[i].push_back(Gradient(pair, i == 4 ? 3 : i, h));
      p.low_d[i].push_back(Low<T>(p.d[i].back()));
    }
  }
  p.dx.resize(channels), p.low_dx.resize(channels);
  for (int c = 0; c < channels; ++c) {
    for (int i = 0; i < 5; ++i) {
      double sum = 0, rounded = 0;
      for (int h = 0; h < Width(i); ++h) {
        const double weight = kernels_[i].host[int64_t{c} * Width(i) + h];
        sum += p.d[i][h] * weight, rounded += p.low_d[i][h] * Low<T>(weight);
      }
      p.dx[c] += sum, p.low_dx[c] = Low<T>(p.low_dx[c] + Low<T>(rounded));
    }
  }
  Norm(p, p.dx, p.dz, pair), Norm(p, p.low_dx, p.low_dz, pair);
  return p;
}

template <typename T>
void Problem<T>::Norm(Pair& p, const std::vector<double>& dx, std::vector<double>& dz,
                      int64_t pair) const {
  const int channels = c_.channels;
  double mean = 0, along = 0, z_mean = 0, variance = 0;
  for (int c = 0; c < channels; ++c) {
    mean += dx[c] * norm_scale_.host[c] / channels;
    along += dx[c] * norm_scale_.host[c] * p.y[c] / channels;
    z_mean += p.z[c] / channels;
  }
  for (int c = 0; c < channels; ++c) variance += std::pow(p.z[c] - z_mean, 2) / channels;
  for (int c = 0; c < channels; ++c) {
    const double update = (dx[c] * norm_scale_.host[c] - mean - p.y[c] * along) /
                          std::sqrt(variance + double{kEpsilon});
    dz.push_back(Garbage(c_.mask, pair) ? 0 : update + (c_.residual ? p.d_out[c] : 0));
  }
}

template <typename T>
void Problem<T>::ComparePairs(Errors (&errors)[kChecks]) {
  const auto samples = Samples(c_.pairs());
  const int hidden = c_.hidden(), channels = c_.channels, width = 2 * hidden + channels;
  std::vector<T> got(samples.size() * width);
  for (size_t s = 0; s < samples.size(); ++s) {
    const int64_t at = c_.attended(samples[s]);
    const auto copy = [&](int offset, const T* from, int size) {
      Check(
          cudaMemcpyAsync(&got[s * width + offset], from, size * sizeof(T), cudaMemcpyDeviceToHost),
          "sample");
    };
    copy(0, d_o_ + at * hidden, hidden), copy(hidden, d_[3] + at * hidden, hidden);
    copy(2 * hidden, dz_ + samples[s] * channels, channels);
  }
  Check(cudaDeviceSynchronize(), "samples");
  Compare(samples.size(), errors, [&](int s, Errors* errors) {
    const Pair p = Reference(samples[s]);
    const T* found = &got[int64_t{s} * width];
    for (int h = 0; h < hidden; ++h) {
      errors[0].Add(Widen(found[h]), p.low_d_o[h], p.exact_d_o[h]);
      errors[1].Add(Widen(found[hidden + h]), p.low_d[3][h], p.d[3][h]);
    }
    for (int c = 0; c < channels; ++c) {
      const bool garbage = Garbage(c_.mask, samples[s]);
      errors[2].Add(Widen(found[2 * hidden + c]), garbage ? 0 : Low<T>(p.low_dz[c]), p.dz[c]);
    }
  });
}

template <typename T>
void Problem<T>::CompareSums(Errors (&errors)[kChecks],
                             const std::vector<std::vector<float>>& sums) {
  const int hidden = c_.hidden(), channels = c_.channels;
  const int columns = 4 * hidden + c_.heads;  // of dW
  constexpr int kThreads = 16;
  struct Totals {
    std::vector<double> out, d_out, kernel, norm;
  };
  std::vector<Totals> exact(kThreads), rounded(kThreads);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (Totals* totals : {&exact[t], &rounded[t]}) {
        totals->out.resize(hidden * channels), totals->d_out.resize(channels);
        totals->kernel.resize(channels * columns), totals->norm.resize(2 * channels);
      }
      for (int64_t pair = t; pair < c_.pairs(); pair += kThreads) {
        const Pair p = Reference(pair);
        const auto add = [&](Totals& to, const auto& a, const auto& x, const auto* d,
                             const auto& dx) {
          for (int c = 0; c < channels; ++c) {
            for (int h = 0; h < hidden; ++h) to.out[h * channels + c] += a[h] * p.d_out[c];
            int column = c * columns;
            for (int i = 0; i < 5; ++i) {
              for (int h = 0; h < Width(i); ++h) to.kernel[column++] += x[c] * d[i][h];
            }
            to.d_out[c] += p.d_out[c];
            to.norm[c] += dx[c] * p.y[c], to.norm[channels + c] += dx[c];
          }
        };
        std::vector<double> low_x;
        for (double x : p.x) low_x.push_back(Low<T>(x));
        add(exact[t], p.exact_a, p.x, p.d, p.dx);
        add(rounded[t], p.low_a, low_x, p.low_d, p.low_dx);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  const auto total = [&](const std::vector<Totals>& from, auto member, int64_t at) {
    double sum = 0;
    for (const Totals& totals : from) sum += (totals.*member)[at];
    return sum;
  };
  const auto judge = [&](int check, double got, auto member, int64_t at) {
    errors[check].Add(got, total(rounded, member, at), total(exact, member, at));
  };
  const double factors[] = {kLog2E / std::sqrt(double(c_.width)), 1, 1, 1, kLog2E};
  std::vector<double> norm(2 * channels);
  for (int c = 0; c < channels; ++c) {
    for (int h = 0; h < hidden; ++h) {
      judge(3, sums[0][h * channels + c], &Totals::out, h * channels + c);
    }
    judge(3, sums[1][c], &Totals::d_out, c);
    int64_t column = int64_t{c} * columns;
    for (int i = 0; i < 5; ++i) {
      for (int h = 0; h < Width(i); ++h) {
        const double product =
            factors[i] * (i < 4 ? sums[2][(i * channels + c) * hidden + h] : sums[4][c * 16 + h]);
        const double sum = factors[i] * (i < 4 ? sums[3][i * hidden + h] : sums[5][h]);
        const double weight = kernels_[i].host[int64_t{c} * Width(i) + h];
        judge(4, norm_scale_.host[c] * product + norm_bias_.host[c] * sum, &Totals::kernel,
              column++);
        norm[c] += weight * product, norm[channels + c] += weight * sum;
      }
    }
  }
  for (int i = 0; i < 2 * channels; ++i) judge(5, norm[i], &Totals::norm, i);
}
