// Harness of triangle multiplication's forward as a layer: its three kernels back to back in one
// stream, each layer reading the last one's result and all writing the same buffers, so that a
// kernel which starts before it may changes the bits. They are compared with those of launches one
// at a time, then timed: as a stream and as a graph, and each kernel alone. Exits with the number
// of failures. `time` leaves out the checks.
#include <functional>
#include <string>
#include <vector>

#include "harness/device.h"
#include "triangle_multiplication/contract_sm90.h"
#include "triangle_multiplication/output_sm90.h"
#include "triangle_multiplication/project_sm90.h"

namespace {

using genie::Float;
using Bf16 = __nv_bfloat16;

constexpr int kChannels = 128, kLayers = 8, kRepeats = 9;

class Layer {
 public:
  explicit Layer(int64_t n) : n_(n) {
    const int64_t padded = (n + 7) / 8 * 8;
    elements_ = n * n * kChannels;
    const int64_t hidden = padded * padded * kChannels;
    for (Bf16*& z : z_) z = Make<Bf16>(elements_, 1, 1, 0);
    first_ = Make<Bf16>(elements_, 1, 1, 0);
    for (Bf16*& x : {std::ref(a_), std::ref(b_), std::ref(t_)}) x = Make<Bf16>(hidden, 2, 0, 0);
    const int64_t square = kChannels * kChannels;
    const float spread = 0.08f;
    project_ = {.a = a_,
                .b = b_,
                .dtype = Float::kBf16,
                .norm_scale = Make<float>(kChannels, 3, 0.1f, 1),
                .norm_bias = Make<float>(kChannels, 4, 0.1f, 0),
                .proj_kernel = Make<float>(2 * square, 5, spread, 0),
                .gate_kernel = Make<float>(2 * square, 6, spread, 0),
                .kernel_dtype = Float::kF32,
                .batch = 1,
                .rows = n,
                .columns = n,
                .rows_padded = padded,
                .columns_padded = padded,
                .channels = kChannels,
                .hidden = kChannels,
                .epsilon = 1e-5f};
    contract_ = {.products = {genie::Forward({false, a_, b_, padded, padded, padded}, t_)},
                 .batch = 1,
                 .channels = kChannels,
                 .dtype = Float::kBf16,
                 .out_dtype = Float::kBf16};
    output_ = {.t = t_,
               .dtype = Float::kBf16,
               .norm_in_scale = project_.norm_scale,
               .norm_in_bias = project_.norm_bias,
               .norm_out_scale = Make<float>(kChannels, 7, 0.1f, 1),
               .norm_out_bias = Make<float>(kChannels, 8, 0.1f, 0),
               .proj_kernel = Make<float>(square, 9, spread, 0),
               .gate_kernel = Make<float>(square, 10, spread, 0),
               .kernel_dtype = Float::kF32,
               .batch = 1,
               .rows = n,
               .columns = n,
               .rows_padded = padded,
               .columns_padded = padded,
               .channels = kChannels,
               .hidden = kChannels,
               .residual = true,
               .epsilon = 1e-5f};
    Check(cudaStreamCreate(&stream_), "stream");
  }
  ~Layer() { cudaStreamDestroy(stream_); }

  // One stage of a layer, from z_[layer % 2] to the other.
  void Stage(int stage, int layer) {
    project_.z = output_.z = z_[layer % 2], output_.out = z_[1 - layer % 2];
    Check(stage == 0   ? genie::Launch(project_, stream_)
          : stage == 1 ? genie::Launch(contract_, stream_)
                       : genie::Launch(output_, stream_),
          "launch");
  }

  std::vector<uint16_t> Result(bool apart) {
    Check(cudaMemcpy(z_[0], first_, elements_ * sizeof(Bf16), cudaMemcpyDeviceToDevice), "first");
    Check(cudaDeviceSynchronize(), "before");
    for (int layer = 0; layer < kLayers; ++layer) {
      for (int stage = 0; stage < 3; ++stage) {
        Stage(stage, layer);
        if (apart) Check(cudaStreamSynchronize(stream_), "run");
      }
    }
    Check(cudaStreamSynchronize(stream_), "run");
    std::vector<uint16_t> result(elements_);
    Check(cudaMemcpy(result.data(), z_[kLayers % 2], elements_ * sizeof(Bf16),
                     cudaMemcpyDeviceToHost),
          "result");
    return result;
  }

  bool Verify() {
    const auto apart = Result(true);
    bool same = true;
    for (int i = 0; i < 4; ++i) same &= Result(false) == apart;
    uint64_t bits = 0;
    for (uint16_t x : apart) bits = bits * 31 + x;
    std::printf("N=%-5ld layers back to back, the same bits: %s  (%016lx)\n", n_,
                same ? "pass" : "FAIL", bits);
    return same;
  }

  // Median milliseconds of one of kLayers runs of these stages.
  float Time(std::vector<int> stages, bool as_graph) {
    const auto run = [&] {
      for (int layer = 0; layer < kLayers; ++layer) {
        for (int stage : stages) Stage(stage, layer);
      }
    };
    const Graph calls(stream_, run);
    const auto sample = [&](int) { as_graph ? calls.Launch() : run(); };
    return MedianTime(sample, kRepeats, 1, stream_) / kLayers;
  }

  void Report() {
    std::printf(
        "N=%-5ld layer %8.4f ms as a graph %8.4f ms in a stream; alone: project %7.4f "
        "contract %7.4f output %7.4f\n",
        n_, Time({0, 1, 2}, true), Time({0, 1, 2}, false), Time({0}, true), Time({1}, true),
        Time({2}, true));
  }

 private:
  template <typename T>
  T* Make(int64_t size, uint32_t seed, float scale, float offset) {
    T* to;
    memory_.Allocate(&to, size * sizeof(T));
    FillDraws<<<1024, 256>>>(to, size, seed, scale, offset);
    return to;
  }

  int64_t n_, elements_;
  Bf16 *z_[2], *first_, *a_, *b_, *t_;
  genie::GatedProjection project_ = {};
  genie::Contraction contract_ = {};
  genie::GatedOutput output_ = {};
  cudaStream_t stream_;
  Memory memory_;
};

}  // namespace

int main(int argc, char** argv) {
  const bool check = argc < 2 || std::string(argv[1]) != "time";
  int failures = 0;
  if (check) {
    for (int64_t n : {16, 77, 128, 200, 256, 384}) failures += !Layer(n).Verify();
  }
  for (int64_t n : {16, 64, 128, 192, 256, 384, 512, 1024}) Layer(n).Report();
  std::printf("failures: %d\n", failures);
  return failures;
}
