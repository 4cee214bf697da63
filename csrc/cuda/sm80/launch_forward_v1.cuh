// Host side of the version-1 forward: groups of rows, workspace.
#pragma once

#include "../shared/launch.h"
#include "forward_v1.cuh"

namespace fae::sm80 {

// O is accumulated in the output itself where that is fp32 and its rows allow 8-byte accesses.
inline bool v1_state_is_output(const AttentionParams& p, int element_bytes) {
  const auto even = [](int64_t x) { return x % 2 == 0; };
  return element_bytes == 4 && reinterpret_cast<uintptr_t>(p.o.data) % 8 == 0 && even(p.sizes.head_dim_v) &&
         even(p.o.stride_b) && even(p.o.stride_h) && even(p.o.stride_s);
}

// Query rows in groups, as many as it takes to give every SM two CTAs, each at least one block of rows.
struct V1Groups {
  int count;
  int rows;
};
inline V1Groups v1_groups(const Sizes& z, int block_rows, int sm_count) {
  const int64_t blocks = cuda::ceil_div(z.seqlen_q, block_rows), heads = z.batch * z.heads;
  int64_t groups = cuda::ceil_div(2 * int64_t{sm_count}, heads);
  if (groups > blocks) groups = blocks;
  const int64_t each = cuda::ceil_div(blocks, groups);
  return {static_cast<int>(cuda::ceil_div(blocks, each)), static_cast<int>(each * block_rows)};
}

inline int64_t v1_state_columns(const Sizes& z) { return (z.head_dim_v + 1) / 2 * 2; }

template <typename T, int kRow, int kWarps>
size_t forward_v1_workspace(const cuda::Call& call) {
  const AttentionParams& p = call.p.fwd;
  const size_t rows = static_cast<size_t>(p.sizes.batch) * p.sizes.heads * p.sizes.seqlen_q;
  const size_t statistics = 2 * cuda::align_up(rows * sizeof(float));
  return statistics + (v1_state_is_output(p, sizeof(T)) ? 0 : rows * v1_state_columns(p.sizes) * sizeof(float));
}

template <typename T, int kRow, int kWarps>
cudaError_t launch_forward_v1(const cuda::Call& call, void* workspace, cudaStream_t stream) {
  constexpr ForwardV1Tile kTile = kForwardV1Tiles[kRow];
  const AttentionParams& p = call.p.fwd;
  const Sizes& z = p.sizes;
  const cuda::SplitScale scale = cuda::split_scale(p.scale);
  const V1Groups groups = v1_groups(z, kV1RowsOfWarp * kWarps, call.device.sm_count);
  const size_t rows = static_cast<size_t>(z.batch) * z.heads * z.seqlen_q;
  char* const base = static_cast<char*>(workspace);
  ForwardV1Launch launch{};
  launch.scale_log2 = scale.positive;
  launch.sign = scale.sign;
  launch.fp32_exact = call.fp32_exact;
  launch.q_vector = cuda::rows_are_vectors(p.q, z.head_dim, sizeof(T));
  launch.k_vector = cuda::rows_are_vectors(p.k, z.head_dim, sizeof(T));
  launch.v_vector = cuda::rows_are_vectors(p.v, z.head_dim_v, sizeof(T));
  launch.groups = groups.count;
  launch.group_rows = groups.rows;
  launch.state_m = reinterpret_cast<float*>(base);
  launch.state_l = reinterpret_cast<float*>(base + cuda::align_up(rows * sizeof(float)));
  launch.state_is_output = v1_state_is_output(p, sizeof(T));
  if (launch.state_is_output) {
    launch.state_o = static_cast<float*>(p.o.data);
    launch.state_stride_b = p.o.stride_b;
    launch.state_stride_h = p.o.stride_h;
    launch.state_stride_s = p.o.stride_s;
  } else {
    launch.state_o = reinterpret_cast<float*>(base + 2 * cuda::align_up(rows * sizeof(float)));
    launch.state_stride_s = v1_state_columns(z);
    launch.state_stride_h = launch.state_stride_s * z.seqlen_q;
    launch.state_stride_b = launch.state_stride_h * z.heads;
  }
  constexpr auto* kKernel = &forward_v1_kernel<T, kRow>;
  if (const cudaError_t error = cuda::allow_shared_bytes<kKernel>(kTile.shared_bytes(kTile.max_warps));
      error != cudaSuccess)
    return error;
  const int64_t ctas = z.batch * z.heads * groups.count;
  if (ctas >= int64_t{1} << 31) return cudaErrorInvalidConfiguration;
  kKernel<<<static_cast<unsigned>(ctas), 32 * kWarps, kTile.shared_bytes(kWarps), stream>>>(p, launch);
  return cudaPeekAtLastError();
}

// The registry's row for one key block, one number of warps and one dtype.
template <typename T, int kRow, int kWarps = kForwardV1Tiles[kRow].default_warps>
cuda::KernelEntry forward_v1_entry() {
  static_assert(kRow >= 0, "no such row in kForwardV1Tiles");
  constexpr ForwardV1Tile t = kForwardV1Tiles[kRow];
  static_assert(kWarps <= t.max_warps);
  return {t.name.data(),
          80,
          cuda::Pass::kForward,
          1,
          cuda::dtype_of<T>(),
          t.head_dim,
          {kV1RowsOfWarp * kWarps, t.tile_n, 32 * kWarps, t.q_buffers, t.shared_bytes(kWarps)},
          t.why.data(),
          &forward_v1_workspace<T, kRow, kWarps>,
          &launch_forward_v1<T, kRow, kWarps>};
}

}  // namespace fae::sm80
