// The tiles of the mma.sync kernels: the only place where a tile number of theirs is written. Kernel, launcher,
// workspace and registry read these rows; cuda/instances/table.py names those that are built.
#pragma once

#include <string_view>

#include "../../core/params.h"

namespace fae::sm80 {

// Shared memory of one block that every GPU from 8.0 on has (8.6, 8.9 and 12.0 have no more).
constexpr int kSharedBytesEverywhere = 101376;
constexpr int kSharedBytesMost = 232448;  // 9.0

// Version 2, forward. A CTA owns tile_m query rows; warps / column_warps groups of warps own 16 * m_tiles rows each. In a
// group of column_warps > 1, each warp takes its share of the keys for S and its share of the columns for O, and P passes
// through shared memory: at large D a warp's O then still has 32 rows, which halves the reads of K and V.
struct ForwardTile {
  std::string_view name;
  int element_bytes;  // 2: fp16 and bf16, 4: fp32
  int head_dim;       // D and Dv are padded up to this on chip
  int warps;
  int column_warps;
  int m_tiles;
  int tile_n;           // keys of one step
  int stages;           // 1: K and V have a buffer each, two barriers a step; 2: two each, one barrier
  bool q_in_registers;  // else Q's fragments are read from shared memory in every step
  int ctas_per_sm;      // the register cap
  std::string_view why;
  bool wants_company = false;  // taken unasked only where shared memory holds ctas_per_sm of them

  constexpr int tile_m() const { return 16 * m_tiles * warps / column_warps; }
  constexpr int threads() const { return 32 * warps; }
  constexpr int pitch() const { return head_dim * element_bytes; }
  constexpr int p_pitch() const { return tile_n * element_bytes; }
  constexpr int exchange_bytes() const { return column_warps == 1 ? 0 : tile_m() * (p_pitch() + 4 * column_warps); }
  constexpr int shared_bytes() const { return (tile_m() + 2 * stages * tile_n) * pitch() + exchange_bytes(); }
};

// "Measured": docs/kernels/sm80.md, an H100, bf16 unless the row is fp32, 16k tokens; FA2 is PyTorch's FlashAttention-2.
constexpr ForwardTile kForwardTiles[] = {
    // name, element_bytes, head_dim, warps, column_warps, m_tiles, tile_n, stages, q_in_registers, ctas_per_sm, why
    {"sm80_fwd_d32", 2, 32, 4, 1, 2, 128, 2, false, 2, "measured: 3 to 8 % over 64 keys with Q in registers"},
    {"sm80_fwd_d64_n128", 2, 64, 4, 1, 2, 128, 2, false, 2,
     "measured: 1.09 to 1.17 of FA2, 2 to 7 % over d64 (4 % under it at 512 causal); one stage 3 to 7 % slower", true},
    {"sm80_fwd_d64", 2, 64, 4, 1, 2, 64, 2, true, 2,
     "GPUs with 99 KB of shared memory a block, where d64_n128 would be alone on an SM"},
    {"sm80_fwd_d64_m16", 2, 64, 4, 4, 1, 128, 1, false, 2, "few rows: decode of 8k keys 32.9 us, 37.6 with d64"},
    {"sm80_fwd_d96", 2, 96, 4, 1, 2, 64, 2, false, 2, "as d128"},
    {"sm80_fwd_d128", 2, 128, 4, 1, 2, 64, 2, false, 2,
     "measured: 1.08 to 1.17 of FA2; one stage 3 to 6 % slower (8 % faster at 512 causal), 48 keys 4 to 8 % slower"},
    {"sm80_fwd_d128_m16", 2, 128, 4, 4, 1, 128, 1, false, 2, "few rows: 128 rows on 4k keys 24.7 us, 32.6 with d128"},
    {"sm80_fwd_d192", 2, 192, 4, 2, 2, 64, 1, false, 2, "as d256"},
    {"sm80_fwd_d256", 2, 256, 4, 2, 2, 64, 1, false, 2,
     "measured: 1.02 to 1.25 of FA2; without column warps 5 to 10 % slower; 8 warps on 128 keys as fast, 9 % slower at "
     "512 "
     "causal"},
    {"sm80_fwd_d256_small", 2, 256, 4, 1, 1, 64, 1, false, 2, "GPUs with 99 KB of shared memory a block"},
    {"sm80_fwd_f32_d32", 4, 32, 4, 1, 2, 32, 1, false, 2, "as d64"},
    {"sm80_fwd_f32_d64", 4, 64, 4, 1, 2, 32, 1, false, 2,
     "measured: 1.8 of PyTorch's memory-efficient attention; two stages 1 % slower, 8 warps of 16 rows 15 % slower"},
    {"sm80_fwd_f32_d64_m16", 4, 64, 4, 4, 1, 128, 1, false, 2,
     "few rows: (1, 256, 64) in 6.4 us, 25 with 128 rows; 256 keys no faster alone, 40 % slower where two share an SM"},
    {"sm80_fwd_f32_d128", 4, 128, 4, 1, 1, 32, 1, false, 2,
     "measured: 1.2 of PyTorch's memory-efficient attention; column warps and 32 rows a warp as fast"},
    {"sm80_fwd_f32_d256", 4, 256, 8, 2, 2, 32, 1, false, 1,
     "measured: 1.4 of PyTorch's memory-efficient attention; a fifth faster than 32 rows a CTA"},
    {"sm80_fwd_f32_d256_small", 4, 256, 2, 1, 1, 32, 1, false, 2, "GPUs with 163 or 99 KB of shared memory a block"},
};

// Version 1, forward: the key columns of a block, Bc. The rows, Br, are a number of warps of 16 rows each that the caller
// chooses at run time.
struct ForwardV1Tile {
  std::string_view name;
  int element_bytes;
  int head_dim;
  int tile_n;
  int max_warps;
  int default_warps;
  int q_buffers;  // of each warp: with two the next rows are on their way while these are used
  std::string_view why;

  constexpr int pitch() const { return head_dim * element_bytes; }
  constexpr int shared_bytes(int warps) const { return (2 * tile_n + 16 * q_buffers * warps) * pitch(); }
};

constexpr int kV1RowsOfWarp = 16;

constexpr ForwardV1Tile kForwardV1Tiles[] = {
    // name, element_bytes, head_dim, tile_n, max_warps, default_warps, q_buffers, why
    {"sm80_fwd_v1_d64_n64", 2, 64, 64, 8, 4, 2, "a choice of block_size"},
    {"sm80_fwd_v1_d64_n32", 2, 64, 32, 8, 4, 2, "a choice of block_size: three times the time of n64"},
    {"sm80_fwd_v1_d64_n128", 2, 64, 128, 8, 4, 2, "the fewest passes over O"},
    {"sm80_fwd_v1_d128_n64", 2, 128, 64, 8, 4, 2, "a choice of block_size"},
    {"sm80_fwd_v1_d128_n32", 2, 128, 32, 8, 4, 2, "a choice of block_size"},
    {"sm80_fwd_v1_d128_n128", 2, 128, 128, 4, 4, 1, "half the time of n64; one buffer of Q, to fit 99 KB"},
    {"sm80_fwd_v1_d256_n32", 2, 256, 32, 8, 4, 1, "what fits 99 KB"},
    {"sm80_fwd_v1_f32_d64_n64", 4, 64, 64, 8, 4, 2, "a choice of block_size"},
    {"sm80_fwd_v1_f32_d64_n32", 4, 64, 32, 8, 4, 2, "a choice of block_size"},
    {"sm80_fwd_v1_f32_d64_n128", 4, 64, 128, 8, 4, 1,
     "measured: the fastest at the shapes of origin_tables.py and at 4k"},
    {"sm80_fwd_v1_f32_d128_n32", 4, 128, 32, 8, 4, 1, "a choice of block_size"},
    {"sm80_fwd_v1_f32_d128_n64", 4, 128, 64, 4, 4, 1, "what fits 99 KB"},
    {"sm80_fwd_v1_f32_d256_n32", 4, 256, 32, 2, 2, 1, "what fits 99 KB"},
};

// Version 2, backward. A CTA owns tile_n keys and walks the query tiles that see them.
//
// S^T and dP^T (keys x queries) are split over warps_n x warps_m warps, each a block of tile_n / warps_n keys and tile_m /
// warps_m queries; dK and dV (keys x D) over warps_n groups of keys and warps_m of columns. With warps_m = 1 a warp's P^T
// and dS^T are its own A fragments; else they pass through shared memory.
struct BackwardTile {
  std::string_view name;
  int element_bytes;
  int head_dim;
  int tile_m;
  int tile_n;
  int warps_n;
  int warps_m;
  int stages_q;   // buffers of Q; the next one is loaded while this one is used
  int stages_do;  // the same of dO
  int ctas_per_sm;
  std::string_view why;

  constexpr int warps() const { return warps_n * warps_m; }
  constexpr int threads() const { return 32 * warps(); }
  constexpr int pitch() const { return head_dim * element_bytes; }
  constexpr int score_pitch() const { return tile_m * element_bytes; }  // of P^T and dS^T
  constexpr int score_buffers() const { return warps_m > 1 ? 2 : 1; }
  // K and V, then Q and dO, then dS^T (and P^T), then lse and delta of each Q.
  constexpr int shared_bytes() const {
    return (2 * tile_n + (stages_q + stages_do) * tile_m) * pitch() + score_buffers() * tile_n * score_pitch() +
           stages_q * 2 * tile_m * static_cast<int>(sizeof(float));
  }
  // How the warps share a tile of dQ: this many groups of rows, the rest over columns, such that a warp reads least.
  constexpr int dq_warps_m() const {
    int best = 0, least = 0;
    for (int groups = 1; groups <= warps(); ++groups) {
      if (warps() % groups != 0 || tile_m % (16 * groups) != 0 || head_dim % (16 * (warps() / groups)) != 0) continue;
      const int reads = tile_m / groups + head_dim / (warps() / groups);
      if (best == 0 || reads < least) best = groups, least = reads;
    }
    return best;
  }
  constexpr int dq_warps_d() const { return warps() / dq_warps_m(); }
  // A warp computes its block of dQ in halves where whole its sums would not fit beside dK, dV and fp32's operands.
  constexpr int dq_passes() const {
    const int most_sums = element_bytes == 4 ? 32 : 64;  // registers of a thread
    const int blocks = head_dim / 16 / dq_warps_d();     // of 16 columns, of a warp
    int passes = (tile_m * head_dim / threads() + most_sums - 1) / most_sums;
    while (passes < blocks && blocks % passes != 0) ++passes;
    return passes;
  }
};

// Of rows for the same head_dim the first that fits a GPU is taken: those for the most shared memory come first.
constexpr BackwardTile kBackwardTiles[] = {
    // name, element_bytes, head_dim, tile_m, tile_n, warps_n, warps_m, stages_q, stages_do, ctas_per_sm, why
    {"sm80_bwd_d32", 2, 32, 32, 128, 4, 1, 2, 2, 2, "as d64"},
    {"sm80_bwd_d64", 2, 64, 32, 128, 4, 1, 2, 2, 2,
     "measured: 1.12 to 1.6 of FA2; 64 x 64 with P exchanged 4 to 12 % slower, 8 warps on 64 x 128 18 to 23 % slower"},
    {"sm80_bwd_d96", 2, 96, 64, 64, 2, 2, 2, 2, 2, "the tile of d128_s1 with buffers to spare"},
    {"sm80_bwd_d128_w8", 2, 128, 64, 128, 4, 2, 2, 2, 1,
     "measured: 1.04 to 1.5 of FA2; two CTAs of 64 x 64 as fast when short, 3 to 7 % slower from 2k on"},
    {"sm80_bwd_d128_s1", 2, 128, 64, 64, 2, 2, 1, 1, 2, "GPUs with 163 or 99 KB of shared memory a block"},
    {"sm80_bwd_d192_m128", 2, 192, 128, 64, 2, 4, 1, 1, 1, "as d256"},
    {"sm80_bwd_d192_small", 2, 192, 32, 32, 2, 2, 2, 2, 2, "GPUs with 163 or 99 KB of shared memory a block"},
    {"sm80_bwd_d256_m128", 2, 256, 128, 64, 2, 4, 1, 1, 1,
     "measured: 1.08 to 1.44 of FA2; 64 rows 8 to 20 % slower: fewer keys' fragments are read per query"},
    {"sm80_bwd_d256_s1", 2, 256, 64, 64, 2, 4, 1, 1, 1, "163 KB of shared memory a block"},
    {"sm80_bwd_d256_small", 2, 256, 32, 32, 2, 2, 2, 1, 2, "99 KB of shared memory a block"},
    {"sm80_bwd_f32_d32", 4, 32, 32, 64, 2, 2, 2, 2, 2, "as d64"},
    {"sm80_bwd_f32_d64", 4, 64, 32, 64, 2, 2, 2, 2, 2,
     "measured: 1.7 of PyTorch's memory-efficient attention; four groups of keys as fast"},
    {"sm80_bwd_f32_d128", 4, 128, 32, 32, 2, 2, 2, 2, 2, "measured: 1.5 of PyTorch's memory-efficient attention"},
    {"sm80_bwd_f32_d128_s1", 4, 128, 32, 32, 2, 2, 2, 1, 2, "99 KB of shared memory a block"},
    {"sm80_bwd_f32_d256_w8", 4, 256, 32, 64, 4, 2, 1, 1, 1,
     "measured: 1.4 of PyTorch's memory-efficient attention; a quarter faster than 32 keys"},
    {"sm80_bwd_f32_d256", 4, 256, 32, 32, 2, 2, 1, 1, 1, "163 KB of shared memory a block"},
};

template <typename Row, int kCount>
constexpr int row_named(const Row (&rows)[kCount], std::string_view name) {
  for (int i = 0; i < kCount; ++i)
    if (rows[i].name == name) return i;
  return -1;  // an index that no instance compiles with
}
constexpr int forward_row(std::string_view name) { return row_named(kForwardTiles, name); }
constexpr int backward_row(std::string_view name) { return row_named(kBackwardTiles, name); }

constexpr int forward_v1_row(std::string_view name) { return row_named(kForwardV1Tiles, name); }

constexpr bool forward_v1_tiles_fit() {
  for (const ForwardV1Tile& t : kForwardV1Tiles)
    if (t.shared_bytes(t.max_warps) > kSharedBytesEverywhere || t.default_warps > t.max_warps) return false;
  return true;
}
static_assert(forward_v1_tiles_fit());

constexpr bool forward_tiles_fit() {
  for (const ForwardTile& t : kForwardTiles)
    if (t.shared_bytes() > kSharedBytesMost || t.shared_bytes() * t.ctas_per_sm > kSharedBytesMost + 1024 ||
        t.threads() > 1024 || t.pitch() % 64 != 0)
      return false;
  return true;
}
static_assert(forward_tiles_fit());

constexpr bool backward_tiles_fit() {
  for (const BackwardTile& t : kBackwardTiles)
    if (t.shared_bytes() > kSharedBytesMost || t.shared_bytes() * t.ctas_per_sm > kSharedBytesMost + 1024 ||
        t.threads() > 1024 || t.pitch() % 64 != 0 || t.score_pitch() % 64 != 0 || t.tile_n % (16 * t.warps_n) != 0 ||
        t.tile_m % (16 * t.warps_m) != 0 || t.head_dim % (16 * t.warps_m) != 0 || t.dq_warps_m() == 0)
      return false;
  return true;
}
static_assert(backward_tiles_fit());

}  // namespace fae::sm80
