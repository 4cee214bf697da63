// The operators on CPU tensors: contract, allocation, plan, engine.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../cpu/config.h"
#include "../cpu/engine.h"
#include "contract.h"
#include "prepare.h"

namespace fae::ops {

namespace {

using at::Tensor;

// Threads the engine may use here: inside another parallel region it stays on the one it was called on.
int available_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// From ATen's allocator, so that memory profilers see it.
Tensor allocate_workspace(size_t bytes) {
  return at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions().dtype(at::kByte));
}

void check_block(const char* name, int64_t block_m, int64_t block_n) {
  const auto ok = [](int64_t b) { return b >= cpu::kMinBlock && b <= cpu::kMaxBlock && b % cpu::kColumnStep == 0; };
  TORCH_CHECK_VALUE((block_m == 0 && block_n == 0) || (ok(block_m) && ok(block_n)), name, ": block_size (", block_m,
                    ", ", block_n, ") is not built; each way 32, 64, 96 or 128, or None for the best");
}

using ForwardEngine = void (*)(const AttentionParams&, DType, const cpu::ForwardPlan&, void*);

std::tuple<Tensor, Tensor> forward(const char* name, int version, ForwardEngine engine, const Tensor& q,
                                   const Tensor& k, const Tensor& v, std::optional<double> scale, int64_t window_left,
                                   int64_t window_right, bool top_left, int64_t block_m, int64_t block_n) {
  check_forward(name, q, k, v, {scale, block_m, block_n});
  check_block(name, block_m, block_n);
  const PreparedForward f = prepare_forward(q, k, v, scale, mask_spec(window_left, window_right, top_left));
  if (f.nothing_to_compute) return f.results();
  const DType dtype = dtype_of(q);
  const cpu::ForwardPlan plan = cpu::plan_forward(version, f.params.sizes, dtype, static_cast<int>(block_m),
                                                  static_cast<int>(block_n), available_threads());
  const Tensor workspace = allocate_workspace(plan.workspace_bytes);
  engine(f.params, dtype, plan, workspace.data_ptr());
  return f.results();
}

std::tuple<Tensor, Tensor> fwd_cpu(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale,
                                   int64_t window_left, int64_t window_right, bool top_left,
                                   std::optional<bool> /*deterministic: the backward's*/, int64_t block_m,
                                   int64_t block_n) {
  return forward("flash_attention", 2, cpu::forward_v2, q, k, v, scale, window_left, window_right, top_left, block_m,
                 block_n);
}

std::tuple<Tensor, Tensor> fwd_v1_cpu(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale,
                                      int64_t window_left, int64_t window_right, bool top_left,
                                      std::optional<bool> /*deterministic*/, int64_t block_m, int64_t block_n) {
  return forward("flash_attention_v1", 1, cpu::forward_v1, q, k, v, scale, window_left, window_right, top_left, block_m,
                 block_n);
}

std::tuple<Tensor, Tensor, Tensor> bwd_cpu(const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q,
                                           const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                                           std::optional<double> scale, int64_t window_left, int64_t window_right,
                                           bool top_left,
                                           std::optional<bool> /*deterministic: this engine always is*/) {
  check_backward(dout, dlse, q, k, v, out, lse, {scale});
  const MaskSpec mask = mask_spec(window_left, window_right, top_left);
  const PreparedBackward b = prepare_backward(dout, dlse, q, k, v, out, lse, scale, mask);
  if (b.nothing_to_compute) return b.results();
  const DType dtype = dtype_of(q);
  const cpu::BackwardPlan plan = cpu::plan_backward(b.params.fwd.sizes, dtype, available_threads());
  const Tensor workspace = allocate_workspace(plan.workspace_bytes);
  cpu::backward_v2(b.params, dtype, plan, workspace.data_ptr());
  return b.results();
}

}  // namespace

TORCH_LIBRARY_IMPL(flash_attn_ext, CPU, m) {
  m.impl("fwd", &fwd_cpu);
  m.impl("fwd_v1", &fwd_v1_cpu);
  m.impl("bwd", &bwd_cpu);
}

}  // namespace fae::ops
