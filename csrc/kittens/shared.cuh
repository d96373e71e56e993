// Shared tiles and vectors, and the allocator that lays them out.
//
// A tile of S swizzle bytes is stored as groups of S / sizeof(T) columns, each group row after row
// of S bytes. Within every 8 rows of S bytes the 16-byte chunks are permuted: address bits 4.. are
// XORed with bits 7.., exactly as TMA and WGMMA do for the same S, so a tile starts at 8 S bytes.
#pragma once

#include "register.cuh"

namespace kittens {
namespace detail {

constexpr int default_swizzle(int cols, int element_bytes) {
  const int row_bytes = cols * element_bytes;
  return row_bytes % 128 == 0 ? 128 : row_bytes % 64 == 0 ? 64 : 32;
}

}  // namespace detail

template <typename Tile, int rows_, int cols_>
struct st_subtile;

template <typename T_, int rows_, int cols_, bool swizzle_ = true, int swizzle_bytes_ = 0>
struct alignas(128) st {
  static_assert(swizzle_, "only swizzled tiles are used");
  static_assert(rows_ % TILE_DIM == 0 && cols_ % TILE_DIM == 0, "tiles are made of 16 x 16 tiles");
  using T = T_;
  using dtype = T_;
  using whole = st;
  static constexpr int rows = rows_, cols = cols_, num_elements = rows_ * cols_;
  static constexpr int swizzle_bytes =
      swizzle_bytes_ ? swizzle_bytes_ : detail::default_swizzle(cols_, sizeof(T));
  static constexpr int group_cols = swizzle_bytes / sizeof(T);
  static_assert(cols % group_cols == 0, "columns fill whole swizzle groups");

  dtype data[rows * cols];

  static __device__ uint32_t idx(uint32_t address, int2 at) {
    const int group = at.y / group_cols, column = at.y % group_cols;
    address += (group * rows + at.x) * swizzle_bytes + column * sizeof(T);
    return address ^ (((address % (8 * swizzle_bytes)) >> 7) << 4);
  }
  static __device__ T* idx(T* base, int2 at) {
    const auto start = static_cast<uint32_t>(__cvta_generic_to_shared(base));
    return base + static_cast<int32_t>(idx(start, at) - start) / static_cast<int>(sizeof(T));
  }
  __device__ T& operator[](int2 at) { return *idx(data, at); }
  __device__ const T& operator[](int2 at) const { return *idx(const_cast<T*>(data), at); }

  // A view of R x C elements for warp loads and stores; WGMMA and TMA take whole tiles only.
  template <int R, int C>
  __device__ st_subtile<st, R, C> subtile(int2 at) {
    return {data, {at.x * R, at.y * C}};
  }
};

template <typename Tile, int rows_, int cols_>
struct st_subtile {
  using T = typename Tile::T;
  using dtype = T;
  using whole = Tile;
  static constexpr int rows = rows_, cols = cols_;
  T* data;
  int2 offset;
  __device__ uint32_t idx(uint32_t address, int2 at) const {
    return Tile::idx(address, {at.x + offset.x, at.y + offset.y});
  }
};

template <typename T_, size_t length_>
struct alignas(128) sv {
  using T = T_;
  using dtype = T_;
  static constexpr int length = length_;
  dtype data[length_];
  __device__ T& operator[](int i) { return data[i]; }
  __device__ const T& operator[](int i) const { return data[i]; }
};
template <size_t length>
using sv_fl = sv<float, length>;

// Bytes a TMA transfer of these tiles moves.
template <typename... Tiles>
constexpr uint32_t size_bytes = (uint32_t{0} + ... + uint32_t{sizeof(Tiles)});

struct alignment_dummy {
  int dummy;
};

// Hands out dynamic shared memory in order; every object starts at a multiple of `alignment`. It
// steps by pointer arithmetic alone, so that the compiler still sees shared memory.
template <int alignment_ = 1024>
struct shared_allocator {
  char* next;
  __device__ explicit shared_allocator(int* base) : next(reinterpret_cast<char*>(base)) {}
  template <typename A>
  __device__ A& allocate() {
    next += -static_cast<uint32_t>(__cvta_generic_to_shared(next)) % alignment_;
    A* object = reinterpret_cast<A*>(next);
    next += sizeof(A);
    return *object;
  }
};

}  // namespace kittens
