"""Exact attention without the S x S matrix: FlashAttention v1 and v2 as PyTorch operators.

from flash_attn_ext import flash_attention
out = flash_attention(q, k, v, causal=True)      # (B, H, S, D)
"""

from ._version import __version__
from .compat import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from .interface import (
    build_info,
    explain,
    flash_attention,
    flash_attention_v1,
    flash_attention_v2,
    supported_kernels,
)
from .reference import naive_attention
from .sdpa import FlashAttentionFallback, replace_sdpa, scaled_dot_product_attention

__all__ = [
    "FlashAttentionFallback",
    "__version__",
    "build_info",
    "explain",
    "flash_attention",
    "flash_attention_v1",
    "flash_attention_v2",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "naive_attention",
    "replace_sdpa",
    "scaled_dot_product_attention",
    "supported_kernels",
]
