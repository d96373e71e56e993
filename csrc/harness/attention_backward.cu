// Harness of the backward of the stages around the attention core: correctness against float64 with
// poisoned results, then timings. Prints one line a case and exits with the number of failures.
// `quick` checks small cases only (for compute-sanitizer); `check` and `time` run one half, `time
// N` one size.
#include <string>

#include "harness/attention_backward_reference.h"

namespace {

template <typename T>
void TimeOne(const Case& c) {
  const double hidden = c.hidden(), channels = c.channels, pairs = c.pairs();
  const double numbers[] = {2 * channels + 3 * hidden,
                            2 * channels + 4 * hidden + 2 * c.heads + c.residual * channels,
                            channels + 4 * hidden + 2 * c.heads};
  const double columns[] = {3 * hidden, 4 * hidden + c.heads, 4 * hidden + c.heads};
  const double least = sizeof(T) * pairs * numbers[0];
  const Problem<T> problem(c, Copies(least));
  const char* names[] = {"output", "projections", "weights"};
  for (int which = 0; which < 3; ++which) {
    const double bytes = sizeof(T) * pairs * numbers[which];
    const float ms = problem.Time(which);
    PrintCase(kName<T>, c);
    std::printf("%-11s %8.4f ms  %7.1f GB/s  %6.1f TFLOP/s\n", names[which], ms, bytes / ms * 1e-6,
                2. * pairs * channels * columns[which] / ms * 1e-9);
  }
}

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (Node node : {Node::kStarting, Node::kEnding, Node::kUnswapped}) {
    for (int64_t n : {1, 2, 45}) cases.push_back({1, n, n, 128, 4, 32, node});
    cases.push_back({1, 129, 129, 128, 4, 32, node, Mask::kRandom, true, true});
    cases.push_back({2, 33, 35, 64, 4, 16, node});
    cases.push_back({3, 70, 5, 64, 1, 64, node, Mask::kEmpty, true, true, false});
    cases.push_back({1, 5, 150, 128, 16, 8, node, Mask::kNone, true, true, false});
  }
  return cases;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "all";
  if (mode == "quick") {
    return Failures<Problem<__nv_bfloat16>, Case>({{1, 9, 77, 128, 4, 32}}) +
           Failures<Problem<__half>, Case>(
               {{1, 70, 5, 64, 4, 16, Node::kUnswapped, Mask::kRandom, true, true}});
  }
  int failures = 0;
  if (mode != "time" && mode != "large") {
    failures +=
        Failures<Problem<__nv_bfloat16>, Case>(Cases()) + Failures<Problem<__half>, Case>(Cases());
  }
  if (mode == "large") {  // offsets beyond 32 bits
    failures +=
        Failures<Problem<__nv_bfloat16>, Case>({{1, 4232, 4232, 128, 4, 32, Node::kEnding}});
  }
  if (mode != "check" && mode != "large") {
    std::vector<int64_t> sizes = {64, 256, 512, 768, 1024, 2048};
    if (argc > 2) sizes = {std::atol(argv[2])};
    for (Node node : {Node::kStarting, Node::kEnding, Node::kUnswapped}) {
      for (int64_t n : sizes) TimeOne<__nv_bfloat16>({1, n, n, 128, 4, 32, node});
    }
  }
  std::printf("failures: %d\n", failures);
  return failures;
}
