// Shape rules for fake tensors: the same contract and allocation on symbolic sizes.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "contract.h"

namespace fae::ops {

namespace {

using at::Tensor;
using c10::SymInt;

std::tuple<Tensor, Tensor> fwd_meta(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale,
                                    SymInt, SymInt, bool, std::optional<bool>, int64_t block_m, int64_t block_n) {
  check_forward("flash_attention", q, k, v, {scale, block_m, block_n});
  return allocate_forward(q, v);
}

std::tuple<Tensor, Tensor> fwd_v1_meta(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale,
                                       SymInt, SymInt, bool, std::optional<bool>, int64_t block_m, int64_t block_n) {
  check_forward("flash_attention_v1", q, k, v, {scale, block_m, block_n});
  return allocate_forward(q, v);
}

std::tuple<Tensor, Tensor, Tensor> bwd_meta(const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q,
                                            const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                                            std::optional<double> scale, SymInt, SymInt, bool, std::optional<bool>) {
  check_backward(dout, dlse, q, k, v, out, lse, {scale});
  return allocate_backward(q, k, v);
}

}  // namespace

TORCH_LIBRARY_IMPL(flash_attn_ext, Meta, m) {
  m.impl("fwd", &fwd_meta);
  m.impl("fwd_v1", &fwd_v1_meta);
  m.impl("bwd", &bwd_meta);
}

}  // namespace fae::ops
