// The rules of core/ evaluated on the GPU, for comparing with the host's: what `doctor` and the GPU tests run first on a
// new machine. No torch header.
#pragma once

#include <cstdint>

#include "../core/params.h"

namespace fae::cuda {

// One row of answers per probe. Integers must match the host's exactly, floats to a few units in the last place.
struct CoreProbe {
  MaskSpec spec;
  int seqlen_q, seqlen_k, row, key, rows_end, keys_end;
  float m_old, m_new, l;
  uint32_t philox_row, philox_col;
};
struct CoreAnswer {
  int visible, key_begin, key_end, row_begin, row_end, whole_begin, whole_end, tile_is_full;
  uint32_t dropout_half;
  float rescale, inverse_sum, lse, lse_base2;
};

// Runs on the current device and waits. Returns a cudaError_t as int (0 is success); names it through error_text().
FAE_API int run_core_probes(const CoreProbe* probes, CoreAnswer* answers, int count);
FAE_API const char* error_text(int error);

FAE_HD CoreAnswer answer_core_probe(const CoreProbe& p);

}  // namespace fae::cuda

#include "../core/philox.h"
#include "../core/softmax.h"

namespace fae::cuda {

FAE_HD CoreAnswer answer_core_probe(const CoreProbe& p) {
  const IntervalMask mask = IntervalMask::make(p.spec, p.seqlen_q, p.seqlen_k);
  const Range keys = mask.keys_of_rows(p.row, p.rows_end), rows = mask.rows_of_keys(p.key, p.keys_end);
  const Range whole = mask.rows_seeing_all(p.key, p.keys_end);
  const Dropout dropout{{0x0123456789abcdefull, 0xfedcba9876543210ull}, 1u};
  using rules = softmax<float>;
  CoreAnswer a;
  a.visible = mask.visible(p.row, p.key);
  a.key_begin = keys.begin;
  a.key_end = keys.end;
  a.row_begin = rows.begin;
  a.row_end = rows.end;
  a.whole_begin = whole.begin;
  a.whole_end = whole.end;
  a.tile_is_full = mask.tile_is_full(p.row, p.rows_end, p.key, p.keys_end);
  a.dropout_half = dropout.words(7u, p.philox_row, p.philox_col).half(Dropout::half_index(p.philox_row, p.philox_col));
  a.rescale = rules::rescale(p.m_old, p.m_new);
  a.inverse_sum = rules::inverse_sum(p.l);
  a.lse = rules::lse(p.m_new, p.l);
  a.lse_base2 = rules::lse_base2(a.lse);
  return a;
}

}  // namespace fae::cuda
