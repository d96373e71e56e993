// Harness of the contraction: correctness against float64 with poisoned results, then timings.
// Prints one line a case and exits with the number of failures. `quick` checks small cases only
// (for compute-sanitizer), `small` all but the large ones; `check` and `time` run one half, `half`
// the masked times alone, `time N` and `half N` one size (for a profiler).
#include <cstring>
#include <string>

#include "harness/contract.h"

namespace {

using Bf16 = __nv_bfloat16;

int CheckBf16(const Case& c) {
  int failures = 0;
  for (bool incoming : {false, true}) {
    Case directed = c;
    directed.incoming = incoming;
    Problem<Bf16, Bf16> problem(directed);
    failures += !problem.Verify("t") + !problem.Verify("ab");
  }
  return failures;
}

int CheckHalf(const Case& c) {
  int failures = 0;
  for (bool incoming : {false, true}) {
    Case directed = c;
    directed.incoming = incoming;
    failures += !Problem<__half, float>(directed).Verify("t");
  }
  return failures;
}

// The valid part has the same bits with 8-aligned and with more padding.
int CheckPadding(Case c, int64_t extra) {
  int failures = 0;
  for (bool incoming : {false, true}) {
    c.incoming = incoming;
    Case wider = c;
    wider.extra = extra;
    Problem<Bf16, Bf16> narrow(c), wide(wider);
    for (Problem<Bf16, Bf16>* problem : {&narrow, &wide}) problem->Run("t"), problem->Run("ab");
    for (char which : {'t', 'a', 'b'}) {
      const auto x = narrow.ValidPart(which), y = wide.ValidPart(which);
      const bool same = x.size() == y.size() && !std::memcmp(x.data(), y.data(), 2 * x.size());
      std::printf("bf16 %s %c  I=%ld J=%ld K=%ld  same bits with %ld more zeros: %s\n",
                  incoming ? "in " : "out", which, c.i, c.j, c.k, extra, same ? "pass" : "FAIL");
      failures += !same;
    }
  }
  return failures;
}

template <typename T, typename Out>
float Time(const Case& c, const char* which) {
  const int products = std::strlen(which);
  const double n = double(c.i) * c.j * c.k * c.batch * c.channels;
  const double flops = 2 * n * products;
  const double bytes = n * ((products + 1) * sizeof(T) * (1. / c.i + 1. / c.j) / 2 * 1 +
                            products * sizeof(Out) * 1. / c.k);
  const float ms = Problem<T, Out>(c).Time(which);
  std::printf(
      "%s %s %-2s B=%-2ld Hm=%-3ld N=%-5ld mask=%-5s  %8.4f ms  %6.1f TFLOP/s  %7.1f GB/s\n",
      sizeof(Out) == 4 ? "f16 " : "bf16", c.incoming ? "in " : "out", which, c.batch, c.channels,
      c.i, kMaskNames[int(c.mask)], ms, flops / ms * 1e-9, bytes / ms * 1e-6);
  return ms;
}

void TimeAll(int64_t n, int64_t batch, int64_t channels) {
  for (bool incoming : {false, true}) {
    for (const char* which : {"t", "ab"})
      Time<Bf16, Bf16>({batch, channels, n, n, n, incoming}, which);
  }
}

// With half of each axis valid, as a share of the whole.
void TimeHalf(int64_t n) {
  for (bool incoming : {false, true}) {
    for (const char* which : {"t", "ab"}) {
      const float whole = Time<Bf16, Bf16>({1, 128, n, n, n, incoming}, which);
      const float half = Time<Bf16, Bf16>({1, 128, n, n, n, incoming, Mask::kHalf}, which);
      std::printf("  half of each axis valid: %.3f of the whole\n", half / whole);
    }
  }
}

int CheckSmall() {
  int failures = 0;
  for (int64_t n : {1, 8, 16, 63, 64, 65, 77, 129, 200, 257, 384}) {
    failures += CheckBf16({1, 3, n, n, n}) + CheckHalf({1, 3, n, n, n});
  }
  for (Mask mask : {Mask::kRandom, Mask::kHalf, Mask::kEmpty}) {
    for (int64_t n : {77, 300, 520}) failures += CheckBf16({2, 3, n, n, n, false, mask});
    failures += CheckHalf({2, 3, 300, 300, 300, false, mask});
  }
  for (Mask mask : {Mask::kNone, Mask::kRandom, Mask::kHalf}) {
    failures += CheckBf16({3, 5, 129, 300, 77, false, mask});
    failures += CheckBf16({1, 2, 40, 8, 2200, false, mask});
    failures += CheckBf16({1, 2, 2600, 136, 72, false, mask});
    failures += CheckHalf({1, 2, 72, 2600, 136, false, mask});
  }
  for (int64_t n : {77, 200}) failures += CheckPadding({2, 3, n, n, n}, 256);
  return failures;
}

// Every processor busy, and offsets beyond 2^31.
int CheckLarge() {
  return CheckBf16({1, 128, 1024, 1024, 1024}) + CheckHalf({1, 128, 512, 512, 512}) +
         CheckBf16({1, 128, 4232, 4232, 200});
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "all";
  if (mode == "quick")
    return CheckBf16({2, 2, 77, 200, 129, false, Mask::kRandom}) + CheckHalf({1, 2, 77, 77, 77});
  int failures = mode == "time" || mode == "half" ? 0 : CheckSmall();
  if (mode == "all" || mode == "check") failures += CheckLarge();
  if (argc > 2) {
    mode == "half" ? TimeHalf(std::atol(argv[2])) : TimeAll(std::atol(argv[2]), 1, 128);
  } else if (mode == "all" || mode == "time") {
    for (int64_t n : {16, 32, 64, 128, 200, 256, 384, 512, 768, 1024, 1536, 2048}) {
      TimeAll(n, 1, 128);
    }
    TimeAll(256, 4, 128);
    for (int64_t n : {256, 1024}) Time<__half, float>({1, 128, n, n, n}, "t");
  }
  if (argc <= 2 && mode != "check" && mode != "small") {
    for (int64_t n : {512, 768, 1024, 2048}) TimeHalf(n);
  }
  std::printf("failures: %d\n", failures);
  return failures;
}
