// Dtype checks of the handlers of the stages around the attention core.
#pragma once

#include <initializer_list>

#include "ffi.h"
#include "floats.h"

namespace genie {

// Of a dtype that DtypeStatus let pass.
inline Float FloatOf(DataType dtype) {
  if (dtype == DataType::BF16) return Float::kBf16;
  return dtype == DataType::F16 ? Float::kF16 : Float::kF32;
}

// An error unless z has 16 bits, `like_z` have its dtype, and all `kernels` have it or float32.
inline Error DtypeStatus(const AnyBuffer& z, std::initializer_list<AnyBuffer> like_z,
                         std::initializer_list<AnyBuffer> kernels) {
  const DataType dtype = z.element_type(), kernel_dtype = kernels.begin()->element_type();
  if (dtype != DataType::BF16 && dtype != DataType::F16) {
    return Error::InvalidArgument("z must be bfloat16 or float16");
  }
  for (const AnyBuffer& buffer : like_z) {
    if (buffer.element_type() != dtype) {
      return Error::InvalidArgument("what is attended to and the results must have z's dtype");
    }
  }
  for (const AnyBuffer& kernel : kernels) {
    if (kernel.element_type() != kernel_dtype ||
        (kernel_dtype != dtype && kernel_dtype != DataType::F32)) {
      return Error::InvalidArgument("the kernels must all be float32 or all of z's dtype");
    }
  }
  return Error::Success();
}

}  // namespace genie
