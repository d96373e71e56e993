// Harness of the tile layer: each piece against its definition, one line a piece; exits with the
// number of pieces that differ.
#include "harness/tiles_barriers.h"
#include "harness/tiles_products.h"
#include "harness/tiles_registers.h"
#include "harness/tiles_tma.h"

int main() {
  TestRegisters<bf16>(), TestRegisters<half>();
  TestAllocator();
  TestAllTma();
  TestProducts<bf16>(), TestProducts<half>();
  TestBarriers();
  std::printf("failures: %d\n", failures);
  return failures;
}
