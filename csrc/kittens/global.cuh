// Global tensors and the TMA descriptors through which shared tiles travel.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>

#include "shared.cuh"

namespace kittens {

// Coordinates in units of the tile: the dimension its rows run along and the columns are multiplied
// by its size. Shorter lists fill from the right.
template <typename Tile>
struct coord {
  int b, d, r, c;
  __device__ coord(int b, int d, int r, int c) : b(b), d(d), r(r), c(c) {}
  __device__ coord(int d, int r, int c) : coord(0, d, r, c) {}
  __device__ coord(int r, int c) : coord(0, 0, r, c) {}
};

namespace tma {
// Asks a gl for a descriptor of `Tile` whose rows run along dimension `axis`.
template <typename Tile, int axis_ = dim::ROW>
struct descriptor {
  using tile = Tile;
  static constexpr int axis = axis_;
};
}  // namespace tma

namespace detail {

template <typename Entry>
struct as_descriptor {
  using type = tma::descriptor<Entry>;
};
template <typename Tile, int axis>
struct as_descriptor<tma::descriptor<Tile, axis>> {
  using type = tma::descriptor<Tile, axis>;
};

// The driver's encoder, taken through the runtime so that nothing links against libcuda.
inline auto tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                              12000, cudaEnableDefault, &found);
  if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled");
  }
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

// A row-major tensor [b, d, r, c] with a box that lands in shared memory as the tile is stored. A
// tile one swizzle group wide takes the columns as they are: what lies past the end of any
// dimension loads as zero and is not stored. A wider tile sees [.., column group, tile row, column
// in group], so its tensor has whole groups of columns. Every row starts at a multiple of 16 bytes.
template <typename Tile, int axis>
CUtensorMap encode(const void* pointer, uint64_t b, uint64_t d, uint64_t r, uint64_t c) {
  using T = typename Tile::T;
  static_assert(Tile::rows <= 256 && (axis == dim::DEPTH || axis == dim::ROW));
  constexpr auto type = std::is_same_v<T, bf16>   ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                        : std::is_same_v<T, half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                  : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  constexpr auto swizzle = Tile::swizzle_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                           : Tile::swizzle_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                       : CU_TENSOR_MAP_SWIZZLE_32B;
  constexpr uint64_t group = Tile::group_cols, element = sizeof(T);
  constexpr bool wide = Tile::cols > group;
  const uint64_t sizes[3] = {b, d, r};
  const uint64_t strides[3] = {d * r * c * element, r * c * element, c * element};
  constexpr int inner = axis == dim::ROW ? dim::DEPTH : dim::ROW;
  if (wide && c % group != 0) throw std::runtime_error("a wide tile needs whole column groups");
  const cuuint64_t global_dim[5] = {wide ? group : c, sizes[axis], wide ? c / group : 1,
                                    sizes[inner], sizes[dim::BATCH]};
  const cuuint64_t global_stride[4] = {strides[axis], Tile::swizzle_bytes, strides[inner],
                                       strides[dim::BATCH]};
  const cuuint32_t box[5] = {group, Tile::rows, Tile::cols / group, 1, 1};
  const cuuint32_t element_stride[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult status =
      tensor_map_encoder()(&map, type, 5, const_cast<void*>(pointer), global_dim, global_stride,
                           box, element_stride, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw std::runtime_error("no TMA descriptor serves this tensor");
  return map;
}

template <typename Descriptor>
struct tensor_map {
  CUtensorMap map;
};

}  // namespace detail

// A row-major tensor [b, d, r, c]; a template size of -1 is given at run time, any other is fixed
// and its constructor argument is nullptr. Kernels take it as `const __grid_constant__`.
template <typename T_, int b_, int d_, int r_, int c_, typename... TMA_Types>
struct gl : detail::tensor_map<typename detail::as_descriptor<TMA_Types>::type>... {
  using T = T_;
  using dtype = T_;
  T* raw_ptr;
  size_t sizes[4];

  template <typename B, typename D, typename R, typename C>
  gl(T* pointer, B b, D d, R r, C c)
      : detail::tensor_map<typename detail::as_descriptor<TMA_Types>::type>{
            encode<typename detail::as_descriptor<TMA_Types>::type>(
                pointer, size<b_>(b), size<d_>(d), size<r_>(r), size<c_>(c))}...,
        raw_ptr(pointer),
        sizes{size<b_>(b), size<d_>(d), size<r_>(r), size<c_>(c)} {}

  __host__ __device__ size_t batch() const { return sizes[0]; }
  __host__ __device__ size_t depth() const { return sizes[1]; }
  __host__ __device__ size_t rows() const { return sizes[2]; }
  __host__ __device__ size_t cols() const { return sizes[3]; }

  template <typename Tile, int axis>
  __device__ const CUtensorMap* get_tma() const {
    using wanted = detail::tensor_map<tma::descriptor<Tile, axis>>;
    static_assert(std::is_base_of_v<wanted, gl>, "list this tile and axis among the TMA types");
    return &static_cast<const wanted&>(*this).map;
  }

 private:
  template <int fixed>
  static size_t size(size_t given) {
    static_assert(fixed == -1, "a fixed size is passed as nullptr");
    return given;
  }
  template <int fixed>
  static size_t size(std::nullptr_t) {
    static_assert(fixed > 0, "a run-time size is passed as a number");
    return fixed;
  }
  template <typename Descriptor>
  static CUtensorMap encode(const T* pointer, size_t b, size_t d, size_t r, size_t c) {
    return detail::encode<typename Descriptor::tile, Descriptor::axis>(pointer, b, d, r, c);
  }
};

}  // namespace kittens
