// What ThunderKittens' vocabulary lacks, built on the layouts alone. Include kittens.cuh first: it
// may be ours or upstream's.
#pragma once

namespace genie {

// Makes this thread's writes to shared memory visible to TMA and WGMMA; a barrier follows.
__device__ inline void FenceAsyncProxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Writes to where block `rank` of the cluster has what this block has at `to`, and counts the bytes
// on its semaphore, whose completion makes them visible there.
__device__ inline void StoreRemote(uint4* to, int rank, uint4 value, kittens::semaphore& arrived) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%2, %3, %4, %5}, "
      "[%1];" ::"r"(kittens::detail::remote_address(to, rank)),
      "r"(kittens::detail::remote_address(&arrived, rank)), "r"(value.x), "r"(value.y),
      "r"(value.z), "r"(value.w)
      : "memory");
}

// Arrives if `leads`, by a predicate rather than a branch.
__device__ inline void ArriveIf(bool leads, kittens::semaphore& s) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\n"
      "@p mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];\n}" ::"r"(
          kittens::detail::shared_address(&s)),
      "r"(int{leads})
      : "memory");
}

// Keeps the compiler from reading an accumulator before the wait that precedes this call.
template <typename Tile>
__device__ inline void Pin(Tile& tile) {
#pragma unroll
  for (int i = 0; i < Tile::height; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::width; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        asm volatile("" : "+f"(tile.tiles[i][j].data[k].x), "+f"(tile.tiles[i][j].data[k].y));
      }
    }
  }
}

// sigmoid(2 x) = (tanh(x) + 1) / 2 in one special-function operation.
struct Tanh {
  template <typename T>
  static __device__ T op(T x) {
    T y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y.x) : "f"(x.x));
    asm("tanh.approx.f32 %0, %1;" : "=f"(y.y) : "f"(x.y));
    return y;
  }
};

// A 16-row row-layout tile as the column-layout tile of its transpose: the same registers.
template <typename T, int cols>
__device__ inline auto& Transposed(kittens::rt<T, 16, cols, kittens::row_l>& tile) {
  return reinterpret_cast<kittens::rt<T, cols, 16, kittens::col_l>&>(tile);
}

// Zeros the rows of a 16-row, 16-bit tile whose `keep` is zero, whatever they hold; keep[0] is for
// row lane / 4, keep[1] for row lane / 4 + 8.
template <typename Tile>
__device__ inline void KeepRows(Tile& tile, const unsigned (&keep)[2]) {
  static_assert(Tile::height == 1 && sizeof(typename Tile::dtype) == 4);
#pragma unroll
  for (int j = 0; j < Tile::width; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      auto& pair = reinterpret_cast<unsigned&>(tile.tiles[0][j].data[k]);
      pair = keep[k % 2] ? pair : 0u;
    }
  }
}

// Sums each x[i] over the lanes whose numbers differ in these bits.
template <int... bits, int n>
__device__ inline void SumOver(float (&x)[n]) {
  const auto over = [&](int bit) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] += __shfl_xor_sync(~0u, x[i], bit);
  };
  (over(bits), ...);
}

// Adds the tile to the sums of its rows by a product with ones: sums[0] and [1] are row lane / 4,
// sums[2] and [3] row lane / 4 + 8, each twice.
template <typename T>
__device__ inline void AddRowSums(float (&sums)[4], const kittens::rt<T, 16, 16>& tile) {
  constexpr uint32_t ones = std::is_same_v<T, kittens::bf16> ? 0x3f803f80 : 0x3c003c00;
  const auto& a = reinterpret_cast<const uint32_t (&)[4]>(tile.tiles[0][0].data);
  float2 upper = {sums[0], sums[1]}, lower = {sums[2], sums[3]};
  kittens::detail::mma_step<T>(upper, lower, a, ones, ones, upper, lower);
  sums[0] = upper.x, sums[1] = upper.y, sums[2] = lower.x, sums[3] = lower.y;
}

// Eight ones for each of 16 rows of a second operand, in any layout without swizzle.
template <typename T>
struct alignas(16) Ones {
  T values[128];
};

// Adds a warpgroup's 64 rows to the sums of its rows, as above, by WGMMAs of one group.
template <typename T, int cols>
__device__ inline void StartRowSums(float (&sums)[4], const kittens::rt<T, 16, cols>& tile,
                                    const Ones<T>& ones) {
  const uint64_t b =
      8ull << 16 | 8ull << 32 | (kittens::detail::shared_address(&ones) & 0x3FFFF) >> 4;
#pragma unroll
  for (float& sum : sums) asm volatile("" : "+f"(sum));
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int j = 0; j < cols / 16; ++j) {
    const auto& a = reinterpret_cast<const uint32_t (&)[4]>(tile.tiles[0][j].data);
    if constexpr (std::is_same_v<T, kittens::bf16>) {
      asm volatile(
          "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, "
          "{%4, %5, %6, %7}, %8, 1, 1, 1, 0;"
          : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    } else {
      asm volatile(
          "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, "
          "{%4, %5, %6, %7}, %8, 1, 1, 1, 0;"
          : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
  }
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// x = LayerNorm(z) over the C channels of each of a warp's 16 rows: two-pass variance in float32,
// one rounding. z is overwritten.
template <typename T, int C>
__device__ inline void LayerNorm(kittens::rt<T, 16, C>& x, kittens::rt_fl<16, C>& z,
                                 const kittens::sv_fl<C>& scale, const kittens::sv_fl<C>& bias,
                                 float epsilon) {
  using namespace kittens;
  col_vec<rt_fl<16, C>> mean, variance;
  warp::row_sum(mean, z);
  warp::mul(mean, mean, 1.f / C);
  warp::sub_row(z, z, mean);
  rt_fl<16, C> square;
  warp::mul(square, z, z);
  warp::row_sum(variance, square);
  const auto inverse_deviation =
      warp::apply(variance, [&](int, float sum) { return rsqrtf(sum * (1.f / C) + epsilon); });
  warp::mul_row(z, z, inverse_deviation);
  row_vec<rt_fl<16, C>> per_channel;
  warp::load(per_channel, scale);
  warp::mul_col(z, z, per_channel);
  warp::load(per_channel, bias);
  warp::add_col(z, z, per_channel);
  warp::copy(x, z);
}

}  // namespace genie
