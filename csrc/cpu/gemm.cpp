#include "gemm.h"

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

namespace fae::cpu {

namespace blas = at::native::cpublas;

void gemm(int m, int n, int k, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool accumulate, const float* a,
          const float* b, float* c) {
  blas::brgemm(m, n, k, ld_a, ld_b, ld_c, accumulate, a, b, c, /*is_vnni=*/false);
}

void gemm(int m, int n, int k, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool accumulate, const bf16_t* a,
          const bf16_t* b, float* c) {
  blas::brgemm(m, n, k, ld_a, ld_b, ld_c, accumulate, reinterpret_cast<const at::BFloat16*>(a),
               reinterpret_cast<const at::BFloat16*>(b), c, /*is_vnni=*/true);
}

void gemm(int m, int n, int k, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool accumulate, const double* a,
          const double* b, double* c) {
  for (int i = 0; i < m; ++i) {
    double* row = c + i * ld_c;
    if (!accumulate) std::fill(row, row + n, 0.0);
    for (int x = 0; x < k; ++x) {
      const double factor = a[i * ld_a + x];
      const double* from = b + x * ld_b;
      for (int j = 0; j < n; ++j) row[j] += factor * from[j];
    }
  }
}

void gemm_release() { blas::brgemm_release(); }

namespace {

// The only way to ask is to try: on a CPU without the instructions brgemm throws when it generates the kernel.
bool probe_bf16() {
  alignas(64) bf16_t a[32 * 32], b[32 * 32];
  alignas(64) float c[32 * 32];
  std::fill(std::begin(a), std::end(a), bf16_t{0x3f80});
  std::fill(std::begin(b), std::end(b), bf16_t{0x3f80});
  try {
    gemm(32, 32, 32, 32, 32, 32, false, a, b, c);
    gemm_release();
  } catch (const std::exception&) {
    return false;
  }
  return c[0] == 32.0f && c[32 * 32 - 1] == 32.0f;
}

}  // namespace

bool has_bf16_gemm() {
  static const bool value = probe_bf16();
  return value;
}

}  // namespace fae::cpu
