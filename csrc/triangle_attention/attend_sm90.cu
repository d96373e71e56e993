// Attention of triangle attention: 4 D FLOP and one exponential a logit (i, h, q, k). At D = 32 the
// special-function unit is the wall (16 exponentials a clock and SM), then issue slots, the tensor
// cores and L2 (docs/kernels/triangle_attention.md counts them).
//
// Persistent blocks. A block owns 3 rows i, one head and up to 256 queries, and walks the keys in
// tiles of 64: K and V of a row serve all its queries, a bias tile serves all rows. Each consumer
// warpgroup has one row and takes tiles of 64 queries in turn, their sums in registers; while one
// exponentiates, the products of the others run. Producer warp w loads row w ahead through a ring,
// leaving out tiles without a valid key; the queries stay away from rows without one.
#include <algorithm>
#include <stdexcept>

#include "kittens.cuh"
#include "kittens/extensions.cuh"
#include "triangle_attention/attend_block.cuh"
#include "triangle_attention/attend_load.cuh"
#include "triangle_attention/attend_softmax.cuh"
#include "triangle_attention/attend_store.cuh"

namespace genie {
namespace attend {

// What a row does with a stage: its logits, their weights and the sums of all its tiles of queries.
template <typename T, int D, typename State>
__device__ __forceinline__ void AttendStage(typename Shape<T, D>::Shared& shared, int row,
                                            int stage, int tiles, int kind, bool first,
                                            unsigned q_parities, bool folded,
                                            BiasProduct<T>& bias_product, State& softmax) {
  using S = Shape<T, D>;
  // Logits are in units of q . k until they are exponentiated.
  const float factor = folded ? 1.f : kLog2E / sqrtf(float(D));
  const bool releases = kind & kLast && laneid() == 0;
  const bool rare = !bias_product.exact || kind & kSome || first;  // one branch for what is rare
#pragma unroll
  for (int t = 0; t < S::kTiles; ++t) {
    if (t == 0 || t < tiles) {
      typename S::Logits s;
      const auto& bias = shared.bias[stage][t];
      bias_product.Start(s, bias);
      if (rare) {
        if (first) wait(shared.q_arrived[row][t], q_parities >> t & 1);
        if (bias_product.exact) {
          if (kind & kSome) shared.mask[stage][row].Apply(s);
        } else if (kind & kSome) {
          bias_product.Finish(s, shared.mask[stage][row]);
        } else {
          bias_product.Finish(s);
        }
      }
      warpgroup::mma_ABt(s, shared.q[row][t], shared.k[stage][row]);
      warpgroup::mma_async_wait();
      Pin(s);
#pragma unroll
      for (auto& state : softmax) Pin(state.o);
      ArriveIf(releases, shared.q_finished[row][t]);
      rt<T, 16, kKeys> p;
      softmax[t].Add(p, s, factor, first);
      warpgroup::mma_AB(softmax[t].o, p, shared.v[stage][row]);
    }
  }
  warpgroup::mma_async_wait();
#pragma unroll
  for (auto& state : softmax) Pin(state.o);
}

// Consumer warpgroup `row` of the block.
template <typename T, int D>
__device__ void AttendRow(const Globals<T, D>& g, typename Shape<T, D>::Shared& shared, int row) {
  using S = Shape<T, D>;
  const bool folded = g.given.folded, leads = laneid() == 0;
  BiasProduct<T> bias_product(folded ? 1.f : sqrtf(float(D)), g.units >> 30);
  Ring<S::kStages> ring;
  unsigned q_parities = 0;
  for (int n = blockIdx.x; n < g.units; n += gridDim.x) {
    const Unit unit = g.unit(n);
    Softmax<typename S::Sums> softmax[S::kTiles];
#pragma unroll
    for (auto& state : softmax) state.Clear();

    int seen = 0, kind;  // of all stages so far, and of this one
    do {
      wait(shared.arrived[ring.stage], ring.parity);
      kind = __shfl_sync(~0u, shared.kind[ring.stage][row], 0);
      if (kind & kKeyed) {
        const bool first = !(seen & kKeyed);
        AttendStage<T, D>(shared, row, ring.stage, unit.tiles, kind, first, q_parities, folded,
                          bias_product, softmax);
      }
      __syncwarp();
      ArriveIf(leads, shared.finished[ring.stage]);
      ring.Advance();
      seen |= kind & kLast ? kind : kind | kMore;
    } while (!(kind & kLast));

    const bool q_loaded = seen != kLast;
#pragma unroll
    for (int t = 0; t < S::kTiles; ++t) {
      if (t < unit.tiles) {
        if (q_loaded && !(seen & kKeyed)) wait(shared.q_arrived[row][t], q_parities >> t & 1);
        if (q_loaded && !(kind & kKeyed)) ArriveIf(leads, shared.q_finished[row][t]);
        if (unit.row + row < g.given.rows) {
          Store<T, D>(g.given, softmax[t], unit.batch * g.given.rows + unit.row + row, unit.head,
                      unit.query + kQueries * t);
        }
      }
    }
    if (q_loaded) q_parities ^= (1u << unit.tiles) - 1;
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
    for (int i = 0; i < Shape<T, D>::kRequests; ++i) {
      init_semaphore(shared.posted[i], kRows);
      init_semaphore(shared.taken[i], 1);
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
      for (int n = blockIdx.x; n < g.units; n += gridDim.x) loader.LoadUnit(n);
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
  Units<S::kTiles> cut;
  const int64_t units =
      cut.Cut(p.batch * row_groups * p.heads, (p.queries + kQueries - 1) / kQueries, processors);
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
        .cut = cut,
        .units = static_cast<int>(units),
        .row_groups = static_cast<int>(row_groups)};
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
