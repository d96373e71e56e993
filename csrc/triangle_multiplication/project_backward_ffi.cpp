#include "triangle_multiplication/operands.h"
#include "triangle_multiplication/project_backward_sm90.h"

namespace genie {
namespace {

using xla::ffi::F32;

// dz_in, if there, is what dz starts from; Python gives its memory away.
Error GatedProjectionBackwardHandler(
    cudaStream_t stream, AnyBuffer z, Mask mask, AnyBuffer da, AnyBuffer db, AnyBuffer dz_in,
    Vector norm_scale, Vector norm_bias, AnyBuffer proj_kernel, AnyBuffer gate_kernel,
    OptionalVector proj_bias, OptionalVector gate_bias, Result<AnyBuffer> dz,
    Result<Buffer<F32, 2>> d_scale, Result<Buffer<F32, 2>> d_bias, Result<Buffer<F32, 3>> d_proj,
    Result<Buffer<F32, 3>> d_gate, Result<Buffer<F32, 2>> d_proj_bias,
    Result<Buffer<F32, 2>> d_gate_bias, Result<Buffer<F32, 5>> partials, Epsilon epsilon) {
  if (da.dimensions().size() != 4) return Error::InvalidArgument("da must have 4 dimensions");
  const int64_t hidden = da.dimensions()[1], width = 2 * hidden, parts = partials->dimensions()[1];
  const bool adds = dz_in.dimensions().size() == 4;
  GatedProjectionBackward p = {.forward = {},
                               .da = da.untyped_data(),
                               .db = db.untyped_data(),
                               .dz = dz->untyped_data(),
                               .adds = adds,
                               .d_scale = d_scale->typed_data(),
                               .d_bias = d_bias->typed_data(),
                               .d_proj = d_proj->typed_data(),
                               .d_gate = d_gate->typed_data(),
                               .d_proj_bias = d_proj_bias->typed_data(),
                               .d_gate_bias = d_gate_bias->typed_data(),
                               .partials = partials->typed_data(),
                               .parts = parts};
  const Error described = Describe(p.forward, z, mask, norm_scale, norm_bias, proj_kernel,
                                   gate_kernel, proj_bias, gate_bias, hidden, *epsilon);
  const GatedProjection& f = p.forward;
  const int64_t batch = f.batch, channels = f.channels;
  for (const Error& error :
       {described, DtypeStatus(z, "da, db, dz_in and dz", {da, db, *dz, adds ? dz_in : *dz}),
        ShapeStatus("da and db", {batch, hidden, f.rows_padded, f.columns_padded}, da, db),
        ShapeStatus("dz_in and dz", {batch, f.rows, f.columns, channels}, *dz, adds ? dz_in : *dz),
        ShapeStatus("gradients of the norm", {batch, channels}, *d_scale, *d_bias),
        ShapeStatus("gradients of kernels", {batch, channels, width}, *d_proj, *d_gate),
        ShapeStatus("gradients of biases", {batch, width}, *d_proj_bias, *d_gate_bias),
        ShapeStatus("partials", {batch, parts, 2, channels + 1, width}, *partials)}) {
    if (error.failure()) return error;
  }
  if (batch == 0) return Error::Success();
  // The kernel adds to what dz holds. XLA gives it dz_in's memory, as it is asked to, except where
  // dz_in is needed afterwards, as in a loop over weights.
  if (adds && dz_in.untyped_data() != dz->untyped_data()) {
    const cudaError_t copied = cudaMemcpyAsync(dz->untyped_data(), dz_in.untyped_data(),
                                               dz->size_bytes(), cudaMemcpyDeviceToDevice, stream);
    if (copied != cudaSuccess) return LaunchStatus(copied);
  }
  return Launched(p, stream, channels, " channels and ", hidden, " hidden");
}

const Register<GatedProjectionBackwardHandler> backward("genie_gated_projection_bwd");

}  // namespace
}  // namespace genie
