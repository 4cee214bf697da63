// Version-1 forward (FlashAttention, Algorithm 1) by mma.sync: keys in the outer loop. The teaching kernel: O and its
// statistics live in global memory and are read, rescaled, normalised and written at every step, as the paper has it.
//
//   one CTA per (batch, head, group of query rows); a group runs Algorithm 1 on its own
//     line 2     O = 0, l = 0, m = -inf in global memory
//     line 5     for each block j of tile_n keys
//     line 6       K_j, V_j to shared memory                       by all warps; a barrier before and after
//     line 7       for each block i of query rows                  a warp takes 16 rows at a time and meets no other warp
//     line 8         Q_i to shared memory, the next one on its way while this one is used; O_i, l_i, m_i from global memory
//     line 9         S = scale Q_i K_j^T
//     line 10        m~ = rowmax S, P~ = exp(S - m~), l~ = rowsum P~
//     line 11        m_new = max(m_i, m~), l_new = e^(m_i - m_new) l_i + e^(m~ - m_new) l~
//     line 12        O_i <- diag(l_new)^-1 (diag(l_i) e^(m_i - m_new) O_i + e^(m~ - m_new) P~ V_j), to global memory
//     line 13        l_i <- l_new, m_i <- m_new, to global memory
//
// A block of rows is as many times 16 as the CTA has warps (Br); a row's results do not depend on Br, nor on the groups.
// Groups exist where batch and heads alone would leave SMs idle. Blocks that no row sees are not visited.
//
// Traffic between SM and L2, in elements per head with N rows and keys, T_c = N / tile_n and G groups:
//   T_c (3 N D + 4 N) + 2 G N D + 2 N D:  Q, O, O and the statistics at every step; K and V once a group; line 2 and line 16.
// Against version 2 that is O in and out at every step, and no parallelism beyond G.
#pragma once

#include <cuda_runtime.h>

#include "../registry.h"
#include "../tile/copy.cuh"
#include "../tile/mask.cuh"
#include "config.h"

namespace fae::sm80 {

struct ForwardV1Launch {
  float scale_log2, sign;  // as in ForwardLaunch
  bool fp32_exact;
  bool q_vector, k_vector, v_vector;
  int groups;      // of query rows
  int group_rows;  // rows of each, a multiple of 16
  float* state_o;  // rows of state_stride floats, an even number; may be the output itself
  int64_t state_stride_b, state_stride_h, state_stride_s;
  bool state_is_output;
  float* state_m;  // [batch][heads][seqlen_q], base 2
  float* state_l;
};

template <typename T, int kRow>
struct ForwardV1Traits {
  static constexpr ForwardV1Tile kTile = kForwardV1Tiles[kRow];
  static_assert(sizeof(T) == kTile.element_bytes);
  using Mma = tile::Mma<T>;
  static constexpr int kD = kTile.head_dim, kN = kTile.tile_n, kRows = kV1RowsOfWarp;
  static constexpr int kNT = kN / 8, kDT = kD / 8;
  static constexpr int kPitch = kTile.pitch();
  static constexpr int kQBuffers = kTile.q_buffers;
};

// The global-memory state of a warp's rows, as the lane holds it in an accumulator fragment: rows lane / 4 and + 8.
struct V1Rows {
  float* o[2];  // at column 2 (lane % 4)
  float* m[2];
  float* l[2];
  bool valid[2];
};

FAE_DEVICE V1Rows v1_rows(const AttentionParams& p, const ForwardV1Launch& launch, int64_t b, int h, int row0,
                          int lane) {
  V1Rows rows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + lane / 4 + 8 * half;
    rows.valid[half] = row < p.seq(b).seqlen_q;
    rows.o[half] = launch.state_o + b * launch.state_stride_b + h * launch.state_stride_h +
                   row * launch.state_stride_s + 2 * (lane % 4);
    const int64_t at = (b * p.sizes.heads + h) * p.sizes.seqlen_q + row;
    rows.m[half] = launch.state_m + at;
    rows.l[half] = launch.state_l + at;
  }
  return rows;
}

// Lines 9 to 13 for one warp's 16 rows and one block of keys. q, k, v: shared-memory tiles.
template <typename Tr>
FAE_DEVICE void v1_step(const AttentionParams& p, const ForwardV1Launch& launch, int64_t b, int h, int row0, int n0,
                        uint32_t q, uint32_t k, uint32_t v, int lane) {
  using Mma = typename Tr::Mma;
  const IntervalMask mask = p.mask(b);
  const V1Rows rows = v1_rows(p, launch, b, h, row0, lane);

  float scores[1][Tr::kNT][4] = {};  // line 9
  auto& s = scores[0];
  const uint32_t lane_q = q + Mma::template lane_a<Tr::kPitch>(lane),
                 lane_k = k + Mma::template lane_b<Tr::kPitch>(lane);
  tile::contract<Mma, Tr::kD / Mma::kK>(
      scores, launch.fp32_exact,
      [&](typename Mma::A& a, int, int step) { Mma::template load_a<Tr::kPitch>(a, lane_q, step); },
      [&](typename Mma::B& bk, int pair, int step) {
        Mma::template load_b<Tr::kPitch>(bk, lane_k + pair * 16 * Tr::kPitch, step);
      });
  if (launch.sign != 1.0f) {
#pragma unroll
    for (int nt = 0; nt < Tr::kNT; ++nt)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[nt][e] *= launch.sign;
  }
  if (!mask.tile_is_full(row0, row0 + Tr::kRows, n0, n0 + Tr::kN)) tile::mask_scores<Tr::kNT>(s, mask, row0, n0, lane);

  float old_share[2], new_share[2];  // what O_i and P~ V_j are multiplied with in line 12
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float m_tilde = softmax<float>::neg_inf();  // line 10
#pragma unroll
    for (int nt = 0; nt < Tr::kNT; ++nt) m_tilde = fmaxf(m_tilde, fmaxf(s[nt][2 * half], s[nt][2 * half + 1]));
    m_tilde = fmaxf(m_tilde, __shfl_xor_sync(0xffffffffu, m_tilde, 1));
    m_tilde = fmaxf(m_tilde, __shfl_xor_sync(0xffffffffu, m_tilde, 2)) * launch.scale_log2;
    const float base = softmax<float>::subtracted_max(m_tilde);
    float l_tilde = 0.0f;
#pragma unroll
    for (int nt = 0; nt < Tr::kNT; ++nt) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[nt][2 * half + e];
        x = ptx::ex2_approx(fmaf(x, launch.scale_log2, -base));
        l_tilde += x;
      }
    }
    l_tilde += __shfl_xor_sync(0xffffffffu, l_tilde, 1);
    l_tilde += __shfl_xor_sync(0xffffffffu, l_tilde, 2);
    const float m_i = rows.valid[half] ? *rows.m[half] : softmax<float>::neg_inf();  // line 8
    const float l_i = rows.valid[half] ? *rows.l[half] : 0.0f;
    const float m_new = fmaxf(m_i, m_tilde);  // line 11
    const float old_weight = l_i * softmax<float>::rescale(m_i, m_new),
                new_weight = softmax<float>::rescale(m_tilde, m_new);
    const float l_new = old_weight + new_weight * l_tilde;
    const float inverse = softmax<float>::inverse_sum(l_new);
    old_share[half] = old_weight * inverse;
    new_share[half] = new_weight * inverse;
    __syncwarp();                             // all four lanes of a row have read its statistics
    if (rows.valid[half] && lane % 4 == 0) {  // line 13
      *rows.m[half] = m_new;
      *rows.l[half] = l_new;
    }
  }

  float products[1][Tr::kDT][4] = {};
  const auto& pv = products[0];
  const uint32_t lane_v = v + Mma::template lane_b_tokens<Tr::kPitch>(lane);
  tile::contract<Mma, Tr::kN / Mma::kK>(
      products, launch.fp32_exact,
      [&](typename Mma::A& a, int, int step) {
        typename Mma::Packed packed;
        Mma::from_accumulators(packed, &s[step * Mma::kTilesPerStep]);
        Mma::unpack(a, packed);
      },
      [&](typename Mma::B& bv, int pair, int step) {
        Mma::template load_b_tokens<Tr::kPitch>(bv, lane_v + step * Mma::kK * Tr::kPitch, pair);
      });
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // line 12
    if (!rows.valid[half]) continue;
#pragma unroll
    for (int dt = 0; dt < Tr::kDT; ++dt) {
      if (8 * dt + 2 * (lane % 4) >= p.sizes.head_dim_v) continue;
      float2& o = *reinterpret_cast<float2*>(rows.o[half] + 8 * dt);
      const float2 old = o;
      o = make_float2(old_share[half] * old.x + new_share[half] * pv[dt][2 * half],
                      old_share[half] * old.y + new_share[half] * pv[dt][2 * half + 1]);
    }
  }
}

template <typename T, int kRow>
__global__ void forward_v1_kernel(const __grid_constant__ AttentionParams p,
                                  const __grid_constant__ ForwardV1Launch launch) {
  using Tr = ForwardV1Traits<T, kRow>;
  extern __shared__ __align__(1024) char shared_bytes[];
  const uint32_t sK = ptx::shared_address(shared_bytes), sV = sK + Tr::kN * Tr::kPitch;
  const int warps = blockDim.x / 32, warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const uint32_t warp_q = sV + (Tr::kN + warp * Tr::kRows * Tr::kQBuffers) * Tr::kPitch;

  const int64_t bh = blockIdx.x / launch.groups, b = bh / p.sizes.heads;
  const int h = static_cast<int>(bh % p.sizes.heads), h_kv = p.sizes.kv_head(h);
  const SeqInfo seq = p.seq(b);
  const IntervalMask mask = p.mask(b);
  const int group_begin = blockIdx.x % launch.groups * launch.group_rows;
  const int group_end = min(group_begin + launch.group_rows, seq.seqlen_q);
  const int first = group_begin + warp * Tr::kRows, stride = warps * Tr::kRows;  // this warp's blocks of rows
  const tile::GlobalRows<const T> gQ{p.q.row<const T>(b, h, 0), p.q.stride_s, p.sizes.head_dim, launch.q_vector};
  const tile::GlobalRows<const T> gK{p.k.row<const T>(b, h_kv, 0), p.k.stride_s, p.sizes.head_dim, launch.k_vector};
  const tile::GlobalRows<const T> gV{p.v.row<const T>(b, h_kv, 0), p.v.stride_s, p.sizes.head_dim_v, launch.v_vector};

  for (int row0 = first; row0 < group_end; row0 += stride) {  // line 2
    const V1Rows rows = v1_rows(p, launch, b, h, row0, lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!rows.valid[half]) continue;
      for (int c = 0; c + 2 * (lane % 4) < p.sizes.head_dim_v; c += 8)
        *reinterpret_cast<float2*>(rows.o[half] + c) = make_float2(0.0f, 0.0f);
      if (lane % 4 == 0) {
        *rows.m[half] = softmax<float>::neg_inf();
        *rows.l[half] = 0.0f;
      }
    }
  }
  __syncwarp();

  const Range keys = mask.keys_of_rows(group_begin, group_end);
  for (int n0 = keys.begin / Tr::kN * Tr::kN; n0 < keys.end; n0 += Tr::kN) {  // line 5
    const auto sees = [&](int row0) {
      const Range seen = mask.keys_of_rows(row0, min(row0 + Tr::kRows, group_end));
      return max(seen.begin, n0) < min(seen.end, n0 + Tr::kN);
    };
    const auto next = [&](int row0) {  // block of rows at or after row0 that sees these keys
      while (row0 < group_end && !sees(row0)) row0 += stride;
      return row0;
    };
    const auto load_q = [&](int row0, int buffer) {
      if (row0 < group_end)
        tile::load_rows<Tr::kRows, Tr::kD, 32, T>(warp_q + buffer * Tr::kRows * Tr::kPitch, gQ, row0, seq.seqlen_q,
                                                  lane);
    };
    __syncthreads();  // K and V of the last block have been used by all warps
    tile::load_rows_any<Tr::kN, Tr::kD, T>(sK, gK, n0, seq.seqlen_k, threadIdx.x, blockDim.x);  // line 6
    tile::load_rows_any<Tr::kN, Tr::kD, T>(sV, gV, n0, seq.seqlen_k, threadIdx.x, blockDim.x);
    int row0 = next(first), buffer = 0;
    load_q(row0, 0);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    while (row0 < group_end) {  // line 7
      const int row1 = next(row0 + stride);
      if constexpr (Tr::kQBuffers == 2) {
        load_q(row1, buffer ^ 1);  // line 8
        ptx::cp_async_commit();
      }
      v1_step<Tr>(p, launch, b, h, row0, n0, warp_q + buffer * Tr::kRows * Tr::kPitch, sK, sV, lane);
      __syncwarp();  // all lanes have used this buffer
      if constexpr (Tr::kQBuffers == 1) {
        load_q(row1, 0);
        ptx::cp_async_commit();
      }
      ptx::cp_async_wait<0>();
      __syncwarp();
      if constexpr (Tr::kQBuffers == 2) buffer ^= 1;
      row0 = row1;
    }
  }

  __syncwarp();
  for (int row = first; row < group_end; row += stride) {  // line 16: O in the caller's dtype, lse = m + log l
    for (int r = row; r < min(row + Tr::kRows, group_end); ++r) {
      const int64_t at = (b * p.sizes.heads + h) * p.sizes.seqlen_q + r;
      if (!launch.state_is_output) {
        const float* o =
            launch.state_o + b * launch.state_stride_b + h * launch.state_stride_h + r * launch.state_stride_s;
        T* out = p.o.row<T>(b, h, r);
        for (int c = lane; c < p.sizes.head_dim_v; c += 32) out[c] = tile::from_float<T>(o[c]);
      }
      if (lane == 0) *p.lse.row<float>(b, h, r) = softmax<float>::lse(launch.state_m[at], launch.state_l[at]);
    }
  }
}

}  // namespace fae::sm80
