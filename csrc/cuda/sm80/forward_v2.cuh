// Version-2 forward (FlashAttention-2, Algorithm 1) by mma.sync: one CTA per (batch, head, tile of query rows[, split of
// the keys]), one pass over the keys, O and its statistics in registers, normalised once.
//
//   Warp w owns rows [16 m_tiles w, 16 m_tiles (w + 1)) of the tile: its S, P, O, m_i, l_i are nobody else's, so warps
//   meet only where K and V change hands. With column_warps C > 1 (large D) a group of C warps owns the rows: warp c of it
//   takes 1/C of the keys for S and, in blocks of 16 in turn, 1/C of the columns for O. The group shares row maxima and P through shared memory.
//
//   stages 1   wait K(j) | barrier | start V(j)   | S = Q K(j)^T, softmax | wait V(j) | barrier | start K(j+1) | O += P V(j)
//              (C > 1: row maxima | barrier of the group | softmax, P to shared memory; the next barrier publishes P)
//   stages 2   wait K(j), V(j) | barrier | start K(j+1), V(j+1) | S = Q K(j)^T, softmax, O += P V(j)
//
//   A barrier says two things: the copies of all threads have arrived (each waited for its own before), and every warp is
//   done with the buffer that is about to be overwritten, which it read before the barrier.
//   With two CTAs on an SM one CTA's softmax runs beside the other's products.
//
// Shared memory: Q [tile_m][D], then stages x K [tile_n][D], stages x V [tile_n][D], laid out by Swizzle;
// with C > 1 also P [tile_m][tile_n] and C x tile_m row statistics. Q's rows hold O at the end, on the way to 16-byte stores.
// Per step and warp (m = 16 m_tiles): 4 m tile_n D FLOP; shared-memory reads of 2 tile_n D elements, and m D more where Q is
// not in registers. That traffic is what bounds the kernel (docs/kernels/sm80.md).
#pragma once

#include <cuda_runtime.h>

#include "../ptx/control.cuh"
#include "../registry.h"
#include "../tile/copy.cuh"
#include "../tile/mask.cuh"
#include "forward_steps.cuh"

namespace fae::sm80 {

// Where a warp's results belong.
struct ForwardPlace {
  int64_t b;
  int h;
  int row0;  // first query row of the group
  int row_group, column_warp;
  int seqlen_q;
};

// First of the columns of a warp's 8-column tile dt: blocks of 16 are dealt to the warps of a group in turn.
template <typename Tr>
FAE_DEVICE int column_of(int dt, int column_warp) {
  return (dt / 2 * Tr::kC + column_warp) * 16 + dt % 2 * 8;
}

// out through the group's rows of Q in shared memory, so that global stores are 16 bytes wide; lse by one lane a row. Every
// warp of the group has read its Q.
template <typename T, typename Tr>
FAE_DEVICE void write_output(const AttentionParams& p, const ForwardLaunch& launch, const ForwardState<Tr>& state,
                             const float (&lse)[Tr::kMT][2], const ForwardPlace& at, uint32_t staging, int lane) {
  const uint32_t target = tile::Swizzle<Tr::kPitch>::chunk(staging + Tr::Mma::template lane_pair<Tr::kPitch>(lane),
                                                           at.column_warp * Tr::kElement);
#pragma unroll
  for (int mt = 0; mt < Tr::kMT; ++mt) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = 16 * mt + lane / 4 + 8 * half;
#pragma unroll
      for (int dt = 0; dt < Tr::kDT; ++dt)
        Tr::Mma::template store_pair<Tr::kPitch>(target + (16 * mt + 8 * half) * Tr::kPitch, column_of<Tr>(dt, 0) / 8,
                                                 state.o[mt][dt][2 * half], state.o[mt][dt][2 * half + 1]);
      if (lane % 4 == 0 && at.column_warp == 0 && at.row0 + r < at.seqlen_q)
        *p.lse.row<float>(at.b, at.h, at.row0 + r) = lse[mt][half];
    }
  }
  if constexpr (Tr::kC > 1)
    ptx::bar_sync(1 + at.row_group, 32 * Tr::kC);
  else
    __syncwarp();
  constexpr int kShare = 16 * Tr::kMT / Tr::kC;  // rows that a warp of the group writes
  const tile::GlobalRows<T> gO{p.o.row<T>(at.b, at.h, 0), p.o.stride_s, p.sizes.head_dim_v, launch.o_vector};
  tile::store_rows<kShare, Tr::kD, Tr::kPitch, 32, T>(gO, staging, at.column_warp * kShare, at.row0, at.seqlen_q, lane);
}

// The same for one split of the keys: fp32, normalised within the split. combine_splits() merges them.
template <typename Tr>
FAE_DEVICE void write_partial(const AttentionParams& p, const ForwardLaunch& launch, const ForwardState<Tr>& state,
                              const float (&lse)[Tr::kMT][2], const ForwardPlace& at, int split, int lane) {
  const int64_t first = ((split * p.sizes.batch + at.b) * p.sizes.heads + at.h) * p.sizes.seqlen_q;
#pragma unroll
  for (int mt = 0; mt < Tr::kMT; ++mt) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = at.row0 + 16 * mt + lane / 4 + 8 * half;
      if (r >= at.seqlen_q) continue;
      if (lane % 4 == 0 && at.column_warp == 0) launch.partial_lse[first + r] = lse[mt][half];
      float* target = launch.partial_o + (first + r) * p.sizes.head_dim_v;
#pragma unroll
      for (int dt = 0; dt < Tr::kDT; ++dt) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = column_of<Tr>(dt, at.column_warp) + 2 * (lane % 4) + e;
          if (column < p.sizes.head_dim_v) target[column] = state.o[mt][dt][2 * half + e];
        }
      }
    }
  }
}

template <typename T, int kRow>
__global__ void __launch_bounds__(kForwardTiles[kRow].threads(), kForwardTiles[kRow].ctas_per_sm)
    forward_v2_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ ForwardLaunch launch) {
  using Tr = ForwardTraits<T, kRow>;
  using Mma = typename Tr::Mma;
  ptx::begin_dependent_grid();
  extern __shared__ __align__(1024) char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Tr::SharedStorage*>(shared_bytes);
  // The warp's number from lane 0, so that the compiler sees branches on it as uniform.
  const int thread = threadIdx.x, warp = __shfl_sync(0xffffffffu, thread / 32, 0), lane = thread % 32;
  const int row_group = warp / Tr::kC, column_warp = warp % Tr::kC;

  // Tiles of a head run side by side and share its K and V in the L2; the last rows first, which under a causal mask see
  // the most keys.
  const int per_head = launch.m_tiles * launch.splits;
  const int64_t bh = blockIdx.x / per_head;
  const int in_head = blockIdx.x % per_head, split = in_head % launch.splits;
  const int m0 = (launch.m_tiles - 1 - in_head / launch.splits) * Tr::kM;
  const int64_t b = bh / p.sizes.heads;
  const int h = static_cast<int>(bh % p.sizes.heads), h_kv = p.sizes.kv_head(h);
  const SeqInfo seq = p.seq(b);
  if (m0 >= seq.seqlen_q) return;
  const IntervalMask mask = p.mask(b);
  const int m_end = min(m0 + Tr::kM, seq.seqlen_q);
  const int warp_m0 = m0 + row_group * 16 * Tr::kMT;

  const tile::GlobalRows<const T> gQ{p.q.row<const T>(b, h, 0), p.q.stride_s, p.sizes.head_dim, launch.q_vector};
  const tile::GlobalRows<const T> gK{p.k.row<const T>(b, h_kv, 0), p.k.stride_s, p.sizes.head_dim, launch.k_vector};
  const tile::GlobalRows<const T> gV{p.v.row<const T>(b, h_kv, 0), p.v.stride_s, p.sizes.head_dim_v, launch.v_vector};
  const uint32_t sQ = ptx::shared_address(shared.q);
  const auto sK = [&](int stage) { return ptx::shared_address(shared.k[stage]); };
  const auto sV = [&](int stage) { return ptx::shared_address(shared.v[stage]); };
  const auto load_k = [&](int j, int stage) {
    tile::load_rows<Tr::kN, Tr::kD, Tr::kThreads, T>(sK(stage), gK, j * Tr::kN, seq.seqlen_k, thread);
  };
  const auto load_v = [&](int j, int stage) {
    tile::load_rows<Tr::kN, Tr::kD, Tr::kThreads, T>(sV(stage), gV, j * Tr::kN, seq.seqlen_k, thread);
  };

  // Key tiles [j, j_end) of this CTA.
  const Range keys = mask.keys_of_rows(m0, m_end);
  int j = keys.begin / Tr::kN, j_end = keys.empty() ? j : (keys.end + Tr::kN - 1) / Tr::kN;
  if (launch.splits > 1) {
    j = max(j, split * launch.split_tiles);
    j_end = min(j_end, (split + 1) * launch.split_tiles);
  }
  // Of these, the ones that this warp's rows see, and among them the ones that need no mask.
  const Range warp_keys = mask.keys_of_rows(warp_m0, max(warp_m0 + 1, min(warp_m0 + 16 * Tr::kMT, m_end)));
  const Range seen = {warp_keys.begin / Tr::kN, warp_keys.empty() ? 0 : (warp_keys.end + Tr::kN - 1) / Tr::kN};
  const Range full = {(mask.begin(warp_m0 + 16 * Tr::kMT - 1) + Tr::kN - 1) / Tr::kN, mask.end(warp_m0) / Tr::kN};

  ForwardState<Tr> state;
  state.clear();
  constexpr int kOwnKeys = Tr::kN / Tr::kC;
  const uint32_t group_q = sQ + row_group * 16 * Tr::kMT * Tr::kPitch;
  const uint32_t lane_q = group_q + Mma::template lane_a<Tr::kPitch>(lane);
  const uint32_t lane_k = column_warp * kOwnKeys * Tr::kPitch + Mma::template lane_b<Tr::kPitch>(lane);
  const uint32_t lane_v =
      tile::Swizzle<Tr::kPitch>::chunk(Mma::template lane_b_tokens<Tr::kPitch>(lane), column_warp * Tr::kElement);
  uint32_t group_p = 0;
  if constexpr (Tr::kC > 1) group_p = ptx::shared_address(shared.p) + row_group * 16 * Tr::kMT * Tr::kPPitch;

  if (j < j_end) {
    tile::load_rows<Tr::kM, Tr::kD, Tr::kThreads, T>(sQ, gQ, m0, seq.seqlen_q, thread);
    load_k(j, 0);
    ptx::cp_async_commit();
    load_v(j, 0);
    ptx::cp_async_commit();
    typename Mma::A q_frag[Tr::kMT][Tr::kSteps];
    if constexpr (Tr::kQInRegisters) {
      ptx::cp_async_wait<1>();
      __syncthreads();
#pragma unroll
      for (int mt = 0; mt < Tr::kMT; ++mt)
#pragma unroll
        for (int step = 0; step < Tr::kSteps; ++step)
          Mma::template load_a<Tr::kPitch>(q_frag[mt][step], lane_q + mt * 16 * Tr::kPitch, step);
    }
    for (int stage = 0, first = j; j < j_end; ++j) {
      // Over a tile that none of its rows sees a warp only keeps its place at the barriers.
      const bool works = seen.begin <= j && j < seen.end;
      typename Mma::Packed packed[Tr::kMT][Tr::kTokenSteps];
      if constexpr (Tr::kStages == 2) {
        ptx::cp_async_wait<0>();
        __syncthreads();
        if (j + 1 < j_end) {
          load_k(j + 1, stage ^ 1);
          load_v(j + 1, stage ^ 1);
        }
        ptx::cp_async_commit();
      } else if (j == first) {  // V(j) has been started already
        ptx::cp_async_wait<1>();
        __syncthreads();
      } else {
        ptx::cp_async_wait<0>();
        __syncthreads();
        load_v(j, 0);
        ptx::cp_async_commit();
      }
      if (works) {
        float s[Tr::kMT][Tr::kNT][4];
        scores<Tr>(s, q_frag, lane_q, sK(stage) + lane_k, launch.fp32_exact);
        if (launch.sign != 1.0f) {
#pragma unroll
          for (int mt = 0; mt < Tr::kMT; ++mt)
#pragma unroll
            for (int nt = 0; nt < Tr::kNT; ++nt)
#pragma unroll
              for (int e = 0; e < 4; ++e) s[mt][nt][e] *= launch.sign;
        }
        if (j < full.begin || j >= full.end) {
#pragma unroll
          for (int mt = 0; mt < Tr::kMT; ++mt)
            tile::mask_scores<Tr::kNT>(s[mt], p.mask(b), warp_m0 + 16 * mt, j * Tr::kN + column_warp * kOwnKeys, lane);
        }
        float top[Tr::kMT][2];
        row_maxima<Tr>(s, top);
        if constexpr (Tr::kC > 1) share_maxima<Tr>(top, shared, row_group, column_warp, lane);
        online_softmax<Tr>(s, top, state, launch.scale_log2);
        if constexpr (Tr::kC > 1) {
          store_p<Tr>(s, group_p, column_warp, lane);
          if constexpr (Tr::kStages == 2) ptx::bar_sync(1 + row_group, 32 * Tr::kC);
        } else {
#pragma unroll
          for (int mt = 0; mt < Tr::kMT; ++mt)
#pragma unroll
            for (int step = 0; step < Tr::kTokenSteps; ++step)
              Mma::from_accumulators(packed[mt][step], &s[mt][step * Mma::kTilesPerStep]);
        }
      }
      if constexpr (Tr::kStages == 1) {
        ptx::cp_async_wait<0>();
        __syncthreads();
        if (j + 1 < j_end) load_k(j + 1, 0);
        ptx::cp_async_commit();
      }
      if (works) {
        if constexpr (Tr::kC > 1) {
          const uint32_t lane_p = group_p + Mma::template lane_a_tokens<Tr::kPPitch>(lane);
          const auto p_of = [&](typename Mma::A& a, int mt, int step) {
            Mma::template load_a_tokens<Tr::kPPitch>(a, lane_p + 16 * mt * Tr::kPPitch, step);
          };
          accumulate<Tr, Tr::kTokenSteps * Tr::kC>(state, p_of, sV(stage) + lane_v, launch.fp32_exact);
        } else {
          const auto p_of = [&](typename Mma::A& a, int mt, int step) { Mma::unpack(a, packed[mt][step]); };
          accumulate<Tr, Tr::kTokenSteps>(state, p_of, sV(stage) + lane_v, launch.fp32_exact);
        }
      }
      if constexpr (Tr::kStages == 2) stage ^= 1;
    }
  }

  float lse[Tr::kMT][2];
  normalise<Tr>(state, lse, [&](float(&l)[Tr::kMT][2]) {
    if constexpr (Tr::kC > 1) sum_over_group<Tr>(l, shared, row_group, column_warp, lane);
  });
  const ForwardPlace at = {b, h, warp_m0, row_group, column_warp, seq.seqlen_q};
  if (launch.splits > 1) {
    write_partial<Tr>(p, launch, state, lse, at, split, lane);
  } else {
    __syncwarp();  // every lane has read its Q; with C > 1 the group's barrier of the sums has said so
    write_output<T, Tr>(p, launch, state, lse, at, group_q, lane);
  }
}

}  // namespace fae::sm80
