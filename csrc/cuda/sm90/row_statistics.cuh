// delta = rowsum(dO * O) - dlse (FlashAttention-2, Algorithm 2, line 4) and lse in base 2, in the kernel that wants them. A kernel
// before it would leave the tensor cores idle for as long as it reads O and dO.
//
//     warpgroups   sum the rows of the query tiles that are wanted first, 16 rows a warp and turn; then they multiply
//     one warp     sums the rows of all other query tiles while they do
//     producer     waits for a query tile's word before it fetches its statistics
//
// Query tiles are drawn in the order in which key tiles want them. Who has drawn one waits for nobody, so every word comes, however
// few CTAs run. Where dQ is added to in any order, its accumulator is cleared here too, before the word is set.
//
// The one warp is of the producer's warpgroup and has 24 registers a thread. So rows come in small boxes by the copy engine, whose
// addresses are in a tensor map, and wait for their turn in a ring in shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../../core/params.h"
#include "../../core/softmax.h"
#include "../ptx/control.cuh"
#include "../ptx/global_memory.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/shared_memory.cuh"
#include "../ptx/tma.cuh"
#include "../tile/mma.cuh"
#include "config.h"
#include "steps.cuh"
#include "tensor_map.h"
#include "tile_order.h"

namespace fae::sm90 {

struct StatisticsLaunch {
  CUtensorMap o, dout;  // in boxes of statistics_rows and _columns
  TileOrder order;      // of the query tiles of all query heads
  int m_tiles;          // of a head
  int first_tiles;      // so many are the warpgroups'
  bool paired;          // a key tile begins with an even query tile: those come first
  int* counters;        // from which parts of the first tiles are drawn, and all other tiles; 0 at the start
  int* ready;    // [batch * heads][m_tiles]: 16-row parts done, 0 at the start; nullptr: a kernel before has done all
  float* stats;  // [batch * heads][m_tiles][lse in base 2, delta][tile_m]
  float* accumulator;  // of dQ, to be cleared; nullptr: not
};

// The producer's thread: starts the copy of the statistics of query tile `tile` of all once they are there, and only then arrives,
// so that whoever waits for the copy may touch what was cleared with them.
template <int kM, typename Launch>
FAE_DEVICE void load_statistics(float (&to)[2 * kM], uint32_t full, const Launch& launch, int tile) {
  const int* const ready = launch.statistics.ready;
  if (ready != nullptr) {
    ptx::wait_long_acquire(ready + tile, kM / kRowsPerWarp, "statistics");
    ptx::fence_proxy_async_global();  // written by ordinary stores, read by the copy engine
  }
  ptx::cp_async_bulk_load(ptx::shared_address(to), launch.stats + int64_t{tile} * (2 * kM), sizeof(to), full);
  ptx::mbarrier_arrive(full);
}

// A piece is some rows of O and the same of dO, a box of the copy engine each.
constexpr int statistics_columns(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }
constexpr int statistics_rows(int head_dim) { return kStatisticsPieceBytes / (2 * 2 * statistics_columns(head_dim)); }

template <typename T, int kM, int kD>
struct RowStatistics {
  static constexpr int kRows = statistics_rows(kD), kLanes = 32 / kRows;  // lanes of a row
  static constexpr int kRowBytes = 2 * statistics_columns(kD), kTensorBytes = kRows * kRowBytes;
  static constexpr int kChunks = kRowBytes / (16 * kLanes);  // of 16 bytes, of a lane
  static constexpr int kStages = kStatisticsStages, kSteps = kM / kRows;
  // Of step i: piece i % kStages, for the (i / kStages)-th time. After a tile that is even.
  static_assert(kM % 32 == 0 && kM % kRows == 0 && kRowsPerWarp % kRows == 0 && kSteps % (2 * kStages) == 0);

  // In shared memory: the pieces on a multiple of 512, and what would take registers.
  using Pieces = uint8_t[kStages][kStatisticsPieceBytes];
  struct State {
    uint64_t full[kStages];
    float sums[kM];  // of a tile
    int b, h, row;   // what is copied next
    int tile;        // what is summed

    FAE_DEVICE void init() {
      for (int i = 0; i < kStages; ++i) ptx::mbarrier_init(ptx::shared_address(&full[i]), 1);
    }
  };

  // The sum over a row's columns, in all of its lanes; load(chunk of the row) of O and dO, in one order wherever they come from.
  template <typename Load>
  FAE_DEVICE static float sum_row(int lane, Load load) {
    float sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      // Neighbouring chunks by the lanes of a row; other rows' lanes begin elsewhere, so that eight lanes meet all banks.
      uint4 o, dout;
      load(i * kLanes ^ lane % 8, o, dout);
      add_products(sums, o.x, dout.x), add_products(sums, o.y, dout.y);
      add_products(sums, o.z, dout.z), add_products(sums, o.w, dout.w);
    }
    float sum = sums[0] + sums[1];
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return sum;
  }
  FAE_DEVICE static float sum_row(const uint8_t* piece, int lane) {
    const uint8_t* const row = piece + lane / kLanes * kRowBytes;
    return sum_row(lane, [&](int chunk, uint4& o, uint4& dout) {
      o = *reinterpret_cast<const uint4*>(row + chunk * 16);
      dout = *reinterpret_cast<const uint4*>(row + chunk * 16 + kTensorBytes);
    });
  }
  FAE_DEVICE static void add_products(float (&sums)[2], uint32_t x, uint32_t y) {
    const float2 a = tile::Mma<T>::unpack_pair(x), b = tile::Mma<T>::unpack_pair(y);
    sums[0] = fmaf(a.x, b.x, sums[0]), sums[1] = fmaf(a.y, b.y, sums[1]);
  }

  struct Tile {
    int b, h, m;
    int index;  // among all
  };
  FAE_DEVICE static Tile tile_at(int position, const Sizes& z, const StatisticsLaunch& launch) {
    const TileOrder::Tile item = launch.order.at(position);
    // In a turned section key tiles come from the first one on, but all walk from the last query tile on.
    int m = item.turned ? launch.m_tiles - 1 - item.m : item.m;
    if (launch.paired && !item.turned) {
      const bool descends = launch.order.last_first;
      const int i = descends ? launch.m_tiles - 1 - m : m, even = (launch.m_tiles + 1) / 2, odd = launch.m_tiles / 2;
      m = i < even ? 2 * (descends ? even - 1 - i : i) : 2 * (descends ? odd - 1 - (i - even) : i - even) + 1;
    }
    return {item.head / z.heads, item.head % z.heads, m, item.head * launch.m_tiles + m};
  }

  // Of a row, in place.
  FAE_DEVICE static void write_row(float* stats, float delta, float lse, bool exists, const BackwardParams& p, int b,
                                   int h, int row) {
    if (!exists || lse == softmax<float>::neg_inf()) {
      lse = softmax<float>::neg_inf(), delta = 0.0f;
    } else if (p.dlse.data != nullptr) {
      delta -= *p.dlse.row<const float>(b, h, row);
    }
    stats[0] = softmax<float>::lse_base2(lse);
    stats[kM] = delta;
  }
  // `rows` of a tile's accumulator.
  FAE_DEVICE static void clear(const StatisticsLaunch& launch, int64_t first_row, int rows, int lane) {
    if (launch.accumulator == nullptr) return;
    float4* const to = reinterpret_cast<float4*>(launch.accumulator + first_row * kD) + lane;
#pragma unroll 4
    for (int i = 0; i < rows * kD / (4 * 32); ++i) to[i * 32] = make_float4(0, 0, 0, 0);
  }

  // A warp of the warpgroups that multiply, before they do.
  FAE_DEVICE static void run_first(const BackwardParams& p, const StatisticsLaunch& launch, int lane) {
    if (launch.ready == nullptr) return;
    constexpr int kParts = kM / kRowsPerWarp;
    ptx::griddepcontrol_wait();
    for (;;) {
      int drawn = lane == 0 ? ptx::atom_increment(launch.counters) : 0;
      drawn = __shfl_sync(0xffffffffu, drawn, 0);
      if (drawn >= launch.first_tiles * kParts) return;
      const Tile tile = tile_at(drawn / kParts, p.fwd.sizes, launch);
      const int seqlen_q = p.fwd.seq(tile.b).seqlen_q, first = drawn % kParts * kRowsPerWarp;
#pragma unroll
      for (int i = 0; i < kRowsPerWarp; i += kRows) {
        const int r = first + i + lane / kLanes, row = tile.m * kM + r;
        const bool exists = row < seqlen_q;
        const T* const o = p.fwd.o.row<const T>(tile.b, tile.h, row);
        const T* const dout = p.dout.row<const T>(tile.b, tile.h, row);
        const float lse = exists ? *p.fwd.lse.row<const float>(tile.b, tile.h, row) : softmax<float>::neg_inf();
        const float sum = sum_row(lane, [&](int chunk, uint4& x, uint4& y) {
          x = y = make_uint4(0, 0, 0, 0);
          if (!exists || chunk * 8 >= p.fwd.sizes.head_dim_v) return;
          x = *reinterpret_cast<const uint4*>(o + chunk * 8), y = *reinterpret_cast<const uint4*>(dout + chunk * 8);
        });
        if (lane % kLanes == 0)
          write_row(launch.stats + int64_t{tile.index} * (2 * kM) + r, sum, lse, exists, p, tile.b, tile.h, row);
      }
      clear(launch, int64_t{tile.index} * kM + first, kRowsPerWarp, lane);
      __syncwarp();
      if (lane == 0) ptx::red_release(launch.ready + tile.index, 1);
    }
  }

  // lse of a tile's rows on their way to L2. (A cp.async to shared memory, anywhere in a kernel, makes ptxas put four idle loads
  // before each of its fences.) What does not exist is not touched.
  FAE_DEVICE static void fetch_lse(const AttentionParams& p, int tile, int m_tiles, int lane) {
    const int head = tile / m_tiles, b = head / p.sizes.heads, h = head - b * p.sizes.heads;
    const int row = (tile - head * m_tiles) * kM + lane;
    const float* from = p.lse.row<const float>(b, h, row);
    for (int i = 0; i < kM / 32; ++i, from += 32)
      if (row + 32 * i < p.seq(b).seqlen_q) ptx::prefetch_l2(from);
  }

  FAE_DEVICE static void write(State& state, const BackwardParams& p, const StatisticsLaunch& launch, int tile,
                               int lane) {
    const int head = tile / launch.m_tiles, b = head / p.fwd.sizes.heads, h = head - b * p.fwd.sizes.heads;
    const int row = (tile - head * launch.m_tiles) * kM;
    for (int r = lane; r < kM; r += 32) {
      const bool exists = row + r < p.fwd.seq(b).seqlen_q;
      const float lse = exists ? *p.fwd.lse.row<const float>(b, h, row + r) : softmax<float>::neg_inf();
      write_row(launch.stats + int64_t{tile} * (2 * kM) + r, state.sums[r], lse, exists, p, b, h, row + r);
    }
  }

  FAE_DEVICE static int draw(const StatisticsLaunch& launch) {
    return launch.first_tiles + ptx::atom_increment(launch.counters + 1);
  }
  // The next tile's number among all, whose rows are then copied; -1: there are no more. `drawn` is lane 0's, drawn ahead.
  FAE_DEVICE static int begin(State& state, const Sizes& z, const StatisticsLaunch& launch, int& drawn, int lane) {
    const int position = __shfl_sync(0xffffffffu, drawn, 0);
    if (position >= launch.order.tiles) return -1;
    const Tile tile = tile_at(position, z, launch);
    if (lane == 0) {
      drawn = draw(launch);
      state.b = tile.b, state.h = tile.h, state.row = tile.m * kM;
    }
    return tile.index;
  }

  // Lane 0.
  FAE_DEVICE static void copy(State& state, Pieces& pieces, int stage, const StatisticsLaunch& launch) {
    const uint32_t full = ptx::shared_address(&state.full[stage]), to = ptx::shared_address(pieces[stage]);
    const int b = state.b, h = state.h, row = state.row;
    state.row = row + kRows;
    ptx::mbarrier_arrive_expect_tx(full, kStatisticsPieceBytes);
    ptx::cp_async_bulk_tensor_4d_load(to, &launch.o, full, 0, row, h, b);
    ptx::cp_async_bulk_tensor_4d_load(to + kTensorBytes, &launch.dout, full, 0, row, h, b);
  }

  // A warp.
  FAE_DEVICE static void run(State& state, Pieces& pieces, const BackwardParams& p, const StatisticsLaunch& launch,
                             int lane) {
    if (launch.ready == nullptr) return;
    ptx::griddepcontrol_wait();
    int drawn = lane == 0 ? draw(launch) : 0;
    int next = begin(state, p.fwd.sizes, launch, drawn, lane);
    if (next < 0) return;
    if (lane == 0)
      for (int i = 0; i < kStages; ++i) copy(state, pieces, i, launch);
    while (next >= 0) {  // whose rows are copied: of the tile that is summed until kStages pieces are left
      if (lane == 0) state.tile = next;
      fetch_lse(p.fwd, next, launch.m_tiles, lane);
#pragma unroll 1
      for (int i = 0; i < kSteps; ++i) {
        const int stage = i % kStages;
        ptx::mbarrier_wait(ptx::shared_address(&state.full[stage]), i / kStages % 2, "rows_full");
        const float sum = sum_row(pieces[stage], lane);
        if (lane % kLanes == 0) state.sums[i * kRows + lane / kLanes] = sum;
        __syncwarp();
        if (i == kSteps - kStages) next = begin(state, p.fwd.sizes, launch, drawn, lane);
        if (next >= 0 && lane == 0) copy(state, pieces, stage, launch);
      }
      const int tile = state.tile;
      write(state, p, launch, tile, lane);
      clear(launch, int64_t{tile} * kM, kM, lane);
      __syncwarp();
      if (lane == 0) ptx::st_release(launch.ready + tile, kM / kRowsPerWarp);
    }
  }
};

// Before the backward: counters and words are cleared, and dQ of query tiles that see no key, to which nothing is ever added.
struct ClearLaunch {
  int* counters;
  int* ready;
  int* turns;     // nullptr: dQ is not added to in turn, and not cleared here
  int64_t tiles;  // of queries, all
  int m_tiles, tile_m;
};
constexpr int kCounters = 4, kClearThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kClearThreads)
    clear_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ ClearLaunch launch) {
  ptx::begin_dependent_grid();
  if (blockIdx.x == 0 && threadIdx.x < kCounters) launch.counters[threadIdx.x] = 0;
  const int64_t tile = int64_t{blockIdx.x} * kClearThreads + threadIdx.x;
  bool unseen = false;
  if (tile < launch.tiles) {
    launch.ready[tile] = 0;
    if (launch.turns != nullptr) {
      launch.turns[tile] = 0;
      const int64_t b = tile / launch.m_tiles / p.fwd.sizes.heads;
      const int row = static_cast<int>(tile % launch.m_tiles) * launch.tile_m;
      const int end = min(row + launch.tile_m, p.fwd.seq(b).seqlen_q);
      unseen = row < end && p.fwd.mask(b).keys_of_rows(row, end).empty();
    }
  }
  const int lane = threadIdx.x % 32, d = p.fwd.sizes.head_dim;
  for (unsigned left = __ballot_sync(0xffffffffu, unseen); left != 0; left &= left - 1) {
    const int64_t cleared = tile - lane + (__ffs(left) - 1), head = cleared / launch.m_tiles;
    const int64_t b = head / p.fwd.sizes.heads, h = head % p.fwd.sizes.heads;
    const int row = static_cast<int>(cleared % launch.m_tiles) * launch.tile_m;
    const int rows = min(launch.tile_m, p.fwd.seq(b).seqlen_q - row);
    for (int i = lane; i < rows * (d / 8); i += 32)
      reinterpret_cast<uint4*>(p.dq.row<T>(b, h, row + i / (d / 8)))[i % (d / 8)] = make_uint4(0, 0, 0, 0);
  }
}

}  // namespace fae::sm90
