// What the engine does to a tile besides matrix products: packing, softmax, scaling, storing. One table of functions
// per (element, operand, accumulator) triple; tile_ops() picks the widest instruction set of the running CPU once.
//
// Operand layouts (what brgemm wants):
//   A  [M][K] row-major.
//   B  [K][N] row-major for fp32 and fp64; "VNNI" [K/2][N][2] for bf16: element (k, n) stands at ((k/2)*ld + n)*2 + k%2.
// The triples: fp32 in fp32, fp64 in fp64, bf16 in bf16 (VNNI), and bf16 or fp16 converted to fp32 operands.
#pragma once

#include "../core/mask.h"
#include "elements.h"

namespace fae::cpu {

template <typename In, typename Op, typename Acc>
struct TileOps {
  const char* isa;

  // dst[r][c] = src[r][c] for r < rows, c < cols; zero up to (rows_padded, cols_padded). An A operand.
  void (*copy_rows)(const In* src, int64_t ld_src, int rows, int cols, Op* dst, int ld_dst, int rows_padded,
                    int cols_padded);
  // B operand whose k index is the row of src. rows_padded is even.
  void (*pack_b)(const In* src, int64_t ld_src, int rows, int cols, Op* dst, int ld_dst, int rows_padded);
  // B operand whose k index is the column of src, n the row: K^T, Q^T, dO^T. n in [rows, rows_padded) is zero, and so
  // is k in [cols, cols_padded).
  void (*pack_b_transposed)(const In* src, int64_t ld_src, int rows, int cols, Op* dst, int ld_dst, int rows_padded,
                            int cols_padded);
  // A operand of the transpose: dst[col][row], plain row-major, zero for rows up to rows_padded.
  void (*pack_a_transposed)(const In* src, int64_t ld_src, int rows, int cols, Op* dst, int ld_dst, int rows_padded);

  // One step of online softmax over a tile of raw scores s[rows][ld_s], columns [0, cols): masks the columns of row r
  // outside visible[r] (relative to the tile), raises m, updates l, writes p = exp2(scale_log2 * s - m) and the factor
  // alpha[r] that older accumulations have to be multiplied with. p may lie over s where no element of a row lies behind
  // its score. Returns whether any alpha differs from 1. cols is a multiple of kColumnStep.
  bool (*softmax_step)(Acc* s, int ld_s, int rows, int cols, const Range* visible, Acc scale_log2, Acc* m, Acc* l,
                       Acc* alpha, Op* p, int ld_p);

  // Backward, on transposed tiles: row r is key r, column c is query c. p = exp2(scale_log2 * s - lse2[c]) inside
  // visible[r] and 0 outside; ds = p * (dp - delta[c]). Writes p and ds as A operands and, for VNNI operands, ds_b, the
  // same ds as a B operand (rows are k); for the others ds itself is one. p may alias s and ds may alias dp.
  void (*softmax_backward)(const Acc* s, const Acc* dp, int ld, int rows, int cols, const Range* visible,
                           Acc scale_log2, const Acc* lse2, const Acc* delta, Op* p, Op* ds, Op* ds_b, int ld_op);

  // o[r][c] *= factor[r]
  void (*scale_rows)(Acc* o, int64_t ld, int rows, int cols, const Acc* factor);
  // o[r][c] = a[r] * o[r][c] + b[r] * x[r][c]
  void (*scale_add_rows)(Acc* o, int64_t ld_o, const Acc* x, int ld_x, int rows, int cols, const Acc* a, const Acc* b);
  // dst[r][c] = src[r][c] * scale * (factor ? factor[r] : 1), rounded to In
  void (*store_rows)(const Acc* src, int64_t ld_src, int rows, int cols, const Acc* factor, Acc scale, In* dst,
                     int64_t ld_dst);
  // dst[r][c] = src[c][r] * scale, rounded to In; src is [cols][ld_src]
  void (*store_transposed)(const Acc* src, int ld_src, int rows, int cols, Acc scale, In* dst, int64_t ld_dst);
  // out[r] = sum over c of a[r][c] * b[r][c]
  void (*row_dot)(const In* a, int64_t ld_a, const In* b, int64_t ld_b, int rows, int cols, Acc* out);
};

// Tile widths are multiples of this: two 64-byte vectors of fp32, and few distinct shapes for brgemm to generate.
constexpr int kColumnStep = 32;

template <typename In, typename Op, typename Acc>
const TileOps<In, Op, Acc>& tile_ops();

// "avx512", "avx2" or "default": the set that tile_ops() uses on this CPU. ATEN_CPU_CAPABILITY=default|avx2|avx512
// lowers it, as it does for PyTorch's own kernels.
FAE_API const char* tile_isa();

}  // namespace fae::cpu
