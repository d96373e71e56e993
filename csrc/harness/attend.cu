// Harness of attention's core: correctness against float64 with poisoned outputs, then timings.
// Prints one line a case and exits with the number of failures. `quick` checks a few small cases
// (for compute-sanitizer); `check` and `time` run one half, `time N` one size (for a profiler).
#include <string>

#include "harness/attend.h"

namespace {

template <typename T>
int CheckAll(const std::vector<Case>& cases) {
  int failures = 0;
  for (const Case& c : cases) failures += !Problem<T>(c).Verify();
  return failures;
}

// Keys, rows and queries that only pad must not change a bit of the rest.
template <typename T>
int CheckPadding(int64_t n, int64_t padded, int dim) {
  const Case small = {1, n, n, n, 2, dim}, large = {.batch = 1,
                                                    .rows = padded,
                                                    .queries = padded,
                                                    .keys = padded,
                                                    .heads = 2,
                                                    .dim = dim,
                                                    .valid_keys = n};
  const auto found = Problem<T>(small).Output(), with_padding = Problem<T>(large).Output();
  int64_t wrong = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n * 2 * dim; ++j) {
      wrong += found[i * n * 2 * dim + j] != with_padding[i * padded * 2 * dim + j];
    }
  }
  std::printf("%ld padded to %ld, D=%d: %ld bits differ  %s\n", n, padded, dim, wrong,
              wrong ? "FAIL" : "pass");
  return wrong != 0;
}

template <typename T>
float TimeOne(const Case& c) {
  const double logits = double(c.batch) * c.rows * c.queries * c.keys * c.heads;
  const float ms = Problem<T>(c).Time();
  std::printf(
      "%s N=%-5ld H=%d D=%-2d mask=%-7s bias=%d folded=%d lse=%d  %8.4f ms  %6.1f G "
      "logits/s  %5.1f TFLOP/s\n",
      std::is_same_v<T, __half> ? "f16 " : "bf16", c.keys, c.heads, c.dim, kMaskNames[int(c.mask)],
      c.bias, c.folded, c.lse, ms, logits / ms * 1e-6, 4 * c.dim * logits / ms * 1e-9);
  return ms;
}

// What padding costs: only half of the rows and of the keys are valid, or none.
template <typename T>
void TimePadding(Case c) {
  c.mask = Mask::kNone;
  const float all = TimeOne<T>(c);
  for (Mask mask : {Mask::kPadding, Mask::kEmpty}) {
    c.mask = mask;
    std::printf("%s / all: %.3f\n", kMaskNames[int(mask)], TimeOne<T>(c) / all);
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // a killed run still tells how far it came
  using bf16 = __nv_bfloat16;
  const std::string mode = argc > 1 ? argv[1] : "all";
  const bool every = argc <= 2 || std::string(argv[2]) != "one";  // all instantiations are there
  const auto cube = [](int64_t n, Mask mask = Mask::kRandom, bool folded = false, int dim = 32) {
    return Case{1, n, n, n, 4, dim, mask, true, folded};
  };
  int failures = 0;
  if (mode == "quick") {
    return CheckAll<bf16>({{1, 4, 77, 129, 2, 32},
                           {2, 3, 300, 65, 1, 32, Mask::kNone, false},
                           {1, 4, 65, 400, 2, 32, Mask::kEnds, true, true}});
  }
  if (mode == "sizes") {  // what is published beside other libraries, and what the layer takes
    for (int64_t n : {256, 384, 512, 768, 1024, 1536}) {
      Case c = cube(n, Mask::kTenth);
      c.lse = false;
      TimeOne<bf16>(c), TimeOne<bf16>(cube(n, Mask::kNone, true));
    }
    return 0;
  }
  if (mode != "time") {
    std::vector<Case> cases;
    for (int64_t n : {1, 2, 16, 63, 64, 65, 77, 129, 200, 256, 257}) {
      cases.push_back(cube(n)), cases.push_back(cube(n, Mask::kNone, true));
    }
    for (Mask mask : {Mask::kNone, Mask::kRandom, Mask::kSingle, Mask::kPadding, Mask::kEmpty}) {
      for (bool bias : {false, true}) {
        cases.push_back({2, 7, 129, 333, 3, 32, mask, bias, bias});
      }
    }
    for (float spread : {0.f, 16.f}) {
      for (float shift : {-50.f, 50.f}) {
        Case c = {1, 5, 77, 300, 2, 32};
        c.spread = spread, c.shift = shift;
        cases.push_back(c);
      }
    }
    cases.push_back({2, 7, 129, 700, 3, 32, Mask::kEnds});
    cases.push_back({1, 3, 300, 77, 1, 32}), cases.push_back({3, 5, 1, 200, 2, 32});
    cases.push_back({2, 200, 65, 1, 5, 32}), cases.push_back(cube(512));
    failures += CheckAll<bf16>(cases) + CheckPadding<bf16>(129, 200, 32);
    failures += CheckPadding<bf16>(77, 700, 32);
    if (every) {
      for (auto& c : cases) c.dim = c.batch == 2 ? 64 : c.batch == 3 ? 16 : 32;
      failures += CheckAll<__half>(cases);
      for (int dim : {16, 64}) {
        failures += CheckAll<bf16>(
            {cube(200, Mask::kRandom, false, dim), cube(129, Mask::kNone, true, dim)});
      }
      failures += CheckPadding<__half>(77, 300, 64);
    }
    failures += CheckAll<bf16>({cube(1024), cube(2048, Mask::kNone)});
  }
  if (mode == "time" && argc > 2 && std::atol(argv[2]) > 0) {
    TimePadding<bf16>(cube(std::atol(argv[2]), Mask::kNone, true));
  } else if (mode != "check") {
    for (int64_t n : {64, 128, 256, 384, 512, 768, 1024, 2048}) {
      for (Mask mask : {Mask::kNone, Mask::kRandom}) {
        for (bool folded : {false, true}) {
          Case c = cube(n, mask, folded);
          c.lse = false;
          TimeOne<bf16>(c);
        }
      }
    }
    for (int64_t n : {1024, 2048}) TimePadding<bf16>(cube(n, Mask::kNone, true));
    TimeOne<bf16>(cube(1024, Mask::kSingle));
    Case c = cube(1024, Mask::kNone, true);
    c.bias = false;
    TimeOne<bf16>(c);
    if (every) {
      for (int dim : {16, 64}) TimeOne<bf16>(cube(1024, Mask::kNone, true, dim));
      TimeOne<__half>(cube(1024, Mask::kNone, true));
    }
  }
  std::printf("failures: %d\n", failures);
  return failures;
}
