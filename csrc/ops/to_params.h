// at::Tensor -> TensorRef -> AttentionParams: where PyTorch's world ends and the kernels' begins.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>

#include "../core/params.h"

namespace fae::ops {

inline DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kFloat:
      return DType::kFloat32;
    default:
      return DType::kFloat64;
  }
}

// The one documented copy: a last dimension that is not contiguous.
inline at::Tensor with_contiguous_last_dim(const at::Tensor& t) {
  return t.size(-1) > 1 && t.stride(-1) != 1 ? t.contiguous() : t;
}

inline TensorRef to_ref(const at::Tensor& t) {
  const auto strides = t.strides();
  void* data = const_cast<void*>(t.const_data_ptr());
  if (t.dim() == 3) return {data, strides[0], 0, strides[1]};
  return {data, strides[0], strides[1], strides[2]};
}

inline RowRef to_row_ref(const at::Tensor& t) {
  const auto strides = t.strides();
  return {const_cast<void*>(t.const_data_ptr()), strides[0], t.dim() == 3 ? strides[1] : 0};
}

inline Sizes sizes_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  Sizes s;
  const bool has_heads = q.dim() == 4;
  s.batch = q.size(0);
  s.heads = has_heads ? static_cast<int>(q.size(1)) : 1;
  s.heads_kv = has_heads ? static_cast<int>(k.size(1)) : 1;
  s.seqlen_q = static_cast<int>(q.size(-2));
  s.seqlen_k = static_cast<int>(k.size(-2));
  s.head_dim = static_cast<int>(q.size(-1));
  s.head_dim_v = static_cast<int>(v.size(-1));
  return s;
}

inline MaskSpec mask_spec(int64_t window_left, int64_t window_right, bool top_left) {
  const auto distance = [](int64_t w) { return w < 0 || w >= kOpenDistance ? kOpenDistance : static_cast<int>(w); };
  return {distance(window_left), distance(window_right), top_left};
}

inline AttentionParams to_params(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
                                 const at::Tensor& lse, std::optional<double> scale, const MaskSpec& mask) {
  AttentionParams p;
  p.q = to_ref(q);
  p.k = to_ref(k);
  p.v = to_ref(v);
  p.o = to_ref(out);
  p.lse = to_row_ref(lse);
  p.sizes = sizes_of(q, k, v);
  p.mask_spec = mask;
  p.scale = scale.value_or(1.0 / std::sqrt(static_cast<double>(p.sizes.head_dim)));
  return p;
}

}  // namespace fae::ops
