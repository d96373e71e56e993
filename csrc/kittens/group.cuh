// group<N> gathers every operation at the scope of N warps that start at a multiple of N.
#pragma once

#include "maps.cuh"
#include "memory.cuh"
#include "mma.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace kittens {
namespace detail {
template <int N_WARPS>
struct group_maps {};
template <>
struct group_maps<1> : warp_maps {};
}  // namespace detail

template <int N_WARPS>
struct group : detail::group_sync<N_WARPS>,
               detail::group_tma<N_WARPS>,
               detail::group_maps<N_WARPS>,
               detail::group_memory<N_WARPS>,
               detail::group_wgmma<N_WARPS> {};

using warp = group<1>;
using warpgroup = group<4>;

}  // namespace kittens
