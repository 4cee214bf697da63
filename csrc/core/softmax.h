// The rules of online softmax, shared by every engine and every loop order.
//
// Scores are kept in base 2: t = scale * log2(e) * (q . k), so that exp(scale * q.k - max) is one exp2 of one fused
// multiply-add. A row carries m_i, the largest t seen, and l_i, the sum of exp2(t - m_i) (FlashAttention, Algorithm 1,
// lines 10 to 11; FlashAttention-2, Algorithm 1, line 9).
#pragma once

#include <cmath>
#include <limits>

#include "platform.h"

namespace fae {

constexpr double kLog2E = 1.4426950408889634074;  // log2(e)
constexpr double kLn2 = 0.69314718055994530942;   // ln(2)

template <typename T>
struct softmax {
  FAE_HD static T neg_inf() { return -std::numeric_limits<T>::infinity(); }

  // The maximum that is subtracted. A row that has seen no key has m_i = -inf; -inf - -inf would be NaN, so it
  // subtracts 0 and every exp2 of it is exp2(-inf) = 0.
  FAE_HD static T subtracted_max(T m_i) { return m_i == neg_inf() ? T(0) : m_i; }

  // What a row's O and l are multiplied with when its maximum rises from m_old to m_new.
  FAE_HD static T rescale(T m_old, T m_new) { return exp2_of(m_old - subtracted_max(m_new)); }

  // The factor that turns the accumulated O into the output. An empty row gives 0, not NaN.
  FAE_HD static T inverse_sum(T l_i) { return l_i == T(0) ? T(0) : T(1) / l_i; }

  // logsumexp of the scaled scores in natural log; -inf for an empty row, +inf where a score is (its l is NaN).
  FAE_HD static T lse(T m_i, T l_i) {
    if (l_i == T(0)) return neg_inf();
    return m_i == -neg_inf() ? m_i : m_i * T(kLn2) + log_of(l_i);
  }

  // Backward recomputes P = exp2(t - lse_base2(lse)). An empty row gets +inf there, hence P = 0 and no NaN.
  FAE_HD static T lse_base2(T lse) { return lse == neg_inf() ? std::numeric_limits<T>::infinity() : lse * T(kLog2E); }

 private:
  FAE_HD static float exp2_of(float x) { return ::exp2f(x); }
  FAE_HD static double exp2_of(double x) { return ::exp2(x); }
  FAE_HD static float log_of(float x) { return ::logf(x); }
  FAE_HD static double log_of(double x) { return ::log(x); }
};

}  // namespace fae
