// Host side of the version-2 backward: delta, the kernel, the conversion of dQ; their workspace.
#pragma once

#include <type_traits>

#include "../shared/convert.cuh"
#include "../shared/delta.cuh"
#include "../shared/launch.h"
#include "backward_v2.cuh"

namespace fae::sm80 {

// The workspace, in this order; `base` nullptr counts only.
struct BackwardWorkspace {
  float* stats;
  float* dq;
  int* semaphores;  // nullptr unless the call is deterministic
  size_t bytes;

  static BackwardWorkspace lay_out(const BackwardTile& t, const BackwardParams& p, char* base) {
    const Sizes& z = p.fwd.sizes;
    const size_t tiles = static_cast<size_t>(z.batch) * z.heads * cuda::ceil_div(z.seqlen_q, t.tile_m);
    const size_t dq_at = cuda::align_up(tiles * 2 * t.tile_m * sizeof(float));
    const size_t semaphores_at = dq_at + cuda::align_up(tiles * t.tile_m * t.head_dim * sizeof(float));
    if (base == nullptr)
      return {nullptr, nullptr, nullptr, semaphores_at + (p.deterministic ? tiles * sizeof(int) : 0)};
    return {reinterpret_cast<float*>(base), reinterpret_cast<float*>(base + dq_at),
            p.deterministic ? reinterpret_cast<int*>(base + semaphores_at) : nullptr, 0};
  }
};

template <int kRow>
size_t backward_v2_workspace(const cuda::Call& call) {
  return BackwardWorkspace::lay_out(kBackwardTiles[kRow], call.p, nullptr).bytes;
}

template <typename T, int kRow>
cudaError_t launch_backward_v2(const cuda::Call& call, void* workspace, cudaStream_t stream) {
  constexpr BackwardTile kTile = kBackwardTiles[kRow];
  const BackwardParams& p = call.p;
  const Sizes& z = p.fwd.sizes;
  const BackwardWorkspace space = BackwardWorkspace::lay_out(kTile, p, static_cast<char*>(workspace));
  const int64_t m_tiles = cuda::ceil_div(z.seqlen_q, kTile.tile_m), n_tiles = cuda::ceil_div(z.seqlen_k, kTile.tile_n);
  const int64_t ctas = z.batch * z.heads_kv * n_tiles;
  constexpr int64_t kMostCtas = int64_t{1} << 31;
  if (ctas >= kMostCtas || z.batch * z.heads * m_tiles >= kMostCtas) return cudaErrorInvalidConfiguration;

  BackwardLaunch launch{};
  launch.scale_log2 = static_cast<float>(p.fwd.scale * kLog2E);
  launch.scale = static_cast<float>(p.fwd.scale);
  launch.fp32_exact = call.fp32_exact;
  launch.q_vector = cuda::rows_are_vectors(p.fwd.q, z.head_dim, sizeof(T));
  launch.k_vector = cuda::rows_are_vectors(p.fwd.k, z.head_dim, sizeof(T));
  launch.v_vector = cuda::rows_are_vectors(p.fwd.v, z.head_dim_v, sizeof(T));
  launch.do_vector = cuda::rows_are_vectors(p.dout, z.head_dim_v, sizeof(T));
  launch.dk_vector = cuda::rows_are_vectors(p.dk, z.head_dim, sizeof(T));
  launch.dv_vector = cuda::rows_are_vectors(p.dv, z.head_dim_v, sizeof(T));
  launch.m_tiles = static_cast<int>(m_tiles);
  launch.n_tiles = static_cast<int>(n_tiles);
  launch.stats = space.stats;
  launch.dq = space.dq;
  launch.semaphores = space.semaphores;

  cuda::DeltaLaunch delta{};
  delta.vector = launch.do_vector && cuda::rows_are_vectors(p.fwd.o, z.head_dim_v, sizeof(T));
  delta.m_tiles = launch.m_tiles;
  delta.tile_m = kTile.tile_m;
  delta.tile_floats = kTile.tile_m * kTile.head_dim;
  delta.stats = space.stats;
  delta.accumulator = space.dq;
  delta.semaphores = space.semaphores;

  constexpr auto* kKernel = &backward_v2_kernel<T, kRow>;
  if (const cudaError_t error = cuda::allow_shared_bytes<kKernel>(kTile.shared_bytes()); error != cudaSuccess)
    return error;
  if (const cudaError_t error = cuda::compute_delta<T>(p, delta, stream); error != cudaSuccess) return error;
  kKernel<<<static_cast<unsigned>(ctas), kTile.threads(), kTile.shared_bytes(), stream>>>(p, launch);
  if (const cudaError_t error = cudaPeekAtLastError(); error != cudaSuccess) return error;
  constexpr int kRows = cuda::convert_rows<T>(kTile.tile_m, kTile.head_dim);
  return cuda::convert_dq<T, kRows, kTile.head_dim>(p, space.dq, cuda::rows_are_vectors(p.dq, z.head_dim, sizeof(T)),
                                                    launch.m_tiles * (kTile.tile_m / kRows), stream);
}

// The registry's row for one tile and dtype.
template <typename T, int kRow>
cuda::KernelEntry backward_v2_entry() {
  static_assert(kRow >= 0, "no such row in kBackwardTiles");
  constexpr BackwardTile t = kBackwardTiles[kRow];
  return {t.name.data(),
          80,
          cuda::Pass::kBackward,
          2,
          cuda::dtype_of<T>(),
          t.head_dim,
          {t.tile_m, t.tile_n, t.threads(), t.stages_q, t.shared_bytes()},
          t.why.data(),
          &backward_v2_workspace<kRow>,
          &launch_backward_v2<T, kRow>};
}

}  // namespace fae::sm80
