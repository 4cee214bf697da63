// Host side of the Hopper forward: tensor maps, order of the tiles, grid.
#pragma once

#include "../registry.h"
#include "../shared/combine.cuh"
#include "../shared/launch.h"
#include "forward_v2.cuh"

namespace fae::sm90 {

// How many tiles share the keys of a row tile: a function of one batch entry's sizes and the GPU, never of the batch, so
// that a row's bits do not depend on the batch it runs in. Keys are split only where one entry has fewer tiles than the GPU
// SMs, and only long ones: a split costs an fp32 round trip of O and one more launch.
struct SplitPlan {
  int splits;
  int tiles;  // key tiles of each
};
inline SplitPlan plan_splits(const ForwardTile& t, const Sizes& z, int sm_count) {
  constexpr int64_t kLeastKeys = 4096, kLeastKeysEach = 1024;
  const int64_t row_tiles = cuda::ceil_div(z.seqlen_q, t.tile_m()) * z.heads;
  const int64_t key_tiles = cuda::ceil_div(z.seqlen_k, t.tile_n);
  if (row_tiles >= sm_count || z.seqlen_k < kLeastKeys) return {1, static_cast<int>(key_tiles)};
  int64_t splits = cuda::ceil_div(2 * int64_t{sm_count}, row_tiles);
  if (splits > z.seqlen_k / kLeastKeysEach) splits = z.seqlen_k / kLeastKeysEach;
  if (splits > cuda::kMaxSplits) splits = cuda::kMaxSplits;
  const int64_t each = cuda::ceil_div(key_tiles, splits);
  return {static_cast<int>(cuda::ceil_div(key_tiles, each)), static_cast<int>(each)};
}

// Bytes of the last section by a head's tiles. Where they are few, more heads start at once, and wait for memory; where they
// are many, it takes more bytes for a few heads.
constexpr int64_t kFewTiles = 4, kManyTiles = 40;
constexpr int64_t last_section_bytes(int64_t tiles) {
  return (tiles <= kFewTiles ? 16 : tiles <= kManyTiles ? 32 : 64) << 20;
}

inline TileOrder tile_order(const ForwardTile& t, const AttentionParams& p, int splits) {
  const Sizes& z = p.sizes;
  const bool causal = p.mask_spec.window_right < kOpenDistance;
  const int64_t bytes = int64_t{2} * z.seqlen_k * (z.head_dim + z.head_dim_v);
  const int64_t tiles = cuda::ceil_div(z.seqlen_q, t.tile_m());
  return make_tile_order(tiles, z.batch * z.heads, z.heads_per_kv(), bytes, splits, causal,
                         causal ? unequal_tiles(last_section_bytes(tiles)) : kEqualTiles);
}

// A tile is best drawn late, by a CTA that is ahead; but where tiles are short, the counter's answer would come too late. Up
// to 512 keys early gains 1 % at D 64 and 128; at 1,024 it loses as much, and with one Q buffer 4 to 6 %.
constexpr int kKeyTilesDrawnEarly = 8;

// The counter of tiles starts at 0.
static __global__ void clear_counter_kernel(int* counter) {
  ptx::begin_dependent_grid();
  *counter = 0;
}

// The counter of tiles, then what the splits leave.
template <int kRow>
size_t forward_v2_workspace(const cuda::Call& call) {
  const Sizes& z = call.p.fwd.sizes;
  const SplitPlan plan = plan_splits(kForwardTiles[kRow], z, call.device.sm_count);
  if (plan.splits == 1) return cuda::kWorkspaceAlignment;
  const size_t rows = static_cast<size_t>(z.batch) * z.heads * z.seqlen_q * plan.splits;
  return cuda::kWorkspaceAlignment + cuda::align_up(rows * sizeof(float)) + rows * z.head_dim_v * sizeof(float);
}

template <typename T, int kRow>
cudaError_t launch_forward_v2(const cuda::Call& call, void* workspace, cudaStream_t stream) {
  constexpr ForwardTile kTile = kForwardTiles[kRow];
  const AttentionParams& p = call.p.fwd;
  const Sizes& z = p.sizes;
  const DType dtype = cuda::dtype_of<T>();
  ForwardLaunch launch{};
  cudaError_t error = make_tensor_map(&launch.q, p.q, dtype, z.batch, z.heads, z.seqlen_q, z.head_dim, kTile.tile_m());
  if (error == cudaSuccess)
    error = make_tensor_map(&launch.k, p.k, dtype, z.batch, z.heads_kv, z.seqlen_k, z.head_dim, kTile.tile_n);
  if (error == cudaSuccess)
    error = make_tensor_map(&launch.v, p.v, dtype, z.batch, z.heads_kv, z.seqlen_k, z.head_dim_v, kTile.tile_n);
  if (error == cudaSuccess)
    error = make_tensor_map(&launch.o, p.o, dtype, z.batch, z.heads, z.seqlen_q, z.head_dim_v, 16);
  if (error != cudaSuccess) return error;
  const SplitPlan plan = plan_splits(kTile, z, call.device.sm_count);
  if (cuda::ceil_div(z.seqlen_q, kTile.tile_m()) * z.heads * z.batch * plan.splits >= int64_t{1} << 31)
    return cudaErrorInvalidConfiguration;
  launch.order = tile_order(kTile, p, plan.splits);
  launch.scale_log2 = cuda::split_scale(p.scale).positive;
  launch.next_tile = static_cast<int*>(workspace);
  launch.draws_early = kTile.q_buffers == 2 && z.seqlen_k <= kKeyTilesDrawnEarly * kTile.tile_n;
  launch.split_tiles = plan.tiles;
  if (plan.splits > 1) {
    const size_t rows = static_cast<size_t>(z.batch) * z.heads * z.seqlen_q * plan.splits;
    char* const partials = static_cast<char*>(workspace) + cuda::kWorkspaceAlignment;
    launch.partial_lse = reinterpret_cast<float*>(partials);
    launch.partial_o = reinterpret_cast<float*>(partials + cuda::align_up(rows * sizeof(float)));
  }
  constexpr auto* kKernel = &forward_v2_kernel<T, kRow>;
  if ((error = cuda::allow_shared_bytes<kKernel>(kTile.shared_bytes())) != cudaSuccess) return error;
  const int ctas = launch.order.tiles < call.device.sm_count ? launch.order.tiles : call.device.sm_count;
  if ((error = cuda::launch_dependent(&clear_counter_kernel, 1, 1, 0, stream, launch.next_tile)) != cudaSuccess)
    return error;
  error = cuda::launch_dependent(kKernel, ctas, kTile.threads(), kTile.shared_bytes(), stream, p, launch);
  if (error != cudaSuccess || plan.splits == 1) return error;
  return cuda::combine_splits<T>(p, launch.partial_o, launch.partial_lse, plan.splits, true, stream);
}

// The registry's row for one tile and dtype.
template <typename T, int kRow>
cuda::KernelEntry forward_v2_entry() {
  static_assert(kRow >= 0, "no such row in kForwardTiles");
  constexpr ForwardTile t = kForwardTiles[kRow];
  return {t.name.data(),
          90,
          cuda::Pass::kForward,
          2,
          cuda::dtype_of<T>(),
          t.head_dim,
          {t.tile_m(), t.tile_n, t.threads(), t.stages, t.shared_bytes()},
          t.why.data(),
          &forward_v2_workspace<kRow>,
          &launch_forward_v2<T, kRow>,
          false,
          0,
          cuda::has_hopper_code()};
}

}  // namespace fae::sm90
