// Scalars, packed pairs and the elementwise operators that tile code applies to them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#ifndef KITTENS_HOPPER
#error "Define KITTENS_HOPPER and compile for sm_90a."
#endif

namespace kittens {

using bf16 = __nv_bfloat16;
using bf16_2 = __nv_bfloat162;
using half = __half;
using half_2 = __half2;

constexpr int WARP_THREADS = 32;
constexpr int WARPGROUP_WARPS = 4;
constexpr int WARPGROUP_THREADS = WARPGROUP_WARPS * WARP_THREADS;
constexpr int TILE_DIM = 16;                   // rows and columns of a base register tile
constexpr int MAX_SHARED_MEMORY = 227 * 1024;  // of one block

struct dim {
  static constexpr int BATCH = 0, DEPTH = 1, ROW = 2;
};
enum cache_policy { NORMAL, EVICT_FIRST };

namespace base_types {

// The packed pair of an element type.
template <typename T>
struct packing;
template <>
struct packing<float> {
  using packed_type = float2;
};
template <>
struct packing<bf16> {
  using packed_type = bf16_2;
};
template <>
struct packing<half> {
  using packed_type = half_2;
};

// Conversion of one element or one pair, rounding to nearest even.
template <typename To, typename From>
struct convertor;
template <typename T>
struct convertor<T, T> {
  static __host__ __device__ T convert(T x) { return x; }
};
template <>
struct convertor<float, bf16> {
  static __host__ __device__ float convert(bf16 x) { return __bfloat162float(x); }
};
template <>
struct convertor<bf16, float> {
  static __host__ __device__ bf16 convert(float x) { return __float2bfloat16_rn(x); }
};
template <>
struct convertor<float, half> {
  static __host__ __device__ float convert(half x) { return __half2float(x); }
};
template <>
struct convertor<half, float> {
  static __host__ __device__ half convert(float x) { return __float2half_rn(x); }
};
template <>
struct convertor<float2, bf16_2> {
  static __device__ float2 convert(bf16_2 x) {  // two instructions: bf16 is a float's upper half
    const uint32_t bits = reinterpret_cast<const uint32_t&>(x);
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000)};
  }
};
template <>
struct convertor<bf16_2, float2> {
  static __host__ __device__ bf16_2 convert(float2 x) { return __float22bfloat162_rn(x); }
};
template <>
struct convertor<float2, half_2> {
  static __host__ __device__ float2 convert(half_2 x) { return __half22float2(x); }
};
template <>
struct convertor<half_2, float2> {
  static __host__ __device__ half_2 convert(float2 x) { return __float22half2_rn(x); }
};

}  // namespace base_types

// Operators on packed float pairs; registers compute in float32 only.
namespace base_ops {

struct sum {
  template <typename T>
  static __device__ T op(T a, T b) {
    return {a.x + b.x, a.y + b.y};
  }
};
struct sub {
  template <typename T>
  static __device__ T op(T a, T b) {
    return {a.x - b.x, a.y - b.y};
  }
};
struct mul {
  template <typename T>
  static __device__ T op(T a, T b) {
    return {a.x * b.x, a.y * b.y};
  }
};

}  // namespace base_ops
}  // namespace kittens
