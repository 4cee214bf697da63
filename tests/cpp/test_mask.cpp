// core/mask.h against the definition of the masks, written here in 64-bit integers without any interval.
//
// What is claimed of the tile ranges is exactness. With non-negative windows lo + 1 <= hi, and both ends of a row's
// interval rise by at most one per row: an interval begins no later than the previous one ends, so the intervals of
// consecutive rows leave no gap between them. Hence keys_of_rows is not only a bound: it is empty exactly when its rows
// see nothing, and otherwise *every* key in it is seen by one of the rows, both ends included. The same holds for
// rows_of_keys (for keys that exist), because the roles of q and k can be exchanged.
#include "core/mask.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

namespace fae {
namespace {

constexpr int kOpen = kOpenDistance;

std::string describe(const MaskSpec& s, int sq, int sk) {
  return "Sq " + std::to_string(sq) + " Sk " + std::to_string(sk) + " left " + std::to_string(s.window_left) +
         " right " + std::to_string(s.window_right) + (s.top_left ? " top-left" : " bottom-right");
}

// The element rule: the distance of k from the diagonal, bounded on both sides.
bool defined_visible(const MaskSpec& s, int64_t sq, int64_t sk, int64_t q, int64_t k) {
  const int64_t diagonal = q + (s.top_left ? 0 : sk - sq);
  const bool left = s.window_left >= kOpen || diagonal - k <= s.window_left;
  const bool right = s.window_right >= kOpen || k - diagonal <= s.window_right;
  return left && right;
}

std::vector<std::vector<char>> visibility(const MaskSpec& s, int sq, int sk) {
  std::vector<std::vector<char>> v(sq, std::vector<char>(sk));
  for (int q = 0; q < sq; ++q)
    for (int k = 0; k < sk; ++k) v[q][k] = defined_visible(s, sq, sk, q, k);
  return v;
}

// Compares all tile functions with counts over the table. Returns false at the first difference, which the caller
// reports: an EXPECT per tile would cost more than the test.
bool tile_agrees(const IntervalMask& mask, const std::vector<std::vector<char>>& v, int m0, int m1, int n0, int n1) {
  const int sq = mask.seqlen_q, sk = mask.seqlen_k;
  int first_key = sk, last_key = -1, first_row = sq, last_row = -1, keys_seen = 0, rows_seeing = 0, pairs = 0;
  for (int k = 0; k < sk; ++k) {
    bool seen = false;
    for (int q = m0; q < m1; ++q) seen |= v[q][k] != 0;
    if (!seen) continue;
    first_key = std::min(first_key, k);
    last_key = k;
    ++keys_seen;
  }
  bool wholes_ok = true;
  for (int q = 0; q < sq; ++q) {
    bool sees = false, all = true;
    for (int k = n0; k < n1; ++k) {
      sees |= v[q][k] != 0;
      all &= v[q][k] != 0;
      pairs += q >= m0 && q < m1 && v[q][k];
    }
    const Range whole = mask.rows_seeing_all(n0, n1);
    wholes_ok &= all == (whole.begin <= q && q < whole.end);
    if (!sees) continue;
    first_row = std::min(first_row, q);
    last_row = q;
    ++rows_seeing;
  }
  const Range keys = mask.keys_of_rows(m0, m1), rows = mask.rows_of_keys(n0, n1);
  const bool keys_ok = keys_seen == 0 ? keys.empty() && keys.size() == 0
                                      : keys.begin == first_key && keys.end == last_key + 1 && keys.size() == keys_seen;
  const bool rows_ok = rows_seeing == 0
                           ? rows.empty() && rows.size() == 0
                           : rows.begin == first_row && rows.end == last_row + 1 && rows.size() == rows_seeing;
  return keys_ok && rows_ok && wholes_ok && mask.tile_is_full(m0, m1, n0, n1) == (pairs == (m1 - m0) * (n1 - n0));
}

std::vector<MaskSpec> all_specs(int longest) {
  std::vector<int> windows = {kOpen};
  for (int w = 0; w <= longest; ++w) windows.push_back(w);
  std::vector<MaskSpec> specs;
  for (const bool top_left : {false, true})
    for (const int left : windows)
      for (const int right : windows) specs.push_back({left, right, top_left});
  return specs;
}

TEST(Mask, EveryElementOfEverySmallMask) {
  for (const MaskSpec& spec : all_specs(8))
    for (int sq = 0; sq <= 7; ++sq)
      for (int sk = 0; sk <= 7; ++sk) {
        const IntervalMask mask = IntervalMask::make(spec, sq, sk);
        for (int q = 0; q < sq; ++q) {
          int visible = 0;
          for (int k = 0; k < sk; ++k) {
            const bool want = defined_visible(spec, sq, sk, q, k);
            visible += want;
            ASSERT_EQ(mask.visible(q, k), want) << describe(spec, sq, sk) << " q " << q << " k " << k;
          }
          // No key outside the sequence, and a row's interval has no hole and no excess.
          ASSERT_FALSE(mask.visible(q, -1) || mask.visible(q, sk));
          ASSERT_EQ((Range{mask.begin(q), mask.end(q)}.size()), visible) << describe(spec, sq, sk) << " q " << q;
        }
      }
}

TEST(Mask, EveryTileOfEverySmallMask) {
  int64_t tiles = 0;
  for (const MaskSpec& spec : all_specs(6))
    for (int sq = 1; sq <= 5; ++sq)
      for (int sk = 1; sk <= 5; ++sk) {
        const IntervalMask mask = IntervalMask::make(spec, sq, sk);
        const auto v = visibility(spec, sq, sk);
        for (int m0 = 0; m0 < sq; ++m0)
          for (int m1 = m0 + 1; m1 <= sq; ++m1)
            for (int n0 = 0; n0 < sk; ++n0)
              for (int n1 = n0 + 1; n1 <= sk; ++n1, ++tiles)
                ASSERT_TRUE(tile_agrees(mask, v, m0, m1, n0, n1))
                    << describe(spec, sq, sk) << " rows " << m0 << ".." << m1 << " keys " << n0 << ".." << n1;
      }
  EXPECT_GT(tiles, 100'000);
}

TEST(Mask, RandomTilesOfLargerMasks) {
  std::mt19937 rng(1);
  const auto draw = [&](int from, int to) { return std::uniform_int_distribution<int>(from, to)(rng); };
  for (int i = 0; i < 400; ++i) {
    const int sq = draw(1, 150), sk = draw(1, 150);
    const auto window = [&] { return draw(0, 2) == 0 ? kOpen : draw(0, 1) ? draw(0, 8) : draw(0, 200); };
    const MaskSpec spec = {window(), window(), draw(0, 1) == 0};
    const IntervalMask mask = IntervalMask::make(spec, sq, sk);
    const auto v = visibility(spec, sq, sk);
    for (int t = 0; t < 10; ++t) {
      const int m0 = draw(0, sq - 1), m1 = draw(m0 + 1, std::min(sq, m0 + 64));
      const int n0 = draw(0, sk - 1), n1 = draw(n0 + 1, std::min(sk, n0 + 64));
      ASSERT_TRUE(tile_agrees(mask, v, m0, m1, n0, n1))
          << describe(spec, sq, sk) << " rows " << m0 << ".." << m1 << " keys " << n0 << ".." << n1;
    }
  }
}

TEST(Mask, NamedMasks) {
  // Causal, aligned at the end: 2 rows, 5 keys; row 0 sees 4 keys, row 1 all.
  const IntervalMask end = IntervalMask::make({kOpen, 0, false}, 2, 5);
  EXPECT_EQ(end.end(0), 4);
  EXPECT_EQ(end.end(1), 5);
  // Causal, aligned at the start: row 0 sees key 0 alone.
  const IntervalMask start = IntervalMask::make({kOpen, 0, true}, 2, 5);
  EXPECT_EQ(start.end(0), 1);
  EXPECT_EQ(start.end(1), 2);
  // More rows than keys under a causal mask: the first Sq - Sk rows are empty, and nothing else is.
  const IntervalMask empty_rows = IntervalMask::make({kOpen, 0, false}, 5, 2);
  for (int q = 0; q < 5; ++q) EXPECT_EQ(empty_rows.begin(q) >= empty_rows.end(q), q < 3);
  EXPECT_TRUE(empty_rows.keys_of_rows(0, 3).empty());
  EXPECT_EQ(empty_rows.rows_of_keys(0, 2).begin, 3);
  // A window of (1, 2): both ends are included.
  const IntervalMask window = IntervalMask::make({1, 2, true}, 10, 10);
  EXPECT_EQ(window.begin(5), 4);
  EXPECT_EQ(window.end(5), 8);
}

// No keys, no rows.
TEST(Mask, EmptySequences) {
  for (const MaskSpec& spec : all_specs(3)) {
    const IntervalMask no_keys = IntervalMask::make(spec, 4, 0), no_rows = IntervalMask::make(spec, 0, 4);
    for (int q = 0; q < 4; ++q) EXPECT_GE(no_keys.begin(q), no_keys.end(q));
    EXPECT_TRUE(no_keys.keys_of_rows(0, 4).empty());
    EXPECT_TRUE(no_rows.rows_of_keys(0, 4).empty());
  }
}

// The longest sequences and windows there may be. Built with UBSan, it also shows that no sum overflows an int.
TEST(Mask, ExtremeLengthsAndWindows) {
  const std::vector<int> lengths = {1, 2, 1000, 1 << 20, kMaxSeqlen - 1, kMaxSeqlen};
  const std::vector<int> windows = {0, 1, 12345, 1 << 29, kMaxSeqlen - 1, kMaxSeqlen, kOpen, 2'147'483'647};
  const auto probes = [](int n) {
    std::vector<int> p;
    for (const int x : {0, 1, n / 3, n / 2, n - 2, n - 1})
      if (x >= 0 && x < n) p.push_back(x);
    return p;
  };
  for (const int sq : lengths)
    for (const int sk : lengths)
      for (const int left : windows)
        for (const int right : windows)
          for (const bool top_left : {false, true}) {
            const MaskSpec spec = {left, right, top_left};
            const IntervalMask mask = IntervalMask::make(spec, sq, sk);
            const int64_t shift = top_left ? 0 : int64_t{sk} - sq;
            // The definition solved for k and for q, in 64 bits.
            const auto keys_of = [&](int64_t q) {
              const int64_t from = left >= kOpen ? 0 : std::max<int64_t>(0, q + shift - left);
              const int64_t to = right >= kOpen ? sk : std::min<int64_t>(sk, q + shift + right + 1);
              return std::pair<int64_t, int64_t>(from, to);
            };
            const auto rows_of = [&](int64_t k) {
              const int64_t from = right >= kOpen ? 0 : std::max<int64_t>(0, k - shift - right);
              const int64_t to = left >= kOpen ? sq : std::min<int64_t>(sq, k - shift + left + 1);
              return std::pair<int64_t, int64_t>(from, to);
            };
            for (const int q : probes(sq)) {
              const auto [from, to] = keys_of(q);
              const Range got = mask.keys_of_rows(q, q + 1);
              ASSERT_EQ(got.empty(), from >= to) << describe(spec, sq, sk) << " q " << q;
              if (from < to) {
                ASSERT_TRUE(got.begin == from && got.end == to) << describe(spec, sq, sk) << " q " << q;
              }
              for (const int k : probes(sk)) {
                ASSERT_EQ(mask.visible(q, k), defined_visible(spec, sq, sk, q, k))
                    << describe(spec, sq, sk) << " q " << q << " k " << k;
                ASSERT_EQ(mask.tile_is_full(q, q + 1, k, k + 1), mask.visible(q, k)) << describe(spec, sq, sk);
              }
            }
            for (const int k : probes(sk)) {
              const auto [from, to] = rows_of(k);
              const Range got = mask.rows_of_keys(k, k + 1);
              ASSERT_EQ(got.empty(), from >= to) << describe(spec, sq, sk) << " k " << k;
              if (from < to) {
                ASSERT_TRUE(got.begin == from && got.end == to) << describe(spec, sq, sk) << " k " << k;
              }
            }
            // The whole matrix as one tile.
            const Range keys = mask.keys_of_rows(0, sq), rows = mask.rows_of_keys(0, sk);
            ASSERT_TRUE(keys.begin >= 0 && keys.end <= sk && rows.begin >= 0 && rows.end <= sq);
            ASSERT_EQ(keys.empty(), rows.empty()) << describe(spec, sq, sk);
            ASSERT_EQ(mask.tile_is_full(0, sq, 0, sk), keys_of(sq - 1).first <= 0 && keys_of(0).second >= sk)
                << describe(spec, sq, sk);
          }
}

// A distance no pair reaches is the same as no bound, so callers may clamp to it.
TEST(Mask, AWindowPastTheSequenceIsOpen) {
  for (const int w : {299, 300, 1 << 29, kMaxSeqlen})
    for (const bool top_left : {false, true}) {
      const IntervalMask closed = IntervalMask::make({w, w, top_left}, 100, 200);
      const IntervalMask open = IntervalMask::make({kOpen, kOpen, top_left}, 100, 200);
      for (int q = 0; q < 100; ++q) {
        EXPECT_EQ(closed.begin(q), open.begin(q));
        EXPECT_EQ(closed.end(q), open.end(q));
      }
    }
}

}  // namespace
}  // namespace fae
