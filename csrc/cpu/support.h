// What the engine's loops share: the type triples, the scratch arena, and the way tasks are handed to threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "gemm.h"
#include "tile_ops.h"

namespace fae::cpu {

template <typename In_, typename Op_, typename Acc_>
struct Types {
  using In = In_;    // elements of the tensors
  using Op = Op_;    // operands of the matrix products
  using Acc = Acc_;  // accumulators and statistics
  static constexpr bool kVnni = is_16bit<Op_>;
  // Elements of a B operand between column n and n + 1 of the same k.
  static constexpr int kColumnStride = kVnni ? 2 : 1;
  // A tensor's rows can serve as a B operand (or be stored to) as they stand.
  static constexpr bool kDirect = std::is_same_v<In_, Op_> && !kVnni;
  static constexpr const char* kOperandName = kVnni ? "bf16" : sizeof(Op_) == 8 ? "fp64" : "fp32";
  // The inner dimension of a product: even for VNNI, the last element zero.
  static constexpr int inner(int dim) { return kVnni ? (dim + 1) / 2 * 2 : dim; }
};

// Calls f(Types<...>{}) for the triple that this dtype uses on this CPU.
template <typename F>
auto visit_types(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(Types<double, double, double>{});
    case DType::kFloat32:
      return f(Types<float, float, float>{});
    case DType::kFloat16:
      return f(Types<f16_t, float, float>{});
    default:
      return has_bf16_gemm() ? f(Types<bf16_t, bf16_t, float>{}) : f(Types<bf16_t, float, float>{});
  }
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t round_down(int64_t a, int64_t b) { return a / b * b; }

// Carves aligned arrays out of one block. With base == nullptr it only counts, which is how plans learn their sizes.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    const size_t at = used_;
    used_ += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// Runs f(slot, task) for every task, each slot on its own thread, tasks handed out in order as threads come free. A
// task owns what it writes, so the result does not depend on who runs it.
template <typename F>
void parallel_tasks(int64_t tasks, int slots, const F& f) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(slots, tasks), 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot)
      for (int64_t t = next.fetch_add(1); t < tasks; t = next.fetch_add(1)) f(static_cast<int>(slot), t);
    gemm_release();
  });
}

template <typename Row, int kCount>
const Row& tile_for(const Row (&rows)[kCount], const Sizes& s) {
  const int dim = std::max(s.head_dim, s.head_dim_v);
  for (const Row& row : rows)
    if (dim <= row.max_head_dim) return row;
  return rows[kCount - 1];
}

}  // namespace fae::cpu
