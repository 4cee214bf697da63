// Causal, sliding-window and ragged-end masks are one thing: an interval of visible keys per query row.
//
// Key k is visible to row q iff  max(0, q + lo) <= k < min(seqlen_k, q + hi).  Both ends rise with q, which makes the
// visible region of a tile, and the tiles that a loop has to visit, a matter of looking at its first and last row.
#pragma once

#include <cstdint>

#include "platform.h"

namespace fae {

// A distance that no pair of positions reaches (lengths are below 2^30), and that can be added to one without overflow.
constexpr int kOpenDistance = 1 << 30;
constexpr int kMaxSeqlen = kOpenDistance - 1;

struct Range {
  int begin;
  int end;
  FAE_HD bool empty() const { return begin >= end; }
  FAE_HD int size() const { return empty() ? 0 : end - begin; }
};

// What the caller asked for, before the lengths of a sequence are known.
struct MaskSpec {
  int window_left = kOpenDistance;   // keys visible to the left of the diagonal; kOpenDistance: all
  int window_right = kOpenDistance;  // keys visible to the right of it; causal is 0
  bool top_left = false;             // the diagonal starts at (0, 0) instead of ending at (Sq - 1, Sk - 1)
};

struct IntervalMask {
  int seqlen_q;
  int seqlen_k;
  int lo;  // first visible key of row q is q + lo, kept in [-2^31, 2^31) for every q
  int hi;  // one past the last visible key is q + hi

  FAE_HD static IntervalMask make(const MaskSpec& spec, int seqlen_q, int seqlen_k) {
    const int shift = spec.top_left ? 0 : seqlen_k - seqlen_q;
    const bool open_left = spec.window_left >= kOpenDistance;
    const bool open_right = spec.window_right >= kOpenDistance;
    return {seqlen_q, seqlen_k, open_left ? -kOpenDistance : clamp_distance(int64_t{shift} - spec.window_left),
            open_right ? kOpenDistance : clamp_distance(int64_t{shift} + spec.window_right + 1)};
  }

  // The visible keys of row q are [begin(q), end(q)); the interval is empty when end(q) <= begin(q).
  FAE_HD int begin(int q) const { return q + lo > 0 ? q + lo : 0; }
  FAE_HD int end(int q) const { return q + hi < seqlen_k ? q + hi : seqlen_k; }
  FAE_HD bool visible(int q, int k) const { return begin(q) <= k && k < end(q); }

  // Forward: the keys that rows [m0, m1) can see. Empty when no row of them sees any.
  FAE_HD Range keys_of_rows(int m0, int m1) const { return {begin(m0), end(m1 - 1)}; }

  // Backward: the rows that can see one of the keys [n0, n1).
  FAE_HD Range rows_of_keys(int n0, int n1) const {
    const int first = n0 - hi + 1, last = n1 - lo;
    return {first > 0 ? first : 0, last < seqlen_q ? last : seqlen_q};
  }

  // The rows that see all of the keys [n0, n1), of which there is one at least.
  FAE_HD Range rows_seeing_all(int n0, int n1) const {
    const int first = n1 - hi, last = n0 + 1 - lo;
    if (n1 > seqlen_k) return {0, 0};
    return {first > 0 ? first : 0, last < seqlen_q ? last : seqlen_q};
  }

  // True when every row of [m0, m1) sees every key of [n0, n1): the tile needs no masking.
  FAE_HD bool tile_is_full(int m0, int m1, int n0, int n1) const { return begin(m1 - 1) <= n0 && n1 <= end(m0); }

 private:
  FAE_HD static int clamp_distance(int64_t d) {
    const int64_t bound = kOpenDistance;
    return static_cast<int>(d < -bound ? -bound : d > bound ? bound : d);
  }
};

}  // namespace fae
