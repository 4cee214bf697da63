// The CPU engine's tiles: the only place where a tile number is written. Engine, plan and workspace read these rows.
#pragma once

#include "tile_ops.h"

namespace fae::cpu {

struct ForwardTile {
  const char* name;
  int max_head_dim;      // of max(D, Dv); the first row that fits is taken
  int tile_m;            // query rows of one score tile
  int tile_n;            // keys of one step of the online softmax
  int rows_per_task;     // at most this many rows share one packed K/V block; fewer where threads would idle
  int rows_per_product;  // at most this many rows of tiles that see the same keys are multiplied at once
  const char* why;
};

struct BackwardTile {
  const char* name;
  int max_head_dim;
  int chunk;   // rows and keys of one square of the schedule: packed once, and owned by one task in each step
  int tile_n;  // keys of one score tile inside it
  const char* why;
};

// "Measured": docs/kernels/cpu.md, two cores with AVX-512, S 512 to 2048, fp32 and bf16.
constexpr ForwardTile kForwardTiles[] = {
    {"cpu_fwd_d256", 256, 64, 512, 512, 64,
     "measured: 0 to 6 % before 256 keys, 5 to 11 % before 128; rows of 32 lose 2 to 5 %"},
    {"cpu_fwd_wide", 1 << 30, 64, 128, 256, 64, "scratch grows with D: smaller blocks keep it in bounds"},
};

// Operands of bf16. Where AMX multiplies them, what surrounds the products weighs more: packing, and the tile
// registers, which brgemm configures anew for every change of shape.
constexpr ForwardTile kForwardBf16Tiles[] = {
    {"cpu_fwd_bf16_d256", 256, 64, 512, 1024, 128,
     "measured on AMX: 2 to 5 % before 512 rows a task, 1 to 5 % before 64 a product; 256 keys lose 8 to 20 %"},
    {"cpu_fwd_bf16_wide", 1 << 30, 64, 256, 512, 128,
     "measured on AMX: 10 to 20 % before 128 keys and 256 rows a task"},
};

// Version 1 walks its blocks as the paper does, so its tile is what the caller asks for; this is the default.
constexpr ForwardTile kForwardV1Tile = {"cpu_fwd_v1", 1 << 30, 64, 128, 0, 64, "(64, 128) unless block_size is given"};

constexpr BackwardTile kBackwardTiles[] = {
    {"cpu_bwd_d256", 256, 256, 64,
     "measured: 2 to 7 % before 128 at D 192 and 256; 512 gain 3 % in fp32 only, but idle cores"},
    {"cpu_bwd_wide", 1 << 30, 128, 64, "scratch grows with D: half of it"},
};

// Bytes behind each row of a score tile and of the packed K and V. Strides of a power of two put the rows that a product
// loads or stores together into few sets of the cache. Measured: docs/kernels/cpu.md, 3 to 15 % of bf16 on AMX.
constexpr int kRowPadding = 64;

constexpr int kMinBlock = 32;  // block_size, each way
constexpr int kMaxBlock = 128;

template <int kCount>
constexpr bool tiles_are_sound(const ForwardTile (&rows)[kCount]) {
  for (const ForwardTile& t : rows)
    if (t.tile_m % 16 != 0 || t.tile_n % kColumnStep != 0 || t.rows_per_product % t.tile_m != 0 ||
        t.rows_per_task % t.tile_m != 0 || t.rows_per_task / t.tile_m > 64)  // bits of `started` in forward_v2.cpp
      return false;
  return rows[kCount - 1].max_head_dim == 1 << 30;
}
template <int kCount>
constexpr bool tiles_are_sound(const BackwardTile (&rows)[kCount]) {
  for (const BackwardTile& t : rows)
    if (t.chunk % kColumnStep != 0 || t.tile_n % 2 != 0 || t.chunk % t.tile_n != 0) return false;
  return rows[kCount - 1].max_head_dim == 1 << 30;
}
static_assert(tiles_are_sound(kForwardTiles) && tiles_are_sound(kForwardBf16Tiles) && tiles_are_sound(kBackwardTiles));

}  // namespace fae::cpu
