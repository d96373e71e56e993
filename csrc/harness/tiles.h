// Arrays that the host compares, and the definition of the register layouts.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "harness/check.h"
#include "kittens.cuh"
#include "kittens/extensions.cuh"

using namespace kittens;

inline int failures = 0;

inline void Report(const std::string& piece, int64_t wrong) {
  std::printf("%-64s %s", piece.c_str(), wrong ? "FAIL" : "pass");
  std::printf(wrong ? " (%ld wrong)\n" : "\n", wrong);
  failures += wrong != 0;
}

// A device array that the host reads and writes by copies.
template <typename T>
struct Array {
  T* data;
  size_t size;
  explicit Array(size_t size) : size(size) {
    Check(cudaMalloc(reinterpret_cast<void**>(&data), size * sizeof(T)), "cudaMalloc");
    Check(cudaMemset(data, 0xFF, size * sizeof(T)), "poison");
  }
  ~Array() { cudaFree(data); }
  void Set(const std::function<T(int)>& f) {
    std::vector<T> host(size);
    for (size_t i = 0; i < size; ++i) host[i] = f(i);
    Check(cudaMemcpy(data, host.data(), size * sizeof(T), cudaMemcpyHostToDevice), "set");
  }
  std::vector<T> Get() const {
    Check(cudaDeviceSynchronize(), "kernel");
    std::vector<T> host(size);
    Check(cudaMemcpy(host.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost), "get");
    return host;
  }
  int64_t Wrong(const std::function<float(int)>& want, float tolerance = 0) const {
    int64_t wrong = 0;
    const auto got = Get();
    for (size_t i = 0; i < size; ++i) {
      wrong += !(std::abs(Widen(got[i]) - want(i)) <= tolerance);  // NaN is wrong too
    }
    return wrong;
  }
};

template <typename T>
constexpr const char* Name() {
  return std::is_same_v<T, half> ? "f16" : "bf16";
}

// Row and column of element e of data[k] of base tile (i, j): the definition, restated.
template <typename Tile>
__device__ int2 Place(int i, int j, int k, int e) {
  const int lane = threadIdx.x % 32, pair = 2 * (lane % 4) + e, line = lane / 4;
  return Tile::row_layout ? int2{16 * i + 8 * (k % 2) + line, 16 * j + 8 * (k / 2) + pair}
                          : int2{16 * i + 8 * (k / 2) + pair, 16 * j + 8 * (k % 2) + line};
}

// f(row, column, element) for all elements of a tile.
template <typename Tile, typename F>
__device__ void ForEach(Tile& tile, F f) {
  for (int i = 0; i < Tile::height; ++i) {
    for (int j = 0; j < Tile::width; ++j) {
      for (int k = 0; k < 4; ++k) {
        for (int e = 0; e < 2; ++e) {
          const int2 at = Place<Tile>(i, j, k, e);
          f(at.x, at.y, reinterpret_cast<typename Tile::T*>(&tile.tiles[i][j].data[k])[e]);
        }
      }
    }
  }
}
