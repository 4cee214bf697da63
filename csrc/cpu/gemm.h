// Matrix products of tiles: C[M][N] (+)= A[M][K] * B[K][N], row-major with leading dimensions, from ATen's brgemm.
#pragma once

#include "elements.h"

namespace fae::cpu {

// K has to be even for bf16, whose B operand is in VNNI layout (tile_ops.h).
void gemm(int m, int n, int k, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool accumulate, const float* a,
          const float* b, float* c);
void gemm(int m, int n, int k, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool accumulate, const bf16_t* a,
          const bf16_t* b, float* c);
// brgemm has no fp64: plain loops, for gradient checks.
void gemm(int m, int n, int k, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool accumulate, const double* a,
          const double* b, double* c);

// Ends a thread's use of brgemm (on AMX it holds a tile configuration).
void gemm_release();

// Whether this CPU multiplies bf16 operands in VNNI layout. Without it bf16 tiles are converted to fp32.
FAE_API bool has_bf16_gemm();

}  // namespace fae::cpu
