// Harness of the gated projection's backward: every gradient against float64 with poisoned outputs,
// then timings. Prints one line a case and exits with the number of failures. `quick` checks small
// cases only (for compute-sanitizer); `check` and `time` run one half, `time N` one size.
#include "harness/gated_projection_backward.h"

namespace {

// Results in the order in which they are judged; dz first.
const char* const kNames[] = {"dz", "proj", "gate", "proj_b", "gate_b", "scale", "bias"};
constexpr int kResults = 7;

template <typename T>
class BackwardProblem {
 public:
  BackwardProblem(const BackwardCase& c, int copies) : c_(c), f_(c.forward), copies_(copies) {
    const Case& f = f_;
    const int64_t width = 2 * f.hidden, weights = f.channels * width;
    pairs_size_ = f.pairs() * f.channels;
    memory_.Allocate(&z_, pairs_size_ * sizeof(T) * copies);
    results_.Add(memory_, &dz_, pairs_size_ * copies);
    memory_.Allocate(&dz_in_, pairs_size_ * sizeof(T));
    memory_.Allocate(&mask_, f.pairs());
    for (auto& d : upstream_) memory_.Allocate(&d, f.outputs() * sizeof(T) * copies);
    const int64_t sizes[] = {pairs_size_,         f.batch * weights, f.batch * weights,
                             f.batch * width,     f.batch * width,   f.batch * f.channels,
                             f.batch * f.channels};
    std::copy(sizes, sizes + kResults, sizes_);
    for (int i = 1; i < kResults; ++i) results_.Add(memory_, &gradient_[i], sizes[i]);
    results_.Add(memory_, &partials_, f.batch * c.all_parts() * 2 * (f.channels + 1) * width);
    for (int i = 0; i < copies; ++i) {
      FillPairs<<<4096, 256>>>(z_ + i * pairs_size_, mask_, f.pairs(), f.channels, f.mask);
      for (int j = 0; j < 2; ++j) {
        FillGradient<<<4096, 256>>>(upstream_[j] + i * f.outputs(), f.rows, f.columns,
                                    f.rows_padded(), f.padded(), f.outputs(), 30 + j, 1.f);
      }
    }
    FillGradient<<<4096, 256>>>(dz_in_, f.pairs(), f.channels, f.pairs(), f.channels, pairs_size_,
                                40, 1.f);
    for (int i = 0; i < 2; ++i) {
      weights_.emplace_back(memory_, weights, f.float_weights, 10 + i,
                            1 / std::sqrt(float(f.channels)));
    }
    for (int i = 0; i < 4; ++i) {
      vectors_.emplace_back(memory_, 512, true, 20 + i, 0.3f, i == 0 ? 1.f : 0.f);
    }
    Check(cudaDeviceSynchronize(), "fill");
  }
  genie::GatedProjectionBackward Arguments(int copy) const {
    genie::GatedProjectionBackward b = {};
    genie::GatedProjection& p = b.forward;
    p.z = z_ + copy * pairs_size_, p.dtype = kFloat<T>;
    p.mask = f_.mask == Mask::kNone ? nullptr : mask_;
    p.norm_scale = vectors_[0].floats(), p.norm_bias = vectors_[1].floats(), p.epsilon = kEpsilon;
    p.proj_kernel = weights_[0].device, p.gate_kernel = weights_[1].device;
    p.kernel_dtype = f_.float_weights ? Float::kF32 : kFloat<T>;
    if (f_.bias) p.proj_bias = vectors_[2].floats(), p.gate_bias = vectors_[3].floats();
    p.batch = f_.batch, p.rows = f_.rows, p.columns = f_.columns;
    p.rows_padded = f_.rows_padded(), p.columns_padded = f_.padded();
    p.channels = f_.channels, p.hidden = f_.hidden;
    b.da = upstream_[0] + copy * f_.outputs(), b.db = upstream_[1] + copy * f_.outputs();
    b.dz = dz_ + copy * pairs_size_, b.adds = c_.adds;
    b.d_proj = gradient_[1], b.d_gate = gradient_[2];
    b.d_proj_bias = gradient_[3], b.d_gate_bias = gradient_[4];
    b.d_scale = gradient_[5], b.d_bias = gradient_[6];
    b.partials = partials_, b.parts = c_.all_parts();
    return b;
  }

  // Runs twice into poisoned outputs; returns whether all is well and prints a line.
  bool Verify() {
    const Faults faults = results_.RunTwice([&] {
      const int64_t bytes = pairs_size_ * sizeof(T);
      if (c_.adds) Check(cudaMemcpy(dz_, dz_in_, bytes, cudaMemcpyDeviceToDevice), "dz_in");
      Check(genie::Launch(Arguments(0), nullptr), "launch");
    });
    std::string judged;
    const bool good = Judge(judged) && !faults.any();
    std::printf("%s B=%-2ld I=%-4ld K=%-4ld C=%-3d Hm=%-3d parts=%-3ld adds=%d mask=%d bias=%d %s",
                kName<T>, f_.batch, f_.rows, f_.columns, f_.channels, f_.hidden, c_.all_parts(),
                c_.adds, int(f_.mask), f_.bias, f_.float_weights ? "f32" : "16b");
    std::printf("%s  NaN %llu  differ %llu  guard %llu  %s\n", judged.c_str(), faults.nan,
                faults.differ, faults.guard, good ? "pass" : "FAIL");
    std::fflush(stdout);
    return good;
  }

  float Time() const {
    return MedianTime([&](int i) { Check(genie::Launch(Arguments(i % copies_), nullptr), "go"); });
  }

 private:
  Reference MakeReference(bool coarse) {
    Reference r = {.coarse = coarse};
    for (double** per_pair : {&r.x, &r.unit, &r.dx, &r.dz})
      memory_.Allocate(per_pair, pairs_size_ * 8);
    for (double** per_pair : {&r.dp, &r.ds})
      memory_.Allocate(per_pair, f_.pairs() * 2 * f_.hidden * 8);
    double** const results[] = {&r.d_proj,      &r.d_gate,  &r.d_proj_bias,
                                &r.d_gate_bias, &r.d_scale, &r.d_bias};
    for (int i = 1; i < kResults; ++i) memory_.Allocate(results[i - 1], sizes_[i] * 8);
    ReferencePairs<T><<<8192, 128>>>(r, Arguments(0), f_.mask, c_.adds ? dz_in_ : nullptr);
    ReferenceWeights<<<dim3(f_.channels + 1, (2 * f_.hidden + 127) / 128, f_.batch), 128>>>(
        r, Arguments(0).forward);
    ReferenceNorm<<<dim3(f_.channels, f_.batch), 128>>>(r, Arguments(0).forward);
    Check(cudaDeviceSynchronize(), "reference");
    return r;
  }

  // ||a - want|| / ||want||
  template <typename Got>
  double Error(const Got* got, const double* want, int64_t size) {
    double *sums, host[2];
    memory_.Allocate(&sums, 16);
    Check(cudaMemset(sums, 0, 16), "sums");
    Distance<<<1024, 128>>>(got, want, size, sums);
    Check(cudaMemcpy(host, sums, 16, cudaMemcpyDeviceToHost), "sums");
    return std::sqrt(host[1] > 0 ? host[0] / host[1] : host[0]);
  }

  bool Judge(std::string& line) {
    const Reference exact = MakeReference(false), coarse = MakeReference(true);
    const double* const want[] = {exact.dz,          exact.d_proj,  exact.d_gate, exact.d_proj_bias,
                                  exact.d_gate_bias, exact.d_scale, exact.d_bias};
    const double* const layer[] = {coarse.dz,          coarse.d_proj,      coarse.d_gate,
                                   coarse.d_proj_bias, coarse.d_gate_bias, coarse.d_scale,
                                   coarse.d_bias};
    bool good = true;
    for (int i = 0; i < kResults; ++i) {
      const double error =
          i == 0 ? Error(dz_, want[i], sizes_[i]) : Error(gradient_[i], want[i], sizes_[i]);
      const double yardstick = Error(layer[i], want[i], sizes_[i]);
      char text[80];
      std::snprintf(text, sizeof(text), " %s %.2e/%.2e", kNames[i], error, yardstick);
      line += text;
      good &= error <= 1.05 * yardstick + 1e-6;
      if (error > 1.05 * yardstick + 1e-6) line += "!";
    }
    return good;
  }

  BackwardCase c_;
  Case f_;
  int copies_;
  int64_t pairs_size_, sizes_[kResults];
  Memory memory_;
  Results results_;
  std::vector<Weight<T>> weights_, vectors_;
  T *z_, *dz_, *dz_in_, *upstream_[2];
  uint8_t* mask_;
  float *gradient_[kResults], *partials_;
};

template <typename T>
void TimeOne(const BackwardCase& c) {
  const Case& f = c.forward;
  const double bytes = sizeof(T) * ((2. + c.adds) * f.pairs() * f.channels + 2. * f.outputs());
  const double flops = 24. * f.pairs() * f.channels * f.hidden;
  const float ms = BackwardProblem<T>(c, Copies(bytes)).Time();
  std::printf(
      "%s I=%-5ld K=%-5ld C=%-4d Hm=%-4d adds=%d parts=%-3ld %8.4f ms  %7.1f GB/s  %6.1f TFLOP/s\n",
      kName<T>, f.rows, f.columns, f.channels, f.hidden, c.adds, c.all_parts(), ms,
      bytes / ms * 1e-6, flops / ms * 1e-9);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "all";
  if (mode == "quick") {
    return Failures<BackwardProblem<__nv_bfloat16>, BackwardCase>(
        {{{1, 9, 129, 128, 128}}, {{1, 5, 77, 128, 64}, false, 2}});
  }
  int failures = 0;
  if (mode != "time") {
    std::vector<BackwardCase> cases;
    for (int64_t n : {1, 2, 16, 65, 77, 129, 200}) cases.push_back({{1, n, n, 128, 128}});
    cases.push_back({{1, 77, 129, 128, 128}, false});
    cases.push_back({{1, 33, 200, 128, 64}});
    cases.push_back({{1, 33, 200, 128, 64}, false, 3});
    for (int hidden : {64, 128, 256}) cases.push_back({{1, 33, 200, 64, hidden}});
    for (bool adds : {false, true}) cases.push_back({{2, 33, 129, 128, 256}, adds});
    for (Mask mask : {Mask::kNone, Mask::kEmpty}) {
      cases.push_back({{1, 77, 129, 128, 128, mask}});
    }
    cases.push_back({{3, 77, 65, 128, 128, Mask::kRandom, false, false}, true, 5});
    cases.push_back({{2, 1, 200, 128, 128, Mask::kRandom, true, true, 64}});
    failures += Failures<BackwardProblem<__nv_bfloat16>, BackwardCase>(cases);
    failures += Failures<BackwardProblem<__half>, BackwardCase>(
        {{{1, 77, 129, 128, 128}},
         {{1, 33, 200, 128, 64}, false, 3},
         {{1, 33, 200, 64, 256}},
         {{3, 77, 65, 128, 128, Mask::kRandom, false, false}, true, 5}});
  }
  if (argc > 2) {
    const int64_t n = std::atol(argv[2]);
    TimeOne<__nv_bfloat16>({{1, n, n, 128, 128}, true, argc > 3 ? std::atol(argv[3]) : 0});
  } else if (mode != "check") {
    for (int64_t n : {16, 64, 128, 256, 384, 512, 768, 1024, 2048}) {
      TimeOne<__nv_bfloat16>({{1, n, n, 128, 128}});
    }
    TimeOne<__nv_bfloat16>({{1, 1024, 1024, 128, 128}, false});
    TimeOne<__half>({{1, 1024, 1024, 128, 128}});
    for (int channels : {64, 128}) {
      for (int hidden : {64, 128, 256}) TimeOne<__nv_bfloat16>({{1, 512, 512, channels, hidden}});
    }
  }
  std::printf("failures: %d\n", failures);
  return failures;
}
