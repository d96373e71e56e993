// Attention of triangle attention: 4 D FLOP and one exponential a logit (i, h, q, k). At D = 32 the
// special-function unit is the wall (16 exponentials a clock and SM), then issue slots, the tensor
// cores and L2 (docs/kernels/triangle_attention.md counts them).
//
// Persistent blocks. A block owns 3 rows i, one head and up to 256 queries, and walks the keys in
// tiles of 64: K and V of a row serve all its queries, a bias tile serves all rows. Each consumer
// warpgroup has one row and takes tiles of 64 queries in turn, their sums in registers; while one
// exponentiates, the products of the others run. Producer warp w loads row w ahead through a ring,
// leaving out tiles without a valid key.
#include <algorithm>
#include <stdexcept>

#include "kittens.cuh"
#include "kittens/extensions.cuh"
#include "triangle_attention/attend_sm90.h"

namespace genie {
namespace {

using namespace kittens;

constexpr int kKeys = 64;     // of a tile
constexpr int kQueries = 64;  // of a tile: the rows of one WGMMA
constexpr int kRows = 3;      // rows i of a block, each with its consumer warpgroup
constexpr int kThreads = (kRows + 1) * WARPGROUP_THREADS;
constexpr int kConsumerRegisters = 160, kProducerRegisters = 32;
static_assert(kRows * kConsumerRegisters + kProducerRegisters <= 512);
static_assert(kRows < WARPGROUP_WARPS, "a producer warp a row, and one for the queries");

constexpr int kChunk = 256;  // keys whose mask is read at once
constexpr int kWords = kChunk / WARP_THREADS, kTileWords = kKeys / WARP_THREADS;

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kMasked = -0x1p120f;  // added to a masked logit
// Peaks follow the logits only when a lane's sum passes this, so that most tiles rescale nothing;
// what is summed stays far from the limits of fp16.
constexpr float kOutgrown = 256.f;

// What a row makes of a stage.
enum Kind { kNone = 0, kSome = 1, kAll = 2, kLast = 4 };

template <typename T, int D>
struct Shape {
  static constexpr int kTiles = D == 64 ? 2 : 4;  // of queries
  static constexpr int kStages = D == 64 ? 2 : 3;
  using Queries = st<T, kQueries, D>;
  using Keys = st<T, kKeys, D>;
  using Bias = st<T, kQueries, kKeys>;
  using Logits = rt_fl<16, kKeys>;
  using Sums = rt_fl<16, D>;

  struct Shared {
    Bias bias[kStages][kTiles];
    Queries q[kRows][kTiles];
    Keys k[kStages][kRows], v[kStages][kRows];
    sv_fl<kKeys> mask[kStages][kRows];  // 0 or kMasked, where the row's kind is kSome
    int kind[kStages][kRows];
    alignas(8) unsigned valid[2][kRows][kWords];  // bits of the mask of a chunk, of which there are two
    semaphore arrived[kStages], finished[kStages], q_arrived[kRows], q_finished[kRows];
  };
  static_assert(sizeof(Shared) + 1024 <= MAX_SHARED_MEMORY);
};

// A block's share of the work.
struct Unit {
  int batch, row, head, query;  // the first row and query
  int tiles;                    // of queries, at most kTiles
};

template <typename T, int D>
struct Globals {
  using S = Shape<T, D>;
  using Pairs = gl<T, -1, -1, -1, D, tma::descriptor<typename S::Keys, dim::DEPTH>>;
  Pairs q, k, v;                                 // [B I, Q or K, H, D]
  gl<T, -1, -1, -1, -1, typename S::Bias> bias;  // [B, H, Q, Kp]
  PairAttention given;
  int units, row_groups, query_groups;

  __device__ Unit unit(int n) const {
    const int heads = given.heads, queries = given.queries;
    const int group = n % query_groups, rest = n / query_groups, any_group = rest / heads;
    const int query = group * S::kTiles * kQueries;
    return {any_group / row_groups, any_group % row_groups * kRows, rest % heads, query,
            min(S::kTiles, (queries - query + kQueries - 1) / kQueries)};
  }
};

// A place in a ring of stages, and the parity of its turn.
template <int kStages>
struct Ring {
  int stage = 0, parity = 0;
  __device__ void Advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

__device__ inline float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The largest of the four lanes that share a row.
__device__ inline float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ inline float QuadSum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// p = 2^(factor s - peak), rounded; returns what the lane's columns sum to in both of its rows.
template <typename P, typename Logits>
__device__ float2 Exponentiate(P& p, const Logits& s, float factor, float2 peak) {
  float2 sums[2] = {};
#pragma unroll
  for (int j = 0; j < Logits::width; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float offset = k % 2 ? -peak.y : -peak.x;
      const float2 x = s.tiles[0][j].data[k];
      const float2 y = {Exp2(fmaf(x.x, factor, offset)), Exp2(fmaf(x.y, factor, offset))};
      sums[k % 2] = base_ops::sum::op(sums[k % 2], y);
      p.tiles[0][j].data[k] = base_types::convertor<typename P::dtype, float2>::convert(y);
    }
  }
  return {sums[0].x + sums[0].y, sums[1].x + sums[1].y};
}

// The unnormalised output of a warp's 16 queries, each row relative to 2^peak.
template <typename Sums>
struct Softmax {
  Sums o;
  float2 peak, total;  // a lane's total is of its own columns

  __device__ void Clear() {
    warp::zero(o);
    peak = {-INFINITY, -INFINITY};
    total = {0.f, 0.f};
  }

  // Raises the peak of rows whose `sums` outgrew it to their largest logit.
  template <typename Logits>
  __device__ void Raise(const Logits& s, float factor, float2 sums) {
    float2 largest = {-INFINITY, -INFINITY};
#pragma unroll
    for (int j = 0; j < Logits::width; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float& to = k % 2 ? largest.y : largest.x;
        to = fmaxf(to, fmaxf(s.tiles[0][j].data[k].x, s.tiles[0][j].data[k].y));
      }
    }
    const auto raise = [factor](float& peak, float& total, float largest, float sum) {
      const float found = QuadMax(largest) * factor;
      const float raised = QuadMax(sum) > kOutgrown ? fmaxf(peak, found) : peak;
      const float shrink = Exp2(peak - raised);
      peak = raised;
      total *= shrink;
      return shrink;
    };
    col_vec<Sums> shrink;
    shrink[0][0] = {raise(peak.x, total.x, largest.x, sums.x),
                    raise(peak.y, total.y, largest.y, sums.y)};
    warp::mul_row(o, o, shrink);
  }

  // p = the weights of logits s, and their total.
  template <typename P, typename Logits>
  __device__ void Add(P& p, const Logits& s, float factor, bool first) {
    float2 sums = {INFINITY, INFINITY};
    bool outgrown = first;
    while (true) {
      if (outgrown) Raise(s, factor, sums);
      sums = Exponentiate(p, s, factor, peak);
      outgrown = __any_sync(~0u, fmaxf(sums.x, sums.y) > kOutgrown);
      if (!outgrown) break;
    }
    total.x += sums.x, total.y += sums.y;
  }
};

// Producer warp `row` of the block: scans the mask of its row, and loads its keys and values; that
// of row 0 loads the bias as well.
template <typename T, int D>
__device__ void LoadKeys(const Globals<T, D>& g, typename Shape<T, D>::Shared& shared, int row) {
  using S = Shape<T, D>;
  const int64_t keys = g.given.keys;
  const int tiles = (keys + kKeys - 1) / kKeys, lane = laneid();
  Ring<S::kStages> ring;
  int chunk_parity = 0;
  for (int n = blockIdx.x; n < g.units; n += gridDim.x) {
    const Unit unit = g.unit(n);
    const int64_t pair_row = unit.batch * g.given.rows + unit.row + row;
    const bool exists = unit.row + row < g.given.rows;
    const uint8_t* mask = g.given.mask ? g.given.mask + pair_row * keys : nullptr;

    const auto scan = [&](int chunk) {
      chunk_parity ^= 1;
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int64_t key = int64_t{chunk} * kChunk + i * WARP_THREADS + lane;
        const bool valid = exists && key < keys && (!mask || __ldg(mask + key));
        const unsigned word = __ballot_sync(~0u, valid);
        if (lane == 0) shared.valid[chunk_parity][row][i] = word;
      }
      asm volatile("bar.sync 1, %0;" ::"n"(kRows * WARP_THREADS) : "memory");
    };
    const auto words = [&](int tile, int row) {
      return reinterpret_cast<const uint2&>(
          shared.valid[chunk_parity][row][tile * kTileWords % kWords]);
    };
    const auto any = [&](int tile) {
      unsigned all = 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) all |= words(tile, r).x | words(tile, r).y;
      return all != 0;
    };

    scan(0);
    int tile = 0;
    while (true) {  // tile 0 always makes a stage, others where a row has a valid key
      const uint2 own = words(tile, row);
      const bool wanted = any(tile);
      int next = tile + 1;
      for (; next < tiles; ++next) {
        if (next % (kChunk / kKeys) == 0) scan(next / (kChunk / kKeys));
        if (any(next)) break;
      }
      const int kind = (own.x | own.y) == 0 ? kNone : (own.x & own.y) == ~0u ? kAll : kSome;
      wait(shared.finished[ring.stage], ring.parity ^ 1);
      if (kind == kSome) {
        auto& to = shared.mask[ring.stage][row];
        to[lane] = own.x >> lane & 1 ? 0.f : kMasked;
        to[lane + WARP_THREADS] = own.y >> lane & 1 ? 0.f : kMasked;
      }
      __syncwarp();
      if (lane == 0) {
        auto& arrived = shared.arrived[ring.stage];
        const bool with_bias = row == 0 && wanted && g.given.bias;
        shared.kind[ring.stage][row] = kind | (next < tiles ? 0 : kLast);
        tma::expect_bytes(arrived, (kind ? 2 * sizeof(typename S::Keys) : 0) +
                                       (with_bias ? unit.tiles * sizeof(typename S::Bias) : 0));
        if (kind) {
          auto& k = shared.k[ring.stage][row];
          auto& v = shared.v[ring.stage][row];
          const int i = static_cast<int>(pair_row);
          tma::load_async<dim::DEPTH, NORMAL>(k, g.k, {i, tile, unit.head, 0}, arrived);
          tma::load_async<dim::DEPTH, NORMAL>(v, g.v, {i, tile, unit.head, 0}, arrived);
        }
        for (int t = 0; with_bias && t < unit.tiles; ++t) {
          tma::load_async(shared.bias[ring.stage][t], g.bias,
                          {unit.batch, unit.head, unit.query / kQueries + t, tile}, arrived);
        }
      }
      ring.Advance();
      if (next >= tiles) break;
      tile = next;
    }
  }
}

// One thread: the queries of every row of the block.
template <typename T, int D>
__device__ void LoadQueries(const Globals<T, D>& g, typename Shape<T, D>::Shared& shared) {
  int parity = 1;
  for (int n = blockIdx.x; n < g.units; n += gridDim.x, parity ^= 1) {
    const Unit unit = g.unit(n);
    for (int row = 0; row < kRows; ++row) {
      if (unit.row + row >= g.given.rows) continue;
      wait(shared.q_finished[row], parity);
      tma::expect_bytes(shared.q_arrived[row], unit.tiles * sizeof(typename Shape<T, D>::Queries));
      const int i = static_cast<int>(unit.batch * g.given.rows + unit.row + row);
      for (int t = 0; t < unit.tiles; ++t) {
        tma::load_async<dim::DEPTH, NORMAL>(shared.q[row][t], g.q,
                                            {i, unit.query / kQueries + t, unit.head, 0},
                                            shared.q_arrived[row]);
      }
    }
  }
}

// Writes one tile of 64 queries of row `pair_row`, and their log-sum-exp if it is wanted.
template <typename T, int D, typename State>
__device__ void Store(const PairAttention& given, State& state, int64_t pair_row, int head,
                      int query) {
  const int lane = laneid();
  query += 16 * warpgroup::warpid() + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half, query += 8) {
    const float total = QuadSum(half ? state.total.y : state.total.x);
    const float peak = half ? state.peak.y : state.peak.x;
    if (query >= given.queries) continue;
    const float inverse = total > 0 ? 1 / total : 0.f;
    T* to = static_cast<T*>(given.o) +
            ((pair_row * given.queries + query) * given.heads + head) * D + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      float2 x = state.o.tiles[0][j / 2].data[j % 2 * 2 + half];
      x.x *= inverse, x.y *= inverse;
      using pair = typename base_types::packing<T>::packed_type;
      *reinterpret_cast<pair*>(to + 8 * j) = base_types::convertor<pair, float2>::convert(x);
    }
    if (given.lse && lane % 4 == 0) {
      given.lse[(pair_row * given.heads + head) * given.queries + query] =
          total > 0 ? (peak + log2f(total)) * kLn2 : -INFINITY;
    }
  }
}

// Consumer warpgroup `row` of the block.
template <typename T, int D>
__device__ void AttendRow(const Globals<T, D>& g, typename Shape<T, D>::Shared& shared, int row) {
  using S = Shape<T, D>;
  const bool folded = g.given.folded, with_bias = g.given.bias;
  const float root = sqrtf(float(D)), factor = folded ? 1.f : kLog2E / root;
  Ring<S::kStages> ring;
  int q_parity = 0;
  for (int n = blockIdx.x; n < g.units; n += gridDim.x) {
    const Unit unit = g.unit(n);
    const bool exists = unit.row + row < g.given.rows;
    Softmax<typename S::Sums> softmax[S::kTiles];
#pragma unroll
    for (auto& state : softmax) state.Clear();
    if (exists) wait(shared.q_arrived[row], q_parity), q_parity ^= 1;

    bool first = true;
    while (true) {
      wait(shared.arrived[ring.stage], ring.parity);
      const int kind = shared.kind[ring.stage][row];
      if (kind & (kSome | kAll)) {
#pragma unroll
        for (int t = 0; t < S::kTiles; ++t) {
          if (t < unit.tiles) {
            typename S::Logits s;
            if (with_bias) {
              warpgroup::load(s, shared.bias[ring.stage][t]);
              if (!folded) warp::mul(s, s, root);
            } else {
              warp::zero(s);
            }
            if (kind & kSome) {
              row_vec<typename S::Logits> mask;
              warp::load(mask, shared.mask[ring.stage][row]);
              warp::add_col(s, s, mask);
            }
            warpgroup::mma_ABt(s, shared.q[row][t], shared.k[ring.stage][row]);
            warpgroup::mma_async_wait();
            Pin(s);
            rt<T, 16, kKeys> p;
            softmax[t].Add(p, s, factor, first);
            warpgroup::mma_AB(softmax[t].o, p, shared.v[ring.stage][row]);
          }
        }
        first = false;
        warpgroup::mma_async_wait();
#pragma unroll
        for (auto& state : softmax) Pin(state.o);
      }
      warp::sync();
      warp::arrive(shared.finished[ring.stage]);
      ring.Advance();
      if (kind & kLast) break;
    }
    if (exists) warp::arrive(shared.q_finished[row]);
#pragma unroll
    for (int t = 0; t < S::kTiles; ++t) {
      if (exists && t < unit.tiles) {
        Store<T, D>(g.given, softmax[t], unit.batch * g.given.rows + unit.row + row, unit.head,
                    unit.query + kQueries * t);
      }
    }
  }
}

template <typename T, int D>
__global__ __launch_bounds__(kThreads, 1) void Attend(const __grid_constant__ Globals<T, D> g) {
  extern __shared__ alignment_dummy __shm[];
  shared_allocator allocator(reinterpret_cast<int*>(&__shm[0]));
  auto& shared = allocator.template allocate<typename Shape<T, D>::Shared>();
  if (threadIdx.x == 0) {
    for (int s = 0; s < Shape<T, D>::kStages; ++s) {
      init_semaphore(shared.arrived[s], kRows);
      init_semaphore(shared.finished[s], kRows * WARPGROUP_WARPS);
    }
    for (int row = 0; row < kRows; ++row) {
      init_semaphore(shared.q_arrived[row], 1);
      init_semaphore(shared.q_finished[row], WARPGROUP_WARPS);
    }
  }
  everyone::sync(0);

  if (warpgroupid() == kRows) {
    warpgroup::decrease_registers<kProducerRegisters>();
    if (warpgroup::warpid() < kRows) {
      LoadKeys<T, D>(g, shared, warpgroup::warpid());
    } else if (laneid() == 0) {
      LoadQueries<T, D>(g, shared);
    }
  } else {
    warpgroup::increase_registers<kConsumerRegisters>();
    AttendRow<T, D>(g, shared, warpgroupid());
  }
}

template <typename T, int D>
cudaError_t LaunchFor(const PairAttention& p, cudaStream_t stream) {
  using S = Shape<T, D>;
  constexpr int kShared = sizeof(typename S::Shared) + 1024;
  const auto kernel = Attend<T, D>;
  int device, processors;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (status != cudaSuccess) return status;

  const int64_t row_groups = (p.rows + kRows - 1) / kRows;
  const int64_t query_block = kQueries * S::kTiles;
  const int64_t query_groups = (p.queries + query_block - 1) / query_block;
  const int64_t units = p.batch * row_groups * p.heads * query_groups;
  if (units >= int64_t{1} << 30) return cudaErrorInvalidValue;
  const size_t rows = p.batch * p.rows, heads = p.heads, queries = p.queries, keys = p.keys;
  const auto data = [](const void* x) { return static_cast<T*>(const_cast<void*>(x)); };
  try {
    const Globals<T, D> globals = {
        .q = {data(p.q), rows, queries, heads, nullptr},
        .k = {data(p.k), rows, keys, heads, nullptr},
        .v = {data(p.v), rows, keys, heads, nullptr},
        .bias = {data(p.bias ? p.bias : p.q), size_t(p.batch), heads, queries, (keys + 7) / 8 * 8},
        .given = p,
        .units = static_cast<int>(units),
        .row_groups = static_cast<int>(row_groups),
        .query_groups = static_cast<int>(query_groups)};
    kernel<<<std::min<int64_t>(units, processors), kThreads, kShared, stream>>>(globals);
  } catch (const std::runtime_error&) {  // a stride or a size is beyond TMA
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t LaunchFor(const PairAttention& p, cudaStream_t stream) {
  if (p.head_dim == 16) return LaunchFor<T, 16>(p, stream);
  if (p.head_dim == 32) return LaunchFor<T, 32>(p, stream);
  if (p.head_dim == 64) return LaunchFor<T, 64>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t Launch(const PairAttention& p, cudaStream_t stream) {
  constexpr int64_t kMost = int64_t{1} << 30;
  for (int64_t size : {p.batch * p.rows, p.queries, p.keys, p.heads}) {
    if (size < 1 || size >= kMost) return cudaErrorInvalidValue;
  }
  return p.half ? LaunchFor<half>(p, stream) : LaunchFor<bf16>(p, stream);
}

}  // namespace genie
