"""What one call costs before any work is done: a tiny problem, layer by layer, beside PyTorch's own function.

    python benchmarks/call_cost.py [--device cuda] [--json FILE]

A line contains the lines of the layers below it and the tiny problem itself; differences between lines are the cost of
a layer. On a GPU it is the processor's time until the launch is queued.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from flash_attn_ext import flash_attention
from flash_attn_ext.cli import _record
from flash_attn_ext.cli._grids import DTYPES
from flash_attn_ext.cli._report import Table, number
from flash_attn_ext.cli._timing import REFUSALS, CpuTimer, Sample, failure, measure

Call = Callable[[], object]


class QueueTimer(CpuTimer):
    """The processor's time for a batch of calls on a GPU, which starts idle and is not waited for."""

    def sample(self, call: Call, calls: int) -> Sample:
        torch.cuda.synchronize()
        sample = super().sample(call, min(calls, 200))  # more would fill the launch queue, and then wait for the GPU
        torch.cuda.synchronize()
        return sample


def layers(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> dict[str, Call]:
    """What is timed, by name, from the outermost layer inwards."""
    q, k, v, dout = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    x, y, z = (t.clone().requires_grad_() for t in (q, k, v))
    op = torch.ops.flash_attn_ext.fwd.default
    sdpa = F.scaled_dot_product_attention
    out, sdpa_out = flash_attention(x, y, z), sdpa(x, y, z)

    def below_autograd() -> object:
        with torch._C._AutoDispatchBelowAutograd():
            return op(q, k, v)

    def no_grad() -> object:
        with torch.no_grad():
            return flash_attention(x, y, z)

    ours_grad = torch.func.grad(lambda q, k, v: flash_attention(q, k, v).sum())
    sdpa_grad = torch.func.grad(lambda q, k, v: sdpa(q, k, v).sum())
    plain_grad = torch.func.grad(lambda q, k, v: (q + k + v).sum())
    ours_vmap, sdpa_vmap = torch.vmap(flash_attention), torch.vmap(sdpa)
    mapped = tuple(t.unsqueeze(0) for t in (q, k, v))
    return {
        "flash_attention, no gradient wanted": lambda: flash_attention(q, k, v),
        "flash_attention, inside torch.no_grad()": no_grad,
        "flash_attention, graph recorded": lambda: flash_attention(x, y, z),
        "operator with its formula, no gradient wanted": lambda: op(q, k, v),
        "operator with its formula, graph recorded": lambda: op(x, y, z),
        "operator below autograd": below_autograd,
        "backward alone, autograd.grad": lambda: torch.autograd.grad(out, (x, y, z), dout, retain_graph=True),
        "torch.func.grad of flash_attention().sum()": lambda: ours_grad(q, k, v),
        "torch.vmap of flash_attention": lambda: ours_vmap(*mapped),
        "SDPA, no gradient wanted": lambda: sdpa(q, k, v),
        "SDPA, graph recorded": lambda: sdpa(x, y, z),
        "SDPA, backward alone, autograd.grad": lambda: torch.autograd.grad(
            sdpa_out, (x, y, z), dout, retain_graph=True
        ),
        "torch.func.grad of SDPA().sum()": lambda: sdpa_grad(q, k, v),
        "torch.vmap of SDPA": lambda: sdpa_vmap(*mapped),
        "torch.func.grad of (q + k + v).sum()": lambda: plain_grad(q, k, v),
        "torch.empty_like(q)": lambda: torch.empty_like(q),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table.

    Returns
    -------
    int
        0; 1 where flash_attention cannot compute the problem.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: fp32 on the CPU, bf16 on CUDA")
    parser.add_argument("--shape", default="1,1,8,16", metavar="B,H,S,D", help="the tiny problem (default 1,1,8,16)")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each line (default 15)")
    parser.add_argument("--sample-ms", type=float, default=20.0, help="least length of a sample (default 20)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--markdown", action="store_true", help="print markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    args = parser.parse_args(arguments)
    sizes = args.shape.split(",")
    if len(sizes) != 4 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        parser.error(f"--shape {args.shape!r}: write B,H,S,D, for example 1,1,8,16")
    if args.rounds < 1 or args.sample_ms <= 0:
        parser.error("--rounds and --sample-ms have to be positive")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here")
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    batch, heads, length, head_dim = map(int, sizes)

    # PyTorch's own function has no vmap rule on the CPU; that its fallback is slow is what the line shows.
    warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
    try:
        calls = layers(device, DTYPES[dtype], (batch, heads, length, head_dim))
    except REFUSALS as error:
        print(f"call_cost: {failure(error)}", file=sys.stderr)
        return 1
    timer = QueueTimer(args.sample_ms / 1e3) if device.type == "cuda" else CpuTimer(args.sample_ms / 1e3)
    # SDPA as it comes, and not with the backend pinned: choosing one is a part of its cost.
    start = time.perf_counter()
    found = measure(calls, timer, args.rounds)
    table = Table(
        f"one call at (B, H, S, D) = {args.shape}, {dtype}, {device.type}, us", ["call", "median", "min", "max"]
    )
    rows: list[dict[str, Any]] = []
    for name, m in found.items():
        if m.error is not None:
            table.add(name, "refused", "", "")
            table.notes.append(f"{name}: {m.error}")
            rows.append({"call": name, "us": None, "reason": m.error})
            continue
        table.add(name, *(number(1e3 * ms) for ms in (m.ms, m.low, m.high)))
        rows.append({"call": name, "us": 1e3 * m.ms, "us_min": 1e3 * m.low, "us_max": 1e3 * m.high, "calls": m.calls})
    table.notes.append(
        f"{args.rounds} rounds in turn, {time.perf_counter() - start:.0f} s, {args.threads} CPU thread(s)"
    )
    if args.markdown:
        print(table.markdown())
    else:
        table.print()
    if args.json:
        command = f"python benchmarks/call_cost.py --device {args.device} --dtype {dtype} --shape {args.shape}"
        about = _record.provenance(device, f"{command} --rounds {args.rounds} --threads {args.threads}", [dtype])
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"provenance": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
