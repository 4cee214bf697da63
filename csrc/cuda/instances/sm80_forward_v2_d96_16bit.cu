// Written by table.py: do not edit.
#include "../sm80/launch_forward.cuh"

namespace fae::cuda::rows {
KernelEntry sm80_fwd_d96_fp16() { return sm80::forward_v2_entry<__half, sm80::forward_row("sm80_fwd_d96")>(); }
KernelEntry sm80_fwd_d96_bf16() { return sm80::forward_v2_entry<__nv_bfloat16, sm80::forward_row("sm80_fwd_d96")>(); }
}  // namespace fae::cuda::rows
