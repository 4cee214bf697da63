// Version-2 forward for Hopper (FlashAttention-2, Algorithm 1) with the copy engine and wgmma.
//
// One CTA per SM takes query tiles until none is left. One thread, the producer, keeps copies of Q, K and V under way; each
// consumer warpgroup owns 64 query rows and runs on its own, so that the tensor cores work for one while others take
// exponentials:
//
//     producer    K0 Q  K1 V0 K2 V1 ... Vn | K0' Q' K1' V0' ...       waits: q_empty, k_empty, v_empty
//     consumer    S = Q K0                                            waits: q_full, k_full
//                 P = softmax(S)
//                 repeat: S = Q Kj, O += P Vj-1 together; P = softmax(S)       k_full, v_full
//                 S = Q' K0', O += P Vn together; O / l leaves; P = softmax(S) ...
//
// Keys are walked from the last to the first, so that masked tiles come first. The last P V of a tile is issued with the
// first Q K^T of the next one: neither the start nor the end of a tile leaves the tensor cores idle. A warpgroup skips key
// tiles that none of its rows sees; it then still waits for them and releases them, so that every barrier counts alike.
// At most `stages` tiles may be skipped between two products: the V that is still awaited holds one place of the ring.
//
// Registers of a consumer thread: scores tile_n / 2, P tile_n / 4, O head_dim / 2.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../../core/params.h"
#include "../ptx/barrier.cuh"
#include "../ptx/control.cuh"
#include "../ptx/tma.cuh"
#include "../ptx/wgmma.cuh"
#include "../ptx/wgmma_sync.cuh"
#include "../tile/mask.cuh"
#include "../tile/online_softmax.cuh"
#include "../tile/quad.cuh"
#include "../tile/wgmma_tile.cuh"
#include "config.h"
#include "forward_launch.h"
#include "pipeline.cuh"
#include "steps.cuh"

namespace fae::sm90 {

template <typename T, int kRow>
struct Forward {
  static constexpr ForwardTile kTile = kForwardTiles[kRow];
  static constexpr int kM = kTile.tile_m(), kN = kTile.tile_n, kD = kTile.head_dim, kPanels = kTile.panels();
  static constexpr int kStages = kTile.stages, kQBuffers = kTile.q_buffers;
  static constexpr int kConsumerWarps = 4 * kTile.warpgroups;
  static constexpr bool kThroughQ = kQBuffers == 2;  // O leaves through shared memory

  using Softmax = tile::OnlineSoftmax<T, kN / 8>;
  using Output = float[kD / 8][4];

  struct Work {  // a query tile
    int row;     // its first; -1: there are no more tiles
    int b, h, split;
  };

  struct Shared {
    uint8_t q[kQBuffers][kTile.q_bytes()];
    uint8_t k[kStages][kTile.kv_bytes()];
    uint8_t v[kStages][kTile.kv_bytes()];
    RingBarriers<kQBuffers> q_ring;
    RingBarriers<kStages> k_ring, v_ring;
    Work work[kQBuffers];  // beside q: the same barriers
  };
  static_assert(sizeof(Shared) + tile::kPanelAlignment <= kTile.shared_bytes());

  // The key tiles of a split that rows [row, end) see.
  FAE_DEVICE static Range key_tiles(const IntervalMask& mask, int row, int end, int split, int split_tiles) {
    const Range seen = sm90::key_tiles<kN>(mask, row, end);
    const int first = split * split_tiles;
    const Range tiles = {max(seen.begin, first), min(seen.end, first + split_tiles)};
    return tiles.empty() ? Range{0, 0} : tiles;
  }

  // ---- producer: one thread ----

  FAE_DEVICE static void load(const RingBarriers<kStages>& ring, Ring<kStages>& at,
                              uint8_t (*buffers)[kTile.kv_bytes()], const CUtensorMap* map, const char* name, int key,
                              int h, int b) {
    ring.wait_empty(at, name);
    const uint32_t full = ring.full_address(at.stage);
    ptx::mbarrier_arrive_expect_tx(full, kTile.kv_bytes());
    load_panels<kPanels, kN>(buffers[at.stage], map, full, key, h, b);
    at.advance();
  }

  struct Tile {
    Work work;
    int h_kv;
    Range keys;  // tiles
  };
  FAE_DEVICE static Tile tile_at(const AttentionParams& p, const ForwardLaunch& launch, int index) {
    const TileOrder::Tile tile = launch.order.at(index);
    const int row = tile.m * kM, b = tile.head / p.sizes.heads, h = tile.head - b * p.sizes.heads;
    return {{row, b, h, tile.split},
            p.sizes.kv_head(h),
            key_tiles(p.mask(b), row, row + kM, tile.split, launch.split_tiles)};
  }

  FAE_DEVICE static void produce(Shared& shared, const AttentionParams& p, const ForwardLaunch& launch) {
    Ring<kQBuffers> q_at;
    Ring<kStages> k_at, v_at;
    // For the counter, and for whoever writes Q, K and V; the consumers wait for copies alone.
    ptx::griddepcontrol_wait();
    for (int index = blockIdx.x; index < launch.order.tiles;) {
      const Tile tile = tile_at(p, launch, index);
      const Range tiles = tile.keys;
      // The first keys find room before Q does, where Q has one buffer.
      if (!tiles.empty())
        load(shared.k_ring, k_at, shared.k, &launch.k, "k_empty", (tiles.end - 1) * kN, tile.h_kv, tile.work.b);
      shared.q_ring.wait_empty(q_at, "q_empty");
      shared.work[q_at.stage] = tile.work;
      const uint32_t q_full = shared.q_ring.full_address(q_at.stage);
      ptx::mbarrier_arrive_expect_tx(q_full, kTile.q_bytes());
      load_panels<kPanels, kM>(shared.q[q_at.stage], &launch.q, q_full, tile.work.row, tile.work.h, tile.work.b);
      q_at.advance();

      for (int j = tiles.end - 1; j >= tiles.begin; --j) {  // K runs one tile ahead of V
        if (j > tiles.begin)
          load(shared.k_ring, k_at, shared.k, &launch.k, "k_empty", (j - 1) * kN, tile.h_kv, tile.work.b);
        load(shared.v_ring, v_at, shared.v, &launch.v, "v_empty", j * kN, tile.h_kv, tile.work.b);
        if (launch.draws_early && j == tiles.end - 1) index = gridDim.x + atomicAdd(launch.next_tile, 1);
      }
      // Drawn when all copies are under way and not before: a CTA that is ahead should get it.
      if (!launch.draws_early || tiles.empty()) index = gridDim.x + atomicAdd(launch.next_tile, 1);
    }
    ptx::griddepcontrol_launch_dependents();
    shared.q_ring.wait_empty(q_at, "q_empty");
    shared.work[q_at.stage].row = -1;
    ptx::mbarrier_arrive(shared.q_ring.full_address(q_at.stage));
  }

  // ---- consumers: warpgroups ----

  FAE_DEVICE static void score(typename Softmax::Scores& s, uint64_t q, uint64_t k) {
#pragma unroll
    for (int i = 0; i < kD / 16; ++i)
      ptx::wgmma_ss<T, 0, 0>(s, q + tile::step_k_major<kM>(i), k + tile::step_k_major<kN>(i), i > 0);
  }
  FAE_DEVICE static void accumulate(Output& o, const typename Softmax::Probabilities& p, uint64_t v, bool fresh) {
#pragma unroll
    for (int i = 0; i < kN / 16; ++i) ptx::wgmma_rs<T, 1>(o, p[i], v + tile::step_mn_major(i), i > 0 || !fresh);
  }

  struct Consumer {
    Shared& shared;
    const AttentionParams& p;
    const ForwardLaunch& launch;
    const int warpgroup, warp, lane;  // warp of the warpgroup
    Ring<kQBuffers> q_at{};
    Ring<kStages> k_at{}, v_at{};
    bool owes = false;       // the last P V of the tile before is still to come
    bool fresh = true;       // O holds nothing yet of the tile that it is for
    Work current{}, owed{};  // this tile and that one: copies, where Q is released before its tile is finished

    FAE_DEVICE void release(const RingBarriers<kStages>& ring, int stage) const {
      if (lane == 0) ring.release(stage);
    }
    FAE_DEVICE void release_q(int stage) const {
      __syncwarp();
      if (lane == 0) shared.q_ring.release(stage);
    }
    FAE_DEVICE void skip(const RingBarriers<kStages>& ring, Ring<kStages>& at, const char* name) const {
      ring.wait_full(at, name);
      __syncwarp();  // lane 0 releases for all
      release(ring, at.stage);
      at.advance();
    }
    // Key tiles that follow the last one that this warpgroup needs.
    FAE_DEVICE void skip_rest(int count) {
      for (; count > 0; --count) {
        skip(shared.k_ring, k_at, "k_full of a tile skipped");
        skip(shared.v_ring, v_at, "v_full of a tile skipped");
      }
    }
    FAE_DEVICE void mask_tile(typename Softmax::Scores& s, int row, int j) const {
      const int b = kThroughQ ? shared.work[q_at.stage].b : current.b;
      tile::mask_scores(s, p.mask(b), row + warp * kRowsPerWarp, j * kN, lane);
    }
    FAE_DEVICE uint64_t v_descriptor() const {
      return tile::descriptor_mn_major<kN>(ptx::shared_address(shared.v[v_at.stage]));
    }

    FAE_DEVICE Work work_at(int q_stage) const {
      Work work = shared.work[q_stage];
      work.row += warpgroup * kRowsPerWarpgroup + warp * kRowsPerWarp;  // this warp's
      return work;
    }

    FAE_DEVICE int64_t partial_row(const Work& work, int row) const {
      const int64_t heads = p.sizes.batch * p.sizes.heads, head = int64_t{work.b} * p.sizes.heads + work.h;
      return (work.split * heads + head) * p.sizes.seqlen_q + row;
    }
    FAE_DEVICE float* lse_of(const Work& work, int row) const {
      return launch.partial_o != nullptr ? launch.partial_lse + partial_row(work, row)
                                         : p.lse.row<float>(work.b, work.h, row);
    }

    // The Q buffer from which O left may be filled again.
    FAE_DEVICE void finish_store(int q_stage) const {
      if (!kThroughQ || lane != 0) return;
      ptx::cp_async_bulk_wait_group_read<0>();
      shared.q_ring.release(q_stage);
    }

    // O / l and lse of the tile with Q in `q_stage`; its last Q K^T is complete.
    FAE_DEVICE void write(Output& o, const Softmax& softmax_state, int q_stage) const {
      const Work done = kThroughQ ? work_at(q_stage) : owed;
      float inverse[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float l_i = tile::quad_sum(softmax_state.l_i[half]);
        inverse[half] = softmax<float>::inverse_sum(l_i);
        const int row = done.row + lane / 4 + 8 * half;
        if (lane % 4 == 0 && row < p.sizes.seqlen_q)
          *lse_of(done, row) = softmax<float>::lse(softmax_state.m_i[half], l_i);
      }
      if (launch.partial_o != nullptr) return store_partial(o, inverse, done);
      uint32_t packed[kD / 8][2];
#pragma unroll
      for (int i = 0; i < kD / 8; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          packed[i][half] = tile::Mma<T>::pack(o[i][2 * half] * inverse[half], o[i][2 * half + 1] * inverse[half]);
      }
      if constexpr (kThroughQ)
        store_through_q(packed, done, q_stage);
      else
        store(packed, done);
    }

    FAE_DEVICE void store_through_q(const uint32_t (&packed)[kD / 8][2], const Work& done, int q_stage) const {
      // A warp's part of Q may be read by the products of its whole warpgroup, which each warp has awaited for itself.
      ptx::bar_sync(1 + warpgroup, kWarpgroup);
      const int first = warpgroup * kRowsPerWarpgroup + warp * kRowsPerWarp, r = lane % 16;
      const uint32_t q = ptx::shared_address(shared.q[q_stage]) + first * tile::kPanelRowBytes;
#pragma unroll
      for (int i = 0; i < kD / 8; i += 2) {
        const uint32_t to = q + (i / 8) * tile::panel_bytes(kM) + tile::chunk_offset(r, i % 8 + lane / 16);
        ptx::stmatrix_x4(to, packed[i][0], packed[i][1], packed[i + 1][0], packed[i + 1][1]);
      }
      ptx::fence_proxy_async_shared();
      __syncwarp();
      if (lane == 0) {
#pragma unroll
        for (int i = 0; i < kPanels; ++i)
          ptx::cp_async_bulk_tensor_4d_store(&launch.o, q + i * tile::panel_bytes(kM), i * tile::kPanelColumns,
                                             done.row, done.h, done.b);
        ptx::cp_async_bulk_commit_group();
      }
    }

    // Straight to global memory: the four lanes of a quad exchange their pieces, so that each has 16 bytes of a row.
    FAE_DEVICE void store(const uint32_t (&packed)[kD / 8][2], const Work& done) const {
      const int t = lane % 4;
#pragma unroll
      for (int i = 0; i < kD / 8; i += 4) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t x[4] = {packed[i][half], packed[i + 1][half], packed[i + 2][half], packed[i + 3][half]};
          tile::transpose_quad(x, t);
          const int row = done.row + lane / 4 + 8 * half, column = 8 * (i + t);
          if (row < p.sizes.seqlen_q && column < p.sizes.head_dim_v)
            *reinterpret_cast<uint4*>(p.o.row<T>(done.b, done.h, row) + column) = make_uint4(x[0], x[1], x[2], x[3]);
        }
      }
    }

    // fp32, for the kernel that merges the splits.
    FAE_DEVICE void store_partial(const Output& o, const float (&inverse)[2], const Work& done) const {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = done.row + lane / 4 + 8 * half;
        if (row >= p.sizes.seqlen_q) continue;
        float* out = launch.partial_o + partial_row(done, row) * p.sizes.head_dim_v + 2 * (lane % 4);
#pragma unroll
        for (int i = 0; i < kD / 8; ++i) {
          if (8 * i < p.sizes.head_dim_v)
            *reinterpret_cast<float2*>(out + 8 * i) =
                make_float2(o[i][2 * half] * inverse[half], o[i][2 * half + 1] * inverse[half]);
        }
      }
    }

    // Rows that see no key. Of a split it is enough to say so.
    FAE_DEVICE void write_empty(const Work& work) const {
      for (int r = 0; r < kRowsPerWarp; ++r) {
        const int row = work.row + r;
        if (row >= p.sizes.seqlen_q) break;
        if (lane == 0) *lse_of(work, row) = softmax<float>::neg_inf();
        if (launch.partial_o != nullptr) continue;
        T* out = p.o.row<T>(work.b, work.h, row);
        for (int d = lane; d < p.sizes.head_dim_v; d += 32) out[d] = tile::from_float<T>(0.0f);
      }
    }

    // The last P V of the tile that is owed, with nothing beside it.
    FAE_DEVICE void settle(Output& o, const typename Softmax::Probabilities& probabilities, const Softmax& state,
                           int q_stage) {
      shared.v_ring.wait_full(v_at, "v_full");
      ptx::wgmma_fence();
      accumulate(o, probabilities, v_descriptor(), fresh);
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>();
      release(shared.v_ring, v_at.stage);
      v_at.advance();
      write(o, state, q_stage);
      finish_store(q_stage);
      owes = false;
    }

    FAE_DEVICE void run() {
      Output o;
      typename Softmax::Scores s;
      typename Softmax::Probabilities probabilities;
      Softmax state;
      for (;; q_at.advance()) {
        shared.q_ring.wait_full(q_at, "q_full");
        const int first_row = shared.work[q_at.stage].row, before = kQBuffers - 1 - q_at.stage;
        if (first_row < 0) break;
        const int row = first_row + warpgroup * kRowsPerWarpgroup;
        if (!kThroughQ) current = work_at(q_at.stage);
        Range all, tiles, full;  // key tiles: of the CTA, of this warpgroup, and those of them that need no mask
        {
          const IntervalMask mask = p.mask(shared.work[q_at.stage].b);
          const int split = shared.work[q_at.stage].split;
          all = key_tiles(mask, first_row, first_row + kM, split, launch.split_tiles);
          tiles = key_tiles(mask, row, row + kRowsPerWarpgroup, split, launch.split_tiles);
          const int last = min(row + kRowsPerWarpgroup, mask.seqlen_q) - 1;
          full = {(mask.begin(last) + kN - 1) / kN, mask.end(row) / kN};
        }
        if (tiles.empty()) {
          if (owes) settle(o, probabilities, state, before);
          skip_rest(all.size());
          write_empty(work_at(q_at.stage));
          release_q(q_at.stage);
          continue;
        }
        const uint64_t q = tile::descriptor_k_major(ptx::shared_address(shared.q[q_at.stage]) +
                                                    warpgroup * tile::panel_bytes(kRowsPerWarpgroup));
        for (int n = all.end - tiles.end; n > 0; --n) skip(shared.k_ring, k_at, "k_full of a tile skipped");

        for (int j = tiles.end - 1; j >= tiles.begin; --j) {
          const bool first = j == tiles.end - 1;
          shared.k_ring.wait_full(k_at, "k_full");
          const uint64_t k = tile::descriptor_k_major(ptx::shared_address(shared.k[k_at.stage]));
          if (first && !owes) {
            ptx::wgmma_fence();
            score(s, q, k);
            ptx::wgmma_commit_group();
            ptx::wgmma_wait_group<0>();
          } else {
            ptx::wgmma_fence();
            score(s, q, k);
            ptx::wgmma_commit_group();
            shared.v_ring.wait_full(v_at, "v_full");
            ptx::wgmma_fence();
            accumulate(o, probabilities, v_descriptor(), fresh);
            ptx::wgmma_commit_group();
            ptx::wgmma_wait_group<0>();
            release(shared.v_ring, v_at.stage);
            v_at.advance();
            fresh = false;
          }
          release(shared.k_ring, k_at.stage);
          k_at.advance();
          if (!kThroughQ && j == tiles.begin) release_q(q_at.stage);

          const bool masked = j < full.begin || j >= full.end;
          if (masked && !first) {
            mask_tile(s, row, j);
            state.template update<false>(probabilities, s, launch.scale_log2, o);
          } else if (first) {
            if (owes) write(o, state, before);
            fresh = true;
            if (masked) mask_tile(s, row, j);
            state.template update<true>(probabilities, s, launch.scale_log2, o);
            if (owes) finish_store(before);
            for (int n = all.end - tiles.end; n > 0; --n) skip(shared.v_ring, v_at, "v_full of a tile skipped");
          } else if (!state.try_update(probabilities, s, launch.scale_log2)) {
            state.template update<false>(probabilities, s, launch.scale_log2, o);
          }
        }
        if (!kThroughQ) owed = current;
        owes = true;
        if (tiles.begin > all.begin) {
          settle(o, probabilities, state, q_at.stage);
          skip_rest(tiles.begin - all.begin);
        }
      }
      if (owes) settle(o, probabilities, state, kQBuffers - 1 - q_at.stage);
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
__global__ void __launch_bounds__(kForwardTiles[kRow].threads(), 1)
    forward_v2_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ ForwardLaunch launch) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Kernel = Forward<T, kRow>;
  constexpr ForwardTile kTile = Kernel::kTile;
  extern __shared__ uint8_t bytes[];
  const uint32_t misaligned = ptx::shared_address(bytes) % tile::kPanelAlignment;
  auto& shared =
      *reinterpret_cast<typename Kernel::Shared*>(bytes + (misaligned == 0 ? 0 : tile::kPanelAlignment - misaligned));
  if (threadIdx.x == 0) {
    ptx::prefetch_tensormap(&launch.q);
    ptx::prefetch_tensormap(&launch.k);
    ptx::prefetch_tensormap(&launch.v);
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
