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
#include "triangle_attention/attend_block.cuh"
#include "triangle_attention/attend_load.cuh"
#include "triangle_attention/attend_softmax.cuh"

namespace genie {
<<<<<<< HEAD
namespace {

using namespace kittens;

constexpr int kKeys = 64;     // of a tile
constexpr int kQueries = 64;  // of a tile: the rows of one WGMMA
constexpr int kRows = 3;      // rows i of a block, each with its consumer warpgroup
constexpr int kThreads = (kRows + 1) * WARPGROUP_THREADS;
constexpr int kConsumerRegisters = 152, kProducerRegisters = 56;
static_assert(kRows * kConsumerRegisters + kProducerRegisters <= 512);
static_assert(kRows < WARPGROUP_WARPS, "a producer warp a row, and one for the queries");

constexpr int kChunk = 256;  // keys whose mask is read at once
constexpr int kWords = kChunk / WARP_THREADS, kTileWords = kKeys / WARP_THREADS;

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
// Peaks follow the logits only when a lane's sum passes this, so that most tiles rescale nothing;
// what is summed stays far from the limits of fp16.
constexpr float kOutgrown = 256.f;

// What a row makes of a stage.
enum Kind { kNone = 0, kSome = 1, kAll = 2, kLast = 4 };

// What masks a tile of keys: a product with it adds nothing to the logits of valid keys and a huge
// negative number to the others, at no cost in issue slots. Lane l of a warp reads words[l / 4],
// the B operands of an 8-deep product for the keys l / 4 of each 8: low halves for the even ones of
// these groups of 8 keys, high halves for the odd ones. A operands hold kHuge where B has the half.
template <typename T>
struct alignas(16) MaskTile {
  static constexpr uint32_t kHuge = std::is_same_v<T, bf16> ? 0x5D80 : 0x7BFF;  // 2^60, 65504
  static constexpr uint32_t kMasked = kHuge | 0x8000;
  uint16_t halves[8][kKeys / 8];

  __device__ void Set(int key, bool valid) { halves[key % 8][key / 8] = valid ? 0 : kMasked; }

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
    MaskTile<T> mask[kStages][kRows];  // where the row's kind is kSome
    int kind[kStages][kRows];
    alignas(
        8) unsigned valid[2][kRows][kWords];  // bits of the mask of a chunk, of which there are two
    semaphore arrived[kStages], finished[kStages];
    semaphore q_arrived[kRows][kTiles], q_finished[kRows][kTiles];
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
      float2 x = s.tiles[0][j].data[k];
      x = {fmaf(x.x, factor, offset), fmaf(x.y, factor, offset)};
      const float2 y = {Exp2(x.x), Exp2(x.y)};
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
        to.Set(lane, own.x >> lane & 1);
        to.Set(lane + WARP_THREADS, own.y >> lane & 1);
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

// One thread: the queries of every row of the block, each tile as soon as its last is read.
template <typename T, int D>
__device__ void LoadQueries(const Globals<T, D>& g, typename Shape<T, D>::Shared& shared) {
  using S = Shape<T, D>;
  unsigned parities = ~0u;  // a bit a tile of a row
  for (int n = blockIdx.x; n < g.units; n += gridDim.x) {
    const Unit unit = g.unit(n);
    for (int t = 0; t < unit.tiles; ++t) {
      for (int row = 0; row < kRows && unit.row + row < g.given.rows; ++row) {
        const int bit = row * S::kTiles + t;
        wait(shared.q_finished[row][t], parities >> bit & 1);
        parities ^= 1u << bit;
        tma::expect(shared.q_arrived[row][t], shared.q[row][t]);
        const int i = static_cast<int>(unit.batch * g.given.rows + unit.row + row);
        tma::load_async<dim::DEPTH, NORMAL>(shared.q[row][t], g.q,
                                            {i, unit.query / kQueries + t, unit.head, 0},
                                            shared.q_arrived[row][t]);
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

// The bias of a warp's 16 queries becomes the first logits by a product with a diagonal matrix,
// which neither unpacks nor scales in registers. Both are multiplied by the root if q and bias are
// not in units of the logit: in two terms, as T may not hold it.
template <typename T>
struct BiasProduct {
  uint32_t scale[4], rest[4];  // A operands
  bool exact;                  // the rest is zero
  uint32_t offset;             // of the lane's row of the matrices that it loads

  __device__ explicit BiasProduct(float root) {
    using convert = base_types::convertor<T, float>;
    const T rounded = convert::convert(root);
    const float left = root - base_types::convertor<float, T>::convert(rounded);
    SetDiagonal(scale, rounded);
    SetDiagonal(rest, convert::convert(left));
    exact = left == 0;
    const int lane = laneid(), row = 16 * warpgroup::warpid() + lane % 16;
    offset = row * 2 * kKeys + ((lane / 16 ^ lane % 8) << 4);
    Keep(offset);
  }

  // s = root * bias.
  template <typename Logits, typename Bias>
  __device__ void Start(Logits& s, const Bias& bias) const {
    static_assert(Bias::swizzle_bytes == 128 && Bias::cols == kKeys);
    const uint32_t start = kittens::detail::shared_address(bias.data) + offset;
    warp::zero(s);
    Add(s, scale, start);
    if (!exact) Add(s, rest, start);
  }

 private:
  template <typename Logits>
  static __device__ void Add(Logits& s, const uint32_t (&a)[4], uint32_t start) {
#pragma unroll
    for (int j = 0; j < Logits::width; ++j) {
      uint32_t b[4];
      kittens::detail::load_matrices<true>(b, start ^ (j << 5));
      auto& to = s.tiles[0][j].data;
      kittens::detail::mma_step<T>(to[0], to[1], a, b[0], b[1], to[0], to[1]);
      kittens::detail::mma_step<T>(to[2], to[3], a, b[2], b[3], to[2], to[3]);
    }
  }
  static __device__ void SetDiagonal(uint32_t (&a)[4], T x) {
    const uint32_t bits = reinterpret_cast<const uint16_t&>(x);
    const int column = laneid() / 4 - laneid() % 4 * 2;
    a[0] = a[3] = column == 0 ? bits : column == 1 ? bits << 16 : 0;
    a[1] = a[2] = 0;
#pragma unroll
    for (uint32_t& word : a) Keep(word);
  }
  // What the compiler cannot make again it keeps in its register.
  static __device__ void Keep(uint32_t& word) { asm volatile("" : "+r"(word)); }
};
=======
namespace attend {
>>>>>>> attend

// Consumer warpgroup `row` of the block.
template <typename T, int D>
__device__ void AttendRow(const Globals<T, D>& g, typename Shape<T, D>::Shared& shared, int row) {
  using S = Shape<T, D>;
  using Logits = typename S::Logits;
  // Logits are in units of q . k until they are exponentiated.
  const float root = g.given.folded ? 1.f : sqrtf(float(D));
  const float factor = g.given.folded ? 1.f : kLog2E / root;
  BiasProduct<T> bias_product(root);
  Ring<S::kStages> ring;
  unsigned q_parities = 0;
  for (int n = blockIdx.x; n < g.units; n += gridDim.x) {
    const Unit unit = g.unit(n);
    const bool exists = unit.row + row < g.given.rows;
    Softmax<typename S::Sums> softmax[S::kTiles];
#pragma unroll
    for (auto& state : softmax) state.Clear();

    bool first = true, q_finished = false;
    while (true) {
      wait(shared.arrived[ring.stage], ring.parity);
      const int kind = __shfl_sync(~0u, shared.kind[ring.stage][row], 0);
      if (kind & (kSome | kAll)) {
        q_finished = kind & kLast;
#pragma unroll
        for (int t = 0; t < S::kTiles; ++t) {
          if (t < unit.tiles) {
            Logits s;
            bias_product.Start(s, shared.bias[ring.stage][t]);
            if (kind & kSome) shared.mask[ring.stage][row].Apply(s);
            if (first) wait(shared.q_arrived[row][t], q_parities >> t & 1);
            warpgroup::mma_ABt(s, shared.q[row][t], shared.k[ring.stage][row]);
            warpgroup::mma_async_wait();
            Pin(s);
#pragma unroll
            for (auto& state : softmax) Pin(state.o);
            if (q_finished) warp::arrive(shared.q_finished[row][t]);
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
      warp::arrive(shared.finished[ring.stage]);
      ring.Advance();
      if (kind & kLast) break;
    }

#pragma unroll
    for (int t = 0; t < S::kTiles; ++t) {
      if (exists && t < unit.tiles) {
        if (first) wait(shared.q_arrived[row][t], q_parities >> t & 1);
        if (!q_finished) warp::arrive(shared.q_finished[row][t]);
        q_parities ^= 1u << t;
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
    for (int i = 0; i < kRows * Shape<T, D>::kTiles; ++i) {
      init_semaphore(shared.q_arrived[0][i], 1);
      init_semaphore(shared.q_finished[0][i], WARPGROUP_WARPS);
    }
  }
  if (!g.given.bias) {  // an absent bias is zero
    auto* words = reinterpret_cast<uint4*>(shared.bias);
    for (int i = threadIdx.x; i < sizeof(shared.bias) / sizeof(uint4); i += kThreads) words[i] = {};
  }
  everyone::sync(0);

  const int group = __shfl_sync(~0u, warpgroupid(), 0);  // known to be the same for all lanes
  if (group == kRows) {
    warpgroup::decrease_registers<kProducerRegisters>();
    if (warpgroup::warpid() < kRows) {
      KeyLoader<T, D> loader = {g, shared, warpgroup::warpid()};
      for (int n = blockIdx.x; n < g.units; n += gridDim.x) loader.LoadUnit(g.unit(n));
    } else if (laneid() == 0) {
      LoadQueries<T, D>(g, shared);
    }
  } else {
    warpgroup::increase_registers<kConsumerRegisters>();
    AttendRow<T, D>(g, shared, group);
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

}  // namespace attend

cudaError_t Launch(const PairAttention& p, cudaStream_t stream) {
  constexpr int64_t kMost = int64_t{1} << 30;
  for (int64_t size : {p.batch * p.rows, p.queries, p.keys, p.heads}) {
    if (size < 1 || size >= kMost) return cudaErrorInvalidValue;
  }
  return p.half ? attend::LaunchFor<kittens::half>(p, stream)
                : attend::LaunchFor<kittens::bf16>(p, stream);
}

}  // namespace genie
