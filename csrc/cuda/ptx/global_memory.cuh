// Global memory: reductions and ordered accesses.
#pragma once

#include <cstdint>

#include "../../core/platform.h"

namespace fae::ptx {

// *p += x for four consecutive floats, no result; p 16-byte aligned. One instruction from sm_90 on (PTX ISA 9.7.13.4),
// four before.
FAE_DEVICE void red_add_v4(float* p, float x, float y, float z, float w) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(p), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
#else
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(p), "f"(x) : "memory");
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(p + 1), "f"(y) : "memory");
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(p + 2), "f"(z) : "memory");
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(p + 3), "f"(w) : "memory");
#endif
}

// Loads and reductions that order other memory accesses of the device around them. sm_70 and later.
FAE_DEVICE int ld_acquire(const int* p) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
FAE_DEVICE void red_release(int* p, int x) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}

}  // namespace fae::ptx
