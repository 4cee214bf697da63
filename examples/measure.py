"""Peak memory of attention alone, measured at several lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from gpt import Attention

from flash_attn_ext.cli._memory import peak_bytes


def attention_memory(
    attention: Attention, lengths: Sequence[int], heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> list[int | None]:
    """Measure one causal forward and backward pass of attention alone at several sequence lengths, batch 1.

    Parameters
    ----------
    attention : callable
        `(q, k, v, causal=True) -> out` on (B, H, S, D).
    lengths : sequence of int
        Sequence lengths.
    heads, head_dim : int
        The other sizes.
    device, dtype : torch.device, torch.dtype
        Of the inputs.

    Returns
    -------
    list of int or None
        Peak bytes a length: output, gradients and all intermediates, but not q, k, v. `None` where it did not fit.
    """

    def run(length: int) -> Callable[[], None]:
        q, k, v = (
            torch.randn(1, heads, length, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
        )
        grad = torch.randn_like(q)
        return lambda: attention(q, k, v, causal=True).backward(grad)

    run(lengths[0])()  # what libraries allocate once, on first use, is nobody's peak
    peaks: list[int | None] = []
    for length in lengths:
        try:
            peaks.append(peak_bytes(run(length), device))
        except torch.OutOfMemoryError:
            peaks.append(None)
            torch.cuda.empty_cache()
    return peaks
