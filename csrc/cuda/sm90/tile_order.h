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
  bool turns;       // in the last section it is the other way round

  struct Tile {
    int m;
    int head;  // b * heads + h
    int split;
    bool turned;  // of the last section, if that is the other way round
  };
  FAE_HD Tile at(int split_index) const {
    const int index = splits == 1 ? split_index : split_index / splits, split = split_index - index * splits;
    const int per_section = m_tiles * section, q = index / per_section, s = q < sections ? q : sections - 1;
    const int r = index - s * per_section, here = s == sections - 1 ? heads - s * section : section, i = r / here;
    const bool turned = turns && s == sections - 1;
    return {last_first != turned ? m_tiles - 1 - i : i, s * section + (r - i * here), split, turned};
  }
};

// What is read once for all tiles of a section, a part of the 50 MB of L2 that all CTAs share, and of the last one, which is
// larger where tiles are unequal: its long tiles come first, and the GPU should end with short ones. It grows until it has
// kLastSectionTiles or so many bytes; 0: it does not grow. The figures were measured (docs/kernels/sm90-forward.md,
// docs/kernels/sm90-backward.md).
struct SectionBytes {
  int64_t each, last;
};
constexpr int64_t kLastSectionTiles = 800;
constexpr SectionBytes kEqualTiles = {2 << 20, 0};  // without a causal mask
constexpr SectionBytes unequal_tiles(int64_t last) { return {8 << 20, last}; }
// In the backward, CTAs that add to dQ in turn wait the less the more heads share the GPU. The second figure is of a last section
// that goes the other way round.
constexpr SectionBytes kTilesInTurn = {24 << 20, 0};
constexpr int64_t kLastInTurn = 40 << 20;

// `group_bytes` of such data for each group of heads that shares them. Whatever their bytes, a section has as many heads as have
// `least_tiles` together, and the last one half as many more.
inline TileOrder make_tile_order(int64_t tiles_per_head, int64_t heads, int64_t heads_per_group, int64_t group_bytes,
                                 int splits, bool last_first, SectionBytes bytes, int64_t least_tiles = 0) {
  TileOrder order{};
  order.m_tiles = static_cast<int>(tiles_per_head);
  order.heads = static_cast<int>(heads);
  order.splits = splits;
  order.tiles = static_cast<int>(tiles_per_head * heads * splits);
  order.last_first = last_first;
  const int64_t fit = bytes.each / group_bytes;
  const int64_t fill = tiles_per_head == 0 ? 0 : least_tiles / (tiles_per_head * heads_per_group);
  const int64_t groups = fit > fill ? fit : fill;
  const int64_t section = (groups > 1 ? groups : 1) * heads_per_group;
  order.section = static_cast<int>(section < heads ? section : heads);
  int64_t last = heads % order.section == 0 ? order.section : heads % order.section;
  const int64_t allowed = bytes.last / group_bytes * heads_per_group, most = allowed < heads ? allowed : heads;
  while (last * tiles_per_head < kLastSectionTiles && last + order.section <= most) last += order.section;
  while (2 * last * tiles_per_head < 3 * least_tiles && last + order.section <= heads) last += order.section;
  order.sections = static_cast<int>((heads - last) / order.section) + 1;
  return order;
}

}  // namespace fae::sm90
