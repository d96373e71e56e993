#include "ffi.h"
#include "triangle_multiplication/dtypes.h"
#include "triangle_multiplication/output_backward_sm90.h"

namespace genie {
namespace {

using xla::ffi::F32;
using xla::ffi::PRED;

template <size_t rank>
using Gradient = Result<Buffer<F32, rank>>;

// Gradients of absent biases are written too, and dropped by the caller.
Error GatedOutputBackwardHandler(
    cudaStream_t stream, AnyBuffer z, AnyBuffer t, Optional<PRED, 3> mask, AnyBuffer d_out,
    Buffer<F32, 1> norm_in_scale, Buffer<F32, 1> norm_in_bias, Buffer<F32, 1> norm_out_scale,
    Buffer<F32, 1> norm_out_bias, AnyBuffer proj_kernel, AnyBuffer gate_kernel,
    Optional<F32, 1> proj_bias, Optional<F32, 1> gate_bias, Result<AnyBuffer> dz,
    Result<AnyBuffer> dt, Gradient<2> d_norm_in_scale, Gradient<2> d_norm_in_bias,
    Gradient<2> d_norm_out_scale, Gradient<2> d_norm_out_bias, Gradient<3> d_proj_kernel,
    Gradient<3> d_gate_kernel, Gradient<2> d_proj_bias, Gradient<2> d_gate_bias,
    Gradient<3> partials, Residual residual, Epsilon epsilon) {
  if (z.dimensions().size() != 4 || t.dimensions().size() != 4) {
    return Error::InvalidArgument("z and t must have 4 dimensions");
  }
  const int64_t batch = z.dimensions()[0], rows = z.dimensions()[1], columns = z.dimensions()[2],
                channels = z.dimensions()[3], hidden = t.dimensions()[1],
                blocks = partials->dimensions()[1];
  for (const Error& error :
       {KernelDtypeStatus(z.element_type(), proj_kernel, gate_kernel),
        OutputDtypeStatus(z.element_type(), {d_out, *dz}, {t, *dt}),
        ShapeStatus("t and dt", {batch, hidden, Padded(rows), Padded(columns)}, t, *dt),
        ShapeStatus("d_out and dz", {batch, rows, columns, channels}, d_out, *dz),
        ShapeStatus("mask", {batch, rows, columns}, mask),
        ShapeStatus("norm_in_scale and norm_in_bias", {channels}, norm_in_scale, norm_in_bias),
        ShapeStatus("norm_out_scale and norm_out_bias", {hidden}, norm_out_scale, norm_out_bias),
        ShapeStatus("proj_kernel", {hidden, channels}, proj_kernel),
        ShapeStatus("gate_kernel", {channels, channels}, gate_kernel),
        ShapeStatus("proj_bias and gate_bias", {channels}, proj_bias, gate_bias),
        ShapeStatus("gradients of norm_in", {batch, channels}, *d_norm_in_scale, *d_norm_in_bias),
        ShapeStatus("gradients of norm_out", {batch, hidden}, *d_norm_out_scale, *d_norm_out_bias),
        ShapeStatus("gradient of proj_kernel", {batch, hidden, channels}, *d_proj_kernel),
        ShapeStatus("gradient of gate_kernel", {batch, channels, channels}, *d_gate_kernel),
        ShapeStatus("gradients of biases", {batch, channels}, *d_proj_bias, *d_gate_bias),
        ShapeStatus("partials", {batch, blocks, OutputPartial(channels, hidden)}, *partials)}) {
    if (error.failure()) return error;
  }
  if (batch == 0) return Error::Success();
  return Launched<GatedOutputBackward>({.of = {.z = z.untyped_data(),
                                               .t = t.untyped_data(),
                                               .mask = MaskOrNull(mask),
                                               .out = nullptr,
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
                                               .rows_padded = Padded(rows),
                                               .columns_padded = Padded(columns),
                                               .channels = static_cast<int>(channels),
                                               .hidden = static_cast<int>(hidden),
                                               .residual = *residual,
                                               .epsilon = *epsilon},
                                        .d_out = d_out.untyped_data(),
                                        .dz = dz->untyped_data(),
                                        .dt = dt->untyped_data(),
                                        .partials = partials->typed_data(),
                                        .blocks = static_cast<int>(blocks),
                                        .d_norm_in_scale = d_norm_in_scale->typed_data(),
                                        .d_norm_in_bias = d_norm_in_bias->typed_data(),
                                        .d_norm_out_scale = d_norm_out_scale->typed_data(),
                                        .d_norm_out_bias = d_norm_out_bias->typed_data(),
                                        .d_proj_kernel = d_proj_kernel->typed_data(),
                                        .d_gate_kernel = d_gate_kernel->typed_data(),
                                        .d_proj_bias = d_proj_bias->typed_data(),
                                        .d_gate_bias = d_gate_bias->typed_data()},
                                       stream, channels, " channels and ", hidden, " hidden");
}

const Register<GatedOutputBackwardHandler> backward("genie_gated_output_bwd");

}  // namespace
}  // namespace genie
