// Written by table.py: do not edit.
#include "../sm80/launch_backward.cuh"

namespace fae::cuda::rows {
KernelEntry sm80_bwd_d96_fp16() { return sm80::backward_v2_entry<__half, sm80::backward_row("sm80_bwd_d96")>(); }
KernelEntry sm80_bwd_d96_bf16() { return sm80::backward_v2_entry<__nv_bfloat16, sm80::backward_row("sm80_bwd_d96")>(); }
}  // namespace fae::cuda::rows
