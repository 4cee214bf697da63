// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) and the rule that gives every
// entry of the attention matrix its 16 random bits. The bits depend on (seed, offset, batch, head, row, column) alone,
// so every kernel, tile size and device draws the same dropout mask. flash_attn_ext/reference.py holds the same rule.
//
// Entries are grouped as a thread owns them in the accumulator fragment of a 16-row, 16-column mma or wgmma tile: rows
// r and r + 8, columns 2c, 2c + 1, 2c + 8, 2c + 9. These eight entries share one call: four words, eight halves.
#pragma once

#include <cmath>
#include <cstdint>

#include "platform.h"

namespace fae {

struct PhiloxState {
  uint64_t seed;
  uint64_t offset;
};

struct PhiloxWords {
  uint32_t w[4];
  FAE_HD uint32_t half(int i) const { return (w[i >> 1] >> ((i & 1) * 16)) & 0xffffu; }
};

FAE_HD PhiloxWords philox_4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

struct Dropout {
  PhiloxState state;
  uint32_t threshold;  // an entry is kept iff its 16 bits are >= threshold; 0 means no dropout

  FAE_HD static uint32_t threshold_of(double p) {
    const uint32_t t = static_cast<uint32_t>(::rint(p * 65536.0));
    return t < 65535u ? t : 65535u;
  }
  // Kept entries are multiplied with this: the inverse of the keep probability after rounding, so the expectation is
  // exact.
  FAE_HD float keep_scale() const { return 65536.0f / static_cast<float>(65536u - threshold); }

  // The eight random halves of the fragment group that entry (row, col) belongs to; bh = batch * heads + head.
  FAE_HD PhiloxWords words(uint32_t bh, uint32_t row, uint32_t col) const {
    const uint32_t c0 = (col / 16u) * 4u + (col % 8u) / 2u;
    const uint32_t c1 = (row / 16u) * 8u + row % 8u;
    return philox_4x32_10(c0, c1, bh, static_cast<uint32_t>(state.offset), static_cast<uint32_t>(state.seed),
                          static_cast<uint32_t>(state.seed >> 32) ^ static_cast<uint32_t>(state.offset >> 32));
  }
  FAE_HD static int half_index(uint32_t row, uint32_t col) {
    return static_cast<int>(((row >> 3) & 1u) * 4u + ((col >> 3) & 1u) * 2u + (col & 1u));
  }
  FAE_HD bool keep(uint32_t bh, uint32_t row, uint32_t col) const {
    return words(bh, row, col).half(half_index(row, col)) >= threshold;
  }
};

}  // namespace fae
