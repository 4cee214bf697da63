// Where a 16-byte chunk of a row lies in a shared-memory tile.
//
// Rows follow each other without padding, and a chunk's place in its 128 bytes is XORed with the row's number, so that the
// eight rows that ldmatrix reads at once lie in different banks. Padding would do that too, but cp.async fetches a global
// sector twice when its two halves go to different 128-byte lines of shared memory: 1.5 to 1.7 times the L2 traffic.
#pragma once

#include <cstdint>

#include "../../core/platform.h"

namespace fae::tile {

template <int kRowBytes>
struct Swizzle {
  static_assert(kRowBytes % 64 == 0, "a row is whole lines of 128 bytes, or of 64");
  static constexpr int kPitch = kRowBytes;
  // Rows of an odd number of 64-byte lines shift every other row by half of the banks: two bits are enough there.
  static constexpr bool kWide = kRowBytes % 128 == 0;
  static constexpr int kMask = kWide ? 7 : 3;

  FAE_HD static constexpr int phase(int row) { return kWide ? row & 7 : (row >> 1) & 3; }
  FAE_HD static constexpr uint32_t offset(int row, int chunk) {
    return static_cast<uint32_t>(row * kRowBytes + ((chunk & ~kMask) | ((chunk ^ phase(row)) & kMask)) * 16);
  }
  // From the address of chunk c of a row to that of chunk c + `more`, where the low bits of c and `more` do not overlap.
  // Rows may be added to either address in multiples of eight.
  FAE_HD static constexpr uint32_t chunk(uint32_t address, int more) {
    return (address ^ static_cast<uint32_t>((more & kMask) * 16)) + static_cast<uint32_t>((more & ~kMask) * 16);
  }
};

}  // namespace fae::tile
