#include "ffi.h"
#include "triangle_multiplication/dtypes.h"
#include "triangle_multiplication/project_backward_sm90.h"

namespace genie {
namespace {

using xla::ffi::F32;
using xla::ffi::PRED;

// dz_in, if there, is what dz starts from; Python gives its memory away.
Error GatedProjectionBackwardHandler(
    cudaStream_t stream, AnyBuffer z, Optional<PRED, 3> mask, AnyBuffer da, AnyBuffer db,
    AnyBuffer dz_in, Buffer<F32, 1> norm_scale, Buffer<F32, 1> norm_bias, AnyBuffer proj_kernel,
    AnyBuffer gate_kernel, Optional<F32, 1> proj_bias, Optional<F32, 1> gate_bias,
    Result<AnyBuffer> dz, Result<Buffer<F32, 2>> d_scale, Result<Buffer<F32, 2>> d_bias,
    Result<Buffer<F32, 3>> d_proj, Result<Buffer<F32, 3>> d_gate,
    Result<Buffer<F32, 2>> d_proj_bias, Result<Buffer<F32, 2>> d_gate_bias,
    Result<Buffer<F32, 5>> partials, Epsilon epsilon) {
  if (z.dimensions().size() != 4 || da.dimensions().size() != 4) {
    return Error::InvalidArgument("z and da must have 4 dimensions");
  }
  const int64_t batch = z.dimensions()[0], rows = z.dimensions()[1], columns = z.dimensions()[2],
                channels = z.dimensions()[3], hidden = da.dimensions()[1], width = 2 * hidden,
                parts = partials->dimensions()[1];
  const bool adds = dz_in.dimensions().size() == 4;
  for (const Error& error :
       {ProjectionDtypeStatus(z, "da, db, dz_in and dz", {da, db, *dz, adds ? dz_in : *dz},
                              proj_kernel, gate_kernel),
        ShapeStatus("da and db", {batch, hidden, Padded(rows), Padded(columns)}, da, db),
        ShapeStatus("dz_in and dz", {batch, rows, columns, channels}, *dz, adds ? dz_in : *dz),
        ShapeStatus("mask", {batch, rows, columns}, mask),
        ShapeStatus("norm_scale and norm_bias", {channels}, norm_scale, norm_bias),
        ShapeStatus("proj_kernel and gate_kernel", {channels, width}, proj_kernel, gate_kernel),
        ShapeStatus("proj_bias and gate_bias", {width}, proj_bias, gate_bias),
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
  return Launched<GatedProjectionBackward>(
      {.forward = {.z = z.untyped_data(),
                   .mask = MaskOrNull(mask),
                   .a = nullptr,
                   .b = nullptr,
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
                   .rows_padded = Padded(rows),
                   .columns_padded = Padded(columns),
                   .channels = static_cast<int>(channels),
                   .hidden = static_cast<int>(hidden),
                   .epsilon = *epsilon},
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
       .parts = parts},
      stream, channels, " channels and ", hidden, " hidden");
}

const Register<GatedProjectionBackwardHandler> backward("genie_gated_projection_bwd");

}  // namespace
}  // namespace genie
