// Plans of the forward: which tile, how many rows per task, how much scratch.
#include "forward_tile.h"

namespace fae::cpu {

ForwardPlan plan_forward(int version, const Sizes& sizes, DType dtype, int block_m, int block_n, int threads) {
  const bool bf16 = visit_types(dtype, [](auto types) { return decltype(types)::kVnni; });
  const ForwardTile& tile = version == 1 ? kForwardV1Tile : tile_for(bf16 ? kForwardBf16Tiles : kForwardTiles, sizes);
  ForwardPlan plan{};
  plan.tile_name = tile.name;
  plan.why = block_m > 0 ? "block_size given by the caller" : tile.why;
  plan.version = version;
  plan.operand = visit_types(dtype, [](auto types) { return decltype(types)::kOperandName; });
  plan.tile_m = block_m > 0 ? block_m : tile.tile_m;
  plan.tile_n = block_n > 0 ? block_n : tile.tile_n;
  // No wider than the keys there are: a tiny problem should not pay for a large scratch.
  const int keys = static_cast<int>(round_up(std::max(sizes.seqlen_k, 1), kColumnStep));
  if (block_n == 0) plan.tile_n = std::min(plan.tile_n, keys);

  // Large groups of rows share a packed block; halve them until every thread has four tasks to choose from.
  const int64_t heads = sizes.batch * sizes.heads;
  const int all_rows = static_cast<int>(round_up(std::max(sizes.seqlen_q, 1), plan.tile_m));
  int rows = version == 1 ? all_rows : static_cast<int>(round_down(tile.rows_per_task, plan.tile_m));
  rows = std::min(rows, all_rows);
  const auto tasks_of = [&](int r) { return heads * ceil_div(sizes.seqlen_q, r); };
  while (rows > plan.tile_m && threads > 1 && tasks_of(rows) < 4 * int64_t{threads})
    rows = static_cast<int>(round_up(ceil_div(rows, 2), plan.tile_m));
  plan.rows_per_task = rows;
  plan.rows_per_product = block_m > 0 ? plan.tile_m : std::min(rows, tile.rows_per_product);
  plan.tasks = tasks_of(rows);
  plan.slots = static_cast<int>(std::clamp<int64_t>(plan.tasks, 1, threads));
  if (version == 1) {
    plan.slot_bytes = forward_v1_slot_bytes(sizes, dtype, plan.tile_m, plan.tile_n);
    plan.shared_bytes = forward_v1_shared_bytes(sizes, dtype);
  } else {
    plan.slot_bytes = forward_v2_slot_bytes(sizes, dtype, plan.rows_per_product, plan.tile_n, rows);
  }
  plan.workspace_bytes = plan.shared_bytes + plan.slots * plan.slot_bytes;
  return plan;
}

}  // namespace fae::cpu
