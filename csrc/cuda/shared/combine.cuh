// Merging the results of splits of the keys: out = sum_s w_s O_s, w_s = exp(lse_s - lse), in fp32 and in a fixed order.
#pragma once

#include <cuda_runtime.h>

#include "../../core/params.h"
#include "../../core/softmax.h"
#include "../ptx/control.cuh"
#include "../tile/mma.cuh"
#include "launch.h"

namespace fae::cuda {

constexpr int kCombineWarps = 4, kCombineColumns = 128;
constexpr int kMaxSplits = 64;  // two a lane

// One row's splits are shared by `share` warps of a CTA, which add up their own in order, and the first of them adds what all
// have. Their loads are under way together: a row of a token-by-token call has many splits, and one after the other they took
// longer than the attention. partial_o: [splits][rows][head_dim_v], partial_lse: [splits][rows], natural log; rows = (b, h, q).
template <typename T>
__global__ void __launch_bounds__(32 * kCombineWarps)
    combine_splits_kernel(const __grid_constant__ AttentionParams p, const float* __restrict__ partial_o,
                          const float* __restrict__ partial_lse, int splits, int share) {
  ptx::begin_dependent_grid();
  __shared__ float parts[kCombineWarps][kCombineColumns];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, dim = p.sizes.head_dim_v;
  const int64_t rows = p.sizes.batch * p.sizes.heads * p.sizes.seqlen_q;
  const int64_t row = int64_t{blockIdx.x} * (kCombineWarps / share) + warp / share;
  const bool is_row = row < rows, is_first = is_row && warp % share == 0;
  const int q = static_cast<int>(row % p.sizes.seqlen_q);
  const int64_t bh = row / p.sizes.seqlen_q, b = bh / p.sizes.heads;
  const int h = static_cast<int>(bh % p.sizes.heads);

  const auto lse_of = [&](int s) {
    return is_row && s < splits ? partial_lse[s * rows + row] : softmax<float>::neg_inf();
  };
  const float lse[2] = {lse_of(lane), lse_of(lane + 32)};
  float top = fmaxf(lse[0], lse[1]);
  for (int i = 16; i > 0; i /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, i));
  const float base = softmax<float>::subtracted_max(top);
  const float weight[2] = {expf(lse[0] - base), expf(lse[1] - base)};
  float sum = weight[0] + weight[1];
  for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
  const float inverse = softmax<float>::inverse_sum(sum);

  const int each = (splits + share - 1) / share, begin = warp % share * each, end = min(begin + each, splits);
  for (int column = 0; column < dim; column += kCombineColumns) {
    float x[kCombineColumns / 32] = {};
    const float* from = partial_o + (begin * rows + row) * dim + column + lane;
#pragma unroll 8
    for (int s = begin; s < end; ++s, from += rows * dim) {
      const float w = __shfl_sync(0xffffffffu, s < 32 ? weight[0] : weight[1], s % 32);
#pragma unroll
      for (int i = 0; i < kCombineColumns / 32; ++i) {
        // An empty split may have written nothing; a row that is none has no weights.
        const float o = w != 0.0f && column + lane + 32 * i < dim ? from[32 * i] : 0.0f;
        x[i] = fmaf(w, o, x[i]);
      }
    }
    if (share > 1) {
#pragma unroll
      for (int i = 0; i < kCombineColumns / 32; ++i) parts[warp][lane + 32 * i] = x[i];
      __syncthreads();
      if (is_first) {
#pragma unroll
        for (int i = 0; i < kCombineColumns / 32; ++i)
          for (int other = 1; other < share; ++other) x[i] += parts[warp + other][lane + 32 * i];
      }
      __syncthreads();
    }
    if (is_first) {
      T* out = p.o.row<T>(b, h, q) + column + lane;
#pragma unroll
      for (int i = 0; i < kCombineColumns / 32; ++i)
        if (column + lane + 32 * i < dim) out[32 * i] = tile::from_float<T>(x[i] * inverse);
    }
  }
  if (is_first && lane == 0)
    *p.lse.row<float>(b, h, q) = sum == 0.0f ? softmax<float>::neg_inf() : top > 3e38f ? top : base + logf(sum);
}

template <typename T>
cudaError_t combine_splits(const AttentionParams& p, const float* partial_o, const float* partial_lse, int splits,
                           bool dependent, cudaStream_t stream) {
  const int64_t rows = p.sizes.batch * p.sizes.heads * p.sizes.seqlen_q;
  const int share = splits > 8 ? 4 : splits > 4 ? 2 : 1;
  return launch(dependent, &combine_splits_kernel<T>, ceil_div(rows, kCombineWarps / share), 32 * kCombineWarps, 0,
                stream, p, partial_o, partial_lse, splits, share);
}

}  // namespace fae::cuda
