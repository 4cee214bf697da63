"""Peak memory, measured: what the allocator handed out while a function ran, never a formula."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from gpt import Attention
from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Run `function` once and return how far tensor memory rose above where it stood before.

    CUDA counts in its caching allocator. The CPU allocator has no such counter, but the profiler records each
    allocation and release, and the highest point of their running sum is the peak. Tensors that exist already count on
    neither, so drop old gradients first if new ones shall be seen.

    Parameters
    ----------
    function : callable
        What to measure, without arguments.
    device : torch.device
        Where it allocates.

    Returns
    -------
    int
        Bytes.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        function()
    # The exported trace is the profiler's documented output that keeps every "[memory]" event: `profiler.events()`
    # folds those inside an operator into that operator's total, which loses the order and with it the peak.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    current = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):  # stable: events of one instant stay in written order
        current += change
        peak = max(peak, current)
    return peak


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
