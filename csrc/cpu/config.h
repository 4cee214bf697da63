// The CPU engine's tiles: the only place where a tile number is written. Engine, plan and workspace read these rows.
#pragma once

#include "tile_ops.h"

namespace fae::cpu {

struct ForwardTile {
  const char* name;
  int max_head_dim;   // of max(D, Dv); the first row that fits is taken
  int tile_m;         // query rows of one score tile
  int tile_n;         // keys of one step of the online softmax
  int rows_per_task;  // at most this many rows share one packed K/V block; fewer where threads would idle
  const char* why;
};

struct BackwardTile {
  const char* name;
  int max_head_dim;
  int chunk;   // rows and keys of one square of the schedule: packed once, and owned by one task in each step
  int tile_n;  // keys of one score tile inside it
  const char* why;
};

constexpr ForwardTile kForwardTiles[] = {
    {"cpu_fwd_d128", 128, 64, 256, 512, "scores, packed K and V and 512 rows of O fit a 1 MiB L2"},
    {"cpu_fwd_wide", 1 << 30, 64, 128, 256, "half of each, for head dimensions above 128"},
};

// Version 1 walks its blocks as the paper does, so its tile is what the caller asks for; this is the default.
constexpr ForwardTile kForwardV1Tile = {"cpu_fwd_v1", 1 << 30, 64, 128, 0, "(64, 128) unless block_size is given"};

constexpr BackwardTile kBackwardTiles[] = {
    {"cpu_bwd_d64", 64, 256, 64, "packing is 4 % of a 256 x 256 square in fp32; the square's operands fit the L2"},
    {"cpu_bwd_wide", 1 << 30, 128, 64, "the same footprint at twice the head dimension"},
};

constexpr int kMinBlock = 32;  // block_size, each way
constexpr int kMaxBlock = 128;

template <int kCount>
constexpr bool tiles_are_sound(const ForwardTile (&rows)[kCount]) {
  for (const ForwardTile& t : rows)
    if (t.tile_m % 16 != 0 || t.tile_n % kColumnStep != 0 || t.rows_per_task % t.tile_m != 0) return false;
  return rows[kCount - 1].max_head_dim == 1 << 30;
}
template <int kCount>
constexpr bool tiles_are_sound(const BackwardTile (&rows)[kCount]) {
  for (const BackwardTile& t : rows)
    if (t.chunk % kColumnStep != 0 || t.tile_n % 2 != 0 || t.chunk % t.tile_n != 0) return false;
  return rows[kCount - 1].max_head_dim == 1 << 30;
}
static_assert(tiles_are_sound(kForwardTiles) && tiles_are_sound(kBackwardTiles));

}  // namespace fae::cpu
