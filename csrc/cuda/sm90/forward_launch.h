// What the forward gets from its launch beside the call.
#pragma once

#include "tensor_map.h"
#include "tile_order.h"

namespace fae::sm90 {

struct ForwardLaunch {
  CUtensorMap q, k, v, o;
  TileOrder order;
  float scale_log2;    // positive
  int* next_tile;      // counter from which CTAs draw tiles, 0 at the start
  bool draws_early;    // the next tile is drawn when a tile's first copies are under way, else after its last
  int split_tiles;     // key tiles of a split
  float* partial_o;    // [splits][batch * heads * seqlen_q][head_dim_v]; nullptr: the keys are not split
  float* partial_lse;  // [splits][batch * heads * seqlen_q], natural log
};

}  // namespace fae::sm90
