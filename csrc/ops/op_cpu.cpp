// The operators on CPU tensors: contract, allocation, plan, engine.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../cpu/config.h"
#include "../cpu/engine.h"
#include "contract.h"
#include "to_params.h"

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

std::tuple<Tensor, Tensor> forward(const char* name, int version, ForwardEngine engine, const Tensor& q_in,
                                   const Tensor& k_in, const Tensor& v_in, std::optional<double> scale,
                                   int64_t window_left, int64_t window_right, bool top_left, int64_t block_m,
                                   int64_t block_n) {
  check_forward(name, q_in, k_in, v_in, {scale, block_m, block_n});
  check_block(name, block_m, block_n);
  auto [out, lse] = allocate_forward(q_in, v_in);
  if (lse.numel() == 0) return {out, lse};
  const Tensor q = with_contiguous_last_dim(q_in), k = with_contiguous_last_dim(k_in),
               v = with_contiguous_last_dim(v_in);
  const AttentionParams p = to_params(q, k, v, out, lse, scale, mask_spec(window_left, window_right, top_left));
  const DType dtype = dtype_of(q);
  const cpu::ForwardPlan plan = cpu::plan_forward(version, p.sizes, dtype, static_cast<int>(block_m),
                                                  static_cast<int>(block_n), available_threads());
  const Tensor workspace = allocate_workspace(plan.workspace_bytes);
  engine(p, dtype, plan, workspace.data_ptr());
  return {out, lse};
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

std::tuple<Tensor, Tensor, Tensor> bwd_cpu(const Tensor& dout_in, const std::optional<Tensor>& dlse_in,
                                           const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                           const Tensor& out_in, const Tensor& lse_in, std::optional<double> scale,
                                           int64_t window_left, int64_t window_right, bool top_left,
                                           std::optional<bool> /*deterministic: this engine always is*/) {
  check_backward(dout_in, dlse_in, q_in, k_in, v_in, out_in, lse_in, {scale});
  auto [dq, dk, dv] = allocate_backward(q_in, k_in, v_in);
  if (lse_in.numel() == 0 || k_in.numel() == 0) {
    dq.zero_();
    dk.zero_();
    dv.zero_();
    return {dq, dk, dv};
  }
  const Tensor q = with_contiguous_last_dim(q_in), k = with_contiguous_last_dim(k_in),
               v = with_contiguous_last_dim(v_in), out = with_contiguous_last_dim(out_in),
               dout = with_contiguous_last_dim(dout_in), lse = with_contiguous_last_dim(lse_in);
  // Gradients of a tensor whose last dimension is not contiguous have the same layout; they are made dense and copied.
  const auto dense = [](const Tensor& t) {
    return t.size(-1) > 1 && t.stride(-1) != 1 ? at::empty(t.sizes(), t.options()) : t;
  };
  const Tensor dq_dense = dense(dq), dk_dense = dense(dk), dv_dense = dense(dv);
  BackwardParams p;
  p.fwd = to_params(q, k, v, out, lse, scale, mask_spec(window_left, window_right, top_left));
  p.dout = to_ref(dout);
  p.dq = to_ref(dq_dense);
  p.dk = to_ref(dk_dense);
  p.dv = to_ref(dv_dense);
  Tensor dlse;
  if (dlse_in.has_value()) {
    dlse = with_contiguous_last_dim(*dlse_in);
    p.dlse = to_row_ref(dlse);
  }
  const DType dtype = dtype_of(q);
  const cpu::BackwardPlan plan = cpu::plan_backward(p.fwd.sizes, dtype, available_threads());
  const Tensor workspace = allocate_workspace(plan.workspace_bytes);
  cpu::backward_v2(p, dtype, plan, workspace.data_ptr());
  if (!dq_dense.is_same(dq)) dq.copy_(dq_dense);
  if (!dk_dense.is_same(dk)) dk.copy_(dk_dense);
  if (!dv_dense.is_same(dv)) dv.copy_(dv_dense);
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_IMPL(flash_attn_ext, CPU, m) {
  m.impl("fwd", &fwd_cpu);
  m.impl("fwd_v1", &fwd_v1_cpu);
  m.impl("bwd", &bwd_cpu);
}

}  // namespace fae::ops
