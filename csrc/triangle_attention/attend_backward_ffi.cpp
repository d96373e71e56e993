#include <cmath>

#include "ffi.h"
#include "triangle_attention/attend_backward_sm90.h"

namespace genie {
namespace {

using xla::ffi::F32;
using xla::ffi::PRED;

constexpr char kFolded[] = "folded";
using Folded = Attr<bool, kFolded>;

constexpr int64_t kKeysUnit = 8;  // rows of the bias are padded to a multiple of it
constexpr float kLog2E = 1.4426950408889634f;

Error DtypeStatus(const AnyBuffer& q, std::initializer_list<AnyBuffer> others) {
  const DataType dtype = q.element_type();
  if (dtype != DataType::BF16 && dtype != DataType::F16) {
    return Error::InvalidArgument("q must be bfloat16 or float16");
  }
  for (const AnyBuffer& other : others) {
    if (!IsAbsent(other) && other.element_type() != dtype) {
      return Error::InvalidArgument("k, v, bias, o, d_o, dq, dk and dv must have q's dtype");
    }
  }
  return Error::Success();
}

// Without a bias, d_bias and chunk_sums have no elements. The first size of chunk_sums says how
// many chunks of rows dbias is summed in.
Error AttendBackwardHandler(cudaStream_t stream, AnyBuffer q, AnyBuffer k, AnyBuffer v,
                            AnyBuffer bias, Optional<PRED, 3> mask, AnyBuffer o, Buffer<F32, 4> lse,
                            AnyBuffer d_o, Result<AnyBuffer> dq, Result<AnyBuffer> dk,
                            Result<AnyBuffer> dv, Result<AnyBuffer> d_bias,
                            Result<Buffer<F32, 4>> query_rows, Result<Buffer<F32, 5>> chunk_sums,
                            Folded folded) {
  if (q.dimensions().size() != 5 || k.dimensions().size() != 5) {
    return Error::InvalidArgument("q and k must have 5 dimensions");
  }
  const auto shape = q.dimensions();
  const int64_t batch = shape[0], rows = shape[1], queries = shape[2], heads = shape[3],
                head_dim = shape[4], keys = k.dimensions()[2],
                padded = (keys + kKeysUnit - 1) / kKeysUnit * kKeysUnit,
                chunks = chunk_sums->dimensions()[0];
  const bool with_bias = !IsAbsent(bias);
  const Float dtype = q.element_type() == DataType::F16 ? Float::kF16 : Float::kBf16;
  const auto like_bias = {batch, heads, queries, padded};
  for (const Error& error :
       {DtypeStatus(q, {k, v, bias, o, d_o, *dq, *dk, *dv}),
        ShapeStatus("k, v, dk and dv", {batch, rows, keys, heads, head_dim}, k, v, *dk, *dv),
        ShapeStatus("o, d_o and dq", {batch, rows, queries, heads, head_dim}, o, d_o, *dq),
        ShapeStatus("mask", {batch, rows, keys}, mask),
        ShapeStatus("lse", {batch, rows, heads, queries}, lse),
        ShapeStatus("query_rows", {batch, rows, heads, QueryWords(queries, dtype)}, *query_rows),
        with_bias ? ShapeStatus("bias and d_bias", like_bias, bias, *d_bias) : Error::Success(),
        with_bias && chunks > 1
            ? ShapeStatus("chunk_sums", {chunks, batch, heads, queries, padded}, *chunk_sums)
            : Error::Success()}) {
    if (error.failure()) return error;
  }
  if (with_bias && d_bias->element_type() != DataType::F32) {
    return Error::InvalidArgument("d_bias must be float32");
  }
  return Launched<AttendBackward>(
      {.q = q.untyped_data(),
       .k = k.untyped_data(),
       .v = v.untyped_data(),
       .bias = with_bias ? bias.untyped_data() : nullptr,
       .mask = MaskOrNull(mask),
       .o = o.untyped_data(),
       .lse = lse.typed_data(),
       .d_o = d_o.untyped_data(),
       .dq = dq->untyped_data(),
       .dk = dk->untyped_data(),
       .dv = dv->untyped_data(),
       .d_bias = with_bias ? static_cast<float*>(d_bias->untyped_data()) : nullptr,
       .query_rows = query_rows->typed_data(),
       .chunk_sums = chunk_sums->typed_data(),
       .dtype = dtype,
       .batch = batch,
       .rows = rows,
       .queries = queries,
       .keys = keys,
       .keys_padded = padded,
       .heads = static_cast<int>(heads),
       .head_dim = static_cast<int>(head_dim),
       .chunks = static_cast<int>(chunks),
       .scale = *folded ? 1.f : kLog2E / std::sqrt(static_cast<float>(head_dim)),
       .bias_scale = *folded ? 1.f : kLog2E},
      stream, "heads of ", head_dim, " channels over ", keys, " keys");
}

const Register<AttendBackwardHandler> backward("genie_pair_attention_bwd");

}  // namespace
}  // namespace genie
