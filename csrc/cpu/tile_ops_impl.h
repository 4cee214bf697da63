// The tile operations, written once on the vectors of vector_impl.h and compiled once per instruction set, as that file
// tells. No include guard: it is included once per instruction set.
#include "vector_impl.h"

namespace fae::cpu::FAE_ISA {

// ---- packing --------------------------------------------------------------------------------------------------------

template <typename In, typename Op, typename Acc>
void copy_rows(const In* src, int64_t ld_src, int rows, int cols, Op* dst, int ld_dst, int rows_padded,
               int cols_padded) {
  for (int r = 0; r < rows_padded; ++r) {
    Op* d = dst + int64_t{r} * ld_dst;
    int filled = 0;
    if (r < rows) {
      const In* s = src + r * ld_src;
      if constexpr (sizeof(In) == sizeof(Op)) {
        __builtin_memcpy(d, s, sizeof(In) * cols);
      } else {
        constexpr int kLanes = Simd<Acc>::kLanes;
        int c = 0;
        for (; c + kLanes <= cols; c += kLanes) store_as<Acc>(d + c, load_as<Acc>(s + c));
        if (c < cols) store_as<Acc>(d + c, load_as<Acc>(s + c, cols - c), cols - c);
      }
      filled = cols;
    }
    if (filled < cols_padded) __builtin_memset(d + filled, 0, sizeof(Op) * (cols_padded - filled));
  }
}

template <typename In, typename Op, typename Acc>
void pack_b(const In* src, int64_t ld_src, int rows, int cols, Op* dst, int ld_dst, int rows_padded) {
  if constexpr (!is_16bit<Op>) {
    copy_rows<In, Op, Acc>(src, ld_src, rows, cols, dst, ld_dst, rows_padded, cols);
  } else {
    const uint16_t zeros[16] = {};
    for (int r = 0; r < rows_padded; r += 2) {
      const In* even = src + r * ld_src;
      const In* odd = even + ld_src;
      uint32_t* d = reinterpret_cast<uint32_t*>(dst) + int64_t{r / 2} * ld_dst;
      for (int c = 0; c < cols; c += 16) {
        const int n = cols - c < 16 ? cols - c : 16;
        uint16_t a[16] = {}, b[16] = {};
        vh lo, hi;
        if (n == 16) {
          lo = r < rows ? load<vh>(even + c) : load<vh>(zeros);
          hi = r + 1 < rows ? load<vh>(odd + c) : load<vh>(zeros);
        } else {
          if (r < rows) __builtin_memcpy(a, even + c, 2 * n);
          if (r + 1 < rows) __builtin_memcpy(b, odd + c, 2 * n);
          lo = load<vh>(a);
          hi = load<vh>(b);
        }
        const vu pair = __builtin_convertvector(lo, vu) | (__builtin_convertvector(hi, vu) << 16);
        if (n == 16) {
          store(d + c, pair);
        } else {
          uint32_t tail[16];
          store(tail, pair);
          __builtin_memcpy(d + c, tail, 4 * n);
        }
      }
    }
  }
}

// 16 pairs of 16-bit elements from element 2 * unit on; elements at or past cols read as zero.
FAE_INLINE vu load_pairs(const void* row, int unit, int cols) {
  const uint16_t* p = static_cast<const uint16_t*>(row) + 2 * unit;
  const int n = cols - 2 * unit;
  if (n >= 32) return load<vu>(p);
  uint16_t buffer[32] = {};
  if (n > 0) __builtin_memcpy(buffer, p, 2 * n);
  return load<vu>(buffer);
}

// Calls emit(col, row, vector) with 16 consecutive rows' elements of one column, as fp32, for all columns.
template <typename In, typename Emit>
FAE_INLINE void transpose_as_float(const In* src, int64_t ld_src, int rows, int cols, int rows_padded, Emit emit) {
  transpose_units(
      rows, cols, rows_padded,
      [&](int r, int c) FAE_LAMBDA { return (vu)load_as<float>(src + r * ld_src + c, cols - c); }, emit);
}

template <typename In, typename Op, typename Acc>
void pack_b_transposed(const In* src, int64_t ld_src, int rows, int cols, Op* dst, int ld_dst, int rows_padded,
                       int cols_padded) {
  int filled = cols;
  if constexpr (sizeof(Acc) == 8) {
    for (int c = 0; c < cols; ++c)
      for (int r = 0; r < rows_padded; ++r) dst[int64_t{c} * ld_dst + r] = r < rows ? src[r * ld_src + c] : Op(0);
  } else if constexpr (is_16bit<Op>) {
    uint32_t* d = reinterpret_cast<uint32_t*>(dst);
    const int units = (cols + 1) / 2;
    transpose_units(
        rows, units, rows_padded, [&](int r, int u) FAE_LAMBDA { return load_pairs(src + r * ld_src, u, cols); },
        [&](int u, int r, vu v) FAE_LAMBDA { store(d + int64_t{u} * ld_dst + r, v); });
    filled = 2 * units;
  } else {
    transpose_as_float(src, ld_src, rows, cols, rows_padded,
                       [&](int c, int r, vu v) FAE_LAMBDA { store(dst + int64_t{c} * ld_dst + r, v); });
  }
  constexpr int kStep = is_16bit<Op> ? 2 : 1;  // columns of src in one row of dst
  for (int c = filled; c < cols_padded; c += kStep)
    __builtin_memset(dst + int64_t{c} * ld_dst, 0, sizeof(Op) * kStep * rows_padded);
}

template <typename In, typename Op, typename Acc>
void pack_a_transposed(const In* src, int64_t ld_src, int rows, int cols, Op* dst, int ld_dst, int rows_padded) {
  if constexpr (!is_16bit<Op>) {
    pack_b_transposed<In, Op, Acc>(src, ld_src, rows, cols, dst, ld_dst, rows_padded, cols);
  } else {
    transpose_units(
        rows, (cols + 1) / 2, rows_padded,
        [&](int r, int u) FAE_LAMBDA { return load_pairs(src + r * ld_src, u, cols); },
        [&](int u, int r, vu v) FAE_LAMBDA {
          Op* even = dst + int64_t{2} * u * ld_dst + r;
          store(even, __builtin_convertvector(v & 0xffffu, vh));
          if (2 * u + 1 < cols) store(even + ld_dst, __builtin_convertvector(v >> 16, vh));
        });
  }
}

// ---- softmax --------------------------------------------------------------------------------------------------------

// Lane masks: true where first <= lane < last.
template <typename Acc>
FAE_INLINE typename Simd<Acc>::ivec lanes_between(int first, int last) {
  typename Simd<Acc>::ivec lane;
  for (int i = 0; i < Simd<Acc>::kLanes; ++i) lane[i] = i;
  return (lane >= first) & (lane < last);
}

// The visible columns of one row: the vectors [inner_begin, inner_end) are wholly visible; at most one partial vector
// stands on either side, within [begin, end).
template <typename Acc>
struct RowColumns {
  int first, last, begin, end, inner_begin, inner_end;
  bool head, tail;  // which partial vectors there are; one that is both counts as the head

  FAE_INLINE explicit RowColumns(Range visible) : first(visible.begin), last(visible.end) {
    constexpr int kLanes = Simd<Acc>::kLanes;
    begin = first / kLanes * kLanes, end = (last + kLanes - 1) / kLanes * kLanes;
    inner_begin = (first + kLanes - 1) / kLanes * kLanes, inner_end = last / kLanes * kLanes;
    head = begin < inner_begin;
    tail = inner_end < end && !(head && inner_end == begin);
  }
  FAE_INLINE auto lanes(int col) const { return lanes_between<Acc>(first - col, last - col); }
};

// Each lane's largest score in the whole vectors [begin, end), and in `with`.
template <typename Acc>
FAE_INLINE typename Simd<Acc>::vec lane_maxima(const Acc* s, int begin, int end, typename Simd<Acc>::vec with) {
  using vec = typename Simd<Acc>::vec;
  constexpr int kLanes = Simd<Acc>::kLanes;
  vec max0 = with, max1 = with, max2 = with, max3 = with;
  int c = begin;
  for (; c + 4 * kLanes <= end; c += 4 * kLanes) {
    max0 = vmax(max0, load<vec>(s + c));
    max1 = vmax(max1, load<vec>(s + c + kLanes));
    max2 = vmax(max2, load<vec>(s + c + 2 * kLanes));
    max3 = vmax(max3, load<vec>(s + c + 3 * kLanes));
  }
  for (; c < end; c += kLanes) max0 = vmax(max0, load<vec>(s + c));
  return vmax(vmax(max0, max1), vmax(max2, max3));
}

// The same of a row's visible scores.
template <typename Acc>
FAE_INLINE typename Simd<Acc>::vec visible_maxima(const Acc* s, const RowColumns<Acc>& row) {
  using vec = typename Simd<Acc>::vec;
  const vec neg_inf = broadcast(Acc(-__builtin_inf()));
  vec edges = neg_inf;
  if (row.head) edges = row.lanes(row.begin) ? load<vec>(s + row.begin) : neg_inf;
  if (row.tail) edges = vmax(edges, row.lanes(row.inner_end) ? load<vec>(s + row.inner_end) : neg_inf);
  return lane_maxima(s, row.inner_begin, row.inner_end, edges);
}

// p = exp2(scale * s - subtract) in two neighbouring vectors, added to two sums.
template <typename Op, typename Acc, typename V>
FAE_INLINE void two_exponentials(const Acc* s, Op* p, Acc scale, Acc subtract, V& sum0, V& sum1) {
  constexpr int kLanes = Simd<Acc>::kLanes;
  const V e0 = exp2_vec<exp2_degree<Op>>(load<V>(s) * scale - subtract);
  const V e1 = exp2_vec<exp2_degree<Op>>(load<V>(s + kLanes) * scale - subtract);
  sum0 += e0;
  sum1 += e1;
  store_operands(p, e0, e1);
}

// p = exp2(scale * s - subtract) on the visible columns, 0 elsewhere; returns each lane's sum. Two sums take alternate
// vectors, counted from column 0, so the order of summation does not depend on what is visible.
template <typename Op, typename Acc>
FAE_INLINE typename Simd<Acc>::vec visible_exponentials(const Acc* s, Op* p, int cols, const RowColumns<Acc>& row,
                                                        Acc scale, Acc subtract) {
  using vec = typename Simd<Acc>::vec;
  constexpr int kLanes = Simd<Acc>::kLanes;
  vec sum0 = vec{}, sum1 = vec{};
  auto one = [&](int col, bool partial) FAE_LAMBDA {
    vec e = exp2_vec<exp2_degree<Op>>(load<vec>(s + col) * scale - subtract);
    if (partial) e = row.lanes(col) ? e : vec{};
    if (col / kLanes % 2) {
      sum1 += e;
    } else {
      sum0 += e;
    }
    store_as<Acc>(p + col, e);
  };
  if (row.begin > 0) __builtin_memset(p, 0, sizeof(Op) * row.begin);
  if (row.head) one(row.begin, true);
  int c = row.inner_begin;
  if (c < row.inner_end && c / kLanes % 2) {
    one(c, false);
    c += kLanes;
  }
  for (; c + 2 * kLanes <= row.inner_end; c += 2 * kLanes) two_exponentials(s + c, p + c, scale, subtract, sum0, sum1);
  if (c < row.inner_end) one(c, false);
  if (row.tail) one(row.inner_end, true);
  if (row.end < cols) __builtin_memset(p + row.end, 0, sizeof(Op) * (cols - row.end));
  return sum0 + sum1;
}

// From here on half a unit in the last place of a score is 1 or more.
template <typename Acc>
constexpr Acc kFusedLimit = sizeof(Acc) == 8 ? Acc(0x1p53) : Acc(0x1p24);

template <typename Acc>
FAE_INLINE void multiply(Acc* s, int begin, int end, Acc scale) {
  using vec = typename Simd<Acc>::vec;
  for (int c = begin; c < end; c += Simd<Acc>::kLanes) store(s + c, load<vec>(s + c) * scale);
}

// As many rows at a time as a vector has lanes, so that the horizontal steps and the statistics are vectors as well.
template <typename In, typename Op, typename Acc>
bool softmax_step(Acc* s, int ld_s, int rows, int cols, const Range* visible, Acc scale_log2, Acc* m, Acc* l,
                  Acc* alpha, Op* p, int ld_p) {
  using vec = typename Simd<Acc>::vec;
  constexpr int kLanes = Simd<Acc>::kLanes;
  const vec neg_inf = broadcast(Acc(-__builtin_inf()));
  // A positive factor keeps the order, rounded or not: the largest score alone is multiplied. For others the scores
  // change sign first, which is exact, or become 0.
  const bool turn = !(scale_log2 > Acc(0));
  const Acc turned = scale_log2 < Acc(0) ? Acc(-1) : Acc(0);
  const Acc scale = !turn ? scale_log2 : scale_log2 < Acc(0) ? -scale_log2 : Acc(1);
  bool any_rescale = false;
  for (int r0 = 0; r0 < rows; r0 += kLanes) {
    const int n = rows - r0 < kLanes ? rows - r0 : kLanes;
    bool full = n == kLanes && !turn;  // nothing is masked: the rule, and worth loops of its own
    for (int i = 0; i < n; ++i) full &= visible[r0 + i].begin <= 0 && visible[r0 + i].end >= cols;

    vec lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      Acc* s_row = s + int64_t{r0 + i} * ld_s;
      if (full) {
        lanes[i] = lane_maxima(s_row, 0, cols, neg_inf);
      } else if (i < n && visible[r0 + i].begin < visible[r0 + i].end) {
        const RowColumns<Acc> row(visible[r0 + i]);
        if (turn) multiply(s_row, row.begin, row.end, turned);
        lanes[i] = visible_maxima(s_row, row);
      } else {
        lanes[i] = neg_inf;
      }
    }
    const vec row_max = reduce_rows<Acc>(lanes, [](vec a, vec b) FAE_LAMBDA { return vmax(a, b); }) * scale;
    const vec m_old = load_as<Acc>(m + r0, n), m_new = m_old > row_max ? m_old : row_max;
    const vec subtracted = m_new == neg_inf ? vec{} : m_new;  // as softmax::subtracted_max
    const vec factor = m_old == m_new ? broadcast(Acc(1)) : exp2_vec<6>(m_old - subtracted);
    store_as<Acc>(m + r0, m_new, n);
    store_as<Acc>(alpha + r0, factor, n);

    Acc subtract[kLanes];
    store(subtract, subtracted);
    bool any_large = false;
    for (int i = 0; i < kLanes; ++i) any_large |= !(__builtin_fabs(subtract[i]) < kFusedLimit<Acc>);
    for (int i = 0; i < kLanes; ++i) {
      Acc* s_row = s + int64_t{r0 + i} * ld_s;
      Op* p_row = p + int64_t{r0 + i} * ld_p;
      if (full && !any_large) {
        vec sum0 = vec{}, sum1 = vec{};
        for (int c = 0; c < cols; c += 2 * kLanes)
          two_exponentials(s_row + c, p_row + c, scale, subtract[i], sum0, sum1);
        lanes[i] = sum0 + sum1;
      } else if (i < n && visible[r0 + i].begin < visible[r0 + i].end) {
        const RowColumns<Acc> row(visible[r0 + i]);
        // m is a rounded product, the exponent a fused one: they part by half a unit in the last place, which from
        // these scores on is enough to overflow. Such a row rounds its products first.
        const bool large = !(__builtin_fabs(subtract[i]) < kFusedLimit<Acc>);
        if (large) multiply(s_row, row.begin, row.end, scale);
        lanes[i] = visible_exponentials(s_row, p_row, cols, row, large ? Acc(1) : scale, subtract[i]);
      } else {
        lanes[i] = vec{};
        if (i < n) __builtin_memset(p_row, 0, sizeof(Op) * cols);
      }
    }
    const vec sums = reduce_rows<Acc>(lanes, [](vec a, vec b) FAE_LAMBDA { return a + b; });
    store_as<Acc>(l + r0, load_as<Acc>(l + r0, n) * factor + sums, n);
    for (int i = 0; i < n; ++i) any_rescale |= alpha[r0 + i] != Acc(1);
  }
  return any_rescale;
}

template <typename In, typename Op, typename Acc>
void softmax_backward(const Acc* s, const Acc* dp, int ld, int rows, int cols, const Range* visible, Acc scale_log2,
                      const Acc* lse2, const Acc* delta, Op* p, Op* ds, Op* ds_b, int ld_op) {
  using vec = typename Simd<Acc>::vec;
  constexpr int kLanes = Simd<Acc>::kLanes;
  constexpr int kRows = is_16bit<Op> ? 2 : 1;  // a VNNI operand interleaves two rows
  for (int r = 0; r < rows; r += kRows) {
    for (int c = 0; c < cols; c += kLanes) {
      const vec lse = load<vec>(lse2 + c), d = load<vec>(delta + c);
      vec e[kRows], g[kRows];
      for (int i = 0; i < kRows; ++i) {
        const int64_t at = int64_t{r + i} * ld + c;
        const Range range = visible[r + i];
        if (c >= range.end || c + kLanes <= range.begin) {
          e[i] = g[i] = vec{};
        } else {
          e[i] = exp2_vec<exp2_degree<Op>>(load<vec>(s + at) * scale_log2 - lse);
          g[i] = e[i] * (load<vec>(dp + at) - d);
          if (c < range.begin || c + kLanes > range.end) {
            const auto inside = lanes_between<Acc>(range.begin - c, range.end - c);
            e[i] = inside ? e[i] : vec{};
            g[i] = inside ? g[i] : vec{};
          }
        }
      }
      const int64_t to = int64_t{r} * ld_op + c;
      if constexpr (is_16bit<Op>) {
        const vh g0 = narrow_operand(g[0], Op{}), g1 = narrow_operand(g[1], Op{});
        store(p + to, narrow_operand(e[0], Op{}));
        store(p + to + ld_op, narrow_operand(e[1], Op{}));
        store(ds + to, g0);
        store(ds + to + ld_op, g1);
        store(reinterpret_cast<uint32_t*>(ds_b) + int64_t{r / 2} * ld_op + c,
              __builtin_convertvector(g0, vu) | (__builtin_convertvector(g1, vu) << 16));
      } else {
        store(p + to, e[0]);
        store(ds + to, g[0]);
      }
    }
  }
}

// ---- rows of accumulators -------------------------------------------------------------------------------------------

template <typename In, typename Op, typename Acc>
void scale_rows(Acc* o, int64_t ld, int rows, int cols, const Acc* factor) {
  constexpr int kLanes = Simd<Acc>::kLanes;
  for (int r = 0; r < rows; ++r) {
    if (factor[r] == Acc(1)) continue;
    Acc* row = o + r * ld;
    for (int c = 0; c < cols; c += kLanes)
      store_as<Acc>(row + c, load_as<Acc>(row + c, cols - c) * factor[r], cols - c);
  }
}

template <typename In, typename Op, typename Acc>
void scale_add_rows(Acc* o, int64_t ld_o, const Acc* x, int ld_x, int rows, int cols, const Acc* a, const Acc* b) {
  constexpr int kLanes = Simd<Acc>::kLanes;
  for (int r = 0; r < rows; ++r) {
    Acc* row = o + r * ld_o;
    const Acc* add = x + int64_t{r} * ld_x;
    for (int c = 0; c < cols; c += kLanes)
      store_as<Acc>(row + c, load_as<Acc>(row + c, cols - c) * a[r] + load_as<Acc>(add + c, cols - c) * b[r], cols - c);
  }
}

template <typename In, typename Op, typename Acc>
void store_rows(const Acc* src, int64_t ld_src, int rows, int cols, const Acc* factor, Acc scale, In* dst,
                int64_t ld_dst) {
  constexpr int kLanes = Simd<Acc>::kLanes;
  for (int r = 0; r < rows; ++r) {
    const Acc f = factor ? factor[r] * scale : scale;
    const Acc* s = src + r * ld_src;
    In* d = dst + r * ld_dst;
    for (int c = 0; c < cols; c += kLanes) store_as<Acc>(d + c, load_as<Acc>(s + c, cols - c) * f, cols - c);
  }
}

template <typename In, typename Op, typename Acc>
void store_transposed(const Acc* src, int ld_src, int rows, int cols, Acc scale, In* dst, int64_t ld_dst) {
  if constexpr (sizeof(Acc) == 8) {
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < cols; ++c) dst[r * ld_dst + c] = src[int64_t{c} * ld_src + r] * scale;
  } else {
    // src's rows are the columns of dst: transposing it gives 16 consecutive columns of one row of dst.
    transpose_units(
        cols, rows, (cols + 15) / 16 * 16,
        [&](int c, int r) FAE_LAMBDA { return (vu)load_as<float>(src + int64_t{c} * ld_src + r, rows - r); },
        [&](int r, int c, vu v) FAE_LAMBDA { store_as<float>(dst + r * ld_dst + c, (vf)v * scale, cols - c); });
  }
}

template <typename In, typename Op, typename Acc>
void row_dot(const In* a, int64_t ld_a, const In* b, int64_t ld_b, int rows, int cols, Acc* out) {
  constexpr int kLanes = Simd<Acc>::kLanes;
  for (int r = 0; r < rows; ++r) {
    typename Simd<Acc>::vec sum = {};
    for (int c = 0; c < cols; c += kLanes)
      sum += load_as<Acc>(a + r * ld_a + c, cols - c) * load_as<Acc>(b + r * ld_b + c, cols - c);
    out[r] = reduce_sum<Acc>(sum);
  }
}

template <typename In, typename Op, typename Acc>
constexpr TileOps<In, Op, Acc> make_tile_ops(const char* isa) {
  return {isa,
          copy_rows<In, Op, Acc>,
          pack_b<In, Op, Acc>,
          pack_b_transposed<In, Op, Acc>,
          pack_a_transposed<In, Op, Acc>,
          softmax_step<In, Op, Acc>,
          softmax_backward<In, Op, Acc>,
          scale_rows<In, Op, Acc>,
          scale_add_rows<In, Op, Acc>,
          store_rows<In, Op, Acc>,
          store_transposed<In, Op, Acc>,
          row_dot<In, Op, Acc>};
}

#define FAE_STRING_(x) #x
#define FAE_STRING(x) FAE_STRING_(x)
extern const TileOps<float, float, float> f32_ops = make_tile_ops<float, float, float>(FAE_STRING(FAE_ISA));
extern const TileOps<double, double, double> f64_ops = make_tile_ops<double, double, double>(FAE_STRING(FAE_ISA));
extern const TileOps<bf16_t, bf16_t, float> bf16_ops = make_tile_ops<bf16_t, bf16_t, float>(FAE_STRING(FAE_ISA));
extern const TileOps<bf16_t, float, float> bf16_f32_ops = make_tile_ops<bf16_t, float, float>(FAE_STRING(FAE_ISA));
extern const TileOps<f16_t, float, float> f16_f32_ops = make_tile_ops<f16_t, float, float>(FAE_STRING(FAE_ISA));
#undef FAE_STRING
#undef FAE_STRING_
#undef FAE_INLINE

}  // namespace fae::cpu::FAE_ISA
