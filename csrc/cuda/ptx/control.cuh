// Registers of a warpgroup, one thread of a warp.
#pragma once

#include <cstdint>

#include "../../core/platform.h"

namespace fae::ptx {

// setmaxnreg, PTX ISA 9.7.19.5; sm_90a: every warp of a warpgroup gives registers back, or waits until it has more. The
// kernel needs __launch_bounds__ with a minimum of blocks, else it is ignored.
template <int kRegisters>
FAE_DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
FAE_DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// elect.sync, PTX ISA 9.7.13.14; sm_90: true in one thread of a converged warp.
FAE_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected != 0;
}

// Programmatic dependent launch: grids launched so may start once all CTAs of this one have called launch_dependents or
// ended; wait returns when the grids before have ended and what they wrote is visible.
FAE_DEVICE void griddepcontrol_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
FAE_DEVICE void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Both, first thing in a kernel that has nothing to do before: launches overlap, work does not. Before 9.0 there is neither.
FAE_DEVICE void begin_dependent_grid() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
#endif
}

}  // namespace fae::ptx
