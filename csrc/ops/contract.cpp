#include "contract.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "../core/mask.h"

namespace fae::ops {

namespace {

using at::Tensor;
using c10::SymInt;

// Prints a shape as Python does: (2, 8, 128, 64).
struct Shape {
  const Tensor& t;
};
std::ostream& operator<<(std::ostream& os, const Shape& s) {
  os << '(';
  const auto sizes = s.t.sym_sizes();
  for (size_t i = 0; i < sizes.size(); ++i) os << (i == 0 ? "" : ", ") << sizes[i];
  return os << (sizes.size() == 1 ? ",)" : ")");
}

bool same_shape(const Tensor& a, c10::SymIntArrayRef sizes) {
  return a.dim() == static_cast<int64_t>(sizes.size()) && std::equal(sizes.begin(), sizes.end(), a.sym_sizes().begin());
}

void check_kind(const char* name, const char* what, const Tensor& t) {
  TORCH_CHECK_TYPE(t.defined(), name, ": ", what, " is None; it has to be a tensor");
  TORCH_CHECK_TYPE(t.layout() == at::kStrided && !t.is_quantized() && !t.is_nested(), name, ": ", what, " is a ",
                   t.is_nested()      ? "nested"
                   : t.is_quantized() ? "quantized"
                   : t.is_mkldnn()    ? "oneDNN"
                                      : "sparse",
                   " tensor; convert it to an ordinary dense one");
}

void check_companion(const char* name, const char* what, const Tensor& t, const Tensor& q) {
  check_kind(name, what, t);
  TORCH_CHECK_VALUE(t.device() == q.device(), name, ": ", what, " is on ", t.device(), " and q on ", q.device(),
                    "; move them to one device");
  TORCH_CHECK_TYPE(t.scalar_type() == q.scalar_type(), name, ": ", what, " is ", t.scalar_type(), " and q ",
                   q.scalar_type(), "; all tensors need one dtype (cast with .to(), or run under torch.autocast)");
}

}  // namespace

void check_forward(const char* name, const Tensor& q, const Tensor& k, const Tensor& v, const Options& options) {
  check_kind(name, "q", q);
  check_companion(name, "k", k, q);
  check_companion(name, "v", v, q);
  const auto dtype = q.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble, name,
                   ": q is ", dtype, "; float16, bfloat16, float32 and, on the CPU, float64 are supported");
  TORCH_CHECK_NOT_IMPLEMENTED(dtype != at::kDouble || !q.is_cuda(), name,
                              ": float64 runs on the CPU only; cast to float32 for CUDA");
  TORCH_CHECK_VALUE(q.dim() == 3 || q.dim() == 4, name, ": q has ", q.dim(), " dimensions ", Shape{q},
                    "; it has to be (batch, seq, dim) or (batch, heads, seq, dim)");
  TORCH_CHECK_VALUE(k.dim() == q.dim() && v.dim() == q.dim(), name,
                    ": q, k and v need the same number of dimensions, got q ", Shape{q}, ", k ", Shape{k}, ", v ",
                    Shape{v});
  TORCH_CHECK_VALUE(k.sym_size(0) == q.sym_size(0) && v.sym_size(0) == q.sym_size(0), name,
                    ": q, k and v need the same batch size, got q ", Shape{q}, ", k ", Shape{k}, ", v ", Shape{v});
  TORCH_CHECK_VALUE(k.sym_size(-1) == q.sym_size(-1), name, ": k has head dimension ", k.sym_size(-1), " and q ",
                    q.sym_size(-1), " (q ", Shape{q}, ", k ", Shape{k}, "); they have to be equal");
  TORCH_CHECK_VALUE(q.sym_size(-1) >= 1 && v.sym_size(-1) >= 1, name,
                    ": the head dimension has to be at least 1, got q ", Shape{q}, ", v ", Shape{v});
  TORCH_CHECK_VALUE(q.sym_size(-1) <= kMaxHeadDim && v.sym_size(-1) <= kMaxHeadDim, name,
                    ": the head dimension is limited to 65536, got q ", Shape{q}, ", v ", Shape{v});
  TORCH_CHECK_VALUE(k.sym_size(-2) == v.sym_size(-2), name, ": k has ", k.sym_size(-2), " positions and v ",
                    v.sym_size(-2), " (k ", Shape{k}, ", v ", Shape{v}, "); they have to be equal");
  if (q.dim() == 4) {
    const SymInt hq = q.sym_size(1), hk = k.sym_size(1);
    TORCH_CHECK_VALUE(v.sym_size(1) == hk, name, ": k has ", hk, " heads and v ", v.sym_size(1), " (k ", Shape{k},
                      ", v ", Shape{v}, "); they have to be equal");
    TORCH_CHECK_VALUE(hq >= 1 && hk >= 1, name, ": at least one head is needed, got q ", Shape{q}, ", k ", Shape{k});
    TORCH_CHECK_VALUE(hq <= kMaxHeads && hk <= kMaxHeads, name, ": heads are limited to 2^30 - 1, got q ", Shape{q},
                      ", k ", Shape{k});
    TORCH_CHECK_VALUE(hq % hk == 0, name, ": k has ", hk, " heads, which does not divide q's ", hq, " heads (q ",
                      Shape{q}, ", k ", Shape{k}, ")");
  }
  TORCH_CHECK_VALUE(q.sym_size(-2) <= kMaxSeqlen && k.sym_size(-2) <= kMaxSeqlen, name,
                    ": sequences are limited to 2^30 - 1 positions, got q ", Shape{q}, ", k ", Shape{k});
  TORCH_CHECK_VALUE(!options.scale.has_value() || std::isfinite(*options.scale), name, ": scale is ",
                    options.scale.value_or(0.0), "; it has to be finite");
  TORCH_CHECK_VALUE((options.block_m == 0 && options.block_n == 0) || (options.block_m > 0 && options.block_n > 0),
                    name, ": block_size (", options.block_m, ", ", options.block_n,
                    "); both have to be positive, or both 0 for the best");
}

void check_backward(const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k,
                    const Tensor& v, const Tensor& out, const Tensor& lse, const Options& options) {
  const char* name = "flash_attention backward";
  check_forward(name, q, k, v, options);
  check_companion(name, "dout", dout, q);
  check_companion(name, "out", out, q);
  std::vector<SymInt> expected(q.sym_sizes().begin(), q.sym_sizes().end());
  expected.back() = v.sym_size(-1);
  TORCH_CHECK_VALUE(same_shape(out, expected), name, ": out is ", Shape{out}, "; q ", Shape{q}, " and v ", Shape{v},
                    " give (..., q's positions, v's head dimension)");
  TORCH_CHECK_VALUE(same_shape(dout, expected), name, ": dout is ", Shape{dout}, " and out ", Shape{out},
                    "; they need the same shape");
  expected.pop_back();
  const auto stats = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto check_stats = [&](const char* what, const Tensor& t) {
    check_kind(name, what, t);
    TORCH_CHECK_VALUE(t.device() == q.device(), name, ": ", what, " is on ", t.device(), " and q on ", q.device(),
                      "; move them to one device");
    TORCH_CHECK_TYPE(t.scalar_type() == stats, name, ": ", what, " is ", t.scalar_type(), "; for q in ",
                     q.scalar_type(), " it has to be ", stats);
    TORCH_CHECK_VALUE(same_shape(t, expected), name, ": ", what, " is ", Shape{t}, "; q ", Shape{q},
                      " needs one value per query row");
  };
  check_stats("lse", lse);
  if (dlse.has_value()) check_stats("dlse", *dlse);
}

namespace {

// A dense tensor of q's shape but for the last dimension, which is contiguous: engines write whole rows. The other
// dimensions stand in memory in the order of q's.
Tensor empty_in_layout_of(const Tensor& q, const SymInt& last) {
  if (last == q.sym_size(-1)) {
    Tensor out = at::empty_like(q);
    if (last == 1 || out.sym_stride(-1) == 1) return out;  // else q's own last dimension is not contiguous
  }
  const int64_t n = q.dim();
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  const auto q_strides = q.sym_strides();
  std::stable_sort(order.begin(), order.end() - 1, [&](int64_t a, int64_t b) { return q_strides[a] > q_strides[b]; });
  std::vector<SymInt> sizes(q.sym_sizes().begin(), q.sym_sizes().end()), strides(n);
  sizes.back() = last;
  SymInt stride = 1;
  for (int64_t i = n - 1; i >= 0; --i) {
    strides[order[i]] = stride;
    stride = stride * sizes[order[i]].max(1);
  }
  // Not empty().permute(): a view of a tensor with symbolic sizes cannot be taken inside a Meta kernel.
  return at::empty_strided_symint(sizes, strides, q.options());
}

}  // namespace

std::tuple<Tensor, Tensor> allocate_forward(const Tensor& q, const Tensor& v) {
  const auto sizes = q.sym_sizes();
  const auto stats = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return {empty_in_layout_of(q, v.sym_size(-1)),
          at::empty_symint(sizes.slice(0, sizes.size() - 1), q.options().dtype(stats))};
}

std::tuple<Tensor, Tensor, Tensor> allocate_backward(const Tensor& q, const Tensor& k, const Tensor& v) {
  return {at::empty_like(q), at::empty_like(k), at::empty_like(v)};
}

}  // namespace fae::ops
