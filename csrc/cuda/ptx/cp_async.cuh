// cp.async: copies from global to shared memory that run beside the arithmetic. PTX ISA 9.7.9.25.3; sm_80 and later.
#pragma once

#include <cstdint>

#include "../../core/platform.h"

namespace fae::ptx {

// 16 bytes past the L1; where `valid` is false zeros are written and nothing is read, whatever the global address. Both
// addresses 16-byte aligned.
FAE_DEVICE void cp_async_16(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

FAE_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
FAE_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace fae::ptx
