// The fp32 accumulator of dQ: its layout, and its conversion to the output.
//
// [batch][head][tile of kM rows][16-row slab][8-column tile][128 floats]: a 16 x 8 accumulator tile of mma.sync stays
// together, so that a warp adds it straight from its registers with consecutive lanes on consecutive addresses. Inside
// the 128 floats the order is that of the widest reduction: four floats of a lane from sm_90 on, one before. Kernels that
// write and read it are compiled for the same architecture, since they stand in the same binary.
#pragma once

#include <cuda_runtime.h>

#include "../../core/params.h"
#include "../ptx/global_memory.cuh"
#include "../tile/copy.cuh"
#include "launch.h"

namespace fae::cuda {

constexpr int kFragmentFloats = 128;  // of a 16 x 8 tile
constexpr int kConvertThreads = 256;

// Adds a warp's accumulator tile; no thread adds to an element twice in one call.
FAE_DEVICE void add_fragment(float* fragment, const float (&c)[4], int lane) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  ptx::red_add_v4(fragment + 4 * lane, c[0], c[1], c[2], c[3]);
#else
#pragma unroll
  for (int e = 0; e < 4; ++e) atomicAdd(fragment + 32 * e + lane, c[e]);
#endif
}

// A lane's accumulators of a tile, from the past-the-L1 side: other SMs wrote them.
FAE_DEVICE void read_fragment(float (&c)[4], const float* fragment, int lane) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const float4 x = __ldcg(reinterpret_cast<const float4*>(fragment) + lane);
  c[0] = x.x, c[1] = x.y, c[2] = x.z, c[3] = x.w;
#else
#pragma unroll
  for (int e = 0; e < 4; ++e) c[e] = __ldcg(fragment + 32 * e + lane);
#endif
}

// dQ = scale * accumulator, one CTA per kM rows, which may be part of a tile: slabs follow each other; through shared memory, so that rows are written 16 bytes wide.
template <typename T, int kM, int kD>
__global__ void __launch_bounds__(kConvertThreads)
    convert_dq_kernel(const __grid_constant__ TensorRef dq, const __grid_constant__ AttentionParams p,
                      const float* __restrict__ accumulator, float scale, bool vector, int m_tiles) {
  using Mma = tile::Mma<T>;
  constexpr int kPitch = kD * static_cast<int>(sizeof(T)), kTileColumns = kD / 8, kTiles = kM / 16 * kTileColumns;
  constexpr int kWarps = kConvertThreads / 32;
  __shared__ alignas(128) char staging[kM * kPitch];
  const uint32_t sRows = ptx::shared_address(staging);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t bh = blockIdx.x / m_tiles, b = bh / p.sizes.heads;
  const int h = static_cast<int>(bh % p.sizes.heads), m0 = static_cast<int>(blockIdx.x % m_tiles) * kM;
  const int seqlen_q = p.seq(b).seqlen_q;
  if (m0 >= seqlen_q) return;
  const float* source = accumulator + int64_t{blockIdx.x} * (kM * kD);
#pragma unroll 4
  for (int i = warp; i < kTiles; i += kWarps) {
    float c[4];
    read_fragment(c, source + i * kFragmentFloats, lane);
    const uint32_t target = sRows + i / kTileColumns * 16 * kPitch + Mma::template lane_pair<kPitch>(lane);
    Mma::template store_pair<kPitch>(target, i % kTileColumns, c[0] * scale, c[1] * scale);
    Mma::template store_pair<kPitch>(target + 8 * kPitch, i % kTileColumns, c[2] * scale, c[3] * scale);
  }
  __syncthreads();
  const tile::GlobalRows<T> gRows{dq.row<T>(b, h, 0), dq.stride_s, p.sizes.head_dim, vector};
  tile::store_rows<kM, kD, kPitch, kConvertThreads, T>(gRows, sRows, 0, m0, seqlen_q, threadIdx.x);
}

// Rows that a CTA converts, of tiles of tile_m: as many as fit the shared memory that needs no permission.
template <typename T>
constexpr int convert_rows(int tile_m, int head_dim) {
  int rows = tile_m;
  while (rows * head_dim * static_cast<int>(sizeof(T)) > kSharedBytesByDefault) rows /= 2;
  return rows;
}

template <typename T, int kM, int kD>
cudaError_t convert_dq(const BackwardParams& p, const float* accumulator, bool vector, int m_tiles,
                       cudaStream_t stream) {
  const int64_t ctas = p.fwd.sizes.batch * p.fwd.sizes.heads * m_tiles;
  convert_dq_kernel<T, kM, kD><<<static_cast<unsigned>(ctas), kConvertThreads, 0, stream>>>(
      p.dq, p.fwd, accumulator, static_cast<float>(p.fwd.scale), vector, m_tiles);
  return cudaPeekAtLastError();
}

}  // namespace fae::cuda
