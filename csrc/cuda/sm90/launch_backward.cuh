// Host side of the Hopper backward: delta, the kernel, where dQ is summed out of order its conversion; their workspace.
#pragma once

#include "../registry.h"
#include "../shared/convert.cuh"
#include "../shared/delta.cuh"
#include "../shared/launch.h"
#include "backward_v2.cuh"
#include "launch.h"

namespace fae::sm90 {

#if defined(FAE_DEV)
inline int dev_ordered = -1, dev_section_mb = 16, dev_last_tiles = 800;
#else
constexpr int dev_ordered = -1, dev_section_mb = 16, dev_last_tiles = 800;
#endif

inline bool adds_in_order(const BackwardParams& p) {
  if (dev_ordered >= 0) return dev_ordered;
  return p.deterministic;
}

// The workspace, in this order; `base` nullptr counts only.
struct BackwardWorkspace {
  int* next_tile;
  float* stats;
  float* dq;
  int* turns;
  size_t bytes;

  static BackwardWorkspace lay_out(const BackwardTile& t, const BackwardParams& p, char* base) {
    const Sizes& z = p.fwd.sizes;
    const size_t tiles = static_cast<size_t>(z.batch) * z.heads * cuda::ceil_div(z.seqlen_q, t.tile_m);
    const size_t stats_at = cuda::kWorkspaceAlignment;
    const size_t dq_at = stats_at + cuda::align_up(tiles * 2 * t.tile_m * sizeof(float));
    const size_t turns_at = dq_at + cuda::align_up(tiles * t.tile_m * t.head_dim * sizeof(float));
    const size_t bytes = turns_at + (adds_in_order(p) ? tiles * 8 * sizeof(int) : 0);
    return {reinterpret_cast<int*>(base), reinterpret_cast<float*>(base + stats_at), reinterpret_cast<float*>(base + dq_at),
            adds_in_order(p) ? reinterpret_cast<int*>(base + turns_at) : nullptr, bytes};
  }
};

template <int kRow>
size_t backward_v2_workspace(const cuda::Call& call) {
  return BackwardWorkspace::lay_out(kBackwardTiles[kRow], call.p, nullptr).bytes;
}

inline TileOrder key_tile_order(const BackwardParams& p, bool ordered) {
  const Sizes& z = p.fwd.sizes;
  TileOrder order{};
  order.m_tiles = static_cast<int>(cuda::ceil_div(z.seqlen_k, kBackwardKeys));
  order.heads = static_cast<int>(z.batch * z.heads_kv);
  order.splits = 1;
  order.tiles = order.m_tiles * order.heads;
  const bool unequal = p.fwd.mask_spec.window_right < kOpenDistance;
  order.last_first = ordered && unequal;
  const int64_t head_bytes = int64_t{8} * z.seqlen_q * z.head_dim * z.heads_per_kv();
  const int64_t section = (int64_t{dev_section_mb} << 20) / head_bytes;
  order.section = static_cast<int>(section < 1 ? 1 : section < order.heads ? section : order.heads);
  int64_t last = order.heads % order.section == 0 ? order.section : order.heads % order.section;
  if (unequal && !ordered)
    while (last * order.m_tiles < dev_last_tiles && last + order.section <= order.heads &&
           (last + order.section) * head_bytes <= (int64_t{32} << 20))
      last += order.section;
  order.sections = static_cast<int>((order.heads - last) / order.section) + 1;
  return order;
}

template <typename T, int kRow>
cudaError_t launch_backward_v2(const cuda::Call& call, void* workspace, cudaStream_t stream) {
  constexpr BackwardTile kTile = kBackwardTiles[kRow];
  const BackwardParams& p = call.p;
  const Sizes& z = p.fwd.sizes;
  const BackwardWorkspace space = BackwardWorkspace::lay_out(kTile, p, static_cast<char*>(workspace));
  const bool ordered = space.turns != nullptr;
  const int64_t m_tiles = cuda::ceil_div(z.seqlen_q, kTile.tile_m), n_tiles = cuda::ceil_div(z.seqlen_k, kBackwardKeys);
  constexpr int64_t kMostTiles = int64_t{1} << 31;
  if (z.batch * z.heads_kv * n_tiles >= kMostTiles || z.batch * z.heads * m_tiles >= kMostTiles)
    return cudaErrorInvalidConfiguration;

  BackwardLaunch launch{};
  const DType dtype = cuda::dtype_of<T>();
  cudaError_t error = make_tensor_map(&launch.q, p.fwd.q, dtype, z.batch, z.heads, z.seqlen_q, z.head_dim, kTile.tile_m);
  if (error == cudaSuccess)
    error = make_tensor_map(&launch.k, p.fwd.k, dtype, z.batch, z.heads_kv, z.seqlen_k, z.head_dim, kBackwardKeys);
  if (error == cudaSuccess)
    error = make_tensor_map(&launch.v, p.fwd.v, dtype, z.batch, z.heads_kv, z.seqlen_k, z.head_dim_v, kBackwardKeys);
  if (error == cudaSuccess)
    error = make_tensor_map(&launch.dout, p.dout, dtype, z.batch, z.heads, z.seqlen_q, z.head_dim_v, kTile.tile_m);
  if (error != cudaSuccess) return error;
  launch.order = key_tile_order(p, ordered);
  launch.scale_log2 = static_cast<float>(p.fwd.scale * kLog2E);
  launch.scale = static_cast<float>(p.fwd.scale);
  launch.m_tiles = static_cast<int>(m_tiles);
  launch.stats = space.stats;
  launch.dq = space.dq;
  launch.turns = space.turns;
  launch.last_key_first = launch.order.last_first;
  launch.next_tile = space.next_tile;

  cuda::DeltaLaunch delta{};
  delta.vector = cuda::rows_are_vectors(p.dout, z.head_dim_v, sizeof(T)) &&
                 cuda::rows_are_vectors(p.fwd.o, z.head_dim_v, sizeof(T));
  delta.m_tiles = launch.m_tiles;
  delta.tile_m = kTile.tile_m;
  delta.tile_floats = ordered ? 0 : kTile.tile_m * kTile.head_dim;
  delta.stats = space.stats;
  delta.accumulator = space.dq;
  delta.semaphores = space.turns;
  delta.semaphores_per_tile = 8;
  delta.clear_unseen_dq = ordered;
  delta.counter = space.next_tile;

  constexpr auto *kOrderedKernel = &backward_v2_kernel<T, kRow, true>, *kKernel = &backward_v2_kernel<T, kRow, false>;
  error = ordered ? cuda::allow_shared_bytes<kOrderedKernel>(kTile.shared_bytes())
                  : cuda::allow_shared_bytes<kKernel>(kTile.shared_bytes());
  if (error != cudaSuccess) return error;
  constexpr int kRows = cuda::convert_rows<T>(kTile.tile_m, kTile.head_dim);
  if ((error = launch_dependent(&cuda::delta_kernel<T>, z.batch * z.heads * m_tiles, cuda::kDeltaThreads, 0, stream, p,
                                delta)) != cudaSuccess)
    return error;
  const int ctas = launch.order.tiles < call.device.sm_count ? launch.order.tiles : call.device.sm_count;
  if ((error = launch_dependent(ordered ? kOrderedKernel : kKernel, ctas, BackwardTile::kThreads, kTile.shared_bytes(), stream, p, launch)) !=
          cudaSuccess ||
      ordered)
    return error;
  return launch_dependent(&cuda::convert_dq_kernel<T, kRows, kTile.head_dim>,
                          z.batch * z.heads * m_tiles * (kTile.tile_m / kRows), cuda::kConvertThreads, 0, stream, p.dq,
                          p.fwd, space.dq, launch.scale, cuda::rows_are_vectors(p.dq, z.head_dim, sizeof(T)),
                          launch.m_tiles * (kTile.tile_m / kRows));
}

// The registry's row for one tile and dtype.
template <typename T, int kRow>
cuda::KernelEntry backward_v2_entry() {
  static_assert(kRow >= 0, "no such row in kBackwardTiles");
  constexpr BackwardTile t = kBackwardTiles[kRow];
  return {t.name.data(),
          90,
          cuda::Pass::kBackward,
          2,
          cuda::dtype_of<T>(),
          t.head_dim,
          {t.tile_m, kBackwardKeys, BackwardTile::kThreads, t.stages, t.shared_bytes()},
          t.why.data(),
          &backward_v2_workspace<kRow>,
          &launch_backward_v2<T, kRow>};
}

}  // namespace fae::sm90
