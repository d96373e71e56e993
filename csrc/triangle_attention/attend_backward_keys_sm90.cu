// The keys pass: dk and dv, as the queries pass with the roles of queries and keys exchanged. S and
// dP are computed transposed, so that P^T and dS^T are where the products with d_o and q take them.
#include "triangle_attention/attend_backward.cuh"

namespace genie::attend_backward {
namespace {

template <typename T, int D>
struct Shared {
  static constexpr int kStages = 3, kItems = 2;
  struct OfItem {
    Side<T, D> k[kConsumers][kRows<D>], v[kConsumers][kRows<D>];
  };
  Side<T, D> q[kStages][kRows<D>], d_o[kStages][kRows<D>];
  Bias<T> bias[kStages][kConsumers];
  OfItem items[kItems];
  Side<T, D> dk[kConsumers], dv[kConsumers];
  float negative_lse[kStages][kRows<D>][kTile], negative_delta[kStages][kRows<D>][kTile];
  bool more[kStages];  // false: no tile of queries, the item ends
  semaphore arrived[kStages], finished[kStages], item_arrived[kItems], item_finished[kItems];
};

template <typename T, int D>
__device__ void Produce(Shared<T, D>& shared, const Globals<T, D>& g, int items, int tiles) {
  using S = Shared<T, D>;
  const AttendBackward& given = g.given;
  Turn<S::kStages> turn;
  Turn<S::kItems> item_turn;
  const int lane = laneid(), query_tiles = (given.queries + kTile - 1) / kTile;
  const int64_t queries_padded = PaddedQueries(given.queries);
  for (int n = blockIdx.x; n < items; n += gridDim.x) {
    const Item item = ItemAt<D>(n, tiles, given);
    if (lane == 0) {
      auto& to = shared.items[item_turn.stage];
      auto& arrived = shared.item_arrived[item_turn.stage];
      wait(shared.item_finished[item_turn.stage], item_turn.parity ^ 1);
      tma::expect_bytes(arrived, sizeof(to));
#pragma unroll 1
      for (int i = 0; i < kConsumers * kRows<D>; ++i) {
        const int w = i / kRows<D>, r = i % kRows<D>;
        const coord<Side<T, D>> at(item.any_row + r, kConsumers * item.tile + w, item.head, 0);
        tma::load_async<dim::DEPTH, EVICT_FIRST>(to.k[w][r], g.k, at, arrived);
        tma::load_async<dim::DEPTH, EVICT_FIRST>(to.v[w][r], g.v, at, arrived);
      }
    }
    item_turn.Next();

    KeyPair own[kRows<D>][kConsumers];
    bool any_valid = false;
    const int rows = min(kRows<D>, static_cast<int>(given.rows) - item.row);
#pragma unroll
    for (int i = 0; i < kRows<D> * kConsumers; ++i) {
      const int r = i / kConsumers, w = i % kConsumers;
      own[r][w].Read(given, item.any_row + min(r, rows - 1),
                     kBlock * item.tile + kTile * w + 2 * lane);
    }
#pragma unroll
    for (int i = 0; i < kRows<D> * kConsumers; ++i) {
      const int r = i / kConsumers, w = i % kConsumers;
      any_valid |= own[r][w].template Hidden<T>(given, kBlock * item.tile + kTile * w + 2 * lane) !=
                   HiddenPair<T>(false, false);
    }
    const int own_tiles = __any_sync(~0u, any_valid) ? query_tiles : 0;

    // Lane l reads the values of queries 2 l and 2 l + 1, a tile ahead of their use.
    float2 next[kRows<D>][2];
    const auto read = [&](int tile) {
#pragma unroll
      for (int r = 0; r < kRows<D>; ++r) {
        const int64_t row_head = (item.any_row + min(r, rows - 1)) * given.heads + item.head;
        const float* from =
            given.query_rows + row_head * QueryWords(given.queries, given.dtype) + kTile * tile;
        next[r][0] = __ldg(reinterpret_cast<const float2*>(from) + lane);
        next[r][1] = __ldg(reinterpret_cast<const float2*>(from + queries_padded) + lane);
      }
    };
    if (own_tiles) read(0);
    for (int tile = 0; tile <= own_tiles; ++tile) {
      const int s = turn.stage;
      wait(shared.finished[s], turn.parity ^ 1);
#pragma unroll
      for (int r = 0; r < kRows<D>; ++r) {
        reinterpret_cast<float2*>(shared.negative_lse[s][r])[lane] = next[r][0];
        reinterpret_cast<float2*>(shared.negative_delta[s][r])[lane] = next[r][1];
      }
      if (lane == 0) shared.more[s] = tile < own_tiles;
      warp::sync();
      if (tile + 1 < own_tiles) read(tile + 1);
      if (lane == 0 && tile == own_tiles) arrive(shared.arrived[s]);
      if (lane == 0 && tile < own_tiles) {
        constexpr uint32_t sides = sizeof(S::q[0]) + sizeof(S::d_o[0]);
        tma::expect_bytes(shared.arrived[s], sides + (given.bias ? sizeof(S::bias[0]) : 0));
#pragma unroll 1
        for (int r = 0; r < kRows<D>; ++r) {
          const coord<Side<T, D>> at(item.any_row + r, tile, item.head, 0);
          tma::load_async<dim::DEPTH, NORMAL>(shared.q[s][r], g.q, at, shared.arrived[s]);
          tma::load_async<dim::DEPTH, NORMAL>(shared.d_o[s][r], g.d_o, at, shared.arrived[s]);
        }
#pragma unroll 1
        for (int w = 0; w < kConsumers && given.bias; ++w) {
          tma::load_async(shared.bias[s][w], g.bias,
                          {item.batch, item.head, tile, kConsumers * item.tile + w},
                          shared.arrived[s]);
        }
      }
      turn.Next();
    }
  }
}

// S^T becomes P^T: rows are keys, columns queries, of which each has its -lse.
template <typename T>
__device__ void WeighTransposed(rt_fl<16, kTile>& s, Bias<T>& bias, const float* negative_lse,
                                float scale, float bias_scale) {
  using T2 = typename base_types::packing<T>::packed_type;
#pragma unroll
  for (int j = 0; j < kTile / 16; ++j) {
    rt<T, 16, 16, col_l> b;
    auto block = bias.template subtile<16, 16>({j, warpgroup::warpid()});
    warp::load(b, block);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int query = 16 * j + 8 * (k / 2) + 2 * (laneid() % 4);
      const float2 l = *reinterpret_cast<const float2*>(&negative_lse[query]);
      const float2 y = base_types::convertor<float2, T2>::convert(b.tiles[0][0].data[k]);
      float2& x = s.tiles[0][j].data[k];
      x.x = Exp2(fmaf(x.x, scale, fmaf(y.x, bias_scale, l.x)));
      x.y = Exp2(fmaf(x.y, scale, fmaf(y.y, bias_scale, l.y)));
    }
  }
}

// What a consumer holds of one row i.
template <int D>
struct Row {
  rt_fl<16, D> dk, dv;
  float scale = 1;  // of dS, in fp16
};

// What is safe for all queries of a row i and head.
__device__ inline float LeastScale(const AttendBackward& given, int64_t row_head) {
  const int64_t padded = PaddedQueries(given.queries);
  const float* scales =
      given.query_rows + row_head * QueryWords(given.queries, given.dtype) + 2 * padded;
  float least = INFINITY;
  for (int i = laneid(); i < padded / 16; i += WARP_THREADS)
    least = fminf(least, __ldg(scales + i));
  for (int lanes = 1; lanes < WARP_THREADS; lanes *= 2) {
    least = fminf(least, __shfl_xor_sync(~0u, least, lanes));
  }
  return least;
}

// One tile of queries for one row.
template <typename T, int D>
__device__ void Add(Row<D>& row, const Side<T, D>& k, const Side<T, D>& v, const Side<T, D>& q,
                    const Side<T, D>& d_o, Bias<T>& bias, const float* negative_lse,
                    const float* negative_delta, const AttendBackward& given) {
  rt_fl<16, kTile> p, ds;
#pragma unroll
  for (int j = 0; j < kTile / 16; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int query = 16 * j + 8 * (i / 2) + 2 * (laneid() % 4);
      ds.tiles[0][j].data[i] = *reinterpret_cast<const float2*>(&negative_delta[query]);
    }
  }
  Pin(ds);
  warpgroup::mm_ABt(p, k, q);
  warpgroup::mma_ABt<rt_fl<16, kTile>, Side<T, D>, Side<T, D>, 0>(ds, v, d_o);
  warpgroup::mma_async_wait<1>();
  Pin(p);
  WeighTransposed(p, bias, negative_lse, given.scale, given.bias_scale);
  warpgroup::mma_async_wait<0>();
  Pin(ds);
  rt<T, 16, kTile> low_p, low_ds;
  warp::copy(low_p, p);
  if constexpr (kScaled<T>) warp::mul(ds, ds, row.scale);
  warp::mul(ds, ds, p);
  warp::copy(low_ds, ds);
  warpgroup::mma_AB(row.dv, low_p, d_o);
  warpgroup::mma_AB(row.dk, low_ds, q);
  warpgroup::mma_async_wait<0>();
}

// Stages the gradient of 64 keys, zero where a key is masked, whatever its sums hold.
template <typename T, int D>
__device__ void Store(rt_fl<16, D>& sums, float scale, const unsigned (&keep)[2],
                      Side<T, D>& staged) {
  rt<T, 16, D> low;
  warp::mul(sums, sums, scale);
  warp::copy(low, sums);
  KeepRows(low, keep);
  warpgroup::store(staged, low);
}

template <typename T, int D>
__device__ void Consume(Shared<T, D>& shared, const Globals<T, D>& g, int items, int tiles) {
  using S = Shared<T, D>;
  const AttendBackward& given = g.given;
  const int w = warpgroupid();
  Turn<S::kStages> turn;
  Turn<S::kItems> item_turn;
  for (int n = blockIdx.x; n < items; n += gridDim.x) {
    const Item item = ItemAt<D>(n, tiles, given);
    const int tile = kConsumers * item.tile + w;
    Row<D> rows[kRows<D>];
#pragma unroll
    for (int r = 0; r < kRows<D>; ++r) {
      warp::zero(rows[r].dk);
      warp::zero(rows[r].dv);
      if (kScaled<T> && item.row + r < given.rows) {
        rows[r].scale = LeastScale(given, (item.any_row + r) * given.heads + item.head);
      }
    }

    auto& own = shared.items[item_turn.stage];
    wait(shared.item_arrived[item_turn.stage], item_turn.parity);
    while (true) {
      const int s = turn.stage;
      wait(shared.arrived[s], turn.parity);
      turn.Next();
      const bool more = shared.more[s];
      if (more) {
#pragma unroll
        for (int r = 0; r < kRows<D>; ++r) {
          Add(rows[r], own.k[w][r], own.v[w][r], shared.q[s][r], shared.d_o[s][r],
              shared.bias[s][w], shared.negative_lse[s][r], shared.negative_delta[s][r], given);
        }
      }
      warp::sync();
      warp::arrive(shared.finished[s]);
      if (!more) break;
    }
    warp::arrive(shared.item_finished[item_turn.stage]);
    item_turn.Next();

    const int key = kTile * tile + 16 * warpgroup::warpid() + laneid() / 4;
#pragma unroll
    for (int r = 0; r < kRows<D>; ++r) {
      if (item.row + r >= given.rows) continue;
      const int any_row = static_cast<int>(item.any_row) + r;
      const unsigned keep[2] = {IsValid(given, any_row, key), IsValid(given, any_row, key + 8)};
      Pin(rows[r].dk);
      Pin(rows[r].dv);
      Store(rows[r].dk, given.scale * kLn2 / rows[r].scale, keep, shared.dk[w]);
      Store(rows[r].dv, 1.f, keep, shared.dv[w]);
      FenceAsyncProxy();
      warpgroup::sync(1 + w);
      const coord<Side<T, D>> at(any_row, tile, item.head, 0);
      warpgroup::tma::store_async<dim::DEPTH, NORMAL>(g.dk, shared.dk[w], at);
      warpgroup::tma::store_async<dim::DEPTH, NORMAL>(g.dv, shared.dv[w], at);
      warpgroup::tma::store_async_read_wait();
      warpgroup::sync(1 + w);
    }
  }
}

template <typename T, int D>
__global__ __launch_bounds__(kThreads, 1) void Keys(const __grid_constant__ Globals<T, D> g,
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
cudaError_t LaunchKeys(const Globals<T, D>& g, int processors, cudaStream_t stream) {
  const int tiles = (g.given.keys + kBlock - 1) / kBlock;
  const int items = tiles * g.given.heads * RowGroups<D>(g.given) * g.given.batch;
  return LaunchBlocks<Shared<T, D>>(Keys<T, D>, std::min(items, processors), stream, g, items,
                                    tiles);
}

GENIE_ATTEND_BACKWARD(LaunchKeys, bf16)
GENIE_ATTEND_BACKWARD(LaunchKeys, half)

}  // namespace genie::attend_backward
