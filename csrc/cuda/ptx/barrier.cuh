// Barriers of part of a CTA.
#pragma once

#include "../../core/platform.h"

namespace fae::ptx {

// bar.sync with one of the 16 hardware barriers, PTX ISA 9.7.13.1: waits for `threads` threads, whole warps, and orders
// their shared-memory accesses. Barrier 0 is __syncthreads'.
FAE_DEVICE void bar_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

}  // namespace fae::ptx
