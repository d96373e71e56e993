// What a stage and its backward take alike, as both handlers describe it to the kernels.
#pragma once

#include "ffi.h"
#include "triangle_multiplication/dtypes.h"
#include "triangle_multiplication/output_sm90.h"
#include "triangle_multiplication/project_sm90.h"

namespace genie {

using Mask = Optional<DataType::PRED, 3>;
using Vector = Buffer<DataType::F32, 1>;
using OptionalVector = Optional<DataType::F32, 1>;

// Fills in z, mask, kernels, biases and all sizes, which either stage has under the same names.
template <class Stage>
Error Describe(Stage& to, const AnyBuffer& z, const Mask& mask, const AnyBuffer& proj_kernel,
               const AnyBuffer& gate_kernel, const OptionalVector& proj_bias,
               const OptionalVector& gate_bias, int64_t hidden) {
  const auto shape = z.dimensions();
  if (shape.size() != 4) return Error::InvalidArgument("z must have 4 dimensions");
  to.z = z.untyped_data(), to.dtype = FloatOf(z.element_type());
  to.mask = MaskOrNull(mask);
  to.proj_kernel = proj_kernel.untyped_data(), to.gate_kernel = gate_kernel.untyped_data();
  to.kernel_dtype = FloatOf(proj_kernel.element_type());
  to.proj_bias = DataOrNull(proj_bias), to.gate_bias = DataOrNull(gate_bias);
  to.batch = shape[0], to.rows = shape[1], to.columns = shape[2];
  to.rows_padded = Padded(to.rows), to.columns_padded = Padded(to.columns);
  to.channels = static_cast<int>(shape[3]), to.hidden = static_cast<int>(hidden);
  const Error error = KernelDtypeStatus(z.element_type(), proj_kernel, gate_kernel);
  return error.failure() ? error : ShapeStatus("mask", {to.batch, to.rows, to.columns}, mask);
}

inline Error Describe(GatedProjection& to, const AnyBuffer& z, const Mask& mask,
                      const Vector& norm_scale, const Vector& norm_bias,
                      const AnyBuffer& proj_kernel, const AnyBuffer& gate_kernel,
                      const OptionalVector& proj_bias, const OptionalVector& gate_bias,
                      int64_t hidden, float epsilon) {
  to.norm_scale = norm_scale.typed_data(), to.norm_bias = norm_bias.typed_data();
  to.epsilon = epsilon;
  Error error = Describe(to, z, mask, proj_kernel, gate_kernel, proj_bias, gate_bias, hidden);
  if (error.failure()) return error;
  const int64_t channels = to.channels, width = 2 * hidden;
  for (const Error& shape :
       {ShapeStatus("norm_scale and norm_bias", {channels}, norm_scale, norm_bias),
        ShapeStatus("proj_kernel and gate_kernel", {channels, width}, proj_kernel, gate_kernel),
        ShapeStatus("proj_bias and gate_bias", {width}, proj_bias, gate_bias)}) {
    if (shape.failure()) return shape;
  }
  return Error::Success();
}

inline Error Describe(GatedOutput& to, const AnyBuffer& z, const AnyBuffer& t, const Mask& mask,
                      const Vector& norm_in_scale, const Vector& norm_in_bias,
                      const Vector& norm_out_scale, const Vector& norm_out_bias,
                      const AnyBuffer& proj_kernel, const AnyBuffer& gate_kernel,
                      const OptionalVector& proj_bias, const OptionalVector& gate_bias,
                      bool residual, float epsilon) {
  if (t.dimensions().size() != 4) return Error::InvalidArgument("t must have 4 dimensions");
  const int64_t hidden = t.dimensions()[1];
  to.t = t.untyped_data();
  to.norm_in_scale = norm_in_scale.typed_data(), to.norm_in_bias = norm_in_bias.typed_data();
  to.norm_out_scale = norm_out_scale.typed_data(), to.norm_out_bias = norm_out_bias.typed_data();
  to.residual = residual, to.epsilon = epsilon;
  Error error = Describe(to, z, mask, proj_kernel, gate_kernel, proj_bias, gate_bias, hidden);
  if (error.failure()) return error;
  const int64_t channels = to.channels;
  for (const Error& shape :
       {ShapeStatus("t", {to.batch, hidden, to.rows_padded, to.columns_padded}, t),
        ShapeStatus("norm_in_scale and norm_in_bias", {channels}, norm_in_scale, norm_in_bias),
        ShapeStatus("norm_out_scale and norm_out_bias", {hidden}, norm_out_scale, norm_out_bias),
        ShapeStatus("proj_kernel", {hidden, channels}, proj_kernel),
        ShapeStatus("gate_kernel", {channels, channels}, gate_kernel),
        ShapeStatus("proj_bias and gate_bias", {channels}, proj_bias, gate_bias)}) {
    if (shape.failure()) return shape;
  }
  return Error::Success();
}

}  // namespace genie
