// Mma<T>: one interface over mma.sync for fp16, bf16 and fp32, so that a kernel is written once for all of them.
//
// A step contracts kK elements: 16 of 16 bits, 8 of fp32. fp32 is 3xTF32: x = big + small, each with the 11 significant
// bits of tf32, and a b = big big + big small + small big, which leaves an error of about 2^-22. With `exact` false the
// first product stands alone (torch.set_float32_matmul_precision("high") and "medium").
//
// Two kinds of contraction, which differ in fp32 only:
//   over the head dimension (S = Q K^T, dP = dO V^T): both operands lie [row][dim] in shared memory. load_a, load_b.
//   over tokens (P V, P^T dO, dS^T Q, dS K): B lies [token][dim]; A is an accumulator tile, or one in shared memory.
//     The tf32 A fragment wants columns t and t + 4 where accumulators have 2t and 2t + 1. The order of a contraction
//     is free, so step entries t and t + 4 are taken to be tokens 2t and 2t + 1 in every operand: no shuffle. *_tokens.
//
// Tiles in shared memory are laid out by Swizzle<kRowBytes>. A lane computes its address in a tile once (lane_*); from
// there rows are added in multiples of eight, and columns are named by the `unit` of 32 bytes, or by the block of 16.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../ptx/arithmetic.cuh"
#include "../ptx/mma.cuh"
#include "../ptx/shared_memory.cuh"
#include "swizzle.cuh"

namespace fae::tile {

// A lane's address for the two ways in which ldmatrix.x4 covers 16 rows x 32 bytes: matrices in the order of A's registers
// (rows first) and of B's (columns first).
template <int kRowBytes>
FAE_DEVICE uint32_t lane_rows_first(int lane) {
  return Swizzle<kRowBytes>::offset(lane & 15, lane >> 4);
}
template <int kRowBytes>
FAE_DEVICE uint32_t lane_columns_first(int lane) {
  return Swizzle<kRowBytes>::offset((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
}

// fp32 to T, rounded to the nearest; spelled out, since PyTorch's flags switch the types' own conversions off.
template <typename T>
FAE_DEVICE T from_float(float x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else
    return __float2bfloat16_rn(x);
}

template <typename T>
struct Mma;

// What fp16 and bf16 share.
template <typename T>
struct Mma16Bit {
  static constexpr int kK = 16;
  static constexpr int kTilesPerStep = 2;  // 16 x 8 accumulator tiles that make one A fragment
  static constexpr int kTerms = 1;         // products of parts that make one of fragments
  struct A {
    uint32_t r[4];
  };
  struct B {  // 16 columns: two n8 tiles
    uint32_t r[4];
  };
  using Packed = A;  // an A fragment as it waits in registers: half of its accumulators' size

  template <int kRowBytes>
  FAE_DEVICE static uint32_t lane_a(int lane) {
    return lane_rows_first<kRowBytes>(lane);
  }
  template <int kRowBytes>
  FAE_DEVICE static uint32_t lane_b(int lane) {
    return lane_columns_first<kRowBytes>(lane);
  }
  template <int kRowBytes>
  FAE_DEVICE static uint32_t lane_a_tokens(int lane) {
    return lane_rows_first<kRowBytes>(lane);
  }
  template <int kRowBytes>
  FAE_DEVICE static uint32_t lane_a_tokens_trans(int lane) {
    return lane_columns_first<kRowBytes>(lane);
  }
  template <int kRowBytes>
  FAE_DEVICE static uint32_t lane_b_tokens(int lane) {
    return lane_rows_first<kRowBytes>(lane);
  }
  template <int kRowBytes>
  FAE_DEVICE static uint32_t lane_pair(int lane) {
    return Swizzle<kRowBytes>::offset(lane / 4, 0) + 4 * (lane % 4);
  }

  // 16 rows x kK of a tile [row][dim].
  template <int kRowBytes>
  FAE_DEVICE static void load_a(A& a, uint32_t address, int unit) {
    ptx::ldmatrix_x4(a.r, Swizzle<kRowBytes>::chunk(address, 2 * unit));
  }
  // 16 columns x kK of B, from a tile [column][dim].
  template <int kRowBytes>
  FAE_DEVICE static void load_b(B& b, uint32_t address, int unit) {
    ptx::ldmatrix_x4(b.r, Swizzle<kRowBytes>::chunk(address, 2 * unit));
  }
  // 16 rows x kK tokens of a tile [row][token].
  template <int kRowBytes>
  FAE_DEVICE static void load_a_tokens(A& a, uint32_t address, int unit) {
    ptx::ldmatrix_x4(a.r, Swizzle<kRowBytes>::chunk(address, 2 * unit));
  }
  // 16 rows x kK tokens of a tile [token][row].
  template <int kRowBytes>
  FAE_DEVICE static void load_a_tokens_trans(A& a, uint32_t address, int block16) {
    ptx::ldmatrix_x4_trans(a.r, Swizzle<kRowBytes>::chunk(address, 2 * block16));
  }
  // kK tokens x 16 columns of a tile [token][column].
  template <int kRowBytes>
  FAE_DEVICE static void load_b_tokens(B& b, uint32_t address, int block16) {
    ptx::ldmatrix_x4_trans(b.r, Swizzle<kRowBytes>::chunk(address, 2 * block16));
  }
  // Two neighbouring accumulators of 8-column tile `tile` to shared memory.
  template <int kRowBytes>
  FAE_DEVICE static void store_pair(uint32_t address, int tile, float x, float y) {
    ptx::st_shared_u32(Swizzle<kRowBytes>::chunk(address, tile), pack(x, y));
  }
  FAE_DEVICE static void unpack(A& a, const Packed& packed) { a = packed; }
  // The A fragment of kTilesPerStep neighbouring accumulator tiles.
  FAE_DEVICE static void from_accumulators(Packed& a, const float (*c)[4]) {
    a.r[0] = pack(c[0][0], c[0][1]);
    a.r[1] = pack(c[0][2], c[0][3]);
    a.r[2] = pack(c[1][0], c[1][1]);
    a.r[3] = pack(c[1][2], c[1][3]);
  }

  FAE_DEVICE static uint32_t pack(float low, float high);
  FAE_DEVICE static float2 unpack_pair(uint32_t pair);
};

template <>
FAE_DEVICE float2 Mma16Bit<__half>::unpack_pair(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
template <>
FAE_DEVICE float2 Mma16Bit<__nv_bfloat16>::unpack_pair(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <>
FAE_DEVICE uint32_t Mma16Bit<__half>::pack(float low, float high) {
  return ptx::cvt_f16x2(low, high);
}
template <>
FAE_DEVICE uint32_t Mma16Bit<__nv_bfloat16>::pack(float low, float high) {
  return ptx::cvt_bf16x2(low, high);
}

template <>
struct Mma<__half> : Mma16Bit<__half> {
  // c += A B for n8 tile `half` of b.
  template <int /*kTerm*/>
  FAE_DEVICE static void mma(float (&c)[4], const A& a, const B& b, int half) {
    ptx::mma_m16n8k16_f16(c, a.r, b.r[2 * half], b.r[2 * half + 1]);
  }
};

template <>
struct Mma<__nv_bfloat16> : Mma16Bit<__nv_bfloat16> {
  template <int /*kTerm*/>
  FAE_DEVICE static void mma(float (&c)[4], const A& a, const B& b, int half) {
    ptx::mma_m16n8k16_bf16(c, a.r, b.r[2 * half], b.r[2 * half + 1]);
  }
};

template <>
struct Mma<float> {
  static constexpr int kK = 8;
  static constexpr int kTilesPerStep = 1;
  static constexpr int kTerms = 3;
  struct A {
    uint32_t big[4];
    uint32_t small[4];
  };
  using B = A;     // two n8 tiles: entries 0, 1 and 2, 3
  struct Packed {  // split at the last moment, which is what doubles it
    uint32_t r[4];
  };

  template <int kRowBytes>
  FAE_DEVICE static uint32_t lane_a(int lane) {
    return lane_rows_first<kRowBytes>(lane);
  }
  template <int kRowBytes>
  FAE_DEVICE static uint32_t lane_b(int lane) {
    return lane_columns_first<kRowBytes>(lane);
  }
  template <int kRowBytes>
  FAE_DEVICE static uint32_t lane_a_tokens(int lane) {
    return lane_pair<kRowBytes>(lane);
  }
  template <int kRowBytes>
  FAE_DEVICE static uint32_t lane_a_tokens_trans(int lane) {
    return Swizzle<kRowBytes>::offset(2 * (lane & 3), lane >> 4) + ((lane >> 2) & 3) * 4;
  }
  template <int kRowBytes>
  FAE_DEVICE static uint32_t lane_b_tokens(int lane) {
    return lane_a_tokens_trans<kRowBytes>(lane);
  }
  template <int kRowBytes>
  FAE_DEVICE static uint32_t lane_pair(int lane) {
    return Swizzle<kRowBytes>::offset(lane >> 2, (lane & 3) >> 1) + (lane & 1) * 8;
  }

  template <int kRowBytes>
  FAE_DEVICE static void load_a(A& a, uint32_t address, int unit) {
    uint32_t x[4];
    ptx::ldmatrix_x4(x, Swizzle<kRowBytes>::chunk(address, 2 * unit));
    split(a, x);
  }
  template <int kRowBytes>
  FAE_DEVICE static void load_b(B& b, uint32_t address, int unit) {
    load_a<kRowBytes>(b, address, unit);
  }
  template <int kRowBytes>
  FAE_DEVICE static void load_a_tokens(A& a, uint32_t address, int unit) {
    uint32_t low[2], high[2];  // rows g and g + 8
    const uint32_t at = Swizzle<kRowBytes>::chunk(address, 2 * unit);
    ptx::ld_shared_v2(low, at);
    ptx::ld_shared_v2(high, at + 8 * kRowBytes);
    const uint32_t x[4] = {low[0], high[0], low[1], high[1]};
    split(a, x);
  }
  template <int kRowBytes>
  FAE_DEVICE static void load_a_tokens_trans(A& a, uint32_t address, int block16) {
    uint32_t x[4];
    load_four<kRowBytes>(x, address, block16);
    const uint32_t in_order[4] = {x[0], x[2], x[1], x[3]};
    split(a, in_order);
  }
  template <int kRowBytes>
  FAE_DEVICE static void load_b_tokens(B& b, uint32_t address, int block16) {
    uint32_t x[4];
    load_four<kRowBytes>(x, address, block16);
    split(b, x);
  }
  template <int kRowBytes>
  FAE_DEVICE static void store_pair(uint32_t address, int tile, float x, float y) {
    ptx::st_shared_v2(Swizzle<kRowBytes>::chunk(address, 2 * tile), __float_as_uint(x), __float_as_uint(y));
  }
  FAE_DEVICE static void unpack(A& a, const Packed& packed) { split(a, packed.r); }
  FAE_DEVICE static void from_accumulators(Packed& a, const float (*c)[4]) {
    a.r[0] = __float_as_uint(c[0][0]);
    a.r[1] = __float_as_uint(c[0][2]);
    a.r[2] = __float_as_uint(c[0][1]);
    a.r[3] = __float_as_uint(c[0][3]);
  }
  template <int kTerm>
  FAE_DEVICE static void mma(float (&c)[4], const A& a, const B& b, int half) {
    if constexpr (kTerm == 0)
      ptx::mma_m16n8k8_tf32(c, a.small, b.big[2 * half], b.big[2 * half + 1]);
    else if constexpr (kTerm == 1)
      ptx::mma_m16n8k8_tf32(c, a.big, b.small[2 * half], b.small[2 * half + 1]);
    else
      ptx::mma_m16n8k8_tf32(c, a.big, b.big[2 * half], b.big[2 * half + 1]);
  }

 private:
  // (token 2t, column g), (2t + 1, g), (2t, g + 8), (2t + 1, g + 8); g = lane / 4, t = lane % 4. The odd token's row has the
  // other parity in its swizzle. No two lanes of a load share a bank.
  template <int kRowBytes>
  FAE_DEVICE static void load_four(uint32_t (&x)[4], uint32_t address, int block16) {
    using Layout = Swizzle<kRowBytes>;
    static_assert(Layout::kWide);
    const uint32_t left = Layout::chunk(address, 4 * block16), right = Layout::chunk(address, 4 * block16 + 2);
    x[0] = ptx::ld_shared_u32(left);
    x[1] = ptx::ld_shared_u32((left ^ 16u) + kRowBytes);
    x[2] = ptx::ld_shared_u32(right);
    x[3] = ptx::ld_shared_u32((right ^ 16u) + kRowBytes);
  }
  // The rest is exact and gets cut by the unit, not rounded: its sign is random, so that no bias comes of it.
  FAE_DEVICE static void split(A& a, const uint32_t (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a.big[i] = ptx::cvt_tf32(__uint_as_float(x[i]));
      a.small[i] = __float_as_uint(__uint_as_float(x[i]) - __uint_as_float(a.big[i]));
    }
  }
};

// c += A B over kSteps steps: kRows fragments of A, kTiles n8 tiles of B. load_a(a, row, step) and load_b(b, pair, step) fetch
// the fragments; a pair is two n8 tiles.
template <typename Mma, int kSteps, bool kExact, int kRows, int kTiles, typename LoadA, typename LoadB>
FAE_DEVICE void contract_as(float (&c)[kRows][kTiles][4], LoadA load_a, LoadB load_b) {
  // fp32: the unit cuts its sums off instead of rounding them, which over a long contraction is a bias of many units in the
  // last place. So it adds up kChunk steps alone, from zero, and the rest is added outside (Ootomo and Yokota, "Recovering
  // single precision accuracy from Tensor Cores", arXiv 2203.03341). Small terms come first: beside a large sum they
  // would lose more.
  constexpr int kChunk = Mma::kTerms == 1 ? 1 : 2;
  static_assert(kSteps % kChunk == 0 && kTiles % 2 == 0);
#pragma unroll
  for (int step = 0; step < kSteps; step += kChunk) {
    typename Mma::A a[kChunk][kRows];
#pragma unroll
    for (int k = 0; k < kChunk; ++k)
#pragma unroll
      for (int row = 0; row < kRows; ++row) load_a(a[k][row], row, step + k);
#pragma unroll
    for (int pair = 0; pair < kTiles / 2; ++pair) {
      typename Mma::B b[kChunk];
#pragma unroll
      for (int k = 0; k < kChunk; ++k) load_b(b[k], pair, step + k);
      if constexpr (Mma::kTerms == 1) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int row = 0; row < kRows; ++row) Mma::template mma<0>(c[row][2 * pair + half], a[0][row], b[0], half);
      } else {
        float sums[kRows][2][4] = {};
        const auto term = [&](auto number) {
#pragma unroll
          for (int k = 0; k < kChunk; ++k)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
              for (int row = 0; row < kRows; ++row)
                Mma::template mma<decltype(number)::value>(sums[row][half], a[k][row], b[k], half);
        };
        if constexpr (kExact) {
          term(std::integral_constant<int, 0>{});
          term(std::integral_constant<int, 1>{});
        }
        term(std::integral_constant<int, 2>{});
#pragma unroll
        for (int row = 0; row < kRows; ++row)
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int e = 0; e < 4; ++e) c[row][2 * pair + half][e] += sums[row][half][e];
      }
    }
  }
}

// The same with `exact` known at run time. Loops are compiled for both: a branch at every product would end the block that the
// compiler schedules in (measured: a tenth of the fp32 kernels' speed).
template <typename Mma, int kSteps, int kRows, int kTiles, typename LoadA, typename LoadB>
FAE_DEVICE void contract(float (&c)[kRows][kTiles][4], bool exact, LoadA load_a, LoadB load_b) {
  if (Mma::kTerms == 1 || exact)
    contract_as<Mma, kSteps, true>(c, load_a, load_b);
  else
    contract_as<Mma, kSteps, false>(c, load_a, load_b);
}

}  // namespace fae::tile
