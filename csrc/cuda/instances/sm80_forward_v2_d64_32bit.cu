// Written by table.py: do not edit.
#include "../sm80/launch_forward.cuh"

namespace fae::cuda::rows {
KernelEntry sm80_fwd_f32_d64_fp32() { return sm80::forward_v2_entry<float, sm80::forward_row("sm80_fwd_f32_d64")>(); }
KernelEntry sm80_fwd_f32_d64_m16_fp32() {
  return sm80::forward_v2_entry<float, sm80::forward_row("sm80_fwd_f32_d64_m16")>();
}
}  // namespace fae::cuda::rows
