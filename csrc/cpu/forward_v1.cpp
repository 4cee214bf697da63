// Version-1 forward (FlashAttention, Algorithm 1): keys in the outer loop, rows in the inner one. O, l and m live in
// memory and are read, rescaled and written at every step; O is normalised all along. Line numbers are the paper's.
//
// Batches, heads and groups of rows run in parallel; each group is an Algorithm 1 of its own.
#include "forward_tile.h"

namespace fae::cpu {

namespace {

template <typename T>
struct StepScratch {
  TileScratch<T> tile;
  typename T::Op* q;        // Q_i   [tile_m][inner(D)]
  typename T::Acc* pv;      // P~_ij V_j [tile_m][Dv]
  typename T::Acc* m_tile;  // m~_ij [tile_m]
  typename T::Acc* l_tile;  // l~_ij [tile_m]
  typename T::Acc* o_keep;  // [tile_m]: what O_i keeps
  typename T::Acc* o_take;  // [tile_m]: what the new tile contributes

  StepScratch(Arena& arena, const Sizes& sizes, int tile_m, int tile_n)
      : tile(arena, sizes, tile_m, tile_n),
        q(arena.take<typename T::Op>(int64_t{tile_m} * T::inner(sizes.head_dim))),
        pv(arena.take<typename T::Acc>(int64_t{tile_m} * sizes.head_dim_v)),
        m_tile(arena.take<typename T::Acc>(tile_m)),
        l_tile(arena.take<typename T::Acc>(tile_m)),
        o_keep(arena.take<typename T::Acc>(tile_m)),
        o_take(arena.take<typename T::Acc>(tile_m)) {}
};

// O, m and l "in HBM" (line 2). O is the output itself, except where that has 16 bits: rounding it at every step would
// cost accuracy that grows with the number of key blocks.
template <typename T>
struct Memory {
  static constexpr bool kOutputIsO = std::is_same_v<typename T::In, typename T::Acc>;
  typename T::Acc* o = nullptr;  // [B][H][Sq][Dv]
  typename T::Acc* m;            // [B][H][Sq]
  typename T::Acc* l;            // [B][H][Sq]

  Memory(Arena& arena, const Sizes& z) {
    const int64_t rows = z.batch * z.heads * z.seqlen_q;
    if constexpr (!kOutputIsO) o = arena.take<typename T::Acc>(rows * z.head_dim_v);
    m = arena.take<typename T::Acc>(rows);
    l = arena.take<typename T::Acc>(rows);
  }

  TensorRef o_ref(const AttentionParams& p) const {
    if constexpr (kOutputIsO) return p.o;
    const int64_t dv = p.sizes.head_dim_v;
    return {o, p.sizes.heads * p.sizes.seqlen_q * dv, p.sizes.seqlen_q * dv, dv};
  }
};

template <typename T>
void run_group(const AttentionParams& p, const ForwardPlan& plan, const Memory<T>& memory, int64_t b, int h, int r0,
               int r1, StepScratch<T>& scratch) {
  using In = typename T::In;
  using Acc = typename T::Acc;
  using rules = softmax<Acc>;
  const auto& ops = tile_ops<In, typename T::Op, Acc>();
  const Sizes& z = p.sizes;
  const IntervalMask mask = p.mask(b);
  const TensorRef o_memory = memory.o_ref(p);
  const int d = T::inner(z.head_dim), dv = z.head_dim_v;
  const int64_t first_row = (b * z.heads + h) * z.seqlen_q;
  Acc* m_memory = memory.m + first_row;
  Acc* l_memory = memory.l + first_row;

  // Line 2: O = 0, l = 0, m = -inf.
  for (int r = r0; r < r1; ++r) {
    std::fill_n(o_memory.row<Acc>(b, h, r), dv, Acc(0));
    l_memory[r] = Acc(0);
    m_memory[r] = rules::neg_inf();
  }

  // Line 5: for each block j of keys. Line 6: load K_j and V_j.
  const Range keys = mask.keys_of_rows(r0, r1);
  for (int origin = static_cast<int>(round_down(keys.begin, plan.tile_n)); origin < keys.end; origin += plan.tile_n) {
    const Range wanted = {origin, std::min(origin + plan.tile_n, static_cast<int>(round_up(keys.end, kColumnStep)))};
    const auto block = KeyBlock<T>::load(p, b, z.kv_head(h), origin, wanted, scratch.tile);

    // Line 7: for each block i of rows. Line 8: load Q_i, O_i, l_i, m_i.
    for (int m0 = r0; m0 < r1; m0 += plan.tile_m) {
      const int rows = std::min(plan.tile_m, r1 - m0);
      const Range columns = visible_columns(mask, block, m0, m0 + rows);
      if (columns.empty()) continue;
      ops.copy_rows(p.q.row<const In>(b, h, m0), p.q.stride_s, rows, z.head_dim, scratch.q, d, plan.tile_m, d);
      Acc* o_i = o_memory.row<Acc>(b, h, m0);
      Acc* m_i = m_memory + m0;
      Acc* l_i = l_memory + m0;

      // Line 9: S_ij = Q_i K_j^T. Line 10: m~_ij, P~_ij, l~_ij of this tile alone.
      std::fill_n(scratch.m_tile, rows, rules::neg_inf());
      std::fill_n(scratch.l_tile, rows, Acc(0));
      score_tile<T>(p, mask, block, columns, m0, rows, scratch.q, plan.tile_m, scratch.m_tile, scratch.l_tile,
                    scratch.tile);
      gemm(gemm_rows(rows, plan.tile_m), dv, columns.size(), scratch.tile.ld_p, block.ld_v, dv, false,
           scratch.tile.p + columns.begin, block.v_row(columns.begin), scratch.pv);

      // Line 11: m_new = max(m_i, m~_ij); l_new = e^(m_i - m_new) l_i + e^(m~_ij - m_new) l~_ij.
      for (int r = 0; r < rows; ++r) {
        const Acc m_new = std::max(m_i[r], scratch.m_tile[r]);
        const Acc keep = l_i[r] * rules::rescale(m_i[r], m_new);
        const Acc take = rules::rescale(scratch.m_tile[r], m_new);
        const Acc l_new = keep + scratch.l_tile[r] * take;
        const Acc inverse = rules::inverse_sum(l_new);
        scratch.o_keep[r] = keep * inverse;
        scratch.o_take[r] = take * inverse;
        m_i[r] = m_new;  // line 13
        l_i[r] = l_new;
      }
      // Line 12: O_i = diag(l_new)^-1 (diag(l_i) e^(m_i - m_new) O_i + e^(m~_ij - m_new) P~_ij V_j).
      ops.scale_add_rows(o_i, o_memory.stride_s, scratch.pv, dv, rows, dv, scratch.o_keep, scratch.o_take);
    }
  }

  Acc* lse = p.lse.row<Acc>(b, h, r0);
  for (int r = r0; r < r1; ++r) lse[r - r0] = rules::lse(m_memory[r], l_memory[r]);
  if constexpr (!Memory<T>::kOutputIsO)
    ops.store_rows(o_memory.row<Acc>(b, h, r0), o_memory.stride_s, r1 - r0, dv, nullptr, Acc(1), p.o.row<In>(b, h, r0),
                   p.o.stride_s);
}

}  // namespace

size_t forward_v1_slot_bytes(const Sizes& sizes, DType dtype, int tile_m, int tile_n) {
  return visit_types(dtype, [&](auto types) {
    Arena arena(nullptr);
    StepScratch<decltype(types)>(arena, sizes, tile_m, tile_n);
    return arena.used();
  });
}

size_t forward_v1_shared_bytes(const Sizes& sizes, DType dtype) {
  return visit_types(dtype, [&](auto types) {
    Arena arena(nullptr);
    Memory<decltype(types)>(arena, sizes);
    return arena.used();
  });
}

void forward_v1(const AttentionParams& p, DType dtype, const ForwardPlan& plan, void* workspace) {
  visit_types(dtype, [&](auto types) {
    using T = decltype(types);
    const Sizes& z = p.sizes;
    Arena shared(workspace);
    const Memory<T> memory(shared, z);
    char* slots = static_cast<char*>(workspace) + plan.shared_bytes;
    const int64_t groups = ceil_div(z.seqlen_q, plan.rows_per_task);
    parallel_tasks(plan.tasks, plan.slots, [&](int slot, int64_t task) {
      Arena arena(slots + slot * plan.slot_bytes);
      StepScratch<T> scratch(arena, z, plan.tile_m, plan.tile_n);
      const int64_t bh = task / groups;
      const int r0 = static_cast<int>(task % groups * plan.rows_per_task);
      run_group<T>(p, plan, memory, bh / z.heads, static_cast<int>(bh % z.heads), r0,
                   std::min(r0 + plan.rows_per_task, z.seqlen_q), scratch);
    });
  });
}

}  // namespace fae::cpu
