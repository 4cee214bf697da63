"""Peak memory, measured: what the allocator handed out while a function ran, never a formula."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
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


def free_bytes(device: torch.device) -> int:
    """Memory that a program could still take; what the kernel's file cache holds counts as free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 1 << 62  # unknown here: let it try
