// Blocks of one cluster reach into one another's shared memory.
#pragma once

#include "sync.cuh"

namespace kittens {

// This block's number in its cluster.
static __device__ inline int cluster_ctarank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

namespace detail {
// Where block `rank` of the cluster has what this block has at `pointer`.
template <typename T>
__device__ inline uint32_t remote_address(const T* pointer, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(shared_address(pointer)), "r"(rank));
  return address;
}
}  // namespace detail

namespace everyone {
namespace tma {
namespace cluster {
// All threads of all blocks of the cluster.
__device__ inline void sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
}  // namespace cluster
}  // namespace tma
}  // namespace everyone

namespace tma {
namespace cluster {

// One thread arrives on block `rank`'s semaphore; what it wrote there is visible past wait().
__device__ inline void arrive(semaphore& s, int rank) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                   kittens::detail::remote_address(&s, rank))
               : "memory");
}

// kittens::wait for a semaphore on which other blocks arrive.
__device__ inline void wait(semaphore& s, int parity) {
  const auto done = [&] {
    uint32_t complete;
    asm volatile(
        "{\n.reg .pred complete;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n}"
        : "=r"(complete)
        : "r"(kittens::detail::shared_address(&s)), "r"(parity)
        : "memory");
    return complete != 0;
  };
#ifdef GENIE_TRAP_SPINS
  for (int tries = 0; !done(); ++tries) {
    if (tries == 1 << 26) __trap();
  }
#else
  while (!done()) {
  }
#endif
}

}  // namespace cluster
}  // namespace tma
}  // namespace kittens
