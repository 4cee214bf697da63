// Steps that several kernels for Hopper take alike.
#pragma once

#include "../../core/params.h"
#include "../ptx/shared_memory.cuh"
#include "../ptx/tma.cuh"
#include "../tile/mma.cuh"
#include "../tile/quad.cuh"
#include "../tile/wgmma_tile.cuh"

namespace fae::sm90 {

constexpr int kRowsPerWarp = 16;  // of a warpgroup's 64

// Dynamic shared memory as a kernel lays it out, where there is no room to align it: it is aligned, if there is no other. (The
// superfluous step makes ptxas deal registers without spills; a plain cast does not.)
template <typename Shared>
FAE_DEVICE Shared& aligned_shared() {
  extern __shared__ uint8_t bytes[];
  const uint32_t misaligned = ptx::shared_address(bytes) % tile::kPanelAlignment;
  auto& shared = *reinterpret_cast<Shared*>(bytes + (misaligned == 0 ? 0 : tile::kPanelAlignment - misaligned));
  if (misaligned != 0) __trap();
  return shared;
}

// The tiles of kN keys that rows [row, end) see.
template <int kN>
FAE_DEVICE Range key_tiles(const IntervalMask& mask, int row, int end) {
  const Range keys = mask.keys_of_rows(row, min(end, mask.seqlen_q));
  if (row >= mask.seqlen_q || keys.empty()) return {0, 0};
  return {keys.begin / kN, (keys.end + kN - 1) / kN};
}

// The tiles of kM queries that see one of the keys [key, end).
template <int kM>
FAE_DEVICE Range query_tiles(const IntervalMask& mask, int key, int end) {
  if (key >= mask.seqlen_k) return {0, 0};
  const Range rows = mask.rows_of_keys(key, min(end, mask.seqlen_k));
  if (rows.empty()) return {0, 0};
  return {rows.begin / kM, (rows.end + kM - 1) / kM};
}

// The tiles of kM queries of which every row sees all keys of [key, end).
template <int kM>
FAE_DEVICE Range full_query_tiles(const IntervalMask& mask, int key, int end) {
  const Range rows = mask.rows_seeing_all(key, end);
  return {(rows.begin + kM - 1) / kM, (rows.end == mask.seqlen_q ? rows.end + kM - 1 : rows.end) / kM};
}

// The part of a range that one of 2^log2_splits splits has; further bits of `split` name another share.
FAE_DEVICE Range part_of(const Range& all, int split, int log2_splits) {
  const int size = all.size();
  split &= (1 << log2_splits) - 1;
  return {all.begin + (size * split >> log2_splits), all.begin + (size * (split + 1) >> log2_splits)};
}

// Starts the copies of a tile of kRows rows from `row` on, all its panels.
template <int kPanels, int kRows>
FAE_DEVICE void load_panels(uint8_t* to, const void* map, uint32_t full, int row, int h, int b) {
  const uint32_t address = ptx::shared_address(to);
#pragma unroll
  for (int i = 0; i < kPanels; ++i)
    ptx::cp_async_bulk_tensor_4d_load(address + i * tile::panel_bytes(kRows), map, full, i * tile::kPanelColumns, row,
                                      h, b);
}

// scale * accumulators to the 16 rows from `row` on of a tensor: what lies before rows_end and columns, 16 bytes a lane.
template <typename T, int kTiles>
FAE_DEVICE void store_rows(const float (&c)[kTiles][4], float scale, const TensorRef& out, int64_t b, int h, int row,
                           int rows_end, int columns, int lane, int first_column = 0) {
  const int t = lane % 4;
#pragma unroll
  for (int i = 0; i < kTiles; i += 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t x[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int from =
            i + k < kTiles ? i + k : i;  // 80 columns are no multiple of 32: the lanes beyond store nothing
        x[k] = tile::Mma<T>::pack(c[from][2 * half] * scale, c[from][2 * half + 1] * scale);
      }
      tile::transpose_quad(x, t);
      const int r = row + lane / 4 + 8 * half, column = first_column + 8 * (i + t);
      if (r < rows_end && column < columns)
        *reinterpret_cast<uint4*>(out.row<T>(b, h, r) + column) = make_uint4(x[0], x[1], x[2], x[3]);
    }
  }
}

template <typename T>
FAE_DEVICE void store_zero_rows(const TensorRef& out, int64_t b, int h, int row, int rows_end, int columns, int lane) {
  for (int r = row; r < min(row + kRowsPerWarp, rows_end); ++r)
    for (int c = lane; c < columns; c += 32) out.row<T>(b, h, r)[c] = tile::from_float<T>(0.0f);
}

}  // namespace fae::sm90
