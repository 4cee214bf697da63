// Written by table.py: do not edit.
#include "../sm90/launch_forward.cuh"

namespace fae::cuda::rows {
KernelEntry sm90_fwd_d192_fp16() { return sm90::forward_v2_entry<__half, sm90::forward_row("sm90_fwd_d192")>(); }
KernelEntry sm90_fwd_d192_bf16() { return sm90::forward_v2_entry<__nv_bfloat16, sm90::forward_row("sm90_fwd_d192")>(); }
}  // namespace fae::cuda::rows
