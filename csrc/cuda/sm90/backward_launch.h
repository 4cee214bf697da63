// What the backward up to a head dimension of 128 gets from its launch beside the call.
#pragma once

#include "row_statistics.cuh"
#include "tensor_map.h"
#include "tile_order.h"

namespace fae::sm90 {

struct BackwardLaunch {
  CUtensorMap q, k, v, dout;
  TileOrder order;  // of the key tiles
  float scale_log2, scale;
  int m_tiles;         // query tiles of a head
  const float* stats;  // [batch * heads][m_tiles][lse in base 2, delta][tile_m]
  float* dq;           // [batch * heads][m_tiles][16-row slab][8-column tile][128]
  int* next_tile;      // counter from which CTAs draw key tiles, 0 at the start
  int* turns;          // [batch * heads][m_tiles], see dq_turns.cuh, 0 at the start
  // Where few key tiles cannot fill the GPU, order.splits CTAs share the query tiles of each, and what they sum of dK and dV
  // is left here: [dK, dV][split][batch * heads_kv][n_tiles][16-row slab][8-column tile][128]; nullptr: one CTA has all.
  float* partials;
  int log2_splits;
  StatisticsLaunch statistics;
  int n_tiles;  // key tiles of a head
};

}  // namespace fae::sm90
