// Written by table.py: do not edit.
#include "../sm90/launch_backward.cuh"

namespace fae::cuda::rows {
KernelEntry sm90_bwd_d112_fp16() { return sm90::backward_v2_entry<__half, sm90::backward_row("sm90_bwd_d112")>(); }
KernelEntry sm90_bwd_d112_bf16() {
  return sm90::backward_v2_entry<__nv_bfloat16, sm90::backward_row("sm90_bwd_d112")>();
}
}  // namespace fae::cuda::rows
