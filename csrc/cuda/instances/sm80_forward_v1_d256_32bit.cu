// Written by table.py: do not edit.
#include "../sm80/launch_forward_v1.cuh"

namespace fae::cuda::rows {
KernelEntry sm80_fwd_v1_f32_d256_n32_fp32() {
  return sm80::forward_v1_entry<float, sm80::forward_v1_row("sm80_fwd_v1_f32_d256_n32")>();
}
}  // namespace fae::cuda::rows
