// Ordering of wgmma, PTX ISA 9.7.15.7; sm_90a.
#pragma once

#include "../../core/platform.h"

namespace fae::ptx {

// wgmma.fence: registers written before it may be read by the wgmma that follow.
FAE_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FAE_DEVICE void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All but the youngest `kPending` groups of this warp are complete.
template <int kPending>
FAE_DEVICE void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

}  // namespace fae::ptx
