// Written by table.py: do not edit.
#include "../sm80/launch_forward_v1.cuh"

namespace fae::cuda::rows {
KernelEntry sm80_fwd_v1_f32_d64_n128_fp32() {
  return sm80::forward_v1_entry<float, sm80::forward_v1_row("sm80_fwd_v1_f32_d64_n128")>();
}
KernelEntry sm80_fwd_v1_f32_d64_n128_w8_fp32() {
  return sm80::forward_v1_entry<float, sm80::forward_v1_row("sm80_fwd_v1_f32_d64_n128"), 8>();
}
KernelEntry sm80_fwd_v1_f32_d64_n128_w2_fp32() {
  return sm80::forward_v1_entry<float, sm80::forward_v1_row("sm80_fwd_v1_f32_d64_n128"), 2>();
}
KernelEntry sm80_fwd_v1_f32_d64_n64_fp32() {
  return sm80::forward_v1_entry<float, sm80::forward_v1_row("sm80_fwd_v1_f32_d64_n64")>();
}
KernelEntry sm80_fwd_v1_f32_d64_n64_w8_fp32() {
  return sm80::forward_v1_entry<float, sm80::forward_v1_row("sm80_fwd_v1_f32_d64_n64"), 8>();
}
KernelEntry sm80_fwd_v1_f32_d64_n64_w2_fp32() {
  return sm80::forward_v1_entry<float, sm80::forward_v1_row("sm80_fwd_v1_f32_d64_n64"), 2>();
}
KernelEntry sm80_fwd_v1_f32_d64_n32_fp32() {
  return sm80::forward_v1_entry<float, sm80::forward_v1_row("sm80_fwd_v1_f32_d64_n32")>();
}
KernelEntry sm80_fwd_v1_f32_d64_n32_w8_fp32() {
  return sm80::forward_v1_entry<float, sm80::forward_v1_row("sm80_fwd_v1_f32_d64_n32"), 8>();
}
KernelEntry sm80_fwd_v1_f32_d64_n32_w2_fp32() {
  return sm80::forward_v1_entry<float, sm80::forward_v1_row("sm80_fwd_v1_f32_d64_n32"), 2>();
}
}  // namespace fae::cuda::rows
