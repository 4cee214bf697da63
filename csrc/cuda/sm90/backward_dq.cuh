// dQ alone, for the backward in two kernels on Hopper: query tiles outside, key tiles inside, as in the forward.
//
// Seven products instead of five, but nothing is summed across CTAs: no fp32 copy of dQ in global memory, and the same bits in
// every run. One thread, the producer, keeps copies under way; each warpgroup owns 64 query rows and runs on its own:
//
//     producer     K0 Q dO V0 K1 V1 ... | K0' Q' dO' V0' ...           waits: q_empty, k_empty, v_empty
//     warpgroup    S = Q Kj^T, dP = dO Vj^T                            waits: q_full, k_full, v_full
//                  dS = exp2(S - lse) (dP - delta)
//                  dQ += dS Kj
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../../core/params.h"
#include "../ptx/arithmetic.cuh"
#include "../ptx/control.cuh"
#include "../ptx/wgmma.cuh"
#include "../ptx/wgmma_sync.cuh"
#include "../tile/mask.cuh"
#include "../tile/mma.cuh"
#include "../tile/wgmma_tile.cuh"
#include "config.h"
#include "pipeline.cuh"
#include "steps.cuh"
#include "tensor_map.h"
#include "tile_order.h"

namespace fae::sm90 {

struct DqLaunch {
  CUtensorMap q, k, v, dout;
  TileOrder order;  // of the query tiles
  float scale_log2, scale;
  const float* stats;  // [batch * heads][stats_tiles][lse in base 2, delta][stats_rows]
  int stats_tiles, stats_rows;
  int* next_tile;  // counter from which CTAs draw tiles, 0 at the start
};

template <typename T, int kRow>
struct BackwardDq {
  static constexpr DqTile kTile = kDqTiles[kRow];
  static constexpr int kM = kTile.tile_m(), kN = kTile.tile_n, kD = kTile.head_dim, kPanels = kTile.panels();
  static constexpr int kKStages = kTile.k_stages, kVStages = kTile.v_stages, kQBuffers = kTile.q_buffers;
  static constexpr int kConsumerWarps = 4 * kTile.warpgroups;

  using Scores = float[kN / 8][4];
  using Packed = uint32_t[kN / 16][4];  // A fragments
  using Gradient = float[kD / 8][4];

  struct Work {  // a query tile
    int row;     // its first; -1: there are no more tiles
    int b, h;
  };

  struct Shared {
    uint8_t q[kQBuffers][kTile.q_bytes()];
    uint8_t dout[kQBuffers][kTile.q_bytes()];
    uint8_t k[kKStages][kTile.kv_bytes()];
    uint8_t v[kVStages][kTile.kv_bytes()];
    RingBarriers<kQBuffers> q_ring;
    RingBarriers<kKStages> k_ring;
    RingBarriers<kVStages> v_ring;
    Work work[kQBuffers];  // beside q: the same barriers
  };
  static_assert(sizeof(Shared) + tile::kPanelAlignment <= kTile.shared_bytes());

  FAE_DEVICE static void produce(Shared& shared, const BackwardParams& p, const DqLaunch& launch) {
    Ring<kQBuffers> q_at;
    Ring<kKStages> k_at;
    Ring<kVStages> v_at;
    const Sizes& z = p.fwd.sizes;
    ptx::griddepcontrol_wait();  // the warpgroups touch only what comes after their first copy
    for (int index = blockIdx.x; index < launch.order.tiles;) {
      const TileOrder::Tile tile = launch.order.at(index);
      const int row = tile.m * kM, b = tile.head / z.heads, h = tile.head - b * z.heads, h_kv = z.kv_head(h);
      const Range tiles = key_tiles<kN>(p.fwd.mask(b), row, row + kM);
      for (int j = tiles.end - 1; j >= tiles.begin || j == tiles.end - 1; --j) {
        const bool first = j == tiles.end - 1, some = !tiles.empty();
        if (some) {  // the first keys find room before Q does, where Q has one buffer
          shared.k_ring.wait_empty(k_at, "k_empty");
          const uint32_t full = shared.k_ring.full_address(k_at.stage);
          ptx::mbarrier_arrive_expect_tx(full, kTile.kv_bytes());
          load_panels<kPanels, kN>(shared.k[k_at.stage], &launch.k, full, j * kN, h_kv, b);
          k_at.advance();
        }
        if (first) {
          shared.q_ring.wait_empty(q_at, "q_empty");
          shared.work[q_at.stage] = {row, b, h};
          const uint32_t full = shared.q_ring.full_address(q_at.stage);
          ptx::mbarrier_arrive_expect_tx(full, 2 * kTile.q_bytes());
          load_panels<kPanels, kM>(shared.q[q_at.stage], &launch.q, full, row, h, b);
          load_panels<kPanels, kM>(shared.dout[q_at.stage], &launch.dout, full, row, h, b);
          q_at.advance();
        }
        if (!some) break;
        shared.v_ring.wait_empty(v_at, "v_empty");
        const uint32_t full = shared.v_ring.full_address(v_at.stage);
        ptx::mbarrier_arrive_expect_tx(full, kTile.kv_bytes());
        load_panels<kPanels, kN>(shared.v[v_at.stage], &launch.v, full, j * kN, h_kv, b);
        v_at.advance();
      }
      index = gridDim.x + atomicAdd(launch.next_tile, 1);
    }
    ptx::griddepcontrol_launch_dependents();
    shared.q_ring.wait_empty(q_at, "q_empty");
    shared.work[q_at.stage].row = -1;
    ptx::mbarrier_arrive(shared.q_ring.full_address(q_at.stage));
  }

  struct Consumer {
    Shared& shared;
    const BackwardParams& p;
    const DqLaunch& launch;
    const int warpgroup, warp, lane;  // warp of the warpgroup
    Ring<kQBuffers> q_at{};
    Ring<kKStages> k_at{};
    Ring<kVStages> v_at{};

    FAE_DEVICE void skip(int count) {
      for (; count > 0; --count) {
        shared.k_ring.wait_full(k_at, "k_full of a tile skipped");
        shared.v_ring.wait_full(v_at, "v_full of a tile skipped");
        __syncwarp();
        release_k();
        release_v();
      }
    }
    FAE_DEVICE void release_k() {
      if (lane == 0) shared.k_ring.release(k_at.stage);
      k_at.advance();
    }
    FAE_DEVICE void release_v() {
      if (lane == 0) shared.v_ring.release(v_at.stage);
      v_at.advance();
    }

    FAE_DEVICE void multiply_scores(Scores& s, Scores& dp) {
      const uint32_t rows = warpgroup * tile::panel_bytes(kRowsPerWarpgroup);
      const uint64_t q = tile::descriptor_k_major(ptx::shared_address(shared.q[q_at.stage]) + rows);
      const uint64_t dout = tile::descriptor_k_major(ptx::shared_address(shared.dout[q_at.stage]) + rows);
      shared.k_ring.wait_full(k_at, "k_full");
      const uint64_t k = tile::descriptor_k_major(ptx::shared_address(shared.k[k_at.stage]));
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kD / 16; ++i)
        ptx::wgmma_ss<T, 0, 0>(s, q + tile::step_k_major<kM>(i), k + tile::step_k_major<kN>(i), i > 0);
      ptx::wgmma_commit_group();
      shared.v_ring.wait_full(v_at, "v_full");
      const uint64_t v = tile::descriptor_k_major(ptx::shared_address(shared.v[v_at.stage]));
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kD / 16; ++i)
        ptx::wgmma_ss<T, 0, 0>(dp, dout + tile::step_k_major<kM>(i), v + tile::step_k_major<kN>(i), i > 0);
      ptx::wgmma_commit_group();
    }

    FAE_DEVICE void release_q() {
      __syncwarp();
      if (lane == 0) shared.q_ring.release(q_at.stage);
    }

    FAE_DEVICE void run() {
      Gradient dq;
      for (;; q_at.advance()) {
        shared.q_ring.wait_full(q_at, "q_full");
        const Work work = shared.work[q_at.stage];
        if (work.row < 0) break;
        const IntervalMask mask = p.fwd.mask(work.b);
        const int row = work.row + warpgroup * kRowsPerWarpgroup, warp_row = row + warp * kRowsPerWarp;
        const Range all = key_tiles<kN>(mask, work.row, work.row + kM),
                    tiles = key_tiles<kN>(mask, row, row + kRowsPerWarpgroup);
        if (tiles.empty()) {
          skip(all.size());
          release_q();
          store_zero_rows<T>(p.dq, work.b, work.h, warp_row, mask.seqlen_q, p.fwd.sizes.head_dim, lane);
          continue;
        }
        const int last = min(row + kRowsPerWarpgroup, mask.seqlen_q) - 1;
        const Range full = {(mask.begin(last) + kN - 1) / kN, mask.end(row) / kN};  // need no mask
        float lse[2], delta[2];
        skip(all.end - tiles.end);
        for (int j = tiles.end - 1; j >= tiles.begin; --j) {
          Scores s, dp;
          multiply_scores(s, dp);
          if (j == tiles.end - 1) {  // arrives while the products run
            const int64_t head = int64_t{work.b} * p.fwd.sizes.heads + work.h;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int r = min(warp_row + lane / 4 + 8 * half, mask.seqlen_q - 1), tile = r / launch.stats_rows;
              const float* stats = launch.stats + (head * launch.stats_tiles + tile) * 2 * launch.stats_rows +
                                   (r - tile * launch.stats_rows);
              lse[half] = stats[0];
              delta[half] = stats[launch.stats_rows];
            }
          }
          ptx::wgmma_wait_group<1>();
          if (j < full.begin || j >= full.end) tile::mask_scores(s, mask, warp_row, j * kN, lane);
#pragma unroll
          for (int i = 0; i < kN / 8; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) s[i][e] = ptx::ex2_approx(fmaf(s[i][e], launch.scale_log2, -lse[e / 2]));
          }
          ptx::wgmma_wait_group<0>();
          release_v();
          if (j == tiles.begin) release_q();
          Packed ds;
#pragma unroll
          for (int i = 0; i < kN / 8; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half)
              ds[i / 2][2 * (i % 2) + half] =
                  tile::Mma<T>::pack(s[i][2 * half] * (dp[i][2 * half] - delta[half]),
                                     s[i][2 * half + 1] * (dp[i][2 * half + 1] - delta[half]));
          }
          const uint64_t k = tile::descriptor_mn_major<kN>(ptx::shared_address(shared.k[k_at.stage]));
          ptx::wgmma_fence();
#pragma unroll
          for (int i = 0; i < kN / 16; ++i)
            ptx::wgmma_rs<T, 1>(dq, ds[i], k + tile::step_mn_major(i), i > 0 || j < tiles.end - 1);
          ptx::wgmma_commit_group();
          ptx::wgmma_wait_group<0>();
          release_k();
        }
        skip(tiles.begin - all.begin);
        store_rows<T>(dq, launch.scale, p.dq, work.b, work.h, warp_row, mask.seqlen_q, p.fwd.sizes.head_dim, lane);
      }
    }
  };

  FAE_DEVICE static void init(Shared& shared) {
    shared.q_ring.init(kConsumerWarps);
    shared.k_ring.init(kConsumerWarps);
    shared.v_ring.init(kConsumerWarps);
    ptx::fence_mbarrier_init();
  }
};

template <typename T, int kRow>
__global__ void __launch_bounds__(kDqTiles[kRow].threads(), 1)
    backward_dq_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ DqLaunch launch) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Kernel = BackwardDq<T, kRow>;
  constexpr DqTile kTile = Kernel::kTile;
  extern __shared__ uint8_t bytes[];
  const uint32_t misaligned = ptx::shared_address(bytes) % tile::kPanelAlignment;
  auto& shared =
      *reinterpret_cast<typename Kernel::Shared*>(bytes + (misaligned == 0 ? 0 : tile::kPanelAlignment - misaligned));
  if (threadIdx.x == 0) {
    ptx::prefetch_tensormap(&launch.q);
    ptx::prefetch_tensormap(&launch.k);
    ptx::prefetch_tensormap(&launch.v);
    ptx::prefetch_tensormap(&launch.dout);
    Kernel::init(shared);
  }
  __syncthreads();
  // Broadcast, so that the compiler knows the branches below to be uniform.
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0), warpgroup = warp / 4;
  if (warpgroup == kTile.warpgroups) {
    ptx::setmaxnreg_dec<kTile.producer_registers()>();
    if (warp % 4 == 0 && ptx::elect_one()) Kernel::produce(shared, p, launch);
  } else {
    ptx::setmaxnreg_inc<kTile.consumer_registers()>();
    typename Kernel::Consumer{shared, p, launch, warpgroup, warp % 4, static_cast<int>(threadIdx.x % 32)}.run();
  }
#else
  (void)p, (void)launch;
  __trap();
#endif
}

}  // namespace fae::sm90
