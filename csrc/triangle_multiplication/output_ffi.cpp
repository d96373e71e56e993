#include "triangle_multiplication/operands.h"

namespace genie {
namespace {

Error GatedOutputForward(cudaStream_t stream, AnyBuffer z, AnyBuffer t, Mask mask,
                         Vector norm_in_scale, Vector norm_in_bias, Vector norm_out_scale,
                         Vector norm_out_bias, AnyBuffer proj_kernel, AnyBuffer gate_kernel,
                         OptionalVector proj_bias, OptionalVector gate_bias, Result<AnyBuffer> out,
                         Residual residual, Epsilon epsilon) {
  GatedOutput p = {};
  p.out = out->untyped_data();
  const Error described =
      Describe(p, z, t, mask, norm_in_scale, norm_in_bias, norm_out_scale, norm_out_bias,
               proj_kernel, gate_kernel, proj_bias, gate_bias, *residual, *epsilon);
  for (const Error& error : {described, OutputDtypeStatus(z, {*out}, {t}),
                             ShapeStatus("out", {p.batch, p.rows, p.columns, p.channels}, *out)}) {
    if (error.failure()) return error;
  }
  if (z.element_count() == 0) return Error::Success();
  return Launched(p, stream, p.channels, " channels, ", p.hidden, " hidden and t with rows of ",
                  p.columns_padded);
}

const Register<GatedOutputForward> forward("genie_gated_output_fwd");

}  // namespace
}  // namespace genie
