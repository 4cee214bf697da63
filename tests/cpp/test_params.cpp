// core/params.h: what a kernel takes by value, and 64-bit addressing; cuda/pack_groups.h, which rewrites it.
#include "core/params.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <type_traits>
#include <vector>

#include "cuda/pack_groups.h"

namespace fae {
namespace {

// A kernel takes these by value: copied as bytes.
static_assert(std::is_trivially_copyable_v<AttentionParams> && std::is_standard_layout_v<AttentionParams>);
static_assert(std::is_trivially_copyable_v<BackwardParams> && std::is_standard_layout_v<BackwardParams>);
static_assert(std::is_trivially_copyable_v<IntervalMask> && std::is_trivially_copyable_v<TensorRef>);
static_assert(size_of(DType::kFloat16) == 2 && size_of(DType::kBFloat16) == 2 && size_of(DType::kFloat32) == 4 &&
              size_of(DType::kFloat64) == 8);
// CUDA passes at most 4 KiB of arguments to a kernel on every architecture.
static_assert(sizeof(BackwardParams) <= 1024);

TEST(Params, AddressesPastTwoToTheThirtyOne) {
  // Reserved, not used: 24 GiB of addresses, of which two pages are ever touched.
  constexpr size_t kBytes = size_t{24} << 30;
  void* map = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) GTEST_SKIP() << "this system does not let a process reserve 24 GiB of addresses";
  float* base = static_cast<float*>(map);
  const int64_t rows = int64_t{1} << 24, dim = 128, heads = 2;  // 2^32 elements in (1, 2, 2^24, 128)
  const TensorRef t = {base, heads * rows * dim, rows * dim, dim};
  const int64_t last = heads * rows * dim - dim;
  ASSERT_GT(last, int64_t{1} << 31);
  EXPECT_EQ(t.row<float>(0, 1, rows - 1) - base, last);
  *t.row<float>(0, 1, rows - 1) = 42.0f;
  EXPECT_EQ(base[last], 42.0f);
  // One row beyond 2^31 elements away from the previous one, and a batch stride beyond it.
  const TensorRef wide = {base, (int64_t{1} << 31) + 5, 0, (int64_t{1} << 31) + 64};
  EXPECT_EQ(wide.row<float>(0, 7, 2) - base, (int64_t{1} << 32) + 128);
  EXPECT_EQ(wide.row<float>(2, 0, 0) - base, (int64_t{1} << 32) + 10);
  const RowRef stats = {base, int64_t{1} << 31, int64_t{1} << 30};
  EXPECT_EQ(stats.row<float>(1, 3, 17) - base, (int64_t{1} << 31) + 3 * (int64_t{1} << 30) + 17);
  munmap(map, kBytes);
}

TEST(Params, ElementSizeIsTheTypes) {
  double data[64] = {};
  const TensorRef t = {data, 32, 16, 4};
  EXPECT_EQ(t.row<double>(1, 0, 3), data + 44);
  EXPECT_EQ(static_cast<void*>(t.row<uint16_t>(1, 0, 3)), static_cast<void*>(reinterpret_cast<uint16_t*>(data) + 44));
  // An expanded tensor has stride 0; a reversed one a negative stride.
  const TensorRef expanded = {data, 0, 0, 4}, reversed = {data + 60, 0, 0, -4};
  EXPECT_EQ(expanded.row<double>(9, 9, 1), data + 4);
  EXPECT_EQ(reversed.row<double>(0, 0, 15), data);
}

TEST(Params, QueryHeadsShareKeyHeads) {
  for (const int heads_kv : {1, 2, 3, 8})
    for (const int group : {1, 2, 5}) {
      Sizes s;
      s.heads = heads_kv * group;
      s.heads_kv = heads_kv;
      EXPECT_EQ(s.heads_per_kv(), group);
      for (int h = 0; h < s.heads; ++h) EXPECT_EQ(s.kv_head(h), h / group) << "as repeat_interleave lays them out";
      EXPECT_EQ(s.kv_head(s.heads - 1), heads_kv - 1);
    }
}

TEST(Params, DefaultsAreAnUnmaskedCall) {
  AttentionParams p;
  p.sizes.seqlen_q = 3;
  p.sizes.seqlen_k = 7;
  const IntervalMask mask = p.mask(0);
  EXPECT_TRUE(mask.tile_is_full(0, 3, 0, 7));
  EXPECT_EQ(p.seq(5).seqlen_q, 3);
  EXPECT_EQ(p.seq(5).seqlen_k, 7);
  EXPECT_EQ(BackwardParams{}.dlse.data, nullptr);
}

// Every head's row has the address that its place in the group says, and sees the same keys as before.
TEST(PackGroups, RowsAndKeysKeepTheirAddresses) {
  std::vector<uint16_t> q(4096), k(1 << 16), v(1 << 16), o(4096);
  std::vector<float> lse(64);
  int packed_calls = 0;
  for (const int heads_kv : {1, 2, 3})
    for (const int group : {1, 2, 5})
      for (const int seqlen_k : {0, 1, 2, 40})
        for (const int left : {0, 1, 7, 39, 40, kOpenDistance})
          for (const int right : {0, 3, 100, kOpenDistance})
            for (const bool top_left : {false, true}) {
              const int heads = heads_kv * group;
              AttentionParams before;
              before.q = {q.data(), heads * 16 + 3, 16, 5};
              before.k = {k.data(), 20000, 48, heads_kv * 48};
              before.v = {v.data(), 21000, 2000, 32};
              before.o = {o.data(), heads * 24, 24, 1000};
              before.lse = {lse.data(), heads, 1};
              before.sizes = {2, heads, heads_kv, 1, seqlen_k, 16, 24};
              before.mask_spec = {left, right, top_left};
              AttentionParams p = before;
              const IntervalMask mask = before.mask(0);
              const bool sees_keys = mask.begin(0) < mask.end(0);
              ASSERT_EQ(cuda::pack_groups(&p, 2), group > 1 && sees_keys);
              if (!(group > 1 && sees_keys)) {
                EXPECT_EQ(p.q.stride_h, before.q.stride_h);
                EXPECT_EQ(p.sizes.heads, heads);
                EXPECT_EQ(p.sizes.seqlen_k, seqlen_k);
                continue;
              }
              ++packed_calls;
              ASSERT_EQ(p.sizes.seqlen_q, group);
              ASSERT_EQ(p.sizes.heads, heads_kv);
              ASSERT_EQ(p.sizes.heads_per_kv(), 1);
              ASSERT_EQ(p.sizes.seqlen_k, mask.end(0) - mask.begin(0));
              EXPECT_TRUE(p.mask(0).tile_is_full(0, group, 0, p.sizes.seqlen_k));
              for (int b = 0; b < 2; ++b)
                for (int h = 0; h < heads; ++h) {
                  EXPECT_EQ(p.q.row<uint16_t>(b, h / group, h % group), before.q.row<uint16_t>(b, h, 0));
                  EXPECT_EQ(p.o.row<uint16_t>(b, h / group, h % group), before.o.row<uint16_t>(b, h, 0));
                  EXPECT_EQ(p.lse.row<float>(b, h / group, h % group), before.lse.row<float>(b, h));
                  for (const int key : {0, p.sizes.seqlen_k - 1}) {
                    const int kv = before.sizes.kv_head(h), was = key + mask.begin(0);
                    EXPECT_EQ(p.k.row<uint16_t>(b, kv, key), before.k.row<uint16_t>(b, kv, was));
                    EXPECT_EQ(p.v.row<uint16_t>(b, kv, key), before.v.row<uint16_t>(b, kv, was));
                  }
                }
            }
  EXPECT_GT(packed_calls, 100);
}

TEST(PackGroups, SeveralRowsStayAsTheyAre) {
  AttentionParams p;
  p.sizes = {1, 4, 2, 2, 8, 16, 16};
  EXPECT_FALSE(cuda::pack_groups(&p, 2));
  EXPECT_EQ(p.sizes.heads, 4);
}

}  // namespace
}  // namespace fae
