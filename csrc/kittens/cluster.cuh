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

// One thread tells block `rank` that it has read what that block wrote here.
__device__ inline void arrive(semaphore& s, int rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(
                   kittens::detail::remote_address(&s, rank))
               : "memory");
}

}  // namespace cluster
}  // namespace tma
}  // namespace kittens
