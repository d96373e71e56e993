// Harness of the gated output's derivative: correctness against float64 with poisoned outputs, then
// timings. Prints one line a case and exits with the number of failures. `quick` checks two small
// cases only (for compute-sanitizer); `check` and `time` run one half, `time N` one size.
#include <string>

#include "harness/gated_output_backward.h"

namespace {

template <typename T>
void TimeOne(const Case& c) {
  using P = BackwardProblem<T>;
  const double bytes = 3. * sizeof(T) * c.elements() +
                       2. * sizeof(typename P::Contracted) * c.contracted() + c.pairs();
  const double flops = 6. * c.pairs() * c.channels * (c.channels + c.hidden);
  const P problem(c, Copies(bytes));
  const float ms = problem.Time(), reduction = problem.TimeReduction();
  std::printf(
      "%s I=%-5ld J=%-5ld C=%-4d Hm=%-4d residual=%d  %8.4f ms (reduction %.4f)  %7.1f GB/s  "
      "%6.1f TFLOP/s\n",
      kName<T>, c.rows, c.columns, c.channels, c.hidden, c.residual, ms, reduction,
      bytes / ms * 1e-6, flops / ms * 1e-9);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "all";
  if (mode == "quick") {
    return Failures<BackwardProblem<__nv_bfloat16>, Case>({{1, 9, 129, 128, 128}}) +
           Failures<BackwardProblem<__half>, Case>(
               {{2, 5, 77, 64, 128, Mask::kRandom, false, false}});
  }
  int failures = 0;
  if (mode != "time") {
    std::vector<Case> cases;
    for (int channels : {64, 128}) {
      for (int hidden : {64, 128}) cases.push_back({1, 33, 200, channels, hidden});
    }
    for (int64_t n : {1, 2, 16, 63, 64, 65, 77, 129}) cases.push_back({1, n, n, 128, 128});
    for (Mask mask : {Mask::kNone, Mask::kEmpty}) cases.push_back({1, 77, 129, 128, 128, mask});
    for (bool bias : {false, true}) {
      for (bool floats : {false, true}) {
        cases.push_back({2, 41, 129, 128, 128, Mask::kRandom, bias, floats, floats == bias});
      }
    }
    cases.push_back({3, 100, 1, 64, 128});
    cases.push_back({200, 2, 9, 128, 64});
    failures += Failures<BackwardProblem<__nv_bfloat16>, Case>(cases) +
                Failures<BackwardProblem<__half>, Case>(cases);
    failures += Failures<BackwardProblem<__nv_bfloat16>, Case>({{1, 200, 200, 128, 128}});
  }
  if (argc > 2) {
    TimeOne<__nv_bfloat16>({1, std::atol(argv[2]), std::atol(argv[2]), 128, 128});
  } else if (mode != "check") {
    for (int64_t n : {16, 64, 128, 256, 384, 512, 768, 1024, 2048}) {
      TimeOne<__nv_bfloat16>({1, n, n, 128, 128});
    }
    TimeOne<__nv_bfloat16>({1, 1024, 1024, 128, 128, Mask::kNone, false, true, false});
    TimeOne<__half>({1, 1024, 1024, 128, 128});
    for (int channels : {64, 128}) {
      for (int hidden : {64, 128}) TimeOne<__nv_bfloat16>({1, 512, 512, channels, hidden});
    }
  }
  std::printf("failures: %d\n", failures);
  return failures;
}
