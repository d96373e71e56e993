// One problem of the contraction: its operands on the device, checked runs and their times.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "harness/device.h"
#include "triangle_multiplication/contract_sm90.h"

using genie::Float;

enum class Mask { kNone, kRandom, kHalf, kEmpty };
constexpr const char* kMaskNames[] = {"none", "random", "half", "empty"};

struct Case {
  int64_t batch, channels, i, j, k;
  bool incoming = false;
  Mask mask = Mask::kNone;
  int64_t extra = 0;  // zeros behind each axis beyond the next multiple of 8
  int64_t padded(int64_t n) const { return (n + 7) / 8 * 8 + extra; }
};

// A stored matrix of the batch: valid and padded sizes.
struct Matrix {
  int64_t rows, columns, padded_rows, padded_columns;
  uint32_t seed;
  Mask mask;
  __host__ __device__ int64_t size() const { return padded_rows * padded_columns; }
};

constexpr int64_t kGuard = 4096;  // poisoned bytes after each result
constexpr int64_t kStride = 1 << 16;

__host__ __device__ inline bool Valid(const Matrix& m, int64_t entry, int64_t row, int64_t column) {
  if (row >= m.rows || column >= m.columns) return false;
  if (m.mask == Mask::kNone) return true;
  if (m.mask == Mask::kHalf) return 2 * row < m.rows && 2 * column < m.columns;
  return m.mask == Mask::kRandom &&
         Draw(9 + m.seed, (entry * kStride + row) * kStride + column) > -1.f;
}

// A value depends on where it stands, not on the padding; what is masked is zero.
template <typename T>
__global__ void Fill(T* to, uint8_t* mask, Matrix m, int64_t matrices, int64_t channels) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t n = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; n < matrices * m.size();
       n += step) {
    const int64_t batch = n / m.size(), row = n % m.size() / m.padded_columns;
    const int64_t column = n % m.padded_columns;
    const bool valid = Valid(m, batch / channels, row, column);
    to[n] = Round<T>(valid ? Draw(m.seed, (batch * kStride + row) * kStride + column) : 0.f);
    if (mask && batch % channels == 0) mask[batch / channels * m.size() + n % m.size()] = valid;
  }
}

struct Faults {
  double error, yardstick, reference;  // sums of squares
  unsigned long long unwritten, pads, differ;
};

// Every `every`-th element against float64 and against float32 sums rounded to the result's dtype.
template <typename T, typename Out>
__global__ void Compare(genie::Product p, const Out* second, Matrix out, int64_t matrices,
                        int64_t channels, int64_t every, Faults* faults) {
  const T *a = static_cast<const T*>(p.a), *b = static_cast<const T*>(p.b);
  const Out* first = static_cast<const Out*>(p.out);
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  double error = 0, yardstick = 0, square = 0;
  for (int64_t n = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; n < matrices * out.size();
       n += step) {
    const int64_t batch = n / out.size(), row = n % out.size() / out.padded_columns;
    const int64_t column = n % out.padded_columns;
    const float got = Widen(first[n]);
    if (!isfinite(got)) atomicAdd(&faults->unwritten, 1ull);
    if (got != Widen(second[n])) atomicAdd(&faults->differ, 1ull);
    const bool pad = row >= out.rows || column >= out.columns;
    if (pad && got != 0) atomicAdd(&faults->pads, 1ull);
    // 127 has no factor in common with a row, so that samples fall everywhere.
    if (n / 127 % every != 0 || !Valid(out, batch / channels, row, column)) continue;
    double exact = 0;
    float single = 0;
    for (int64_t k = 0; k < p.depth; ++k) {
      const float x = Widen(
          a[batch * p.rows * p.depth + (p.a_transposed ? k * p.rows + row : row * p.depth + k)]);
      const float y = Widen(b[batch * p.columns * p.depth +
                              (p.b_transposed ? column * p.depth + k : k * p.columns + column)]);
      exact += double(x) * y;
      single = fmaf(x, y, single);
    }
    const double plain = Widen(Round<Out>(single)) - exact;
    error += (got - exact) * (got - exact), yardstick += plain * plain, square += exact * exact;
  }
  atomicAdd(&faults->error, error);
  atomicAdd(&faults->yardstick, yardstick);
  atomicAdd(&faults->reference, square);
}

template <typename T, typename Out>
class Problem {
 public:
  explicit Problem(const Case& c) : c_(c), matrices_(c.batch * c.channels) {
    const auto describe = [&](int64_t rows, int64_t columns, uint32_t seed, Mask mask) {
      return Matrix{rows, columns, c.padded(rows), c.padded(columns), seed, mask};
    };
    shape_[0] = c.incoming ? describe(c.k, c.i, 1, c.mask) : describe(c.i, c.k, 1, c.mask);
    shape_[1] = c.incoming ? describe(c.k, c.j, 2, c.mask) : describe(c.j, c.k, 2, c.mask);
    shape_[2] = describe(c.i, c.j, 3, Mask::kNone);
    for (int n = 0; n < 3; ++n) {
      memory_.Allocate(&in_[n], matrices_ * shape_[n].size() * sizeof(T));
      memory_.Allocate(&out_[n], matrices_ * shape_[n].size() * sizeof(Out) + kGuard);
      memory_.Allocate(&mask_[n], c.batch * shape_[n].size());
      memory_.Allocate(&live_[n], Live(n));
      Fill<<<4096, 256>>>(in_[n], mask_[n], shape_[n], matrices_, c.channels);
    }
    Check(cudaDeviceSynchronize(), "fill");
  }

  // The products named by `which`, a letter each: t, a, b.
  void Run(const char* which, cudaStream_t stream = nullptr) {
    const bool masked = c_.mask != Mask::kNone;
    for (int n = 0; masked && n < (OneMask() ? 1 : 2); ++n) {
      Check(genie::FindLive(mask_[n], live_[n], c_.batch, shape_[n].padded_rows,
                            shape_[n].padded_columns, stream),
            "live blocks");
    }
    genie::Contraction c = {
        .batch = c_.batch, .channels = c_.channels, .dtype = Dtype<T>(), .out_dtype = Dtype<Out>()};
    for (int n = 0; which[n]; ++n) c.products[n] = ProductOf(which[n]);
    Check(genie::Launch(c, stream), "launch");
  }

  genie::Product ProductOf(char which) const {
    const bool masked = c_.mask != Mask::kNone;
    const genie::Edges edges = {c_.incoming,
                                in_[0],
                                in_[1],
                                c_.padded(c_.i),
                                c_.padded(c_.j),
                                c_.padded(c_.k),
                                masked ? live_[0] : nullptr,
                                masked ? live_[!OneMask()] : nullptr};
    if (which == 't') return Forward(edges, out_[2]);
    return which == 'a' ? GradientOfA(edges, in_[2], out_[0]) : GradientOfB(edges, in_[2], out_[1]);
  }

  // Runs twice into poisoned results; prints a line and returns whether all is well.
  bool Verify(const char* which) {
    bool all_good = true, guarded[2] = {true, true};
    Out* kept[2];
    for (int n = 0; which[n]; ++n) memory_.Allocate(&kept[n], Bytes(which[n]));
    for (int run = 0; run < 2; ++run) {
      for (int n = 0; which[n]; ++n) {
        Check(cudaMemset(Result(which[n]), 0xFF, Bytes(which[n]) + kGuard), "poison");
      }
      Run(which);
      Check(cudaDeviceSynchronize(), "run");
      for (int n = 0; which[n]; ++n) {
        std::vector<uint8_t> guard(kGuard);
        char* end = reinterpret_cast<char*>(Result(which[n])) + Bytes(which[n]);
        Check(cudaMemcpy(guard.data(), end, kGuard, cudaMemcpyDeviceToHost), "guard");
        guarded[n] &= std::all_of(guard.begin(), guard.end(), [](uint8_t x) { return x == 0xFF; });
        if (run == 0) {
          Check(cudaMemcpy(kept[n], Result(which[n]), Bytes(which[n]), cudaMemcpyDeviceToDevice),
                "keep");
        }
      }
    }
    for (int n = 0; which[n]; ++n) all_good &= Judge(which[n], kept[n], guarded[n]);
    return all_good;
  }

  // Median milliseconds of a call; the operands of 1,024 pairs and more outgrow L2.
  float Time(const char* which) {
    constexpr int kCalls = 8;
    cudaStream_t stream;
    Check(cudaStreamCreate(&stream), "stream");
    const Graph calls(stream, [&] {
      for (int i = 0; i < kCalls; ++i) Run(which, stream);
    });
    return MedianTime([&](int) { calls.Launch(); }, 9, 1, stream) / kCalls;
  }

  // The result's valid part, in order, for comparison with another padding's.
  std::vector<Out> ValidPart(char which) {
    const Matrix m = shape_[Index(which)];
    std::vector<Out> all(matrices_ * m.size()), valid;
    Check(cudaMemcpy(all.data(), Result(which), Bytes(which), cudaMemcpyDeviceToHost), "to host");
    for (size_t n = 0; n < all.size(); ++n) {
      const int64_t row = n % m.size() / m.padded_columns, column = n % m.padded_columns;
      if (row < m.rows && column < m.columns) valid.push_back(all[n]);
    }
    return valid;
  }

 private:
  template <typename X>
  static Float Dtype() {
    return sizeof(X) == 4 ? Float::kF32 : std::is_same_v<X, __half> ? Float::kF16 : Float::kBf16;
  }
  // Both operands are masked alike, as in the layer.
  bool OneMask() const { return c_.mask == Mask::kHalf && c_.i == c_.j; }
  static int Index(char which) { return which == 't' ? 2 : which - 'a'; }
  Out* Result(char which) const { return out_[Index(which)]; }
  int64_t Bytes(char which) const { return matrices_ * shape_[Index(which)].size() * sizeof(Out); }
  int64_t Live(int n) const {
    return genie::LiveSize(c_.batch, shape_[n].padded_rows, shape_[n].padded_columns);
  }

  bool Judge(char which, const Out* kept, bool guarded) {
    const genie::Product p = ProductOf(which);
    const Matrix m = shape_[Index(which)];
    Faults* device;
    Faults f = {};
    memory_.Allocate(&device, sizeof(f));
    Check(cudaMemset(device, 0, sizeof(f)), "faults");
    const int64_t every = std::max<int64_t>(1, matrices_ * m.size() * p.depth / 2000000000);
    Compare<T, Out><<<4096, 256>>>(p, kept, m, matrices_, c_.channels, every, device);
    Check(cudaMemcpy(&f, device, sizeof(f), cudaMemcpyDeviceToHost), "compare");
    const double norm = f.reference > 0 ? std::sqrt(f.reference) : 1;
    const double error = std::sqrt(f.error) / norm, yardstick = std::sqrt(f.yardstick) / norm;
    const bool good =
        guarded && !f.unwritten && !f.pads && !f.differ && error <= 1.05 * yardstick + 1e-7;
    std::printf(
        "%s %s %-4s B=%-2ld Hm=%-3ld I=%-5ld J=%-5ld K=%-5ld +%-3ld mask=%-6s  error %.3e  plain "
        "%.3e  "
        "unwritten %llu  pads %llu  runs differ %llu  guard %s  %s\n",
        sizeof(Out) == 4 ? "f16 " : "bf16", c_.incoming ? "in " : "out",
        which == 't'   ? "t"
        : which == 'a' ? "da"
                       : "db",
        c_.batch, c_.channels, c_.i, c_.j, c_.k, c_.extra, kMaskNames[int(c_.mask)], error,
        yardstick, f.unwritten, f.pads, f.differ, guarded ? "ok" : "BROKEN",
        good ? "pass" : "FAIL");
    return good;
  }

  Case c_;
  int64_t matrices_;
  Matrix shape_[3];  // a, b, t as stored
  T* in_[3];         // a, b, dt
  Out* out_[3];      // da, db, t
  uint8_t *mask_[3], *live_[3];
  Memory memory_;
};
