// Host side of the version-2 forward: grid, splits of the keys, workspace.
#pragma once

#include "../shared/combine.cuh"
#include "../shared/launch.h"
#include "forward_v2.cuh"

namespace fae::sm80 {

// How many CTAs share the keys of a row tile. A function of one batch entry's sizes and the GPU, never of the batch, so that
// a row's bits do not depend on the batch it runs in. Keys are split only where one entry leaves most of the GPU without
// a tile, and only long ones: a split costs an fp32 round trip of O and one more launch.
struct SplitPlan {
  int splits;
  int tiles;  // key tiles of each
};
inline SplitPlan plan_splits(const ForwardTile& t, const Sizes& z, int sm_count) {
  constexpr int kFewRows = 64;  // as when a model writes token after token: nothing else is under way
  const bool few_rows = z.seqlen_q <= kFewRows;
  const int64_t least_keys = few_rows ? 1024 : 2048, least_keys_each = few_rows && z.seqlen_k <= 4096 ? 256 : 512;
  const int64_t row_tiles = cuda::ceil_div(z.seqlen_q, t.tile_m()) * z.heads, slots = int64_t{sm_count} * t.ctas_per_sm;
  const int64_t key_tiles = cuda::ceil_div(z.seqlen_k, t.tile_n);
  if (2 * row_tiles > slots || z.seqlen_k < least_keys) return {1, static_cast<int>(key_tiles)};
  int64_t splits = slots / row_tiles;
  if (splits > z.seqlen_k / least_keys_each) splits = z.seqlen_k / least_keys_each;
  if (splits > cuda::kMaxSplits) splits = cuda::kMaxSplits;
  const int64_t each = cuda::ceil_div(key_tiles, splits);
  return {static_cast<int>(cuda::ceil_div(key_tiles, each)), static_cast<int>(each)};
}

template <int kRow>
size_t forward_v2_workspace(const cuda::Call& call) {
  const Sizes& z = call.p.fwd.sizes;
  const SplitPlan plan = plan_splits(kForwardTiles[kRow], z, call.device.sm_count);
  if (plan.splits == 1) return 0;
  const size_t rows = static_cast<size_t>(z.batch) * z.heads * z.seqlen_q * plan.splits;
  return cuda::align_up(rows * sizeof(float)) + rows * z.head_dim_v * sizeof(float);
}

template <typename T, int kRow>
cudaError_t launch_forward_v2(const cuda::Call& call, void* workspace, cudaStream_t stream) {
  constexpr ForwardTile kTile = kForwardTiles[kRow];
  const AttentionParams& p = call.p.fwd;
  const Sizes& z = p.sizes;
  const SplitPlan plan = plan_splits(kTile, z, call.device.sm_count);
  const cuda::SplitScale scale = cuda::split_scale(p.scale);
  ForwardLaunch launch{};
  launch.scale_log2 = scale.positive;
  launch.sign = scale.sign;
  launch.fp32_exact = call.fp32_exact;
  launch.q_vector = cuda::rows_are_vectors(p.q, z.head_dim, sizeof(T));
  launch.k_vector = cuda::rows_are_vectors(p.k, z.head_dim, sizeof(T));
  launch.v_vector = cuda::rows_are_vectors(p.v, z.head_dim_v, sizeof(T));
  launch.o_vector = cuda::rows_are_vectors(p.o, z.head_dim_v, sizeof(T));
  launch.m_tiles = static_cast<int>(cuda::ceil_div(z.seqlen_q, kTile.tile_m()));
  launch.splits = plan.splits;
  launch.split_tiles = plan.tiles;
  if (plan.splits > 1) {
    const size_t rows = static_cast<size_t>(z.batch) * z.heads * z.seqlen_q * plan.splits;
    launch.partial_lse = static_cast<float*>(workspace);
    launch.partial_o = reinterpret_cast<float*>(static_cast<char*>(workspace) + cuda::align_up(rows * sizeof(float)));
  }
  constexpr auto* kKernel = &forward_v2_kernel<T, kRow>;
  if (const cudaError_t error = cuda::allow_shared_bytes<kKernel>(kTile.shared_bytes()); error != cudaSuccess)
    return error;
  const int64_t ctas = z.batch * z.heads * launch.m_tiles * launch.splits;
  if (ctas >= int64_t{1} << 31) return cudaErrorInvalidConfiguration;
  const bool dependent = cuda::waits_by_itself(call.device.compute_capability);
  const cudaError_t error =
      cuda::launch(dependent, kKernel, ctas, kTile.threads(), kTile.shared_bytes(), stream, p, launch);
  if (error != cudaSuccess || plan.splits == 1) return error;
  return cuda::combine_splits<T>(p, launch.partial_o, launch.partial_lse, plan.splits, dependent, stream);
}

// The registry's row for one tile and dtype.
template <typename T, int kRow>
cuda::KernelEntry forward_v2_entry() {
  static_assert(kRow >= 0, "no such row in kForwardTiles");
  constexpr ForwardTile t = kForwardTiles[kRow];
  return {t.name.data(),
          80,
          cuda::Pass::kForward,
          2,
          cuda::dtype_of<T>(),
          t.head_dim,
          {t.tile_m(), t.tile_n, t.threads(), t.stages, t.shared_bytes()},
          t.why.data(),
          &forward_v2_workspace<kRow>,
          &launch_forward_v2<T, kRow>,
          false,
          t.wants_company ? t.shared_bytes() * t.ctas_per_sm : 0};
}

}  // namespace fae::sm80
