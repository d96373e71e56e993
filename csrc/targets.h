#pragma once

#include <cstddef>

// All that libgenie_kernels.so exports. Plain C, so that a module built elsewhere by another
// compiler can read it.
extern "C" {
struct GenieTarget {
  const char* name;
  void* handler;  // XLA_FFI_Error* (*)(XLA_FFI_CallFrame*)
};

const GenieTarget* genie_targets(size_t* count);
const int* genie_compute_capabilities(size_t* count);  // 10 * major + minor, ascending
}
