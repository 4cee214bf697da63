// One score tile of the forward, shared by both versions: packed operands of a key block, S = Q K^T, online softmax.
#pragma once

#include "../core/softmax.h"
#include "config.h"
#include "engine.h"
#include "support.h"

namespace fae::cpu {

// What plan_forward() asks of the two loops: bytes of one thread's scratch and, for version 1, of its O, m and l.
size_t forward_v2_slot_bytes(const Sizes& sizes, DType dtype, int rows_per_product, int tile_n, int rows);
size_t forward_v1_slot_bytes(const Sizes& sizes, DType dtype, int tile_m, int tile_n);
size_t forward_v1_shared_bytes(const Sizes& sizes, DType dtype);

// Rows of a brgemm: whole tiles. A single one that is not full has the next power of two of rows, so that few shapes are
// generated and one decoded token does not pay for a whole tile. No result bit depends on it.
inline int gemm_rows(int rows, int tile_m) {
  if (rows > tile_m) return static_cast<int>(round_up(rows, tile_m));
  int m = 1;
  while (m < rows) m *= 2;
  return std::min(m, tile_m);
}

// A thread's scratch for one key block and one score tile, or several of them that are multiplied at once.
template <typename T>
struct TileScratch {
  int ld_k, ld_v, ld_s, ld_p;
  typename T::Op* k_t;     // [inner(D)][ld_k], B operand
  typename T::Op* v_b;     // [tile_n][ld_v], B operand
  typename T::Acc* s;      // [rows][ld_s]
  typename T::Op* p;       // [rows][ld_p], A operand; is s where the types agree
  typename T::Acc* alpha;  // [rows]
  Range* visible;          // [rows]

  TileScratch(Arena& arena, const Sizes& sizes, int rows, int tile_n) {
    // A row of a B operand is kColumnStride rows of the matrix.
    constexpr int kPadB = kRowPadding / (T::kColumnStride * static_cast<int>(sizeof(typename T::Op)));
    ld_k = tile_n + kPadB, ld_v = sizes.head_dim_v + kPadB;
    ld_s = tile_n + kRowPadding / static_cast<int>(sizeof(typename T::Acc));
    ld_p = tile_n + kRowPadding / static_cast<int>(sizeof(typename T::Op));
    k_t = arena.take<typename T::Op>(int64_t{T::inner(sizes.head_dim)} * ld_k);
    v_b = arena.take<typename T::Op>(int64_t{tile_n} * ld_v);
    s = arena.take<typename T::Acc>(int64_t{rows} * ld_s);
    if constexpr (std::is_same_v<typename T::Op, typename T::Acc>) {
      p = s;
    } else {
      p = arena.take<typename T::Op>(int64_t{rows} * ld_p);
    }
    alpha = arena.take<typename T::Acc>(rows);
    visible = arena.take<Range>(rows);
  }
};

// The keys [begin, end) of one block as operands; columns are counted from `origin`. end may pass the last key: the
// columns behind it are zero.
template <typename T>
struct KeyBlock {
  int origin;
  Range keys;
  const typename T::Op* k_t;
  const typename T::Op* v;  // row of `origin`
  int64_t ld_v;

  static KeyBlock load(const AttentionParams& p, int64_t b, int h_kv, int origin, Range keys, TileScratch<T>& scratch) {
    using In = typename T::In;
    const auto& ops = tile_ops<In, typename T::Op, typename T::Acc>();
    const Sizes& z = p.sizes;
    const int seqlen_k = p.seq(b).seqlen_k;
    const int at = keys.begin - origin, padded = keys.size(), real = std::min(keys.end, seqlen_k) - keys.begin;
    ops.pack_b_transposed(p.k.row<const In>(b, h_kv, keys.begin), p.k.stride_s, real, z.head_dim,
                          scratch.k_t + at * T::kColumnStride, scratch.ld_k, padded, T::inner(z.head_dim));
    const In* v = p.v.row<const In>(b, h_kv, keys.begin);
    if constexpr (T::kDirect) {
      if (real == padded) return {origin, keys, scratch.k_t, v - at * p.v.stride_s, p.v.stride_s};
    }
    ops.pack_b(v, p.v.stride_s, real, z.head_dim_v, scratch.v_b + int64_t{at} * scratch.ld_v, scratch.ld_v, padded);
    return {origin, keys, scratch.k_t, scratch.v_b, scratch.ld_v};
  }

  const typename T::Op* v_row(int column) const { return v + column * ld_v; }
};

// The columns of a key block that rows [m0, m1) can see, widened to whole steps: [begin, end) from block.origin.
template <typename T>
Range visible_columns(const IntervalMask& mask, const KeyBlock<T>& block, int m0, int m1) {
  const Range keys = mask.keys_of_rows(m0, m1);
  const int begin = std::max(keys.begin, block.keys.begin), end = std::min(keys.end, block.keys.end);
  if (begin >= end) return {0, 0};
  return {static_cast<int>(round_down(begin - block.origin, kColumnStep)),
          static_cast<int>(round_up(end - block.origin, kColumnStep))};
}

// S = Q K^T on the columns, then one step of online softmax on m, l. Leaves P and alpha in the scratch and says whether
// any row's maximum rose (so that what was accumulated before has to be rescaled).
template <typename T>
bool score_tile(const AttentionParams& p, const IntervalMask& mask, const KeyBlock<T>& block, Range columns, int m0,
                int rows, const typename T::Op* q, int tile_m, typename T::Acc* m, typename T::Acc* l,
                TileScratch<T>& scratch) {
  using Acc = typename T::Acc;
  const int d = T::inner(p.sizes.head_dim), n = columns.size(), c0 = columns.begin;
  gemm(gemm_rows(rows, tile_m), n, d, d, scratch.ld_k, scratch.ld_s, false, q, block.k_t + c0 * T::kColumnStride,
       scratch.s + c0);
  for (int r = 0; r < rows; ++r) {
    const int first = mask.begin(m0 + r) - block.origin - c0, last = mask.end(m0 + r) - block.origin - c0;
    scratch.visible[r] = {std::clamp(first, 0, n), std::clamp(last, 0, n)};
  }
  return tile_ops<typename T::In, typename T::Op, Acc>().softmax_step(
      scratch.s + c0, scratch.ld_s, rows, n, scratch.visible, static_cast<Acc>(p.scale * kLog2E), m, l, scratch.alpha,
      scratch.p + c0, scratch.ld_p);
}

}  // namespace fae::cpu
