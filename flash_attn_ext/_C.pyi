from typing import Any

def build_info() -> dict[str, Any]: ...
def supported_kernels() -> list[dict[str, Any]]: ...
def plan(
    *,
    pass_: str,
    version: int,
    dtype: str,
    batch: int,
    heads: int,
    heads_kv: int,
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int,
    head_dim_v: int,
    block_m: int,
    block_n: int,
    threads: int,
) -> dict[str, Any]: ...

# Of a build with CUDA alone:
def cuda_device(index: int) -> dict[str, int]: ...
def plan_cuda(
    *,
    pass_: str,
    version: int,
    dtype: str,
    batch: int,
    heads: int,
    heads_kv: int,
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int,
    head_dim_v: int,
    block_m: int,
    block_n: int,
    deterministic: bool,
    fp32_exact: bool,
    compute_capability: int,
    sm_count: int,
    shared_bytes: int,
) -> dict[str, Any]: ...
def check_core_on_cuda(count: int = 4096) -> list[str]: ...
