// Written by table.py: do not edit.
#include "../sm80/launch_backward.cuh"

namespace fae::cuda::rows {
KernelEntry sm80_bwd_d256_m128_fp16() {
  return sm80::backward_v2_entry<__half, sm80::backward_row("sm80_bwd_d256_m128")>();
}
KernelEntry sm80_bwd_d256_m128_bf16() {
  return sm80::backward_v2_entry<__nv_bfloat16, sm80::backward_row("sm80_bwd_d256_m128")>();
}
KernelEntry sm80_bwd_d256_s1_fp16() {
  return sm80::backward_v2_entry<__half, sm80::backward_row("sm80_bwd_d256_s1")>();
}
KernelEntry sm80_bwd_d256_s1_bf16() {
  return sm80::backward_v2_entry<__nv_bfloat16, sm80::backward_row("sm80_bwd_d256_s1")>();
}
KernelEntry sm80_bwd_d256_small_fp16() {
  return sm80::backward_v2_entry<__half, sm80::backward_row("sm80_bwd_d256_small")>();
}
KernelEntry sm80_bwd_d256_small_bf16() {
  return sm80::backward_v2_entry<__nv_bfloat16, sm80::backward_row("sm80_bwd_d256_small")>();
}
}  // namespace fae::cuda::rows
