// Harness of the gated projection: correctness against float64 with poisoned outputs, then timings.
// Prints one line a case and exits with the number of failures. `quick` checks one small case only
// (for compute-sanitizer); `check` and `time` run one half, `time N` one size (for a profiler).
#include "harness/gated_projection.h"

namespace {

template <typename T>
void TimeOne(const Case& c) {
  const double bytes = sizeof(T) * (double(c.pairs()) * c.channels + 2. * c.outputs()) + c.pairs();
  const double flops = 2. * c.pairs() * c.channels * 4 * c.hidden;
  const float ms = Problem<T>(c, Copies(bytes)).Time();
  std::printf(
      "%s I=%-5ld K=%-5ld C=%-4d Hm=%-4d  %8.4f ms  %7.1f GB/s (%4.1f%% of 4300)  %6.1f "
      "TFLOP/s (%4.1f%% of 790)\n",
      kName<T>, c.rows, c.columns, c.channels, c.hidden, ms, bytes / ms * 1e-6,
      bytes / ms * 1e-6 / 43, flops / ms * 1e-9, flops / ms * 1e-9 / 7.9);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "all";
  if (mode == "quick") {
    return Failures<Problem<__nv_bfloat16>, Case>({{1, 9, 129, 128, 64}}) +
           Failures<Problem<__half>, Case>({{2, 5, 77, 64, 128, Mask::kRandom, false, false}});
  }
  int failures = 0;
  if (mode != "time") {
    std::vector<Case> cases;
    for (int channels : {64, 128, 256}) {
      for (int hidden : {64, 128, 256}) cases.push_back({1, 33, 200, channels, hidden});
    }
    for (int64_t n : {1, 2, 16, 63, 64, 65, 77, 129, 200, 257})
      cases.push_back({1, n, n, 128, 128});
    for (Mask mask : {Mask::kNone, Mask::kEmpty}) cases.push_back({1, 77, 129, 128, 128, mask});
    for (bool bias : {false, true}) {
      for (bool floats : {false, true}) {
        cases.push_back({2, 77, 129, 128, 128, Mask::kRandom, bias, floats});
        cases.push_back({2, 200, 77, 256, 256, Mask::kRandom, bias, floats});
      }
    }
    cases.push_back({2, 1, 200, 64, 256, Mask::kRandom, true, true, 64});
    cases.push_back({3, 200, 1, 128, 128, Mask::kRandom, true, true, 128});
    failures +=
        Failures<Problem<__nv_bfloat16>, Case>(cases) + Failures<Problem<__half>, Case>(cases);
    failures += Failures<Problem<__nv_bfloat16>, Case>(
        {{1, 1024, 1024, 128, 128}, {1, 4232, 4232, 128, 128}});
  }
  if (argc > 2) {
    TimeOne<__nv_bfloat16>({1, std::atol(argv[2]), std::atol(argv[2]), 128, 128});
  } else if (mode != "check") {
    for (int64_t n : {16, 64, 128, 256, 384, 512, 768, 1024, 2048}) {
      TimeOne<__nv_bfloat16>({1, n, n, 128, 128});
    }
    TimeOne<__half>({1, 1024, 1024, 128, 128});
    for (int channels : {64, 128, 256}) {
      for (int hidden : {64, 128, 256}) TimeOne<__nv_bfloat16>({1, 512, 512, channels, hidden});
    }
  }
  std::printf("failures: %d\n", failures);
  return failures;
}
