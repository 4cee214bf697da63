// Host side of the Hopper backward: delta, then one kernel that also sums dQ, or one for dK and dV and one for dQ; their
// workspace.
#pragma once

#include "../registry.h"
#include "../shared/delta.cuh"
#include "../shared/launch.h"
#include "backward_dkv.cuh"
#include "backward_dq.cuh"
#include "backward_v2.cuh"
#include "convert_sums.cuh"

namespace fae::sm90 {

// Keys that a query row sees, in the mean of four rows.
inline int mean_keys(const AttentionParams& p) {
  const IntervalMask mask = p.mask(0);
  int64_t sum = 0;
  for (int i = 1; i < 8; i += 2) {
    const int row = static_cast<int>(int64_t{p.sizes.seqlen_q} * i / 8), seen = mask.end(row) - mask.begin(row);
    sum += seen > 0 ? seen : 0;
  }
  return static_cast<int>(sum / 4);
}

inline bool is_causal(const BackwardParams& p) { return p.fwd.mask_spec.window_right < kOpenDistance; }

// A causal mask gives the first keys the most queries, unless a window cuts them off.
inline bool are_unequal(const BackwardParams& p) {
  return is_causal(p) && p.fwd.mask_spec.window_left > p.fwd.sizes.seqlen_k / 4;
}

inline int64_t key_tiles(const Sizes& z) { return z.batch * z.heads_kv * cuda::ceil_div(z.seqlen_k, kBackwardKeys); }

// How many CTAs, as a power of two, share the query tiles of a key tile, beside those that share its heads: as many as fill the GPU
// where key tiles alone do not, if the longest key tile has kLeastQueries for each; twice as many where tiles are unequal, if it has
// twice that, and twice as many again where heads are shared, but not up to D 64, nor more than four of a key tile: what they leave to
// be added would cost more than the shorter tiles gain.
constexpr int kLeastQueries = 1024, kMostLog2Splits = 3;
inline int log2_query_splits(const cuda::Call& call, int tile_m, int head_splits) {
  const Sizes& z = call.p.fwd.sizes;
  const int64_t tiles = key_tiles(z) * head_splits, ctas = call.device.sm_count;
  if (tiles == 0) return 0;
  const bool unequal = are_unequal(call.p);
  const int64_t rows = int64_t{mean_keys(call.p.fwd)} * z.seqlen_q / z.seqlen_k;  // that see a key, in the mean
  const int64_t longest = rows * z.heads_per_kv() / head_splits * (unequal ? 2 : 1);
  int log2 = 0;
  for (int next = 1; next <= kMostLog2Splits; log2 = next++) {
    const int64_t shared = tiles << next;
    const bool many = head_splits > 1 && head_splits << next <= 4 && z.head_dim > 64;
    if (shared > (many ? 4 : unequal ? 2 : 1) * ctas || rows / tile_m >> next == 0) break;
    if (longest >> next < (shared > ctas ? 2 : 1) * kLeastQueries) break;
  }
  return log2;
}

// Any order is the fastest where rows see many keys. With fewer, clearing and converting an fp32 dQ costs more than what avoids it:
// two products more (apart), or waiting for turns, the less the longer a step takes, which is at head dimensions up to kNarrow and
// of 128; so too where a CTA has a few key tiles only. If bits must not change, it is one of these two, whichever is faster. Grouped
// heads make a key tile long, and few of them: in turn they would end last. Measured: docs/kernels/sm90-backward.md.
constexpr int kNarrow = 80, kFewKeys = 640, kFewKeysUnequal = 1280, kManyKeys = 2048;
constexpr int kEnoughTilesPerCta = 8, kSomeTilesPerCta = 3;
constexpr int64_t kMostSums = int64_t{1} << 34;  // a kernel finds them by 32 bits, times four
inline DqSum dq_sum(const cuda::Call& call, int tile_m, int head_dim) {
  const BackwardParams& p = call.p;
  const int64_t tiles = key_tiles(p.fwd.sizes), ctas = call.device.sm_count;
  const bool unequal = are_unequal(p), narrow = head_dim <= kNarrow, grouped = p.fwd.sizes.heads_per_kv() > 1;
  const bool enough = tiles >= kEnoughTilesPerCta * ctas, some = tiles >= kSomeTilesPerCta * ctas;
  const int keys = mean_keys(p.fwd);
  const int64_t rows = p.fwd.sizes.batch * p.fwd.sizes.heads * cuda::ceil_div(p.fwd.sizes.seqlen_q, tile_m) * tile_m;
  if (rows * head_dim >= kMostSums) return DqSum::kApart;
  if (p.deterministic) {
    if (tiles <= ctas) return unequal && log2_query_splits(call, tile_m, 1) == 0 ? DqSum::kInTurn : DqSum::kApart;
    if (narrow) return DqSum::kInTurn;
    if (unequal)
      return !grouped && keys >= (head_dim == 128 ? kFewKeys / 2 : kFewKeys) ? DqSum::kInTurn : DqSum::kApart;
    return !enough || keys > kFewKeys ? DqSum::kInTurn : DqSum::kApart;
  }
  // Up to how many keys a row it pays to wait for turns, or to compute products twice.
  int in_turn = -1, apart = tiles > ctas ? kFewKeys : -1;
  if (narrow && enough) in_turn = unequal ? kFewKeysUnequal : kFewKeys;
  if (unequal && !grouped && some && !enough) in_turn = head_dim % 64 == 0 ? kManyKeys : kFewKeysUnequal;
  if (unequal && grouped && !narrow && tiles > ctas) apart = kFewKeysUnequal;
  return keys <= in_turn ? DqSum::kInTurn : keys <= apart ? DqSum::kApart : DqSum::kAnyOrder;
}

// How many CTAs share a key tile. Where its heads are many and tiles unequal, CTAs get out of step, one head after the other, until
// none finds in L2 what others have left there of Q, dO and dQ: so a CTA has kMostHeads of a group at most.
constexpr int kMostHeads = 4;
struct Splits {
  int heads, log2_queries;
  int all() const { return heads << log2_queries; }
};
inline Splits key_tile_splits(const cuda::Call& call, DqSum sum, int tile_m) {
  const int group = call.p.fwd.sizes.heads_per_kv();
  const bool shares_heads = sum == DqSum::kAnyOrder && are_unequal(call.p);
  const int heads = shares_heads ? static_cast<int>(cuda::ceil_div(group, kMostHeads)) : 1;
  return {heads, log2_query_splits(call, tile_m, heads)};
}

// The workspace, in this order; `base` nullptr counts only.
struct BackwardWorkspace {
  int* counters;  // of key tiles drawn, of query tiles that the dQ kernel has drawn, and two of row_statistics.cuh
  int* ready;     // see row_statistics.cuh
  float* stats;
  float* dq;        // nullptr: a kernel of its own writes it
  int* turns;       // nullptr: dQ is not added to in turn
  float* partials;  // nullptr: a key tile is one CTA's
  size_t bytes;

  static BackwardWorkspace lay_out(int tile_m, int head_dim, DqSum sum, int splits, const BackwardParams& p,
                                   char* base) {
    const Sizes& z = p.fwd.sizes;
    const size_t tiles = static_cast<size_t>(z.batch) * z.heads * cuda::ceil_div(z.seqlen_q, tile_m);
    const size_t rows = tiles * tile_m, ready_at = cuda::kWorkspaceAlignment;
    const size_t stats_at = ready_at + cuda::align_up(tiles * sizeof(int));
    const size_t dq_at = stats_at + cuda::align_up(rows * 2 * sizeof(float));
    const size_t turns_at = dq_at + cuda::align_up(rows * head_dim * sizeof(float));
    const bool has_dq = sum != DqSum::kApart, has_turns = sum == DqSum::kInTurn;
    const size_t partials_at = has_turns ? turns_at + cuda::align_up(tiles * sizeof(int)) : has_dq ? turns_at : dq_at;
    const size_t keys =
        static_cast<size_t>(z.batch) * z.heads_kv * cuda::ceil_div(z.seqlen_k, kBackwardKeys) * kBackwardKeys;
    return {reinterpret_cast<int*>(base),
            reinterpret_cast<int*>(base + ready_at),
            reinterpret_cast<float*>(base + stats_at),
            has_dq ? reinterpret_cast<float*>(base + dq_at) : nullptr,
            has_turns ? reinterpret_cast<int*>(base + turns_at) : nullptr,
            splits > 1 ? reinterpret_cast<float*>(base + partials_at) : nullptr,
            partials_at + (splits > 1 ? 2 * splits * keys * head_dim * sizeof(float) : 0)};
  }
};

// `tokens`: the length of a section's data. Under a causal mask, whatever the window. The last section gains from more bytes
// than in the forward, but not where many heads have few tiles.
constexpr int64_t kShort = 1024;
inline SectionBytes section_bytes(const BackwardParams& p, int64_t tokens) {
  return is_causal(p) ? unequal_tiles((tokens <= kShort ? 32 : 64) << 20) : kEqualTiles;
}

// In turn, key tiles are drawn and add in one order. Under a causal mask from the last one on: a tile begins at its diagonal, where the
// one before it has been. But then the long ones come last, and the GPU would empty: so in the last section the first key tile adds
// first, and all walk from the last query tile to the first. There they wait for each other, but the last to come are short.
inline bool turns_round(const cuda::Call& call) {
  return are_unequal(call.p) && key_tiles(call.p.fwd.sizes) > call.device.sm_count;
}

// Tiles of one head wait for each other, the less the more heads share the GPU: four at least where all are equally long. Few heads
// make two sections: then each CTA has tiles of both, which together are equally long.
constexpr int kHeadsInTurn = 4;
inline SectionBytes sections_in_turn(const BackwardParams& p, int64_t head_bytes, bool turns) {
  const int64_t half = (p.fwd.sizes.batch * p.fwd.sizes.heads_kv + 1) / 2 * head_bytes;
  if (turns) return half <= kLastInTurn ? SectionBytes{half, 0} : SectionBytes{kTilesInTurn.each, kLastInTurn};
  if (!is_causal(p) && 2 * head_bytes > kTilesInTurn.each) return {kHeadsInTurn * head_bytes, 0};
  return kTilesInTurn;
}

inline TileOrder key_tile_order(const cuda::Call& call, int tile_n, DqSum sum, int splits) {
  const BackwardParams& p = call.p;
  const Sizes& z = p.fwd.sizes;
  const bool in_turn = sum == DqSum::kInTurn;
  // Of the query heads that share K and V, which a CTA walks one after the other, half: CTAs are not in step.
  const int64_t bytes = int64_t{4} * z.seqlen_q * z.head_dim * (z.heads_per_kv() + 1);
  const bool turns = in_turn && turns_round(call);
  // Grouped heads make long tiles, and few of them: the last section must suffice for the GPU to end with short ones. Up to D 64 it
  // costs more than it gives, but where CTAs share a group (measured: docs/kernels/sm90-backward.md).
  const bool fills = z.heads_per_kv() > (z.head_dim > 64 ? 1 : kMostHeads) && is_causal(p) && !in_turn;
  TileOrder order = make_tile_order(cuda::ceil_div(z.seqlen_k, tile_n), z.batch * z.heads_kv, 1, bytes, splits, in_turn,
                                    in_turn ? sections_in_turn(p, bytes, turns) : section_bytes(p, z.seqlen_q),
                                    fills ? call.device.sm_count / splits : 0);
  order.turns = turns;
  return order;
}

inline TileOrder query_tile_order(const BackwardParams& p, int tile_m) {
  const Sizes& z = p.fwd.sizes;
  const int64_t bytes = int64_t{2} * z.seqlen_k * (z.head_dim + z.head_dim_v);
  return make_tile_order(cuda::ceil_div(z.seqlen_q, tile_m), z.batch * z.heads, z.heads_per_kv(), bytes, 1,
                         is_causal(p), section_bytes(p, z.seqlen_k));
}

inline int ctas_for(const TileOrder& order, const cuda::Call& call) {
  return order.tiles < call.device.sm_count ? order.tiles : call.device.sm_count;
}

// Maps for the four inputs, and what every launch has.
template <typename T, typename Launch>
cudaError_t fill_launch(Launch* launch, const BackwardParams& p, int query_rows, int key_rows) {
  const Sizes& z = p.fwd.sizes;
  const DType dtype = cuda::dtype_of<T>();
  cudaError_t error = make_tensor_map(&launch->q, p.fwd.q, dtype, z.batch, z.heads, z.seqlen_q, z.head_dim, query_rows);
  if (error == cudaSuccess)
    error = make_tensor_map(&launch->k, p.fwd.k, dtype, z.batch, z.heads_kv, z.seqlen_k, z.head_dim, key_rows);
  if (error == cudaSuccess)
    error = make_tensor_map(&launch->v, p.fwd.v, dtype, z.batch, z.heads_kv, z.seqlen_k, z.head_dim_v, key_rows);
  if (error == cudaSuccess)
    error = make_tensor_map(&launch->dout, p.dout, dtype, z.batch, z.heads, z.seqlen_q, z.head_dim_v, query_rows);
  launch->scale_log2 = static_cast<float>(p.fwd.scale * kLog2E);
  launch->scale = static_cast<float>(p.fwd.scale);
  return error;
}

template <typename T>
cudaError_t launch_delta(const BackwardParams& p, const BackwardWorkspace& space, int tile_m, int head_dim,
                         cudaStream_t stream) {
  const Sizes& z = p.fwd.sizes;
  cuda::DeltaLaunch delta{};
  delta.vector = cuda::rows_are_vectors(p.dout, z.head_dim_v, sizeof(T)) &&
                 cuda::rows_are_vectors(p.fwd.o, z.head_dim_v, sizeof(T));
  delta.m_tiles = static_cast<int>(cuda::ceil_div(z.seqlen_q, tile_m));
  delta.tile_m = tile_m;
  delta.tile_floats = space.dq == nullptr || space.turns != nullptr ? 0 : tile_m * head_dim;  // cleared
  delta.stats = space.stats;
  delta.accumulator = space.dq;
  delta.semaphores = space.turns;
  delta.unseen_dq = space.turns != nullptr;
  delta.counters = space.counters;
  return cuda::launch_dependent(&cuda::delta_kernel<T>, z.batch * z.heads * delta.m_tiles, cuda::kDeltaThreads, 0,
                                stream, p, delta);
}

// Whether the kernel that walks the key tiles computes the statistics as well (row_statistics.cuh), by how many keys a row sees: a
// query tile's statistics take one warp as long as several of its steps, so they come in time if it has many; with very many the
// time before the kernel is nothing, and what is cleared far ahead comes back from memory.
inline bool statistics_beside(const cuda::Call& call, DqSum sum, int head_dim) {
  const BackwardParams& p = call.p;
  const int dv = p.fwd.sizes.head_dim_v, keys = mean_keys(p.fwd);
  if (!cuda::rows_are_vectors(p.dout, dv, 2) || !cuda::rows_are_vectors(p.fwd.o, dv, 2)) return false;
  if (head_dim > 128) return keys >= 512 && keys <= 2048;
  if (sum == DqSum::kAnyOrder) return keys >= 256 && keys <= 8192;
  return keys >= (sum == DqSum::kInTurn && head_dim == 64 ? 256 : 768);
}

constexpr int kFirstTilesPerCta = 2;  // of queries: as many as are wanted at once

// The statistics of all rows: what the kernel that is launched next has to know about them.
template <typename T>
cudaError_t launch_statistics(StatisticsLaunch* statistics, const cuda::Call& call, const BackwardWorkspace& space,
                              DqSum sum, const TileOrder& key_tiles, int tile_m, int key_rows, int head_dim,
                              cudaStream_t stream) {
  const BackwardParams& p = call.p;
  const Sizes& z = p.fwd.sizes;
  if (!statistics_beside(call, sum, head_dim)) return launch_delta<T>(p, space, tile_m, head_dim, stream);
  const int m_tiles = static_cast<int>(cuda::ceil_div(z.seqlen_q, tile_m)), group = z.heads_per_kv();
  const int64_t tiles = z.batch * z.heads * m_tiles;
  const auto make_map = [&](CUtensorMap* map, const TensorRef& t) {
    return make_tensor_map(map, t, cuda::dtype_of<T>(), z.batch, z.heads, z.seqlen_q, z.head_dim_v,
                           statistics_rows(head_dim), statistics_columns(head_dim));
  };
  if (make_map(&statistics->o, p.fwd.o) != cudaSuccess || make_map(&statistics->dout, p.dout) != cudaSuccess)
    return launch_delta<T>(p, space, tile_m, head_dim, stream);
  // The same sections of heads. Which rows the key tiles that come first see last, they want first.
  TileOrder& order = statistics->order;
  order = key_tiles;
  order.m_tiles = m_tiles;
  order.heads *= group;
  order.section *= group;
  order.splits = 1;
  order.tiles = static_cast<int>(tiles);
  order.last_first = key_tiles.last_first && (is_causal(p) || p.fwd.mask_spec.window_left < kOpenDistance);
  statistics->m_tiles = m_tiles;
  statistics->counters = space.counters + 2;
  const int64_t first = int64_t{kFirstTilesPerCta} * ctas_for(key_tiles, call);
  statistics->first_tiles = static_cast<int>(first < tiles ? first : tiles);
  statistics->paired = is_causal(p) && 2 * tile_m == key_rows;
  statistics->ready = space.ready;
  statistics->stats = space.stats;
  statistics->accumulator = space.turns == nullptr ? space.dq : nullptr;
  const ClearLaunch clear{space.counters, space.ready, space.turns, tiles, m_tiles, tile_m};
  return cuda::launch_dependent(&clear_kernel<T>, cuda::ceil_div(tiles, kClearThreads), kClearThreads, 0, stream, p,
                                clear);
}

template <typename T, int kRow>
cudaError_t launch_dq(const cuda::Call& call, const BackwardWorkspace& space, int stats_rows, cudaStream_t stream) {
  constexpr DqTile kTile = kDqTiles[kRow];
  const BackwardParams& p = call.p;
  DqLaunch launch{};
  cudaError_t error = fill_launch<T>(&launch, p, kTile.tile_m(), kTile.tile_n);
  if (error != cudaSuccess) return error;
  launch.order = query_tile_order(p, kTile.tile_m());
  launch.stats = space.stats;
  launch.stats_tiles = static_cast<int>(cuda::ceil_div(p.fwd.sizes.seqlen_q, stats_rows));
  launch.stats_rows = stats_rows;
  launch.next_tile = space.counters + 1;
  constexpr auto* kKernel = &backward_dq_kernel<T, kRow>;
  if ((error = cuda::allow_shared_bytes<kKernel>(kTile.shared_bytes())) != cudaSuccess) return error;
  return cuda::launch_dependent(kKernel, ctas_for(launch.order, call), kTile.threads(), kTile.shared_bytes(), stream, p,
                                launch);
}

constexpr int64_t kMostTiles = int64_t{1} << 31;

inline bool too_many_tiles(const Sizes& z, int tile_m, int tile_n, int splits) {
  return z.batch * z.heads_kv * cuda::ceil_div(z.seqlen_k, tile_n) * splits >= kMostTiles ||
         z.batch * z.heads * cuda::ceil_div(z.seqlen_q, tile_m) >= kMostTiles;
}

template <int kRow>
size_t backward_v2_workspace(const cuda::Call& call) {
  constexpr BackwardTile kTile = kBackwardTiles[kRow];
  const DqSum sum = dq_sum(call, kTile.tile_m, kTile.head_dim);
  const int splits = key_tile_splits(call, sum, kTile.tile_m).all();
  return BackwardWorkspace::lay_out(kTile.tile_m, kTile.head_dim, sum, splits, call.p, nullptr).bytes;
}

template <typename T, int kRow, DqSum kSum>
cudaError_t launch_key_tiles(const cuda::Call& call, const BackwardLaunch& launch, cudaStream_t stream) {
  constexpr int kBytes = kBackwardTiles[kRow].shared_bytes();
  constexpr auto* kKernel = &backward_v2_kernel<T, kRow, kSum>;
  const cudaError_t error = cuda::allow_shared_bytes<kKernel>(kBytes);
  if (error != cudaSuccess) return error;
  return cuda::launch_dependent(kKernel, ctas_for(launch.order, call), BackwardTile::kThreads, kBytes, stream, call.p,
                                launch);
}

template <typename T, int kD>
cudaError_t convert(const ConvertLaunch& launch, cudaStream_t stream) {
  const int64_t ctas = cuda::ceil_div(launch.all_heads * launch.slabs, kConvertWarps);
  return cuda::launch_dependent(&convert_kernel<T, kD>, ctas, 32 * kConvertWarps, 0, stream, launch);
}

template <typename T, int kRow>
cudaError_t launch_backward_v2(const cuda::Call& call, void* workspace, cudaStream_t stream) {
  constexpr BackwardTile kTile = kBackwardTiles[kRow];
  const BackwardParams& p = call.p;
  const Sizes& z = p.fwd.sizes;
  const DqSum sum = dq_sum(call, kTile.tile_m, kTile.head_dim);
  const Splits shares = key_tile_splits(call, sum, kTile.tile_m);
  const int splits = shares.all();
  const BackwardWorkspace space =
      BackwardWorkspace::lay_out(kTile.tile_m, kTile.head_dim, sum, splits, p, static_cast<char*>(workspace));
  if (too_many_tiles(z, kTile.tile_m, kBackwardKeys, splits)) return cudaErrorInvalidConfiguration;

  BackwardLaunch launch{};
  cudaError_t error = fill_launch<T>(&launch, p, kTile.tile_m, kBackwardKeys);
  if (error != cudaSuccess) return error;
  launch.order = key_tile_order(call, kBackwardKeys, sum, splits);
  launch.m_tiles = static_cast<int>(cuda::ceil_div(z.seqlen_q, kTile.tile_m));
  launch.stats = space.stats;
  launch.dq = space.dq;
  launch.turns = space.turns;
  launch.partials = space.partials;
  launch.log2_splits = shares.log2_queries;
  launch.heads_each = static_cast<int>(cuda::ceil_div(z.heads_per_kv(), shares.heads));
  launch.n_tiles = static_cast<int>(cuda::ceil_div(z.seqlen_k, kBackwardKeys));
  launch.next_tile = space.counters;
  error = launch_statistics<T>(&launch.statistics, call, space, sum, launch.order, kTile.tile_m, kBackwardKeys,
                               kTile.head_dim, stream);
  if (error != cudaSuccess) return error;
  switch (sum) {
    case DqSum::kAnyOrder:
      error = launch_key_tiles<T, kRow, DqSum::kAnyOrder>(call, launch, stream);
      break;
    case DqSum::kInTurn:
      error = launch_key_tiles<T, kRow, DqSum::kInTurn>(call, launch, stream);
      break;
    case DqSum::kApart:
      error = launch_key_tiles<T, kRow, DqSum::kApart>(call, launch, stream);
      break;
  }
  if (error != cudaSuccess) return error;
  if (sum == DqSum::kApart) error = launch_dq<T, dq_row(kTile.head_dim)>(call, space, kTile.tile_m, stream);
  constexpr int kD = kTile.head_dim;
  const int q_slabs = launch.m_tiles * (kTile.tile_m / 16), k_slabs = launch.n_tiles * (kBackwardKeys / 16);
  const int64_t q_heads = z.batch * z.heads, k_heads = z.batch * z.heads_kv;
  if (error == cudaSuccess && sum == DqSum::kAnyOrder)
    error =
        convert<T, kD>({p.dq, q_heads, z.heads, z.seqlen_q, z.head_dim, space.dq, 1, q_slabs, launch.scale}, stream);
  if (error != cudaSuccess || splits == 1) return error;
  const float* const dv = space.partials + splits * k_heads * k_slabs * (16 * kD);
  error = convert<T, kD>(
      {p.dk, k_heads, z.heads_kv, z.seqlen_k, z.head_dim, space.partials, splits, k_slabs, launch.scale}, stream);
  if (error != cudaSuccess) return error;
  return convert<T, kD>({p.dv, k_heads, z.heads_kv, z.seqlen_k, z.head_dim_v, dv, splits, k_slabs, 1.0f}, stream);
}

template <int kRow>
size_t backward_split_workspace(const cuda::Call& call) {
  constexpr DkvTile kTile = kDkvTiles[kRow];
  return BackwardWorkspace::lay_out(kTile.tile_m, kTile.head_dim, DqSum::kApart, 1, call.p, nullptr).bytes;
}

template <typename T, int kRow>
cudaError_t launch_backward_split(const cuda::Call& call, void* workspace, cudaStream_t stream) {
  constexpr DkvTile kTile = kDkvTiles[kRow];
  const BackwardParams& p = call.p;
  const Sizes& z = p.fwd.sizes;
  const BackwardWorkspace space =
      BackwardWorkspace::lay_out(kTile.tile_m, kTile.head_dim, DqSum::kApart, 1, p, static_cast<char*>(workspace));
  if (too_many_tiles(z, kTile.tile_m, kRowsPerWarpgroup, 1)) return cudaErrorInvalidConfiguration;
  DkvLaunch launch{};
  cudaError_t error = fill_launch<T>(&launch, p, kTile.tile_m, kRowsPerWarpgroup);
  if (error != cudaSuccess) return error;
  launch.order = key_tile_order(call, kRowsPerWarpgroup, DqSum::kApart, 1);
  launch.m_tiles = static_cast<int>(cuda::ceil_div(z.seqlen_q, kTile.tile_m));
  launch.stats = space.stats;
  launch.next_tile = space.counters;
  constexpr auto* kKernel = &backward_dkv_kernel<T, kRow>;
  if ((error = cuda::allow_shared_bytes<kKernel>(kTile.shared_bytes())) != cudaSuccess) return error;
  error = launch_statistics<T>(&launch.statistics, call, space, DqSum::kApart, launch.order, kTile.tile_m,
                               kRowsPerWarpgroup, kTile.head_dim, stream);
  if (error != cudaSuccess) return error;
  error = cuda::launch_dependent(kKernel, ctas_for(launch.order, call), DkvTile::kThreads, kTile.shared_bytes(), stream,
                                 p, launch);
  if (error != cudaSuccess) return error;
  return launch_dq<T, dq_row(kTile.head_dim)>(call, space, kTile.tile_m, stream);
}

// The registry's rows.
template <typename T, int kRow>
cuda::KernelEntry backward_v2_entry() {
  static_assert(kRow >= 0, "no such row");
  constexpr BackwardTile t = kBackwardTiles[kRow];
  return {t.name.data(),
          90,
          cuda::Pass::kBackward,
          2,
          cuda::dtype_of<T>(),
          t.head_dim,
          {t.tile_m, kBackwardKeys, BackwardTile::kThreads, t.stages, t.shared_bytes()},
          t.why.data(),
          &backward_v2_workspace<kRow>,
          &launch_backward_v2<T, kRow>,
          false,
          0,
          cuda::has_hopper_code()};
}

template <typename T, int kRow>
cuda::KernelEntry backward_split_entry() {
  static_assert(kRow >= 0, "no such row");
  constexpr DkvTile t = kDkvTiles[kRow];
  return {t.name.data(),
          90,
          cuda::Pass::kBackward,
          2,
          cuda::dtype_of<T>(),
          t.head_dim,
          {t.tile_m, kRowsPerWarpgroup, DkvTile::kThreads, t.stages, t.shared_bytes()},
          t.why.data(),
          &backward_split_workspace<kRow>,
          &launch_backward_split<T, kRow>,
          false,
          0,
          cuda::has_hopper_code()};
}

}  // namespace fae::sm90
