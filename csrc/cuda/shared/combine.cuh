// Merging the results of splits of the keys: out = sum_s w_s O_s, w_s = exp(lse_s - lse), in fp32 and in the order of s.
#pragma once

#include <cuda_runtime.h>

#include "../../core/params.h"
#include "../../core/softmax.h"
#include "../ptx/control.cuh"
#include "../tile/mma.cuh"
#include "launch.h"

namespace fae::cuda {

constexpr int kCombineWarps = 4;
constexpr int kMaxSplits = 64;

// One warp a row. partial_o: [splits][rows][head_dim_v], partial_lse: [splits][rows], natural log; rows = (b, h, q).
template <typename T>
__global__ void __launch_bounds__(32 * kCombineWarps)
    combine_splits_kernel(const __grid_constant__ AttentionParams p, const float* __restrict__ partial_o,
                          const float* __restrict__ partial_lse, int splits) {
  ptx::begin_dependent_grid();
  const int lane = threadIdx.x % 32;
  const int64_t rows = p.sizes.batch * p.sizes.heads * p.sizes.seqlen_q;
  const int64_t row = int64_t{blockIdx.x} * kCombineWarps + threadIdx.x / 32;
  if (row >= rows) return;
  const int q = static_cast<int>(row % p.sizes.seqlen_q);
  const int64_t bh = row / p.sizes.seqlen_q, b = bh / p.sizes.heads;
  const int h = static_cast<int>(bh % p.sizes.heads), dim = p.sizes.head_dim_v;

  float top = softmax<float>::neg_inf();
  for (int s = 0; s < splits; ++s) top = fmaxf(top, partial_lse[s * rows + row]);
  const float base = softmax<float>::subtracted_max(top);
  float sum = 0.0f;
  for (int s = 0; s < splits; ++s) sum += expf(partial_lse[s * rows + row] - base);
  const float inverse = softmax<float>::inverse_sum(sum);
  T* out = p.o.row<T>(b, h, q);
  for (int d = lane; d < dim; d += 32) {
    float x = 0.0f;
    for (int s = 0; s < splits; ++s) {
      const float w = expf(partial_lse[s * rows + row] - base);
      if (w != 0.0f) x = fmaf(w, partial_o[(s * rows + row) * dim + d], x);  // an empty split may have written nothing
    }
    out[d] = tile::from_float<T>(x * inverse);
  }
  if (lane == 0)
    *p.lse.row<float>(b, h, q) = sum == 0.0f ? softmax<float>::neg_inf() : top > 3e38f ? top : base + logf(sum);
}

template <typename T>
cudaError_t combine_splits(const AttentionParams& p, const float* partial_o, const float* partial_lse, int splits,
                           bool dependent, cudaStream_t stream) {
  const int64_t rows = p.sizes.batch * p.sizes.heads * p.sizes.seqlen_q;
  const int64_t blocks = (rows + kCombineWarps - 1) / kCombineWarps;
  return launch(dependent, &combine_splits_kernel<T>, blocks, 32 * kCombineWarps, 0, stream, p, partial_o, partial_lse,
                splits);
}

}  // namespace fae::cuda
