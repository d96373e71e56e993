// One problem of the gated output's derivative: its inputs on the device, a checked run, its time.
#pragma once

#include <array>
#include <mutex>

#include "harness/gated_output.h"
#include "triangle_multiplication/output_backward_sm90.h"

// Results in the order of GatedOutputBackward: dz, dt, then the gradients of weights.
constexpr int kResults = 10;
constexpr const char* kNames[kResults] = {"dz", "dt", "norm_in", "",   "norm_out",
                                          "",   "Wo", "Wg",      "bo", "bg"};
using Arrays = std::array<std::vector<double>, kResults>;

template <typename T>
class BackwardProblem : public Problem<T> {
 public:
  using typename Problem<T>::Contracted;
  BackwardProblem(const Case& c, int copies) : Problem<T>(c, copies) {
    const int64_t tiles = c.rows * ((c.columns + 63) / 64);
    blocks_ = std::max<int64_t>(1, std::min<int64_t>(tiles, 132 / c.batch));
    Memory& memory = this->memory_;
    memory.Allocate(&d_out_, c.elements() * sizeof(T) * copies);
    results_.Add(memory, &dz_, c.elements() * copies);
    results_.Add(memory, &dt_, c.contracted() * copies);
    results_.Add(memory, &partials_,
                 c.batch * blocks_ * genie::OutputPartial(c.channels, c.hidden));
    for (int i = 2; i < kResults; ++i) results_.Add(memory, &gradient_[i], Size(i));
    for (int i = 0; i < copies; ++i) {
      FillDraws<<<4096, 256>>>(d_out_ + i * c.elements(), c.elements(), 5, 1.f, 0.f);
    }
    Check(cudaDeviceSynchronize(), "fill cotangent");
  }

  // Elements of a gradient of weights, all batch entries together.
  int64_t Size(int i) const {
    const int64_t channels = this->c_.channels, hidden = this->c_.hidden;
    const int64_t sizes[kResults] = {0,        0,       channels,          channels,
                                     hidden,   hidden,  hidden * channels, channels * channels,
                                     channels, channels};
    return this->c_.batch * sizes[i];
  }

  genie::GatedOutputBackward Arguments(int copy) const {
    const int64_t pairs = copy * this->c_.elements();
    genie::GatedOutputBackward p = {};
    p.of = Problem<T>::Arguments(copy);
    p.d_out = d_out_ + pairs, p.dz = dz_ + pairs, p.dt = dt_ + copy * this->c_.contracted();
    p.partials = partials_, p.blocks = blocks_;
    p.d_norm_in_scale = gradient_[2], p.d_norm_in_bias = gradient_[3];
    p.d_norm_out_scale = gradient_[4], p.d_norm_out_bias = gradient_[5];
    p.d_proj_kernel = gradient_[6], p.d_gate_kernel = gradient_[7];
    if (this->c_.bias) p.d_proj_bias = gradient_[8], p.d_gate_bias = gradient_[9];
    return p;
  }

  // Runs twice into poisoned outputs; returns whether all is well and prints a line.
  bool Verify() {
    const Case& c = this->c_;
    const Faults faults =
        results_.RunTwice([&] { Check(genie::Launch(Arguments(0), nullptr), "launch"); });
    const int results = c.bias ? kResults : 8;
    Arrays got = {Fetch(dz_, c.elements()), Fetch(dt_, c.contracted())};
    for (int i = 2; i < results; ++i) got[i] = Fetch(gradient_[i], Size(i));
    int64_t pads = 0;
    for (int64_t i = 0; i < c.contracted(); ++i) pads += Pad(i) && got[1][i] != 0;
    Errors errors[kResults];
    Compare(got, errors);
    bool good = !faults.any() && !pads;
    std::printf("%s B=%-2ld I=%-4ld J=%-4ld C=%-3d Hm=%-3d mask=%d bias=%d f32=%d residual=%d ",
                kName<T>, c.batch, c.rows, c.columns, c.channels, c.hidden,
                static_cast<int>(c.mask), c.bias, c.float_weights, c.residual);
    for (int i = 0; i < results; ++i) {
      std::printf(" %s%s %.2e/%.2e", errors[i].good() ? "" : "!", kNames[i], errors[i].error(),
                  errors[i].yardstick());
      good &= errors[i].good();
    }
    std::printf("  pads %ld  NaN %llu  differ %llu  guard %llu  %s\n", pads, faults.nan,
                faults.differ, faults.guard, good ? "pass" : "FAIL");
    return good;
  }

  float Time() const {
    return MedianTime(
        [&](int i) { Check(genie::Launch(Arguments(i % this->copies_), nullptr), "launch"); });
  }
  float TimeReduction() const {
    return MedianTime([&](int) { Check(genie::LaunchReduction(Arguments(0), nullptr), "reduce"); });
  }

 private:
  // Whether element i of t lies past I or J.
  bool Pad(int64_t i) const {
    const Case& c = this->c_;
    return i % c.columns_padded() >= c.columns ||
           i / c.columns_padded() % c.rows_padded() >= c.rows;
  }
  template <typename P>
  static std::vector<double> Fetch(const P* from, int64_t size) {
    std::vector<double> to;
    for (P x : Memory::ToHost(from, size)) to.push_back(Widen(x));
    return to;
  }

  void Compare(const Arrays& got, Errors (&errors)[kResults]) const {
    Arrays exact, coarse;
    for (int i = 2; i < kResults; ++i) exact[i].resize(Size(i)), coarse[i].resize(Size(i));
    const Arrays zeros = exact;
    std::mutex mutex;
    OnThreads([&](int t) {
      Arrays own_exact = zeros, own_coarse = zeros;
      Errors own[2];
      for (int64_t pair = t; pair < this->c_.pairs(); pair += kHostThreads) {
        ComparePair(pair, got, own_exact, own_coarse, own);
      }
      const std::lock_guard<std::mutex> lock(mutex);
      for (int i = 0; i < 2; ++i) errors[i].Add(own[i]);
      for (int i = 2; i < kResults; ++i) {
        for (size_t j = 0; j < exact[i].size(); ++j) {
          exact[i][j] += own_exact[i][j], coarse[i][j] += own_coarse[i][j];
        }
      }
    });
    for (int i = 2; i < (this->c_.bias ? kResults : 8); ++i) {
      for (size_t j = 0; j < exact[i].size(); ++j) {
        const bool product = i == 6 || i == 7;  // of matrices, which round their results
        errors[i].Add(got[i][j], product ? Low<T>(coarse[i][j]) : coarse[i][j], exact[i][j]);
      }
    }
  }

  // One branch of a pair: the norm of its input, the projection, and back.
  struct Branch {
    int gate;  // which weights
    std::vector<double> normal, input, projected, d;
    double scale;  // 1 / deviation
    const std::vector<float>&weights, &scales;

    Branch(const BackwardProblem& p, int gate, const std::vector<double>& values, bool low)
        : gate(gate),
          normal(values),
          input(values),
          projected(p.c_.channels),
          d(p.c_.channels),
          weights(p.kernels_[gate].host),
          scales(p.norms_[gate ? 0 : 2].host) {
      const auto& biases = p.norms_[gate ? 1 : 3].host;
      const int channels = p.c_.channels;
      double mean = 0, variance = 0;
      for (double x : values) mean += x / values.size();
      for (double x : values) variance += (x - mean) * (x - mean) / values.size();
      scale = 1 / std::sqrt(variance + double{kEpsilon});
      for (size_t k = 0; k < values.size(); ++k) {
        normal[k] = (values[k] - mean) * scale;
        input[k] = normal[k] * scales[k] + biases[k];
        if (low) input[k] = Low<T>(input[k]);
        for (int c = 0; c < channels; ++c) {
          const double weight = weights[k * channels + c];
          projected[c] += input[k] * (low ? Low<T>(weight) : weight);
        }
      }
      for (int c = 0; c < channels; ++c) {
        if (low) projected[c] = Low<T>(projected[c]);
        if (p.c_.bias) projected[c] += p.biases_[gate].host[c];
        if (low) projected[c] = Low<T>(projected[c]);
      }
    }

    // From d, that of `projected`: the input's gradient; those of weights are added to `to`.
    std::vector<double> Back(Arrays& to, int64_t batch, bool low) const {
      const size_t inputs = input.size(), channels = projected.size();
      std::vector<double> result(inputs);
      double mean = 0, slope = 0;
      for (size_t k = 0; k < inputs; ++k) {
        double sum = 0;
        double* product = &to[6 + gate][(batch * inputs + k) * channels];
        for (size_t c = 0; c < channels; ++c) {
          const double weight = weights[k * channels + c];
          sum += d[c] * (low ? Low<T>(weight) : weight);
          product[c] += input[k] * d[c];
        }
        if (low) sum = Low<T>(sum);
        to[gate ? 2 : 4][batch * inputs + k] += sum * normal[k];
        to[gate ? 3 : 5][batch * inputs + k] += sum;
        result[k] = sum * scales[k];
        mean += result[k] / inputs;
        slope += result[k] * normal[k] / inputs;
      }
      for (size_t c = 0; c < channels; ++c) to[8 + gate][batch * channels + c] += d[c];
      for (size_t k = 0; k < inputs; ++k) {
        result[k] = (result[k] - mean - normal[k] * slope) * scale;
      }
      return result;
    }
  };

  // dz and dt of a pair, exact or rounded after every step.
  std::array<std::vector<double>, 2> Gradients(int64_t pair, Arrays& to, bool low) const {
    const Case& c = this->c_;
    const bool readable = Readable(c.mask, pair);
    std::vector<double> z(c.channels), t(c.hidden), d_out(c.channels);
    const auto round = [&](double x) { return low ? Low<T>(x) : x; };
    for (int i = 0; i < c.channels; ++i) {
      z[i] = readable ? PairValue<T>(pair * c.channels + i) : 0;
      d_out[i] = Widen(Round<T>(Draw(5, pair * c.channels + i)));
    }
    for (int h = 0; h < c.hidden; ++h) t[h] = ContractedValue<Contracted>(c.at(pair, h));
    Branch proj(*this, 0, t, low), gate(*this, 1, z, low);
    for (int i = 0; i < c.channels; ++i) {
      const double g = round(1 / (1 + std::exp(-gate.projected[i])));
      proj.d[i] = round(d_out[i] * g);
      const double slope = round(g * round(1 - g));
      gate.d[i] = round(round(d_out[i] * proj.projected[i]) * slope);
    }
    const int64_t batch = pair / c.columns / c.rows;
    std::array<std::vector<double>, 2> result = {gate.Back(to, batch, low),
                                                 proj.Back(to, batch, low)};
    for (double& x : result[0]) x = round(x);
    if (sizeof(Contracted) == 2) {
      for (double& x : result[1]) x = round(x);
    }
    for (int i = 0; i < c.channels; ++i) {
      if (c.residual) result[0][i] = round(result[0][i] + d_out[i]);
      if (!readable) result[0][i] = 0;
    }
    return result;
  }

  void ComparePair(int64_t pair, const Arrays& got, Arrays& exact, Arrays& coarse,
                   Errors* errors) const {
    const Case& c = this->c_;
    const auto want = Gradients(pair, exact, false), layer = Gradients(pair, coarse, true);
    for (int i = 0; i < c.channels; ++i) {
      errors[0].Add(got[0][pair * c.channels + i], layer[0][i], want[0][i]);
    }
    for (int h = 0; h < c.hidden; ++h) {
      errors[1].Add(got[1][c.at(pair, h)], layer[1][h], want[1][h]);
    }
  }

  int blocks_;
  Results results_;
  T *d_out_, *dz_;
  Contracted* dt_;
  float *partials_, *gradient_[kResults];
};
