// Before the backward: delta = rowsum(dO * O) - dlse (FlashAttention-2, Algorithm 2, line 4), lse in base 2, and zeros in
// what the backward adds to.
//
// The gradient of lse enters here alone: dS = P (dP - rowsum(dO * O) + dlse).
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../../core/params.h"
#include "../../core/softmax.h"
#include "../ptx/control.cuh"
#include "../tile/mma.cuh"

namespace fae::cuda {

constexpr int kDeltaThreads = 256;
constexpr int kDeltaLanes = 8;  // threads that share a row

struct DeltaLaunch {
  bool vector;  // rows of both O and dO may be read 16 bytes at a time
  int m_tiles;  // tiles of tile_m rows of a (batch, head)
  int tile_m;
  int tile_floats;          // of one tile of the accumulator
  float* stats;             // [batch][heads][m_tiles][lse2, delta][tile_m]
  float* accumulator;       // [batch][heads][m_tiles][tile_floats]: cleared
  bool unseen_dq;           // dQ of tiles whose rows see no key is set to 0 here: nothing is ever added to it
  int* semaphores;          // [batch][heads][m_tiles]: cleared; nullptr: there are none
  int* counters = nullptr;  // two of them: cleared
};

template <typename T>
FAE_DEVICE float to_float(T x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else if constexpr (std::is_same_v<T, __half>)
    return __half2float(x);
  else
    return __bfloat162float(x);
}

// The sum over a row's elements of this lane, one of kDeltaLanes.
template <typename T>
FAE_DEVICE float partial_dot(const T* x, const T* y, int columns, bool vector, int lane) {
  constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T));
  float sum = 0.0f;
  if (vector) {
#pragma unroll 4
    for (int c = lane * kPerChunk; c < columns; c += kDeltaLanes * kPerChunk) {
      alignas(16) T a[kPerChunk], b[kPerChunk];
      *reinterpret_cast<uint4*>(a) = *reinterpret_cast<const uint4*>(x + c);
      *reinterpret_cast<uint4*>(b) = *reinterpret_cast<const uint4*>(y + c);
#pragma unroll
      for (int i = 0; i < kPerChunk; ++i) sum = fmaf(to_float(a[i]), to_float(b[i]), sum);
    }
  } else {
    for (int c = lane; c < columns; c += kDeltaLanes) sum = fmaf(to_float(x[c]), to_float(y[c]), sum);
  }
  return sum;
}

// One CTA per tile of rows. Rows past the end, and rows that see no key, whatever their dlse, get lse2 = +inf and
// delta = 0, hence P = 0 and dS = 0.
template <typename T>
__global__ void __launch_bounds__(kDeltaThreads)
    delta_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ DeltaLaunch launch) {
  ptx::begin_dependent_grid();
  if (launch.counters != nullptr && blockIdx.x == 0 && threadIdx.x < 2) launch.counters[threadIdx.x] = 0;
  const int64_t tile = blockIdx.x, bh = tile / launch.m_tiles, b = bh / p.fwd.sizes.heads;
  const int h = static_cast<int>(bh % p.fwd.sizes.heads), m0 = static_cast<int>(tile % launch.m_tiles) * launch.tile_m;
  const int seqlen_q = p.fwd.seq(b).seqlen_q;

  float4* cleared = reinterpret_cast<float4*>(launch.accumulator + tile * launch.tile_floats);
  for (int i = threadIdx.x; i < launch.tile_floats / 4; i += kDeltaThreads) cleared[i] = make_float4(0, 0, 0, 0);
  if (launch.semaphores != nullptr && threadIdx.x == 0) launch.semaphores[tile] = 0;

  const int end = min(m0 + launch.tile_m, seqlen_q);
  if (launch.unseen_dq && m0 < end && p.fwd.mask(b).keys_of_rows(m0, end).empty()) {
    for (int i = threadIdx.x; i < (end - m0) * p.fwd.sizes.head_dim; i += kDeltaThreads)
      p.dq.row<T>(b, h, m0 + i / p.fwd.sizes.head_dim)[i % p.fwd.sizes.head_dim] = tile::from_float<T>(0.0f);
  }

  float* stats = launch.stats + tile * 2 * launch.tile_m;
  const int lane = threadIdx.x % kDeltaLanes;
  // Whole warps stay together for the shuffles: a pass is as many rows for every thread.
  for (int first = 0; first < launch.tile_m; first += kDeltaThreads / kDeltaLanes) {
    const int r = first + threadIdx.x / kDeltaLanes, row = m0 + r;
    const bool in_tile = r < launch.tile_m, exists = in_tile && row < seqlen_q;
    float sum = 0.0f;
    if (exists)
      sum = partial_dot(p.dout.row<const T>(b, h, row), p.fwd.o.row<const T>(b, h, row), p.fwd.sizes.head_dim_v,
                        launch.vector, lane);
#pragma unroll
    for (int step = kDeltaLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane != 0 || !in_tile) continue;
    if (exists && p.dlse.data != nullptr) sum -= *p.dlse.row<const float>(b, h, row);
    const float lse = exists ? *p.fwd.lse.row<const float>(b, h, row) : softmax<float>::neg_inf();
    stats[r] = softmax<float>::lse_base2(lse);
    stats[launch.tile_m + r] = lse == softmax<float>::neg_inf() ? 0.0f : sum;
  }
}

template <typename T>
cudaError_t compute_delta(const BackwardParams& p, const DeltaLaunch& launch, cudaStream_t stream) {
  const int64_t ctas = p.fwd.sizes.batch * p.fwd.sizes.heads * launch.m_tiles;
  delta_kernel<T><<<static_cast<unsigned>(ctas), kDeltaThreads, 0, stream>>>(p, launch);
  return cudaPeekAtLastError();
}

}  // namespace fae::cuda
