"""Version 1's memory traffic by Nsight Compute beside the formula of docs/kernels/sm80.md, for each block size.

    python benchmarks/v1_traffic.py [--shape B,H,S,D] [--blocks 64x128,64x32] [--json FILE]

Needs a GPU, `ncu`, and the right to read hardware counters. The profiled calls run in a process of their own; times
come from this one, without a profiler: CUDA events, the L2 overwritten before each call.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flash_attn_ext import flash_attention_v1
from flash_attn_ext.cli import _record
from flash_attn_ext.cli._report import Table, number
from flash_attn_ext.cli._timing import make_timer, measure

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BLOCKS = "32x32,64x32,128x32,32x64,64x64,128x64,32x128,64x128,128x128"
SECTOR_BYTES = 32
METRICS = {  # by the names of the columns they become
    "l2_read": "lts__t_sectors_srcunit_tex_op_read.sum",
    "l2_write": "lts__t_sectors_srcunit_tex_op_write.sum",
    "dram_read": "dram__bytes_read.sum",
    "dram_write": "dram__bytes_write.sum",
    "grid": "launch__grid_size",
}


@dataclass(frozen=True)
class Problem:
    """B, H, S, D of a full (unmasked) forward, queries and keys alike."""

    batch: int
    heads: int
    seqlen: int
    head_dim: int
    dtype: str = "fp32"

    def inputs(self) -> list[torch.Tensor]:
        """Random normal q, k, v."""
        shape = (self.batch, self.heads, self.seqlen, self.head_dim)
        return [torch.randn(shape, device="cuda").to(DTYPES[self.dtype]) for _ in range(3)]

    def formula(self, tile_n: int, groups: int) -> tuple[int, int]:
        """Bytes that Algorithm 1 reads and writes, row groups counted; the state (O, m, l) is fp32.

        Once: O, m and l are set (line 2), lse is written (line 16), and where the output is not fp32, O is converted.
        Each block of keys, T_c of them: every row of Q, O, m and l is read, O, m and l are written (lines 8 to 13).
        Each group of rows: K and V are read once (line 6).
        """
        n, d, element = self.seqlen, self.head_dim, DTYPES[self.dtype].itemsize
        state, blocks = 4 * n * d + 8 * n, -(-n // tile_n)
        read = blocks * (n * d * element + state) + groups * 2 * n * d * element + 8 * n
        write = state + blocks * state + 4 * n
        if element != 4:
            read, write = read + 4 * n * d, write + n * d * element
        return read * self.batch * self.heads, write * self.batch * self.heads


def parse_blocks(text: str) -> list[tuple[int, int]]:
    """``64x128,32x32`` as pairs of rows and keys."""
    pairs = [tuple(int(n) for n in item.split("x")) for item in text.split(",")]
    if any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
        raise ValueError(f"--blocks {text!r}: write ROWSxKEYS with commas between, for example 64x128,32x32")
    return [(m, n) for m, n in pairs]


def profiled(problem: Problem, blocks: Sequence[tuple[int, int]]) -> None:
    """What runs below ncu: one call of each block size between start and stop."""
    q, k, v = problem.inputs()
    for block in blocks:
        flash_attention_v1(q, k, v, block_size=block)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for block in blocks:
        flash_attention_v1(q, k, v, block_size=block)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def read_profile(text: str) -> list[dict[str, int]]:
    """The rows of ``ncu --csv --page raw --print-units base``, without what the program itself printed."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        raise RuntimeError("ncu printed no table:\n" + "\n".join(lines[-12:]))
    rows = list(csv.DictReader(io.StringIO("\n".join(lines[first:]))))[1:]  # the first has the units
    found = []
    for row in rows:
        values = {name: int(float(row[metric].replace(",", ""))) for name, metric in METRICS.items()}
        found.append({k: x * (SECTOR_BYTES if k.startswith("l2_") else 1) for k, x in values.items()})
    return found


def profile(problem: Problem, blocks: Sequence[tuple[int, int]], ncu: str) -> list[dict[str, int]]:
    """Counters of one call for each block size."""
    shape = f"{problem.batch},{problem.heads},{problem.seqlen},{problem.head_dim}"
    named = ",".join(f"{m}x{n}" for m, n in blocks)
    options = ["--profile-from-start", "off", "--clock-control", "none", "-k", "regex:forward_v1_kernel"]
    options += ["--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(METRICS.values())]
    child = [sys.executable, __file__, "--profiled", "--shape", shape, "--blocks", named, "--dtype", problem.dtype]
    done = subprocess.run([ncu, *options, *child], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ncu ended with status {done.returncode}:\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
    found = read_profile(done.stdout)
    if len(found) != len(blocks):
        raise RuntimeError(f"ncu saw {len(found)} kernels, {len(blocks)} were launched")
    return found


def timed(problem: Problem, blocks: Sequence[tuple[int, int]], rounds: int) -> dict[tuple[int, int], float]:
    """Median milliseconds of a call for each block size, all in turn."""
    q, k, v = problem.inputs()
    calls = {f"{m}x{n}": (lambda block=(m, n): flash_attention_v1(q, k, v, block_size=block)) for m, n in blocks}
    found = measure(calls, make_timer(torch.device("cuda"), 0.01), rounds)
    return {(m, n): found[f"{m}x{n}"].ms for m, n in blocks}


def report(
    problem: Problem, blocks: Sequence[tuple[int, int]], counters: Sequence[Mapping[str, int]], ms: Mapping[Any, float]
) -> tuple[Table, list[dict[str, Any]]]:
    """The table, and its rows for the record."""
    at = f"B{problem.batch} H{problem.heads} S{problem.seqlen} D{problem.head_dim} {problem.dtype}"
    columns = ["rows x keys", "groups", "ms", "read", "formula", "written", "formula", "ratio", "HBM", "HBM / formula"]
    table, rows = Table(f"version 1, {at}: bytes between SMs and L2, and of HBM, GB", columns), []
    for block, counted in zip(blocks, counters, strict=True):
        groups = counted["grid"] // (problem.batch * problem.heads)
        read, write = problem.formula(block[1], groups)
        l2, dram = counted["l2_read"] + counted["l2_write"], counted["dram_read"] + counted["dram_write"]
        giga = [number(x / 1e9, 4) for x in (counted["l2_read"], read, counted["l2_write"], write)]
        ratio, of_dram = l2 / (read + write), dram / (read + write)
        name = f"{block[0]} x {block[1]}"
        table.add(
            name, str(groups), number(ms[block], 4), *giga, f"{ratio:.3f}", number(dram / 1e9, 4), f"{of_dram:.3f}"
        )
        formula = {"formula_read": read, "formula_write": write}
        rows.append({**vars(problem), "block_size": block, "groups": groups, "ms": ms[block], **formula, **counted})
    table.notes.append("ratio: bytes between SMs and L2 over the formula's; the formula counts row groups")
    return table, rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table.

    Returns
    -------
    int
        0; 1 where the profiler failed; 2 where there is no GPU or no profiler.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", metavar="B,H,S,D", help="may be repeated (default 1,16,4096,64)")
    parser.add_argument("--blocks", default=BLOCKS, help=f"rows x keys (default {BLOCKS})")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each block size (default 7)")
    parser.add_argument("--markdown", action="store_true", help="print markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--profiled", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    try:
        blocks = parse_blocks(args.blocks)
        shapes = [[int(n) for n in text.split(",")] for text in args.shape or ["1,16,4096,64"]]
        if any(len(shape) != 4 or min(shape) < 1 for shape in shapes):
            raise ValueError(f"--shape {args.shape}: write B,H,S,D with positive integers")
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device here")
    problems = [Problem(*shape, args.dtype) for shape in shapes]
    if args.profiled:
        profiled(problems[0], blocks)
        return 0
    ncu = shutil.which("ncu")
    if ncu is None:
        parser.error("no ncu (Nsight Compute) on the PATH")
    results: list[dict[str, Any]] = []
    for problem in problems:
        try:
            table, rows = report(problem, blocks, profile(problem, blocks, ncu), timed(problem, blocks, args.rounds))
        except RuntimeError as error:
            print(f"v1_traffic: {error}", file=sys.stderr)
            return 1
        print(table.markdown()) if args.markdown else table.print()
        results += rows
    if args.json:
        command = "python benchmarks/v1_traffic.py" + "".join(f" --shape {text}" for text in args.shape or [])
        command += f" --blocks {args.blocks} --dtype {args.dtype}"
        provenance = _record.provenance(torch.device("cuda"), command, [args.dtype])
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"provenance": provenance, "rows": results}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
