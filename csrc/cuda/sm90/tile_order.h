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

// What is read once for all tiles of a section, a part of the 50 MB of L2 that all CTAs share: K and V in the forward; 2, 8
// and 24 MB were measured: with a mask 8 is the fastest nearly everywhere, 24 up to 8 % slower. Without one a quarter, head
// after head: up to 6 % faster than 8 MB, least at short sequences.
// In the backward 4, 16 and 48 MB: 4 gains 2 % at 1,024 tokens, 16 as much at 4,096, 48 loses up to a third.
constexpr int64_t kSectionBytes = 8 << 20, kEqualSectionBytes = 2 << 20;
// In the backward, CTAs that add to dQ in turn wait the less the more heads share the GPU: 8, 16, 24, 32 and 64 MB were
// measured; 8 loses 4 to 10 % without a mask, 32 as much at 1,024 tokens, 64 up to a third.
constexpr int64_t kTurnSectionBytes = 24 << 20;
// The last section is larger where tiles are unequal: its long tiles come first, and the GPU should end with short ones. It
// grows until it has so many tiles or so many bytes: +4 to +16 % in the causal forward at 2k to 8k. Where heads have few tiles,
// more heads start at once, and wait for memory: half the bytes are 4 % faster at 512 tokens, and 1 % slower from 4k on.
constexpr int64_t kLastSectionTiles = 800, kLastSectionBytes = 32 << 20, kFewTiles = 4;

// `group_bytes` of such data for each group of heads that shares them.
inline TileOrder make_tile_order(int64_t tiles_per_head, int64_t heads, int64_t heads_per_group, int64_t group_bytes,
                                 int splits, bool last_first, bool unequal, int64_t section_bytes = 0) {
  TileOrder order{};
  order.m_tiles = static_cast<int>(tiles_per_head);
  order.heads = static_cast<int>(heads);
  order.splits = splits;
  order.tiles = static_cast<int>(tiles_per_head * heads * splits);
  order.last_first = last_first;
  if (section_bytes == 0) section_bytes = unequal ? kSectionBytes : kEqualSectionBytes;
  const int64_t groups = section_bytes / group_bytes;
  const int64_t section = (groups > 1 ? groups : 1) * heads_per_group;
  order.section = static_cast<int>(section < heads ? section : heads);
  int64_t last = heads % order.section == 0 ? order.section : heads % order.section;
  if (unequal) {
    const int64_t last_bytes = tiles_per_head <= kFewTiles ? kLastSectionBytes / 2 : kLastSectionBytes;
    const int64_t allowed = last_bytes / group_bytes * heads_per_group, most = allowed < heads ? allowed : heads;
    while (last * tiles_per_head < kLastSectionTiles && last + order.section <= most) last += order.section;
  }
  order.sections = static_cast<int>((heads - last) / order.section) + 1;
  return order;
}

}  // namespace fae::sm90
