#include <nanobind/nanobind.h>

#include "targets.h"

namespace nb = nanobind;

NB_MODULE(_C, module) {
  size_t count = 0;
  nb::dict targets;
  const GenieTarget* target = genie_targets(&count);
  for (; count > 0; --count, ++target) targets[target->name] = nb::capsule(target->handler);
  module.attr("targets") = targets;

  nb::list capabilities;
  const int* capability = genie_compute_capabilities(&count);
  for (; count > 0; --count, ++capability) capabilities.append(*capability);
  module.attr("compute_capabilities") = nb::tuple(capabilities);
}
