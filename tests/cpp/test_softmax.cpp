// core/softmax.h: the rules, applied block by block over random splits, against softmax written out in long double.
#include "core/softmax.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

namespace fae {
namespace {

template <typename T>
class SoftmaxRules : public testing::Test {};
using Accumulators = testing::Types<float, double>;
TYPED_TEST_SUITE(SoftmaxRules, Accumulators);

template <typename T>
constexpr T kInf = std::numeric_limits<T>::infinity();

// One row: m, l and a one-column O, as an engine carries them. Scores are in base 2.
template <typename T>
struct Row {
  T m = -kInf<T>, l = 0, o = 0;

  void step(const T* t, const T* v, int n) {
    using rules = softmax<T>;
    T m_new = m;
    for (int i = 0; i < n; ++i) m_new = std::max(m_new, t[i]);
    const T alpha = rules::rescale(m, m_new);
    l *= alpha;
    o *= alpha;
    for (int i = 0; i < n; ++i) {
      const T p = std::exp2(t[i] - rules::subtracted_max(m_new));
      l += p;
      o += p * v[i];
    }
    m = m_new;
  }
};

template <typename T>
struct Direct {
  long double lse, out;  // of natural-log scores

  Direct(const std::vector<T>& t, const std::vector<T>& v) {
    long double top = -kInf<long double>, sum = 0, weighted = 0;
    for (const T x : t) top = std::max<long double>(top, x);
    if (top == -kInf<long double>) {
      lse = top;
      out = 0;
      return;
    }
    for (size_t i = 0; i < t.size(); ++i) {
      const long double p = std::exp2(static_cast<long double>(t[i]) - top);
      sum += p;
      weighted += p * v[i];
    }
    lse = top * 0.69314718055994530941723212145818L + std::log(sum);
    out = weighted / sum;
  }
};

TYPED_TEST(SoftmaxRules, OnlineEqualsDirectForEverySplit) {
  using T = TypeParam;
  const double eps = std::numeric_limits<T>::epsilon();
  std::mt19937 rng(7);
  std::normal_distribution<double> normal;
  for (int trial = 0; trial < 2000; ++trial) {
    const int n = 1 + static_cast<int>(rng() % 200);
    const double spread = std::vector<double>{0.1, 1, 10, 100}[trial % 4];
    std::vector<T> t(n), v(n);
    for (int i = 0; i < n; ++i) {
      t[i] = static_cast<T>(normal(rng) * spread);
      v[i] = static_cast<T>(normal(rng));
      // -inf scores: a few, many, and whole leading blocks of them.
      if (trial % 3 == 1 && rng() % 4 == 0) t[i] = -kInf<T>;
      if (trial % 3 == 2 && i < n / 2) t[i] = -kInf<T>;
    }
    Row<T> row;
    for (int at = 0; at < n;) {
      const int step = std::min<int>(n - at, 1 + static_cast<int>(rng() % (trial % 5 == 0 ? n : 16)));
      row.step(&t[at], &v[at], step);
      at += step;
    }
    const Direct<T> want(t, v);
    const T out = row.o * softmax<T>::inverse_sum(row.l), lse = softmax<T>::lse(row.m, row.l);
    ASSERT_NEAR(out, want.out, 200 * eps) << "trial " << trial;
    if (want.lse == -kInf<long double>) {
      ASSERT_EQ(lse, -kInf<T>);
    } else {
      ASSERT_NEAR(lse, want.lse, 16 * eps * std::max(1.0, std::abs(static_cast<double>(want.lse)))) << trial;
    }
  }
}

TYPED_TEST(SoftmaxRules, RescaleFactors) {
  using T = TypeParam;
  using rules = softmax<T>;
  EXPECT_EQ(rules::rescale(T(3), T(3)), T(1));       // no rise, bit for bit
  EXPECT_EQ(rules::rescale(T(-1), T(1)), T(0.25));   // base 2, exact
  EXPECT_EQ(rules::rescale(T(-5e4), T(5e4)), T(0));  // underflows to zero, not to NaN
  EXPECT_EQ(rules::rescale(-kInf<T>, T(2)), T(0));   // the first key of a row: what was there does not count
  EXPECT_FALSE(std::isnan(rules::rescale(-kInf<T>, -kInf<T>)));
  EXPECT_EQ(rules::rescale(-kInf<T>, -kInf<T>) * T(0), T(0));  // still empty: l and O stay 0
  EXPECT_EQ(rules::subtracted_max(-kInf<T>), T(0));
  EXPECT_EQ(rules::subtracted_max(T(-7.5)), T(-7.5));
}

TYPED_TEST(SoftmaxRules, EmptyRows) {
  using T = TypeParam;
  using rules = softmax<T>;
  Row<T> row;
  const std::vector<T> t(5, -kInf<T>), v(5, T(3));
  for (int step = 0; step < 3; ++step) row.step(t.data(), v.data(), 5);
  EXPECT_EQ(row.m, -kInf<T>);
  EXPECT_EQ(row.l, T(0));
  EXPECT_EQ(row.o * rules::inverse_sum(row.l), T(0));
  EXPECT_EQ(rules::lse(row.m, row.l), -kInf<T>);
  // The same row once a key arrives.
  const T score = T(1.5), value = T(-2);
  row.step(&score, &value, 1);
  EXPECT_EQ(row.o * rules::inverse_sum(row.l), value);
  EXPECT_NEAR(rules::lse(row.m, row.l), 1.5 * kLn2, 4 * std::numeric_limits<T>::epsilon());
}

TYPED_TEST(SoftmaxRules, LseIsInNaturalLog) {
  using T = TypeParam;
  const T eps = std::numeric_limits<T>::epsilon();
  // Four equal scores s: lse = s + ln 4, whatever base the scores were kept in.
  for (const double s : {-3.0, 0.0, 0.5, 80.0})
    EXPECT_NEAR(softmax<T>::lse(static_cast<T>(s * kLog2E), T(4)), s + std::log(4.0), 8 * eps * std::max(1.0, s));
}

TYPED_TEST(SoftmaxRules, BackwardRecomputesP) {
  using T = TypeParam;
  using rules = softmax<T>;
  const T eps = std::numeric_limits<T>::epsilon();
  std::mt19937 rng(3);
  std::normal_distribution<double> normal(0, 4);
  for (int trial = 0; trial < 200; ++trial) {
    std::vector<T> t(37), v(37, T(1));
    for (T& x : t) x = static_cast<T>(normal(rng));
    Row<T> row;
    row.step(t.data(), v.data(), 37);
    const T lse2 = rules::lse_base2(rules::lse(row.m, row.l));
    T sum = 0;
    for (const T x : t) sum += std::exp2(x - lse2);
    ASSERT_NEAR(sum, 1, 100 * eps);
  }
  // An empty row: P = 0 for any score, and for a score of -inf.
  const T empty = rules::lse_base2(-kInf<T>);
  EXPECT_EQ(empty, kInf<T>);
  for (const T x : {T(0), T(1e4), T(-1e4), -kInf<T>, std::numeric_limits<T>::max()})
    EXPECT_EQ(std::exp2(x - empty), T(0));
}

}  // namespace
}  // namespace fae
