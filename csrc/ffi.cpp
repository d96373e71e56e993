#include "ffi.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <string>
#include <vector>

#include "targets.h"

namespace genie {
namespace {

constexpr int kComputeCapabilities[] = {GENIE_COMPUTE_CAPABILITIES};

// Handlers register before main, in any order of files, so the table is made on first use.
std::vector<GenieTarget>& Targets() {
  static std::vector<GenieTarget> targets;
  return targets;
}

// 10 * major + minor of `device`, asked for once, since a handler needs it at every call.
cudaError_t ComputeCapability(int device, int* capability) {
  static std::array<std::atomic<int>, 64> known;
  const bool cached = device < static_cast<int>(known.size());
  if (cached && (*capability = known[device]) != 0) return cudaSuccess;
  int major = 0, minor = 0;
  cudaError_t status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (status != cudaSuccess) return status;
  *capability = 10 * major + minor;
  if (cached) known[device] = *capability;
  return cudaSuccess;
}

std::string CapabilityText(int capability) {
  return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

// "[2, 77, 77, 128]"
std::string ShapeText(Dimensions dimensions) {
  std::string text;
  for (int64_t n : dimensions) text += (text.empty() ? "" : ", ") + std::to_string(n);
  return "[" + text + "]";
}

}  // namespace

void AddTarget(const char* name, XLA_FFI_Error* (*entry_point)(XLA_FFI_CallFrame*)) {
  Targets().push_back({name, reinterpret_cast<void*>(entry_point)});
}

Error DeviceStatus() {
  int device = 0, capability = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = ComputeCapability(device, &capability);
  if (status != cudaSuccess) return LaunchStatus(status);
  std::string built;
  for (int served : kComputeCapabilities) {
    if (served == capability) return Error::Success();
    built.append(" ").append(CapabilityText(served));
  }
  return Error(xla::ffi::ErrorCode::kFailedPrecondition,
               "the kernels were built for compute capability" + built + "; device " +
                   std::to_string(device) + " has " + CapabilityText(capability) +
                   ". Use implementation='xla' on it.");
}

Error LaunchStatus(cudaError_t status) {
  if (status == cudaSuccess) return Error::Success();
  return Error::Internal(std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status));
}

Error ShapeStatus(const char* what, std::initializer_list<int64_t> expected,
                  Dimensions dimensions) {
  if (std::equal(dimensions.begin(), dimensions.end(), expected.begin(), expected.end())) {
    return Error::Success();
  }
  return Error::InvalidArgument(std::string(what) + " must have shape " +
                                ShapeText({expected.begin(), expected.size()}) + "; got " +
                                ShapeText(dimensions));
}

}  // namespace genie

extern "C" __attribute__((visibility("default"))) const GenieTarget* genie_targets(size_t* count) {
  *count = genie::Targets().size();
  return genie::Targets().data();
}

extern "C" __attribute__((visibility("default"))) const int* genie_compute_capabilities(
    size_t* count) {
  *count = std::size(genie::kComputeCapabilities);
  return genie::kComputeCapabilities;
}
