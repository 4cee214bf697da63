// Written by table.py: do not edit.
#include "../sm80/launch_backward.cuh"

namespace fae::cuda::rows {
KernelEntry sm80_bwd_f32_d128_fp32() {
  return sm80::backward_v2_entry<float, sm80::backward_row("sm80_bwd_f32_d128")>();
}
KernelEntry sm80_bwd_f32_d128_s1_fp32() {
  return sm80::backward_v2_entry<float, sm80::backward_row("sm80_bwd_f32_d128_s1")>();
}
}  // namespace fae::cuda::rows
