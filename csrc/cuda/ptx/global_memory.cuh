// Global memory: reductions and ordered accesses.
#pragma once

#include <cstdint>

#include "../../core/platform.h"
#include "wait.cuh"

namespace fae::ptx {

// *p += x for four consecutive floats, no result; p 16-byte aligned. sm_90 and later (PTX ISA 9.7.13.4).
FAE_DEVICE void red_add_v4(float* p, float x, float y, float z, float w) {
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(p), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}

// The line of p comes to L2.
FAE_DEVICE void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// ++*p; what was there before, less than 2^31. atomicAdd(p, 1) is the same, but ptxas makes one of it for all of a warp's threads
// that come along, and has the result waited for at once.
FAE_DEVICE int atom_increment(int* p) {
  int before;
  asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], 0x7fffffff;" : "=r"(before) : "l"(p) : "memory");
  return before;
}

// Loads, stores and reductions that order other memory accesses of the device around them. sm_70 and later.
FAE_DEVICE int ld_acquire(const int* p) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
FAE_DEVICE void wait_acquire(const int* p, int x, const char* name) {
  wait_until([=] { return ld_acquire(p) == x; }, name, x);
}
// The same where much time may pass: polls without ordering, since each acquire empties the L1 cache of its SM.
FAE_DEVICE int ld_relaxed(const int* p) {
  int x;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
FAE_DEVICE void wait_long_acquire(const int* p, int x, const char* name) {
  if (ld_acquire(p) == x) return;
  wait_until([=] { return ld_relaxed(p) == x; }, name, x);
  ld_acquire(p);
}
FAE_DEVICE void st_release(int* p, int x) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
FAE_DEVICE void fence_acq_rel_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
FAE_DEVICE void st_relaxed(int* p, int x) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
FAE_DEVICE void red_release(int* p, int x) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}

}  // namespace fae::ptx
