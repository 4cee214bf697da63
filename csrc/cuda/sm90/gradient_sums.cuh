// Gradients to which several CTAs add, on their way to global memory: dQ of all key tiles, dK and dV of a key tile that CTAs
// share. In fp32, in the layout of the accumulators: slabs of 16 rows, in them tiles of 8 columns, in them 16 bytes a lane, so
// that a warp writes 512 consecutive bytes.
#pragma once

#include "../../core/params.h"
#include "../ptx/global_memory.cuh"
#include "../tile/wgmma_tile.cuh"
#include "backward_launch.h"
#include "config.h"
#include "dq_turns.cuh"
#include "steps.cuh"

namespace fae::sm90 {

// What a lane adds to, carried from step to step: an address, or where registers do not suffice an index of 16 bytes.
template <bool kIsIndex>
struct SumPlace {
  float* at;
  FAE_DEVICE void set(float*, float* to) { at = to; }
  FAE_DEVICE float* get(float*) const { return at; }
  FAE_DEVICE void advance(int floats) { at += floats; }
};
template <>
struct SumPlace<true> {
  uint32_t at;
  FAE_DEVICE void set(float* sums, float* to) { at = static_cast<uint32_t>((to - sums) / 4); }
  FAE_DEVICE float* get(float* sums) const { return sums + int64_t{at} * 4; }
  FAE_DEVICE void advance(int floats) { at += floats / 4; }
};

// A warpgroup's half of dQ of a query tile.
template <typename T, typename Kernel, int kDqColumns>
struct DqSums {
  static constexpr int kM = Kernel::kM, kD = Kernel::kD;
  static constexpr bool kSplitRows = Kernel::kSplitRows;
  using Dq = float[kDqColumns / 8][4];

  const BackwardParams& p;
  const BackwardLaunch& launch;
  const int b, warpgroup, warp, lane;

  // What this lane adds to.
  FAE_DEVICE float* accumulator(int h, int m) const {
    const int64_t head = int64_t{b} * p.fwd.sizes.heads + h;
    const int slab = (kSplitRows ? warpgroup * 4 : 0) + warp;
    return launch.dq + (head * launch.m_tiles + m) * (kM * kD) + slab * (kRowsPerWarp * kD) +
           (kSplitRows ? 0 : warpgroup * (tile::kPanelColumns / 8) * 128) + lane * 4;
  }
  // what(values, place) for each 8 columns.
  template <typename Values, typename F>
  FAE_DEVICE void for_each_piece(Values& dq, float* at, F what) const {
#pragma unroll
    for (int i = 0; i < kDqColumns / 8; ++i) {
      if (kD % tile::kPanelColumns == 0 || warpgroup * (tile::kPanelColumns / 8) + i < kD / 8)
        what(dq[i], at + i * 128);
    }
  }

  FAE_DEVICE void add(const Dq& dq, float* to) const {
    for_each_piece(dq, to, [](const float(&x)[4], float* at) { ptx::red_add_v4(at, x[0], x[1], x[2], x[3]); });
  }
  // The first to come.
  FAE_DEVICE void put(const Dq& dq, float* to) const {
    for_each_piece(dq, to, [](const float(&x)[4], float* at) {
      *reinterpret_cast<float4*>(at) = make_float4(x[0], x[1], x[2], x[3]);
    });
  }
  // The last: the sum is complete, is rounded, and leaves for dQ itself.
  FAE_DEVICE void finish(Dq& dq, float* sums, int h, int m, bool first) const {
    if (!first) {
      for_each_piece(dq, sums, [](float(&x)[4], const float* at) {
        const float4 sum = __ldcg(reinterpret_cast<const float4*>(at));
        x[0] += sum.x, x[1] += sum.y, x[2] += sum.z, x[3] += sum.w;
      });
    }
    const int row = m * kM + (kSplitRows ? warpgroup * kRowsPerWarpgroup : 0) + warp * kRowsPerWarp;
    store_rows<T>(dq, launch.scale, p.dq, b, h, row, p.fwd.sizes.seqlen_q, p.fwd.sizes.head_dim, lane,
                  kSplitRows ? 0 : warpgroup * tile::kPanelColumns);
  }
};

// What this CTA has of dK (0) or dV (1) of a key tile that it shares, for the kernel that adds the parts; `warp` of all eight.
template <typename Kernel, int kTiles>
FAE_DEVICE void store_part(const float (&g)[kTiles][4], int which, bool empty, const Sizes& z,
                           const BackwardLaunch& launch, const KeyTile& work, int warp, int lane) {
  const int64_t part = int64_t{which} * launch.order.splits + work.split;
  const int64_t head = part * z.batch * z.heads_kv + int64_t{work.b} * z.heads_kv + work.h_kv;
  const int64_t slab = (head * launch.n_tiles + work.n) * (Kernel::kN / kRowsPerWarp) + warp;
  float4* const to = reinterpret_cast<float4*>(launch.partials + slab * (kRowsPerWarp * Kernel::kD)) + lane;
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    to[i * 32] = empty ? make_float4(0, 0, 0, 0) : make_float4(g[i][0], g[i][1], g[i][2], g[i][3]);
}

}  // namespace fae::sm90
