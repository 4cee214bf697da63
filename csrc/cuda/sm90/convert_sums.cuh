// Gradients from fp32 sums in the fragments of backward_v2.cuh: dQ from its accumulator, dK and dV from the parts of several
// CTAs, which are added in their order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../../core/params.h"
#include "../ptx/control.cuh"
#include "../tile/mma.cuh"
#include "../tile/quad.cuh"

namespace fae::sm90 {

constexpr int kConvertWarps = 8;

struct ConvertLaunch {
  TensorRef to;
  int64_t all_heads;  // of all batch entries
  int heads, rows, columns;
  const float* from;  // [split][all_heads][slabs of 16 rows][8-column tile][128]
  int splits, slabs;
  float scale;
};

// A warp takes 16 rows.
template <typename T, int kD>
__global__ void __launch_bounds__(32 * kConvertWarps) convert_kernel(const __grid_constant__ ConvertLaunch p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kTiles = kD / 8;
  ptx::griddepcontrol_wait();
  const int64_t index = int64_t{blockIdx.x} * kConvertWarps + threadIdx.x / 32, head = index / p.slabs;
  const int lane = threadIdx.x % 32, t = lane % 4, row = static_cast<int>(index - head * p.slabs) * 16 + lane / 4;
  if (head >= p.all_heads || row - lane / 4 >= p.rows) return;
  const int64_t b = head / p.heads;
  const int h = static_cast<int>(head - b * p.heads);
  const float4* from = reinterpret_cast<const float4*>(p.from + index * (16 * kD)) + lane;
#pragma unroll
  for (int i = 0; i < kTiles; i += 4) {
    uint32_t x[2][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float4* at = from + (i + k < kTiles ? i + k : i) * 32;
      float4 sum = __ldcs(at);
#pragma unroll 1
      for (int split = 1; split < p.splits; ++split) {
        at += p.all_heads * p.slabs * (16 * kD / 4);
        const float4 c = __ldcs(at);
        sum.x += c.x, sum.y += c.y, sum.z += c.z, sum.w += c.w;
      }
      x[0][k] = tile::Mma<T>::pack(sum.x * p.scale, sum.y * p.scale);
      x[1][k] = tile::Mma<T>::pack(sum.z * p.scale, sum.w * p.scale);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      tile::transpose_quad(x[half], t);
      const int r = row + 8 * half, column = 8 * (i + t);
      if (r < p.rows && column < p.columns)
        *reinterpret_cast<uint4*>(p.to.row<T>(b, h, r) + column) =
            make_uint4(x[half][0], x[half][1], x[half][2], x[half][3]);
    }
  }
#else
  (void)p;
#endif
}

}  // namespace fae::sm90
