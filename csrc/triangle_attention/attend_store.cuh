// How the attention core writes what a warp found for its 16 queries.
#pragma once

#include "kittens.cuh"
#include "triangle_attention/attend_softmax.cuh"

namespace genie::attend {

// Among 4 lanes: lane l gets word l % n of n lanes in their order.
template <int n>
__device__ void Exchange(uint32_t (&words)[n]) {
#pragma unroll
  for (int bit = 1; bit < n; bit *= 2) {
    const bool upper = laneid() & bit;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (j & bit) continue;
      const uint32_t got = __shfl_xor_sync(~0u, upper ? words[j] : words[j | bit], bit);
      (upper ? words[j] : words[j | bit]) = got;
    }
  }
}

// Writes one tile of 64 queries of row `pair_row`, and their log-sum-exp if it is wanted.
template <typename T, int D, typename State>
__device__ void Store(const PairAttention& given, State& state, int64_t pair_row, int head,
                      int query) {
  constexpr int kWords = D < 32 ? D / 8 : 4;  // of a store, from as many lanes
  using pair = typename base_types::packing<T>::packed_type;
  const int lane = laneid(), quarter = lane % 4;
  query += 16 * warpgroup::warpid() + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half, query += 8) {
    const float total = QuadSum(half ? state.total.y : state.total.x);
    const float peak = half ? state.peak.y : state.peak.x;
    const float inverse = total > 0 ? 1 / total : 0.f;
    T* to = static_cast<T*>(given.o) +
            ((pair_row * given.queries + query) * given.heads + head) * D + 8 * (quarter % kWords) +
            2 * (quarter / kWords * kWords);
#pragma unroll
    for (int first = 0; first < D / 8; first += kWords) {
      alignas(16) uint32_t words[kWords];
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        float2 x = state.o.tiles[0][(first + j) / 2].data[(first + j) % 2 * 2 + half];
        x.x *= inverse, x.y *= inverse;
        const pair rounded = base_types::convertor<pair, float2>::convert(x);
        words[j] = reinterpret_cast<const uint32_t&>(rounded);
      }
      Exchange(words);
      using Wide = std::conditional_t<kWords == 4, uint4, uint2>;
      if (query < given.queries) {
        *reinterpret_cast<Wide*>(to + 8 * first) = reinterpret_cast<const Wide&>(words);
      }
    }
    if (given.lse && quarter == 0 && query < given.queries) {
      given.lse[(pair_row * given.heads + head) * given.queries + query] =
          total > 0 ? (peak + log2f(total)) * kLn2 : -INFINITY;
    }
  }
}

}  // namespace genie::attend
