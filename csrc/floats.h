// The element types that plain launch functions are told of.
#pragma once

namespace genie {

enum class Float : int { kBf16, kF16, kF32 };

}  // namespace genie
