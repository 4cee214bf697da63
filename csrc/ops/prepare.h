// What the operators of every device do around their engine: results allocated, inputs copied where the contract says so,
// parameters filled in, gradients brought into the layout of their tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <limits>
#include <tuple>

#include "contract.h"
#include "to_params.h"

namespace fae::ops {

struct PreparedForward {
  at::Tensor out, lse;
  at::Tensor q, k, v;  // as the engine reads them: kept alive until it has
  AttentionParams params;
  bool nothing_to_compute = false;  // out and lse are then complete

  std::tuple<at::Tensor, at::Tensor> results() const { return {out, lse}; }
};

inline PreparedForward prepare_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                       std::optional<double> scale, const MaskSpec& mask) {
  PreparedForward f;
  std::tie(f.out, f.lse) = allocate_forward(q, v);
  if (f.lse.numel() == 0 || k.size(-2) == 0) {
    f.out.zero_();
    f.lse.fill_(-std::numeric_limits<double>::infinity());
    f.nothing_to_compute = true;
    return f;
  }
  f.q = with_contiguous_last_dim(q);
  f.k = with_contiguous_last_dim(k);
  f.v = with_contiguous_last_dim(v);
  f.params = to_params(f.q, f.k, f.v, f.out, f.lse, scale, mask);
  return f;
}

struct PreparedBackward {
  at::Tensor dq, dk, dv;                    // in the layouts of q, k, v
  at::Tensor dq_dense, dk_dense, dv_dense;  // as the engine writes them: the same tensors wherever their rows are dense
  at::Tensor q, k, v, out, dout, lse, dlse;  // as the engine reads them
  BackwardParams params;
  bool nothing_to_compute = false;

  // After the engine.
  std::tuple<at::Tensor, at::Tensor, at::Tensor> results() const {
    if (!nothing_to_compute) {
      if (!dq_dense.is_same(dq)) dq.copy_(dq_dense);
      if (!dk_dense.is_same(dk)) dk.copy_(dk_dense);
      if (!dv_dense.is_same(dv)) dv.copy_(dv_dense);
    }
    return {dq, dk, dv};
  }
};

inline PreparedBackward prepare_backward(const at::Tensor& dout, const std::optional<at::Tensor>& dlse,
                                         const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                         const at::Tensor& out, const at::Tensor& lse, std::optional<double> scale,
                                         const MaskSpec& mask) {
  PreparedBackward b;
  std::tie(b.dq, b.dk, b.dv) = allocate_backward(q, k, v);
  if (lse.numel() == 0 || k.numel() == 0) {
    b.dq.zero_();
    b.dk.zero_();
    b.dv.zero_();
    b.nothing_to_compute = true;
    return b;
  }
  b.q = with_contiguous_last_dim(q);
  b.k = with_contiguous_last_dim(k);
  b.v = with_contiguous_last_dim(v);
  b.out = with_contiguous_last_dim(out);
  b.dout = with_contiguous_last_dim(dout);
  b.lse = with_contiguous_last_dim(lse);
  // Gradients of a tensor whose last dimension is not contiguous have the same layout; they are made dense and copied.
  const auto dense = [](const at::Tensor& t) {
    return t.size(-1) > 1 && t.stride(-1) != 1 ? at::empty(t.sizes(), t.options()) : t;
  };
  b.dq_dense = dense(b.dq);
  b.dk_dense = dense(b.dk);
  b.dv_dense = dense(b.dv);
  b.params.fwd = to_params(b.q, b.k, b.v, b.out, b.lse, scale, mask);
  b.params.dout = to_ref(b.dout);
  b.params.dq = to_ref(b.dq_dense);
  b.params.dk = to_ref(b.dk_dense);
  b.params.dv = to_ref(b.dv_dense);
  if (dlse.has_value()) {
    b.dlse = with_contiguous_last_dim(*dlse);
    b.params.dlse = to_row_ref(b.dlse);
  }
  return b;
}

}  // namespace fae::ops
