// Version-2 backward for Hopper (FlashAttention-2, Algorithm 2) with the copy engine and wgmma.
//
// One CTA per SM takes key tiles until none is left; for each it walks all query tiles that see it. One thread, the producer,
// keeps copies under way; two warpgroups own 64 keys each:
//
//     producer     K V | Q0 dO0 Q1 dO1 ... | K' V' | Q0' dO0' ...                   waits: kv_empty, q_empty
//     warpgroup    S^T = K Qj^T, dP^T = V dOj^T                                     waits: kv_full, q_full
//                  P = exp2(S - lse), dS = P (dP - delta), dS to shared memory      waits: ds_empty
//                  dV += P^T dOj, dK += dS^T Qj, dQj-1 = dSj-1 K together           waits: ds_full
//                  dQj-1 added to global memory
//
// Scores are computed transposed, keys along the rows: P^T and dS^T are then in registers what the products for dV and dK
// want as their first operand. Only dQ needs all keys of the tile, so only dS passes through shared memory. Each warpgroup
// computes half of dQ, and of the query tile before: the other one may be most of a step behind and is not waited for.
//
// dQ is summed over key tiles in global memory by fp32 reductions: in any order, into an accumulator that is cleared before
// and converted after; or in turn (dq_turns.cuh), with the same bits in every run, where the first CTA stores and the last
// converts; or apart, in another kernel. lse and delta come from a kernel before, or from a warp of this one (row_statistics.cuh).
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
#include "backward_launch.h"
#include "config.h"
#include "dq_turns.cuh"
#include "gradient_sums.cuh"
#include "row_statistics.cuh"
#include "steps.cuh"

namespace fae::sm90 {

template <typename T, int kRow, DqSum kSum>
struct Backward {
  static constexpr BackwardTile kTile = kBackwardTiles[kRow];
  static constexpr int kM = kTile.tile_m, kN = kBackwardKeys, kD = kTile.head_dim, kPanels = kTile.panels();
  static constexpr int kStages = kTile.stages, kKvBuffers = kTile.kv_buffers;
  static constexpr int kConsumerWarps = 8;
  static constexpr bool kWithDq = kSum != DqSum::kApart, kInTurn = kSum == DqSum::kInTurn;
  static constexpr bool kSplitRows = kM == 128;  // of dQ, between the warpgroups; else its columns
  // Against waiting, where it gains: shared memory is read beside the products, which leave it little bandwidth; exponentials
  // precede the wait for dP (ptxas moves them behind it, but not over another wait's loop); dQ's address is carried along.
  static constexpr bool kAnyOrder = kSum == DqSum::kAnyOrder, kExponentialsFirst = kAnyOrder || (kInTurn && kD > 96);
  static constexpr bool kReadsEarly = kAnyOrder || kM == 64, kCarriesAddress = kAnyOrder || (kInTurn && kM == 64);

  using Scores = float[kM / 8][4];
  using Packed = uint32_t[kM / 16][4];  // A fragments
  using Gradient = float[kD / 8][4];
  using Work = KeyTile;
  using Statistics = RowStatistics<T, kM, kD>;

  struct Shared {
    uint8_t k[kKvBuffers][kTile.kv_bytes()];
    uint8_t v[kKvBuffers][kTile.kv_bytes()];
    uint8_t q[kStages][kTile.q_bytes()];
    uint8_t dout[kStages][kTile.q_bytes()];
    typename Statistics::Pieces rows;          // of O and dO
    uint8_t ds[kStages][kTile.ds_bytes()];     // [panel of 64 queries][keys][64 queries]
    alignas(16) float stats[kStages][2 * kM];  // lse in base 2, delta
    RingBarriers<kKvBuffers> kv_ring;
    RingBarriers<kStages> q_ring;  // of dO and the statistics as well
    RingBarriers<kStages> ds_ring;
    TurnBarriers<kStages> dq_turns;
    typename Statistics::State statistics;
    Work work[kKvBuffers];    // beside k and v: the same barriers
    Place place[kKvBuffers];  // in turn: known when the first turn comes
  };
  static_assert(sizeof(Shared) <= kTile.shared_bytes());

  // ---- producer: one thread ----

  FAE_DEVICE static void produce(Shared& shared, const BackwardParams& p, const BackwardLaunch& launch) {
    Ring<kKvBuffers> kv_at;
    Ring<kStages> q_at;
    const Sizes& z = p.fwd.sizes;
    ptx::griddepcontrol_wait();  // the warpgroups touch only what comes through here
    // Who waits for a turn waits for CTAs that drew before: if all tiles are drawn, those are surely running.
    for (int index = kInTurn ? atomicAdd(launch.next_tile, 1) : blockIdx.x; index < launch.order.tiles;) {
      const TileOrder::Tile item = launch.order.at(index);
      const int b = item.head / z.heads_kv, h_kv = item.head - b * z.heads_kv, n = item.m;
      const Range heads = launch.heads<kAnyOrder>(h_kv, item.split, z.heads_per_kv());
      const int flip = kInTurn && item.turned ? -1 : 0;
      const Range walk =
          positions(part_of(query_tiles<kM>(p.fwd.mask(b), n * kN, n * kN + kN), item.split, launch.log2_splits), flip);
      shared.kv_ring.wait_empty(kv_at, "kv_empty");
      shared.work[kv_at.stage] = {n, b, h_kv, heads, item.split, flip, walk};
      for (int w = 0, key = n * kN; w < 2; ++w, key += kRowsPerWarpgroup)
        shared.work[kv_at.stage].full[w] =
            positions(full_query_tiles<kM>(p.fwd.mask(b), key, key + kRowsPerWarpgroup), flip);
      const uint32_t kv_full = shared.kv_ring.full_address(kv_at.stage);
      ptx::mbarrier_arrive_expect_tx(kv_full, 2 * kTile.kv_bytes());
      load_panels<kPanels, kN>(shared.k[kv_at.stage], &launch.k, kv_full, n * kN, h_kv, b);
      load_panels<kPanels, kN>(shared.v[kv_at.stage], &launch.v, kv_full, n * kN, h_kv, b);
      kv_at.advance();
      for (int h = heads.begin; h < heads.end; ++h) {
        const int head = (b * z.heads + h) * launch.m_tiles;
        for (int i = walk.begin; i < walk.end; ++i) {
          const int m = query_tile(i, flip);
          shared.q_ring.wait_empty(q_at, "q_empty");
          const uint32_t full = shared.q_ring.full_address(q_at.stage);
          ptx::mbarrier_expect_tx(full, 2 * kTile.q_bytes() + 2 * kM * sizeof(float));
          load_panels<kPanels, kM>(shared.q[q_at.stage], &launch.q, full, m * kM, h, b);
          load_panels<kPanels, kM>(shared.dout[q_at.stage], &launch.dout, full, m * kM, h, b);
          load_statistics<kM>(shared.stats[q_at.stage], full, launch, head + m);
          q_at.advance();
        }
      }
      index = (kInTurn ? 0 : gridDim.x) + atomicAdd(launch.next_tile, 1);
    }
    ptx::griddepcontrol_launch_dependents();
    shared.kv_ring.wait_empty(kv_at, "kv_empty");
    shared.work[kv_at.stage].n = -1;
    ptx::mbarrier_arrive(shared.kv_ring.full_address(kv_at.stage));
  }

  // ---- warpgroups ----

  // A query tile whose dQ is still to be added to: its product comes with the next step.
  struct Owed {
    int h, at;             // `at`: the position of its walk, see dq_turns.cuh
    SumPlace<kInTurn> dq;  // this lane's, if kCarriesAddress
  };

  template <int kDqColumns>
  struct Consumer {
    Shared& shared;
    const BackwardParams& p;
    const BackwardLaunch& launch;
    const int warpgroup, warp, lane;  // warp of the warpgroup
    Ring<kKvBuffers> kv_at{};
    Ring<kStages> at{};  // of Q and of dS

    using Dq = float[kDqColumns / 8][4];

    FAE_DEVICE DqSums<T, Backward, kDqColumns> sums() const {
      return {p, launch, shared.work[kv_at.stage].b, warpgroup, warp, lane};
    }
    FAE_DEVICE Ring<kStages> before() const {
      return {at.stage == 0 ? kStages - 1 : at.stage - 1, at.stage == 0 ? at.parity ^ 1 : at.parity};
    }

    FAE_DEVICE int flip() const { return kInTurn ? shared.work[kv_at.stage].flip : 0; }  // read again: registers
    FAE_DEVICE float* address_of(const Owed& owed) const {
      return kCarriesAddress ? owed.dq.get(launch.dq) : sums().accumulator(owed.h, query_tile(owed.at, flip()));
    }

    FAE_DEVICE uint32_t ds_rows() const {  // this warp's
      return ptx::shared_address(shared.ds[at.stage]) +
             (warpgroup * kRowsPerWarpgroup + warp * kRowsPerWarp) * tile::kPanelRowBytes;
    }
    // dS of this warp is complete in shared memory.
    FAE_DEVICE void publish_ds() const {
      ptx::fence_proxy_async_shared();
      __syncwarp();
      if (lane == 0) shared.ds_ring.fill(at.stage);
    }

    // A query tile that sees none of this warpgroup's keys: its dS is zero.
    FAE_DEVICE void skip() const {
      if constexpr (kWithDq) {
        shared.ds_ring.wait_empty(at, "ds_empty");
        const uint32_t rows = ds_rows(), zeros[4] = {0, 0, 0, 0};
#pragma unroll
        for (int panel = 0; panel < kM / 64; ++panel) {
#pragma unroll
          for (int i = 0; i < kRowsPerWarp / 4; ++i)
            ptx::st_shared_v4(
                rows + panel * tile::panel_bytes(kN) + (4 * i + lane / 8) * tile::kPanelRowBytes + lane % 8 * 16,
                zeros);
        }
        publish_ds();
      }
      shared.q_ring.wait_full(at, "q_full of a tile skipped");
      __syncwarp();
      if (lane == 0) shared.q_ring.release(at.stage);
    }

    // This warpgroup's half of dQ: 64 of 128 rows, or one of two panels of columns. dS^T [keys][queries] and K
    // [keys][columns] both have the keys along the rows.
    FAE_DEVICE void multiply_dq(Dq& dq, int stage) const {
      uint32_t ds = ptx::shared_address(shared.ds[stage]), k = ptx::shared_address(shared.k[kv_at.stage]);
      (kSplitRows ? ds : k) += warpgroup * tile::panel_bytes(kN);
#pragma unroll
      for (int i = 0; i < kN / 16; ++i)
        ptx::wgmma_ss<T, 1, 1>(dq, tile::descriptor_mn_major<kN>(ds) + tile::step_mn_major(i),
                               tile::descriptor_mn_major<kN>(k) + tile::step_mn_major(i), i > 0);
    }
    FAE_DEVICE void settle(const Owed& owed) const {
      const Ring<kStages> then = before();
      Dq dq;
      shared.ds_ring.wait_full(then, "ds_full");
      ptx::wgmma_fence();
      multiply_dq(dq, then.stage);
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>();
      if (lane == 0) shared.ds_ring.release(then.stage);
      if constexpr (kInTurn) {
        if (!begin_turn(dq, owed, then)) finish_turn(dq, owed, then);
      } else {
        sums().add(dq, address_of(owed));
      }
    }

    template <bool kOwes>
    FAE_DEVICE void step(Gradient& dk, Gradient& dv, int position, bool fresh, const Owed& owed) const {
      Scores s, dp;
      shared.q_ring.wait_full(at, "q_full");
      const uint32_t q = ptx::shared_address(shared.q[at.stage]), dout = ptx::shared_address(shared.dout[at.stage]);
      {
        const uint32_t rows = warpgroup * tile::panel_bytes(kRowsPerWarpgroup);
        const uint64_t k = tile::descriptor_k_major(ptx::shared_address(shared.k[kv_at.stage]) + rows);
        const uint64_t v = tile::descriptor_k_major(ptx::shared_address(shared.v[kv_at.stage]) + rows);
        ptx::wgmma_fence();
#pragma unroll
        for (int i = 0; i < kD / 16; ++i)
          ptx::wgmma_ss<T, 0, 0>(s, k + tile::step_k_major<kN>(i),
                                 tile::descriptor_k_major(q) + tile::step_k_major<kM>(i), i > 0);
        ptx::wgmma_commit_group();
#pragma unroll
        for (int i = 0; i < kD / 16; ++i)
          ptx::wgmma_ss<T, 0, 0>(dp, v + tile::step_k_major<kN>(i),
                                 tile::descriptor_k_major(dout) + tile::step_k_major<kM>(i), i > 0);
        ptx::wgmma_commit_group();
      }
      const float* stats = shared.stats[at.stage] + 2 * (lane % 4);
      float2 lse[kM / 8], delta[kM / 8];
      bool full = true;
      const auto read_lse = [&] {
#pragma unroll
        for (int i = 0; i < kM / 8; ++i) lse[i] = *reinterpret_cast<const float2*>(stats + 8 * i);
        const Range unmasked = shared.work[kv_at.stage].full[warpgroup];
        full = position >= unmasked.begin && position < unmasked.end;
      };
      const auto read_delta = [&] {
#pragma unroll
        for (int i = 0; i < kM / 8; ++i) delta[i] = *reinterpret_cast<const float2*>(stats + kM + 8 * i);
      };
      if constexpr (kReadsEarly) read_lse();
      ptx::wgmma_wait_group<1>();
      if constexpr (!kReadsEarly) read_lse();
      if (!full) {
        const Work& work = shared.work[kv_at.stage];
        const int key = work.n * kN + warpgroup * kRowsPerWarpgroup + warp * kRowsPerWarp;
        tile::mask_scores_transposed(s, p.fwd.mask(work.b), key, query_tile(position, flip()) * kM, lane);
      }
#pragma unroll
      for (int i = 0; i < kM / 8; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          s[i][2 * half] = ptx::ex2_approx(fmaf(s[i][2 * half], launch.scale_log2, -lse[i].x));
          s[i][2 * half + 1] = ptx::ex2_approx(fmaf(s[i][2 * half + 1], launch.scale_log2, -lse[i].y));
        }
      }
      if constexpr (kExponentialsFirst) {
        shared.ds_ring.wait_empty(at, "ds_empty");
        read_delta();
      }
      ptx::wgmma_wait_group<0>();
      if constexpr (!kExponentialsFirst) read_delta();
      // P is packed no sooner than dS: until then it is needed in full.
      Packed packed_p, packed_ds;
#pragma unroll
      for (int i = 0; i < kM / 8; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float x = s[i][2 * half], y = s[i][2 * half + 1];
          packed_ds[i / 2][2 * (i % 2) + half] =
              tile::Mma<T>::pack(x * (dp[i][2 * half] - delta[i].x), y * (dp[i][2 * half + 1] - delta[i].y));
          packed_p[i / 2][2 * (i % 2) + half] = tile::Mma<T>::pack(x, y);
        }
      }
      if constexpr (kWithDq) {
        if constexpr (!kExponentialsFirst) shared.ds_ring.wait_empty(at, "ds_empty");
        const uint32_t rows = ds_rows();
#pragma unroll
        for (int i = 0; i < kM / 16; ++i)
          ptx::stmatrix_x4(
              rows + (i / 4) * tile::panel_bytes(kN) + tile::chunk_offset(lane % 16, 2 * i % 8 + lane / 16),
              packed_ds[i][0], packed_ds[i][1], packed_ds[i][2], packed_ds[i][3]);
        publish_ds();
      }

      const Ring<kStages> then = before();
      Dq dq;
      bool done = true;
      if constexpr (kOwes) {
        shared.ds_ring.wait_full(then, "ds_full");
        ptx::wgmma_fence();
        multiply_dq(dq, then.stage);
        ptx::wgmma_commit_group();
      }
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kM / 16; ++i)
        ptx::wgmma_rs<T, 1>(dv, packed_p[i], tile::descriptor_mn_major<kM>(dout) + tile::step_mn_major(i),
                            i > 0 || !fresh);
#pragma unroll
      for (int i = 0; i < kM / 16; ++i)
        ptx::wgmma_rs<T, 1>(dk, packed_ds[i], tile::descriptor_mn_major<kM>(q) + tile::step_mn_major(i),
                            i > 0 || !fresh);
      ptx::wgmma_commit_group();
      if constexpr (kOwes) {  // what leaves for global memory does so beside dV and dK
        ptx::wgmma_wait_group<1>();
        if (lane == 0) shared.ds_ring.release(then.stage);
        if constexpr (kInTurn)
          done = begin_turn(dq, owed, then);
        else
          sums().add(dq, address_of(owed));
      }
      ptx::wgmma_wait_group<0>();
      if (lane == 0) shared.q_ring.release(at.stage);
      if constexpr (kOwes && kInTurn) {
        if (!done) finish_turn(dq, owed, then);
      }
    }

    // What is quick is done beside the products for dV and dK, and the rest after them: it needs registers.
    FAE_DEVICE bool begin_turn(const Dq& dq, const Owed& owed, const Ring<kStages>& then) const {
      shared.dq_turns.wait(then);
      const Place place = shared.place[kv_at.stage];
      if (place.is_last(owed.at)) return false;
      if (place.is_first(owed.at))
        sums().put(dq, address_of(owed));
      else
        sums().add(dq, address_of(owed));
      end_turn(then);
      return true;
    }
    FAE_DEVICE void end_turn(const Ring<kStages>& then) const {
      __syncwarp();
      if (lane == 0) shared.dq_turns.done(then.stage);
    }
    FAE_DEVICE void finish_turn(Dq& dq, const Owed& owed, const Ring<kStages>& then) const {
      sums().finish(dq, address_of(owed), owed.h, query_tile(owed.at, flip()),
                    shared.place[kv_at.stage].is_first(owed.at));
      end_turn(then);
    }

    FAE_DEVICE void run() {
      Gradient dk, dv;
      const Sizes& z = p.fwd.sizes;
      for (;; kv_at.advance()) {
        shared.kv_ring.wait_full(kv_at, "kv_full");
        const Work work = shared.work[kv_at.stage];
        if (work.n < 0) break;
        const int key = work.n * kN + warpgroup * kRowsPerWarpgroup;
        const Range mine = positions(query_tiles<kM>(p.fwd.mask(work.b), key, key + kRowsPerWarpgroup), flip());
        bool fresh = true, owes = false;
        Owed owed{};
        for (int h = work.heads.begin; h < work.heads.end; ++h) {
          SumPlace<kInTurn> dq{};
          if constexpr (kCarriesAddress) dq.set(launch.dq, sums().accumulator(h, query_tile(work.walk.begin, flip())));
          for (int i = work.walk.begin; i < work.walk.end; ++i) {
            if (i < mine.begin || i >= mine.end) {
              skip();
              if (owes) settle(owed);
            } else {
              if (owes)
                step<true>(dk, dv, i, fresh, owed);
              else
                step<false>(dk, dv, i, fresh, owed);
              fresh = false;
            }
            at.advance();
            owes = kWithDq;
            owed = {h, i, dq};
            if constexpr (kCarriesAddress) dq.advance((flip() == 0 ? 1 : -1) * (kM * kD));
          }
        }
        if (owes) settle(owed);
        __syncwarp();
        if (lane == 0) shared.kv_ring.release(kv_at.stage);
        const int row = key + warp * kRowsPerWarp;
        if (launch.partials != nullptr) {
          store_part<Backward>(dk, 0, fresh, p.fwd.sizes, launch, work, warpgroup * 4 + warp, lane);
          store_part<Backward>(dv, 1, fresh, p.fwd.sizes, launch, work, warpgroup * 4 + warp, lane);
        } else if (fresh) {
          store_zero_rows<T>(p.dk, work.b, work.h_kv, row, z.seqlen_k, z.head_dim, lane);
          store_zero_rows<T>(p.dv, work.b, work.h_kv, row, z.seqlen_k, z.head_dim_v, lane);
        } else {
          store_rows<T>(dv, 1.0f, p.dv, work.b, work.h_kv, row, z.seqlen_k, z.head_dim_v, lane);
          store_rows<T>(dk, launch.scale, p.dk, work.b, work.h_kv, row, z.seqlen_k, z.head_dim, lane);
        }
      }
    }
  };

  FAE_DEVICE static void init(Shared& shared) {
    shared.kv_ring.init(kConsumerWarps + (kInTurn ? 2 : 0));
    if constexpr (kInTurn) shared.dq_turns.init(kConsumerWarps);
    shared.q_ring.init(kConsumerWarps);
    shared.ds_ring.init(kConsumerWarps, kConsumerWarps);
    shared.statistics.init();
    ptx::fence_mbarrier_init();
  }
};

template <typename T, int kRow, DqSum kSum>
__global__ void __launch_bounds__(BackwardTile::kThreads, 1)
    backward_v2_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ BackwardLaunch launch) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Kernel = Backward<T, kRow, kSum>;
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
    ptx::setmaxnreg_dec<BackwardTile::kProducerRegisters>();
    if (warp % 4 == 0 && ptx::elect_one()) Kernel::produce(shared, p, launch);
    if constexpr (Kernel::kInTurn) {
      if (warp % 4 == 1 && ptx::elect_one()) await_turns<Kernel>(shared, p, launch);
      if (warp % 4 == 2 && ptx::elect_one()) pass_turns_on<Kernel>(shared, p, launch);
    }
    if (warp % 4 == 3) Kernel::Statistics::run(shared.statistics, shared.rows, p, launch.statistics, lane);
  } else {
    ptx::setmaxnreg_inc<BackwardTile::kConsumerRegisters>();
    // The second panel may be narrow. If nearly full, its last columns are computed for nothing, but by the same code.
    constexpr int kPanel = tile::kPanelColumns, kRest = Kernel::kD - (Kernel::kPanels - 1) * kPanel;
    if (kRest > kPanel / 2 || warpgroup == 0)
      typename Kernel::template Consumer<kPanel>{shared, p, launch, warpgroup, warp % 4, lane}.run();
    else
      typename Kernel::template Consumer<kRest>{shared, p, launch, warpgroup, warp % 4, lane}.run();
  }
#else
  (void)p, (void)launch;
  __trap();
#endif
}

}  // namespace fae::sm90
