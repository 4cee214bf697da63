// Version-2 backward (FlashAttention-2, Algorithm 2): five products per tile, P recomputed from lse.
//
//   delta = rowsum(dO * O) - dlse                                            once per row
//   S^T = K Q^T,  dP^T = V dO^T,  P^T = exp2(S^T - lse),  dS^T = P^T (dP^T - delta)
//   dV += P^T dO,  dK += dS^T Q,  dQ^T += K^T dS^T
//
// Tiles are transposed (a row is a key): P^T and dS^T come out as the A operands of dV and dK, dS^T as the B operand of
// dQ^T, and lse and delta are vectors along the lanes.
//
// Schedule. Rows and keys are cut into chunks. For one key/value head let row chunk r run over all its query heads. In
// step s, key chunk j meets row chunk (j + s) mod L, L = max(row chunks, key chunks): a Latin rectangle. No two squares
// of a step share a row chunk or a key chunk, so each owns its piece of dQ, dK and dV and adds to it without a lock;
// and the order in which a piece is added to is fixed by the schedule, not by threads: the result is reproducible at
// any thread count, with one dQ accumulator. With many heads each runs its steps on one thread, in the same order.
#include <limits>
#include <vector>

#include "../core/softmax.h"
#include "config.h"
#include "engine.h"
#include "support.h"

namespace fae::cpu {

namespace {

// Chunk counts and padded lengths.
struct Grid {
  int chunk;
  int row_chunks;  // per query head
  int key_chunks;
  int group;      // query heads per key/value head
  int64_t units;  // batch * key/value heads

  Grid(const Sizes& z, int chunk)
      : chunk(chunk),
        row_chunks(static_cast<int>(ceil_div(z.seqlen_q, chunk))),
        key_chunks(static_cast<int>(ceil_div(z.seqlen_k, chunk))),
        group(z.heads_per_kv()),
        units(z.batch * z.heads_kv) {}

  int rows_padded() const { return row_chunks * chunk; }
  int keys_padded() const { return key_chunks * chunk; }
  int steps() const { return std::max(row_chunks * group, key_chunks); }
  // The row chunk that key chunk j meets in step s, counted over the group's query heads; -1 for none.
  int row_chunk_of(int step, int j) const {
    const int r = (j + step) % steps();
    return r < row_chunks * group ? r : -1;
  }
};

// Per query row, padded to whole chunks: base-2 lse (+inf on padding and empty rows, hence P = 0) and delta.
template <typename Acc>
struct RowStats {
  Acc* lse2;   // [B][H][rows_padded]
  Acc* delta;  // [B][H][rows_padded]

  RowStats(Arena& arena, const Sizes& z, const Grid& grid) {
    const int64_t rows = z.batch * z.heads * grid.rows_padded();
    lse2 = arena.take<Acc>(rows);
    delta = arena.take<Acc>(rows);
  }
};

// fp32 (fp64) sums of one key/value head: dK and dV row-major, dQ transposed within each row chunk.
template <typename Acc>
struct Accumulators {
  Acc* dk;    // [keys_padded][ld_k]
  Acc* dv;    // [keys_padded][ld_v]
  Acc* dq_t;  // [group * row_chunks][D][chunk]
  int ld_k, ld_v;

  Accumulators(Arena& arena, const Sizes& z, const Grid& grid)
      : ld_k(static_cast<int>(round_up(z.head_dim, 16))), ld_v(static_cast<int>(round_up(z.head_dim_v, 16))) {
    dk = arena.take<Acc>(dk_size(grid));
    dv = arena.take<Acc>(dv_size(grid));
    dq_t = arena.take<Acc>(dq_size(z, grid));
  }
  int64_t dk_size(const Grid& g) const { return int64_t{g.keys_padded()} * ld_k; }
  int64_t dv_size(const Grid& g) const { return int64_t{g.keys_padded()} * ld_v; }
  static int64_t dq_size(const Sizes& z, const Grid& g) { return int64_t{g.group} * g.rows_padded() * z.head_dim; }
  void clear(const Sizes& z, const Grid& grid) {
    std::fill_n(dk, dk_size(grid), Acc(0));
    std::fill_n(dv, dv_size(grid), Acc(0));
    std::fill_n(dq_t, dq_size(z, grid), Acc(0));
  }
  static size_t bytes(const Sizes& z, const Grid& grid) {
    Arena arena(nullptr);
    Accumulators(arena, z, grid);
    return arena.used();
  }
};

// A thread's operands for one square and its score tile.
template <typename T>
struct SquareScratch {
  using Op = typename T::Op;
  using Acc = typename T::Acc;
  Op* q_t;         // [inner(D)][chunk]   B of S^T
  Op* dout_t;      // [inner(Dv)][chunk]  B of dP^T
  Op* q_b;         // [chunk][D]          B of dK
  Op* dout_b;      // [chunk][Dv]         B of dV
  Op* k_a;         // [chunk][inner(D)]   A of S^T
  Op* v_a;         // [chunk][inner(Dv)]  A of dP^T
  Op* k_t;         // [D][chunk]          A of dQ^T
  Acc* s;          // [tile_n][chunk]
  Acc* dp;         // [tile_n][chunk]
  Op* p;           // [tile_n][chunk]     A of dV; is s where the types agree
  Op* ds;          // [tile_n][chunk]     A of dK; is dp where the types agree
  Op* ds_b;        // [tile_n][chunk]     B of dQ^T; is ds where the layouts agree
  Range* visible;  // [tile_n]

  SquareScratch(Arena& arena, const Sizes& z, int chunk, int tile_n) {
    const int64_t d = z.head_dim, dv = z.head_dim_v;
    q_t = arena.take<Op>(T::inner(z.head_dim) * int64_t{chunk});
    dout_t = arena.take<Op>(T::inner(z.head_dim_v) * int64_t{chunk});
    q_b = arena.take<Op>(d * chunk);
    dout_b = arena.take<Op>(dv * chunk);
    k_a = arena.take<Op>(T::inner(z.head_dim) * int64_t{chunk});
    v_a = arena.take<Op>(T::inner(z.head_dim_v) * int64_t{chunk});
    k_t = arena.take<Op>(d * chunk);
    s = arena.take<Acc>(int64_t{tile_n} * chunk);
    dp = arena.take<Acc>(int64_t{tile_n} * chunk);
    if constexpr (std::is_same_v<Op, Acc>) {
      p = s;
      ds = ds_b = dp;
    } else {
      p = arena.take<Op>(int64_t{tile_n} * chunk);
      ds = arena.take<Op>(int64_t{tile_n} * chunk);
      ds_b = arena.take<Op>(int64_t{tile_n} * chunk);
    }
    visible = arena.take<Range>(tile_n);
  }
};

// A chunk's rows as a B operand: the tensor itself where its layout is one and no row is missing.
template <typename T>
struct RowOperand {
  const typename T::Op* data;
  int64_t ld;

  static RowOperand of(const typename T::In* src, int64_t ld_src, int rows, int dim, int chunk,
                       typename T::Op* scratch) {
    if constexpr (T::kDirect) {
      if (rows == chunk) return {src, ld_src};
    }
    tile_ops<typename T::In, typename T::Op, typename T::Acc>().pack_b(src, ld_src, rows, dim, scratch, dim, chunk);
    return {scratch, dim};
  }
};

// All tiles of key chunk j and row chunk i of query head h.
template <typename T>
void run_square(const BackwardParams& bp, const BackwardPlan& plan, const Grid& grid,
                const RowStats<typename T::Acc>& stats, int64_t b, int h_kv, int r, int j,
                const Accumulators<typename T::Acc>& acc, SquareScratch<T>& x) {
  using In = typename T::In;
  using Acc = typename T::Acc;
  const auto& ops = tile_ops<In, typename T::Op, Acc>();
  const AttentionParams& p = bp.fwd;
  const Sizes& z = p.sizes;
  const int chunk = grid.chunk, i0 = r % grid.row_chunks * chunk, j0 = j * chunk;
  const int h = h_kv * grid.group + r / grid.row_chunks;
  const int rows = std::min(chunk, z.seqlen_q - i0), keys = std::min(chunk, z.seqlen_k - j0);
  const IntervalMask mask = p.mask(b);
  const Range square = mask.rows_of_keys(j0, j0 + keys);
  if (std::max(square.begin, i0) >= std::min(square.end, i0 + rows)) return;

  const int d = z.head_dim, dv = z.head_dim_v, d_inner = T::inner(d), dv_inner = T::inner(dv);
  const In* q = p.q.row<const In>(b, h, i0);
  const In* dout = bp.dout.row<const In>(b, h, i0);
  const In* k = p.k.row<const In>(b, h_kv, j0);
  const In* v = p.v.row<const In>(b, h_kv, j0);
  ops.pack_b_transposed(q, p.q.stride_s, rows, d, x.q_t, chunk, chunk, d_inner);
  ops.pack_b_transposed(dout, bp.dout.stride_s, rows, dv, x.dout_t, chunk, chunk, dv_inner);
  const auto q_b = RowOperand<T>::of(q, p.q.stride_s, rows, d, chunk, x.q_b);
  const auto dout_b = RowOperand<T>::of(dout, bp.dout.stride_s, rows, dv, chunk, x.dout_b);
  ops.copy_rows(k, p.k.stride_s, keys, d, x.k_a, d_inner, chunk, d_inner);
  ops.copy_rows(v, p.v.stride_s, keys, dv, x.v_a, dv_inner, chunk, dv_inner);
  ops.pack_a_transposed(k, p.k.stride_s, keys, d, x.k_t, chunk, chunk);

  const int64_t stats_row = (b * z.heads + h) * grid.rows_padded() + i0;
  Acc* dq_t = acc.dq_t + int64_t{r} * d * chunk;
  for (int n = 0; n < keys; n += plan.tile_n) {
    const int tile_keys = std::min(plan.tile_n, keys - n);
    const Range seen = mask.rows_of_keys(j0 + n, j0 + n + tile_keys);
    const int first = std::max(seen.begin, i0) - i0, last = std::min(seen.end, i0 + rows) - i0;
    if (first >= last) continue;
    const int m0 = static_cast<int>(round_down(first, kColumnStep));
    const int m = static_cast<int>(round_up(last, kColumnStep)) - m0;
    for (int row = 0; row < plan.tile_n; ++row) {
      const Range of_key = row < tile_keys ? mask.rows_of_keys(j0 + n + row, j0 + n + row + 1) : Range{0, 0};
      x.visible[row] = {std::clamp(of_key.begin - i0 - m0, 0, m), std::clamp(of_key.end - i0 - m0, 0, m)};
    }
    gemm(plan.tile_n, m, d_inner, d_inner, chunk, chunk, false, x.k_a + int64_t{n} * d_inner,
         x.q_t + m0 * T::kColumnStride, x.s);
    gemm(plan.tile_n, m, dv_inner, dv_inner, chunk, chunk, false, x.v_a + int64_t{n} * dv_inner,
         x.dout_t + m0 * T::kColumnStride, x.dp);
    ops.softmax_backward(x.s, x.dp, chunk, plan.tile_n, m, x.visible, static_cast<Acc>(p.scale * kLog2E),
                         stats.lse2 + stats_row + m0, stats.delta + stats_row + m0, x.p, x.ds, x.ds_b, chunk);
    gemm(plan.tile_n, dv, m, chunk, dout_b.ld, acc.ld_v, true, x.p, dout_b.data + m0 * dout_b.ld,
         acc.dv + int64_t{j0 + n} * acc.ld_v);
    gemm(plan.tile_n, d, m, chunk, q_b.ld, acc.ld_k, true, x.ds, q_b.data + m0 * q_b.ld,
         acc.dk + int64_t{j0 + n} * acc.ld_k);
    gemm(d, m, plan.tile_n, chunk, chunk, chunk, true, x.k_t + n, x.ds_b, dq_t + m0);
  }
}

// lse in base 2 and delta = rowsum(dO * O) - dlse for one chunk of rows of one head.
template <typename T>
void prepare_rows(const BackwardParams& bp, const Grid& grid, const RowStats<typename T::Acc>& stats, int64_t b, int h,
                  int i0) {
  using In = typename T::In;
  using Acc = typename T::Acc;
  const AttentionParams& p = bp.fwd;
  const Sizes& z = p.sizes;
  const int rows = std::min(grid.chunk, z.seqlen_q - i0);
  const int64_t at = (b * z.heads + h) * grid.rows_padded() + i0;
  Acc* lse2 = stats.lse2 + at;
  Acc* delta = stats.delta + at;
  tile_ops<In, typename T::Op, Acc>().row_dot(bp.dout.row<const In>(b, h, i0), bp.dout.stride_s,
                                              p.o.row<const In>(b, h, i0), p.o.stride_s, rows, z.head_dim_v, delta);
  const Acc* lse = p.lse.row<const Acc>(b, h, i0);
  for (int r = 0; r < rows; ++r) lse2[r] = softmax<Acc>::lse_base2(lse[r]);
  if (bp.dlse.data != nullptr) {
    const Acc* dlse = bp.dlse.row<const Acc>(b, h, i0);
    for (int r = 0; r < rows; ++r) delta[r] -= dlse[r];
  }
  // An empty row's dlse may be anything, and its dO anything finite; its gradients are zero.
  for (int r = 0; r < rows; ++r)
    if (lse[r] == softmax<Acc>::neg_inf()) delta[r] = Acc(0);
  std::fill(lse2 + rows, lse2 + grid.chunk, std::numeric_limits<Acc>::infinity());
  std::fill(delta + rows, delta + grid.chunk, Acc(0));
}

// Rounds one chunk of dK and dV, or of one query head's dQ, into the outputs.
template <typename T>
void store_keys(const BackwardParams& bp, const Grid& grid, int64_t b, int h_kv, int j,
                const Accumulators<typename T::Acc>& acc) {
  using In = typename T::In;
  using Acc = typename T::Acc;
  const auto& ops = tile_ops<In, typename T::Op, Acc>();
  const Sizes& z = bp.fwd.sizes;
  const int j0 = j * grid.chunk, keys = std::min(grid.chunk, z.seqlen_k - j0);
  ops.store_rows(acc.dk + int64_t{j0} * acc.ld_k, acc.ld_k, keys, z.head_dim, nullptr, static_cast<Acc>(bp.fwd.scale),
                 bp.dk.row<In>(b, h_kv, j0), bp.dk.stride_s);
  ops.store_rows(acc.dv + int64_t{j0} * acc.ld_v, acc.ld_v, keys, z.head_dim_v, nullptr, Acc(1),
                 bp.dv.row<In>(b, h_kv, j0), bp.dv.stride_s);
}
template <typename T>
void store_queries(const BackwardParams& bp, const Grid& grid, int64_t b, int h_kv, int r,
                   const Accumulators<typename T::Acc>& acc) {
  using In = typename T::In;
  using Acc = typename T::Acc;
  const Sizes& z = bp.fwd.sizes;
  const int i0 = r % grid.row_chunks * grid.chunk, h = h_kv * grid.group + r / grid.row_chunks;
  tile_ops<In, typename T::Op, Acc>().store_transposed(
      acc.dq_t + int64_t{r} * z.head_dim * grid.chunk, grid.chunk, std::min(grid.chunk, z.seqlen_q - i0), z.head_dim,
      static_cast<Acc>(bp.fwd.scale), bp.dq.row<In>(b, h, i0), bp.dq.stride_s);
}

// A square of the current step.
struct Square {
  int64_t unit;
  int r;
  int j;
};

template <typename T>
struct Layout {
  using Acc = typename T::Acc;
  size_t square_bytes, accumulator_bytes, stats_bytes;

  Layout(const Sizes& z, const Grid& grid, int tile_n) {
    Arena square(nullptr), stats(nullptr);
    SquareScratch<T>(square, z, grid.chunk, tile_n);
    RowStats<Acc>(stats, z, grid);
    square_bytes = square.used();
    stats_bytes = stats.used();
    accumulator_bytes = Accumulators<Acc>::bytes(z, grid);
  }
};

template <typename T>
void run(const BackwardParams& bp, const BackwardPlan& plan, char* workspace) {
  using Acc = typename T::Acc;
  const Sizes& z = bp.fwd.sizes;
  const Grid grid(z, plan.chunk);
  const Layout<T> layout(z, grid, plan.tile_n);
  Arena shared(workspace);
  const RowStats<Acc> stats(shared, z, grid);
  char* accumulators = workspace + layout.stats_bytes;
  char* slots = workspace + plan.shared_bytes;
  const int row_chunks = grid.row_chunks * grid.group;

  parallel_tasks(z.batch * z.heads * grid.row_chunks, plan.slots, [&](int, int64_t task) {
    const int64_t bh = task / grid.row_chunks;
    prepare_rows<T>(bp, grid, stats, bh / z.heads, static_cast<int>(bh % z.heads),
                    static_cast<int>(task % grid.row_chunks) * grid.chunk);
  });

  if (plan.heads_in_parallel) {
    parallel_tasks(grid.units, plan.slots, [&](int slot, int64_t unit) {
      Arena arena(slots + slot * plan.slot_bytes);
      SquareScratch<T> scratch(arena, z, grid.chunk, plan.tile_n);
      Accumulators<Acc> acc(arena, z, grid);
      const int64_t b = unit / z.heads_kv;
      const int h_kv = static_cast<int>(unit % z.heads_kv);
      acc.clear(z, grid);
      for (int step = 0; step < grid.steps(); ++step)
        for (int j = 0; j < grid.key_chunks; ++j)
          if (const int r = grid.row_chunk_of(step, j); r >= 0)
            run_square<T>(bp, plan, grid, stats, b, h_kv, r, j, acc, scratch);
      for (int j = 0; j < grid.key_chunks; ++j) store_keys<T>(bp, grid, b, h_kv, j, acc);
      for (int r = 0; r < row_chunks; ++r) store_queries<T>(bp, grid, b, h_kv, r, acc);
    });
    return;
  }

  const auto accumulators_of = [&](int64_t unit) {
    Arena arena(accumulators + unit * layout.accumulator_bytes);
    return Accumulators<Acc>(arena, z, grid);
  };
  parallel_tasks(grid.units, plan.slots, [&](int, int64_t unit) { accumulators_of(unit).clear(z, grid); });
  std::vector<Square> squares;
  for (int step = 0; step < grid.steps(); ++step) {
    squares.clear();
    for (int64_t unit = 0; unit < grid.units; ++unit) {
      const IntervalMask mask = bp.fwd.mask(unit / z.heads_kv);
      for (int j = 0; j < grid.key_chunks; ++j) {
        const int r = grid.row_chunk_of(step, j);
        if (r < 0) continue;
        const int i0 = r % grid.row_chunks * grid.chunk, j0 = j * grid.chunk;
        const Range rows = mask.rows_of_keys(j0, std::min(j0 + grid.chunk, z.seqlen_k));
        if (rows.begin < i0 + grid.chunk && rows.end > i0) squares.push_back({unit, r, j});
      }
    }
    parallel_tasks(static_cast<int64_t>(squares.size()), plan.slots, [&](int slot, int64_t task) {
      Arena arena(slots + slot * plan.slot_bytes);
      SquareScratch<T> scratch(arena, z, grid.chunk, plan.tile_n);
      const Square& q = squares[static_cast<size_t>(task)];
      run_square<T>(bp, plan, grid, stats, q.unit / z.heads_kv, static_cast<int>(q.unit % z.heads_kv), q.r, q.j,
                    accumulators_of(q.unit), scratch);
    });
  }
  const int pieces = grid.key_chunks + row_chunks;
  parallel_tasks(grid.units * pieces, plan.slots, [&](int, int64_t task) {
    const int64_t unit = task / pieces, b = unit / z.heads_kv;
    const int piece = static_cast<int>(task % pieces), h_kv = static_cast<int>(unit % z.heads_kv);
    const auto acc = accumulators_of(unit);
    if (piece < grid.key_chunks) {
      store_keys<T>(bp, grid, b, h_kv, piece, acc);
    } else {
      store_queries<T>(bp, grid, b, h_kv, piece - grid.key_chunks, acc);
    }
  });
}

}  // namespace

BackwardPlan plan_backward(const Sizes& sizes, DType dtype, int threads) {
  const BackwardTile& tile = tile_for(kBackwardTiles, sizes);
  // A square is computed and padded whole: a problem that is smaller than one gets a smaller one.
  const int64_t longest = std::max<int64_t>({sizes.seqlen_q, sizes.seqlen_k, 1});
  const int chunk = static_cast<int>(std::min<int64_t>(tile.chunk, round_up(longest, tile.tile_n)));
  const Grid grid(sizes, chunk);
  return visit_types(dtype, [&](auto types) {
    using T = decltype(types);
    const Layout<T> layout(sizes, grid, tile.tile_n);
    BackwardPlan plan{};
    plan.tile_name = tile.name;
    plan.why = tile.why;
    plan.operand = T::kOperandName;
    plan.chunk = chunk;
    plan.tile_n = tile.tile_n;
    // One thread per head needs no barrier between steps, but only where the heads divide evenly enough.
    plan.heads_in_parallel = threads == 1 || grid.units >= 4 * int64_t{threads} || grid.units % threads == 0;
    const int64_t widest = plan.heads_in_parallel ? grid.units : grid.units * grid.key_chunks;
    plan.slots = static_cast<int>(std::clamp<int64_t>(widest, 1, threads));
    plan.slot_bytes = layout.square_bytes + (plan.heads_in_parallel ? layout.accumulator_bytes : 0);
    plan.shared_bytes =
        layout.stats_bytes + (plan.heads_in_parallel ? 0 : static_cast<size_t>(grid.units) * layout.accumulator_bytes);
    plan.workspace_bytes = plan.shared_bytes + plan.slots * plan.slot_bytes;
    return plan;
  });
}

void backward_v2(const BackwardParams& p, DType dtype, const BackwardPlan& plan, void* workspace) {
  visit_types(dtype, [&](auto types) { run<decltype(types)>(p, plan, static_cast<char*>(workspace)); });
}

}  // namespace fae::cpu
