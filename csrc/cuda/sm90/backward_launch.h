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
  // order.splits CTAs share a key tile. Where few key tiles cannot fill the GPU, 2^log2_splits of them share its query tiles; where
  // a group is large, each has heads_each of its heads. What they sum of dK and dV is left here:
  // [dK, dV][split][batch * heads_kv][n_tiles][16-row slab][8-column tile][128]; nullptr: one CTA has all.
  float* partials;
  int log2_splits, heads_each;
  StatisticsLaunch statistics;
  int n_tiles;  // key tiles of a head

  // The query heads that one of order.splits has: the group, but in any order.
  template <bool kAreShared>
  FAE_DEVICE Range heads(int h_kv, int split, int group) const {
    const int begin = h_kv * group, end = begin + group;
    if constexpr (!kAreShared) return {begin, end};
    const int mine = begin + (split >> log2_splits) * heads_each;
    return {mine, min(mine + heads_each, end)};
  }
};

}  // namespace fae::sm90
