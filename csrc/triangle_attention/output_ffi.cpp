#include "triangle_attention/dtypes.h"
#include "triangle_attention/output_sm90.h"

namespace genie {
namespace {

using xla::ffi::F32;
using xla::ffi::PRED;

constexpr char kEnding[] = "ending", kResidual[] = "residual", kEpsilon[] = "epsilon";
using Ending = Attr<bool, kEnding>;
using Residual = Attr<bool, kResidual>;
using Epsilon = Attr<float, kEpsilon>;

Error AttentionOutputForward(cudaStream_t stream, AnyBuffer o, AnyBuffer z, Optional<PRED, 3> mask,
                             Buffer<F32, 1> norm_scale, Buffer<F32, 1> norm_bias,
                             AnyBuffer gate_kernel, AnyBuffer out_kernel,
                             Optional<F32, 2> gate_bias, Optional<F32, 1> out_bias,
                             Result<AnyBuffer> out, Ending ending, Residual residual,
                             Epsilon epsilon) {
  if (z.dimensions().size() != 4 || gate_kernel.dimensions().size() != 3) {
    return Error::InvalidArgument("z must have 4 dimensions and gate_kernel 3");
  }
  const int64_t batch = z.dimensions()[0], rows = z.dimensions()[1], columns = z.dimensions()[2],
                channels = z.dimensions()[3], heads = gate_kernel.dimensions()[1],
                head_width = gate_kernel.dimensions()[2];
  const int64_t i = *ending ? columns : rows, j = *ending ? rows : columns;
  for (const Error& error :
       {DtypeStatus(z, {o, *out}, {gate_kernel, out_kernel}),
        ShapeStatus("o", {batch, i, j, heads, head_width}, o),
        ShapeStatus("mask", {batch, rows, columns}, mask),
        ShapeStatus("norm_scale and norm_bias", {channels}, norm_scale, norm_bias),
        ShapeStatus("gate_kernel", {channels, heads, head_width}, gate_kernel),
        ShapeStatus("out_kernel", {heads, head_width, channels}, out_kernel),
        ShapeStatus("gate_bias", {heads, head_width}, gate_bias),
        ShapeStatus("out_bias", {channels}, out_bias),
        ShapeStatus("out", {batch, rows, columns, channels}, *out)}) {
    if (error.failure()) return error;
  }
  if (z.element_count() == 0) return Error::Success();
  return Launched<AttentionOutput>({.o = o.untyped_data(),
                                    .z = z.untyped_data(),
                                    .mask = MaskOrNull(mask),
                                    .out = out->untyped_data(),
                                    .dtype = FloatOf(z.element_type()),
                                    .norm_scale = norm_scale.typed_data(),
                                    .norm_bias = norm_bias.typed_data(),
                                    .gate_kernel = gate_kernel.untyped_data(),
                                    .out_kernel = out_kernel.untyped_data(),
                                    .kernel_dtype = FloatOf(gate_kernel.element_type()),
                                    .gate_bias = DataOrNull(gate_bias),
                                    .out_bias = DataOrNull(out_bias),
                                    .batch = batch,
                                    .rows = rows,
                                    .columns = columns,
                                    .channels = static_cast<int>(channels),
                                    .hidden = static_cast<int>(heads * head_width),
                                    .ending = *ending,
                                    .residual = *residual,
                                    .epsilon = *epsilon},
                                   stream, channels, " channels and heads of ", heads * head_width,
                                   " in all");
}

const Register<AttentionOutputForward> forward("genie_attention_output_fwd");

}  // namespace
}  // namespace genie
