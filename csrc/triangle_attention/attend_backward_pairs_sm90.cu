// The pairs pass: dbias, the sum of dS over rows i. A block owns 128 queries and 128 keys of a head
// and keeps their sums in registers while it walks the rows, with the bias in shared memory. Two
// products of 64 FLOP at D = 32, an exponential and about six instructions a logit.
#include "triangle_attention/attend_backward.cuh"

namespace genie::attend_backward {
namespace {

constexpr int kHalves = kBlock / kTile;  // tiles of keys, which a consumer takes in turn

template <typename T, int D>
struct Shared {
  static constexpr int kStages = D == 64 ? 2 : 4;
  Side<T, D> q[kStages][kConsumers], d_o[kStages][kConsumers];
  Side<T, D> k[kStages][kHalves], v[kStages][kHalves];
  Bias<T> bias[kConsumers][kHalves];
  float negative_lse[kStages][kBlock], negative_delta[kStages][kBlock];
  T hidden[kStages][kBlock];
  bool more[kStages];  // false: no row, the block ends
  semaphore arrived[kStages], finished[kStages], bias_arrived;
};

// What a block works on.
struct Place {
  int key_block, query_block, head, batch, chunk;
  int64_t first_row, end_row;  // of [B I]
};

__device__ inline Place PlaceOf(const AttendBackward& given) {
  Place place;
  int index = blockIdx.x;
  const int key_blocks = (given.keys + kBlock - 1) / kBlock;
  const int query_blocks = (given.queries + kBlock - 1) / kBlock;
  place.key_block = index % key_blocks, index /= key_blocks;
  place.query_block = index % query_blocks, index /= query_blocks;
  place.head = index % given.heads, index /= given.heads;
  place.batch = index % given.batch;
  place.chunk = index / given.batch;
  const int64_t first = place.batch * given.rows;
  place.first_row = first + given.rows * place.chunk / given.chunks;
  place.end_row = first + given.rows * (place.chunk + 1) / given.chunks;
  return place;
}

template <typename T, int D>
__device__ void Produce(Shared<T, D>& shared, const Globals<T, D>& g) {
  using S = Shared<T, D>;
  const AttendBackward& given = g.given;
  const Place place = PlaceOf(given);
  const int lane = laneid(), queries_padded = PaddedQueries(given.queries);
  const int64_t words = QueryWords(given.queries, given.dtype);
  Turn<S::kStages> turn;
  if (lane == 0) {
    tma::expect_bytes(shared.bias_arrived, sizeof(S::bias));
    for (int i = 0; i < kConsumers * kHalves; ++i) {
      const int w = i / kHalves, half = i % kHalves;
      tma::load_async(shared.bias[w][half], g.bias,
                      {place.batch, place.head, kConsumers * place.query_block + w,
                       kHalves * place.key_block + half},
                      shared.bias_arrived);
    }
  }

  // Lane l reads the mask of keys 2 l and 2 l + 1 of each half and the values of queries 4 l to
  // 4 l + 3, a row ahead of their use.
  const int key = kBlock * place.key_block + 2 * lane;
  const int query = kBlock * place.query_block + 4 * lane;
  KeyPair next[kHalves];
  float4 next_lse, next_delta;
  const auto read = [&](int64_t row) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) next[half].Read(given, row, key + kTile * half);
    const float* from = given.query_rows + (row * given.heads + place.head) * words;
    from += min(query, queries_padded - 4);
    next_lse = __ldg(reinterpret_cast<const float4*>(from));
    next_delta = __ldg(reinterpret_cast<const float4*>(from + queries_padded));
  };
  if (place.first_row < place.end_row) read(place.first_row);
  for (int64_t row = place.first_row; row <= place.end_row; ++row) {
    const bool ends = row == place.end_row;
    uint32_t hidden[kHalves];
    bool any_valid = ends;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      hidden[half] = next[half].template Hidden<T>(given, key + kTile * half);
      any_valid |= hidden[half] != HiddenPair<T>(false, false);
    }
    // Queries past the padded end have zero d_o and q; they read as rows without keys.
    constexpr float kNone = -INFINITY;
    const bool reads = query < queries_padded;
    const float4 lse = reads ? next_lse : float4{kNone, kNone, kNone, kNone};
    const float4 delta = reads ? next_delta : float4{};
    if (row + 1 < place.end_row) read(row + 1);
    if (!__any_sync(~0u, any_valid)) continue;
    const int s = turn.stage;
    wait(shared.finished[s], turn.parity ^ 1);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      reinterpret_cast<uint32_t*>(shared.hidden[s])[WARP_THREADS * half + lane] = hidden[half];
    }
    reinterpret_cast<float4*>(shared.negative_lse[s])[lane] = lse;
    reinterpret_cast<float4*>(shared.negative_delta[s])[lane] = delta;
    if (lane == 0) shared.more[s] = !ends;
    warp::sync();
    if (lane == 0 && ends) arrive(shared.arrived[s]);
    if (lane == 0 && !ends) {
      auto& arrived = shared.arrived[s];
      tma::expect_bytes(arrived, 4 * sizeof(S::q[0]));
      const int any_row = static_cast<int>(row);
#pragma unroll 1
      for (int i = 0; i < kConsumers; ++i) {
        const coord<Side<T, D>> queries(any_row, kConsumers * place.query_block + i, place.head, 0);
        tma::load_async<dim::DEPTH, NORMAL>(shared.q[s][i], g.q, queries, arrived);
        tma::load_async<dim::DEPTH, NORMAL>(shared.d_o[s][i], g.d_o, queries, arrived);
        const coord<Side<T, D>> keys(any_row, kHalves * place.key_block + i, place.head, 0);
        tma::load_async<dim::DEPTH, NORMAL>(shared.k[s][i], g.k, keys, arrived);
        tma::load_async<dim::DEPTH, NORMAL>(shared.v[s][i], g.v, keys, arrived);
      }
    }
    turn.Next();
  }
}

// Adds dS of one row i.
template <typename T, int D>
__device__ void Add(rt_fl<16, kTile>& sums, const Side<T, D>& q, const Side<T, D>& d_o,
                    const Side<T, D>& k, const Side<T, D>& v, Bias<T>& bias, const T* hidden,
                    const float (&negative_lse)[2], const float (&negative_delta)[2],
                    const AttendBackward& given) {
  rt_fl<16, kTile> p, dp;
  WeighPairs(p, dp, q, d_o, k, v, bias, hidden, negative_lse, given);
#pragma unroll
  for (int j = 0; j < kTile / 16; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 weight = p.tiles[0][j].data[i], x = dp.tiles[0][j].data[i];
      float2& sum = sums.tiles[0][j].data[i];
      sum.x = fmaf(weight.x, x.x + negative_delta[i % 2], sum.x);
      sum.y = fmaf(weight.y, x.y + negative_delta[i % 2], sum.y);
    }
  }
}

// Writes 64 x 64 sums, of which those past the end of either axis are no one's.
__device__ inline void Store(const rt_fl<16, kTile>& sums, float* to, int query, int key,
                             int queries, int keys_padded, float scale) {
#pragma unroll
  for (int j = 0; j < kTile / 16; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int row = query + 8 * (k % 2), column = key + 16 * j + 8 * (k / 2);
      const float2 x = sums.tiles[0][j].data[k];
      if (row < queries && column < keys_padded) {
        *reinterpret_cast<float2*>(to + int64_t{row} * keys_padded + column) = {scale * x.x,
                                                                                scale * x.y};
      }
    }
  }
}

template <typename T, int D>
__device__ void Consume(Shared<T, D>& shared, const Globals<T, D>& g) {
  using S = Shared<T, D>;
  const AttendBackward& given = g.given;
  const int w = warpgroupid();
  const int query = kTile * w + 16 * warpgroup::warpid() + laneid() / 4;  // in the block
  rt_fl<16, kTile> sums[kHalves];
#pragma unroll
  for (auto& tile : sums) warp::zero(tile);
  Turn<S::kStages> turn;
  wait(shared.bias_arrived, 0);
  while (true) {
    const int s = turn.stage;
    wait(shared.arrived[s], turn.parity);
    turn.Next();
    if (!shared.more[s]) break;
    const float lse[2] = {shared.negative_lse[s][query], shared.negative_lse[s][query + 8]};
    const float delta[2] = {shared.negative_delta[s][query], shared.negative_delta[s][query + 8]};
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      Add(sums[half], shared.q[s][w], shared.d_o[s][w], shared.k[s][half], shared.v[s][half],
          shared.bias[w][half], &shared.hidden[s][kTile * half], lse, delta, given);
    }
    warp::sync();
    warp::arrive(shared.finished[s]);
  }

  const Place place = PlaceOf(given);
  const int64_t matrix = given.queries * given.keys_padded;
  const int64_t plane = (int64_t{place.chunk} * given.batch + place.batch) * given.heads;
  float* to = given.chunks > 1 ? given.chunk_sums : given.d_bias;
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    Store(sums[half], to + (plane + place.head) * matrix, kBlock * place.query_block + query,
          kBlock * place.key_block + kTile * half + 2 * (laneid() % 4), given.queries,
          given.keys_padded, given.bias_scale * kLn2);
  }
}

template <typename T, int D>
__global__ __launch_bounds__(kThreads, 1) void Pairs(const __grid_constant__ Globals<T, D> g) {
  extern __shared__ alignment_dummy __shm[];
  shared_allocator allocator(reinterpret_cast<int*>(&__shm[0]));
  auto& shared = allocator.template allocate<Shared<T, D>>();
  if (threadIdx.x == 0) {
    for (auto& s : shared.arrived) init_semaphore(s, 0, 1);
    for (auto& s : shared.finished) init_semaphore(s, kArrivals, 0);
    init_semaphore(shared.bias_arrived, 0, 1);
  }
  everyone::sync(0);

  if (warpgroupid() == kConsumers) {
    warpgroup::decrease_registers<kProducerRegisters>();
    if (warpgroup::warpid() == 0) Produce(shared, g);
  } else {
    warpgroup::increase_registers<kConsumerRegisters>();
    Consume(shared, g);
  }
}

// Adds the sums of the chunks in order.
static __global__ void AddChunks(const float4* from, float4* to, int64_t size, int chunks) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += step) {
    float4 sum = from[i];
    for (int chunk = 1; chunk < chunks; ++chunk) {
      const float4 x = from[chunk * size + i];
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    to[i] = sum;
  }
}

}  // namespace

template <typename T, int D>
cudaError_t LaunchPairs(const Globals<T, D>& g, int processors, cudaStream_t stream) {
  const AttendBackward& given = g.given;
  const int64_t blocks = (given.queries + kBlock - 1) / kBlock *
                         ((given.keys + kBlock - 1) / kBlock) * given.heads * given.batch *
                         given.chunks;
  if (blocks >= int64_t{1} << 31) return cudaErrorInvalidValue;
  const cudaError_t status = LaunchBlocks<Shared<T, D>>(Pairs<T, D>, blocks, stream, g);
  if (status != cudaSuccess || given.chunks == 1) return status;
  const int64_t size = given.batch * given.heads * given.queries * given.keys_padded / 4;
  AddChunks<<<static_cast<unsigned>(std::min<int64_t>((size + 255) / 256, 8 * processors)), 256, 0,
              stream>>>(reinterpret_cast<const float4*>(given.chunk_sums),
                        reinterpret_cast<float4*>(given.d_bias), size, given.chunks);
  return cudaGetLastError();
}

GENIE_ATTEND_BACKWARD(LaunchPairs, bf16)
GENIE_ATTEND_BACKWARD(LaunchPairs, half)

}  // namespace genie::attend_backward
