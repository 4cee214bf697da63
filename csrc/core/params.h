// The arguments of one attention call as plain data: no torch, no CUDA header, trivially copyable, so that a kernel
// takes it by value and a C++ program can fill it in without PyTorch.
#pragma once

#include <cstdint>

#include "mask.h"
#include "platform.h"

namespace fae {

enum class DType : int { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2, kFloat64 = 3 };

FAE_HD constexpr int size_of(DType t) { return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2; }

// A (batch, heads, seq, dim) tensor whose last dimension is contiguous. Strides are in elements and 64-bit: a call may
// address more than 2^31 elements. Offsets inside one tile are 32-bit.
struct TensorRef {
  void* data = nullptr;
  int64_t stride_b = 0;
  int64_t stride_h = 0;
  int64_t stride_s = 0;

  template <typename T>
  FAE_HD T* row(int64_t b, int64_t h, int64_t s) const {
    return static_cast<T*>(data) + b * stride_b + h * stride_h + s * stride_s;
  }
};

// A (batch, heads, seq) tensor of statistics: lse, delta. Contiguous in seq.
struct RowRef {
  void* data = nullptr;
  int64_t stride_b = 0;
  int64_t stride_h = 0;

  template <typename T>
  FAE_HD T* row(int64_t b, int64_t h, int64_t s = 0) const {
    return static_cast<T*>(data) + b * stride_b + h * stride_h + s;
  }
};

struct Sizes {
  int64_t batch = 0;
  int heads = 0;     // query heads, Hq
  int heads_kv = 0;  // key/value heads, Hk; divides heads
  int seqlen_q = 0;
  int seqlen_k = 0;
  int head_dim = 0;    // D of q and k
  int head_dim_v = 0;  // Dv of v and out

  FAE_HD int heads_per_kv() const { return heads / heads_kv; }
  FAE_HD int kv_head(int h) const { return h / heads_per_kv(); }
};

// The lengths of one batch entry. Everything that loops over rows or keys asks for these instead of reading Sizes, so
// that packed sequences of unequal lengths change this function and nothing else.
struct SeqInfo {
  int seqlen_q;
  int seqlen_k;
};

struct AttentionParams {
  TensorRef q, k, v, o;
  RowRef lse;  // natural log, fp32 (fp64 for fp64 inputs)
  Sizes sizes;
  MaskSpec mask_spec;
  double scale = 1.0;  // any finite number

  FAE_HD SeqInfo seq(int64_t /*b*/) const { return {sizes.seqlen_q, sizes.seqlen_k}; }
  FAE_HD IntervalMask mask(int64_t b) const {
    const SeqInfo s = seq(b);
    return IntervalMask::make(mask_spec, s.seqlen_q, s.seqlen_k);
  }
};

// Backward contains the forward's arguments (o and lse are inputs here) and adds its own.
struct BackwardParams {
  AttentionParams fwd;
  TensorRef dout, dq, dk, dv;
  RowRef dlse;  // gradient of lse; data == nullptr when there is none
  bool deterministic = true;
};

}  // namespace fae
