// The backward of the attention core in three passes over all logits, each of which recomputes
// P and dS and keeps one set of sums in registers: dq, then dk and dv, then dbias.
// docs/kernels/triangle_attention_backward.md counts what each costs.
#include "triangle_attention/attend_backward.cuh"

namespace genie {
namespace attend_backward {
namespace {

template <typename T, int D>
Globals<T, D> GlobalsOf(const AttendBackward& a) {
  const size_t batch = a.batch, rows = a.batch * a.rows, queries = a.queries, keys = a.keys;
  const size_t heads = a.heads, padded = a.keys_padded;
  const auto side = [&](const void* pointer, size_t length) {
    return Sides<T, D>(static_cast<T*>(const_cast<void*>(pointer)), rows, length, heads, nullptr);
  };
  // Without a bias nothing is loaded through its descriptor, which still has to be a valid one.
  T* bias = static_cast<T*>(const_cast<void*>(a.bias ? a.bias : a.q));
  return {.q = side(a.q, queries),
          .k = side(a.k, keys),
          .v = side(a.v, keys),
          .o = side(a.o, queries),
          .d_o = side(a.d_o, queries),
          .dq = side(a.dq, queries),
          .dk = side(a.dk, keys),
          .dv = side(a.dv, keys),
          .bias = a.bias ? Biases<T>(bias, batch, heads, queries, padded)
                         : Biases<T>(bias, size_t{1}, size_t{1}, size_t{1}, size_t{8}),
          .given = a};
}

template <typename T, int D>
cudaError_t LaunchAll(const AttendBackward& attend, int processors, cudaStream_t stream) {
  try {
    const auto globals = GlobalsOf<T, D>(attend);
    cudaError_t status = LaunchQueries(globals, processors, stream);
    if (status == cudaSuccess) status = LaunchKeys(globals, processors, stream);
    if (status == cudaSuccess && attend.bias) status = LaunchPairs(globals, processors, stream);
    return status;
  } catch (const std::runtime_error&) {  // a stride or a size is beyond TMA
    return cudaErrorInvalidValue;
  }
}

template <typename T>
cudaError_t LaunchFor(const AttendBackward& attend, int processors, cudaStream_t stream) {
  if (attend.head_dim == 16) return LaunchAll<T, 16>(attend, processors, stream);
  if (attend.head_dim == 32) return LaunchAll<T, 32>(attend, processors, stream);
  if (attend.head_dim == 64) return LaunchAll<T, 64>(attend, processors, stream);
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace attend_backward

cudaError_t Launch(const AttendBackward& attend, cudaStream_t stream) {
  using namespace attend_backward;
  const int64_t blocks = attend.batch * attend.rows * attend.heads *
                         (std::max(attend.queries, attend.keys) / kBlock + 1);
  const bool sizes = attend.batch >= 1 && attend.rows >= 1 && attend.queries >= 1 &&
                     attend.keys >= 1 && attend.heads >= 1 && blocks < int64_t{1} << 31;
  const bool bias =
      !attend.bias || (attend.keys_padded >= attend.keys && attend.keys_padded % 8 == 0 &&
                       attend.d_bias && attend.chunks >= 1 && attend.chunks <= attend.rows &&
                       (attend.chunk_sums || attend.chunks == 1));
  if (!sizes || !bias) return cudaErrorInvalidValue;
  int device, processors;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  if (attend.dtype == Float::kBf16) return LaunchFor<bf16>(attend, processors, stream);
  if (attend.dtype == Float::kF16) return LaunchFor<half>(attend, processors, stream);
  return cudaErrorInvalidValue;
}

}  // namespace genie
