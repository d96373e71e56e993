// Tensor copies between global and shared tiles. Free functions are one thread's; a group's `tma`
// has its lane 0 act and the others pass.
#pragma once

#include "global.cuh"
#include "sync.cuh"

namespace kittens {
namespace tma {
namespace detail {

// Box origin in descriptor order; see kittens::detail::encode.
struct origin {
  int column, row, group, inner, batch;
};

template <int axis, typename Tile, typename Base>
__device__ inline origin locate(const coord<Base>& at) {
  static_assert(std::is_same_v<Tile, Base>, "coordinates count the tile that moves");
  const int index[3] = {at.b, at.d, at.r};  // by dim
  constexpr int inner = axis == dim::ROW ? dim::DEPTH : dim::ROW;
  constexpr int groups = Tile::cols / Tile::group_cols;
  constexpr bool wide = groups > 1;
  return {wide ? 0 : at.c * Tile::cols, index[axis] * Tile::rows, wide ? at.c * groups : 0,
          index[inner], at.b};
}

__device__ inline uint64_t evict_first() {
  uint64_t descriptor;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(descriptor));
  return descriptor;
}

}  // namespace detail

// One arrival, and the bytes whose transfer completes the phase.
__device__ inline void expect_bytes(semaphore& s, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   kittens::detail::shared_address(&s)),
               "r"(bytes)
               : "memory");
}
template <typename... Tiles>
__device__ inline void expect(semaphore& s, const Tiles&...) {
  expect_bytes(s, size_bytes<Tiles...>);
}

template <int axis, cache_policy policy, typename Tile, typename Global, typename C = coord<Tile>>
__device__ inline void load_async(Tile& to, const Global& from, const C& at, semaphore& s) {
  const detail::origin box = detail::locate<axis, Tile>(at);
  const auto map = reinterpret_cast<uint64_t>(from.template get_tma<Tile, axis>());
  const uint32_t shared = kittens::detail::shared_address(&to);
  const uint32_t barrier = kittens::detail::shared_address(&s);
  if constexpr (policy == NORMAL) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared),
        "l"(map), "r"(barrier), "r"(box.column), "r"(box.row), "r"(box.group), "r"(box.inner),
        "r"(box.batch)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared),
        "l"(map), "r"(barrier), "r"(box.column), "r"(box.row), "r"(box.group), "r"(box.inner),
        "r"(box.batch), "l"(detail::evict_first())
        : "memory");
  }
}
template <typename Tile, typename Global, typename C = coord<Tile>>
__device__ inline void load_async(Tile& to, const Global& from, const C& at, semaphore& s) {
  load_async<dim::ROW, NORMAL>(to, from, at, s);
}

// Each store is a bulk group of the issuing thread, which alone can wait for it. Whoever wrote the
// tile has fenced the async proxy before the barrier that led here (genie::FenceAsyncProxy).
template <int axis, cache_policy policy, typename Global, typename Tile, typename C = coord<Tile>>
__device__ inline void store_async(const Global& to, const Tile& from, const C& at) {
  static_assert(policy == NORMAL, "stores have no cache hint");
  const detail::origin box = detail::locate<axis, Tile>(at);
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group"
      " [%0, {%2, %3, %4, %5, %6}], [%1];\n"
      "cp.async.bulk.commit_group;" ::"l"(
          reinterpret_cast<uint64_t>(to.template get_tma<Tile, axis>())),
      "r"(kittens::detail::shared_address(&from)), "r"(box.column), "r"(box.row), "r"(box.group),
      "r"(box.inner), "r"(box.batch)
      : "memory");
}
template <typename Global, typename Tile, typename C = coord<Tile>>
__device__ inline void store_async(const Global& to, const Tile& from, const C& at) {
  store_async<dim::ROW, NORMAL>(to, from, at);
}

// Adds the tile to what is there, rounding once more.
template <typename Global, typename Tile, typename C = coord<Tile>>
__device__ inline void store_add_async(const Global& to, const Tile& from, const C& at) {
  const detail::origin box = detail::locate<dim::ROW, Tile>(at);
  asm volatile(
      "cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.tile.bulk_group"
      " [%0, {%2, %3, %4, %5, %6}], [%1];\n"
      "cp.async.bulk.commit_group;" ::"l"(
          reinterpret_cast<uint64_t>(to.template get_tma<Tile, dim::ROW>())),
      "r"(kittens::detail::shared_address(&from)), "r"(box.column), "r"(box.row), "r"(box.group),
      "r"(box.inner), "r"(box.batch)
      : "memory");
}

// At most N stores still read shared memory.
template <int N = 0>
__device__ inline void store_async_read_wait() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
// At most N stores are unfinished.
template <int N = 0>
__device__ inline void store_async_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace tma

namespace detail {

template <int N_WARPS>
struct group_tma {
  struct tma {
    static __device__ bool leads() { return threadIdx.x % (N_WARPS * WARP_THREADS) == 0; }

    template <int axis, cache_policy policy, typename Global, typename Tile,
              typename C = coord<Tile>>
    static __device__ void store_async(const Global& to, const Tile& from, const C& at) {
      if (leads()) kittens::tma::store_async<axis, policy>(to, from, at);
    }
    template <int N = 0>
    static __device__ void store_async_read_wait() {
      if (leads()) kittens::tma::store_async_read_wait<N>();
    }
    template <int N = 0>
    static __device__ void store_async_wait() {
      if (leads()) kittens::tma::store_async_wait<N>();
    }
  };
};

}  // namespace detail
}  // namespace kittens
