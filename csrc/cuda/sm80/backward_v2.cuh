// Version-2 backward (FlashAttention-2, Algorithm 2) by mma.sync: one CTA per (batch, key/value head, tile of keys). K, V
// and the fp32 dK, dV stay on chip while the CTA walks the query tiles that see its keys, for one query head of the group
// after the other: GQA sums in registers. dQ is added to in global memory, in fp32.
//
// Scores are transposed (a row is a key): lse and delta are vectors along the columns, and P^T, dS^T come out as the A
// operands of dV and dK. Warp (i, j) of warps_n x warps_m owns
//   S^T, dP^T   keys of group i x queries of group j           dV, dK   keys of group i x columns of group j
//   dQ          a block of rows x columns, whose sums live for one step only
//
// A step, one query tile of one head. "->" starts copies, | is a barrier of the CTA:
//   wait for own copies |0   -> Q(next), lse(next) if Q has 2 buffers, dO(next) if dO has
//   S^T = K Q^T, P^T = exp2(scale S^T - lse)            lines 10, 11
//   dP^T = V dO^T, dS^T = P^T (dP^T - delta)            lines 13, 14
//   warps_m > 1:   P^T, dS^T to shared memory |1
//                  dV += P^T dO (line 12), then |2 -> dO(next) if Q has 2 buffers and dO 1
//                  dK += dS^T Q (line 16), then |2 -> what has 1 buffer, if Q has 1
//   warps_m = 1:   P^T, dS^T are the warp's own A fragments; dS^T to shared memory for dQ alone
//                  dV += P^T dO, dK += dS^T Q |1 -> what has 1 buffer
//   dQ = dS K, added to global memory                   line 15
// Who may overwrite what: |0 comes after every read of the previous step, so that the other buffers of Q, dO, lse may be
// filled, and P^T, dS^T written before |1. A single buffer is filled after a barrier that follows its last reader: dO
// after dV, Q and lse after dK. Copies are waited for (all of them) at |0, which also shows them to the other warps.
//
// Deterministic: a semaphore per dQ tile counts the CTAs that have added to it; CTA n waits for its rank among those that
// visit the tile. Rows [m0, m1) and keys [n0, n1) meet, that is rows_of_keys(n0, n1) has one of the rows, iff
// begin(m0) < n1 and n0 < end(m1 - 1), since both ends of a row's interval rise with the row. Hence the visitors are
// consecutive from begin(m0) / tile_n on, and a CTA's rank is its distance from that one. No cycle: a CTA waits for lower
// n only, CTAs start in that order, and all walk heads and tiles in the same order.
//
// Shared memory: K, V [tile_n][D], Q, dO [tile_m][D] per stage, dS^T (P^T) [tile_n][tile_m], lse and delta [tile_m] per Q.
// dK, dV leave through K's and V's. Per step: 10 tile_m tile_n D FLOP; (tile_m D (2 elements + 4)) bytes of global traffic.
// Shared-memory reads bound the kernel: a warp reads, in elements, 2 (keys + queries) D for the scores, 2 (keys + columns)
// tile_m for dV, dK (columns alone if warps_m = 1) and (rows + columns) tile_n for dQ.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <type_traits>

#include "../registry.h"
#include "../shared/convert.cuh"
#include "../tile/copy.cuh"
#include "backward_steps.cuh"

namespace fae::sm80 {

// Where a warp works: addresses in shared memory with the lane's offset. All are one base, few sums and constants, so that
// they share registers. Columns of dV and dK, rows and columns of dQ are dealt to the warps in turn in blocks of 16, so that
// the warps' chunks differ in bits which the swizzle keeps apart.
template <typename Tr>
struct WarpPlace {
  using Mma = typename Tr::Mma;
  using Storage = typename Tr::SharedStorage;
  using Rows = tile::Swizzle<Tr::kPitch>;
  using ScoreRows = tile::Swizzle<Tr::kScorePitch>;
  static constexpr int kChunks = Tr::kBytes;  // of 16 bytes, in 16 elements

  uint32_t base;
  int lane;
  int key, query;           // first of the warp's block of the scores
  int column;               // block of 16 of dV and dK
  int dq_row, dq_column;    // blocks of 16 of dQ
  uint32_t keys;            // K; V is kValues further
  uint32_t queries;         // of Q's first buffer, as a B operand of the scores
  uint32_t columns;         // of Q's first buffer, as a B operand of dK
  uint32_t scores;          // dS^T as the A operand of dK; P^T is kP further
  uint32_t stored_scores;   // dS^T as accumulators
  uint32_t dq_ds, dq_keys;  // dS^T and K as the operands of dQ
  static constexpr uint32_t kValues = offsetof(Storage, v) - offsetof(Storage, k);
  static constexpr uint32_t kP = sizeof(Storage::scores) - sizeof(Storage::scores[0]);

  FAE_DEVICE WarpPlace(uint32_t base, int warp, int lane) : base(base), lane(lane) {
    key = warp / Tr::kWarpsM * Tr::kKeys;
    query = warp % Tr::kWarpsM * Tr::kQueries;
    column = warp % Tr::kWarpsM;
    dq_row = warp / Tr::kDqWarpsD;
    dq_column = warp % Tr::kDqWarpsD;
    const uint32_t sK = base + offsetof(Storage, k), sQ = base + offsetof(Storage, q),
                   sDs = base + offsetof(Storage, scores);
    keys = sK + key * Tr::kPitch + Mma::template lane_a<Tr::kPitch>(lane);
    queries = sQ + query * Tr::kPitch + Mma::template lane_b<Tr::kPitch>(lane);
    columns = sQ + Rows::chunk(Mma::template lane_b_tokens<Tr::kPitch>(lane), column * kChunks);
    scores = sDs + key * Tr::kScorePitch + Mma::template lane_a_tokens<Tr::kScorePitch>(lane);
    stored_scores = sDs + key * Tr::kScorePitch +
                    ScoreRows::chunk(Mma::template lane_pair<Tr::kScorePitch>(lane), query * Tr::kBytes / 16);
    dq_ds = sDs + ScoreRows::chunk(Mma::template lane_a_tokens_trans<Tr::kScorePitch>(lane), dq_row * kChunks);
    dq_keys = sK + Rows::chunk(Mma::template lane_b_tokens<Tr::kPitch>(lane), dq_column * kChunks);
  }
  // From Q's first buffer to a stage of Q, of dO.
  FAE_DEVICE static uint32_t q_stage(int stage) { return stage * static_cast<uint32_t>(sizeof(Storage::q[0])); }
  FAE_DEVICE static uint32_t do_stage(int stage) {
    return static_cast<uint32_t>(offsetof(Storage, dout) - offsetof(Storage, q)) +
           stage * static_cast<uint32_t>(sizeof(Storage::dout[0]));
  }
};

// The copies of a CTA to shared memory.
template <typename T, typename Tr>
struct TileLoader {
  using Storage = typename Tr::SharedStorage;
  const BackwardParams& p;
  const BackwardLaunch& launch;
  uint32_t base;
  int b, thread;
  SeqInfo seq;

  template <int kRows>
  FAE_DEVICE void rows(uint32_t target, const TensorRef& t, int h, int columns, bool vector, int first, int end) const {
    const tile::GlobalRows<const T> g{t.row<const T>(b, h, 0), t.stride_s, columns, vector};
    tile::load_rows<kRows, Tr::kD, Tr::kThreads, T>(target, g, first, end, thread);
  }
  FAE_DEVICE void keys_and_values(int h_kv, int n0) const {
    const Sizes& z = p.fwd.sizes;
    rows<Tr::kN>(base + offsetof(Storage, k), p.fwd.k, h_kv, z.head_dim, launch.k_vector, n0, seq.seqlen_k);
    rows<Tr::kN>(base + offsetof(Storage, v), p.fwd.v, h_kv, z.head_dim_v, launch.v_vector, n0, seq.seqlen_k);
  }
  // Q with its lse and delta.
  FAE_DEVICE void q(int h, int m, int stage) const {
    rows<Tr::kM>(base + static_cast<uint32_t>(offsetof(Storage, q) + stage * sizeof(Storage::q[0])), p.fwd.q, h,
                 p.fwd.sizes.head_dim, launch.q_vector, m * Tr::kM, seq.seqlen_q);
    const uint32_t stats = base + static_cast<uint32_t>(offsetof(Storage, stats) + stage * sizeof(Storage::stats[0]));
    if (thread < Tr::kStatChunks)
      ptx::cp_async_16(stats + thread * 16, launch.stats + int64_t{tile_of(h, m)} * (2 * Tr::kM) + thread * 4, true);
  }
  FAE_DEVICE void dout(int h, int m, int stage) const {
    rows<Tr::kM>(base + static_cast<uint32_t>(offsetof(Storage, dout) + stage * sizeof(Storage::dout[0])), p.dout, h,
                 p.fwd.sizes.head_dim_v, launch.do_vector, m * Tr::kM, seq.seqlen_q);
  }
  // The launcher sees to it that this fits 31 bits.
  FAE_DEVICE int tile_of(int h, int m) const { return (b * p.fwd.sizes.heads + h) * launch.m_tiles + m; }
};

// A query tile of a head. The walk takes all tiles of a head, then the next head.
struct Walk {
  int h, m;
};

// One step up to dK: `at` is here, its Q in stage_q and dO in stage_do; `next` is loaded where buffers come free.
template <typename T, typename Tr>
FAE_DEVICE void key_gradients(typename Tr::KeySums& dk, typename Tr::KeySums& dv, const WarpPlace<Tr>& place,
                              const TileLoader<T, Tr>& loader, const typename Tr::SharedStorage& shared,
                              const IntervalMask& mask, int n0, Walk at, Walk next, bool has_next, int stage_q,
                              int stage_do) {
  constexpr BackwardTile kTile = Tr::kTile;
  constexpr bool kEarlyDo = !Tr::kPInRegisters && kTile.stages_q == 2 && kTile.stages_do == 1;
  const BackwardLaunch& launch = loader.launch;
  const bool exact = launch.fp32_exact;
  const uint32_t q = place.q_stage(stage_q), dout = place.do_stage(stage_do);

  typename Tr::Scores s = {}, dp;
  add_scores<Tr>(s, place.keys, place.queries + q, exact);
  const float* stats = &shared.stats[stage_q][0][place.query + place.lane % 4 * 2];
  probabilities<Tr>(s, stats, launch.scale_log2, mask, n0 + place.key, at.m * Tr::kM + place.query, place.lane);
  typename Tr::Fragments own;
  if constexpr (Tr::kPInRegisters) {
    pack_scores<Tr>(own, s);
    add_key_sums<Tr>(dv, own, 0, place.columns + dout, exact);
  }
  start_from_minus_delta<Tr>(dp, stats + Tr::kM);
  add_scores<Tr>(dp, place.keys + place.kValues, place.queries + dout, exact);
#pragma unroll
  for (int kt = 0; kt < Tr::kKeyTiles; ++kt)
#pragma unroll
    for (int qt = 0; qt < Tr::kQueryTiles; ++qt)
#pragma unroll
      for (int e = 0; e < 4; ++e) dp[kt][qt][e] *= s[kt][qt][e];  // dS^T
  if constexpr (!Tr::kPInRegisters) store_scores<Tr>(place.stored_scores + place.kP, s);
  store_scores<Tr>(place.stored_scores, dp);
  if constexpr (Tr::kPInRegisters) {
    pack_scores<Tr>(own, dp);
    add_key_sums<Tr>(dk, own, 0, place.columns + q, exact);
    __syncthreads();  // |1
  } else {
    __syncthreads();  // |1
    add_key_sums<Tr>(dv, own, place.scores + place.kP, place.columns + dout, exact);
    if constexpr (kEarlyDo) {
      __syncthreads();  // |2
      if (has_next) loader.dout(next.h, next.m, 0);
    }
    add_key_sums<Tr>(dk, own, place.scores, place.columns + q, exact);
    if constexpr (kTile.stages_q == 1) __syncthreads();  // |2
  }
  if (has_next) {
    if constexpr (kTile.stages_q == 1) loader.q(next.h, next.m, 0);
    if constexpr (kTile.stages_do == 1 && !kEarlyDo) loader.dout(next.h, next.m, 0);
  }
}

// f(0), f(1), ... with the number as a type.
template <int kPasses, typename F>
FAE_DEVICE void for_each_pass(F f) {
  if constexpr (kPasses > 1) for_each_pass<kPasses - 1>(f);
  f(std::integral_constant<int, kPasses - 1>{});
}

// dQ of this step and its addition to the accumulator (line 15).
template <typename Tr>
FAE_DEVICE void add_dq(const BackwardLaunch& launch, const WarpPlace<Tr>& place, int tile, int rank, int thread) {
  constexpr int kTileColumns = Tr::kD / 8, kFragments = Tr::kM / 16 * kTileColumns;
  constexpr int kColumnTiles = Tr::kDqColumnTiles / Tr::kDqPasses;
  int* const semaphore = launch.semaphores == nullptr ? nullptr : launch.semaphores + tile;
  const int64_t first = int64_t{tile} * kFragments + (place.dq_row * kTileColumns + place.dq_column * 2);
  float* const target = launch.dq + first * cuda::kFragmentFloats;
  const auto pass = [&](auto first_tile) {
    constexpr int kFirstTile = decltype(first_tile)::value;
    float dq[Tr::kDqRowTiles][kColumnTiles][4];
    dq_block<Tr, kFirstTile>(dq, place.dq_ds, place.dq_keys, launch.fp32_exact);
    if (kFirstTile == 0 && semaphore != nullptr) {
      if (thread == 0)
        while (ptx::ld_acquire(semaphore) != rank) {
        }
      __syncthreads();
    }
#pragma unroll
    for (int rt = 0; rt < Tr::kDqRowTiles; ++rt)
#pragma unroll
      for (int ct = 0; ct < kColumnTiles; ++ct)
        cuda::add_fragment(
            target + (rt * Tr::kDqWarpsM * kTileColumns + (kFirstTile + ct) / 2 * 2 * Tr::kDqWarpsD + ct % 2) *
                         cuda::kFragmentFloats,
            dq[rt][ct], place.lane);
  };
  static_assert(kColumnTiles % 2 == 0);
  for_each_pass<Tr::kDqPasses>(
      [&](auto number) { pass(std::integral_constant<int, decltype(number)::value * kColumnTiles>{}); });
  if (semaphore != nullptr) {
    __threadfence();
    __syncthreads();
    if (thread == 0) ptx::red_release(semaphore, 1);
  }
}

// dK and dV through K's and V's shared memory, so that global stores are 16 bytes wide.
template <typename T, typename Tr>
FAE_DEVICE void write_key_gradients(const TileLoader<T, Tr>& at, const WarpPlace<Tr>& place, typename Tr::KeySums& dk,
                                    typename Tr::KeySums& dv, int h_kv, int n0) {
  using Storage = typename Tr::SharedStorage;
  const BackwardParams& p = at.p;
  const uint32_t sDk = place.base + offsetof(Storage, k), sDv = place.base + offsetof(Storage, v);
  const uint32_t offset =
      place.key * Tr::kPitch + tile::Swizzle<Tr::kPitch>::chunk(Tr::Mma::template lane_pair<Tr::kPitch>(place.lane),
                                                                place.column * WarpPlace<Tr>::kChunks);
  __syncthreads();  // K is no longer read
  stage_key_sums<Tr>(sDk + offset, dk, at.launch.scale);
  stage_key_sums<Tr>(sDv + offset, dv, 1.0f);
  __syncthreads();
  const tile::GlobalRows<T> gDk{p.dk.row<T>(at.b, h_kv, 0), p.dk.stride_s, p.fwd.sizes.head_dim, at.launch.dk_vector};
  const tile::GlobalRows<T> gDv{p.dv.row<T>(at.b, h_kv, 0), p.dv.stride_s, p.fwd.sizes.head_dim_v, at.launch.dv_vector};
  tile::store_rows<Tr::kN, Tr::kD, Tr::kPitch, Tr::kThreads, T>(gDk, sDk, 0, n0, at.seq.seqlen_k, at.thread);
  tile::store_rows<Tr::kN, Tr::kD, Tr::kPitch, Tr::kThreads, T>(gDv, sDv, 0, n0, at.seq.seqlen_k, at.thread);
}

template <typename T, int kRow>
__global__ void __launch_bounds__(kBackwardTiles[kRow].threads(), kBackwardTiles[kRow].ctas_per_sm)
    backward_v2_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ BackwardLaunch launch) {
  using Tr = BackwardTraits<T, kRow>;
  constexpr BackwardTile kTile = Tr::kTile;
  extern __shared__ __align__(1024) char shared_bytes[];
  const auto& shared = *reinterpret_cast<const typename Tr::SharedStorage*>(shared_bytes);
  // The remainder tells the compiler that it is not negative. The warp's number from lane 0, so that branches on it are seen
  // to be uniform.
  const int thread = threadIdx.x % Tr::kThreads, warp = __shfl_sync(0xffffffffu, thread / 32, 0);

  // Key tiles of a head run side by side and share its Q and dO in the L2; the first keys first, which under a causal mask
  // are seen by the most rows, and which deterministic sums wait for.
  const Sizes& sizes = p.fwd.sizes;
  const int block = static_cast<int>(blockIdx.x), bh = block / launch.n_tiles, b = bh / sizes.heads_kv;
  const int n = block % launch.n_tiles, n0 = n * Tr::kN, h_kv = bh % sizes.heads_kv;
  const int h_begin = h_kv * sizes.heads_per_kv(), h_end = h_begin + sizes.heads_per_kv();
  const SeqInfo seq = p.fwd.seq(b);
  if (n0 >= seq.seqlen_k) return;
  const IntervalMask mask = p.fwd.mask(b);
  const Range rows = mask.rows_of_keys(n0, min(n0 + Tr::kN, seq.seqlen_k));
  const int m_begin = rows.begin / Tr::kM, m_end = rows.empty() ? m_begin : (rows.end + Tr::kM - 1) / Tr::kM;

  const WarpPlace<Tr> place(ptx::shared_address(shared_bytes), warp, thread % 32);
  const TileLoader<T, Tr> loader{p, launch, place.base, b, thread, seq};
  typename Tr::KeySums dk = {}, dv = {};
  Walk at = {h_end, m_begin};
  if (m_begin < m_end) {
    at.h = h_begin;
    loader.keys_and_values(h_kv, n0);
    loader.q(at.h, at.m, 0);
    loader.dout(at.h, at.m, 0);
  }
  for (int step = 0; at.h < h_end; ++step) {
    const int stage_q = kTile.stages_q == 2 ? step % 2 : 0, stage_do = kTile.stages_do == 2 ? step % 2 : 0;
    const Walk next = at.m + 1 < m_end ? Walk{at.h, at.m + 1} : Walk{at.h + 1, m_begin};
    const bool has_next = next.h < h_end;
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();  // |0
    if (has_next) {
      if constexpr (kTile.stages_q == 2) loader.q(next.h, next.m, stage_q ^ 1);
      if constexpr (kTile.stages_do == 2) loader.dout(next.h, next.m, stage_do ^ 1);
    }
    key_gradients<T, Tr>(dk, dv, place, loader, shared, mask, n0, at, next, has_next, stage_q, stage_do);
    add_dq<Tr>(launch, place, loader.tile_of(at.h, at.m), n - mask.begin(at.m * Tr::kM) / Tr::kN, thread);
    at = next;
  }
  write_key_gradients<T, Tr>(loader, place, dk, dv, h_kv, n0);
}

}  // namespace fae::sm80
