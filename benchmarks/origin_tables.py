"""The tables of the original project, measured again: agreement, time, memory, block sizes.

    python benchmarks/origin_tables.py [--device cuda] [--block-sizes] [--json FILE]

Inputs are (B, S, D), one head, float32. Exits 1 where version 1 or 2 disagrees with the plain implementation.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler complains on stderr where a CUDA build finds no GPU

import torch
from torch import Tensor

from flash_attn_ext import flash_attention_v1, flash_attention_v2, naive_attention
from flash_attn_ext.cli import _record
from flash_attn_ext.cli._memory import peak_bytes
from flash_attn_ext.cli._report import Table, number, times
from flash_attn_ext.cli._timing import REFUSALS, failure, make_timer, measure

Shape = tuple[int, int, int]
Attention = Callable[..., Tensor]

IMPLEMENTATIONS: dict[str, Attention] = {"naive": naive_attention, "v1": flash_attention_v1, "v2": flash_attention_v2}
SECTIONS = ("agreement", "time", "memory", "block-sizes")

AGREEMENT_SHAPES: tuple[Shape, ...] = ((1, 32, 16), (2, 64, 32), (4, 128, 64))
RTOL, ATOL = 1e-5, 1e-5

# What the original project printed, by shape: speed as a multiple of naive's.
ORIGINAL_SPEED: dict[Shape, dict[str, float]] = {
    (1, 256, 64): {"v1": 1.16, "v2": 1.12},
    (2, 512, 64): {"v1": 1.05, "v2": 1.69},
    (4, 1024, 64): {"v1": 0.23, "v2": 1.87},
}
# ... and MB of memory. Its figures are of 2^20 bytes: 0.5 is the output of (2, 1024, 64) alone.
ORIGINAL_MEMORY: dict[Shape, dict[str, float]] = {
    (1, 512, 64): {"naive": 2.12, "flash": 0.12},
    (2, 1024, 64): {"naive": 16.5, "flash": 0.5},
}
WARMUP_CALLS, TIMED_CALLS, GRAPH_CALLS = 10, 100, 20
BLOCKS = (32, 64, 96, 128)
MIB = 2**20


def make_inputs(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random normal q, k, v of one shape."""
    generator = torch.Generator(device).manual_seed(shape[1])
    q, k, v = (torch.randn(shape, generator=generator, device=device) for _ in range(3))
    return q, k, v


def agreement(device: torch.device) -> tuple[Table, list[dict[str, Any]], bool]:
    """Versions 1 and 2 against naive: largest difference, and `torch.allclose`."""
    title = f"agreement with naive, float32 (allclose: rtol {RTOL:g}, atol {ATOL:g})"
    table = Table(title, ["(B, S, D)", "v1 max |difference|", "v1 allclose", "v2 max |difference|", "v2 allclose"])
    rows, sound = [], True
    for shape in AGREEMENT_SHAPES:
        inputs = make_inputs(shape, device)
        reference, cells = naive_attention(*inputs), []
        for name in ("v1", "v2"):
            out = IMPLEMENTATIONS[name](*inputs)
            difference = (out - reference).abs().max().item()
            close = torch.allclose(out, reference, rtol=RTOL, atol=ATOL)
            sound = sound and close
            cells += [f"{difference:.2e}", "yes" if close else "NO"]
            rows.append({"shape": shape, "impl": name, "max_abs_difference": difference, "allclose": close})
        table.add(str(shape), *cells)
    return table, rows, sound


def by_the_original_protocol(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds a call: 10 calls to warm up, then the clock around 100 calls and one synchronisation."""
    for _ in range(WARMUP_CALLS):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(TIMED_CALLS):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3 / TIMED_CALLS


def from_a_graph(calls: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Milliseconds a call out of the replay of a CUDA graph of GRAPH_CALLS calls; medians, replays in turn."""
    replays: dict[str, Callable[[], object]] = {}
    for name, call in calls.items():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(GRAPH_CALLS):
                call()
        replays[name] = graph.replay
    return {name: m.ms / GRAPH_CALLS for name, m in measure(replays, SingleCallTimer(device), rounds).items()}


class SingleCallTimer:
    """Samples of one call: events and a flushed L2 on CUDA, the wall clock around a single call on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._timer = make_timer(device)

    def calls_for(self, call: Callable[[], object]) -> int:
        for _ in range(WARMUP_CALLS):
            call()
        return 1

    def sample(self, call: Callable[[], object], calls: int) -> Any:
        return self._timer.sample(call, 1)


def time_table(device: torch.device, rounds: int) -> tuple[Table, list[dict[str, Any]]]:
    """naive, v1 and v2 by the original's protocol, by the median of single calls in turn, and from a CUDA graph."""
    kind = "CUDA events, L2 flushed" if device.type == "cuda" else "wall clock"
    columns = ["(B, S, D)", "protocol", "naive", "v1", "v2", "v1 over naive", "v2 over naive"]
    table = Table("time of one forward call, float32, ms; speed as a multiple of naive's", columns)
    rows = []
    for shape, original in ORIGINAL_SPEED.items():
        inputs = make_inputs(shape, device)
        calls = {name: (lambda f=f, inputs=inputs: f(*inputs)) for name, f in IMPLEMENTATIONS.items()}
        loop = {name: by_the_original_protocol(call, device) for name, call in calls.items()}
        single = {name: m.ms for name, m in measure(calls, SingleCallTimer(device), rounds).items()}
        protocols = {f"original's: {TIMED_CALLS} calls, one sync": loop, f"median of {rounds}": single}
        if device.type == "cuda":
            protocols[f"CUDA graph of {GRAPH_CALLS} calls"] = from_a_graph(calls, device, rounds)
        for protocol, ms in protocols.items():
            ratios = [times(ms["naive"] / ms[name]) for name in ("v1", "v2")]
            table.add(str(shape), protocol, *(number(ms[name], 4) for name in calls), *ratios)
            rows.append({"shape": shape, "protocol": protocol, "ms": ms})
        table.add(str(shape), "the original printed", "", "", "", *(times(original[name]) for name in ("v1", "v2")))
    table.notes += [
        f"original's: {WARMUP_CALLS} calls to warm up, the clock around {TIMED_CALLS}, one by one",
        f"median: single calls ({kind}), the three in turn, order rotated",
        "the original's figures come from another machine and its own naive",
    ]
    if device.type == "cuda":
        table.notes.append(
            f"CUDA graph: {GRAPH_CALLS} calls in one, its replay over {GRAPH_CALLS}; a replay of one call takes as "
            "long as the processor needs to start it"
        )
    return table, rows


def memory_table(device: torch.device) -> tuple[Table, list[dict[str, Any]]]:
    """Peak memory of one forward call above what stood before it."""
    columns = ["(B, S, D)", "implementation", "peak", "output", "lse", "workspace and the rest", "original's peak"]
    table = Table("memory of one forward call, MiB, measured", columns)
    rows = []
    for shape, original in ORIGINAL_MEMORY.items():
        inputs = make_inputs(shape, device)
        for name, attention in (("naive", naive_attention), ("flash", flash_attention_v2)):
            peak_bytes(lambda f=attention, x=inputs: f(*x), device)  # what is allocated once, on first use, is not it
            kept: list[Tensor] = []
            peak = peak_bytes(lambda f=attention, x=inputs, kept=kept: kept.append(f(*x)), device)
            output = kept[0].numel() * kept[0].element_size()
            lse = 4 * shape[0] * shape[1] if name == "flash" else 0
            rest = peak - output - lse
            figures = [number(size / MIB, 4) for size in (peak, output, lse, rest)]
            table.add(str(shape), name, *figures, f"{original[name]:g}")
            sizes = {"peak_bytes": peak, "output_bytes": output, "lse_bytes": lse, "rest_bytes": rest}
            rows.append({"shape": shape, "impl": name, **sizes, "original_mb": original[name]})
    how = (
        "the caching allocator's peak over the call (it hands out multiples of 512 bytes)"
        if device.type == "cuda"
        else "the highest point of the running sum of allocations and releases that PyTorch's profiler recorded"
    )
    table.notes += [
        f"peak: {how}, minus what stood before. All that the call allocates, its output included; q, k, v stood before",
        "output and lse are sizes of tensors; the rest is the difference: S x S matrices for naive, the kernel's "
        "workspace for flash",
        "the original's figures are its output plus, for naive, two S x S matrices, in units of 2^20 bytes",
    ]
    return table, rows


def block_size_table(device: torch.device, shape: Shape, rounds: int) -> tuple[Table, list[dict[str, Any]]]:
    """Time of versions 1 and 2 for each block size, all of one version in turn."""
    table = Table(f"block sizes at {shape}, float32, ms", ["version", "rows"] + [f"{n} columns" for n in BLOCKS])
    rows, inputs = [], make_inputs(shape, device)
    for name in ("v1", "v2"):
        attention = IMPLEMENTATIONS[name]
        sizes: list[tuple[int, int] | None] = [None, *((m, n) for m in BLOCKS for n in BLOCKS)]
        calls = {str(size): (lambda f=attention, b=size: f(*inputs, block_size=b)) for size in sizes}
        found = measure(calls, make_timer(device, 0.01), rounds)
        cells = {}
        for size in sizes:
            m = found[str(size)]
            ms = None if m.error is not None else m.ms
            cells[size] = "refused" if ms is None else number(ms, 4)
            rows.append({"impl": name, "block_size": size, "ms": ms, "reason": m.error})
        for block_rows in BLOCKS:
            table.add(name, str(block_rows), *(cells[block_rows, n] for n in BLOCKS))
        table.notes.append(f"{name} without block_size: {cells[None]}")
        reasons = {m.error: size for size, m in found.items() if m.error is not None}
        table.notes += [f"{name} {size} refused: {reason}" for reason, size in reasons.items()]
    return table, rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables.

    Returns
    -------
    int
        0; 1 where an implementation refused or disagreed with naive; 2 where the device is not there.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="one section; may be repeated")
    parser.add_argument("--block-sizes", action="store_true", help="also time every block size of v1 and v2")
    parser.add_argument("--block-shape", default="4,1024,64", metavar="B,S,D", help="shape of that (default 4,1024,64)")
    parser.add_argument("--rounds", type=int, default=50, help="single calls of which the median is taken (default 50)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--markdown", action="store_true", help="print markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    args = parser.parse_args(arguments)
    parts = args.block_shape.split(",")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        parser.error(f"--block-shape {args.block_shape!r}: write B,S,D, for example 4,1024,64")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    sections = args.only or [s for s in SECTIONS if s != "block-sizes" or args.block_sizes]
    tables: list[Table] = []
    results: dict[str, Any] = {}
    sound = True
    try:
        if "agreement" in sections:
            table, results["agreement"], sound = agreement(device)
            tables.append(table)
        if "time" in sections:
            table, results["time"] = time_table(device, args.rounds)
            tables.append(table)
        if "memory" in sections:
            table, results["memory"] = memory_table(device)
            tables.append(table)
        if "block-sizes" in sections:
            batch, length, head_dim = map(int, parts)
            table, results["block_sizes"] = block_size_table(
                device, (batch, length, head_dim), max(7, args.rounds // 5)
            )
            tables.append(table)
    except REFUSALS as error:
        print(f"origin_tables: {failure(error)}", file=sys.stderr)
        sound = False
    for table in tables:
        if args.markdown:
            print(table.markdown())
        else:
            table.print()
    if args.json:
        command = f"python benchmarks/origin_tables.py --device {args.device} --rounds {args.rounds}"
        command += " --block-sizes" if args.block_sizes else ""
        results = {"provenance": _record.provenance(device, command, ["fp32"]), **results}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if not sound:
        print("origin_tables: v1 or v2 refused, or does not agree with naive_attention", file=sys.stderr)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
