// dK and dV alone, for the backward in two kernels on Hopper at head dimensions over 128.
//
// One accumulator of 64 keys fills a warpgroup's registers, so the two of them have different work, for the same keys and
// queries. One thread, the producer, keeps copies under way:
//
//     producer     K V | Q0 dO0 Q1 dO1 ... | K' V' | ...                           waits: k_empty, v_empty, q_empty
//     dV warpgroup S^T = K Qj^T, P = exp2(S - lse), P to shared memory             waits: k_full, q_full, p_empty
//                  dV += P^T dOj
//     dK warpgroup dP^T = V dOj^T, dS = P (dP - delta)                             waits: v_full, q_full, p_full
//                  dK += dS^T Qj
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../../core/params.h"
#include "../ptx/arithmetic.cuh"
#include "../ptx/control.cuh"
#include "../ptx/shared_memory.cuh"
#include "../ptx/wgmma.cuh"
#include "../ptx/wgmma_sync.cuh"
#include "../tile/mask.cuh"
#include "../tile/mma.cuh"
#include "../tile/wgmma_tile.cuh"
#include "config.h"
#include "pipeline.cuh"
#include "row_statistics.cuh"
#include "steps.cuh"
#include "tensor_map.h"
#include "tile_order.h"

namespace fae::sm90 {

struct DkvLaunch {
  CUtensorMap q, k, v, dout;
  TileOrder order;  // of the key tiles
  float scale_log2, scale;
  int m_tiles;         // query tiles of a head
  const float* stats;  // [batch * heads][m_tiles][lse in base 2, delta][tile_m]
  int* next_tile;      // counter from which CTAs draw key tiles, 0 at the start
  StatisticsLaunch statistics;
};

template <typename T, int kRow>
struct BackwardDkv {
  static constexpr DkvTile kTile = kDkvTiles[kRow];
  static constexpr int kM = kTile.tile_m, kN = kRowsPerWarpgroup, kD = kTile.head_dim, kPanels = kTile.panels();
  static constexpr int kStages = kTile.stages, kPStages = 2, kWarps = 4;

  using Scores = float[kM / 8][4];
  using Packed = uint32_t[kM / 16][4];  // A fragments
  using Gradient = float[kD / 8][4];
  using Statistics = RowStatistics<T, kM, kD>;

  struct Work {  // a key tile; -1: there are no more
    int n;
    int b, h_kv;
  };

  struct Shared {
    uint8_t k[1][kTile.kv_bytes()];
    uint8_t v[1][kTile.kv_bytes()];
    uint8_t q[kStages][kTile.q_bytes()];
    uint8_t dout[kStages][kTile.q_bytes()];
    typename Statistics::Pieces rows;          // of O and dO
    uint4 p[kPStages][kM / 16][kWarpgroup];    // as the threads hold it
    alignas(16) float stats[kStages][2 * kM];  // lse in base 2, delta
    RingBarriers<1> k_ring, v_ring;
    RingBarriers<kStages> q_ring;  // of dO and the statistics as well
    RingBarriers<kPStages> p_ring;
    typename Statistics::State statistics;
    Work work_k, work_v;  // beside k and v: the same barriers
  };
  static_assert(sizeof(Shared) <= kTile.shared_bytes());

  FAE_DEVICE static void produce(Shared& shared, const BackwardParams& p, const DkvLaunch& launch) {
    Ring<1> kv_at;
    Ring<kStages> q_at;
    const Sizes& z = p.fwd.sizes;
    ptx::griddepcontrol_wait();  // the warpgroups touch only what comes through here
    for (int index = blockIdx.x; index < launch.order.tiles;) {
      const TileOrder::Tile item = launch.order.at(index);
      const int b = item.head / z.heads_kv, h_kv = item.head - b * z.heads_kv, n = item.m, group = z.heads_per_kv();
      const Range tiles = query_tiles<kM>(p.fwd.mask(b), n * kN, n * kN + kN);
      shared.k_ring.wait_empty(kv_at, "k_empty");
      shared.work_k = {n, b, h_kv};
      ptx::mbarrier_arrive_expect_tx(shared.k_ring.full_address(0), kTile.kv_bytes());
      load_panels<kPanels, kN>(shared.k[0], &launch.k, shared.k_ring.full_address(0), n * kN, h_kv, b);
      shared.v_ring.wait_empty(kv_at, "v_empty");
      shared.work_v = {n, b, h_kv};
      ptx::mbarrier_arrive_expect_tx(shared.v_ring.full_address(0), kTile.kv_bytes());
      load_panels<kPanels, kN>(shared.v[0], &launch.v, shared.v_ring.full_address(0), n * kN, h_kv, b);
      kv_at.advance();
      for (int h = h_kv * group; h < (h_kv + 1) * group; ++h) {
        const int head = (b * z.heads + h) * launch.m_tiles;
        for (int m = tiles.begin; m < tiles.end; ++m) {
          shared.q_ring.wait_empty(q_at, "q_empty");
          const uint32_t full = shared.q_ring.full_address(q_at.stage);
          ptx::mbarrier_expect_tx(full, 2 * kTile.q_bytes() + 2 * kM * sizeof(float));
          load_panels<kPanels, kM>(shared.q[q_at.stage], &launch.q, full, m * kM, h, b);
          load_panels<kPanels, kM>(shared.dout[q_at.stage], &launch.dout, full, m * kM, h, b);
          load_statistics<kM>(shared.stats[q_at.stage], full, launch, head + m);
          q_at.advance();
        }
      }
      index = gridDim.x + atomicAdd(launch.next_tile, 1);
    }
    ptx::griddepcontrol_launch_dependents();
    shared.k_ring.wait_empty(kv_at, "k_empty");
    shared.work_k.n = -1;
    ptx::mbarrier_arrive(shared.k_ring.full_address(0));
    shared.v_ring.wait_empty(kv_at, "v_empty");
    shared.work_v.n = -1;
    ptx::mbarrier_arrive(shared.v_ring.full_address(0));
  }

  template <bool kOfV>
  struct Consumer {
    Shared& shared;
    const BackwardParams& p;
    const DkvLaunch& launch;
    const int warp, lane;  // of the warpgroup
    Ring<1> kv_at{};
    Ring<kStages> q_at{};
    Ring<kPStages> p_at{};

    // x = K Q^T or V dO^T.
    FAE_DEVICE void multiply_scores(Scores& x) const {
      const uint64_t a = tile::descriptor_k_major(ptx::shared_address(kOfV ? shared.k[0] : shared.v[0]));
      const uint64_t b =
          tile::descriptor_k_major(ptx::shared_address(kOfV ? shared.q[q_at.stage] : shared.dout[q_at.stage]));
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kD / 16; ++i)
        ptx::wgmma_ss<T, 0, 0>(x, a + tile::step_k_major<kN>(i), b + tile::step_k_major<kM>(i), i > 0);
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>();
    }
    FAE_DEVICE void accumulate(Gradient& g, const Packed& a, bool fresh) const {
      const uint64_t b =
          tile::descriptor_mn_major<kM>(ptx::shared_address(kOfV ? shared.dout[q_at.stage] : shared.q[q_at.stage]));
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kM / 16; ++i) ptx::wgmma_rs<T, 1>(g, a[i], b + tile::step_mn_major(i), i > 0 || !fresh);
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>();
    }

    FAE_DEVICE void hand_over(const Packed& packed) {
      shared.p_ring.wait_empty(p_at, "p_empty");
#pragma unroll
      for (int i = 0; i < kM / 16; ++i)
        shared.p[p_at.stage][i][warp * 32 + lane] = make_uint4(packed[i][0], packed[i][1], packed[i][2], packed[i][3]);
      __syncwarp();
      if (lane == 0) shared.p_ring.fill(p_at.stage);
      p_at.advance();
    }
    FAE_DEVICE void take_over(Packed& packed) {
      shared.p_ring.wait_full(p_at, "p_full");
#pragma unroll
      for (int i = 0; i < kM / 16; ++i) {
        const uint4 x = shared.p[p_at.stage][i][warp * 32 + lane];
        packed[i][0] = x.x, packed[i][1] = x.y, packed[i][2] = x.z, packed[i][3] = x.w;
      }
      __syncwarp();
      if (lane == 0) shared.p_ring.release(p_at.stage);
      p_at.advance();
    }

    FAE_DEVICE void step(Gradient& g, const IntervalMask& mask, int key, int m, bool fresh) {
      Scores x;
      Packed packed;
      shared.q_ring.wait_full(q_at, "q_full");
      const float* stats = shared.stats[q_at.stage] + (kOfV ? 0 : kM) + 2 * (lane % 4);
      multiply_scores(x);
      if constexpr (kOfV) {
        const int row = m * kM;
        if (!mask.tile_is_full(row, min(row + kM, mask.seqlen_q), key, key + kN))
          tile::mask_scores_transposed(x, mask, key + warp * kRowsPerWarp, row, lane);
#pragma unroll
        for (int i = 0; i < kM / 8; ++i) {
          const float2 lse = *reinterpret_cast<const float2*>(stats + 8 * i);
#pragma unroll
          for (int half = 0; half < 2; ++half)
            packed[i / 2][2 * (i % 2) + half] =
                tile::Mma<T>::pack(ptx::ex2_approx(fmaf(x[i][2 * half], launch.scale_log2, -lse.x)),
                                   ptx::ex2_approx(fmaf(x[i][2 * half + 1], launch.scale_log2, -lse.y)));
        }
        hand_over(packed);
      } else {
        take_over(packed);
#pragma unroll
        for (int i = 0; i < kM / 8; ++i) {
          const float2 delta = *reinterpret_cast<const float2*>(stats + 8 * i);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            uint32_t& pair = packed[i / 2][2 * (i % 2) + half];
            const float2 probability = tile::Mma<T>::unpack_pair(pair);
            pair = tile::Mma<T>::pack(probability.x * (x[i][2 * half] - delta.x),
                                      probability.y * (x[i][2 * half + 1] - delta.y));
          }
        }
      }
      accumulate(g, packed, fresh);
      if (lane == 0) shared.q_ring.release(q_at.stage);
      q_at.advance();
    }

    FAE_DEVICE void run() {
      Gradient g;
      const RingBarriers<1>& kv_ring = kOfV ? shared.k_ring : shared.v_ring;
      for (;; kv_at.advance()) {
        kv_ring.wait_full(kv_at, "kv_full");
        const Work work = kOfV ? shared.work_k : shared.work_v;
        if (work.n < 0) break;
        const IntervalMask mask = p.fwd.mask(work.b);
        const int key = work.n * kN, group = p.fwd.sizes.heads_per_kv();
        const Range tiles = query_tiles<kM>(mask, key, key + kN);
        bool fresh = true;
        for (int g_head = 0; g_head < group; ++g_head) {
          for (int m = tiles.begin; m < tiles.end; ++m) {
            step(g, mask, key, m, fresh);
            fresh = false;
          }
        }
        __syncwarp();
        if (lane == 0) kv_ring.release(0);
        const int row = key + warp * kRowsPerWarp;
        const TensorRef& out = kOfV ? p.dv : p.dk;
        const Sizes& z = p.fwd.sizes;
        const int columns = kOfV ? z.head_dim_v : z.head_dim;
        if (fresh)
          store_zero_rows<T>(out, work.b, work.h_kv, row, z.seqlen_k, columns, lane);
        else
          store_rows<T>(g, kOfV ? 1.0f : launch.scale, out, work.b, work.h_kv, row, z.seqlen_k, columns, lane);
      }
    }
  };

  FAE_DEVICE static void init(Shared& shared) {
    shared.k_ring.init(kWarps);
    shared.v_ring.init(kWarps);
    shared.q_ring.init(2 * kWarps);
    shared.p_ring.init(kWarps, kWarps);
    shared.statistics.init();
    ptx::fence_mbarrier_init();
  }
};

template <typename T, int kRow>
__global__ void __launch_bounds__(DkvTile::kThreads, 1)
    backward_dkv_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ DkvLaunch launch) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Kernel = BackwardDkv<T, kRow>;
  auto& shared = aligned_shared<typename Kernel::Shared>();
  if (threadIdx.x == 0) {
    for (const auto* map : {&launch.q, &launch.k, &launch.v, &launch.dout}) ptx::prefetch_tensormap(map);
    Kernel::init(shared);
  }
  __syncthreads();
  // Broadcast, so that the compiler knows the branches below to be uniform.
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0), warpgroup = warp / 4;
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (warpgroup != 2) Kernel::Statistics::run_first(p, launch.statistics, lane);
  if (warpgroup == 2) {
    ptx::setmaxnreg_dec<DkvTile::kProducerRegisters>();
    if (warp % 4 == 0 && ptx::elect_one()) Kernel::produce(shared, p, launch);
    if (warp % 4 == 3) Kernel::Statistics::run(shared.statistics, shared.rows, p, launch.statistics, lane);
  } else if (warpgroup == 1) {
    ptx::setmaxnreg_inc<DkvTile::kConsumerRegisters>();
    typename Kernel::template Consumer<false>{shared, p, launch, warp % 4, lane}.run();
  } else {
    ptx::setmaxnreg_inc<DkvTile::kConsumerRegisters>();
    typename Kernel::template Consumer<true>{shared, p, launch, warp % 4, lane}.run();
  }
#else
  (void)p, (void)launch;
  __trap();
#endif
}

}  // namespace fae::sm90
