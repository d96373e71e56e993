// Who a thread is, named barriers, register reallocation and mbarriers.
#pragma once

#include "shared.cuh"

namespace kittens {

static __device__ inline int laneid() { return threadIdx.x % WARP_THREADS; }
static __device__ inline int warpid() { return threadIdx.x / WARP_THREADS; }
static __device__ inline int warpgroupid() { return threadIdx.x / WARPGROUP_THREADS; }

// An mbarrier. wait(s, p) returns once the phase of parity p has completed: on a fresh one
// wait(s, 0) blocks until the first completion and wait(s, 1) returns at once.
struct semaphore {
  uint64_t value;
};

namespace detail {
template <typename T>
__device__ inline uint32_t shared_address(const T* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
}  // namespace detail

// One thread's operations; the fence makes the initialised barrier visible to TMA.
__device__ inline void init_semaphore(semaphore& s, int thread_count, int transaction_count = 0) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], %1;\n"
      "fence.mbarrier_init.release.cluster;" ::"r"(detail::shared_address(&s)),
      "r"(thread_count + transaction_count)
      : "memory");
}

__device__ inline void arrive(semaphore& s) {
  asm volatile(
      "mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(detail::shared_address(&s))
      : "memory");
}

__device__ inline bool try_wait(semaphore& s, int parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred complete;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
      "selp.u32 %0, 1, 0, complete;\n}"
      : "=r"(done)
      : "r"(detail::shared_address(&s)), "r"(parity)
      : "memory");
  return done;
}

__device__ inline void wait(semaphore& s, int parity) {
#ifdef GENIE_TRAP_SPINS
  for (int tries = 0; !try_wait(s, parity); ++tries) {
    if (tries == 1 << 26) __trap();
  }
#else
  while (!try_wait(s, parity)) {
  }
#endif
}

namespace everyone {
__device__ inline void sync(int id) { asm volatile("barrier.sync %0;" ::"r"(id) : "memory"); }
}  // namespace everyone

namespace detail {

template <int N_WARPS>
struct group_sync {
  static constexpr int GROUP_THREADS = N_WARPS * WARP_THREADS;
  static __device__ int laneid() { return threadIdx.x % GROUP_THREADS; }
  static __device__ int warpid() { return laneid() / WARP_THREADS; }

  static __device__ void sync(int id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(GROUP_THREADS) : "memory");
  }
  static __device__ void sync() {
    static_assert(N_WARPS == 1, "larger groups name a barrier");
    __syncwarp();
  }
  // Lane 0 arrives for the group.
  static __device__ void arrive(semaphore& s) {
    if (laneid() == 0) kittens::arrive(s);
  }
  template <int registers>
  static __device__ void increase_registers() {
    static_assert(N_WARPS == WARPGROUP_WARPS, "registers move by warpgroup");
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
  }
  template <int registers>
  static __device__ void decrease_registers() {
    static_assert(N_WARPS == WARPGROUP_WARPS, "registers move by warpgroup");
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
  }
};

}  // namespace detail
}  // namespace kittens
