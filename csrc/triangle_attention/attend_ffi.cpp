#include "ffi.h"
#include "triangle_attention/attend_sm90.h"

namespace genie {
namespace {

using xla::ffi::F32;

constexpr char kFolded[] = "folded";
using Folded = Attr<bool, kFolded>;

constexpr int64_t kKeysUnit = 8;  // rows of the bias are padded to a multiple of it

// An error unless q has 16 bits, the others are like it and the mask has bytes.
Error DtypeStatus(const AnyBuffer& q, std::initializer_list<AnyBuffer> others,
                  const AnyBuffer& mask) {
  const DataType dtype = q.element_type();
  if (dtype != DataType::BF16 && dtype != DataType::F16) {
    return Error::InvalidArgument("q must be bfloat16 or float16");
  }
  for (const AnyBuffer& other : others) {
    if (!IsAbsent(other) && other.element_type() != dtype) {
      return Error::InvalidArgument("k, v, bias and o must have q's dtype");
    }
  }
  const DataType mask_dtype = mask.element_type();
  if (!IsAbsent(mask) && mask_dtype != DataType::PRED && mask_dtype != DataType::U8) {
    return Error::InvalidArgument("mask must be bool or uint8");
  }
  return Error::Success();
}

// A result lse of no element is not wanted.
Error PairAttentionForward(cudaStream_t stream, AnyBuffer q, AnyBuffer k, AnyBuffer v,
                           AnyBuffer bias, AnyBuffer mask, Result<AnyBuffer> o,
                           Result<Buffer<F32, 4>> lse, Folded folded) {
  if (q.dimensions().size() != 5 || k.dimensions().size() != 5) {
    return Error::InvalidArgument("q and k must have 5 dimensions");
  }
  const auto shape = q.dimensions();
  const int64_t batch = shape[0], rows = shape[1], queries = shape[2], heads = shape[3],
                head_dim = shape[4], keys = k.dimensions()[2],
                padded = (keys + kKeysUnit - 1) / kKeysUnit * kKeysUnit;
  const bool with_bias = !IsAbsent(bias), with_mask = !IsAbsent(mask),
             with_lse = lse->element_count() > 0;
  for (const Error& error :
       {DtypeStatus(q, {k, v, bias, *o}, mask),
        ShapeStatus("k and v", {batch, rows, keys, heads, head_dim}, k, v),
        with_bias ? ShapeStatus("bias", {batch, heads, queries, padded}, bias) : Error::Success(),
        with_mask ? ShapeStatus("mask", {batch, rows, keys}, mask) : Error::Success(),
        ShapeStatus("o", {batch, rows, queries, heads, head_dim}, *o),
        with_lse ? ShapeStatus("lse", {batch, rows, heads, queries}, *lse) : Error::Success()}) {
    if (error.failure()) return error;
  }
  if (o->element_count() == 0) return Error::Success();
  return Launched<PairAttention>(
      {.q = q.untyped_data(),
       .k = k.untyped_data(),
       .v = v.untyped_data(),
       .bias = with_bias ? bias.untyped_data() : nullptr,
       .mask = with_mask ? static_cast<const uint8_t*>(mask.untyped_data()) : nullptr,
       .o = o->untyped_data(),
       .lse = with_lse ? lse->typed_data() : nullptr,
       .half = q.element_type() == DataType::F16,
       .folded = *folded,
       .batch = batch,
       .rows = rows,
       .queries = queries,
       .keys = keys,
       .heads = heads,
       .head_dim = head_dim},
      stream, "heads of ", head_dim, " channels over ", keys, " keys");
}

const Register<PairAttentionForward> forward("genie_pair_attention_fwd");

}  // namespace
}  // namespace genie
