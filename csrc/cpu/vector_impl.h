// Vectors for tile_ops_impl.h: conversions, exp2, reductions, transposition, on the compilers' generic vectors. Compiled
// once per instruction set: the file that includes them sets the target and names the namespace FAE_ISA. 64-byte
// vectors lower to one AVX-512, two AVX2 or four SSE/NEON registers. No header of PyTorch or of the standard library
// that has inline code may come after the target is set, or a copy compiled for AVX-512 could be the one the linker
// keeps for everybody. The compilers' intrinsics are no danger: each names its own target, and is always inlined.
//
// No include guard: it is included once per instruction set.

namespace fae::cpu::FAE_ISA {

#define FAE_INLINE inline __attribute__((always_inline))

template <typename T>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int kLanes = 16;
  typedef float vec __attribute__((vector_size(64)));
  typedef int32_t ivec __attribute__((vector_size(64)));
};
template <>
struct Simd<double> {
  static constexpr int kLanes = 8;
  typedef double vec __attribute__((vector_size(64)));
  typedef int64_t ivec __attribute__((vector_size(64)));
};

using vf = Simd<float>::vec;
using vi = Simd<float>::ivec;
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));

template <typename V>
FAE_INLINE V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <typename V>
FAE_INLINE void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

template <typename Acc>
FAE_INLINE typename Simd<Acc>::vec broadcast(Acc x) {
  return typename Simd<Acc>::vec{} + x;
}

// a > b ? a : b, also where one is NaN.
template <typename V>
FAE_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}
#if defined(FAE_AVX512)
FAE_INLINE vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
#endif

// ---- 16-bit conversions ---------------------------------------------------------------------------------------------

FAE_INLINE vf bits_to_float(vu u) { return (vf)u; }

FAE_INLINE vf widen(vh h, bf16_t) { return bits_to_float(__builtin_convertvector(h, vu) << 16); }

// fp16: move exponent and mantissa up, rebase the exponent with one exact multiplication (subnormals come out right),
// then put infinities and NaNs back.
FAE_INLINE vf widen(vh h, f16_t) {
  const vu u = __builtin_convertvector(h, vu);
  const vu magnitude = (u & 0x7fffu) << 13;
  vf f = bits_to_float(magnitude) * 0x1p112f;
  const vu is_special = (vu)((u & 0x7c00u) == 0x7c00u);
  const vu r = ((vu)f & ~is_special) | ((magnitude | 0x7f800000u) & is_special);
  return bits_to_float(r | ((u & 0x8000u) << 16));
}

// Round to nearest even; NaN stays NaN.
FAE_INLINE vh narrow(vf f, bf16_t) {
  const vu u = (vu)f;
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu is_nan = (vu)((u & 0x7fffffffu) > 0x7f800000u);
  return __builtin_convertvector((rounded & ~is_nan) | (0x7fc0u & is_nan), vh);
}

FAE_INLINE vh narrow(vf f, f16_t) {
  const vu u = (vu)f;
  const vu sign = (u >> 16) & 0x8000u;
  const vu a = u & 0x7fffffffu;
  // Normal results: rebase the exponent and round the 13 dropped bits to nearest even.
  const vu normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // Below 2^-14 the result is subnormal: adding 0.5 lets the float adder align and round it.
  const vu subnormal = (vu)((vf)a + 0.5f) - 0x3f000000u;
  const vu is_sub = (vu)(a < 0x38800000u);
  const vu overflows = (vu)(a >= 0x477ff000u);
  const vu is_nan = (vu)(a > 0x7f800000u);
  vu r = (subnormal & is_sub) | (normal & ~is_sub);
  r = (r & ~overflows) | (0x7c00u & overflows);
  r = (r & ~is_nan) | (0x7e00u & is_nan);
  return __builtin_convertvector(r | sign, vh);
}

// An operand's element for one product. AVX512-BF16 rounds in one instruction, except that subnormal numbers become 0:
// so the products take them anyway, but results must keep them.
FAE_INLINE vh narrow_operand(vf f, bf16_t) {
#if defined(FAE_AVX512)
  return (vh)_mm512_cvtneps_pbh((__m512)f);
#else
  return narrow(f, bf16_t{});
#endif
}

// Stores two neighbouring vectors of operands.
template <typename Op, typename V>
FAE_INLINE void store_operands(Op* p, V lo, V hi) {
  if constexpr (is_16bit<Op>) {
#if defined(FAE_AVX512)
    store(p, _mm512_cvtne2ps_pbh((__m512)hi, (__m512)lo));
#else
    store(p, narrow(lo, Op{}));
    store(p + 16, narrow(hi, Op{}));
#endif
  } else {
    store(p, lo);
    store(p + sizeof(V) / sizeof(Op), hi);
  }
}

// A vector of accumulators from elements of any type, and back.
template <typename Acc, typename In>
FAE_INLINE typename Simd<Acc>::vec load_as(const In* p) {
  if constexpr (is_16bit<In>) {
    return widen(load<vh>(p), In{});
  } else {
    return load<typename Simd<Acc>::vec>(p);
  }
}
template <typename Acc, typename Out>
FAE_INLINE void store_as(Out* p, typename Simd<Acc>::vec v) {
  if constexpr (is_16bit<Out>) {
    store(p, narrow(v, Out{}));
  } else {
    store(p, v);
  }
}
// The last, partial vector of a row goes through a zeroed buffer, so that nothing is read or written past its end.
template <typename Acc, typename In>
FAE_INLINE typename Simd<Acc>::vec load_as(const In* p, int n) {
  constexpr int kLanes = Simd<Acc>::kLanes;
  if (n >= kLanes) return load_as<Acc>(p);
  In buffer[kLanes] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load_as<Acc>(buffer);
}
template <typename Acc, typename Out>
FAE_INLINE void store_as(Out* p, typename Simd<Acc>::vec v, int n) {
  constexpr int kLanes = Simd<Acc>::kLanes;
  if (n >= kLanes) return store_as<Acc>(p, v);
  Out buffer[kLanes];
  store_as<Acc>(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}

// ---- exp2 -----------------------------------------------------------------------------------------------------------

// 2^x = 2^n * 2^f with n = round(x), f in [-1/2, 1/2]. The polynomials are minimax in relative error: degree 6 has
// 1.9e-9 (fp32 operands: below half an ulp), degree 4 has 2.6e-6 (bf16 operands, whose own rounding is 2e-3).
// x below -126 gives 0, NaN gives NaN. Infinity comes early, from 127.5 on: a softmax has no exponent above 0.
#if defined(FAE_AVX512)
// AVX-512 splits x and joins the parts again in one instruction each, with n = floor(x), f in [0, 1): errors 7e-9 and
// 2.9e-6, exact at 0. Nothing may become subnormal on the way, which would cost a hundred times as much.
template <int kDegree>
FAE_INLINE vf exp2_vec(vf x) {
  const vf f = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  vf p;
  if constexpr (kDegree == 6) {
    p = f * 0.00021702255f + 0.0012439687f;
    p = p * f + 0.009678841f;
    p = p * f + 0.05548334f;
    p = p * f + 0.24022983f;
    p = p * f + 0.693147f;
  } else {
    static_assert(kDegree == 4);
    p = f * 0.013426684f + 0.052242473f;
    p = p * f + 0.2412802f;
    p = p * f + 0.69304484f;
  }
  p = p * f + 1.0f;
  const __mmask16 not_below = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_US);
  return (vf)_mm512_maskz_scalef_ps(not_below, (__m512)p, (__m512)x);
}
#else
template <int kDegree>
FAE_INLINE vf exp2_poly(vf f) {
  if constexpr (kDegree == 6) {
    vf r = f * 0.00015345812f + 0.0013399931f;
    r = r * f + 0.00961848896f;
    r = r * f + 0.0555032878f;
    r = r * f + 0.240226469f;
    r = r * f + 0.693147206f;
    return r * f + 1.0f;
  } else {
    static_assert(kDegree == 4);
    vf r = f * 0.00957010191f + 0.0559178603f;
    r = r * f + 0.240247448f;
    r = r * f + 0.693121815f;
    return r * f + 0.999999261f;
  }
}

template <int kDegree>
FAE_INLINE vf exp2_vec(vf x) {
  const vf clamped = x < -126.0f ? broadcast(-126.0f) : (x > 128.0f ? broadcast(128.0f) : x);
  const vf magic = broadcast(0x1.8p23f);  // adding it rounds to an integer, held in the low mantissa bits
  const vf shifted = clamped + magic;
  const vf n = shifted - magic;
  const vf p = exp2_poly<kDegree>(clamped - n);
  const vi exponent = ((vi)shifted + (127 - 0x4b400000)) << 23;
  const vf r = p * (vf)exponent;
  return x < -126.0f ? vf{} : r;
}
#endif

template <int kDegree>
FAE_INLINE Simd<double>::vec exp2_vec(Simd<double>::vec x) {
  Simd<double>::vec r;
  for (int i = 0; i < Simd<double>::kLanes; ++i) r[i] = __builtin_exp2(x[i]);
  return r;
}

template <typename Op>
constexpr int exp2_degree = is_16bit<Op> ? 4 : 6;

// ---- horizontal reductions: a fixed tree, the same on every instruction set -----------------------------------------

template <typename Acc>
FAE_INLINE Acc reduce_sum(typename Simd<Acc>::vec v) {
  Acc x[Simd<Acc>::kLanes];
  store(x, v);
  for (int width = Simd<Acc>::kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}

// ---- transposition of 32-bit units ----------------------------------------------------------------------------------

// One stage of a 16 x 16 butterfly: lanes whose bit kBit is set are exchanged between rows i and i + kBit.
template <int kBit>
FAE_INLINE void exchange(vu& a, vu& b) {
#define FAE_LO(j) (kBit & (j) ? 16 - kBit + (j) : (j))
#define FAE_HI(j) (kBit & (j) ? 16 + (j) : kBit + (j))
#define FAE_LANES(f) \
  f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
  const vu lo = __builtin_shufflevector(a, b, FAE_LANES(FAE_LO));
  const vu hi = __builtin_shufflevector(a, b, FAE_LANES(FAE_HI));
#undef FAE_LANES
#undef FAE_HI
#undef FAE_LO
  a = lo;
  b = hi;
}

// Halves of a's and b's groups of 2 kBit lanes joined: a's results stand in the lower half of each group, b's above.
template <int kBit, typename F>
FAE_INLINE vf joined(vf a, vf b, F join) {
  vu lo = (vu)a, hi = (vu)b;
  exchange<kBit>(lo, hi);
  return join((vf)lo, (vf)hi);
}

// Lane r of the result is the reduction of v[r]'s lanes, i with i + 8, then 4, 2 and 1: the tree of reduce_sum.
template <typename Acc, typename F>
FAE_INLINE typename Simd<Acc>::vec reduce_rows(const typename Simd<Acc>::vec (&v)[Simd<Acc>::kLanes], F join) {
  if constexpr (sizeof(Acc) == 8) {
    Acc x[8][8];
    __builtin_memcpy(x, v, sizeof(x));
    Simd<double>::vec r = {};
    for (int width = 4; width > 0; width /= 2) {
      for (int i = 0; i < 8; ++i)
        for (int j = 0; j < width; ++j) x[i][j] = join(broadcast(x[i][j]), broadcast(x[i][j + width]))[0];
    }
    for (int i = 0; i < 8; ++i) r[i] = x[i][0];
    return r;
  } else {
    vf x[16];
    for (int i = 0; i < 8; ++i) x[i] = joined<8>(v[i], v[i + 8], join);
    for (int i = 0; i < 4; ++i) x[i] = joined<4>(x[i], x[i + 4], join);
    for (int i = 0; i < 2; ++i) x[i] = joined<2>(x[i], x[i + 2], join);
    return joined<1>(x[0], x[1], join);
  }
}

template <int kBit>
FAE_INLINE void exchange_all(vu (&r)[16]) {
  for (int i = 0; i < 16; ++i)
    if (!(i & kBit)) exchange<kBit>(r[i], r[i | kBit]);
}

FAE_INLINE void transpose16(vu (&r)[16]) {
  exchange_all<1>(r);
  exchange_all<2>(r);
  exchange_all<4>(r);
  exchange_all<8>(r);
}

// dst[c][r] = unit(r, c), rows padded with zero up to rows_padded (a multiple of 16); load_row(r, c) gives the 16 units
// from column c on, zeros past the end of the row. emit(c, r, vector) stores 16 units of dst's row c.
template <typename LoadRow, typename Emit>
FAE_INLINE void transpose_units(int rows, int cols, int rows_padded, LoadRow load_row, Emit emit) {
  for (int r0 = 0; r0 < rows_padded; r0 += 16) {
    for (int c0 = 0; c0 < cols; c0 += 16) {
      vu tile[16];
      for (int i = 0; i < 16; ++i) tile[i] = r0 + i < rows ? load_row(r0 + i, c0) : vu{};
      transpose16(tile);
      const int n = cols - c0 < 16 ? cols - c0 : 16;
      for (int i = 0; i < n; ++i) emit(c0 + i, r0, tile[i]);
    }
  }
}

}  // namespace fae::cpu::FAE_ISA
