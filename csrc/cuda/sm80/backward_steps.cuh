// What the version-2 backward does between two barriers, a warp at a time: the five products, P and dS, and the way of
// accumulators to shared memory. The schedule that strings them together is in backward_v2.cuh.
#pragma once

#include <cuda_runtime.h>

#include "../../core/mask.h"
#include "../../core/softmax.h"
#include "../tile/mma.cuh"
#include "config.h"

namespace fae::sm80 {

// What the launcher adds to the call.
struct BackwardLaunch {
  float scale_log2;  // scale * log2(e), of any sign: no maximum is taken here
  float scale;
  bool fp32_exact;
  bool q_vector, k_vector, v_vector, do_vector, dk_vector, dv_vector;  // tile::GlobalRows::vector
  int m_tiles, n_tiles;
  const float* stats;  // [batch][heads][m_tiles][lse2, delta][tile_m]
  float* dq;           // [batch][heads][m_tiles][tile_m * head_dim of the row], shared/convert.cuh
  int* semaphores;     // [batch][heads][m_tiles]; nullptr: dQ is added to in any order
};

template <typename T, int kRow>
struct BackwardTraits {
  static constexpr BackwardTile kTile = kBackwardTiles[kRow];
  static_assert(sizeof(T) == kTile.element_bytes);
  using Mma = tile::Mma<T>;
  static constexpr int kBytes = kTile.element_bytes;
  static constexpr int kD = kTile.head_dim, kM = kTile.tile_m, kN = kTile.tile_n;
  static constexpr int kThreads = kTile.threads();
  static constexpr int kPitch = kTile.pitch(), kScorePitch = kTile.score_pitch();
  static constexpr bool kPInRegisters = kTile.warps_m == 1;
  // A warp's shares.
  static constexpr int kKeys = kN / kTile.warps_n, kQueries = kM / kTile.warps_m, kColumns = kD / kTile.warps_m;
  static constexpr int kWarpsM = kTile.warps_m;
  static constexpr int kDqWarpsM = kTile.dq_warps_m(), kDqWarpsD = kTile.dq_warps_d();
  static constexpr int kDqRows = kM / kDqWarpsM, kDqColumns = kD / kDqWarpsD;
  // The same in 16-row and 8-column tiles of accumulators.
  static constexpr int kKeyTiles = kKeys / 16, kQueryTiles = kQueries / 8, kColumnTiles = kColumns / 8;
  static constexpr int kDqRowTiles = kDqRows / 16, kDqColumnTiles = kDqColumns / 8;
  static constexpr int kDqPasses = kTile.dq_passes();
  // Steps of the contractions over the head dimension, queries and keys.
  static constexpr int kDimSteps = kD / Mma::kK, kQuerySteps = kM / Mma::kK, kKeySteps = kN / Mma::kK;
  static constexpr int kStatChunks = 2 * kM * static_cast<int>(sizeof(float)) / 16;
  static_assert(kStatChunks <= kThreads);

  struct SharedStorage {
    alignas(128) char k[kN * kPitch];
    alignas(128) char v[kN * kPitch];
    alignas(128) char q[kTile.stages_q][kM * kPitch];
    alignas(128) char dout[kTile.stages_do][kM * kPitch];
    alignas(128) char scores[kTile.score_buffers()][kN * kScorePitch];  // dS^T; P^T where warps exchange it
    alignas(16) float stats[kTile.stages_q][2][kM];                     // lse2, delta
  };
  static_assert(sizeof(SharedStorage) == kTile.shared_bytes());

  using Scores = float[kKeyTiles][kQueryTiles][4];
  using KeySums = float[kKeyTiles][kColumnTiles][4];
  using Fragments = typename Mma::Packed[kKeyTiles][kQuerySteps];
};

// s += keys rows^T over the head dimension: S^T from K, Q; dP^T from V, dO. Addresses with the lane's offset.
template <typename Tr>
FAE_DEVICE void add_scores(typename Tr::Scores& s, uint32_t keys, uint32_t rows, bool exact) {
  using Mma = typename Tr::Mma;
  tile::contract<Mma, Tr::kDimSteps>(
      s, exact,
      [&](typename Mma::A& a, int kt, int step) {
        Mma::template load_a<Tr::kPitch>(a, keys + kt * 16 * Tr::kPitch, step);
      },
      [&](typename Mma::B& b, int pair, int step) {
        Mma::template load_b<Tr::kPitch>(b, rows + pair * 16 * Tr::kPitch, step);
      });
}

// sums += A rows over the queries: dV from P^T, dO; dK from dS^T, Q. A is the warp's own fragments, or lies in shared
// memory, whose address then counts; `rows` at the warp's columns.
template <typename Tr>
FAE_DEVICE void add_key_sums(typename Tr::KeySums& sums, const typename Tr::Fragments& own, uint32_t scores,
                             uint32_t rows, bool exact) {
  using Mma = typename Tr::Mma;
  tile::contract<Mma, Tr::kQuerySteps>(
      sums, exact,
      [&](typename Mma::A& a, int kt, int step) {
        if constexpr (Tr::kPInRegisters)
          Mma::unpack(a, own[kt][step]);
        else
          Mma::template load_a_tokens<Tr::kScorePitch>(a, scores + kt * 16 * Tr::kScorePitch, step);
      },
      [&](typename Mma::B& b, int pair, int step) {
        Mma::template load_b_tokens<Tr::kPitch>(b, rows + step * Mma::kK * Tr::kPitch, pair * Tr::kWarpsM);
      });
}

// The warp's block of dQ = dS K / scale, kColumnTiles of its 8-column tiles from kFirstTile on. ds: dS^T at the warp's rows;
// k: K at its columns.
template <typename Tr, int kFirstTile, int kColumnTiles>
FAE_DEVICE void dq_block(float (&dq)[Tr::kDqRowTiles][kColumnTiles][4], uint32_t ds, uint32_t k, bool exact) {
  using Mma = typename Tr::Mma;
#pragma unroll
  for (int rt = 0; rt < Tr::kDqRowTiles; ++rt)
#pragma unroll
    for (int ct = 0; ct < kColumnTiles; ++ct) dq[rt][ct][0] = dq[rt][ct][1] = dq[rt][ct][2] = dq[rt][ct][3] = 0.0f;
  tile::contract<Mma, Tr::kKeySteps>(
      dq, exact,
      [&](typename Mma::A& a, int rt, int step) {
        Mma::template load_a_tokens_trans<Tr::kScorePitch>(a, ds + step * Mma::kK * Tr::kScorePitch,
                                                           rt * Tr::kDqWarpsM);
      },
      [&](typename Mma::B& b, int pair, int step) {
        Mma::template load_b_tokens<Tr::kPitch>(b, k + step * Mma::kK * Tr::kPitch,
                                                (kFirstTile / 2 + pair) * Tr::kDqWarpsD);
      });
}

// -inf where the row does not see the key, or there is no such key. In distances from key to row, which change with every
// step: bounds that did not would be hoisted out of the loop and hold registers there. Rows past the end have lse = +inf.
template <typename Tr>
FAE_DEVICE void mask_probabilities(typename Tr::Scores& s, const IntervalMask& mask, int first_key, int first_row,
                                   int lane) {
#pragma unroll
  for (int kt = 0; kt < Tr::kKeyTiles; ++kt) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int in_tile = 16 * kt + 8 * half + lane / 4;
      const int distance = first_key - first_row + in_tile - lane % 4 * 2;  // from the lane's first query
      const bool exists = first_key + in_tile < mask.seqlen_k;
#pragma unroll
      for (int qt = 0; qt < Tr::kQueryTiles; ++qt) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int d = distance - 8 * qt - e;
          if (!exists || d < mask.lo || d >= mask.hi) s[kt][qt][2 * half + e] = softmax<float>::neg_inf();
        }
      }
    }
  }
}

// s becomes P^T (Algorithm 2, line 11). lse2: of the lane's first query. Masked is the exponent, not the score, whose -inf
// would turn over with the sign of the scale.
template <typename Tr>
FAE_DEVICE void probabilities(typename Tr::Scores& s, const float* lse2, float scale_log2, const IntervalMask& mask,
                              int first_key, int first_row, int lane) {
#pragma unroll
  for (int qt = 0; qt < Tr::kQueryTiles; ++qt) {
    const float2 l = *reinterpret_cast<const float2*>(lse2 + 8 * qt);
#pragma unroll
    for (int kt = 0; kt < Tr::kKeyTiles; ++kt)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[kt][qt][e] = fmaf(s[kt][qt][e], scale_log2, e % 2 == 0 ? -l.x : -l.y);
  }
  // The rows of the block see all its keys iff the last row's interval has begun and the first row's has not ended.
  const int distance = first_key - first_row;
  if (first_key + Tr::kKeys > mask.seqlen_k || distance + Tr::kKeys > mask.hi ||
      distance < mask.lo + min(Tr::kQueries, mask.seqlen_q - first_row) - 1)
    mask_probabilities<Tr>(s, mask, first_key, first_row, lane);
#pragma unroll
  for (int kt = 0; kt < Tr::kKeyTiles; ++kt)
#pragma unroll
    for (int qt = 0; qt < Tr::kQueryTiles; ++qt)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[kt][qt][e] = ptx::ex2_approx(s[kt][qt][e]);
}

// What dP^T is added to: dS^T = P^T (dP^T - delta) is one multiplication then. delta: of the lane's first query.
template <typename Tr>
FAE_DEVICE void start_from_minus_delta(typename Tr::Scores& dp, const float* delta) {
#pragma unroll
  for (int qt = 0; qt < Tr::kQueryTiles; ++qt) {
    const float2 d = *reinterpret_cast<const float2*>(delta + 8 * qt);
#pragma unroll
    for (int kt = 0; kt < Tr::kKeyTiles; ++kt)
#pragma unroll
      for (int e = 0; e < 4; ++e) dp[kt][qt][e] = e % 2 == 0 ? -d.x : -d.y;
  }
}

template <typename Tr>
FAE_DEVICE void pack_scores(typename Tr::Fragments& own, const typename Tr::Scores& s) {
#pragma unroll
  for (int kt = 0; kt < Tr::kKeyTiles; ++kt)
#pragma unroll
    for (int step = 0; step < Tr::kQuerySteps; ++step)
      Tr::Mma::from_accumulators(own[kt][step], &s[kt][step * Tr::Mma::kTilesPerStep]);
}

// The warp's block of P^T or dS^T to [key][query] in shared memory; `target` at the lane's first pair.
template <typename Tr>
FAE_DEVICE void store_scores(uint32_t target, const typename Tr::Scores& s) {
#pragma unroll
  for (int kt = 0; kt < Tr::kKeyTiles; ++kt) {
#pragma unroll
    for (int qt = 0; qt < Tr::kQueryTiles; ++qt) {
      const uint32_t at = target + kt * 16 * Tr::kScorePitch;
      Tr::Mma::template store_pair<Tr::kScorePitch>(at, qt, s[kt][qt][0], s[kt][qt][1]);
      Tr::Mma::template store_pair<Tr::kScorePitch>(at + 8 * Tr::kScorePitch, qt, s[kt][qt][2], s[kt][qt][3]);
    }
  }
}

// dK or dV to shared memory, on the way to 16-byte stores; `target` at the lane's first pair.
template <typename Tr>
FAE_DEVICE void stage_key_sums(uint32_t target, const typename Tr::KeySums& sums, float scale) {
#pragma unroll
  for (int kt = 0; kt < Tr::kKeyTiles; ++kt) {
#pragma unroll
    for (int ct = 0; ct < Tr::kColumnTiles; ++ct) {
      const uint32_t at = target + kt * 16 * Tr::kPitch;
      const int tile = ct / 2 * 2 * Tr::kWarpsM + ct % 2;
      Tr::Mma::template store_pair<Tr::kPitch>(at, tile, sums[kt][ct][0] * scale, sums[kt][ct][1] * scale);
      Tr::Mma::template store_pair<Tr::kPitch>(at + 8 * Tr::kPitch, tile, sums[kt][ct][2] * scale,
                                               sums[kt][ct][3] * scale);
    }
  }
}

}  // namespace fae::sm80
