// Global memory: reductions and ordered accesses.
#pragma once

#include <cstdint>
#if defined(FAE_DEBUG_BARRIERS)
#include <cstdio>
#endif

#include "../../core/platform.h"

namespace fae::ptx {

// *p += x for four consecutive floats, no result; p 16-byte aligned. sm_90 and later (PTX ISA 9.7.13.4).
FAE_DEVICE void red_add_v4(float* p, float x, float y, float z, float w) {
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(p), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}

// Loads, stores and reductions that order other memory accesses of the device around them. sm_70 and later.
FAE_DEVICE int ld_acquire(const int* p) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
// Waits until *p is x. As mbarrier_wait, built with FAE_DEBUG_BARRIERS it gives up after seconds, and says for what it waited.
FAE_DEVICE void wait_acquire(const int* p, int x, const char* name) {
#if defined(FAE_DEBUG_BARRIERS)
  constexpr long long kCycles = 10'000'000'000;
  const long long start = clock64();
  while (ld_acquire(p) != x) {
    if (clock64() - start < kCycles) continue;
    printf("flash_attn_ext: block %d thread %d waits for %s to be %d\n", blockIdx.x, threadIdx.x, name, x);
    __trap();
  }
#else
  (void)name;
  while (ld_acquire(p) != x) {
  }
#endif
}
FAE_DEVICE void st_release(int* p, int x) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
FAE_DEVICE void red_release(int* p, int x) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}

}  // namespace fae::ptx
