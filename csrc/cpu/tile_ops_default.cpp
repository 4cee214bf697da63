// The tile operations compiled for: default.
#include <cmath>
#include <cstdint>
#include <limits>

#include "../core/softmax.h"
#include "tile_ops.h"

#pragma GCC diagnostic ignored "-Wpsabi"
#define FAE_LAMBDA __attribute__((always_inline))
#define FAE_ISA isa_default
#include "tile_ops_impl.h"
