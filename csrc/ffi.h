#pragma once

#include <cuda_runtime_api.h>

#include <initializer_list>
#include <optional>
#include <sstream>

#include "xla/ffi/api/ffi.h"

namespace genie {

using xla::ffi::AnyBuffer;
using xla::ffi::Attr;
using xla::ffi::Buffer;
using xla::ffi::DataType;
using xla::ffi::Error;
using xla::ffi::Result;
using Dimensions = AnyBuffer::Dimensions;

// An operand that may be absent: it then has shape [0], whatever its dtype.
template <DataType dtype, size_t rank>
using Optional = std::optional<Buffer<dtype, rank>>;

// Whether an operand of any dtype and rank is absent.
inline bool IsAbsent(const AnyBuffer& operand) {
  return operand.dimensions().size() == 1 && operand.dimensions()[0] == 0;
}

// What a handler hands to a kernel for an operand that may be absent.
template <class OptionalBuffer>
auto* DataOrNull(const OptionalBuffer& buffer) {
  return buffer ? buffer->typed_data() : nullptr;
}

// A mask that may be absent as kernels read it: a byte an element, valid where not 0.
template <size_t rank>
const uint8_t* MaskOrNull(const Optional<DataType::PRED, rank>& mask) {
  return reinterpret_cast<const uint8_t*>(DataOrNull(mask));
}

// The C entry point of `handler`. Its signature is its whole binding. Handlers only launch on
// the stream they are given and allocate nothing, so XLA may record them into CUDA graphs.
template <auto handler>
XLA_FFI_Error* EntryPoint(XLA_FFI_CallFrame* frame) {
  static auto* bound =
      xla::ffi::Ffi::BindTo(handler, {xla::ffi::Traits::kCmdBufferCompatible}).release();
  return bound->Call(frame);
}

void AddTarget(const char* name, XLA_FFI_Error* (*entry_point)(XLA_FFI_CallFrame*));

// A file-scope constant of this type puts `handler` into the table of targets under `name`.
template <auto handler>
struct Register {
  explicit Register(const char* name) { AddTarget(name, EntryPoint<handler>); }
};

// An error unless the kernels were built for the current device, which XLA has made the stream's.
// Python chose by the devices that it saw; an exported program may meet another one.
Error DeviceStatus();

// An error unless `status`, as a launch returned it, is success.
Error LaunchStatus(cudaError_t status);

// Launches `arguments` on a device that the kernels were built for. Where the launch refuses them,
// the error says in `words`, text and numbers, what no kernel serves.
template <class Arguments, class... Words>
Error Launched(const Arguments& arguments, cudaStream_t stream, const Words&... words) {
  if (Error error = DeviceStatus(); error.failure()) return error;
  const cudaError_t status = Launch(arguments, stream);
  if (status != cudaErrorInvalidValue) return LaunchStatus(status);
  std::ostringstream text;
  text << "no kernel serves ";
  (text << ... << words);
  return Error::InvalidArgument(text.str());
}

// An error naming `what` unless `dimensions` are as expected.
Error ShapeStatus(const char* what, std::initializer_list<int64_t> expected, Dimensions dimensions);

// The same for each of `buffers`; those that are absent have no shape to be wrong.
template <class... Buffers>
Error ShapeStatus(const char* what, std::initializer_list<int64_t> expected,
                  const Buffers&... buffers) {
  Error error;
  const auto check = [&](const auto& buffer) {
    if constexpr (requires { buffer.has_value(); }) {
      return !buffer || (error = ShapeStatus(what, expected, buffer->dimensions())).success();
    } else {
      return (error = ShapeStatus(what, expected, buffer.dimensions())).success();
    }
  };
  (check(buffers) && ...);
  return error;
}

}  // namespace genie

namespace xla::ffi {

// A parameter of type cudaStream_t is the stream that XLA runs the handler on.
template <>
struct CtxBinding<cudaStream_t> {
  using Ctx = PlatformStream<cudaStream_t>;
};

template <DataType dtype, size_t rank>
struct ArgBinding<std::optional<Buffer<dtype, rank>>> {
  using Arg = genie::Optional<dtype, rank>;
};

template <DataType dtype, size_t rank>
struct ArgDecoding<std::optional<Buffer<dtype, rank>>> {
  static std::optional<genie::Optional<dtype, rank>> Decode(XLA_FFI_ArgType type, void* arg,
                                                            DiagnosticEngine& diagnostic) {
    const auto any = ArgDecoding<AnyBuffer>::Decode(type, arg, diagnostic);
    if (!any) return std::nullopt;
    if (genie::IsAbsent(*any)) return genie::Optional<dtype, rank>();
    auto buffer = ArgDecoding<Buffer<dtype, rank>>::Decode(type, arg, diagnostic);
    if (!buffer) return std::nullopt;
    return genie::Optional<dtype, rank>(*buffer);
  }
};

}  // namespace xla::ffi
