// Harness of attention's output: correctness against float64 with poisoned outputs, then timings.
// Prints one line a case and exits with the number of failures. `quick` checks small cases only
// (for compute-sanitizer); `check` and `time` run one half, `time N` one size, `large`
// sizes of 64-bit offsets.
#include <string>

#include "harness/attention_pairs.h"
#include "triangle_attention/output_sm90.h"

namespace {

template <typename T>
class Problem {
 public:
  Problem(const Case& c, int copies)
      : c_(c),
        copies_(copies),
        norm_scale_(memory_, c.channels, true, 20, 0.3f, 1.f),
        norm_bias_(memory_, c.channels, true, 21, 0.3f),
        gate_bias_(memory_, c.hidden(), true, 22, 0.3f),
        out_bias_(memory_, c.channels, true, 23, 0.3f),
        gate_(memory_, int64_t{c.channels} * c.hidden(), c.float_weights, 10,
              1 / std::sqrt(float(c.channels))),
        project_(memory_, int64_t{c.channels} * c.hidden(), c.float_weights, 11,
                 1 / std::sqrt(float(c.hidden()))) {
    memory_.Allocate(&z_, c.pairs() * c.channels * sizeof(T) * copies);
    memory_.Allocate(&o_, c.pairs() * c.hidden() * sizeof(T) * copies);
    memory_.Allocate(&mask_, c.pairs());
    results_.Add(memory_, &out_, Size() * copies);
    for (int i = 0; i < copies; ++i) {
      FillPairs<<<4096, 256>>>(z_ + i * c.pairs() * c.channels, mask_, c.pairs(), c.channels,
                               c.mask);
      FillDraws<<<4096, 256>>>(o_ + i * c.pairs() * c.hidden(), c.pairs() * c.hidden(), 3, 1.f,
                               0.2f);
    }
    Check(cudaDeviceSynchronize(), "fill");
  }

  genie::AttentionOutput Arguments(int copy) const {
    genie::AttentionOutput p = {};
    p.z = z_ + copy * c_.pairs() * c_.channels, p.o = o_ + copy * c_.pairs() * c_.hidden();
    p.mask = c_.mask == Mask::kNone ? nullptr : mask_;
    p.out = out_ + copy * Size();
    p.dtype = kFloat<T>, p.kernel_dtype = c_.float_weights ? Float::kF32 : kFloat<T>;
    p.norm_scale = norm_scale_.floats();
    p.norm_bias = norm_bias_.floats();
    p.gate_kernel = gate_.device, p.out_kernel = project_.device;
    if (c_.bias) {
      p.gate_bias = gate_bias_.floats();
      p.out_bias = out_bias_.floats();
    }
    p.batch = c_.batch, p.rows = c_.rows, p.columns = c_.columns;
    p.channels = c_.channels, p.hidden = c_.hidden();
    p.ending = c_.ending(), p.residual = c_.residual, p.epsilon = kEpsilon;
    return p;
  }

  // Runs twice into poisoned outputs; returns whether all is well and prints a line.
  bool Verify() {
    const Faults faults =
        results_.RunTwice([&] { Check(genie::Launch(Arguments(0), nullptr), "launch"); });
    Errors errors[1];
    CompareSamples(errors);
    const bool good = !faults.any() && errors[0].good();
    PrintCase(kName<T>, c_);
    std::printf("out %.3e of %.3e  NaN %llu differ %llu guard %llu %s\n", errors[0].error(),
                errors[0].yardstick(), faults.nan, faults.differ, faults.guard,
                good ? "pass" : "FAIL");
    return good;
  }

  float Time() const {
    return MedianTime([&](int i) { Check(genie::Launch(Arguments(i % copies_), nullptr), "go"); });
  }

 private:
  int64_t Size() const { return c_.pairs() * c_.channels; }

  void CompareSamples(Errors (&errors)[1]) {
    const auto samples = Samples(c_.pairs());
    std::vector<T> got(samples.size() * c_.channels);
    for (size_t s = 0; s < samples.size(); ++s) {
      Check(cudaMemcpyAsync(&got[s * c_.channels], out_ + samples[s] * c_.channels,
                            c_.channels * sizeof(T), cudaMemcpyDeviceToHost),
            "sample");
    }
    Check(cudaDeviceSynchronize(), "samples");
    Compare(samples.size(), errors,
            [&](int s, Errors* errors) { ComparePair(samples[s], &got[s * c_.channels], errors); });
  }

  void ComparePair(int64_t pair, const T* got, Errors* errors) const {
    const int hidden = c_.hidden(), channels = c_.channels;
    std::vector<double> z, exact(hidden), coarse(hidden);
    const auto x = Normed<T>(c_, pair, norm_scale_.host, norm_bias_.host, &z);
    for (int h = 0; h < hidden; ++h) {
      double sum = 0, rounded = 0;
      for (int c = 0; c < channels; ++c) {
        const double weight = gate_.host[int64_t{c} * hidden + h];
        sum += x[c] * weight;
        rounded += Low<T>(x[c]) * Low<T>(weight);
      }
      const double bias = c_.bias ? gate_bias_.host[h] : 0;
      const double o = Low<T>(0.2f + Draw(3, c_.attended(pair) * hidden + h));
      exact[h] = o / (1 + std::exp(-sum - bias));
      const double gate = Low<T>(1 / (1 + std::exp(-Low<T>(Low<T>(rounded) + bias))));
      coarse[h] = Low<T>(gate * o);
    }
    for (int c = 0; c < channels; ++c) {
      double sum = 0, rounded = 0;
      for (int h = 0; h < hidden; ++h) {
        const double weight = project_.host[int64_t{h} * channels + c];
        sum += exact[h] * weight;
        rounded += coarse[h] * Low<T>(weight);
      }
      const double bias = c_.bias ? out_bias_.host[c] : 0, added = c_.residual ? z[c] : 0;
      const double update = c_.bias ? Low<T>(Low<T>(rounded) + bias) : Low<T>(rounded);
      errors[0].Add(Widen(got[c]), c_.residual ? Low<T>(added + update) : update,
                    sum + bias + added);
    }
  }

  Case c_;
  int copies_;
  Memory memory_;
  Results results_;
  Weight<T> norm_scale_, norm_bias_, gate_bias_, out_bias_, gate_, project_;
  T *z_, *o_, *out_;
  uint8_t* mask_;
};

template <typename T>
void TimeOne(const Case& c) {
  const double bytes = sizeof(T) * c.pairs() * (2. * c.channels + c.hidden());
  const float ms = Problem<T>(c, Copies(bytes)).Time();
  PrintCase(kName<T>, c);
  std::printf("%8.4f ms  %7.1f GB/s  %6.1f TFLOP/s\n", ms, bytes / ms * 1e-6,
              4. * c.pairs() * c.channels * c.hidden() / ms * 1e-9);
}

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (Node node : {Node::kStarting, Node::kEnding}) {
    for (bool residual : {false, true}) {
      for (int64_t n : {1, 2, 8, 63, 64, 65, 77, 129, 200}) {
        cases.push_back({1, n, n, 128, 4, 32, node, Mask::kRandom, true, residual});
      }
    }
    for (int channels : {64, 128, 256}) {
      for (int width : {16, 32, 64}) {
        if (channels == 256 && width == 64) continue;
        cases.push_back({1, 33, 200, channels, 4, width, node, Mask::kRandom, true, true});
      }
    }
    cases.push_back({2, 200, 77, 128, 16, 16, node, Mask::kNone, false, false, false});
    cases.push_back({3, 5, 129, 64, 1, 64, node, Mask::kEmpty, true, true, false});
    cases.push_back({1, 1, 200, 128, 2, 64, node});
    cases.push_back({1, 200, 1, 128, 8, 16, node});
  }
  return cases;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "all";
  if (mode == "quick") {
    return Failures<Problem<__nv_bfloat16>, Case>({{1, 9, 77, 128, 4, 32}}) +
           Failures<Problem<__half>, Case>(
               {{1, 70, 5, 64, 4, 16, Node::kEnding, Mask::kRandom, true, true}});
  }
  int failures = 0;
  if (mode != "time" && mode != "large") {
    failures +=
        Failures<Problem<__nv_bfloat16>, Case>(Cases()) + Failures<Problem<__half>, Case>(Cases());
  }
  if (mode == "large") {  // offsets beyond 32 bits
    for (Node node : {Node::kStarting, Node::kEnding}) {
      failures += Failures<Problem<__nv_bfloat16>, Case>({{1, 4232, 4232, 128, 4, 32, node}});
    }
  }
  if (mode != "check" && mode != "large") {
    std::vector<int64_t> sizes = {16, 64, 128, 256, 384, 512, 768, 1024, 2048};
    if (argc > 2) sizes = {std::atol(argv[2])};
    for (Node node : {Node::kStarting, Node::kEnding}) {
      for (int64_t n : sizes) TimeOne<__nv_bfloat16>({1, n, n, 128, 4, 32, node});
    }
    if (argc <= 2) {
      TimeOne<__half>({1, 1024, 1024, 128, 4, 32});
      for (int c : {64, 128, 256}) {
        for (int width : {16, 32, 64}) {
          if (c * width < 256 * 64) TimeOne<__nv_bfloat16>({1, 512, 512, c, 4, width});
        }
      }
    }
  }
  std::printf("failures: %d\n", failures);
  return failures;
}
