// What the handlers of triangle multiplication share: dtypes, padding and attributes.
#pragma once

#include <initializer_list>
#include <string>

#include "ffi.h"
#include "triangle_multiplication/project_sm90.h"

namespace genie {

inline constexpr char kEpsilon[] = "epsilon";
inline constexpr char kResidual[] = "residual";
using Epsilon = Attr<float, kEpsilon>;
using Residual = Attr<bool, kResidual>;

// Pair axes of channel-first arrays are rounded up to what TMA's strides ask for.
inline int64_t Padded(int64_t size) { return (size + 7) / 8 * 8; }

// Of bfloat16, float16 or float32.
inline Float FloatOf(DataType dtype) {
  if (dtype == DataType::BF16) return Float::kBf16;
  return dtype == DataType::F16 ? Float::kF16 : Float::kF32;
}

// An error unless both kernels have 16 bits like z, or hold float32.
inline Error KernelDtypeStatus(DataType z, const AnyBuffer& proj_kernel,
                               const AnyBuffer& gate_kernel) {
  const DataType dtype = proj_kernel.element_type();
  if (z != DataType::BF16 && z != DataType::F16) {
    return Error::InvalidArgument("z must be bfloat16 or float16");
  }
  if (gate_kernel.element_type() != dtype || (dtype != z && dtype != DataType::F32)) {
    return Error::InvalidArgument("proj_kernel and gate_kernel must both be float32 or z's dtype");
  }
  return Error::Success();
}

// An error unless all that is like z, under these names, has its dtype.
inline Error DtypeStatus(const AnyBuffer& z, const char* names,
                         std::initializer_list<AnyBuffer> like_z) {
  for (const AnyBuffer& buffer : like_z) {
    if (buffer.element_type() == z.element_type()) continue;
    return Error::InvalidArgument(std::string(names) + " must have z's dtype");
  }
  return Error::Success();
}

// An error unless pairs of channels have z's dtype and contractions the one that goes with it.
inline Error OutputDtypeStatus(const AnyBuffer& z, std::initializer_list<AnyBuffer> pairs,
                               std::initializer_list<AnyBuffer> contractions) {
  const Error error = DtypeStatus(z, "out, d_out and dz", pairs);
  if (error.failure()) return error;
  const DataType contracted = z.element_type() == DataType::BF16 ? DataType::BF16 : DataType::F32;
  for (const AnyBuffer& buffer : contractions) {
    if (buffer.element_type() == contracted) continue;
    return Error::InvalidArgument(
        "t and dt must be bfloat16 for bfloat16 z and float32 for float16 z");
  }
  return Error::Success();
}

}  // namespace genie
