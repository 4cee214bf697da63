// Which query tile comes when. Heads are taken in sections whose K and V fit the L2 cache together; within a section all
// heads' tiles of one position follow each other, longest first where the mask makes them unequal, so that the last ones to
// start are short.
#pragma once

#include <cstdint>

#include "../../core/platform.h"

namespace fae::sm90 {

struct TileOrder {
  int m_tiles;      // of a head
  int heads;        // of all batch entries
  int section;      // heads of each but the last
  int sections;     // the last one takes all heads that are left
  int splits;       // of the keys of each
  int tiles;        // all
  bool last_first;  // the last rows of a head see most keys

  struct Tile {
    int m;
    int head;  // b * heads + h
    int split;
  };
  FAE_HD Tile at(int split_index) const {
    const int index = splits == 1 ? split_index : split_index / splits, split = split_index - index * splits;
    const int per_section = m_tiles * section, q = index / per_section, s = q < sections ? q : sections - 1;
    const int r = index - s * per_section, here = s == sections - 1 ? heads - s * section : section, i = r / here;
    return {last_first ? m_tiles - 1 - i : i, s * section + (r - i * here), split};
  }
};

}  // namespace fae::sm90
