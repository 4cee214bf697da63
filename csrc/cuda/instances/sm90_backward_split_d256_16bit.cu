// Written by table.py: do not edit.
#include "../sm90/launch_backward.cuh"

namespace fae::cuda::rows {
KernelEntry sm90_bwd_d256_fp16() { return sm90::backward_split_entry<__half, sm90::dkv_row("sm90_bwd_d256")>(); }
KernelEntry sm90_bwd_d256_bf16() { return sm90::backward_split_entry<__nv_bfloat16, sm90::dkv_row("sm90_bwd_d256")>(); }
}  // namespace fae::cuda::rows
