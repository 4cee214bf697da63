// The CPU engine's tile operations, in every instruction set that this CPU runs, against plain loops. Buffers end at a
// page that may not be touched; what lies between rows, and around a result, is filled with a pattern and checked.
#include "cpu/tile_ops.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "core/softmax.h"
#include "guarded.h"

namespace fae::cpu {

#define FAE_DECLARE(isa)                                   \
  namespace isa {                                          \
  extern const TileOps<float, float, float> f32_ops;       \
  extern const TileOps<double, double, double> f64_ops;    \
  extern const TileOps<bf16_t, bf16_t, float> bf16_ops;    \
  extern const TileOps<bf16_t, float, float> bf16_f32_ops; \
  extern const TileOps<f16_t, float, float> f16_f32_ops;   \
  }
FAE_DECLARE(isa_default)
#if defined(__x86_64__)
FAE_DECLARE(isa_avx2)
FAE_DECLARE(isa_avx512)
#endif
#undef FAE_DECLARE

namespace {

using test::Guard;
using test::GuardedArray;

// ---- formats, from their definition ---------------------------------------------------------------------------------

// 1 sign, kExponent and kMantissa bits; bias 2^(kExponent - 1) - 1; all-ones exponents are infinities and NaNs.
template <int kExponent, int kMantissa>
struct Format {
  static constexpr int kBias = (1 << (kExponent - 1)) - 1, kAllOnes = (1 << kExponent) - 1;

  static double decode(uint16_t bits) {
    const int exponent = bits >> kMantissa & kAllOnes, mantissa = bits & ((1 << kMantissa) - 1);
    double magnitude;
    if (exponent == kAllOnes) {
      magnitude = mantissa ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
    } else if (exponent == 0) {
      magnitude = std::ldexp(mantissa, 1 - kBias - kMantissa);
    } else {
      magnitude = std::ldexp(mantissa + (1 << kMantissa), exponent - kBias - kMantissa);
    }
    return bits & 0x8000 ? -magnitude : magnitude;
  }

  // Nearest value, ties to the even one, infinity from half a step past the largest on. NaN gives some NaN.
  static uint16_t encode(double x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return static_cast<uint16_t>(sign | (kAllOnes << kMantissa) | (1 << (kMantissa - 1)));
    x = std::fabs(x);
    if (std::isinf(x)) return static_cast<uint16_t>(sign | kAllOnes << kMantissa);
    int exponent = x == 0 ? 1 - kBias : std::max(std::ilogb(x), 1 - kBias);
    double steps = std::nearbyint(std::ldexp(x, kMantissa - exponent));  // exact before the rounding
    if (steps >= 2 << kMantissa) {
      steps /= 2;
      ++exponent;
    }
    if (exponent > kBias) return static_cast<uint16_t>(sign | kAllOnes << kMantissa);
    const int field = steps < 1 << kMantissa ? 0 : exponent + kBias;
    return static_cast<uint16_t>(sign | field << kMantissa | (static_cast<int>(steps) & ((1 << kMantissa) - 1)));
  }
};
template <typename T>
using FormatOf = std::conditional_t<std::is_same_v<T, f16_t>, Format<5, 10>, Format<8, 7>>;

template <typename T>
double value_of(T x) {
  if constexpr (is_16bit<T>) {
    return FormatOf<T>::decode(x.bits);
  } else {
    return x;
  }
}
template <typename T>
T from(double x) {
  if constexpr (is_16bit<T>) {
    return {FormatOf<T>::encode(x)};
  } else {
    return static_cast<T>(x);
  }
}

template <typename T>
bool same_bits(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}
template <typename T>
bool same(T a, T b) {
  return same_bits(a, b) || (std::isnan(value_of(a)) && std::isnan(value_of(b)));
}

// ---- instruction sets and triples -----------------------------------------------------------------------------------

struct Isa {
  const char* name;
  const TileOps<float, float, float>& f32;
  const TileOps<double, double, double>& f64;
  const TileOps<bf16_t, bf16_t, float>& bf16;
  const TileOps<bf16_t, float, float>& bf16_f32;
  const TileOps<f16_t, float, float>& f16_f32;

  template <typename F>
  void each_triple(const F& f) const {
    run(f32, "fp32", f);
    run(f64, "fp64", f);
    run(bf16, "bf16", f);
    run(bf16_f32, "bf16 in fp32", f);
    run(f16_f32, "fp16 in fp32", f);
  }

 private:
  template <typename Ops, typename F>
  void run(const Ops& ops, const char* triple, const F& f) const {
    SCOPED_TRACE(triple);
    if (!testing::Test::HasFatalFailure()) f(ops);
  }
};

std::vector<Isa> isas() {
  std::vector<Isa> list;
#define FAE_ADD(isa) \
  list.push_back({#isa, isa::f32_ops, isa::f64_ops, isa::bf16_ops, isa::bf16_f32_ops, isa::f16_f32_ops})
  FAE_ADD(isa_default);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) FAE_ADD(isa_avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    // As tile_ops() picks them.
    const auto& bf16 = __builtin_cpu_supports("avx512bf16") ? isa_avx512::bf16_ops : isa_avx2::bf16_ops;
    list.push_back({"isa_avx512", isa_avx512::f32_ops, isa_avx512::f64_ops, bf16, isa_avx512::bf16_f32_ops,
                    isa_avx512::f16_f32_ops});
  }
#endif
#undef FAE_ADD
  return list;
}

template <typename Ops>
struct TypesOf;
template <typename In_, typename Op_, typename Acc_>
struct TypesOf<TileOps<In_, Op_, Acc_>> {
  using In = In_;
  using Op = Op_;
  using Acc = Acc_;
  static constexpr bool kVnni = is_16bit<Op_>;
};
#define FAE_TYPES(ops)                            \
  using T = TypesOf<std::decay_t<decltype(ops)>>; \
  using In [[maybe_unused]] = typename T::In;     \
  using Op [[maybe_unused]] = typename T::Op;     \
  using Acc [[maybe_unused]] = typename T::Acc

// ---- matrices -------------------------------------------------------------------------------------------------------

std::mt19937& rng() {
  static std::mt19937 engine(11);
  return engine;
}
double normal() { return std::normal_distribution<double>()(rng()); }

// rows x cols inside a leading dimension; sources have NaN between the rows, results a pattern that has to survive.
constexpr int kNan = 0xff, kPattern = 0xa5;

template <typename E>
struct Matrix {
  int rows, cols;
  int64_t ld;
  GuardedArray<E> memory;

  Matrix(int rows, int cols, int64_t ld, int fill, Guard guard)
      : rows(rows), cols(cols), ld(ld), memory(rows == 0 ? 0 : (rows - 1) * ld + cols, fill, guard) {}
  E* data() { return memory.data(); }
  E& at(int r, int c) { return memory[r * ld + c]; }
  Matrix& random() {
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < cols; ++c) at(r, c) = from<E>(normal());
    return *this;
  }
  bool surroundings_untouched() const {
    for (size_t i = 0; i < memory.size(); ++i)
      if (static_cast<int>(i % ld) >= cols && !memory.untouched(i)) return false;
    return memory.slack_untouched();
  }
};
template <typename E>
Matrix<E> source(int rows, int cols, int64_t ld, Guard guard) {
  return Matrix<E>(rows, cols, ld, kNan, guard);
}

// Sizes around every vector width, tile and tail; a strided and a dense leading dimension; guards on both sides.
struct Shape {
  int rows, cols, gap;
  Guard guard;
};
std::vector<Shape> shapes() {
  std::vector<Shape> list;
  int i = 0;
  for (const int rows : {1, 2, 3, 15, 16, 17, 33})
    for (const int cols : {1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 59, 64, 111})
      list.push_back({rows, cols, std::vector<int>{0, 1, 5, 16}[i % 4], i++ % 3 ? Guard::kBehind : Guard::kInFront});
  return list;
}
std::string describe(const Shape& s) {
  return std::to_string(s.rows) + " x " + std::to_string(s.cols) + " gap " + std::to_string(s.gap) +
         (s.guard == Guard::kBehind ? " guard behind" : " guard in front");
}
int round_up(int n, int to) { return (n + to - 1) / to * to; }

class TileOpsTest : public testing::TestWithParam<int> {
 protected:
  const Isa isa = isas()[GetParam()];
};

// What an operand holds of source element x.
template <typename Op, typename In>
Op operand(In x) {
  if constexpr (std::is_same_v<Op, In>) {
    return x;
  } else {
    return static_cast<Op>(value_of(x));
  }
}

// ---- packing --------------------------------------------------------------------------------------------------------

TEST_P(TileOpsTest, CopyRows) {
  isa.each_triple([](const auto& ops) {
    FAE_TYPES(ops);
    for (const Shape& s : shapes()) {
      auto src = source<In>(s.rows, s.cols, s.cols + s.gap, s.guard);
      src.random();
      const int rows_padded = s.rows + s.gap, cols_padded = s.cols + s.gap % 3;
      Matrix<Op> dst(rows_padded, cols_padded, cols_padded + 3, kPattern, s.guard);
      ops.copy_rows(src.data(), src.ld, s.rows, s.cols, dst.data(), static_cast<int>(dst.ld), rows_padded, cols_padded);
      for (int r = 0; r < rows_padded; ++r)
        for (int c = 0; c < cols_padded; ++c) {
          const bool inside = r < s.rows && c < s.cols;
          ASSERT_TRUE(same_bits(dst.at(r, c), inside ? operand<Op>(src.at(r, c)) : Op{})) << describe(s);
        }
      ASSERT_TRUE(dst.surroundings_untouched()) << describe(s);
    }
  });
}

// Element (k, n) of a B operand.
template <bool kVnni, typename Op>
Op b_element(Matrix<Op>& m, int k, int n) {
  if constexpr (kVnni) {
    return m.at(k / 2, 2 * n + k % 2);
  } else {
    return m.at(k, n);
  }
}
// Storage for a B operand of k x n: VNNI rows hold pairs.
template <bool kVnni, typename Op>
Matrix<Op> b_operand(int k, int n, int ld, Guard guard) {
  return kVnni ? Matrix<Op>(k / 2, 2 * n, 2 * ld, kPattern, guard) : Matrix<Op>(k, n, ld, kPattern, guard);
}

TEST_P(TileOpsTest, PackB) {
  isa.each_triple([](const auto& ops) {
    FAE_TYPES(ops);
    for (const Shape& s : shapes()) {
      auto src = source<In>(s.rows, s.cols, s.cols + s.gap, s.guard);
      src.random();
      const int rows_padded = round_up(s.rows, 2) + 2 * s.gap, ld = s.cols + s.gap;
      auto dst = b_operand<T::kVnni, Op>(rows_padded, s.cols, ld, s.guard);
      ops.pack_b(src.data(), src.ld, s.rows, s.cols, dst.data(), ld, rows_padded);
      for (int k = 0; k < rows_padded; ++k)
        for (int n = 0; n < s.cols; ++n)
          ASSERT_TRUE(same_bits(b_element<T::kVnni>(dst, k, n), k < s.rows ? operand<Op>(src.at(k, n)) : Op{}))
              << describe(s) << " k " << k << " n " << n;
      ASSERT_TRUE(dst.surroundings_untouched()) << describe(s);
    }
  });
}

TEST_P(TileOpsTest, PackBTransposed) {
  isa.each_triple([](const auto& ops) {
    FAE_TYPES(ops);
    for (const Shape& s : shapes()) {
      auto src = source<In>(s.rows, s.cols, s.cols + s.gap, s.guard);
      src.random();
      const int rows_padded = round_up(s.rows, 16) + 16 * (s.gap % 2), ld = rows_padded + s.gap;
      const int cols_padded = round_up(s.cols, 2) + 2 * (s.gap % 2);
      auto dst = b_operand<T::kVnni, Op>(cols_padded, rows_padded, ld, s.guard);
      ops.pack_b_transposed(src.data(), src.ld, s.rows, s.cols, dst.data(), ld, rows_padded, cols_padded);
      for (int k = 0; k < cols_padded; ++k)
        for (int n = 0; n < rows_padded; ++n) {
          const bool inside = n < s.rows && k < s.cols;
          ASSERT_TRUE(same_bits(b_element<T::kVnni>(dst, k, n), inside ? operand<Op>(src.at(n, k)) : Op{}))
              << describe(s) << " k " << k << " n " << n;
        }
      ASSERT_TRUE(dst.surroundings_untouched()) << describe(s);
    }
  });
}

TEST_P(TileOpsTest, PackATransposed) {
  isa.each_triple([](const auto& ops) {
    FAE_TYPES(ops);
    for (const Shape& s : shapes()) {
      auto src = source<In>(s.rows, s.cols, s.cols + s.gap, s.guard);
      src.random();
      const int rows_padded = round_up(s.rows, 16) + 16 * (s.gap % 2), ld = rows_padded + s.gap;
      Matrix<Op> dst(s.cols, rows_padded, ld, kPattern, s.guard);
      ops.pack_a_transposed(src.data(), src.ld, s.rows, s.cols, dst.data(), ld, rows_padded);
      for (int c = 0; c < s.cols; ++c)
        for (int r = 0; r < rows_padded; ++r)
          ASSERT_TRUE(same_bits(dst.at(c, r), r < s.rows ? operand<Op>(src.at(r, c)) : Op{})) << describe(s);
      ASSERT_TRUE(dst.surroundings_untouched()) << describe(s);
    }
  });
}

// ---- softmax --------------------------------------------------------------------------------------------------------

// How exact P is in relative terms: exp2 and, for 16-bit operands, its rounding.
template <typename Op>
constexpr double p_tolerance = 1e-6;
template <>
constexpr double p_tolerance<double> = 1e-14;
template <>
constexpr double p_tolerance<bf16_t> = 1.0 / 256 + 4e-6;

TEST_P(TileOpsTest, SoftmaxStep) {
  isa.each_triple([](const auto& ops) {
    FAE_TYPES(ops);
    for (int trial = 0; trial < 60; ++trial) {
      const int rows = 1 + trial % 19, cols = kColumnStep * (1 + trial % 9), ld = cols + trial % 5 * 3;
      const Guard guard = trial % 3 ? Guard::kBehind : Guard::kInFront;
      const bool in_place = std::is_same_v<Op, Acc> && trial % 2;
      const Acc scale = static_cast<Acc>(trial % 4 == 3 ? -0.7 : 1.3);
      auto s = source<Acc>(rows, cols, ld, guard);
      s.random();
      Matrix<Op> separate(rows, cols, ld, kPattern, guard);
      GuardedArray<Range> visible(rows, kNan, guard);
      GuardedArray<Acc> m(rows, kNan, guard), l(rows, kNan, guard), alpha(rows, kNan, guard);
      std::vector<double> m_old(rows), l_old(rows);
      for (int r = 0; r < rows; ++r) {
        // Every kind of interval: all, none, one element, inside one vector, ragged on either or both sides.
        const int a = static_cast<int>(rng()() % (cols + 1)), b = static_cast<int>(rng()() % (cols + 1));
        visible[r] = r % 5 == 0   ? Range{0, cols}
                     : r % 5 == 1 ? Range{a, a}
                     : r % 5 == 2 ? Range{std::min(a, cols - 1), std::min(a, cols - 1) + 1}
                     : r % 5 == 3 ? Range{0, b}
                                  : Range{std::min(a, b), std::max(a, b)};
        // A fresh row, one whose maximum rises, one whose does not; and rows with -inf scores, some with nothing else.
        m[r] = r % 3 == 0 ? softmax<Acc>::neg_inf() : static_cast<Acc>(r % 3 == 1 ? -4 : 20);
        l[r] = r % 3 == 0 ? Acc(0) : Acc(2);
        m_old[r] = m[r];
        l_old[r] = l[r];
        if (scale > 0 && r % 7 == 3)
          for (int c = 0; c < cols; ++c)
            if (trial % 2 || c % 3) s.at(r, c) = softmax<Acc>::neg_inf();
        // What is masked must not matter, whatever it is.
        for (int c = 0; c < cols; ++c)
          if (c < visible[r].begin || c >= visible[r].end) s.at(r, c) = static_cast<Acc>(c % 2 ? NAN : 1e30);
      }
      std::vector<Acc> scores(rows * cols);
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < cols; ++c) scores[r * cols + c] = s.at(r, c);

      Op* p = separate.data();
      if constexpr (std::is_same_v<Op, Acc>) p = in_place ? s.data() : p;
      const bool any =
          ops.softmax_step(s.data(), ld, rows, cols, visible.data(), scale, m.data(), l.data(), alpha.data(), p, ld);
      bool any_differs = false;
      for (int r = 0; r < rows; ++r) {
        SCOPED_TRACE("trial " + std::to_string(trial) + " row " + std::to_string(r));
        double top = m_old[r];
        for (int c = visible[r].begin; c < visible[r].end; ++c)
          top = std::max(top, double{scores[r * cols + c]} * scale);
        const double subtract = std::isinf(top) ? 0 : top;
        double sum = 0;
        for (int c = 0; c < cols; ++c) {
          const bool inside = visible[r].begin <= c && c < visible[r].end;
          const double want = inside ? std::exp2(double{scores[r * cols + c]} * scale - subtract) : 0;
          sum += want;
          const double got = value_of(p[int64_t{r} * ld + c]);
          // The argument's own rounding: one ulp of a number below 32.
          ASSERT_NEAR(got, want, (p_tolerance<Op> + 32 * std::numeric_limits<Acc>::epsilon()) * want) << "column " << c;
          ASSERT_TRUE(inside || same_bits(p[int64_t{r} * ld + c], Op{})) << "column " << c;
        }
        const double factor = m_old[r] == top ? 1 : std::exp2(m_old[r] - subtract);
        const double eps = std::numeric_limits<Acc>::epsilon();
        if (std::isinf(top)) {
          ASSERT_EQ(m[r], top);
        } else {
          ASSERT_NEAR(m[r], top, 2 * eps * std::fabs(top));
        }
        ASSERT_NEAR(l[r], l_old[r] * factor + sum, (is_16bit<Op> ? 1e-5 : 100 * eps) * (l_old[r] + sum));
        ASSERT_NEAR(alpha[r], factor, 50 * eps);
        any_differs |= alpha[r] != Acc(1);
      }
      ASSERT_EQ(any, any_differs);
      ASSERT_TRUE(separate.surroundings_untouched() && s.surroundings_untouched() && m.slack_untouched() &&
                  l.slack_untouched() && alpha.slack_untouched());
    }
  });
}

// A NaN score reaches the output and the sum; it does not get lost in the maximum.
TEST_P(TileOpsTest, SoftmaxStepKeepsNan) {
  isa.each_triple([](const auto& ops) {
    FAE_TYPES(ops);
    for (const int where : {0, 5, 31, 40, 63}) {
      std::vector<Acc> s(64, Acc(0.5));
      std::vector<Op> p(64);
      s[where] = std::numeric_limits<Acc>::quiet_NaN();
      const Range visible = {0, 64};
      Acc m = softmax<Acc>::neg_inf(), l = 0, alpha = 0;
      ops.softmax_step(s.data(), 64, 1, 64, &visible, Acc(1), &m, &l, &alpha, p.data(), 64);
      EXPECT_TRUE(std::isnan(value_of(p[where])) && std::isnan(l));
    }
  });
}

// The order of summation does not depend on where the visible interval begins, nor on what follows it: a row gives the
// same bits whether its tile starts at the first visible column or earlier.
TEST_P(TileOpsTest, SoftmaxStepIsTheSameWhateverTheTileHolds) {
  isa.each_triple([](const auto& ops) {
    FAE_TYPES(ops);
    const int cols = 256;
    std::vector<Acc> s(cols);
    for (Acc& x : s) x = static_cast<Acc>(normal());
    for (const Range visible : {Range{0, 64}, Range{3, 61}, Range{70, 130}}) {
      Acc l[2], m[2];
      for (int i = 0; i < 2; ++i) {
        const int width = i ? cols : round_up(visible.end, kColumnStep);
        std::vector<Op> p(cols);
        Acc alpha;
        m[i] = softmax<Acc>::neg_inf();
        l[i] = 0;
        ops.softmax_step(s.data(), cols, 1, width, &visible, Acc(1), &m[i], &l[i], &alpha, p.data(), cols);
      }
      EXPECT_EQ(l[0], l[1]);
      EXPECT_EQ(m[0], m[1]);
    }
  });
}

TEST_P(TileOpsTest, SoftmaxBackward) {
  isa.each_triple([](const auto& ops) {
    FAE_TYPES(ops);
    for (int trial = 0; trial < 40; ++trial) {
      const int rows = 2 * (1 + trial % 9), cols = kColumnStep * (1 + trial % 8), ld = cols + trial % 3 * 5,
                ld_op = cols + trial % 4 * 2;
      const Guard guard = trial % 3 ? Guard::kBehind : Guard::kInFront;
      const Acc scale = static_cast<Acc>(0.9);
      auto s = source<Acc>(rows, cols, ld, guard), dp = source<Acc>(rows, cols, ld, guard);
      s.random();
      dp.random();
      GuardedArray<Range> visible(rows, kNan, guard);
      GuardedArray<Acc> lse2(cols, kNan, guard), delta(cols, kNan, guard);
      for (int c = 0; c < cols; ++c) {
        lse2[c] = c % 11 == 10 ? std::numeric_limits<Acc>::infinity() : static_cast<Acc>(2 + 0.1 * normal());
        delta[c] = c % 11 == 10 ? Acc(0) : static_cast<Acc>(normal());
      }
      for (int r = 0; r < rows; ++r) {
        const int a = static_cast<int>(rng()() % (cols + 1)), b = static_cast<int>(rng()() % (cols + 1));
        visible[r] = r % 4 == 0 ? Range{0, cols} : r % 4 == 1 ? Range{a, a} : Range{std::min(a, b), std::max(a, b)};
        for (int c = 0; c < cols; ++c)
          if (c < visible[r].begin || c >= visible[r].end) s.at(r, c) = dp.at(r, c) = static_cast<Acc>(NAN);
      }
      Matrix<Op> p(rows, cols, ld_op, kPattern, guard), ds(rows, cols, ld_op, kPattern, guard);
      auto ds_b = b_operand<T::kVnni, Op>(rows, cols, ld_op, guard);
      ops.softmax_backward(s.data(), dp.data(), ld, rows, cols, visible.data(), scale, lse2.data(), delta.data(),
                           p.data(), ds.data(), T::kVnni ? ds_b.data() : ds.data(), ld_op);
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < cols; ++c) {
          const bool inside = visible[r].begin <= c && c < visible[r].end;
          const double want_p = inside ? std::exp2(double{s.at(r, c)} * scale - lse2[c]) : 0;
          const double want_ds = inside ? want_p * (double{dp.at(r, c)} - delta[c]) : 0;
          const double relative = p_tolerance<Op> + 16 * std::numeric_limits<Acc>::epsilon();
          ASSERT_NEAR(value_of(p.at(r, c)), want_p, relative * want_p) << "trial " << trial << " " << r << ", " << c;
          // dp - delta cancels: its rounding is relative to its terms.
          ASSERT_NEAR(value_of(ds.at(r, c)), want_ds,
                      relative * std::fabs(want_ds) + 8 * std::numeric_limits<Acc>::epsilon() * want_p * 8)
              << "trial " << trial << " " << r << ", " << c;
          ASSERT_TRUE(!T::kVnni || same_bits(b_element<T::kVnni>(ds_b, r, c), ds.at(r, c)));
        }
      ASSERT_TRUE(p.surroundings_untouched() && ds.surroundings_untouched());
      ASSERT_TRUE(ds_b.surroundings_untouched());
    }
  });
}

// exp2 as the backward calls it: with lse2 = 0, p is exp2(s) for any s.
template <typename Op, typename Acc, typename Ops>
std::vector<double> exp2_of(const Ops& ops, const std::vector<Acc>& x) {
  const int cols = static_cast<int>(x.size()) / 2;
  std::vector<Acc> dp(x.size()), zero(cols);
  std::vector<Op> p(x.size()), ds(x.size()), ds_b(x.size());
  const Range visible[2] = {{0, cols}, {0, cols}};
  ops.softmax_backward(x.data(), dp.data(), cols, 2, cols, visible, Acc(1), zero.data(), zero.data(), p.data(),
                       ds.data(), ds_b.data(), cols);
  std::vector<double> values(x.size());
  std::transform(p.begin(), p.end(), values.begin(), [](Op e) { return value_of(e); });
  return values;
}

TEST_P(TileOpsTest, Exp2Accuracy) {
  isa.each_triple([](const auto& ops) {
    FAE_TYPES(ops);
    constexpr int kCount = 1 << 18;
    std::vector<Acc> x(kCount);
    for (int i = 0; i < kCount; ++i) x[i] = static_cast<Acc>(-126.0 + (127.5 + 126.0) * i / kCount);
    const auto got = exp2_of<Op>(ops, x);
    double worst = 0;
    for (int i = 0; i < kCount; ++i) {
      const double want = std::exp2(double{x[i]});
      worst = std::max(worst, std::fabs(got[i] - want) / want);
    }
    RecordProperty("max_relative_error", std::to_string(worst));
    // fp32: 1.2 units of 2^-24 twice over; bf16: half a step of its 8 bits plus the polynomial; fp64: libm's.
    EXPECT_LT(worst, sizeof(Op) == 8 ? 2.3e-16 : is_16bit<Op> ? 1.0 / 256 + 4e-6 : 1.3e-7);
  });
}

TEST_P(TileOpsTest, Exp2SpecialValues) {
  isa.each_triple([](const auto& ops) {
    FAE_TYPES(ops);
    constexpr Acc kInf = std::numeric_limits<Acc>::infinity();
    std::vector<Acc> x(64, Acc(0));
    x[0] = -kInf;
    x[1] = kInf;
    x[2] = std::numeric_limits<Acc>::quiet_NaN();
    x[3] = sizeof(Acc) == 8 ? Acc(1024) : Acc(128);
    x[4] = Acc(1e30);
    x[5] = Acc(-1e30);
    x[6] = sizeof(Acc) == 8 ? Acc(-1100) : Acc(-126.0001);  // no subnormal results in fp32
    x[7] = Acc(-126);
    x[8] = Acc(-0.0);
    for (int i = 9; i < 64; ++i) x[i] = Acc(i - 40);  // integers are exact
    const auto got = exp2_of<Op>(ops, x);
    EXPECT_EQ(got[0], 0);
    EXPECT_TRUE(std::isinf(got[1]) && std::isnan(got[2]) && std::isinf(got[3]) && std::isinf(got[4]));
    EXPECT_EQ(got[5], 0);
    EXPECT_EQ(got[6], 0);
    EXPECT_NEAR(got[7] / std::exp2(-126.0), 1, 1e-5);
    // The degree-4 polynomial of bf16 operands is off by 7e-7 at 0, far below their rounding: 1 is 1.
    for (int i = 8; i < 64; ++i) EXPECT_EQ(got[i], std::exp2(double{x[i]})) << double{x[i]};
  });
}

// ---- rows of accumulators -------------------------------------------------------------------------------------------

TEST_P(TileOpsTest, ScaleRows) {
  isa.each_triple([](const auto& ops) {
    FAE_TYPES(ops);
    for (const Shape& s : shapes()) {
      Matrix<Acc> o(s.rows, s.cols, s.cols + s.gap, kPattern, s.guard);
      o.random();
      GuardedArray<Acc> factor(s.rows, kNan);
      for (int r = 0; r < s.rows; ++r) factor[r] = r % 3 == 1 ? Acc(1) : static_cast<Acc>(normal());
      std::vector<Acc> before;
      for (int r = 0; r < s.rows; ++r)
        for (int c = 0; c < s.cols; ++c) before.push_back(o.at(r, c));
      ops.scale_rows(o.data(), o.ld, s.rows, s.cols, factor.data());
      for (int r = 0; r < s.rows; ++r)
        for (int c = 0; c < s.cols; ++c) ASSERT_EQ(o.at(r, c), before[r * s.cols + c] * factor[r]) << describe(s);
      ASSERT_TRUE(o.surroundings_untouched()) << describe(s);
    }
  });
}

TEST_P(TileOpsTest, ScaleAddRows) {
  isa.each_triple([](const auto& ops) {
    FAE_TYPES(ops);
    for (const Shape& s : shapes()) {
      Matrix<Acc> o(s.rows, s.cols, s.cols + s.gap, kPattern, s.guard);
      o.random();
      auto x = source<Acc>(s.rows, s.cols, s.cols + (s.gap + 3) % 7, s.guard);
      x.random();
      GuardedArray<Acc> a(s.rows, kNan), b(s.rows, kNan);
      for (int r = 0; r < s.rows; ++r) {
        a[r] = static_cast<Acc>(normal());
        b[r] = static_cast<Acc>(normal());
      }
      std::vector<Acc> before;
      for (int r = 0; r < s.rows; ++r)
        for (int c = 0; c < s.cols; ++c) before.push_back(o.at(r, c));
      ops.scale_add_rows(o.data(), o.ld, x.data(), static_cast<int>(x.ld), s.rows, s.cols, a.data(), b.data());
      for (int r = 0; r < s.rows; ++r)
        for (int c = 0; c < s.cols; ++c) {
          const double first = double{a[r]} * before[r * s.cols + c], second = double{b[r]} * x.at(r, c);
          // Rounded once or twice: a compiler may fuse the multiply and the add.
          ASSERT_NEAR(o.at(r, c), first + second,
                      2 * std::numeric_limits<Acc>::epsilon() * (std::fabs(first) + std::fabs(second)))
              << describe(s);
        }
      ASSERT_TRUE(o.surroundings_untouched()) << describe(s);
    }
  });
}

TEST_P(TileOpsTest, StoreRows) {
  isa.each_triple([](const auto& ops) {
    FAE_TYPES(ops);
    for (const Shape& s : shapes())
      for (const bool with_factor : {false, true}) {
        auto src = source<Acc>(s.rows, s.cols, s.cols + s.gap, s.guard);
        src.random();
        Matrix<In> dst(s.rows, s.cols, s.cols + (s.gap + 2) % 5, kPattern, s.guard);
        GuardedArray<Acc> factor(s.rows, kNan);
        for (int r = 0; r < s.rows; ++r) factor[r] = static_cast<Acc>(normal());
        const Acc scale = static_cast<Acc>(0.37);
        ops.store_rows(src.data(), src.ld, s.rows, s.cols, with_factor ? factor.data() : nullptr, scale, dst.data(),
                       dst.ld);
        for (int r = 0; r < s.rows; ++r)
          for (int c = 0; c < s.cols; ++c) {
            const Acc f = with_factor ? factor[r] * scale : scale;
            ASSERT_TRUE(same_bits(dst.at(r, c), from<In>(src.at(r, c) * f))) << describe(s);
          }
        ASSERT_TRUE(dst.surroundings_untouched()) << describe(s);
      }
  });
}

TEST_P(TileOpsTest, StoreTransposed) {
  isa.each_triple([](const auto& ops) {
    FAE_TYPES(ops);
    for (const Shape& s : shapes()) {
      auto src = source<Acc>(s.cols, s.rows, s.rows + s.gap, s.guard);
      src.random();
      Matrix<In> dst(s.rows, s.cols, s.cols + (s.gap + 2) % 5, kPattern, s.guard);
      const Acc scale = static_cast<Acc>(-1.7);
      ops.store_transposed(src.data(), static_cast<int>(src.ld), s.rows, s.cols, scale, dst.data(), dst.ld);
      for (int r = 0; r < s.rows; ++r)
        for (int c = 0; c < s.cols; ++c)
          ASSERT_TRUE(same_bits(dst.at(r, c), from<In>(src.at(c, r) * scale))) << describe(s);
      ASSERT_TRUE(dst.surroundings_untouched()) << describe(s);
    }
  });
}

TEST_P(TileOpsTest, RowDot) {
  isa.each_triple([](const auto& ops) {
    FAE_TYPES(ops);
    for (const Shape& s : shapes()) {
      auto a = source<In>(s.rows, s.cols, s.cols + s.gap, s.guard);
      auto b = source<In>(s.rows, s.cols, s.cols + (s.gap + 3) % 5, s.guard);
      a.random();
      b.random();
      GuardedArray<Acc> out(s.rows, kPattern, s.guard);
      ops.row_dot(a.data(), a.ld, b.data(), b.ld, s.rows, s.cols, out.data());
      for (int r = 0; r < s.rows; ++r) {
        double want = 0, magnitude = 0;
        for (int c = 0; c < s.cols; ++c) {
          const double term = value_of(a.at(r, c)) * value_of(b.at(r, c));
          want += term;
          magnitude += std::fabs(term);
        }
        ASSERT_NEAR(out[r], want, 16 * std::numeric_limits<Acc>::epsilon() * magnitude) << describe(s);
      }
      ASSERT_TRUE(out.slack_untouched()) << describe(s);
    }
  });
}

// ---- conversions ----------------------------------------------------------------------------------------------------

// All 65536 values to fp32, exactly, and back to the same bits.
template <typename In, typename Ops>
void check_every_bit_pattern(const Ops& ops) {
  std::vector<In> all(65536), back(65536);
  std::vector<float> wide(65536);
  for (int i = 0; i < 65536; ++i) all[i] = {static_cast<uint16_t>(i)};
  ops.copy_rows(all.data(), 256, 256, 256, wide.data(), 256, 256, 256);
  ops.store_rows(wide.data(), 256, 256, 256, nullptr, 1.0f, back.data(), 256);
  for (int i = 0; i < 65536; ++i) {
    const double want = FormatOf<In>::decode(all[i].bits);
    ASSERT_TRUE(same(wide[i], static_cast<float>(want))) << "bits " << i;
    ASSERT_EQ(std::signbit(wide[i]), (i & 0x8000) != 0) << "bits " << i;
    ASSERT_TRUE(std::isnan(want) ? std::isnan(value_of(back[i])) : same_bits(back[i], all[i])) << "bits " << i;
  }
}

template <typename In, typename Ops>
void check_rounding(const Ops& ops, const std::vector<float>& x) {
  std::vector<In> got(x.size());
  ops.store_rows(x.data(), 0, 1, static_cast<int>(x.size()), nullptr, 1.0f, got.data(), 0);
  for (size_t i = 0; i < x.size(); ++i)
    ASSERT_TRUE(same(got[i], In{FormatOf<In>::encode(x[i])}))
        << x[i] << " gives " << got[i].bits << ", not " << FormatOf<In>::encode(x[i]);
}

// Between every two neighbouring values: the tie, the fp32 numbers on either side of it, and random ones.
template <typename In, typename Ops>
void check_every_tie(const Ops& ops) {
  using F = FormatOf<In>;
  using limits = std::numeric_limits<float>;
  const float inf = limits::infinity();
  std::vector<float> x = {0.0f, -0.0f, inf, -inf, limits::quiet_NaN(), limits::max(), limits::denorm_min()};
  for (int bits = 0; std::isfinite(F::decode(static_cast<uint16_t>(bits + 1))); ++bits) {
    const double a = F::decode(static_cast<uint16_t>(bits)), b = F::decode(static_cast<uint16_t>(bits + 1));
    const float tie = static_cast<float>((a + b) / 2);
    for (const float y : {tie, std::nextafter(tie, 0.0f), std::nextafter(tie, inf)}) {
      x.push_back(y);
      x.push_back(-y);
    }
  }
  // Past the largest value the next one would be 2^(bias + 1): half way there lies the first that overflows.
  const double largest = F::decode(static_cast<uint16_t>((F::kAllOnes << (std::is_same_v<In, f16_t> ? 10 : 7)) - 1));
  const float overflow = static_cast<float>((largest + std::ldexp(1.0, F::kBias + 1)) / 2);
  for (const float y : {overflow, std::nextafter(overflow, 0.0f), std::nextafter(overflow, inf)}) {
    x.push_back(y);
    x.push_back(-y);
  }
  check_rounding<In>(ops, x);

  std::vector<float> random(1 << 18);
  for (float& y : random) {
    const uint32_t bits = static_cast<uint32_t>(rng()());
    std::memcpy(&y, &bits, 4);
  }
  check_rounding<In>(ops, random);
}

TEST_P(TileOpsTest, BFloat16Conversions) {
  check_every_bit_pattern<bf16_t>(isa.bf16_f32);
  check_every_tie<bf16_t>(isa.bf16_f32);
  check_every_tie<bf16_t>(isa.bf16);
}

TEST_P(TileOpsTest, Float16Conversions) {
  check_every_bit_pattern<f16_t>(isa.f16_f32);
  check_every_tie<f16_t>(isa.f16_f32);
}

// The reference itself, at values known by heart.
TEST(Reference, Formats) {
  using Half = Format<5, 10>;
  using BFloat = Format<8, 7>;
  EXPECT_EQ(Half::encode(1.0), 0x3c00);
  EXPECT_EQ(Half::encode(65504.0), 0x7bff);
  EXPECT_EQ(Half::encode(65519.9), 0x7bff);
  EXPECT_EQ(Half::encode(65520.0), 0x7c00);
  EXPECT_EQ(Half::encode(std::ldexp(1, -24)), 0x0001);
  EXPECT_EQ(Half::encode(std::ldexp(1, -25)), 0x0000);  // a tie, to even
  EXPECT_EQ(Half::encode(std::ldexp(3, -25)), 0x0002);  // a tie, to even
  EXPECT_EQ(Half::decode(0x03ff), 1023 * std::ldexp(1, -24));
  EXPECT_EQ(BFloat::encode(-1.0), 0xbf80);
  EXPECT_EQ(BFloat::encode(1.0 + 1.0 / 256), 0x3f80);  // a tie, to even
  EXPECT_EQ(BFloat::encode(1.0 + 3.0 / 256), 0x3f82);  // a tie, to even
  EXPECT_EQ(BFloat::decode(0x0001), std::ldexp(1, -133));
}

INSTANTIATE_TEST_SUITE_P(Isas, TileOpsTest, testing::Range(0, static_cast<int>(isas().size())),
                         [](const testing::TestParamInfo<int>& info) { return std::string(isas()[info.param].name); });

// What the engine uses here is one of them, and the environment variable lowers it (checked once per process, so only
// when it was set before).
TEST(TileIsa, IsTheWidestOfThisCpu) {
  if (std::getenv("ATEN_CPU_CAPABILITY") == nullptr) {
    EXPECT_EQ("isa_" + std::string(tile_isa()), isas().back().name);
  }
  EXPECT_EQ("isa_" + std::string(tile_isa()), (tile_ops<float, float, float>().isa));
}

}  // namespace
}  // namespace fae::cpu
