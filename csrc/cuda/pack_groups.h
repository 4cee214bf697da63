// One query row for each head, and several heads that share K and V, as when a model with grouped heads writes token after
// token: the heads of a group become the rows of one, so that K and V are read once for all of them.
#pragma once

#include <cstdint>

#include "../core/params.h"

namespace fae::cuda {

// Returns whether it changed `p`. With one row the mask is one interval of keys for all: K and V then begin and end with it,
// and no mask is left. Sizes and mask alone will do where there are no tensors yet. lse is dense, as the operators allocate it.
inline bool pack_groups(AttentionParams* p, int element_bytes) {
  Sizes& z = p->sizes;
  if (z.seqlen_q != 1 || z.heads_kv == 0 || z.heads == z.heads_kv || z.seqlen_k == 0) return false;
  const IntervalMask mask = p->mask(0);
  const Range seen = mask.keys_of_rows(0, 1);
  if (seen.empty()) return false;
  for (TensorRef* t : {&p->k, &p->v})
    if (t->data != nullptr) t->data = static_cast<char*>(t->data) + int64_t{seen.begin} * t->stride_s * element_bytes;
  const int group = z.heads_per_kv();
  for (TensorRef* t : {&p->q, &p->o}) {
    t->stride_s = t->stride_h;
    t->stride_h *= group;
  }
  p->lse.stride_h *= group;
  z.seqlen_q = group;
  z.heads = z.heads_kv;
  z.seqlen_k = seen.size();
  p->mask_spec = MaskSpec{};
  return true;
}

}  // namespace fae::cuda
