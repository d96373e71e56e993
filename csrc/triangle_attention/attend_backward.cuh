// What the passes of the attention backward share: tiles, their tensors, roles and the weights P.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "kittens.cuh"
#include "kittens/extensions.cuh"
#include "triangle_attention/attend_backward_sm90.h"

namespace genie::attend_backward {

using namespace kittens;

constexpr int kTile = 64;      // queries or keys of a tile: the rows of one WGMMA
constexpr int kConsumers = 2;  // warpgroups that compute, each on tiles of its own
constexpr int kBlock = kConsumers * kTile;
constexpr int kThreads = (kConsumers + 1) * WARPGROUP_THREADS;
constexpr int kConsumerRegisters = 224, kProducerRegisters = 56;
static_assert(kConsumers * kConsumerRegisters + kProducerRegisters <= 3 * 168);
constexpr int kArrivals = kConsumers * WARPGROUP_WARPS;  // of consumers that finished with a stage
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Rows i that a consumer serves at once, with sums of 64 x 2 D numbers for each.
template <int D>
constexpr int kRows = D == 64 ? 1 : 2;

// Queries or keys of one row i and head, from [B I, J, H, D].
template <typename T, int D>
using Side = st<T, kTile, D>;
template <typename T, int D>
using Sides = gl<T, -1, -1, -1, D, tma::descriptor<Side<T, D>, dim::DEPTH>>;

// Of 64 queries and 64 keys, from [B, H, Q, Kp].
template <typename T>
using Bias = st<T, kTile, kTile>;
template <typename T>
using Biases = gl<T, -1, -1, -1, -1, Bias<T>>;

template <typename T, int D>
struct Globals {
  Sides<T, D> q, k, v, o, d_o, dq, dk, dv;
  Biases<T> bias;
  AttendBackward given;
};

// In fp16, dS of small gradients would lose bits or vanish where it is an operand, and that of
// large ones is near the end of the range: there it is multiplied by a power of two, which the sums
// undo.
template <typename T>
constexpr bool kScaled = std::is_same_v<T, half>;

// The power of two that brings |d_o| of a query, given its square, to 4..8. As P (dP - delta) is at
// most |d_o| |v| / 2, nothing overflows below |v| = 16000.
__device__ inline float ScaleOf(float square) {
  const int exponent = (__float_as_int(square) >> 23) - 127;
  return __int_as_float((127 + 2 - (exponent >> 1)) << 23);
}

// What a block of the queries and the keys pass works on: a tile of 128, a head, kRows rows.
struct Item {
  int tile, head, row, batch;
  int64_t any_row;  // row of [B I]
};

template <int D>
__host__ __device__ inline int RowGroups(const AttendBackward& given) {
  return (given.rows + kRows<D> - 1) / kRows<D>;
}

template <int D>
__device__ inline Item ItemAt(int index, int tiles, const AttendBackward& given) {
  Item item;
  const int groups = RowGroups<D>(given);
  item.tile = index % tiles, index /= tiles;
  item.head = index % given.heads, index /= given.heads;
  item.row = index % groups * kRows<D>;
  item.batch = index / groups;
  item.any_row = item.batch * given.rows + item.row;
  return item;
}

// Stage and parity of the n-th turn of a ring.
template <int stages>
struct Turn {
  int stage = 0, parity = 0;
  __device__ void Next() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

__device__ inline float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 0 and -inf in both halves of a pair, for keys that take part and keys that do not.
template <typename T>
__device__ inline uint32_t HiddenPair(bool first_valid, bool second_valid) {
  constexpr uint32_t infinity = std::is_same_v<T, bf16> ? 0xFF80 : 0xFC00;
  return (first_valid ? 0 : infinity) | (second_valid ? 0 : infinity << 16);
}

__device__ inline bool IsValid(const AttendBackward& given, int64_t any_row, int key) {
  if (key >= given.keys) return false;
  return !given.mask || __ldg(given.mask + any_row * given.keys + key);
}

// The mask of two keys as it is read: nothing waits for it before it is asked for its meaning.
struct KeyPair {
  uint8_t first, second;

  __device__ void Read(const AttendBackward& given, int64_t any_row, int key) {
    if (!given.mask) return;
    const uint8_t* row = given.mask + any_row * given.keys;
    const int last = given.keys - 1;
    first = __ldg(row + min(key, last)), second = __ldg(row + min(key + 1, last));
  }
  // 0 for a key that takes part and -inf for one that does not, in both halves of a pair.
  template <typename T>
  __device__ uint32_t Hidden(const AttendBackward& given, int key) const {
    return HiddenPair<T>(key < given.keys && (!given.mask || first),
                         key + 1 < given.keys && (!given.mask || second));
  }
};

// S becomes P: rows are queries, columns keys. `negative_lse` is that of the thread's two rows,
// `hidden` holds 0 or -inf for each of the 64 keys.
template <typename T>
__device__ inline void Weigh(rt_fl<16, kTile>& s, Bias<T>& bias, const T* hidden,
                             const float (&negative_lse)[2], float scale, float bias_scale) {
  using T2 = typename base_types::packing<T>::packed_type;
#pragma unroll
  for (int j = 0; j < kTile / 16; ++j) {
    rt<T, 16, 16> b;
    auto block = bias.template subtile<16, 16>({warpgroup::warpid(), j});
    warp::load(b, block);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int key = 16 * j + 8 * (k / 2) + 2 * (laneid() % 4);
      const T2 shown = __hadd2(b.tiles[0][0].data[k], *reinterpret_cast<const T2*>(&hidden[key]));
      const float2 y = base_types::convertor<float2, T2>::convert(shown);
      float2& x = s.tiles[0][j].data[k];
      x.x = Exp2(fmaf(x.x, scale, fmaf(y.x, bias_scale, negative_lse[k % 2])));
      x.y = Exp2(fmaf(x.y, scale, fmaf(y.y, bias_scale, negative_lse[k % 2])));
    }
  }
}

// p = P and dp = d_o v^T of 64 queries and 64 keys of a row i.
template <typename T, int D>
__device__ inline void WeighPairs(rt_fl<16, kTile>& p, rt_fl<16, kTile>& dp, const Side<T, D>& q,
                                  const Side<T, D>& d_o, const Side<T, D>& k, const Side<T, D>& v,
                                  Bias<T>& bias, const T* hidden, const float (&negative_lse)[2],
                                  const AttendBackward& given) {
  warpgroup::mm_ABt(p, q, k);
  warpgroup::mm_ABt(dp, d_o, v);
  warpgroup::mma_async_wait<1>();
  Pin(p);
  Weigh(p, bias, hidden, negative_lse, given.scale, given.bias_scale);
  warpgroup::mma_async_wait<0>();
  Pin(dp);
}

// Bias tiles that no copy will fill read as zero.
template <typename Shared>
__device__ inline void ZeroBias(Shared& shared) {
  auto* words = reinterpret_cast<uint32_t*>(&shared.bias);
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(shared.bias) / 4); i += kThreads) {
    words[i] = 0;
  }
}

template <typename T, int D>
cudaError_t LaunchQueries(const Globals<T, D>& globals, int processors, cudaStream_t stream);
template <typename T, int D>
cudaError_t LaunchKeys(const Globals<T, D>& globals, int processors, cudaStream_t stream);
template <typename T, int D>
cudaError_t LaunchPairs(const Globals<T, D>& globals, int processors, cudaStream_t stream);

// Instantiates one of these for every element type and head dim that is served.
#define GENIE_ATTEND_BACKWARD(Pass, T)                                        \
  template cudaError_t Pass<T, 16>(const Globals<T, 16>&, int, cudaStream_t); \
  template cudaError_t Pass<T, 32>(const Globals<T, 32>&, int, cudaStream_t); \
  template cudaError_t Pass<T, 64>(const Globals<T, 64>&, int, cudaStream_t);

template <typename Shared, typename Kernel, typename G, typename... More>
cudaError_t LaunchBlocks(Kernel kernel, int64_t blocks, cudaStream_t stream, const G& globals,
                         More... more) {
  constexpr int bytes = sizeof(Shared) + 1024;
  static_assert(bytes <= MAX_SHARED_MEMORY);
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  kernel<<<static_cast<unsigned>(blocks), kThreads, bytes, stream>>>(globals, more...);
  return cudaGetLastError();
}

}  // namespace genie::attend_backward
