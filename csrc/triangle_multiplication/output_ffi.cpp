#include "ffi.h"
#include "triangle_multiplication/dtypes.h"
#include "triangle_multiplication/output_sm90.h"

namespace genie {
namespace {

using xla::ffi::F32;
using xla::ffi::PRED;

Error GatedOutputForward(cudaStream_t stream, AnyBuffer z, AnyBuffer t, Optional<PRED, 3> mask,
                         Buffer<F32, 1> norm_in_scale, Buffer<F32, 1> norm_in_bias,
                         Buffer<F32, 1> norm_out_scale, Buffer<F32, 1> norm_out_bias,
                         AnyBuffer proj_kernel, AnyBuffer gate_kernel, Optional<F32, 1> proj_bias,
                         Optional<F32, 1> gate_bias, Result<AnyBuffer> out, Residual residual,
                         Epsilon epsilon) {
  if (z.dimensions().size() != 4 || t.dimensions().size() != 4) {
    return Error::InvalidArgument("z and t must have 4 dimensions");
  }
  const int64_t batch = z.dimensions()[0], rows = z.dimensions()[1], columns = z.dimensions()[2],
                channels = z.dimensions()[3], hidden = t.dimensions()[1];
  const int64_t rows_padded = t.dimensions()[2], columns_padded = t.dimensions()[3];
  for (const Error& error :
       {KernelDtypeStatus(z.element_type(), proj_kernel, gate_kernel),
        OutputDtypeStatus(z.element_type(), {*out}, {t}),
        ShapeStatus("t", {batch, hidden, Padded(rows), Padded(columns)}, t),
        ShapeStatus("out", {batch, rows, columns, channels}, *out),
        ShapeStatus("mask", {batch, rows, columns}, mask),
        ShapeStatus("norm_in_scale and norm_in_bias", {channels}, norm_in_scale, norm_in_bias),
        ShapeStatus("norm_out_scale and norm_out_bias", {hidden}, norm_out_scale, norm_out_bias),
        ShapeStatus("proj_kernel", {hidden, channels}, proj_kernel),
        ShapeStatus("gate_kernel", {channels, channels}, gate_kernel),
        ShapeStatus("proj_bias and gate_bias", {channels}, proj_bias, gate_bias)}) {
    if (error.failure()) return error;
  }
  if (z.element_count() == 0) return Error::Success();
  return Launched<GatedOutput>({.z = z.untyped_data(),
                                .t = t.untyped_data(),
                                .mask = MaskOrNull(mask),
                                .out = out->untyped_data(),
                                .dtype = FloatOf(z.element_type()),
                                .norm_in_scale = norm_in_scale.typed_data(),
                                .norm_in_bias = norm_in_bias.typed_data(),
                                .norm_out_scale = norm_out_scale.typed_data(),
                                .norm_out_bias = norm_out_bias.typed_data(),
                                .proj_kernel = proj_kernel.untyped_data(),
                                .gate_kernel = gate_kernel.untyped_data(),
                                .kernel_dtype = FloatOf(proj_kernel.element_type()),
                                .proj_bias = DataOrNull(proj_bias),
                                .gate_bias = DataOrNull(gate_bias),
                                .batch = batch,
                                .rows = rows,
                                .columns = columns,
                                .rows_padded = rows_padded,
                                .columns_padded = columns_padded,
                                .channels = static_cast<int>(channels),
                                .hidden = static_cast<int>(hidden),
                                .residual = *residual,
                                .epsilon = *epsilon},
                               stream, channels, " channels, ", hidden,
                               " hidden and t with rows of ", columns_padded);
}

const Register<GatedOutputForward> forward("genie_gated_output_fwd");

}  // namespace
}  // namespace genie
