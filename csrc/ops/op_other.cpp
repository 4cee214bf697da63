// The operators on tensors that are neither dense CPU, CUDA nor Meta ones: sparse, quantized, nested, oneDNN, other
// devices. They pass the same contract, which names the tensor that does not fit, instead of the dispatcher's "could not
// run ... with arguments from the 'SparseCPU' backend".
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "contract.h"

namespace fae::ops {

namespace {

using at::Tensor;

[[noreturn]] void refuse(const char* name, const Tensor& q) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, name, ": there is no kernel for ", q.device().type(),
                              " tensors; supported_kernels() lists what there is. Move the tensors to the CPU");
}

std::tuple<Tensor, Tensor> fwd_other(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale,
                                     int64_t, int64_t, bool, std::optional<bool>, int64_t block_m, int64_t block_n) {
  check_forward("flash_attention", q, k, v, {scale, block_m, block_n});
  refuse("flash_attention", q);
}

std::tuple<Tensor, Tensor> fwd_v1_other(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale,
                                        int64_t, int64_t, bool, std::optional<bool>, int64_t block_m, int64_t block_n) {
  check_forward("flash_attention_v1", q, k, v, {scale, block_m, block_n});
  refuse("flash_attention_v1", q);
}

std::tuple<Tensor, Tensor, Tensor> bwd_other(const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q,
                                             const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                                             std::optional<double> scale, int64_t, int64_t, bool, std::optional<bool>) {
  check_backward(dout, dlse, q, k, v, out, lse, {scale});
  refuse("flash_attention backward", q);
}

void register_refusals(torch::Library& m) {
  m.impl("fwd", &fwd_other);
  m.impl("fwd_v1", &fwd_v1_other);
  m.impl("bwd", &bwd_other);
}

}  // namespace

// The alias stands for every backend without a registration of its own, nested tensors excepted.
TORCH_LIBRARY_IMPL(flash_attn_ext, CompositeExplicitAutograd, m) { register_refusals(m); }
TORCH_LIBRARY_IMPL(flash_attn_ext, NestedTensorCPU, m) { register_refusals(m); }
TORCH_LIBRARY_IMPL(flash_attn_ext, NestedTensorCUDA, m) { register_refusals(m); }

}  // namespace fae::ops
