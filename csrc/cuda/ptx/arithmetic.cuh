// Single arithmetic and conversion instructions.
#pragma once

#include <cstdint>

#include "../../core/platform.h"

namespace fae::ptx {

// 2^x, two units in the last place, denormal results are zero; 2^-inf is 0. sm_50 and later.
FAE_DEVICE float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats to a pair, `low` in the lower half. sm_80 (bf16), sm_70 (f16) and later.
FAE_DEVICE uint32_t cvt_bf16x2(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
FAE_DEVICE uint32_t cvt_f16x2(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// Rounded to tf32, the lower 13 bits zero. Ties to even from sm_90 on (one instruction), away from zero before.
FAE_DEVICE uint32_t cvt_tf32(float x) {
  uint32_t y;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
#endif
  return y;
}

}  // namespace fae::ptx
