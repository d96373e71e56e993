// The walls that bound attention on this card, per clock and SM: special functions, packed and
// scalar arithmetic, matrix products by shape and operand, and bytes from L2 into shared memory.
#include <algorithm>
#include <string>
#include <vector>

#include "harness/check.h"
#include "kittens.cuh"
#include "kittens/extensions.cuh"

using namespace kittens;

namespace {

constexpr int kBlocks = 132, kThreads = 512, kChains = 8, kLoops = 256;

struct Span {
  long long first, last;
};

// The clocks from the first thread's start to the last thread's end, of the slowest block.
double Clocks(Span* spans, int blocks) {
  std::vector<Span> host(blocks);
  Check(cudaDeviceSynchronize(), "run");
  Check(cudaMemcpy(host.data(), spans, blocks * sizeof(Span), cudaMemcpyDeviceToHost), "spans");
  double longest = 0;
  for (const Span& s : host) longest = std::max<double>(longest, s.last - s.first);
  return longest;
}

Span* Spans() {
  static Span* spans = [] {
    Span* s;
    Check(cudaMalloc(&s, 4096 * sizeof(Span)), "cudaMalloc");
    return s;
  }();
  return spans;
}

template <typename F>
__device__ void Timed(Span* spans, F f) {
  __shared__ Span span;
  if (threadIdx.x == 0) span = {clock64(), 0};
  __syncthreads();
  f();
  atomicMax(&span.last, clock64());
  __syncthreads();
  if (threadIdx.x == 0) spans[blockIdx.x] = span;
}

// One instruction, or a short sequence, on a register of its own chain.
#define OPERATION(Name, text)                                                                      \
  struct Name {                                                                                    \
    static __device__ void Run(uint32_t& x, uint32_t y) { asm volatile(text : "+r"(x) : "r"(y)); } \
  };
OPERATION(Ex2F32, "{.reg .f32 f; mov.b32 f, %0; ex2.approx.ftz.f32 f, f; mov.b32 %0, f;}")
OPERATION(Ex2Bf16, "ex2.approx.ftz.bf16x2 %0, %0;")
OPERATION(Ex2F16, "ex2.approx.f16x2 %0, %0;")
OPERATION(
    FmaF32,
    "{.reg .f32 f, g; mov.b32 f, %0; mov.b32 g, %1; fma.rn.ftz.f32 f, f, g, g; mov.b32 %0, f;}")
OPERATION(AddF32,
          "{.reg .f32 f, g; mov.b32 f, %0; mov.b32 g, %1; add.rn.ftz.f32 f, f, g; mov.b32 %0, f;}")
OPERATION(MaxF32, "{.reg .f32 f, g; mov.b32 f, %0; mov.b32 g, %1; max.f32 f, f, g; mov.b32 %0, f;}")
OPERATION(FmaBf16, "fma.rn.bf16x2 %0, %0, %1, %1;")
OPERATION(FmaF16, "fma.rn.f16x2 %0, %0, %1, %1;")
OPERATION(MaxBf16, "max.bf16x2 %0, %0, %1;")
OPERATION(MaxF16, "max.f16x2 %0, %0, %1;")
OPERATION(PackBf16, "{.reg .f32 f, g; mov.b32 f, %0; mov.b32 g, %1; cvt.rn.bf16x2.f32 %0, f, g;}")
OPERATION(PackF16, "{.reg .f32 f, g; mov.b32 f, %0; mov.b32 g, %1; cvt.rn.f16x2.f32 %0, f, g;}")
OPERATION(ShiftLeft, "shl.b32 %0, %0, %1;")
OPERATION(And, "{.reg .b32 t; and.b32 t, %0, %1; xor.b32 %0, t, %1;}")
OPERATION(Permute, "prmt.b32 %0, %0, %1, 0x5410;")
OPERATION(AddInt, "add.s32 %0, %0, %1;")
// Per pair of logits: two exponentials by the special-function unit and one packing.
OPERATION(Ex2F32TwicePack,
          "{.reg .f32 f, g; mov.b32 f, %0; mov.b32 g, %0; ex2.approx.ftz.f32 f, f;"
          " add.rn.ftz.f32 g, g, f; ex2.approx.ftz.f32 g, g; cvt.rn.bf16x2.f32 %0, f, g;}")
// The same in packed form: subtract, exponentiate.
OPERATION(PackEx2F16,
          "{.reg .f32 f, g; mov.b32 f, %0; mov.b32 g, %1; cvt.rn.f16x2.f32 %0, f, g;"
          " ex2.approx.f16x2 %0, %0;}")

template <typename Operation>
__global__ __launch_bounds__(kThreads) void Repeat(Span* spans, uint32_t seed, uint32_t* out) {
  uint32_t x[kChains];
  for (int c = 0; c < kChains; ++c) x[c] = seed + threadIdx.x * c;
  const uint32_t y = seed * 3 + threadIdx.x;
  Timed(spans, [&] {
#pragma unroll 4
    for (int i = 0; i < kLoops; ++i) {
#pragma unroll
      for (int c = 0; c < kChains; ++c) Operation::Run(x[c], y);
    }
  });
  uint32_t sum = 0;
  for (int c = 0; c < kChains; ++c) sum += x[c];
  if (sum == 0x12345678) *out = sum;
}

template <typename Operation>
void TimeOperation(const char* name, int elements) {
  for (int i = 0; i < 2; ++i) Repeat<Operation><<<kBlocks, kThreads>>>(Spans(), 7, nullptr);
  const double rate = double{kThreads} * kChains * kLoops / Clocks(Spans(), kBlocks);
  std::printf("%-28s %6.1f a clock and SM, %6.1f elements\n", name, rate, rate * elements);
}

// Products 64 x N x K by `groups` warpgroups of a block, A from registers or shared memory.
template <int N, int K, bool transposed, bool registers>
__global__ void Products(Span* spans, float* out) {
  using B = std::conditional_t<transposed, st<bf16, N, K>, st<bf16, K, N>>;
  extern __shared__ alignment_dummy __shm[];
  shared_allocator allocator(reinterpret_cast<int*>(&__shm[0]));
  auto& b = allocator.template allocate<B>();
  auto& a = allocator.template allocate<st<bf16, 64, K>>();
  for (int i = threadIdx.x; i < 64 * K; i += blockDim.x) a.data[i] = Round<bf16>(Draw(1, i));
  for (int i = threadIdx.x; i < N * K; i += blockDim.x) b.data[i] = Round<bf16>(Draw(2, i));
  genie::FenceAsyncProxy();
  __syncthreads();
  rt_fl<16, N> d[2];
  rt<bf16, 16, K> fragment;
  warpgroup::load(fragment, a);
  Timed(spans, [&] {
    for (int i = 0; i < kLoops / 2; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const auto multiply = [&](const auto& left) {
          if constexpr (transposed) {
            warpgroup::mma_ABt(d[j], left, b);
          } else {
            warpgroup::mma_AB(d[j], left, b);
          }
        };
        if constexpr (registers) {
          multiply(fragment);
        } else {
          multiply(a);
        }
        warpgroup::mma_async_wait<1>();
      }
    }
    warpgroup::mma_async_wait<0>();
    genie::Pin(d[0]), genie::Pin(d[1]);
  });
  float sum = 0;
  for (auto& tile : d) {
    for (auto& base : tile.tiles[0]) {
      for (auto& pair : base.data) sum += pair.x + pair.y;
    }
  }
  if (sum == 12.345f) *out = sum;
}

template <int N, int K, bool transposed, bool registers>
void TimeProducts() {
  const auto kernel = Products<N, K, transposed, registers>;
  const int shared = sizeof(bf16) * K * (N + 64) + 2048;
  Check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "shm");
  for (int groups = 1; groups <= 3; ++groups) {
    for (int i = 0; i < 2; ++i) kernel<<<kBlocks, 128 * groups, shared>>>(Spans(), nullptr);
    const double flops = 2. * 64 * N * K * groups * kLoops / Clocks(Spans(), kBlocks);
    std::printf("m64n%-3d k=%-3d %s A %-9s %d warpgroups: %6.0f FLOP a clock and SM (%3.0f%%)\n", N,
                K, transposed ? "ABt" : "AB ", registers ? "registers" : "shared", groups, flops,
                flops / 40.96);
  }
}

// Every block copies `bytes` pieces of a region of L2; blocks of a cluster copy the same pieces,
// each its share, to all of them.
template <int kCluster, int kBytes, int kStages>
__global__ __launch_bounds__(128) void Copies(Span* spans, const char* from, int pieces,
                                              int loops) {
  extern __shared__ alignment_dummy __shm[];
  char* to = reinterpret_cast<char*>(__shm) + (128 - detail::shared_address(__shm) % 128) % 128;
  __shared__ semaphore arrived[kStages];
  if (threadIdx.x == 0) {
    for (auto& s : arrived) init_semaphore(s, 1);
  }
  __syncthreads();
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
  const int cluster = blockIdx.x / kCluster, rank = blockIdx.x % kCluster;
  Timed(spans, [&] {
    if (threadIdx.x != 0) return;
    const auto load = [&](int n) {
      constexpr int kShare = kBytes / kCluster;
      tma::expect_bytes(arrived[n % kStages], kBytes);
      const char* piece = from + int64_t{(cluster * 17 + n) % pieces} * kBytes + rank * kShare;
      const uint32_t shared = detail::shared_address(to + n % kStages * kBytes + rank * kShare);
      const uint32_t barrier = detail::shared_address(&arrived[n % kStages]);
      if constexpr (kCluster == 1) {
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
            "[%3];" ::"r"(shared),
            "l"(piece), "n"(kShare), "r"(barrier)
            : "memory");
      } else {
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
            "[%0], [%1], %2, [%3], %4;" ::"r"(shared),
            "l"(piece), "n"(kShare), "r"(barrier), "h"(uint16_t{(1 << kCluster) - 1})
            : "memory");
      }
    };
    for (int n = 0; n < kStages; ++n) load(n);
    for (int n = 0; n < loops; ++n) {  // what arrives is overwritten by a peer without a care
      wait(arrived[n % kStages], n / kStages % 2);
      if (n + kStages < loops) load(n + kStages);
    }
  });
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

template <int kCluster, int kBytes, int kStages>
void TimeCopies(const char* from, int64_t region) {
  const auto kernel = Copies<kCluster, kBytes, kStages>;
  const int shared = kBytes * kStages + 128, loops = 2000;
  Check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "shm");
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = kBlocks, config.blockDim = 128, config.dynamicSmemBytes = shared;
  config.attrs = &cluster, config.numAttrs = 1;
  cudaEvent_t start, stop;
  cudaEventCreate(&start), cudaEventCreate(&stop);
  float milliseconds = 0;
  for (int i = 0; i < 2; ++i) {
    cudaEventRecord(start);
    Check(cudaLaunchKernelEx(&config, kernel, Spans(), from, int(region / kBytes), loops), "copy");
    cudaEventRecord(stop);
    Check(cudaEventSynchronize(stop), "copy");
    cudaEventElapsedTime(&milliseconds, start, stop);
  }
  const double bytes = double{kBytes} * loops * kBlocks;
  std::printf(
      "L2 to shared, pieces of %5d, %d stages, region %3.0f MB, clusters of %d: %6.2f TB/s "
      "into shared memory, %5.1f bytes a clock and SM\n",
      kBytes, kStages, region / 1e6, kCluster, bytes / milliseconds * 1e-9,
      double{kBytes} * loops / Clocks(Spans(), kBlocks));
}

}  // namespace

int main() {
  TimeOperation<Ex2F32>("ex2.f32", 1);
  TimeOperation<Ex2Bf16>("ex2.bf16x2", 2);
  TimeOperation<Ex2F16>("ex2.f16x2", 2);
  TimeOperation<FmaF32>("fma.f32", 1);
  TimeOperation<AddF32>("add.f32", 1);
  TimeOperation<MaxF32>("max.f32", 1);
  TimeOperation<FmaBf16>("fma.bf16x2", 2);
  TimeOperation<FmaF16>("fma.f16x2", 2);
  TimeOperation<MaxBf16>("max.bf16x2", 2);
  TimeOperation<MaxF16>("max.f16x2", 2);
  TimeOperation<PackBf16>("cvt.bf16x2.f32", 2);
  TimeOperation<PackF16>("cvt.f16x2.f32", 2);
  TimeOperation<ShiftLeft>("shl", 1);
  TimeOperation<And>("lop3", 1);
  TimeOperation<Permute>("prmt", 1);
  TimeOperation<AddInt>("iadd", 1);
  TimeOperation<Ex2F32TwicePack>("2 ex2.f32, add, cvt.bf16x2", 2);
  TimeOperation<PackEx2F16>("cvt.f16x2, ex2.f16x2", 2);
  TimeProducts<128, 32, true, false>(), TimeProducts<128, 32, true, true>();
  TimeProducts<64, 32, true, true>(), TimeProducts<64, 32, true, false>();
  TimeProducts<192, 32, true, false>();
  TimeProducts<32, 128, false, true>(), TimeProducts<32, 128, false, false>();
  TimeProducts<16, 128, false, true>();
  TimeProducts<64, 128, false, true>();
  char* from;
  Check(cudaMalloc(&from, 64 << 20), "cudaMalloc");
  Check(cudaMemset(from, 0, 64 << 20), "fill");
  for (int64_t region : {4 << 20, 24 << 20}) {
    TimeCopies<1, 8192, 8>(from, region), TimeCopies<1, 16384, 8>(from, region);
    TimeCopies<2, 16384, 8>(from, region), TimeCopies<4, 16384, 8>(from, region);
  }
  return 0;
}
