// Waiting for what another thread does.
#pragma once

#if defined(FAE_DEBUG_BARRIERS)
#include <cstdio>
#endif

#include "../../core/platform.h"

namespace fae::ptx {

// Waits until `ready`. Built with FAE_DEBUG_BARRIERS, a wait that takes seconds names what it waits for and traps (a trap in
// a release build's loop would cost the registers of the whole kernel).
template <typename Ready>
FAE_DEVICE void wait_until(Ready ready, const char* name, int value) {
#if defined(FAE_DEBUG_BARRIERS)
  constexpr long long kCycles = 10'000'000'000;  // some five seconds
  const long long start = clock64();
  while (!ready()) {
    if (clock64() - start < kCycles) continue;
    printf("flash_attn_ext: block %d thread %d waits for %s, %d\n", blockIdx.x, threadIdx.x, name, value);
    __trap();
  }
#else
  (void)name, (void)value;
  while (!ready()) {
  }
#endif
}

}  // namespace fae::ptx
