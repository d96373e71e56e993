// The queries pass: dq and delta. Four products of 64 FLOP at D = 32, an exponential and about nine
// instructions a logit, so tensor cores, special functions and issue slots are about equally busy.
//
// Persistent blocks of a producer warp and two consumer warpgroups. A consumer keeps 64 queries of
// kRows rows in registers and walks the keys; the rows share each tile of the bias.
#include "triangle_attention/attend_backward.cuh"
#include "triangle_attention/attend_backward_row.cuh"

namespace genie::attend_backward {
namespace {

template <typename T, int D>
struct Shared {
  static constexpr int kStages = 3, kItems = 2;
  struct OfItem {
    Side<T, D> q[kConsumers][kRows<D>], o[kConsumers][kRows<D>], d_o[kConsumers][kRows<D>];
  };
  Side<T, D> k[kStages][kRows<D>], v[kStages][kRows<D>];
  Bias<T> bias[kStages][kConsumers];
  OfItem items[kItems];
  Side<T, D> dq[kConsumers];
  Ones<T> ones;
  T hidden[kStages][kRows<D>][kTile];
  bool more[kStages];  // false: no tile of keys, the item ends
  semaphore arrived[kStages], finished[kStages], item_arrived[kItems], item_finished[kItems];
};

template <typename T, int D>
__device__ void Produce(Shared<T, D>& shared, const Globals<T, D>& g, int items, int tiles) {
  using S = Shared<T, D>;
  Turn<S::kStages> turn;
  Turn<S::kItems> item_turn;
  const int lane = laneid(), key_tiles = (g.given.keys + kTile - 1) / kTile;
  for (int n = blockIdx.x; n < items; n += gridDim.x) {
    const Item item = ItemAt<D>(n, tiles, g.given);
    if (lane == 0) {
      auto& to = shared.items[item_turn.stage];
      auto& arrived = shared.item_arrived[item_turn.stage];
      wait(shared.item_finished[item_turn.stage], item_turn.parity ^ 1);
      tma::expect_bytes(arrived, sizeof(to));
#pragma unroll 1
      for (int i = 0; i < kConsumers * kRows<D>; ++i) {
        const int w = i / kRows<D>, r = i % kRows<D>;
        const coord<Side<T, D>> at(item.any_row + r, kConsumers * item.tile + w, item.head, 0);
        tma::load_async<dim::DEPTH, EVICT_FIRST>(to.q[w][r], g.q, at, arrived);
        tma::load_async<dim::DEPTH, EVICT_FIRST>(to.o[w][r], g.o, at, arrived);
        tma::load_async<dim::DEPTH, EVICT_FIRST>(to.d_o[w][r], g.d_o, at, arrived);
      }
    }
    item_turn.Next();

    // Lane l reads the mask of keys 2 l and 2 l + 1, a tile ahead of its use.
    KeyPair next[kRows<D>];
    const int rows = min(kRows<D>, static_cast<int>(g.given.rows) - item.row);
    const auto read = [&](int tile) {
#pragma unroll
      for (int r = 0; r < kRows<D>; ++r) {
        next[r].Read(g.given, item.any_row + min(r, rows - 1), kTile * tile + 2 * lane);
      }
    };
    read(0);
    for (int tile = 0; tile <= key_tiles; ++tile) {
      uint32_t hidden[kRows<D>];
      bool any_valid = tile == key_tiles;
#pragma unroll
      for (int r = 0; r < kRows<D>; ++r) {
        hidden[r] = r < rows ? next[r].template Hidden<T>(g.given, kTile * tile + 2 * lane)
                             : HiddenPair<T>(false, false);
        any_valid |= hidden[r] != HiddenPair<T>(false, false);
      }
      if (tile + 1 < key_tiles) read(tile + 1);
      if (!__any_sync(~0u, any_valid)) continue;
      const int s = turn.stage;
      wait(shared.finished[s], turn.parity ^ 1);
#pragma unroll
      for (int r = 0; r < kRows<D>; ++r) {
        reinterpret_cast<uint32_t*>(shared.hidden[s][r])[lane] = hidden[r];
      }
      if (lane == 0) shared.more[s] = tile < key_tiles;
      warp::sync();
      if (lane == 0 && tile == key_tiles) arrive(shared.arrived[s]);
      if (lane == 0 && tile < key_tiles) {
        constexpr uint32_t sides = sizeof(S::k[0]) + sizeof(S::v[0]);
        tma::expect_bytes(shared.arrived[s], sides + (g.given.bias ? sizeof(S::bias[0]) : 0));
#pragma unroll 1
        for (int r = 0; r < kRows<D>; ++r) {
          const coord<Side<T, D>> at(item.any_row + r, tile, item.head, 0);
          tma::load_async<dim::DEPTH, NORMAL>(shared.k[s][r], g.k, at, shared.arrived[s]);
          tma::load_async<dim::DEPTH, NORMAL>(shared.v[s][r], g.v, at, shared.arrived[s]);
        }
#pragma unroll 1
        for (int w = 0; w < kConsumers && g.given.bias; ++w) {
          tma::load_async(shared.bias[s][w], g.bias,
                          {item.batch, item.head, kConsumers * item.tile + w, tile},
                          shared.arrived[s]);
        }
      }
      turn.Next();
    }
  }
}

template <typename T, int D>
__device__ void Consume(Shared<T, D>& shared, const Globals<T, D>& g, int items, int tiles) {
  using S = Shared<T, D>;
  const AttendBackward& given = g.given;
  const int w = warpgroupid(), queries_padded = PaddedQueries(given.queries);
  const int64_t words = QueryWords(given.queries, given.dtype);
  Turn<S::kStages> turn;
  Turn<S::kItems> item_turn;
  for (int n = blockIdx.x; n < items; n += gridDim.x) {
    const Item item = ItemAt<D>(n, tiles, given);
    const int tile = kConsumers * item.tile + w;
    const int query = kTile * tile + 16 * warpgroup::warpid() + laneid() / 4;
    const auto row_head = [&](int r) { return (item.any_row + r) * given.heads + item.head; };
    const auto has_row = [&](int r) { return item.row + r < given.rows; };

    Row<D> rows[kRows<D>];
    float lse[kRows<D>][2];  // infinite where there is nothing to weigh
#pragma unroll
    for (int r = 0; r < kRows<D>; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = query + 8 * i;
        const bool reads = has_row(r) && at < given.queries;
        lse[r][i] = reads ? __ldg(given.lse + row_head(r) * given.queries + at) : INFINITY;
        if (lse[r][i] == -INFINITY) lse[r][i] = INFINITY;
      }
    }
    auto& own = shared.items[item_turn.stage];
    wait(shared.item_arrived[item_turn.stage], item_turn.parity);
#pragma unroll
    for (int r = 0; r < kRows<D>; ++r) Begin(rows[r], own.o[w][r], own.d_o[w][r], lse[r]);

    while (true) {
      const int s = turn.stage;
      wait(shared.arrived[s], turn.parity);
      turn.Next();
      const bool more = shared.more[s];
      if (more) {
#pragma unroll
        for (int r = 0; r < kRows<D>; ++r) {
          Add(rows[r], own.q[w][r], own.d_o[w][r], shared.k[s][r], shared.v[s][r],
              shared.bias[s][w], shared.hidden[s][r], shared.ones, given);
        }
      }
      warp::sync();
      warp::arrive(shared.finished[s]);
      if (!more) break;
    }
    warp::arrive(shared.item_finished[item_turn.stage]);
    item_turn.Next();

#pragma unroll
    for (int r = 0; r < kRows<D>; ++r) {
      Pin(rows[r].dq);
      Pin(rows[r].weighed_k);
      for (float& sum : rows[r].low_excess) asm volatile("" : "+f"(sum));
      if (!has_row(r)) continue;
      End<T>(rows[r], given.query_rows + row_head(r) * words, query, queries_padded,
             given.scale * kLn2);
      warpgroup::store(shared.dq[w], rows[r].dq);
      FenceAsyncProxy();
      warpgroup::sync(1 + w);
      warpgroup::tma::store_async<dim::DEPTH, NORMAL>(
          g.dq, shared.dq[w], {static_cast<int>(item.any_row) + r, tile, item.head, 0});
      warpgroup::tma::store_async_read_wait();
      warpgroup::sync(1 + w);
    }
  }
}

template <typename T, int D>
__global__ __launch_bounds__(kThreads, 1) void Queries(const __grid_constant__ Globals<T, D> g,
                                                       int items, int tiles) {
  extern __shared__ alignment_dummy __shm[];
  shared_allocator allocator(reinterpret_cast<int*>(&__shm[0]));
  auto& shared = allocator.template allocate<Shared<T, D>>();

  if (threadIdx.x == 0) {
    for (auto& s : shared.arrived) init_semaphore(s, 0, 1);
    for (auto& s : shared.finished) init_semaphore(s, kArrivals, 0);
    for (auto& s : shared.item_arrived) init_semaphore(s, 0, 1);
    for (auto& s : shared.item_finished) init_semaphore(s, kArrivals, 0);
  }
  if (!g.given.bias) ZeroBias(shared);
  if (threadIdx.x < 128) shared.ones.values[threadIdx.x] = T(1.f);
  FenceAsyncProxy();
  everyone::sync(0);

  if (warpgroupid() == kConsumers) {
    warpgroup::decrease_registers<kProducerRegisters>();
    if (warpgroup::warpid() == 0) Produce(shared, g, items, tiles);
  } else {
    warpgroup::increase_registers<kConsumerRegisters>();
    Consume(shared, g, items, tiles);
  }
}

}  // namespace

template <typename T, int D>
cudaError_t LaunchQueries(const Globals<T, D>& g, int processors, cudaStream_t stream) {
  const int tiles = (g.given.queries + kBlock - 1) / kBlock;
  const int items = tiles * g.given.heads * RowGroups<D>(g.given) * g.given.batch;
  return LaunchBlocks<Shared<T, D>>(Queries<T, D>, std::min(items, processors), stream, g, items,
                                    tiles);
}

GENIE_ATTEND_BACKWARD(LaunchQueries, bf16)
GENIE_ATTEND_BACKWARD(LaunchQueries, half)

}  // namespace genie::attend_backward
