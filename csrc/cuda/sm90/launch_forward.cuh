// Host side of the Hopper forward: tensor maps, order of the tiles, grid.
#pragma once

#include "../registry.h"
#include "../shared/combine.cuh"
#include "../shared/launch.h"
#include "forward_v2.cuh"
#include "launch.h"

namespace fae::sm90 {

// K and V of the heads whose tiles are scheduled together: a part of the 50 MB of L2 that all CTAs share. 2, 8 and 24 MB were
// measured: without a mask they are equal, with one 8 is the fastest nearly everywhere, 24 up to 8 % slower.
constexpr int64_t kSectionBytes = 8 << 20;
// The last section is larger where tiles are unequal: its long tiles come first, and the GPU should end with short ones. It
// grows until it has so many tiles or so many bytes: +4 to +16 % at 2k to 8k, causal.
constexpr int64_t kLastSectionTiles = 800, kLastSectionBytes = 32 << 20;

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

inline TileOrder tile_order(const ForwardTile& t, const AttentionParams& p, int splits) {
  const Sizes& z = p.sizes;
  TileOrder order{};
  order.m_tiles = static_cast<int>(cuda::ceil_div(z.seqlen_q, t.tile_m()));
  order.heads = static_cast<int>(z.batch * z.heads);
  const int64_t group_bytes = int64_t{2} * z.seqlen_k * (z.head_dim + z.head_dim_v);
  const int64_t groups = kSectionBytes / group_bytes;
  const int64_t section = (groups > 1 ? groups : 1) * z.heads_per_kv();
  order.section = static_cast<int>(section < order.heads ? section : order.heads);
  order.last_first = p.mask_spec.window_right < kOpenDistance;
  int64_t last = order.heads % order.section == 0 ? order.section : order.heads % order.section;
  if (order.last_first) {
    const int64_t most = (kLastSectionBytes) / group_bytes * z.heads_per_kv();
    while (last * order.m_tiles < kLastSectionTiles &&
           last + order.section <= (most < order.heads ? most : order.heads))
      last += order.section;
  }
  order.sections = static_cast<int>((order.heads - last) / order.section) + 1;
  order.splits = splits;
  order.tiles = order.m_tiles * order.heads * splits;
  return order;
}

// The counter of tiles starts at 0.
static __global__ void clear_counter_kernel(int* counter) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
#endif
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
  if (z.batch * z.heads * cuda::ceil_div(z.seqlen_q, kTile.tile_m()) >= int64_t{1} << 31)
    return cudaErrorInvalidConfiguration;
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
  // Dependent launches: the kernel is on the SMs before its predecessors end, and waits there.
  cudaLaunchAttribute dependent{};
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.stream = stream, config.attrs = &dependent, config.numAttrs = 1;
  config.gridDim = 1, config.blockDim = 1;
  if ((error = cudaLaunchKernelEx(&config, clear_counter_kernel, launch.next_tile)) != cudaSuccess) return error;
  config.gridDim = ctas, config.blockDim = kTile.threads(), config.dynamicSmemBytes = kTile.shared_bytes();
  if ((error = cudaLaunchKernelEx(&config, kKernel, p, launch)) != cudaSuccess || plan.splits == 1) return error;
  return cuda::combine_splits<T>(p, launch.partial_o, launch.partial_lse, plan.splits, stream);
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
          has_code()};
}

}  // namespace fae::sm90
