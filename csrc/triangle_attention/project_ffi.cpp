#include "triangle_attention/dtypes.h"
#include "triangle_attention/project_sm90.h"

namespace genie {
namespace {

using xla::ffi::F32;
using xla::ffi::PRED;

constexpr char kEnding[] = "ending", kBiasAsZ[] = "bias_as_z", kEpsilon[] = "epsilon";
using Ending = Attr<bool, kEnding>;
using BiasAsZ = Attr<bool, kBiasAsZ>;
using Epsilon = Attr<float, kEpsilon>;

Error AttentionProjectionForward(cudaStream_t stream, AnyBuffer z, Optional<PRED, 3> mask,
                                 Buffer<F32, 1> norm_scale, Buffer<F32, 1> norm_bias,
                                 AnyBuffer q_kernel, AnyBuffer k_kernel, AnyBuffer v_kernel,
                                 AnyBuffer bias_kernel, Result<AnyBuffer> q, Result<AnyBuffer> k,
                                 Result<AnyBuffer> v, Result<AnyBuffer> bias, Ending ending,
                                 BiasAsZ bias_as_z, Epsilon epsilon) {
  if (z.dimensions().size() != 4 || q_kernel.dimensions().size() != 3) {
    return Error::InvalidArgument("z must have 4 dimensions and q_kernel 3");
  }
  const int64_t batch = z.dimensions()[0], rows = z.dimensions()[1], columns = z.dimensions()[2],
                channels = z.dimensions()[3], heads = q_kernel.dimensions()[1],
                head_width = q_kernel.dimensions()[2];
  const int64_t i = *ending ? columns : rows, j = *ending ? rows : columns;
  const int64_t queries = *bias_as_z ? rows : i, keys = *bias_as_z ? columns : j;
  for (const Error& error :
       {DtypeStatus(z, {*q, *k, *v, *bias}, {q_kernel, k_kernel, v_kernel, bias_kernel}),
        ShapeStatus("mask", {batch, rows, columns}, mask),
        ShapeStatus("norm_scale and norm_bias", {channels}, norm_scale, norm_bias),
        ShapeStatus("q_kernel, k_kernel and v_kernel", {channels, heads, head_width}, q_kernel,
                    k_kernel, v_kernel),
        ShapeStatus("bias_kernel", {channels, heads}, bias_kernel),
        ShapeStatus("q, k and v", {batch, i, j, heads, head_width}, *q, *k, *v),
        ShapeStatus("bias", {batch, heads, queries, BiasColumns(keys)}, *bias)}) {
    if (error.failure()) return error;
  }
  if (z.element_count() == 0) return Error::Success();
  return Launched<AttentionProjection>({.z = z.untyped_data(),
                                        .mask = MaskOrNull(mask),
                                        .q = q->untyped_data(),
                                        .k = k->untyped_data(),
                                        .v = v->untyped_data(),
                                        .bias = bias->untyped_data(),
                                        .dtype = FloatOf(z.element_type()),
                                        .norm_scale = norm_scale.typed_data(),
                                        .norm_bias = norm_bias.typed_data(),
                                        .q_kernel = q_kernel.untyped_data(),
                                        .k_kernel = k_kernel.untyped_data(),
                                        .v_kernel = v_kernel.untyped_data(),
                                        .bias_kernel = bias_kernel.untyped_data(),
                                        .kernel_dtype = FloatOf(q_kernel.element_type()),
                                        .batch = batch,
                                        .rows = rows,
                                        .columns = columns,
                                        .channels = static_cast<int>(channels),
                                        .heads = static_cast<int>(heads),
                                        .head_width = static_cast<int>(head_width),
                                        .ending = *ending,
                                        .bias_as_z = *bias_as_z,
                                        .epsilon = *epsilon},
                                       stream, channels, " channels and ", heads, " heads of ",
                                       head_width);
}

const Register<AttentionProjectionForward> forward("genie_attention_project_fwd");

}  // namespace
}  // namespace genie
