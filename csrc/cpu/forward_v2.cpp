// Version-2 forward (FlashAttention-2, Algorithm 1): rows in the outer loop, one pass over the keys, O normalised once.
//
//   task = (batch, head, group of rows)                     a thread's
//     for each block of keys the group can see              ascending
//       pack K^T and V once for the whole group
//       for each tile of rows in the group                or a run of them that see the same keys
//         S = Q K^T;  m, l, P = online softmax;  O = diag(alpha) O + P V
//     O = diag(1 / l) O;  lse = m + log l
//
// A group of 512 rows shares each packed block: packing costs about 1 % of its products. Memory: per thread one packed
// block, the scores of a run and the group's Q and O; nothing grows with the sequence.
#include "forward_tile.h"

namespace fae::cpu {

namespace {

template <typename T>
struct GroupScratch {
  TileScratch<T> tile;
  typename T::Op* q;   // [rows][inner(D)]
  typename T::Acc* o;  // [rows][ld_o]
  typename T::Acc* m;  // [rows], base 2
  typename T::Acc* l;  // [rows]

  GroupScratch(Arena& arena, const Sizes& sizes, int rows_per_product, int tile_n, int rows)
      : tile(arena, sizes, rows_per_product, tile_n),
        q(arena.take<typename T::Op>(int64_t{rows} * T::inner(sizes.head_dim))),
        o(arena.take<typename T::Acc>(int64_t{rows} * ld_o(sizes))),
        m(arena.take<typename T::Acc>(rows)),
        l(arena.take<typename T::Acc>(rows)) {}

  static int ld_o(const Sizes& sizes) { return static_cast<int>(round_up(sizes.head_dim_v, 16)); }
};

template <typename T>
void run_group(const AttentionParams& p, const ForwardPlan& plan, int64_t b, int h, int r0, int r1,
               GroupScratch<T>& scratch) {
  using In = typename T::In;
  using Acc = typename T::Acc;
  const auto& ops = tile_ops<In, typename T::Op, Acc>();
  const Sizes& z = p.sizes;
  const IntervalMask mask = p.mask(b);
  const int rows = r1 - r0, d = T::inner(z.head_dim), ld_o = GroupScratch<T>::ld_o(z);
  const int padded = static_cast<int>(round_up(rows, plan.tile_m));

  ops.copy_rows(p.q.row<const In>(b, h, r0), p.q.stride_s, rows, z.head_dim, scratch.q, d, padded, d);
  std::fill_n(scratch.m, rows, softmax<Acc>::neg_inf());
  std::fill_n(scratch.l, rows, Acc(0));

  uint64_t started = 0;  // bit i: tile i has accumulated something
  const auto has_started = [&](int m0) { return (started >> ((m0 - r0) / plan.tile_m) & 1) != 0; };
  const Range keys = mask.keys_of_rows(r0, r1);
  for (int origin = static_cast<int>(round_down(keys.begin, plan.tile_n)); origin < keys.end; origin += plan.tile_n) {
    const Range wanted = {std::max(origin, static_cast<int>(round_down(keys.begin, kColumnStep))),
                          std::min(origin + plan.tile_n, static_cast<int>(round_up(keys.end, kColumnStep)))};
    const auto block = KeyBlock<T>::load(p, b, z.kv_head(h), origin, wanted, scratch.tile);
    const auto columns_from = [&](int m0) { return visible_columns(mask, block, m0, std::min(m0 + plan.tile_m, r1)); };
    for (int m0 = r0, m1; m0 < r1; m0 = m1) {
      const Range columns = columns_from(m0);
      m1 = std::min(m0 + plan.tile_m, r1);
      if (columns.empty()) continue;
      // The tiles that follow join in where all is the same for them.
      while (m1 < r1 && m1 - m0 < plan.rows_per_product) {
        const Range next = columns_from(m1);
        if (next.begin != columns.begin || next.end != columns.end || has_started(m1) != has_started(m0)) break;
        m1 = std::min(m1 + plan.tile_m, r1);
      }
      const int m_rows = m1 - m0, at = m0 - r0;
      const bool rescale = score_tile<T>(p, mask, block, columns, m0, m_rows, scratch.q + int64_t{at} * d, plan.tile_m,
                                         scratch.m + at, scratch.l + at, scratch.tile);
      Acc* o = scratch.o + int64_t{at} * ld_o;
      if (rescale && has_started(m0)) ops.scale_rows(o, ld_o, m_rows, ld_o, scratch.tile.alpha);
      gemm(gemm_rows(m_rows, plan.tile_m), z.head_dim_v, columns.size(), scratch.tile.ld_p, block.ld_v, ld_o,
           has_started(m0), scratch.tile.p + columns.begin, block.v_row(columns.begin), o);
      for (int row = m0; row < m1; row += plan.tile_m) started |= uint64_t{1} << ((row - r0) / plan.tile_m);
    }
  }

  Acc* lse = p.lse.row<Acc>(b, h, r0);
  for (int m0 = 0; m0 < rows; m0 += plan.tile_m) {
    if (started >> (m0 / plan.tile_m) & 1) continue;
    std::fill_n(scratch.o + int64_t{m0} * ld_o, int64_t{std::min(plan.tile_m, rows - m0)} * ld_o, Acc(0));
  }
  for (int r = 0; r < rows; ++r) {
    lse[r] = softmax<Acc>::lse(scratch.m[r], scratch.l[r]);
    scratch.l[r] = softmax<Acc>::inverse_sum(scratch.l[r]);
  }
  ops.store_rows(scratch.o, ld_o, rows, z.head_dim_v, scratch.l, Acc(1), p.o.row<In>(b, h, r0), p.o.stride_s);
}

}  // namespace

size_t forward_v2_slot_bytes(const Sizes& sizes, DType dtype, int rows_per_product, int tile_n, int rows) {
  return visit_types(dtype, [&](auto types) {
    Arena arena(nullptr);
    GroupScratch<decltype(types)>(arena, sizes, rows_per_product, tile_n, rows);
    return arena.used();
  });
}

void forward_v2(const AttentionParams& p, DType dtype, const ForwardPlan& plan, void* workspace) {
  visit_types(dtype, [&](auto types) {
    using T = decltype(types);
    const Sizes& z = p.sizes;
    const int64_t groups = ceil_div(z.seqlen_q, plan.rows_per_task), heads = z.batch * z.heads;
    parallel_tasks(plan.tasks, plan.slots, [&](int slot, int64_t task) {
      Arena arena(static_cast<char*>(workspace) + slot * plan.slot_bytes);
      GroupScratch<T> scratch(arena, z, plan.rows_per_product, plan.tile_n, plan.rows_per_task);
      // The last rows first: under a causal mask they see the most keys, and the small tasks fill the gaps at the end.
      const int64_t group = groups - 1 - task / heads, bh = task % heads;
      const int r0 = static_cast<int>(group * plan.rows_per_task);
      run_group<T>(p, plan, bh / z.heads, static_cast<int>(bh % z.heads), r0,
                   std::min(r0 + plan.rows_per_task, z.seqlen_q), scratch);
    });
  });
}

}  // namespace fae::cpu
