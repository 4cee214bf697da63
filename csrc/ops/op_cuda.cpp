// The operators on CUDA tensors. This version has no attention kernel for them yet: the call passes the same contract as
// everywhere and then says what is missing, instead of the dispatcher's "could not run on the 'CUDA' backend".
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "contract.h"

namespace fae::ops {

namespace {

using at::Tensor;

[[noreturn]] void refuse(const char* name) {
#if defined(FAE_WITH_CUDA)
  TORCH_CHECK_NOT_IMPLEMENTED(false, name,
                              ": this version has no CUDA kernel for attention; supported_kernels() lists what there "
                              "is. Move the tensors to the CPU, or call "
                              "torch.nn.functional.scaled_dot_product_attention");
#else
  TORCH_CHECK_NOT_IMPLEMENTED(false, name,
                              ": flash_attn_ext was built without CUDA. Install the CUDA toolkit (nvcc) that matches "
                              "torch.version.cuda and reinstall: FLASH_ATTN_EXT_CUDA=1 pip install "
                              "--no-build-isolation --force-reinstall --no-deps .");
#endif
}

std::tuple<Tensor, Tensor> fwd_cuda(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale,
                                    int64_t, int64_t, bool, std::optional<bool>, int64_t block_m, int64_t block_n) {
  check_forward("flash_attention", q, k, v, {scale, block_m, block_n});
  refuse("flash_attention");
}

std::tuple<Tensor, Tensor> fwd_v1_cuda(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale,
                                       int64_t, int64_t, bool, std::optional<bool>, int64_t block_m, int64_t block_n) {
  check_forward("flash_attention_v1", q, k, v, {scale, block_m, block_n});
  refuse("flash_attention_v1");
}

std::tuple<Tensor, Tensor, Tensor> bwd_cuda(const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q,
                                            const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                                            std::optional<double> scale, int64_t, int64_t, bool, std::optional<bool>) {
  check_backward(dout, dlse, q, k, v, out, lse, {scale});
  refuse("flash_attention backward");
}

}  // namespace

TORCH_LIBRARY_IMPL(flash_attn_ext, CUDA, m) {
  m.impl("fwd", &fwd_cuda);
  m.impl("fwd_v1", &fwd_v1_cuda);
  m.impl("bwd", &bwd_cuda);
}

}  // namespace fae::ops
