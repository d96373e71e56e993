// The tile layer: register and shared tiles, TMA, WGMMA and barriers, under ThunderKittens' names.
// Only what the kernels use is here. Kernels include this one header.
#pragma once

#include "cluster.cuh"
#include "group.cuh"
