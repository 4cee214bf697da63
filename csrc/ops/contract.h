// The input contract and the shapes of what comes out. CPU, CUDA and Meta kernels all call these, so every device and
// every fake tensor accepts the same calls and refuses the others with the same words.
//
// ValueError: a shape, size or number is wrong. TypeError: a dtype or a kind of tensor is. NotImplementedError: the call
// is meaningful, and this build has nothing that computes it.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <tuple>

namespace fae::ops {

// Sizes that the kernels hold in 32 bits, with room for sums of two; sequences are limited by kMaxSeqlen of core/mask.h.
constexpr int64_t kMaxHeads = (int64_t{1} << 30) - 1;
constexpr int64_t kMaxHeadDim = int64_t{1} << 16;  // scratch grows with it

// Everything of a call but its tensors. Windows count keys on either side of the diagonal, both ends included; a
// negative one is open. Causal attention is window_right = 0.
struct Options {
  std::optional<double> scale;  // default 1 / sqrt(D)
  int64_t block_m = 0;          // 0: the engine's choice
  int64_t block_n = 0;
};

void check_forward(const char* name, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   const Options& options);

void check_backward(const at::Tensor& dout, const std::optional<at::Tensor>& dlse, const at::Tensor& q,
                    const at::Tensor& k, const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
                    const Options& options);

// out: (B, Hq, Sq, Dv) or (B, Sq, Dv), in the memory layout of q, its last dimension contiguous. lse: (B, Hq, Sq) or (B, Sq), contiguous, fp32 (fp64
// for fp64 inputs).
std::tuple<at::Tensor, at::Tensor> allocate_forward(const at::Tensor& q, const at::Tensor& v);

// dq, dk, dv in the layouts of q, k, v.
std::tuple<at::Tensor, at::Tensor, at::Tensor> allocate_backward(const at::Tensor& q, const at::Tensor& k,
                                                                 const at::Tensor& v);

}  // namespace fae::ops
