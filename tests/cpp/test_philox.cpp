// core/philox.h: known answers of the generator, the grouping of eight entries to one call, and agreement with the
// Python specification (flash_attn_ext/_philox.py).
#include "core/philox.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <vector>

namespace fae {
namespace {

// philox4x32 with 10 rounds, from the file kat_vectors of Random123.
TEST(Philox, KnownAnswersOfRandom123) {
  struct {
    uint32_t c[4], k[2], want[4];
  } const vectors[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
       {0xffffffff, 0xffffffff},
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const auto& v : vectors) {
    const PhiloxWords got = philox_4x32_10(v.c[0], v.c[1], v.c[2], v.c[3], v.k[0], v.k[1]);
    for (int i = 0; i < 4; ++i) {
      EXPECT_EQ(got.w[i], v.want[i]);
      EXPECT_EQ(got.half(2 * i), v.want[i] & 0xffff);
      EXPECT_EQ(got.half(2 * i + 1), v.want[i] >> 16);
    }
  }
}

// The 16 bits of one entry are the largest threshold t at which dropout_keep_mask still keeps it:
//
//   from flash_attn_ext._philox import dropout_keep_mask
//   kept = lambda t: dropout_keep_mask(1, bh + 1, row + 1, col + 1, t / 65536, seed, offset)[0, bh, row, col]
//   bits = max(t for t in range(65536) if kept(t))          # by bisection: kept() falls once
TEST(Philox, AgreesWithThePythonSpecification) {
  struct {
    uint64_t seed, offset;
    uint32_t bh, row, col, bits;
  } const entries[] = {
      {0x0ull, 0x0ull, 0, 0, 0, 0xe8d5},
      {0x0ull, 0x0ull, 0, 8, 9, 0x9b00},
      {0x2aull, 0x0ull, 0, 0, 1, 0x9cea},
      {0x2aull, 0x0ull, 3, 17, 30, 0x009f},
      {0x2aull, 0x4ull, 3, 17, 30, 0x4ce1},
      {0x7fffffffffffffffull, 0x8000000000000005ull, 1, 7, 15, 0x1db2},
      {0x123456789abcdefull, 0xfedcba9876543210ull, 7, 100, 200, 0x834a},
      {0x123456789abcdefull, 0xfedcba9876543210ull, 7, 108, 209, 0x30ec},
      {0x11f71fb04cbull, 0x100000000ull, 0, 63, 64, 0x1564},
      {0x5ull, 0xffffffffull, 2, 15, 16, 0xb45c},
      {0x5ull, 0x100000000ull, 2, 16, 15, 0x20bd},
      {0xffffffffffffffffull, 0xffffffffffffffffull, 11, 255, 31, 0xd9ba},
  };
  for (const auto& e : entries) {
    const Dropout keeps = {{e.seed, e.offset}, e.bits}, drops = {{e.seed, e.offset}, e.bits + 1};
    EXPECT_EQ(keeps.words(e.bh, e.row, e.col).half(Dropout::half_index(e.row, e.col)), e.bits);
    EXPECT_TRUE(keeps.keep(e.bh, e.row, e.col));
    EXPECT_FALSE(drops.keep(e.bh, e.row, e.col));
  }
}

// Philox with one key is a bijection of counters, so different words mean different counters: the entries of a matrix
// have to fall into groups of eight with equal words, one for each half, and a group has to be what one thread holds.
TEST(Philox, EntriesMapOneToOneOntoCountersAndHalves) {
  constexpr uint32_t kRows = 80, kCols = 112;
  const Dropout dropout = {{123, 456}, 1};
  std::map<std::array<uint32_t, 4>, std::vector<std::array<uint32_t, 3>>> groups;
  for (uint32_t row = 0; row < kRows; ++row)
    for (uint32_t col = 0; col < kCols; ++col) {
      const PhiloxWords w = dropout.words(5, row, col);
      const uint32_t half = static_cast<uint32_t>(Dropout::half_index(row, col));
      groups[{w.w[0], w.w[1], w.w[2], w.w[3]}].push_back({half, row, col});
    }
  ASSERT_EQ(groups.size(), kRows * kCols / 8);
  for (auto& [words, entries] : groups) {
    ASSERT_EQ(entries.size(), 8u);
    std::sort(entries.begin(), entries.end());
    const uint32_t row = entries[0][1], col = entries[0][2];
    ASSERT_TRUE(row % 16 < 8 && col % 16 < 8 && col % 2 == 0);
    for (uint32_t half = 0; half < 8; ++half) {
      ASSERT_EQ(entries[half][0], half);
      ASSERT_EQ(entries[half][1], row + (half & 4 ? 8 : 0));
      ASSERT_EQ(entries[half][2], col + (half & 2 ? 8 : 0) + (half & 1));
    }
  }
}

TEST(Philox, EveryArgumentMatters) {
  std::set<std::array<uint32_t, 4>> seen;
  int calls = 0;
  const auto add = [&](uint64_t seed, uint64_t offset, uint32_t bh, uint32_t row, uint32_t col) {
    const PhiloxWords w = Dropout{{seed, offset}, 1}.words(bh, row, col);
    seen.insert({w.w[0], w.w[1], w.w[2], w.w[3]});
    ++calls;
  };
  add(0, 0, 0, 0, 0);
  for (int bit = 0; bit < 64; ++bit) {
    add(uint64_t{1} << bit, 0, 0, 0, 0);
    // The high half of the offset is folded into the key's second word, beside the seed's high half.
    if (bit < 32) add(0, uint64_t{1} << bit, 0, 0, 0);
    if (bit < 32) add(0, 0, uint32_t{1} << bit, 0, 0);
    if (bit >= 4 && bit < 31) add(0, 0, 0, uint32_t{1} << bit, 0);
    if (bit >= 4 && bit < 31) add(0, 0, 0, 0, uint32_t{1} << bit);
  }
  EXPECT_EQ(static_cast<int>(seen.size()), calls);
  EXPECT_NE(Dropout({{0, uint64_t{1} << 40}, 1}).words(0, 0, 0).w[0], Dropout({{0, 0}, 1}).words(0, 0, 0).w[0]);
}

TEST(Philox, ThresholdAndKeepScale) {
  EXPECT_EQ(Dropout::threshold_of(0.0), 0u);
  EXPECT_EQ(Dropout::threshold_of(0.1), 6554u);
  EXPECT_EQ(Dropout::threshold_of(0.5), 32768u);
  // Ties round to the even integer, as Python's round() does.
  EXPECT_EQ(Dropout::threshold_of(0.5 / 65536), 0u);
  EXPECT_EQ(Dropout::threshold_of(1.5 / 65536), 2u);
  EXPECT_EQ(Dropout::threshold_of(2.5 / 65536), 2u);
  // Something is always kept.
  EXPECT_EQ(Dropout::threshold_of(0.999999999), 65535u);
  EXPECT_EQ(Dropout::threshold_of(1.0), 65535u);

  const Dropout none = {{1, 2}, 0};
  EXPECT_EQ(none.keep_scale(), 1.0f);
  for (uint32_t i = 0; i < 1000; ++i) EXPECT_TRUE(none.keep(0, i, 7 * i));
  EXPECT_EQ((Dropout{{1, 2}, 32768}.keep_scale()), 2.0f);
  EXPECT_EQ((Dropout{{1, 2}, 65535}.keep_scale()), 65536.0f);
}

// Kept entries times their scale sum to what there was: within four standard deviations over 2^18 entries.
TEST(Philox, ExpectationIsKept) {
  constexpr int kSide = 512;
  for (const double p : {0.1, 0.5, 0.9}) {
    const Dropout dropout = {{99, 0}, Dropout::threshold_of(p)};
    int kept = 0;
    for (uint32_t row = 0; row < kSide; ++row)
      for (uint32_t col = 0; col < kSide; ++col) kept += dropout.keep(1, row, col);
    const double n = double{kSide} * kSide;
    EXPECT_NEAR(kept * double{dropout.keep_scale()} / n, 1.0, 4 * std::sqrt(p / ((1 - p) * n)));
  }
}

}  // namespace
}  // namespace fae
