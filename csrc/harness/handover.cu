// What racecheck follows of a handover through mbarriers. A warp writes a word a lane, another
// reads them, and each tells the other through a semaphore, with `all` every lane for itself,
// otherwise lane 0 for its warp after a __syncwarp, as group::arrive does. Both orders are
// guaranteed: a
// __syncwarp orders the lanes' accesses, and an arrival releases what came before it. racecheck
// reports the second as a hazard, so a kernel that hands over so is reported falsely. Run as
//   compute-sanitizer --tool racecheck handover [all]
#include "harness/check.h"
#include "kittens.cuh"

namespace {

using namespace kittens;

constexpr int kRounds = 100;

template <bool all>
__global__ void HandOver(int* sums) {
  __shared__ int words[WARP_THREADS];
  __shared__ semaphore written, read;
  if (threadIdx.x == 0) {
    init_semaphore(written, all ? WARP_THREADS : 1);
    init_semaphore(read, all ? WARP_THREADS : 1);
  }
  __syncthreads();
  const int lane = laneid();
  const auto tell = [](semaphore& s) {
    if constexpr (all) {
      arrive(s);
    } else {
      warp::sync();
      warp::arrive(s);
    }
  };
  int sum = 0;
  for (int n = 0; n < kRounds; ++n) {
    if (warpid() == 0) {
      if (n > 0) wait(read, (n - 1) % 2);
      words[lane] = n * lane;
      tell(written);
    } else {
      wait(written, n % 2);
      sum += words[(lane + 1) % WARP_THREADS];
      tell(read);
    }
  }
  if (warpid() == 1) sums[lane] = sum;
}

}  // namespace

int main(int argc, char**) {
  int *sums, host[WARP_THREADS], failures = 0;
  Check(cudaMalloc(&sums, sizeof(host)), "cudaMalloc");
  argc > 1 ? HandOver<true><<<1, 2 * WARP_THREADS>>>(sums)
           : HandOver<false><<<1, 2 * WARP_THREADS>>>(sums);
  Check(cudaMemcpy(host, sums, sizeof(host), cudaMemcpyDeviceToHost), "run");
  for (int lane = 0; lane < WARP_THREADS; ++lane) {
    failures += host[lane] != (lane + 1) % WARP_THREADS * kRounds * (kRounds - 1) / 2;
  }
  std::printf("failures: %d\n", failures);
  return failures;
}
