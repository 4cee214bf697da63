// Rows of accumulator fragments to global memory, 16 bytes a lane.
#pragma once

#include <cstdint>

#include "../../core/platform.h"

namespace fae::tile {

// The four lanes of a quad hold, of one row, element pairs of four n8 tiles: lane t has x[i] = columns 8 i + 2 t and the
// next. Afterwards lane t has the eight columns of tile t.
FAE_DEVICE void transpose_quad(uint32_t (&x)[4], int t) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k & bit) continue;
      const uint32_t got = __shfl_xor_sync(0xffffffffu, t & bit ? x[k] : x[k + bit], bit);
      (t & bit ? x[k] : x[k + bit]) = got;
    }
  }
}

}  // namespace fae::tile
