#include "triangle_multiplication/operands.h"
#include "triangle_multiplication/output_backward_sm90.h"

namespace genie {
namespace {

template <size_t rank>
using Gradient = Result<Buffer<DataType::F32, rank>>;

// Gradients of absent biases are written too, and dropped by the caller.
Error GatedOutputBackwardHandler(
    cudaStream_t stream, AnyBuffer z, AnyBuffer t, Mask mask, AnyBuffer d_out, Vector norm_in_scale,
    Vector norm_in_bias, Vector norm_out_scale, Vector norm_out_bias, AnyBuffer proj_kernel,
    AnyBuffer gate_kernel, OptionalVector proj_bias, OptionalVector gate_bias, Result<AnyBuffer> dz,
    Result<AnyBuffer> dt, Gradient<2> d_norm_in_scale, Gradient<2> d_norm_in_bias,
    Gradient<2> d_norm_out_scale, Gradient<2> d_norm_out_bias, Gradient<3> d_proj_kernel,
    Gradient<3> d_gate_kernel, Gradient<2> d_proj_bias, Gradient<2> d_gate_bias,
    Gradient<3> partials, Residual residual, Epsilon epsilon) {
  GatedOutputBackward p = {.of = {},
                           .d_out = d_out.untyped_data(),
                           .dz = dz->untyped_data(),
                           .dt = dt->untyped_data(),
                           .partials = partials->typed_data(),
                           .blocks = static_cast<int>(partials->dimensions()[1]),
                           .d_norm_in_scale = d_norm_in_scale->typed_data(),
                           .d_norm_in_bias = d_norm_in_bias->typed_data(),
                           .d_norm_out_scale = d_norm_out_scale->typed_data(),
                           .d_norm_out_bias = d_norm_out_bias->typed_data(),
                           .d_proj_kernel = d_proj_kernel->typed_data(),
                           .d_gate_kernel = d_gate_kernel->typed_data(),
                           .d_proj_bias = d_proj_bias->typed_data(),
                           .d_gate_bias = d_gate_bias->typed_data()};
  const Error described =
      Describe(p.of, z, t, mask, norm_in_scale, norm_in_bias, norm_out_scale, norm_out_bias,
               proj_kernel, gate_kernel, proj_bias, gate_bias, *residual, *epsilon);
  const int64_t batch = p.of.batch, channels = p.of.channels, hidden = p.of.hidden;
  for (const Error& error :
       {described, OutputDtypeStatus(z, {d_out, *dz}, {t, *dt}),
        ShapeStatus("dt", {batch, hidden, p.of.rows_padded, p.of.columns_padded}, *dt),
        ShapeStatus("d_out and dz", {batch, p.of.rows, p.of.columns, channels}, d_out, *dz),
        ShapeStatus("gradients of norm_in", {batch, channels}, *d_norm_in_scale, *d_norm_in_bias),
        ShapeStatus("gradients of norm_out", {batch, hidden}, *d_norm_out_scale, *d_norm_out_bias),
        ShapeStatus("gradient of proj_kernel", {batch, hidden, channels}, *d_proj_kernel),
        ShapeStatus("gradient of gate_kernel", {batch, channels, channels}, *d_gate_kernel),
        ShapeStatus("gradients of biases", {batch, channels}, *d_proj_bias, *d_gate_bias),
        ShapeStatus("partials", {batch, p.blocks, OutputPartial(channels, hidden)}, *partials)}) {
    if (error.failure()) return error;
  }
  if (batch == 0) return Error::Success();
  return Launched(p, stream, channels, " channels and ", hidden, " hidden");
}

const Register<GatedOutputBackwardHandler> backward("genie_gated_output_bwd");

}  // namespace
}  // namespace genie
