// What the version-2 forward does between two barriers, a warp at a time: scores, online softmax, O += P V, and the sums at
// the end. The schedule that strings them together is in forward_v2.cuh.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../../core/softmax.h"
#include "../ptx/barrier.cuh"
#include "../tile/mma.cuh"
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

}  // namespace fae::sm80
