// Online softmax on accumulator fragments: 16 rows a warp, two rows a thread, a row on the four lanes of a quad.
//
// The reference m_i of a row need not be the largest score seen: any number will do that keeps exp2(t - m_i) in range, since
// it cancels in O / l. So m_i moves only when a score exceeds it by more than kSlack powers of two, and O is rescaled only
// then. P stays below 2^kSlack after a move, and sums of it are exact in fp32 as before.
#pragma once

#include "../../core/softmax.h"
#include "../ptx/arithmetic.cuh"
#include "mma.cuh"

namespace fae::tile {

FAE_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
FAE_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

template <typename T, int kTiles>  // kTiles n8 tiles of scores
struct OnlineSoftmax {
  static constexpr float kSlack = 8.0f;
  // What a lane's part of a row may sum up to before the row's reference has to move: fp16 holds 65,504.
  static constexpr float kLargestSum = 4096.0f;

  using Scores = float[kTiles][4];
  using Probabilities = uint32_t[kTiles / 2][4];  // A fragments of P V

  float m_i[2];  // the reference, in powers of two
  float l_i[2];  // this lane's part of the row's sum

  // P = exp2(scale S - reference), packed; the sums of this lane.
  FAE_DEVICE static void exponentials(Probabilities& p, float (&sum)[2], const Scores& s, const float (&reference)[2],
                                      float scale) {
    sum[0] = sum[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float x = ptx::ex2_approx(fmaf(s[i][2 * half], scale, -reference[half]));
        const float y = ptx::ex2_approx(fmaf(s[i][2 * half + 1], scale, -reference[half]));
        sum[half] += x + y;
        p[i / 2][2 * (i % 2) + half] = Mma<T>::pack(x, y);
      }
    }
  }

  // A tile whose scores are assumed not to exceed the references by much: no maximum is taken. True where that holds for
  // all rows of the warp; else nothing has changed but p, and `update` has to be called. A row without a reference yet
  // (m_i = -inf) gives infinities, NaN gives NaN: both fail the test.
  FAE_DEVICE bool try_update(Probabilities& p, const Scores& s, float scale) {
    float sum[2];
    exponentials(p, sum, s, m_i, scale);
    if (__any_sync(0xffffffffu, !(sum[0] <= kLargestSum && sum[1] <= kLargestSum))) return false;
    l_i[0] += sum[0];
    l_i[1] += sum[1];
    return true;
  }

  // Algorithm 1 of FlashAttention-2, lines 8 to 10, but for P V. With kFirst the row starts here.
  template <bool kFirst, int kColumnTiles>
  FAE_DEVICE void update(Probabilities& p, const Scores& s, float scale, float (&o)[kColumnTiles][4]) {
    float top[2] = {s[0][0], s[0][2]};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) top[half] = fmaxf(top[half], fmaxf(s[i][2 * half], s[i][2 * half + 1]));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) top[half] = quad_max(top[half]) * scale;
    if constexpr (kFirst) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        m_i[half] = top[half];
        l_i[half] = 0.0f;
      }
    } else if (__any_sync(0xffffffffu, top[0] > m_i[0] + kSlack || top[1] > m_i[1] + kSlack)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float m_new = fmaxf(m_i[half], top[half]);
        const float factor = ptx::ex2_approx(m_i[half] - softmax<float>::subtracted_max(m_new));
        m_i[half] = m_new;
        l_i[half] *= factor;
#pragma unroll
        for (int i = 0; i < kColumnTiles; ++i) {
          o[i][2 * half] *= factor;
          o[i][2 * half + 1] *= factor;
        }
      }
    }
    const float reference[2] = {softmax<float>::subtracted_max(m_i[0]), softmax<float>::subtracted_max(m_i[1])};
    float sum[2];
    exponentials(p, sum, s, reference, scale);
    l_i[0] += sum[0];
    l_i[1] += sum[1];
  }
};

}  // namespace fae::tile
