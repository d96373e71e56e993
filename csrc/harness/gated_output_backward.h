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
__global__ void FillCotangent(T* d_out, int64_t size) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += step) {
    d_out[i] = Round<T>(Draw(5, i));
  }
}

template <typename T>
class BackwardProblem : public Problem<T> {
 public:
  using typename Problem<T>::Contracted;
  BackwardProblem(const Case& c, int copies, int blocks) : Problem<T>(c, copies) {
    const int64_t tiles = c.rows * ((c.columns + 63) / 64);
    blocks_ = std::max<int64_t>(1, std::min<int64_t>(tiles, blocks / c.batch));
    this->Allocate(&d_out_, c.elements() * sizeof(T) * copies);
    this->Allocate(&dz_, c.elements() * sizeof(T) * copies + kGuard);
    this->Allocate(&dt_, c.contracted() * sizeof(Contracted) * copies + kGuard);
    this->Allocate(&partials_,
                   c.batch * blocks_ * genie::OutputPartial(c.channels, c.hidden) * 4 + kGuard);
    for (int i = 2; i < kResults; ++i) this->Allocate(&gradient_[i], Size(i) * 4 + kGuard);
    for (int i = 0; i < copies; ++i) {
      FillCotangent<<<4096, 256>>>(d_out_ + i * c.elements(), c.elements());
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
    Arrays got, again;
    bool guarded = Run(&got);
    guarded &= Run(&again);
    int64_t differ = 0, pads = 0;
    for (int i = 0; i < kResults; ++i) {
      for (size_t j = 0; j < got[i].size(); ++j) differ += !(got[i][j] == again[i][j]);
    }
    const Case& c = this->c_;
    for (int64_t i = 0; i < c.contracted(); ++i) {
      pads += Pad(i) && got[1][i] != 0;
    }
    double sums[kResults][3] = {};
    Compare(got, sums);
    bool good = guarded && !differ && !pads;
    std::printf("%s B=%-2ld I=%-4ld J=%-4ld C=%-3d Hm=%-3d mask=%d bias=%d f32=%d residual=%d ",
                std::is_same_v<T, __half> ? "f16 " : "bf16", c.batch, c.rows, c.columns, c.channels,
                c.hidden, static_cast<int>(c.mask), c.bias, c.float_weights, c.residual);
    for (int i = 0; i < kResults; ++i) {
      if (i >= 8 && !c.bias) continue;
      const double error = std::sqrt(sums[i][0] / sums[i][2]);
      const double yardstick = std::sqrt(sums[i][1] / sums[i][2]);
      const bool well = error <= 1.05 * yardstick;
      std::printf(" %s%s %.2e/%.2e", well ? "" : "!", kNames[i], error, yardstick);
      good &= well;
    }
    std::printf("  differ %ld  pads %ld  guard %s  %s\n", differ, pads, guarded ? "ok" : "BROKEN",
                good ? "pass" : "FAIL");
    return good;
  }

  float Time() {
    return Median(
        [&](int i) { Check(genie::Launch(Arguments(i % this->copies_), nullptr), "launch"); });
  }
  float TimeReduction() {
    return Median([&](int) { Check(genie::LaunchReduction(Arguments(0), nullptr), "reduce"); });
  }

 private:
  // Whether element i of t lies past I or J.
  bool Pad(int64_t i) const {
    const Case& c = this->c_;
    return i % c.columns_padded() >= c.columns ||
           i / c.columns_padded() % c.rows_padded() >= c.rows;
  }

  template <typename F>
  float Median(F&& launch) {
    constexpr int kRepeats = 15, kCalls = 8;
    cudaEvent_t start, stop;
    cudaEventCreate(&start);
    cudaEventCreate(&stop);
    std::vector<float> times;
    for (int r = -3; r < kRepeats; ++r) {
      cudaEventRecord(start);
      for (int i = 0; i < kCalls; ++i) launch(i);
      cudaEventRecord(stop);
      Check(cudaEventSynchronize(stop), "time");
      float milliseconds;
      cudaEventElapsedTime(&milliseconds, start, stop);
      if (r >= 0) times.push_back(milliseconds / kCalls);
    }
    std::sort(times.begin(), times.end());
    return times[kRepeats / 2];
  }

  // Poisons, runs and fetches one result; whether nothing lies past its end.
  template <typename P>
  bool Fetch(const P* from, int64_t size, std::vector<double>* to) {
    to->clear();
    for (P x : this->ToHost(from, size)) to->push_back(Widen(x));
    bool guarded = true;
    for (uint8_t x : this->ToHost(reinterpret_cast<const uint8_t*>(from + size), kGuard)) {
      guarded &= x == 0xFF;
    }
    return guarded;
  }
  bool Run(Arrays* got) {
    const Case& c = this->c_;
    const int64_t partials = c.batch * blocks_ * genie::OutputPartial(c.channels, c.hidden);
    Check(cudaMemset(dz_, 0xFF, c.elements() * sizeof(T) + kGuard), "poison");
    Check(cudaMemset(dt_, 0xFF, c.contracted() * sizeof(Contracted) + kGuard), "poison");
    Check(cudaMemset(partials_, 0xFF, partials * 4 + kGuard), "poison");
    for (int i = 2; i < kResults; ++i) {
      Check(cudaMemset(gradient_[i], 0xFF, Size(i) * 4 + kGuard), "poison");
    }
    Check(genie::Launch(Arguments(0), nullptr), "launch");
    Check(cudaDeviceSynchronize(), "run");
    std::vector<double> workspace;
    bool guarded = Fetch(dz_, c.elements(), &(*got)[0]);
    guarded &= Fetch(dt_, c.contracted(), &(*got)[1]);
    guarded &= Fetch(partials_, partials, &workspace);
    for (int i = 2; i < (c.bias ? kResults : 8); ++i) {
      guarded &= Fetch(gradient_[i], Size(i), &(*got)[i]);
    }
    return guarded;
  }

  // Squared errors of the kernel and of a layer that rounds after every step, and squared truth.
  void Compare(const Arrays& got, double (&sums)[kResults][3]) {
    const Weights weights = Problem<T>::ToHost();
    Arrays exact, coarse;
    for (int i = 2; i < kResults; ++i) exact[i].resize(Size(i)), coarse[i].resize(Size(i));
    constexpr int kThreads = 16;
    std::mutex mutex;
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        Arrays own_exact, own_coarse;
        double own[kResults][3] = {};
        for (int i = 2; i < kResults; ++i)
          own_exact[i].resize(Size(i)), own_coarse[i].resize(Size(i));
        for (int64_t pair = t; pair < this->c_.pairs(); pair += kThreads) {
          ComparePair(pair, got, weights, own_exact, own_coarse, own);
        }
        const std::lock_guard<std::mutex> lock(mutex);
        for (int i = 0; i < kResults; ++i) {
          for (size_t j = 0; j < exact[i].size(); ++j) {
            exact[i][j] += own_exact[i][j], coarse[i][j] += own_coarse[i][j];
          }
          for (int j = 0; j < 3; ++j) sums[i][j] += own[i][j];
        }
      });
    }
    for (auto& thread : threads) thread.join();
    for (int i = 2; i < (this->c_.bias ? kResults : 8); ++i) {
      for (size_t j = 0; j < exact[i].size(); ++j) {
        const bool product = i == 6 || i == 7;  // of matrices, which round their results
        Add(sums[i], got[i][j], exact[i][j], product ? this->Low(coarse[i][j]) : coarse[i][j]);
      }
    }
  }

  static void Add(double (&sums)[3], double got, double want, double layer) {
    const double wrong = std::isfinite(got) ? got - want : 1e30;
    sums[0] += wrong * wrong;
    sums[1] += (layer - want) * (layer - want);
    sums[2] += want * want;
  }

  // One branch of a pair: the norm of its input, the projection, and back.
  struct Branch {
    int gate;  // which weights
    std::vector<double> normal, input, projected, d;
    double scale;  // 1 / deviation

    Branch(int gate, const std::vector<double>& values, const Weights& w, int channels, bool bias,
           bool low)
        : gate(gate), normal(values), input(values), projected(channels), d(channels) {
      const auto &scales = w.norm[gate ? 0 : 2], &biases = w.norm[gate ? 1 : 3];
      double mean = 0, variance = 0;
      for (double x : values) mean += x / values.size();
      for (double x : values) variance += (x - mean) * (x - mean) / values.size();
      scale = 1 / std::sqrt(variance + double{kEpsilon});
      for (size_t k = 0; k < values.size(); ++k) {
        normal[k] = (values[k] - mean) * scale;
        input[k] = normal[k] * scales[k] + biases[k];
        if (low) input[k] = Low(input[k]);
        for (int c = 0; c < channels; ++c) {
          const double weight = w.kernel[gate][k * channels + c];
          projected[c] += input[k] * (low ? Low(weight) : weight);
        }
      }
      for (int c = 0; c < channels; ++c) {
        if (low) projected[c] = Low(projected[c]);
        if (bias) projected[c] += w.bias[gate][c];
        if (low) projected[c] = Low(projected[c]);
      }
    }
    static double Low(double x) { return Problem<T>::Low(x); }

    // From d, that of `projected`: the input's gradient; those of weights are added to `to`.
    std::vector<double> Back(const Weights& w, Arrays& to, int64_t batch, bool low) const {
      const size_t inputs = input.size(), channels = projected.size();
      const auto& scales = w.norm[gate ? 0 : 2];
      std::vector<double> result(inputs);
      double mean = 0, slope = 0;
      for (size_t k = 0; k < inputs; ++k) {
        double sum = 0;
        double* product = &to[6 + gate][(batch * inputs + k) * channels];
        for (size_t c = 0; c < channels; ++c) {
          const double weight = w.kernel[gate][k * channels + c];
          sum += d[c] * (low ? Low(weight) : weight);
          product[c] += input[k] * d[c];
        }
        if (low) sum = Low(sum);
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
  std::array<std::vector<double>, 2> Gradients(int64_t pair, const Weights& w, Arrays& to,
                                               bool low) const {
    const Case& c = this->c_;
    const bool readable = Readable(c.mask, pair);
    std::vector<double> z(c.channels), t(c.hidden), d_out(c.channels);
    const auto round = [&](double x) { return low ? Problem<T>::Low(x) : x; };
    for (int i = 0; i < c.channels; ++i) {
      z[i] = readable ? PairValue<T>(pair * c.channels + i) : 0;
      d_out[i] = Widen(Round<T>(Draw(5, pair * c.channels + i)));
    }
    for (int h = 0; h < c.hidden; ++h) t[h] = ContractedValue<Contracted>(c.at(pair, h));
    Branch proj(0, t, w, c.channels, c.bias, low), gate(1, z, w, c.channels, c.bias, low);
    for (int i = 0; i < c.channels; ++i) {
      const double g = round(1 / (1 + std::exp(-gate.projected[i])));
      proj.d[i] = round(d_out[i] * g);
      const double slope = round(g * round(1 - g));
      gate.d[i] = round(round(d_out[i] * proj.projected[i]) * slope);
    }
    const int64_t batch = pair / c.columns / c.rows;
    std::array<std::vector<double>, 2> result = {gate.Back(w, to, batch, low),
                                                 proj.Back(w, to, batch, low)};
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

  void ComparePair(int64_t pair, const Arrays& got, const Weights& w, Arrays& exact, Arrays& coarse,
                   double (&sums)[kResults][3]) const {
    const Case& c = this->c_;
    const auto want = Gradients(pair, w, exact, false), layer = Gradients(pair, w, coarse, true);
    for (int i = 0; i < c.channels; ++i) {
      Add(sums[0], got[0][pair * c.channels + i], want[0][i], layer[0][i]);
    }
    for (int h = 0; h < c.hidden; ++h) {
      Add(sums[1], got[1][c.at(pair, h)], want[1][h], layer[1][h]);
    }
  }

  int blocks_;
  T *d_out_, *dz_;
  Contracted* dt_;
  float *partials_, *gradient_[kResults];
};
