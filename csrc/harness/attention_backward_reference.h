// The backward of the stages around the attention core in float64, and rounded after every step.
#pragma once

#include "harness/attention_backward.h"

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
