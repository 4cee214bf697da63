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

#include <type_traits>

#include "../ptx/barrier.cuh"
#include "../registry.h"
#include "../tile/copy.cuh"
#include "../tile/mask.cuh"
#include "config.h"

namespace fae::sm80 {

// What the launcher adds to the call.
struct ForwardLaunch {
  float scale_log2;  // |scale| log2(e), 1 for scale = 0: multiplies scores inside the exponent
  float sign;        // of the scale, 0 for 0: multiplies the scores themselves where it is not 1
  bool fp32_exact;
  bool q_vector, k_vector, v_vector, o_vector;  // tile::GlobalRows::vector
  int m_tiles;                                  // tiles of query rows
  int splits;                                   // of the keys; 1: the kernel writes out and lse itself
  int split_tiles;                              // key tiles of each
  float* partial_o;                             // [splits][batch][heads][seqlen_q][head_dim_v], each normalised
  float* partial_lse;                           // [splits][batch][heads][seqlen_q]
};

template <typename T, int kRow>
struct ForwardTraits {
  static constexpr ForwardTile kTile = kForwardTiles[kRow];
  static_assert(sizeof(T) == kTile.element_bytes);
  using Mma = tile::Mma<T>;
  static constexpr int kD = kTile.head_dim;
  static constexpr int kM = kTile.tile_m(), kN = kTile.tile_n;
  static constexpr int kC = kTile.column_warps;
  static constexpr int kMT = kTile.m_tiles;  // 16-row tiles of a warp
  static constexpr int kNT = kN / 8 / kC;    // 8-key tiles of a step, of a warp
  static constexpr int kDT = kD / 8 / kC;    // 8-column tiles of a warp's O
  static_assert(kNT % 2 == 0 && kDT % 2 == 0);
  static constexpr int kThreads = kTile.threads();
  static constexpr int kStages = kTile.stages;
  static constexpr int kPitch = kTile.pitch();
  static constexpr int kSteps = kD / Mma::kK;  // of a contraction over the head dimension
  static constexpr bool kQInRegisters = kTile.q_in_registers;
  static constexpr int kTokenSteps = kN / Mma::kK / kC;  // of a warp's own keys
  static constexpr int kPPitch = kTile.p_pitch();
  static constexpr int kElement = kTile.element_bytes;
  // Rows that are below this above the maximum in use, in powers of two, are not rescaled: P stays under 2^8.
  static constexpr float kRescaleAbove = 8.0f;

  struct Buffers {
    alignas(128) char q[kM * kPitch];
    alignas(128) char k[kStages][kN * kPitch];
    alignas(128) char v[kStages][kN * kPitch];
  };
  struct BuffersAndExchange : Buffers {
    alignas(128) char p[kM * kPPitch];
    float row_stats[kC][kM];  // maxima during the loop, sums after it
  };
  using SharedStorage = std::conditional_t<kC == 1, Buffers, BuffersAndExchange>;
  static_assert(sizeof(SharedStorage) == kTile.shared_bytes());
};

// The state of a warp's rows: O unnormalised, the maximum in use and the row sums of this thread's columns.
template <typename Tr>
struct ForwardState {
  float o[Tr::kMT][Tr::kDT][4];
  float m_i[Tr::kMT][2];  // base 2; rows lane / 4 and lane / 4 + 8
  float l_i[Tr::kMT][2];

  FAE_DEVICE void clear() {
#pragma unroll
    for (int mt = 0; mt < Tr::kMT; ++mt) {
#pragma unroll
      for (int dt = 0; dt < Tr::kDT; ++dt) o[mt][dt][0] = o[mt][dt][1] = o[mt][dt][2] = o[mt][dt][3] = 0.0f;
      m_i[mt][0] = m_i[mt][1] = softmax<float>::neg_inf();
      l_i[mt][0] = l_i[mt][1] = 0.0f;
    }
  }
};

// S = Q K^T for the warp's rows (Algorithm 1, line 8). q: the warp's rows; k: a key tile; both with the lane's offset.
template <typename Tr>
FAE_DEVICE void scores(float (&s)[Tr::kMT][Tr::kNT][4], typename Tr::Mma::A (&q_frag)[Tr::kMT][Tr::kSteps], uint32_t q,
                       uint32_t k, bool exact) {
  using Mma = typename Tr::Mma;
#pragma unroll
  for (int mt = 0; mt < Tr::kMT; ++mt)
#pragma unroll
    for (int nt = 0; nt < Tr::kNT; ++nt) s[mt][nt][0] = s[mt][nt][1] = s[mt][nt][2] = s[mt][nt][3] = 0.0f;
  tile::contract<Mma, Tr::kSteps>(
      s, exact,
      [&](typename Mma::A& a, int mt, int step) {
        if constexpr (Tr::kQInRegisters)
          a = q_frag[mt][step];
        else
          Mma::template load_a<Tr::kPitch>(a, q + mt * 16 * Tr::kPitch, step);
      },
      [&](typename Mma::B& b, int pair, int step) {
        Mma::template load_b<Tr::kPitch>(b, k + pair * 16 * Tr::kPitch, step);
      });
}

// Largest scores of the warp's rows in this step, over the warp's keys.
template <typename Tr>
FAE_DEVICE void row_maxima(const float (&s)[Tr::kMT][Tr::kNT][4], float (&top)[Tr::kMT][2]) {
#pragma unroll
  for (int mt = 0; mt < Tr::kMT; ++mt) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x = fmaxf(s[mt][0][2 * half], s[mt][0][2 * half + 1]);
#pragma unroll
      for (int nt = 1; nt < Tr::kNT; ++nt) x = fmaxf(x, fmaxf(s[mt][nt][2 * half], s[mt][nt][2 * half + 1]));
      x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
      top[mt][half] = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
    }
  }
}

// The maximum over the keys of all warps of the group.
template <typename Tr, typename Shared>
FAE_DEVICE void share_maxima(float (&top)[Tr::kMT][2], Shared& shared, int row_group, int column_warp, int lane) {
  const int row0 = row_group * 16 * Tr::kMT + lane / 4;
  if (lane % 4 == 0) {
#pragma unroll
    for (int mt = 0; mt < Tr::kMT; ++mt)
#pragma unroll
      for (int half = 0; half < 2; ++half) shared.row_stats[column_warp][row0 + 16 * mt + 8 * half] = top[mt][half];
  }
  ptx::bar_sync(1 + row_group, 32 * Tr::kC);
#pragma unroll
  for (int mt = 0; mt < Tr::kMT; ++mt)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int c = 0; c < Tr::kC; ++c)
        top[mt][half] = fmaxf(top[mt][half], shared.row_stats[c][row0 + 16 * mt + 8 * half]);
}

// Online softmax of one step: s becomes P, the state follows (Algorithm 1, line 9; the rescaling of O of line 10).
template <typename Tr>
FAE_DEVICE void online_softmax(float (&s)[Tr::kMT][Tr::kNT][4], const float (&top)[Tr::kMT][2], ForwardState<Tr>& state,
                               float scale_log2) {
  float alpha[Tr::kMT][2];
  bool any_rise = false;
#pragma unroll
  for (int mt = 0; mt < Tr::kMT; ++mt) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // The maximum in use moves only where it has to: O and l are exact with any, P is bounded by 2^kRescaleAbove.
      const float m_old = state.m_i[mt][half], m_top = top[mt][half] * scale_log2;
      const float m_new = m_top > m_old + Tr::kRescaleAbove ? m_top : m_old;
      alpha[mt][half] = m_new == m_old ? 1.0f : ptx::ex2_approx(m_old - m_new);
      any_rise |= m_new != m_old;
      state.m_i[mt][half] = m_new;
      const float base = softmax<float>::subtracted_max(m_new);
      float sum = 0.0f;
#pragma unroll
      for (int nt = 0; nt < Tr::kNT; ++nt) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[mt][nt][2 * half + e];
          x = ptx::ex2_approx(fmaf(x, scale_log2, -base));
          sum += x;
        }
      }
      state.l_i[mt][half] = fmaf(state.l_i[mt][half], alpha[mt][half], sum);
    }
  }
  if (__any_sync(0xffffffffu, any_rise)) {
#pragma unroll
    for (int mt = 0; mt < Tr::kMT; ++mt)
#pragma unroll
      for (int dt = 0; dt < Tr::kDT; ++dt)
#pragma unroll
        for (int e = 0; e < 4; ++e) state.o[mt][dt][e] *= alpha[mt][e / 2];
  }
}

// A warp's P to shared memory; `p` is the first of its rows and keys.
template <typename Tr>
FAE_DEVICE void store_p(const float (&s)[Tr::kMT][Tr::kNT][4], uint32_t group_p, int column_warp, int lane) {
  constexpr int kChunks = Tr::kN / Tr::kC * Tr::kElement / 16;  // of a warp's keys
  static_assert((kChunks & (kChunks - 1)) == 0, "the swizzle separates the warp's place from the tile's");
  const uint32_t at = tile::Swizzle<Tr::kPPitch>::chunk(group_p + Tr::Mma::template lane_pair<Tr::kPPitch>(lane),
                                                        column_warp * kChunks);
#pragma unroll
  for (int mt = 0; mt < Tr::kMT; ++mt)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int nt = 0; nt < Tr::kNT; ++nt)
        Tr::Mma::template store_pair<Tr::kPPitch>(at + (16 * mt + 8 * half) * Tr::kPPitch, nt, s[mt][nt][2 * half],
                                                  s[mt][nt][2 * half + 1]);
}

// O += P V (Algorithm 1, line 10). `p_of(a, mt, step)` gives fragments of P; v: a tile of values with the lane's offset.
template <typename Tr, int kSteps, typename PFragment>
FAE_DEVICE void accumulate(ForwardState<Tr>& state, PFragment p_of, uint32_t v, bool exact) {
  using Mma = typename Tr::Mma;
  tile::contract<Mma, kSteps>(state.o, exact, p_of, [&](typename Mma::B& b, int pair, int step) {
    Mma::template load_b_tokens<Tr::kPitch>(b, v + step * Mma::kK * Tr::kPitch, pair * Tr::kC);
  });
}

// Sums over the keys of all warps of the group, in the order of the warps.
template <typename Tr, typename Shared>
FAE_DEVICE void sum_over_group(float (&l)[Tr::kMT][2], Shared& shared, int row_group, int column_warp, int lane) {
  const int row0 = row_group * 16 * Tr::kMT + lane / 4;
  ptx::bar_sync(1 + row_group, 32 * Tr::kC);  // the maxima of the last step have been read
#pragma unroll
  for (int mt = 0; mt < Tr::kMT; ++mt)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (lane % 4 == 0) shared.row_stats[column_warp][row0 + 16 * mt + 8 * half] = l[mt][half];
  ptx::bar_sync(1 + row_group, 32 * Tr::kC);
#pragma unroll
  for (int mt = 0; mt < Tr::kMT; ++mt) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      l[mt][half] = 0.0f;
#pragma unroll
      for (int c = 0; c < Tr::kC; ++c) l[mt][half] += shared.row_stats[c][row0 + 16 * mt + 8 * half];
    }
  }
}

// O = diag(1 / l) O and lse (Algorithm 1, lines 12 to 14), in registers; l summed over the four lanes of a row and, with
// `group_sum`, over the warps of the group.
template <typename Tr, typename GroupSum>
FAE_DEVICE void normalise(ForwardState<Tr>& state, float (&lse)[Tr::kMT][2], GroupSum group_sum) {
#pragma unroll
  for (int mt = 0; mt < Tr::kMT; ++mt) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& l = state.l_i[mt][half];
      l += __shfl_xor_sync(0xffffffffu, l, 1);
      l += __shfl_xor_sync(0xffffffffu, l, 2);
    }
  }
  group_sum(state.l_i);
#pragma unroll
  for (int mt = 0; mt < Tr::kMT; ++mt) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float l = state.l_i[mt][half];
      lse[mt][half] = softmax<float>::lse(state.m_i[mt][half], l);
      const float inverse = softmax<float>::inverse_sum(l);
#pragma unroll
      for (int dt = 0; dt < Tr::kDT; ++dt) {
        state.o[mt][dt][2 * half] *= inverse;
        state.o[mt][dt][2 * half + 1] *= inverse;
      }
    }
  }
}

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
