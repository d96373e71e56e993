// Harness of attention's projection: correctness against float64 with poisoned outputs, then
// timings. Prints one line a case and exits with the number of failures. `quick` checks small cases
// only (for compute-sanitizer); `check` and `time` run one half, `time N` one size, `large`
// sizes of 64-bit offsets.
#include <string>

#include "harness/attention_pairs.h"
#include "triangle_attention/project_sm90.h"

namespace {

constexpr double kLog2E = 1.4426950408889634;

template <typename T>
class Problem {
 public:
  Problem(const Case& c, int copies)
      : c_(c),
        copies_(copies),
        norm_scale_(memory_, c.channels, true, 20, 0.3f, 1.f),
        norm_bias_(memory_, c.channels, true, 21, 0.3f) {
    memory_.Allocate(&z_, c.pairs() * c.channels * sizeof(T) * copies);
    memory_.Allocate(&mask_, c.pairs());
    for (int i = 0; i < 4; ++i) {
      results_.Add(memory_, &out_[i], Size(i) * copies);
      const int width = i < 3 ? c.hidden() : c.heads;
      kernels_.emplace_back(memory_, int64_t{c.channels} * width, c.float_weights, 10 + i,
                            1 / std::sqrt(float(c.channels)));
    }
    for (int i = 0; i < copies; ++i) {
      FillPairs<<<4096, 256>>>(z_ + i * c.pairs() * c.channels, mask_, c.pairs(), c.channels,
                               c.mask);
    }
    Check(cudaDeviceSynchronize(), "fill");
  }

  genie::AttentionProjection Arguments(int copy) const {
    genie::AttentionProjection p = {};
    p.z = z_ + copy * c_.pairs() * c_.channels;
    p.mask = c_.mask == Mask::kNone ? nullptr : mask_;
    p.q = out_[0] + copy * Size(0), p.k = out_[1] + copy * Size(1);
    p.v = out_[2] + copy * Size(2), p.bias = out_[3] + copy * Size(3);
    p.dtype = kFloat<T>, p.kernel_dtype = c_.float_weights ? Float::kF32 : kFloat<T>;
    p.norm_scale = norm_scale_.floats();
    p.norm_bias = norm_bias_.floats();
    p.q_kernel = kernels_[0].device, p.k_kernel = kernels_[1].device;
    p.v_kernel = kernels_[2].device, p.bias_kernel = kernels_[3].device;
    p.batch = c_.batch, p.rows = c_.rows, p.columns = c_.columns;
    p.channels = c_.channels, p.heads = c_.heads, p.head_width = c_.width;
    p.ending = c_.ending(), p.bias_as_z = c_.node == Node::kUnswapped, p.epsilon = kEpsilon;
    return p;
  }

  // Runs twice into poisoned outputs; returns whether all is well and prints a line.
  bool Verify() {
    const Faults faults =
        results_.RunTwice([&] { Check(genie::Launch(Arguments(0), nullptr), "launch"); });
    const int64_t pads = WrongPads();
    Errors errors[2];
    CompareSamples(errors);
    const bool good = !faults.any() && !pads && errors[0].good() && errors[1].good();
    PrintCase(kName<T>, c_);
    std::printf(
        "qkv %.3e of %.3e  bias %.3e of %.3e  pads %ld NaN %llu differ %llu guard %llu %s\n",
        errors[0].error(), errors[0].yardstick(), errors[1].error(), errors[1].yardstick(), pads,
        faults.nan, faults.differ, faults.guard, good ? "pass" : "FAIL");
    return good;
  }

  float Time() const {
    return MedianTime([&](int i) { Check(genie::Launch(Arguments(i % copies_), nullptr), "go"); });
  }

 private:
  int64_t queries() const { return c_.node == Node::kEnding ? c_.columns : c_.rows; }
  int64_t keys() const { return c_.node == Node::kEnding ? c_.rows : c_.columns; }
  int64_t Size(int i) const {
    if (i < 3) return c_.pairs() * c_.hidden();
    return c_.batch * c_.heads * queries() * genie::BiasColumns(keys());
  }

  int64_t WrongPads() const {
    const int64_t padded = genie::BiasColumns(keys());
    if (padded == keys()) return 0;
    const auto bias = Memory::ToHost(reinterpret_cast<const uint16_t*>(out_[3]), Size(3));
    int64_t wrong = 0;
    for (int64_t i = 0; i < Size(3); ++i) wrong += i % padded >= keys() && bias[i] != 0;
    return wrong;
  }

  void CompareSamples(Errors (&errors)[2]) {
    const auto samples = Samples(c_.pairs());
    const int hidden = c_.hidden(), width = 3 * hidden + c_.heads;
    std::vector<T> got(samples.size() * width);
    for (size_t s = 0; s < samples.size(); ++s) {
      const int64_t at = c_.attended(samples[s]);
      for (int i = 0; i < 3; ++i) {
        Check(cudaMemcpyAsync(&got[s * width + i * hidden], out_[i] + at * hidden,
                              hidden * sizeof(T), cudaMemcpyDeviceToHost),
              "sample");
      }
      const int64_t pair = c_.node == Node::kUnswapped ? samples[s] : at;
      const int64_t query = pair / keys(), b = query / queries();
      for (int h = 0; h < c_.heads; ++h) {
        const int64_t row = (b * c_.heads + h) * queries() + query % queries();
        const T* from = out_[3] + row * genie::BiasColumns(keys()) + pair % keys();
        Check(cudaMemcpyAsync(&got[s * width + 3 * hidden + h], from, sizeof(T),
                              cudaMemcpyDeviceToHost),
              "sample");
      }
    }
    Check(cudaDeviceSynchronize(), "samples");
    Compare(samples.size(), errors, [&](int s, Errors* errors) {
      std::vector<double> z;
      const auto x = Normed<T>(c_, samples[s], norm_scale_.host, norm_bias_.host, &z);
      for (int column = 0; column < width; ++column) {
        const int i = std::min(column / hidden, 3), size = i < 3 ? hidden : c_.heads;
        const double factor = i == 0 ? kLog2E / std::sqrt(double(c_.width)) : i == 3 ? kLog2E : 1.;
        double sum = 0, rounded = 0;
        for (int c = 0; c < c_.channels; ++c) {
          const double weight = kernels_[i].host[c * size + column - i * hidden];
          sum += x[c] * weight;
          rounded += Low<T>(x[c]) * Low<T>(weight);
        }
        errors[i / 3].Add(Widen(got[s * width + column]), factor * Low<T>(rounded), factor * sum);
      }
    });
  }

  Case c_;
  int copies_;
  Memory memory_;
  Results results_;
  Weight<T> norm_scale_, norm_bias_;
  std::vector<Weight<T>> kernels_;
  T *z_, *out_[4];
  uint8_t* mask_;
};

template <typename T>
void TimeOne(const Case& c) {
  const double columns = 3. * c.hidden() + c.heads;
  const double bytes = sizeof(T) * c.pairs() * (c.channels + columns);
  const float ms = Problem<T>(c, Copies(bytes)).Time();
  PrintCase(kName<T>, c);
  std::printf("%8.4f ms  %7.1f GB/s  %6.1f TFLOP/s\n", ms, bytes / ms * 1e-6,
              2. * c.pairs() * c.channels * columns / ms * 1e-9);
}

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (Node node : {Node::kStarting, Node::kEnding, Node::kUnswapped}) {
    for (int64_t n : {1, 2, 8, 63, 64, 65, 77, 129, 200}) {
      cases.push_back({1, n, n, 128, 4, 32, node});
    }
    for (int channels : {64, 128, 256}) {
      for (int width : {16, 32, 64}) cases.push_back({1, 33, 200, channels, 4, width, node});
    }
    cases.push_back({2, 200, 77, 128, 16, 16, node, Mask::kNone, true, false, false});
    cases.push_back({3, 5, 129, 64, 1, 64, node, Mask::kEmpty, true, false, false});
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
           Failures<Problem<__half>, Case>({{1, 70, 5, 64, 4, 16, Node::kUnswapped}});
  }
  int failures = 0;
  if (mode != "time" && mode != "large") {
    failures +=
        Failures<Problem<__nv_bfloat16>, Case>(Cases()) + Failures<Problem<__half>, Case>(Cases());
  }
  if (mode == "large") {  // offsets beyond 32 bits
    for (Node node : {Node::kStarting, Node::kEnding, Node::kUnswapped}) {
      failures += Failures<Problem<__nv_bfloat16>, Case>({{1, 4232, 4232, 128, 4, 32, node}});
    }
  }
  if (mode != "check" && mode != "large") {
    std::vector<int64_t> sizes = {16, 64, 128, 256, 384, 512, 768, 1024, 2048};
    if (argc > 2) sizes = {std::atol(argv[2])};
    for (Node node : {Node::kStarting, Node::kEnding, Node::kUnswapped}) {
      for (int64_t n : sizes) TimeOne<__nv_bfloat16>({1, n, n, 128, 4, 32, node});
    }
    if (argc <= 2) {
      TimeOne<__half>({1, 1024, 1024, 128, 4, 32});
      for (int c : {64, 128, 256}) {
        for (int width : {16, 32, 64}) TimeOne<__nv_bfloat16>({1, 512, 512, c, 4, width});
      }
    }
  }
  std::printf("failures: %d\n", failures);
  return failures;
}
