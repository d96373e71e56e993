#include "triangle_multiplication/operands.h"

namespace genie {
namespace {

Error GatedProjectionForward(cudaStream_t stream, AnyBuffer z, Mask mask, Vector norm_scale,
                             Vector norm_bias, AnyBuffer proj_kernel, AnyBuffer gate_kernel,
                             OptionalVector proj_bias, OptionalVector gate_bias,
                             Result<AnyBuffer> a, Result<AnyBuffer> b, Epsilon epsilon) {
  if (a->dimensions().size() != 4) return Error::InvalidArgument("a must have 4 dimensions");
  const int64_t hidden = a->dimensions()[1];
  GatedProjection p = {};
  p.a = a->untyped_data(), p.b = b->untyped_data();
  for (const Error& error :
       {Describe(p, z, mask, norm_scale, norm_bias, proj_kernel, gate_kernel, proj_bias, gate_bias,
                 hidden, *epsilon),
        DtypeStatus(z, "a and b", {*a, *b}),
        ShapeStatus("a and b", {p.batch, hidden, p.rows_padded, p.columns_padded}, *a, *b)}) {
    if (error.failure()) return error;
  }
  if (a->element_count() == 0) return Error::Success();
  return Launched(p, stream, p.channels, " channels and ", hidden, " hidden");
}

const Register<GatedProjectionForward> forward("genie_gated_projection_fwd");

}  // namespace
}  // namespace genie
