// Written by table.py: do not edit.
#include "../sm80/launch_forward_v1.cuh"

namespace fae::cuda::rows {
KernelEntry sm80_fwd_v1_d128_n128_fp16() {
  return sm80::forward_v1_entry<__half, sm80::forward_v1_row("sm80_fwd_v1_d128_n128")>();
}
KernelEntry sm80_fwd_v1_d128_n128_bf16() {
  return sm80::forward_v1_entry<__nv_bfloat16, sm80::forward_v1_row("sm80_fwd_v1_d128_n128")>();
}
KernelEntry sm80_fwd_v1_d128_n128_w2_fp16() {
  return sm80::forward_v1_entry<__half, sm80::forward_v1_row("sm80_fwd_v1_d128_n128"), 2>();
}
KernelEntry sm80_fwd_v1_d128_n128_w2_bf16() {
  return sm80::forward_v1_entry<__nv_bfloat16, sm80::forward_v1_row("sm80_fwd_v1_d128_n128"), 2>();
}
KernelEntry sm80_fwd_v1_d128_n64_fp16() {
  return sm80::forward_v1_entry<__half, sm80::forward_v1_row("sm80_fwd_v1_d128_n64")>();
}
KernelEntry sm80_fwd_v1_d128_n64_bf16() {
  return sm80::forward_v1_entry<__nv_bfloat16, sm80::forward_v1_row("sm80_fwd_v1_d128_n64")>();
}
KernelEntry sm80_fwd_v1_d128_n64_w8_fp16() {
  return sm80::forward_v1_entry<__half, sm80::forward_v1_row("sm80_fwd_v1_d128_n64"), 8>();
}
KernelEntry sm80_fwd_v1_d128_n64_w8_bf16() {
  return sm80::forward_v1_entry<__nv_bfloat16, sm80::forward_v1_row("sm80_fwd_v1_d128_n64"), 8>();
}
KernelEntry sm80_fwd_v1_d128_n64_w2_fp16() {
  return sm80::forward_v1_entry<__half, sm80::forward_v1_row("sm80_fwd_v1_d128_n64"), 2>();
}
KernelEntry sm80_fwd_v1_d128_n64_w2_bf16() {
  return sm80::forward_v1_entry<__nv_bfloat16, sm80::forward_v1_row("sm80_fwd_v1_d128_n64"), 2>();
}
KernelEntry sm80_fwd_v1_d128_n32_fp16() {
  return sm80::forward_v1_entry<__half, sm80::forward_v1_row("sm80_fwd_v1_d128_n32")>();
}
KernelEntry sm80_fwd_v1_d128_n32_bf16() {
  return sm80::forward_v1_entry<__nv_bfloat16, sm80::forward_v1_row("sm80_fwd_v1_d128_n32")>();
}
KernelEntry sm80_fwd_v1_d128_n32_w8_fp16() {
  return sm80::forward_v1_entry<__half, sm80::forward_v1_row("sm80_fwd_v1_d128_n32"), 8>();
}
KernelEntry sm80_fwd_v1_d128_n32_w8_bf16() {
  return sm80::forward_v1_entry<__nv_bfloat16, sm80::forward_v1_row("sm80_fwd_v1_d128_n32"), 8>();
}
KernelEntry sm80_fwd_v1_d128_n32_w2_fp16() {
  return sm80::forward_v1_entry<__half, sm80::forward_v1_row("sm80_fwd_v1_d128_n32"), 2>();
}
KernelEntry sm80_fwd_v1_d128_n32_w2_bf16() {
  return sm80::forward_v1_entry<__nv_bfloat16, sm80::forward_v1_row("sm80_fwd_v1_d128_n32"), 2>();
}
}  // namespace fae::cuda::rows
