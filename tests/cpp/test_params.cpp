// core/params.h: what a kernel takes by value, and 64-bit addressing.
#include "core/params.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <type_traits>

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

}  // namespace
}  // namespace fae
