// mbarrier: counts arrivals and bytes of asynchronous copies, PTX ISA 9.7.13.15; sm_90.
//
// A phase completes when the expected arrivals and bytes are there; then the next begins. A waiter names the parity of the
// phase that it waits for: a fresh barrier is in phase 0, and waiting for parity 1 on it returns at once.
#pragma once

#include <cstdint>

#include "../../core/platform.h"
#include "wait.cuh"

namespace fae::ptx {

FAE_DEVICE void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// The initialised barriers become visible to the copy engine.
FAE_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Built with FAE_DEBUG_DELAYS, a quarter of all arrivals, and of what follows a wait, come up to two microseconds late:
// a barrier that is missing shows in the results, where the usual timing may hide it.
FAE_DEVICE void debug_delay(uint32_t barrier) {
#if defined(FAE_DEBUG_DELAYS)
  uint32_t x = static_cast<uint32_t>(clock64()) ^ barrier ^ blockIdx.x * 0x9e3779b9u ^ threadIdx.x / 32 * 0x85ebca6bu;
  x = (x ^ x >> 15) * 0x2c1b3c6du;
  x ^= x >> 13;
  if (x % 4 == 0) __nanosleep(x >> 4 & 2047);
#else
  (void)barrier;
#endif
}

FAE_DEVICE void mbarrier_arrive(uint32_t barrier) {
  debug_delay(barrier);
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and adds `bytes` to what the phase waits for.
FAE_DEVICE void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  debug_delay(barrier);
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Adds only the bytes. The phase lasts until an arrival comes as well, whenever the bytes do.
FAE_DEVICE void mbarrier_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
FAE_DEVICE bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}
// Whether it is complete now.
FAE_DEVICE bool mbarrier_test_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}
// Waits until the phase of that parity is complete.
FAE_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity, const char* name) {
  wait_until([=] { return mbarrier_try_wait(barrier, parity); }, name, static_cast<int>(parity));
  debug_delay(barrier);
}

}  // namespace fae::ptx
