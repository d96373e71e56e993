// Checks the attention backward against float64 and times it: attend_backward [check|time|quick]
// [N].
#include <string>

#include "harness/attend_backward.h"

namespace {

constexpr int64_t kGuard = 4096;  // poisoned bytes after each output
constexpr double kLn2 = 0.6931471805599453;
constexpr const char* kMasks[] = {"none", "random", "padded", "empty"};

template <typename T>
class Problem {
 public:
  // Timing does not need o and lse to be those of the other operands, which take long to find.
  explicit Problem(const Case& c, bool exact = true) : c_(c) {
    const auto fill = [&](T** to, int64_t size, uint32_t seed, float amplitude) {
      memory_.Allocate(to, size * sizeof(T));
      Fill<<<4096, 256>>>(*to, size, seed, amplitude);
    };
    fill(&q_, c.q_size(), 1, c.sharp);
    fill(&k_, c.k_size(), 2, 1);
    fill(&v_, c.k_size(), 3, 1);
    fill(&d_o_, c.q_size(), 4, c.upstream);
    fill(&bias_, c.bias_size(), 6, c.bias);
    memory_.Allocate(&o_, c.q_size() * sizeof(T));
    memory_.Allocate(&lse_, c.row_size() * 4);
    memory_.Allocate(&mask_, c.batch * c.rows * c.keys);
    FillMask<<<4096, 256>>>(mask_, c.batch * c.rows, c.keys, c.mask);
    if (exact) {
      Forward<<<4096, 128>>>(q_, k_, v_, bias_, mask_, o_, lse_, c, float(c.scale()),
                             float(c.bias_scale()));
    } else {
      Fill<<<4096, 256>>>(o_, c.q_size(), 7, 0.3f);
      Fill<<<4096, 256>>>(lse_, c.row_size(), 8, 0.f);
    }
    bytes_[0] = c.q_size() * sizeof(T), bytes_[1] = bytes_[2] = c.k_size() * sizeof(T);
    bytes_[3] = c.bias != 0 ? c.bias_size() * 4 : 0;
    for (int i = 0; i < 4; ++i) memory_.Allocate(&out_[i], bytes_[i] + kGuard);
    const auto dtype = std::is_same_v<T, __half> ? genie::Float::kF16 : genie::Float::kBf16;
    const int64_t row_bytes = c.batch * c.rows * c.heads * genie::QueryWords(c.queries, dtype) * 4;
    memory_.Allocate(&query_rows_, row_bytes);
    Check(cudaMemset(query_rows_, 0xFF, row_bytes), "poison");
    memory_.Allocate(&chunk_sums_, c.chunks * c.bias_size() * 4);
    Check(cudaMemset(chunk_sums_, 0xFF, c.chunks * c.bias_size() * 4), "poison");
    Check(cudaDeviceSynchronize(), "fill");
  }

  genie::AttendBackward Arguments() const {
    genie::AttendBackward a = {};
    a.q = q_, a.k = k_, a.v = v_, a.o = o_, a.lse = lse_, a.d_o = d_o_;
    a.bias = c_.bias != 0 ? bias_ : nullptr;
    a.mask = c_.mask == Mask::kNone ? nullptr : mask_;
    a.dq = out_[0], a.dk = out_[1], a.dv = out_[2];
    a.d_bias = c_.bias != 0 ? reinterpret_cast<float*>(out_[3]) : nullptr;
    a.query_rows = query_rows_, a.chunk_sums = chunk_sums_, a.chunks = c_.chunks;
    a.dtype = std::is_same_v<T, __half> ? genie::Float::kF16 : genie::Float::kBf16;
    a.batch = c_.batch, a.rows = c_.rows, a.queries = c_.queries, a.keys = c_.keys;
    a.keys_padded = c_.padded(), a.heads = c_.heads, a.head_dim = c_.dim;
    a.scale = c_.scale(), a.bias_scale = c_.bias_scale();
    return a;
  }

  // Runs twice into poisoned outputs and compares; returns whether all is well, prints a line.
  bool Verify() {
    std::vector<char> kept[4];
    bool guarded = true, same = true;
    for (int run = 0; run < 2; ++run) {
      for (int i = 0; i < 4; ++i) Check(cudaMemset(out_[i], 0xFF, bytes_[i] + kGuard), "poison");
      Check(genie::Launch(Arguments(), nullptr), "launch");
      Check(cudaDeviceSynchronize(), "run");
      for (int i = 0; i < 4; ++i) {
        std::vector<char> got(bytes_[i] + kGuard);
        Check(cudaMemcpy(got.data(), out_[i], got.size(), cudaMemcpyDeviceToHost), "get");
        guarded &= std::all_of(got.end() - kGuard, got.end(), [](char x) { return x == char(-1); });
        if (run == 1) same &= std::memcmp(got.data(), kept[i].data(), bytes_[i]) == 0;
        kept[i] = std::move(got);
      }
    }
    for (int i = 0; i < 3; ++i) low_[i] = reinterpret_cast<const T*>(kept[i].data());
    d_bias_ = reinterpret_cast<const float*>(kept[3].data());
    Compare();
    const int64_t stray = NotZero();
    bool good = guarded && same && stray == 0;
    std::printf("%s B=%ld I=%-4ld Q=%-4ld K=%-4ld H=%d D=%-2d %-6s bias %-3g sharp %-2g up %-5g",
                std::is_same_v<T, __half> ? "f16 " : "bf16", c_.batch, c_.rows, c_.queries, c_.keys,
                c_.heads, c_.dim, kMasks[int(c_.mask)], c_.bias, c_.sharp, c_.upstream);
    for (int i = 0; i < (c_.bias != 0 ? 4 : 3); ++i) {
      const double size = sums_[i].want > 0 ? std::sqrt(sums_[i].want) : 1;
      const double ours = std::sqrt(sums_[i].ours) / size, layer = std::sqrt(sums_[i].layer) / size;
      const bool fine = ours <= 1.05 * layer + 1e-12;
      good &= fine;
      std::printf("  %s %.2e %.3f%s", (const char*[]){"dq", "dk", "dv", "db"}[i], ours,
                  layer > 0 ? ours / layer : 0, fine ? "" : "!");
    }
    std::printf("  stray %ld same %d guard %d  %s\n", stray, same, guarded, good ? "pass" : "FAIL");
    return good;
  }

  // Median milliseconds of a call.
  float Time() {
    return MedianTime([&](int) { Check(genie::Launch(Arguments(), nullptr), "launch"); }, 9, 3);
  }

 private:
  // Elements that must be exact zeros and are not.
  int64_t NotZero() const {
    int64_t stray = 0;
    const int64_t width = c_.heads * c_.dim;
    for (int64_t row = 0; row < c_.batch * c_.rows; ++row) {
      bool any = false;
      for (int64_t key = 0; key < c_.keys; ++key) {
        const bool valid = Valid(c_.mask, row, key, c_.keys);
        any |= valid;
        for (int64_t i = 0; i < width && !valid; ++i) {
          const int64_t at = (row * c_.keys + key) * width + i;
          stray += Widen(low_[1][at]) != 0 || Widen(low_[2][at]) != 0;
        }
      }
      for (int64_t i = 0; i < c_.queries * width && !any; ++i) {
        stray += Widen(low_[0][row * c_.queries * width + i]) != 0;
      }
    }
    for (int64_t i = 0; i < c_.bias_size() && c_.bias != 0; ++i) {
      stray += i % c_.padded() >= c_.keys && d_bias_[i] != 0;
    }
    return stray;
  }

  void Compare() {
    const int64_t slices = c_.batch * c_.rows * c_.heads;
    const bool all = double(slices) * c_.queries * c_.keys < 5e7;
    constexpr int kThreads = 16;
    std::vector<double> exact(all ? c_.bias_size() : 0), low(exact.size());
    std::mutex mutex;
    const auto work = [&](int thread) {
      Sums sums[4];
      std::vector<double> own(exact.size()), own_low(exact.size());
      const int64_t some = all ? slices : std::min<int64_t>(slices, kThreads);
      for (int64_t n = thread; n < some; n += kThreads) {
        const int64_t at = all ? n : n * 0x9E3779B9ll % slices;
        CompareSlice(at, sums, own, own_low);
      }
      if (!all && c_.bias != 0 && thread < 4) CompareBiasRow(thread, sums[3]);
      const std::lock_guard lock(mutex);
      for (int i = 0; i < 4; ++i) sums_[i].Add(sums[i]);
      for (size_t i = 0; i < exact.size(); ++i) exact[i] += own[i], low[i] += own_low[i];
    };
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) threads.emplace_back(work, t);
    for (auto& thread : threads) thread.join();
    for (size_t i = 0; i < exact.size() && c_.bias != 0; ++i) {
      if (int64_t(i) % c_.padded() < c_.keys) sums_[3].Add(d_bias_[i], low[i], exact[i]);
    }
  }

  // dq, dk and dv of one row i and head; adds its part of dbias where that is summed in full.
  void CompareSlice(int64_t n, Sums* sums, std::vector<double>& bias,
                    std::vector<double>& low_bias) {
    const int dim = c_.dim, head = n % c_.heads;
    const int64_t row = n / c_.heads % c_.rows, batch = n / c_.heads / c_.rows;
    Slice<T> slice(c_, batch, row, head);
    const int64_t any_row = batch * c_.rows + row;
    std::vector<double> want[2], low[2];
    for (auto* x : {&want[0], &want[1], &low[0], &low[1]}) x->assign(c_.keys * dim, 0);
    const double factor = c_.scale() * kLn2, bias_factor = c_.bias_scale() * kLn2;
    for (int64_t query = 0; query < c_.queries; ++query) {
      slice.Query(query);
      for (int d = 0; d < dim; ++d) {
        const int64_t at = ((any_row * c_.queries + query) * c_.heads + head) * dim + d;
        sums[0].Add(Widen(low_[0][at]), slice.low_dq[d], slice.dq[d]);
      }
      for (int64_t key = 0; key < c_.keys; ++key) {
        for (int d = 0; d < dim; ++d) {
          want[0][key * dim + d] += factor * slice.ds[key] * slice.q[d];
          low[0][key * dim + d] += factor * slice.low_ds[key] * slice.q[d];
          want[1][key * dim + d] += slice.p[key] * slice.d_o[d];
          low[1][key * dim + d] += slice.low_p[key] * slice.d_o[d];
        }
        if (bias.empty() || c_.bias == 0) continue;
        const int64_t at = ((batch * c_.heads + head) * c_.queries + query) * c_.padded() + key;
        bias[at] += bias_factor * slice.ds[key], low_bias[at] += bias_factor * slice.low_ds[key];
      }
    }
    for (int64_t i = 0; i < c_.keys * dim; ++i) {
      const int64_t at = ((any_row * c_.keys + i / dim) * c_.heads + head) * dim + i % dim;
      for (int g = 0; g < 2; ++g) {
        sums[1 + g].Add(Widen(low_[1 + g][at]), Slice<T>::Low(low[g][i]), want[g][i]);
      }
    }
  }

  // One row of dbias, over all rows i.
  void CompareBiasRow(int n, Sums& sums) {
    const int head = n % c_.heads;
    const int64_t query = (n * 337 + 5) % c_.queries;
    std::vector<double> exact(c_.keys), low(c_.keys);
    for (int64_t row = 0; row < c_.rows; ++row) {
      Slice<T> slice(c_, 0, row, head);
      slice.Query(query);
      for (int64_t key = 0; key < c_.keys; ++key) {
        exact[key] += c_.bias_scale() * kLn2 * slice.ds[key];
        low[key] += c_.bias_scale() * kLn2 * slice.low_ds[key];
      }
    }
    for (int64_t key = 0; key < c_.keys; ++key) {
      sums.Add(d_bias_[(int64_t{head} * c_.queries + query) * c_.padded() + key], low[key],
               exact[key]);
    }
  }

  Case c_;
  T *q_, *k_, *v_, *o_, *d_o_, *bias_;
  float *lse_, *query_rows_, *chunk_sums_;
  uint8_t* mask_;
  char* out_[4];
  int64_t bytes_[4];
  const T* low_[3];
  const float* d_bias_;
  Sums sums_[4];
  Memory memory_;
};

template <typename T>
int CheckAll(const std::vector<Case>& cases) {
  int failures = 0;
  for (const Case& c : cases) failures += !Problem<T>(c).Verify();
  return failures;
}

// Where little but the error of delta or of the rounded dS is left.
std::vector<Case> Sharp(float upstream) {
  std::vector<Case> cases;
  for (int dim : {16, 32, 64}) {
    for (float bias : {1.f, 40.f}) {
      cases.push_back({1, 61, 257, 257, 1, dim, Mask::kRandom, bias, 1, upstream});
    }
    cases.push_back({1, 61, 257, 257, 1, dim, Mask::kRandom, 1, 12, upstream});
  }
  return cases;
}

template <typename T>
void TimeOne(int64_t n) {
  Case c = {1, n, n, n, 4, 32};
  c.chunks = Chunks(n, 4);
  const float ms = Problem<T>(c, false).Time();
  c.bias = 0;
  const float without = Problem<T>(c, false).Time();
  const double logits = 4. * n * n * n;
  std::printf("%s N=%-4ld H=4 D=32 chunks %-2d  %8.4f ms  (without bias %8.4f)  %6.1f TFLOP/s\n",
              std::is_same_v<T, __half> ? "f16 " : "bf16", n, c.chunks, ms, without,
              logits * 64 * 10 / ms * 1e-9);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "all";
  int failures = 0;
  if (mode == "quick") {
    return CheckAll<__nv_bfloat16>({{1, 5, 129, 200, 2, 32, Mask::kRandom, 1, 1, 1, false, 2}});
  }
  if (mode == "large") return CheckAll<__nv_bfloat16>({{1, 1024, 1024, 1024, 4, 32}});
  if (mode != "time") {
    std::vector<Case> cases;
    for (int dim : {16, 32, 64}) {
      for (int64_t n : {1, 77, 129}) cases.push_back({1, std::min<int64_t>(n, 9), n, n, 2, dim});
      cases.push_back({2, 9, 200, 77, 3, dim, Mask::kRandom, 1, 1, 1, true, 4});
      cases.push_back({2, 8, 65, 300, 1, dim, Mask::kPadded, 1, 1, 1, false, 3});
    }
    for (Mask mask : {Mask::kNone, Mask::kPadded, Mask::kEmpty}) {
      cases.push_back({1, 17, 200, 200, 4, 32, mask, 1, 1, 1, false, 2});
    }
    cases.push_back({1, 9, 200, 200, 1, 32, Mask::kRandom, 0});
    for (float bias : {4.f, 12.f, 40.f})
      cases.push_back({1, 9, 257, 257, 1, 32, Mask::kRandom, bias});
    cases.push_back({1, 9, 257, 257, 1, 32, Mask::kRandom, 1, 12});
    failures += CheckAll<__nv_bfloat16>(cases) + CheckAll<__half>(cases);
    failures += CheckAll<__nv_bfloat16>(Sharp(1));
    for (float up : {1e-3f, 1.f, 100.f}) failures += CheckAll<__half>(Sharp(up));
    failures += CheckAll<__half>({{1, 9, 129, 129, 1, 32, Mask::kRandom, 1, 1, 3e-7f}});
  }
  if (argc > 2) {
    TimeOne<__nv_bfloat16>(std::atol(argv[2]));
    TimeOne<__half>(std::atol(argv[2]));
  } else if (mode != "check") {
    for (int64_t n : {128, 256, 512, 768, 1024, 2048}) TimeOne<__nv_bfloat16>(n);
  }
  std::printf("failures: %d\n", failures);
  return failures;
}
