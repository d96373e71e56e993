#include "ffi.h"
#include "triangle_multiplication/dtypes.h"
#include "triangle_multiplication/project_sm90.h"

namespace genie {
namespace {

using xla::ffi::F32;
using xla::ffi::PRED;

Error GatedProjectionForward(cudaStream_t stream, AnyBuffer z, Optional<PRED, 3> mask,
                             Buffer<F32, 1> norm_scale, Buffer<F32, 1> norm_bias,
                             AnyBuffer proj_kernel, AnyBuffer gate_kernel,
                             Optional<F32, 1> proj_bias, Optional<F32, 1> gate_bias,
                             Result<AnyBuffer> a, Result<AnyBuffer> b, Epsilon epsilon) {
  if (z.dimensions().size() != 4 || a->dimensions().size() != 4) {
    return Error::InvalidArgument("z and a must have 4 dimensions");
  }
  const int64_t batch = z.dimensions()[0], rows = z.dimensions()[1], columns = z.dimensions()[2],
                channels = z.dimensions()[3], hidden = a->dimensions()[1],
                rows_padded = Padded(rows), columns_padded = Padded(columns);
  for (const Error& error :
       {ProjectionDtypeStatus(z, "a and b", {*a, *b}, proj_kernel, gate_kernel),
        ShapeStatus("a and b", {batch, hidden, rows_padded, columns_padded}, *a, *b),
        ShapeStatus("mask", {batch, rows, columns}, mask),
        ShapeStatus("norm_scale and norm_bias", {channels}, norm_scale, norm_bias),
        ShapeStatus("proj_kernel and gate_kernel", {channels, 2 * hidden}, proj_kernel,
                    gate_kernel),
        ShapeStatus("proj_bias and gate_bias", {2 * hidden}, proj_bias, gate_bias)}) {
    if (error.failure()) return error;
  }
  if (a->element_count() == 0) return Error::Success();
  return Launched<GatedProjection>({.z = z.untyped_data(),
                                    .mask = MaskOrNull(mask),
                                    .a = a->untyped_data(),
                                    .b = b->untyped_data(),
                                    .dtype = FloatOf(z.element_type()),
                                    .norm_scale = norm_scale.typed_data(),
                                    .norm_bias = norm_bias.typed_data(),
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
                                    .epsilon = *epsilon},
                                   stream, channels, " channels and ", hidden, " hidden");
}

const Register<GatedProjectionForward> forward("genie_gated_projection_fwd");

}  // namespace
}  // namespace genie
