// Written by table.py: do not edit.
#include "../sm80/launch_forward.cuh"

namespace fae::cuda::rows {
KernelEntry sm80_fwd_f32_d256_fp32() { return sm80::forward_v2_entry<float, sm80::forward_row("sm80_fwd_f32_d256")>(); }
KernelEntry sm80_fwd_f32_d256_small_fp32() {
  return sm80::forward_v2_entry<float, sm80::forward_row("sm80_fwd_f32_d256_small")>();
}
}  // namespace fae::cuda::rows
