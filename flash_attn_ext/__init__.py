"""Exact attention without the S x S matrix: FlashAttention v1 and v2 as PyTorch operators.

    from flash_attn_ext import flash_attention
    out = flash_attention(q, k, v, causal=True)      # (B, H, S, D)
"""

from ._version import __version__
from .interface import (
    build_info,
    explain,
    flash_attention,
    flash_attention_v1,
    flash_attention_v2,
    supported_kernels,
)
from .reference import naive_attention

__all__ = [
    "__version__",
    "build_info",
    "explain",
    "flash_attention",
    "flash_attention_v1",
    "flash_attention_v2",
    "naive_attention",
    "supported_kernels",
]
