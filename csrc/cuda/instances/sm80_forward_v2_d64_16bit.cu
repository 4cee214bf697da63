// Written by table.py: do not edit.
#include "../sm80/launch_forward.cuh"

namespace fae::cuda::rows {
KernelEntry sm80_fwd_d64_n128_fp16() {
  return sm80::forward_v2_entry<__half, sm80::forward_row("sm80_fwd_d64_n128")>();
}
KernelEntry sm80_fwd_d64_n128_bf16() {
  return sm80::forward_v2_entry<__nv_bfloat16, sm80::forward_row("sm80_fwd_d64_n128")>();
}
KernelEntry sm80_fwd_d64_fp16() { return sm80::forward_v2_entry<__half, sm80::forward_row("sm80_fwd_d64")>(); }
KernelEntry sm80_fwd_d64_bf16() { return sm80::forward_v2_entry<__nv_bfloat16, sm80::forward_row("sm80_fwd_d64")>(); }
KernelEntry sm80_fwd_d64_m16_fp16() { return sm80::forward_v2_entry<__half, sm80::forward_row("sm80_fwd_d64_m16")>(); }
KernelEntry sm80_fwd_d64_m16_bf16() {
  return sm80::forward_v2_entry<__nv_bfloat16, sm80::forward_row("sm80_fwd_d64_m16")>();
}
}  // namespace fae::cuda::rows
