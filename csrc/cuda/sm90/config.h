// The tiles of the Hopper kernels, each with its reason.
#pragma once

#include <string_view>

#include "../tile/wgmma_tile.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "the kernels for Hopper need 9.0a (sm_90a): code for 9.0 would do nothing"
#endif

namespace fae::sm90 {

constexpr int kWarpgroup = 128;
constexpr int kRowsPerWarpgroup = 64;       // M of every wgmma
constexpr int kSharedBytesPerCta = 232448;  // 227 KB
constexpr int kBarrierBytes = 1024;         // barriers and tile descriptions, generously

struct ForwardTile {
  std::string_view name;
  int element_bytes;
  int head_dim;    // D and Dv are filled up to it with zeros by the copy engine
  int warpgroups;  // consumers, 64 query rows each
  int tile_n;      // keys
  int stages;      // tiles of K and of V under way
  int q_buffers;   // 2: the next tile's Q comes in early, and O leaves through its own tile's Q buffer
  std::string_view why;

  constexpr int tile_m() const { return warpgroups * kRowsPerWarpgroup; }
  constexpr int panels() const { return tile::panels_of(head_dim); }
  // The registers that the launch gives to all threads alike are dealt out anew by setmaxnreg, and never more of them.
  constexpr int threads() const { return (warpgroups + 1) * kWarpgroup; }
  constexpr int consumer_registers() const { return warpgroups == 2 ? 240 : warpgroups == 3 ? 160 : 112; }
  constexpr int producer_registers() const { return warpgroups == 2 ? 24 : 32; }
  constexpr int q_bytes() const { return panels() * tile::panel_bytes(tile_m()); }
  constexpr int kv_bytes() const { return panels() * tile::panel_bytes(tile_n); }
  constexpr int shared_bytes() const {
    return tile::kPanelAlignment + q_buffers * q_bytes() + 2 * stages * kv_bytes() + kBarrierBytes;
  }
};

// {name, element_bytes, head_dim, warpgroups, tile_n, stages, q_buffers, why}
inline constexpr ForwardTile kForwardTiles[] = {
    {"sm90_fwd_d64", 2, 64, 4, 64, 6, 2,
     "four warpgroups of 64 keys: 5 to 18 % over three of 128, whose exponentials find fewer others to hide behind; 80 "
     "keys spill"},
    {"sm90_fwd_d80", 2, 80, 4, 48, 4, 2, "four warpgroups hold 48 keys; three of 80 or 96 are 2 to 17 % slower"},
    {"sm90_fwd_d96", 2, 96, 3, 64, 4, 2,
     "64 keys leave room for a fourth stage: 11 % over 80 keys at 512, 3 % at 4k; four warpgroups of 48 keys lose 12 % "
     "at 4k "
     "unmasked"},
    {"sm90_fwd_d112", 2, 112, 3, 64, 4, 2,
     "as 128, without its idle columns: 13 % over running on it; a fourth stage gains 1 to 7 %, 80 keys lose 2 to 6 %"},
    {"sm90_fwd_d128", 2, 128, 3, 64, 4, 2,
     "64 keys and four stages over 80 and three: 1 to 9 %; two warpgroups of 128 keys lose 3 to 9 %"},
    {"sm90_fwd_d192", 2, 192, 2, 64, 2, 2,
     "against 80 keys: 4 % at 512, minus 1.5 % at 4k; one Q buffer and 96 keys lose 13 % at 512, three warpgroups of "
     "48 keys 12 to 18 %"},
    {"sm90_fwd_d256", 2, 256, 2, 64, 2, 1,
     "against 80 keys: 2 to 10 %; a second Q buffer leaves room for 48 keys: minus 3 to 8 %"},
};

constexpr bool valid(const ForwardTile& t) {
  const int skipped = (t.tile_m() - kRowsPerWarpgroup + t.tile_n - 1) / t.tile_n;  // key tiles, see forward_v2.cuh
  return t.shared_bytes() <= kSharedBytesPerCta && t.tile_n % 16 == 0 && t.kv_bytes() % tile::kPanelAlignment == 0 &&
         t.q_buffers >= 1 && t.q_buffers <= 2 && t.warpgroups >= 2 && t.warpgroups <= 4 && skipped <= t.stages;
}

constexpr int forward_row(std::string_view name) {
  for (int i = 0; i < static_cast<int>(sizeof(kForwardTiles) / sizeof(kForwardTiles[0])); ++i)
    if (kForwardTiles[i].name == name) return i;
  return -1;
}

// ---- backward ----

// How dQ, to which all key tiles add, comes together.
enum class DqSum {
  kAnyOrder,  // reductions to a cleared fp32 accumulator
  kInTurn,    // the same, in the order of the key tiles: the same bits in every run
  kApart      // in a kernel of its own, over all keys, which computes the scores again: the same bits in every run
};

// Pieces of O and dO under way to their sums: row_statistics.cuh.
constexpr int kStatisticsPieceBytes = 4096, kStatisticsStages = 4,
              kStatisticsBytes = kStatisticsStages * kStatisticsPieceBytes;
constexpr int kBackwardKeys = 128;  // of a key tile: two warpgroups of 64

struct BackwardTile {
  std::string_view name;
  int element_bytes;
  int head_dim;
  int tile_m;      // queries of a step
  int stages;      // tiles of Q, of dO and of dS under way
  int kv_buffers;  // 2: the next key tile comes in early
  std::string_view why;

  static constexpr int kThreads = 3 * kWarpgroup;  // two that compute, one that copies
  static constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;

  constexpr int panels() const { return tile::panels_of(head_dim); }
  constexpr int kv_bytes() const { return panels() * tile::panel_bytes(kBackwardKeys); }
  constexpr int q_bytes() const { return panels() * tile::panel_bytes(tile_m); }
  constexpr int ds_bytes() const { return tile_m / tile::kPanelColumns * tile::panel_bytes(kBackwardKeys); }
  constexpr int stats_bytes() const { return stages * 2 * tile_m * 4; }
  constexpr int shared_bytes() const {
    return 2 * kv_buffers * kv_bytes() + 2 * stages * q_bytes() + stages * ds_bytes() + stats_bytes() +
           kStatisticsBytes + 8 * tile_m + kBarrierBytes;
  }
};

// {name, element_bytes, head_dim, tile_m, stages, kv_buffers, why}
inline constexpr BackwardTile kBackwardTiles[] = {
    {"sm90_bwd_d64", 2, 64, 128, 2, 2,
     "128 queries a step: with 64 each warpgroup would wait for half a dQ of 32 columns; dV ahead of dS spills"},
    {"sm90_bwd_d80", 2, 80, 64, 3, 1, "as 128, without its idle columns"},
    {"sm90_bwd_d96", 2, 96, 64, 3, 1, "as 128, without its idle columns"},
    {"sm90_bwd_d112", 2, 112, 64, 3, 1, "as 128, without its idle columns"},
    {"sm90_bwd_d128", 2, 128, 64, 3, 1,
     "three stages gain 1 to 5 % over two with a second K and V buffer; dV ahead of dS loses 1 to 7 %"},
};

constexpr bool valid(const BackwardTile& t) {
  return t.shared_bytes() <= kSharedBytesPerCta && t.tile_m % tile::kPanelColumns == 0;
}

constexpr int backward_row(std::string_view name) {
  for (int i = 0; i < static_cast<int>(sizeof(kBackwardTiles) / sizeof(kBackwardTiles[0])); ++i)
    if (kBackwardTiles[i].name == name) return i;
  return -1;
}

// The kernel for dQ of the backward in two kernels.
struct DqTile {
  std::string_view name;
  int element_bytes;
  int head_dim;
  int warpgroups;          // consumers, 64 query rows each
  int tile_n;              // keys
  int k_stages, v_stages;  // tiles of K and of V under way
  int q_buffers;           // 2: the next tile's Q and dO come in early
  std::string_view why;

  constexpr int tile_m() const { return warpgroups * kRowsPerWarpgroup; }
  constexpr int panels() const { return tile::panels_of(head_dim); }
  constexpr int threads() const { return (warpgroups + 1) * kWarpgroup; }
  constexpr int consumer_registers() const { return warpgroups == 2 ? 240 : 160; }
  constexpr int producer_registers() const { return warpgroups == 2 ? 24 : 32; }
  constexpr int q_bytes() const { return panels() * tile::panel_bytes(tile_m()); }
  constexpr int kv_bytes() const { return panels() * tile::panel_bytes(tile_n); }
  constexpr int shared_bytes() const {
    return tile::kPanelAlignment + 2 * q_buffers * q_bytes() + (k_stages + v_stages) * kv_bytes() + kBarrierBytes;
  }
};

// {name, element_bytes, head_dim, warpgroups, tile_n, k_stages, v_stages, q_buffers, why}
inline constexpr DqTile kDqTiles[] = {
    {"sm90_dq_d64", 2, 64, 3, 64, 3, 3, 2, "two warpgroups and 128 keys: the same within 3 %"},
    {"sm90_dq_d80", 2, 80, 3, 64, 3, 3, 1, "as d128"},
    {"sm90_dq_d96", 2, 96, 3, 64, 3, 3, 1, "as d128"},
    {"sm90_dq_d112", 2, 112, 3, 64, 3, 3, 1, "as d128"},
    {"sm90_dq_d128", 2, 128, 3, 64, 3, 3, 1,
     "three warpgroups with one Q buffer, against two with two: 0 to 3 % of the whole backward"},
    {"sm90_dq_d192", 2, 192, 2, 64, 3, 2, 1, "the most stages that fit beside Q and dO"},
    {"sm90_dq_d256", 2, 256, 2, 64, 2, 1, 1, "the most stages that fit beside Q and dO"},
};

constexpr bool valid(const DqTile& t) {
  return t.shared_bytes() <= kSharedBytesPerCta && t.tile_n % 16 == 0 && t.kv_bytes() % tile::kPanelAlignment == 0;
}

constexpr int dq_row(int head_dim) {
  for (int i = 0; i < static_cast<int>(sizeof(kDqTiles) / sizeof(kDqTiles[0])); ++i)
    if (kDqTiles[i].head_dim == head_dim) return i;
  return -1;
}

// The kernel for dK and dV of the backward in two kernels, where one does not do for dQ as well: 64 keys a tile.
struct DkvTile {
  std::string_view name;
  int element_bytes;
  int head_dim;
  int tile_m;  // queries of a step
  int stages;  // tiles of Q and of dO under way
  std::string_view why;

  static constexpr int kThreads = 3 * kWarpgroup;  // two that compute, one that copies
  static constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;

  constexpr int panels() const { return tile::panels_of(head_dim); }
  constexpr int kv_bytes() const { return panels() * tile::panel_bytes(kRowsPerWarpgroup); }
  constexpr int q_bytes() const { return panels() * tile::panel_bytes(tile_m); }
  constexpr int shared_bytes() const {
    return 2 * kv_bytes() + 2 * stages * q_bytes() + 2 * kWarpgroup * tile_m + (stages + 1) * 8 * tile_m +
           kStatisticsBytes + kBarrierBytes;
  }
};

// {name, element_bytes, head_dim, tile_m, stages, why}
inline constexpr DkvTile kDkvTiles[] = {
    {"sm90_bwd_d192", 2, 192, 64, 2, "as d256"},
    {"sm90_bwd_d256", 2, 256, 64, 2, "the most stages that fit beside K and V"},
};

constexpr int dkv_row(std::string_view name) {
  for (int i = 0; i < static_cast<int>(sizeof(kDkvTiles) / sizeof(kDkvTiles[0])); ++i)
    if (kDkvTiles[i].name == name) return i;
  return -1;
}

constexpr bool all_valid() {
  for (const ForwardTile& t : kForwardTiles)
    if (!valid(t)) return false;
  for (const BackwardTile& t : kBackwardTiles)
    if (!valid(t)) return false;
  for (const DqTile& t : kDqTiles)
    if (!valid(t)) return false;
  for (const DkvTile& t : kDkvTiles)
    if (t.shared_bytes() > kSharedBytesPerCta) return false;
  return true;
}
static_assert(all_valid(), "a tile does not fit shared memory, or the ring of keys is too short for its rows");

}  // namespace fae::sm90
