// Derivative of the gated output: reads z, t and d_out once, writes dz and dt once; at C = Hm = 128
// that is 1280 bytes and 197 kFLOP a pair, so HBM sets the time if the products hide behind it.
//
// With x = normal(z) and y = normal(t), LayerNorm without scale and bias, which go into the
// weights:
//   s = x Wg, p = y Wo, g = sigmoid(s), dp = d_out g, ds = d_out p g (1 - g),
//   dz = (ds Wg^T - x mean(ds s)) / deviation, dt = (dp Wo^T - y mean(dp p)) / deviation.
// The columns of both weights are centred: x and y sum to zero over channels, so that s and p stay
// as they are, and the derivative's mean over channels is zero already.
//
// Persistent blocks of two kinds of warpgroups. Mains take whole tiles of 64 pairs: they write x, y
// and dp over z, t and d_out in shared memory, ds beside them, and at last dz and dt over x and y,
// from where they leave. Summers keep x^T ds and y^T dp of all the block's tiles in registers; a
// kernel of its own adds the blocks' sums and makes the gradients of the weights.
#include <stdexcept>

#include "triangle_multiplication/output_backward_main.cuh"
#include "triangle_multiplication/output_backward_sum.cuh"
#include "triangle_multiplication/output_backward_weights.cuh"

namespace genie {
namespace output_backward {
namespace {

// Rows past I of this batch entry's dt, by all threads of its blocks.
template <typename Contraction>
__device__ void ZeroPaddedRows(const Contraction& dt, int batch, int rows) {
  const int64_t row_vectors = dt.cols() * sizeof(typename Contraction::T) / sizeof(uint4);
  const int64_t padded = dt.rows() - rows, size = dt.depth() * padded * row_vectors;
  auto* base = reinterpret_cast<uint4*>(dt.raw_ptr) + batch * dt.depth() * dt.rows() * row_vectors;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t h = i / (padded * row_vectors), at = i % (padded * row_vectors);
    base[(h * dt.rows() + rows) * row_vectors + at] = uint4{};
  }
}

template <typename T, int C, int H, typename S = Shape<T, C, H>>
__global__ __launch_bounds__(S::kThreads,
                             1) void OutputBackward(const __grid_constant__ Globals<T, C, H> g) {
  extern __shared__ alignment_dummy __shm[];
  shared_allocator allocator(reinterpret_cast<int*>(&__shm[0]));
  const Block<T, C, H> block(allocator.template allocate<typename S::Shared>(), g);

  // The first tiles are on their way while the weights are converted.
  if (threadIdx.x == 0) block.Start();
  FillParameters<T, C, H>(block.shared, g.given.of);
  ZeroPaddedRows(g.dt, block.batch, g.given.of.rows);
  everyone::sync(0);

  if (warpgroupid() >= S::kMains) {
    if constexpr (S::kMains == 2) warpgroup::increase_registers<S::kSummerRegisters>();
    SumRole<T, C, H>{block}.Run(warpgroupid() == S::kMains);
  } else {
    if constexpr (S::kMains == 2) warpgroup::decrease_registers<S::kMainRegisters>();
    MainRole<T, C, H>{block}.Run();
  }
}

template <typename T, int C, int H>
cudaError_t LaunchFor(const GatedOutputBackward& p, cudaStream_t stream) {
  using S = Shape<T, C, H>;
  using G = Globals<T, C, H>;
  constexpr int kShared = sizeof(typename S::Shared) + 1024;
  const auto kernel = OutputBackward<T, C, H>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (status != cudaSuccess) return status;

  const GatedOutput& of = p.of;
  const int column_tiles = (of.columns + kPairs - 1) / kPairs;
  const int64_t tiles = of.rows * column_tiles;
  if (tiles * of.batch >= int64_t{1} << 30) return cudaErrorInvalidValue;
  const size_t all_rows = of.batch * of.rows, columns = of.columns, batch = of.batch;
  const size_t rows_padded = of.rows_padded, columns_padded = of.columns_padded;
  const auto contraction = [&](const void* t) -> typename G::Contraction {
    using Contracted = typename S::Contracted;
    return {Data<Contracted>(t), batch, nullptr, rows_padded, columns_padded};
  };
  try {
    const G globals = {.z = {Data<T>(of.z), nullptr, all_rows, columns, nullptr},
                       .dz = {Data<T>(p.dz), nullptr, all_rows, columns, nullptr},
                       .d_out = {Data<T>(p.d_out), nullptr, all_rows, columns, nullptr},
                       .t = contraction(of.t),
                       .dt = contraction(p.dt),
                       .given = p,
                       .tiles = static_cast<int>(tiles),
                       .column_tiles = column_tiles};
    const dim3 grid(p.blocks, of.batch);
    kernel<<<grid, S::kThreads, kShared, stream>>>(globals);
  } catch (const std::runtime_error&) {  // a stride or a size is beyond TMA
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t LaunchFor(const GatedOutputBackward& p, cudaStream_t stream) {
  return ForSize<64, 128>(p.of.channels, [&](auto c) {
    return ForSize<64, 128>(p.of.hidden, [&](auto h) { return LaunchFor<T, c, h>(p, stream); });
  });
}

}  // namespace
}  // namespace output_backward

cudaError_t Launch(const GatedOutputBackward& p, cudaStream_t stream) {
  const GatedOutput& of = p.of;
  const bool sizes = of.batch >= 1 && of.batch < 65536 && of.rows >= 0 && of.columns >= 0 &&
                     of.rows_padded == (of.rows + 7) / 8 * 8 &&
                     of.columns_padded == (of.columns + 7) / 8 * 8 &&
                     of.columns < int64_t{1} << 31 && p.blocks >= 1;
  const bool types = of.kernel_dtype == Float::kF32 || of.kernel_dtype == of.dtype;
  const auto kernels =
      reinterpret_cast<uintptr_t>(of.proj_kernel) | reinterpret_cast<uintptr_t>(of.gate_kernel);
  if (!sizes || !types || kernels % sizeof(uint4) != 0) return cudaErrorInvalidValue;
  if (of.rows == 0 || of.columns == 0) {  // the reduction then adds nothing but zeros
    GatedOutputBackward empty = p;
    empty.blocks = 0;
    return LaunchReduction(empty, stream);
  }
  const cudaError_t status =
      of.dtype == Float::kBf16  ? output_backward::LaunchFor<kittens::bf16>(p, stream)
      : of.dtype == Float::kF16 ? output_backward::LaunchFor<kittens::half>(p, stream)
                                : cudaErrorInvalidValue;
  return status == cudaSuccess ? LaunchReduction(p, stream) : status;
}

}  // namespace genie
