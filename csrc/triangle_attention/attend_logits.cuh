// What the logits of the attention core start from: the bias and the mask, as products of a warp.
#pragma once

#include "kittens.cuh"

namespace genie::attend {

using namespace kittens;

constexpr int kKeys = 64;     // of a tile
constexpr int kQueries = 64;  // of a tile: the rows of one WGMMA

// What masks a tile of keys: a product with it adds nothing to the logits of valid keys and a huge
// negative number to the others, at no cost in issue slots. Lane l of a warp reads words[l / 4],
// the B operands of an 8-deep product for the keys l / 4 of each 8: low halves for the even ones of
// these groups of 8 keys, high halves for the odd ones. A operands hold kHuge where B has the half.
template <typename T>
struct alignas(16) MaskTile {
  static constexpr uint32_t kHuge = std::is_same_v<T, bf16> ? 0x5D80 : 0x7BFF;  // 2^60, 65504
  static constexpr uint32_t kMasked = kHuge | 0x8000;
  uint16_t halves[8][kKeys / 8];
  // The same for a sum: lane l reads row l % 4, for its columns. Padded against bank conflicts.
  float added[4][kKeys / 4 + 4];

  __device__ void Set(int key, bool valid) {
    halves[key % 8][key / 8] = valid ? 0 : kMasked;
    added[key % 8 / 2][key / 8 * 2 + key % 2] = valid ? 0.f : -0x1p120f;
  }

  // logits += those products.
  template <typename Logits>
  __device__ void Apply(Logits& s) const {
    const uint4 raw = *reinterpret_cast<const uint4*>(halves[laneid() / 4]);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int j = 0; j < Logits::width; ++j) {
      auto& to = s.tiles[0][j].data;
      Step(to[0], to[1], kHuge, words[j]);
      Step(to[2], to[3], kHuge << 16, words[j]);
    }
  }

 private:
  static __device__ void Step(float2& d0, float2& d1, uint32_t a, uint32_t b) {
    if constexpr (std::is_same_v<T, bf16>) {
      asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %4}, {%5}, "
          "{%0, %1, %2, %3};"
          : "+f"(d0.x), "+f"(d0.y), "+f"(d1.x), "+f"(d1.y)
          : "r"(a), "r"(b));
    } else {
      asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %4}, {%5}, "
          "{%0, %1, %2, %3};"
          : "+f"(d0.x), "+f"(d0.y), "+f"(d1.x), "+f"(d1.y)
          : "r"(a), "r"(b));
    }
  }
};

// The bias of a warp's 16 queries becomes the first logits by a product with a diagonal matrix,
// which neither unpacks nor scales in registers. Where q and bias are not in units of the logit,
// both are multiplied by the root: on the diagonal if T holds it, else afterwards.
template <typename T>
struct BiasProduct {
  uint32_t scale[4];  // the A operand
  float left;         // what the product is to be multiplied by
  bool exact;         // that is 1
  uint32_t offset;    // of the lane's row of the matrices that it loads

  // `zero` hides its value from the compiler, which copies registers that it knows to be equal into
  // place for every product.
  __device__ BiasProduct(float root, int zero) {
    const T rounded = base_types::convertor<T, float>::convert(root);
    exact = base_types::convertor<float, T>::convert(rounded) == root;
    left = exact ? 1.f : root;
    const int lane = laneid(), row = 16 * warpgroup::warpid() + lane % 16;
    scale[0] = Diagonal(base_types::convertor<T, float>::convert(exact ? root : 1.f));
    scale[1] = threadIdx.x & zero;
    scale[2] = threadIdx.x & zero >> 1, scale[3] = scale[0] | (lane & zero);
    offset = row * 2 * kKeys + ((lane / 16 ^ lane % 8) << 4);
    asm volatile("" : "+r"(offset));
  }

  // s = bias or root * bias.
  template <typename Logits, typename Bias>
  __device__ void Start(Logits& s, const Bias& bias) const {
    warp::zero(s);
    Add(s, bias);
  }
  // Then root * bias in either case.
  template <typename Logits>
  __device__ void Finish(Logits& s) const {
#pragma unroll
    for (int j = 0; j < Logits::width; ++j) {
#pragma unroll
      for (float2& x : s.tiles[0][j].data) x = {x.x * left, x.y * left};
    }
  }
  // And adds the mask.
  template <typename Logits>
  __device__ void Finish(Logits& s, const MaskTile<T>& mask) const {
    const float4* added = reinterpret_cast<const float4*>(mask.added[laneid() % 4]);
#pragma unroll
    for (int j = 0; j < Logits::width; ++j) {
      const float4 m = added[j];
      auto& to = s.tiles[0][j].data;
      to[0] = {fmaf(to[0].x, left, m.x), fmaf(to[0].y, left, m.y)};
      to[1] = {fmaf(to[1].x, left, m.x), fmaf(to[1].y, left, m.y)};
      to[2] = {fmaf(to[2].x, left, m.z), fmaf(to[2].y, left, m.w)};
      to[3] = {fmaf(to[3].x, left, m.z), fmaf(to[3].y, left, m.w)};
    }
  }

 private:
  template <typename Logits, typename Bias>
  __device__ void Add(Logits& s, const Bias& bias) const {
    static_assert(Bias::swizzle_bytes == 128 && Bias::cols == kKeys);
    const uint32_t start = kittens::detail::shared_address(bias.data) + offset;
#pragma unroll
    for (int j = 0; j < Logits::width; ++j) {
      uint32_t b[4];
      kittens::detail::load_matrices<true>(b, start ^ (j << 5));
      auto& to = s.tiles[0][j].data;
      kittens::detail::mma_step<T>(to[0], to[1], scale, b[0], b[1], to[0], to[1]);
      kittens::detail::mma_step<T>(to[2], to[3], scale, b[2], b[3], to[2], to[3]);
    }
  }
  static __device__ uint32_t Diagonal(T x) {
    const uint32_t bits = reinterpret_cast<const uint16_t&>(x);
    const int column = laneid() / 4 - laneid() % 4 * 2;
    return column == 0 ? bits : column == 1 ? bits << 16 : 0;
  }
};

}  // namespace genie::attend
