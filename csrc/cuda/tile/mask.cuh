// IntervalMask on accumulator fragments.
#pragma once

#include "../../core/mask.h"
#include "../../core/softmax.h"

namespace fae::tile {

// Scores [16 rows of queries][8 kTiles keys] of a warp: row = first_row + lane / 4 (+ 8), key = first_key + 8 tile +
// 2 (lane % 4) (+ 1). What a row does not see becomes -inf.
template <int kTiles>
FAE_DEVICE void mask_scores(float (&s)[kTiles][4], const IntervalMask& mask, int first_row, int first_key, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + lane / 4 + 8 * half, at = first_key + 2 * (lane % 4);
    const int begin = mask.begin(row) - at, end = mask.end(row) - at;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (8 * i + e < begin || 8 * i + e >= end) s[i][2 * half + e] = softmax<float>::neg_inf();
    }
  }
}

// The same with keys along the rows and queries along the columns.
template <int kTiles>
FAE_DEVICE void mask_scores_transposed(float (&s)[kTiles][4], const IntervalMask& mask, int first_key, int first_row,
                                       int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = first_key + lane / 4 + 8 * half, at = first_row + 2 * (lane % 4);
    const Range rows = key < mask.seqlen_k ? mask.rows_of_keys(key, key + 1) : Range{0, 0};
    const int begin = rows.begin - at, end = rows.end - at;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (8 * i + e < begin || 8 * i + e >= end) s[i][2 * half + e] = softmax<float>::neg_inf();
    }
  }
}

}  // namespace fae::tile
