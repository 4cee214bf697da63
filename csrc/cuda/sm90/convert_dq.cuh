// dQ = scale * accumulator, from the fragments that backward_v2.cuh adds to.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../../core/params.h"
#include "../ptx/control.cuh"
#include "../tile/mma.cuh"
#include "../tile/quad.cuh"

namespace fae::sm90 {

constexpr int kConvertWarps = 8;

// A warp takes 16 rows. accumulator: [batch * heads][slabs of 16 rows][8-column tile][128].
template <typename T, int kD>
__global__ void __launch_bounds__(32 * kConvertWarps)
    convert_dq_kernel(const __grid_constant__ TensorRef dq, const __grid_constant__ Sizes sizes,
                      const float* __restrict__ accumulator, float scale, int slabs) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kTiles = kD / 8;
  ptx::griddepcontrol_wait();
  const int64_t index = int64_t{blockIdx.x} * kConvertWarps + threadIdx.x / 32, head = index / slabs;
  const int lane = threadIdx.x % 32, t = lane % 4, row = static_cast<int>(index - head * slabs) * 16 + lane / 4;
  if (head >= sizes.batch * sizes.heads || row - lane / 4 >= sizes.seqlen_q) return;
  const int64_t b = head / sizes.heads;
  const int h = static_cast<int>(head - b * sizes.heads);
  const float4* from = reinterpret_cast<const float4*>(accumulator + index * (16 * kD)) + lane;
#pragma unroll
  for (int i = 0; i < kTiles; i += 4) {
    uint32_t x[2][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float4 c = __ldcs(from + (i + k < kTiles ? i + k : i) * 32);
      x[0][k] = tile::Mma<T>::pack(c.x * scale, c.y * scale);
      x[1][k] = tile::Mma<T>::pack(c.z * scale, c.w * scale);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      tile::transpose_quad(x[half], t);
      const int r = row + 8 * half, column = 8 * (i + t);
      if (r < sizes.seqlen_q && column < sizes.head_dim)
        *reinterpret_cast<uint4*>(dq.row<T>(b, h, r) + column) =
            make_uint4(x[half][0], x[half][1], x[half][2], x[half][3]);
    }
  }
#else
  (void)dq, (void)sizes, (void)accumulator, (void)scale, (void)slabs;
#endif
}

}  // namespace fae::sm90
