// Backward of the gated projection: reads z, da, db and dz_in once, writes dz once and multiplies
// every pair by 12 matrices of [C, Hm]; at C = Hm = 128 that is 1280 bytes and 393 kFLOP a pair, so
// the tensor cores are busy a little longer than HBM.
//
// The weights' gradients, [C, 2 Hm] twice in float32, fill the registers of two processors, so a
// cluster of two blocks walks the same tiles of 64 pairs, each with its slice of 128 hidden
// columns; they finish dz of every other tile in turn, from both parts of dx. More than 256 hidden
// columns are more launches, each adding to the last one's dz. The roles of a block's three
// warpgroups are told in project_backward_block.cuh.
#include <algorithm>
#include <stdexcept>

#include "triangle_multiplication/project_backward_gate.cuh"
#include "triangle_multiplication/project_backward_sum.cuh"

namespace genie {
namespace {

// Fills two tiles, `stride` tiles apart, with half of the norm's scale times the kernel, and `sums`
// with parts of half of the norm's bias times the kernel: a row of threads a part.
template <int kThreads, typename Weight, typename Stored>
__device__ void FillWeights(Weight* tiles, int stride, float (*sums)[kSlice], const Stored* kernel,
                            const GatedProjection& given) {
  using T = typename Weight::T;
  constexpr int kVector = 8;  // elements of a 16-byte chunk of a tile's row
  constexpr int kRowVectors = kSlice / kVector, kParts = kThreads / kRowVectors;
  constexpr int kLoads = kVector * sizeof(Stored) / sizeof(uint4);
  const int part = threadIdx.x / kRowVectors, column = threadIdx.x % kRowVectors * kVector;
  constexpr int kRows = (Weight::rows + kParts - 1) / kParts;
  uint4 raw[kRows][kLoads];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {  // all on their way before the first is used
    const auto* from = reinterpret_cast<const uint4*>(
        kernel + min(part + i * kParts, Weight::rows - 1) * 2 * given.hidden + column);
#pragma unroll
    for (int j = 0; j < kLoads; ++j) raw[i][j] = __ldg(from + j);
  }
  float offsets[kVector] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = part + i * kParts;
    if (row >= Weight::rows) break;
    const float scale = 0.5f * given.norm_scale[row], bias = 0.5f * given.norm_bias[row];
    uint4 packed;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float w =
          base_types::convertor<float, Stored>::convert(reinterpret_cast<const Stored*>(raw[i])[j]);
      offsets[j] += bias * w;
      reinterpret_cast<T*>(&packed)[j] = base_types::convertor<T, float>::convert(scale * w);
    }
    *reinterpret_cast<uint4*>(&tiles[column / kHidden * stride][{row, column % kHidden}]) = packed;
  }
#pragma unroll
  for (int j = 0; j < kVector; ++j) sums[part][column + j] = offsets[j];
}

// The block's weights and biases, by all threads.
template <typename T, int C>
__device__ void FillParameters(typename BackwardShape<T, C>::Shared& shared,
                               const GatedProjection& given, int first_column) {
  constexpr int kThreads = BackwardShape<T, C>::kThreads;
  const auto fill = [&](auto& tile, auto* sums, const void* kernel) {
    if (given.kernel_dtype == Float::kF32) {
      FillWeights<kThreads>(&tile, 2, sums, static_cast<const float*>(kernel) + first_column,
                            given);
    } else {
      FillWeights<kThreads>(&tile, 2, sums, static_cast<const T*>(kernel) + first_column, given);
    }
  };
  fill(shared.weight[0].gate, shared.scratch[0], given.gate_kernel);
  fill(shared.weight[0].proj, shared.scratch[1], given.proj_kernel);
  FenceAsyncProxy();
  everyone::sync(0);

  if (threadIdx.x < 2 * kSlice) {
    const int which = threadIdx.x / kSlice, column = threadIdx.x % kSlice;
    const float* bias = which ? given.proj_bias : given.gate_bias;
    float sum = bias ? 0.5f * bias[first_column + column] : 0.f;
    for (const auto& part : shared.scratch[which]) sum += part[column];
    shared.bias[column / kHidden][which * kHidden + column % kHidden] = sum;
  }
  FenceAsyncProxy();
}

template <typename T, int C>
__device__ void InitSemaphores(typename BackwardShape<T, C>::Shared& shared) {
  using S = BackwardShape<T, C>;
  for (int stage = 0; stage < S::kStages; ++stage) {
    init_semaphore(shared.z_arrived[stage], 0, 1);
    init_semaphore(shared.x_ready[stage], S::kSumWarps);
  }
  for (auto& arrived : shared.upstream_arrived) init_semaphore(arrived, 0, 1);
  for (auto& ready : shared.gradient_ready) init_semaphore(ready, 1);
  init_semaphore(shared.dx_ready, WARPGROUP_WARPS);
  init_semaphore(shared.dx_left, S::kSumWarps);
  init_semaphore(shared.part_arrived, 0, 1);
  init_semaphore(shared.part_left, 1);
}

template <typename T, int C, typename S = BackwardShape<T, C>>
__global__ __launch_bounds__(S::kThreads,
                             1) void Backward(const __grid_constant__ BackwardGlobals<T, C> g) {
  extern __shared__ __align__(1024) char memory[];  // all there is: no room to align by hand
  auto& shared = *reinterpret_cast<typename S::Shared*>(memory);

  const int parts = g.given.parts, members = gridDim.x / parts, rank = cluster_ctarank();
  const int first = blockIdx.x / members, count = (g.tiles - first + parts - 1) / parts;
  const Share share = {static_cast<int>(blockIdx.y), first, parts, count, members, rank,
                       g.first_slice + rank};
  const Block<T, C> block = {shared, g, share};

  const bool loads = threadIdx.x == 0;
  if (loads) {
    InitSemaphores<T, C>(shared);
    for (int n = 0; n < S::kStages && n < count; ++n) block.LoadPairs(n);
    block.ExpectPart();
  }
  FillParameters<T, C>(shared, g.given.forward, kSlice * share.slice);
  everyone::tma::cluster::sync();
  if (loads) {
    for (int n = 0; n < S::kTurns && n < count; ++n) block.LoadUpstream(n);
  }

  // Every branch ends so: the other block may still write here.
  if (warpgroupid() == 2) {
    warpgroup::increase_registers<S::kGateRegisters>();
    if (count > 0) GateRole<T, C>{block}.Run();
    everyone::tma::cluster::sync();
  } else {
    warpgroup::decrease_registers<S::kSumRegisters>();
    SumRole<T, C>{block}.Run(warpgroupid() == 1);
    everyone::tma::cluster::sync();
  }
}

template <typename T, int C>
cudaError_t LaunchSlices(const GatedProjectionBackward& given, int first_slice, int members,
                         cudaStream_t stream) {
  using S = BackwardShape<T, C>;
  constexpr int kShared = sizeof(typename S::Shared);
  const GatedProjection& p = given.forward;
  const size_t batch = p.batch, rows = p.rows, columns = p.columns, hidden = p.hidden,
               rows_padded = p.rows_padded, columns_padded = p.columns_padded;
  const int column_tiles = (p.columns + kPairs - 1) / kPairs;
  const auto tensor = [](const void* data) { return static_cast<T*>(const_cast<void*>(data)); };
  try {
    const BackwardGlobals<T, C> globals = {
        .z = {tensor(p.z), nullptr, batch * rows, columns, nullptr},
        .dz = {tensor(given.dz), nullptr, batch * rows, columns, nullptr},
        .da = {tensor(given.da), batch, hidden, rows_padded, columns_padded},
        .db = {tensor(given.db), batch, hidden, rows_padded, columns_padded},
        .given = given,
        .tiles = static_cast<int>(p.rows * column_tiles),
        .column_tiles = column_tiles,
        .column_tiles_inverse = ~0u / column_tiles,
        .first_slice = first_slice,
        .adds = given.adds || first_slice > 0};
    cudaLaunchAttribute cluster = {.id = cudaLaunchAttributeClusterDimension};
    cluster.val.clusterDim = {static_cast<unsigned>(members), 1, 1};
    cudaLaunchConfig_t config = {.gridDim = dim3(given.parts * members, p.batch),
                                 .blockDim = dim3(S::kThreads),
                                 .dynamicSmemBytes = kShared,
                                 .stream = stream,
                                 .attrs = &cluster,
                                 .numAttrs = 1};
    const auto kernel = Backward<T, C>;
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
    return status != cudaSuccess ? status : cudaLaunchKernelEx(&config, kernel, globals);
  } catch (const std::runtime_error&) {  // a stride or a size is beyond TMA
    return cudaErrorInvalidValue;
  }
}

template <typename T, int C>
cudaError_t LaunchFor(const GatedProjectionBackward& given, cudaStream_t stream) {
  const int slices = 2 * given.forward.hidden / (kChunks * kHidden), members = std::min(slices, 2);
  cudaError_t status = cudaSuccess;
  for (int slice = 0; slice < slices && status == cudaSuccess; slice += members) {
    status = LaunchSlices<T, C>(given, slice, members, stream);
  }
  return status != cudaSuccess ? status : LaunchReduction(given, stream);
}

template <typename T>
cudaError_t LaunchFor(const GatedProjectionBackward& given, cudaStream_t stream) {
  if (given.forward.channels == 64) return LaunchFor<T, 64>(given, stream);
  if (given.forward.channels == 128) return LaunchFor<T, 128>(given, stream);
  return cudaErrorInvalidValue;
}

// Without a pair all gradients of parameters are zero.
cudaError_t ZeroGradients(const GatedProjectionBackward& given, cudaStream_t stream) {
  const GatedProjection& p = given.forward;
  const int64_t width = 2 * p.hidden;
  cudaError_t status = cudaSuccess;
  const auto zero = [&](float* gradient, int64_t size) {
    if (status != cudaSuccess) return;
    status = cudaMemsetAsync(gradient, 0, p.batch * size * sizeof(float), stream);
  };
  for (float* gradient : {given.d_scale, given.d_bias}) zero(gradient, p.channels);
  for (float* gradient : {given.d_proj, given.d_gate}) zero(gradient, p.channels * width);
  for (float* gradient : {given.d_proj_bias, given.d_gate_bias}) zero(gradient, width);
  return status;
}

}  // namespace

cudaError_t Launch(const GatedProjectionBackward& given, cudaStream_t stream) {
  const GatedProjection& p = given.forward;
  const bool widths = p.hidden == 64 || p.hidden == 128 || p.hidden == 256;
  const int64_t tiles = p.rows * ((p.columns + kPairs - 1) / kPairs);
  const bool sizes = p.batch >= 0 && p.batch < 1 << 16 && p.rows >= 0 && p.columns >= 0 &&
                     tiles < int64_t{1} << 30 && p.batch * p.rows < int64_t{1} << 31 &&
                     given.parts >= 1 && given.parts < int64_t{1} << 20;
  const bool types = p.kernel_dtype == Float::kF32 || p.kernel_dtype == p.dtype;
  const auto kernels =
      reinterpret_cast<uintptr_t>(p.proj_kernel) | reinterpret_cast<uintptr_t>(p.gate_kernel);
  if (!widths || !sizes || !types || kernels % sizeof(uint4) != 0) return cudaErrorInvalidValue;
  if (p.batch == 0) return cudaSuccess;
  if (p.rows == 0 || p.columns == 0) return ZeroGradients(given, stream);
  if (p.dtype == Float::kBf16) return LaunchFor<bf16>(given, stream);
  if (p.dtype == Float::kF16) return LaunchFor<half>(given, stream);
  return cudaErrorInvalidValue;
}

}  // namespace genie
