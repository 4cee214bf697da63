"""The tables of the README and of docs/kernels/ that show records of an H100, from the records themselves.

    python benchmarks/tables.py            prints them
    python benchmarks/tables.py --write    puts them where the pages have <!-- NAME:begin --> and <!-- NAME:end -->

tests/test_docs.py holds the pages against the records.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from flash_attn_ext.cli import _record
from flash_attn_ext.cli._peers import OURS
from flash_attn_ext.cli._record import Row
from flash_attn_ext.cli._report import Table, times
from flash_attn_ext.cli.bench import TENSOR_FLOP_PER_CLOCK_AND_SM

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PEERS = ("cudnn", "fa2", "fa3", "fa4")
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
SMS = 132  # of the H100 that the records name

Cell = dict[str, Row]  # one row for each implementation


def cells(name: str) -> list[Cell]:
    return list(_record.by_cell(_record.load(RESULTS / name)["rows"]).values())


def figures(name: str, part: str = "rows") -> list[dict[str, Any]]:
    """Of a record that is not the benchmark's."""
    return json.loads((RESULTS / name).read_text())[part]


Grid = dict[tuple[int, bool, int], Cell]


def grid_of(name: str) -> Grid:
    """(head_dim, causal, seqlen): what each implementation made of it."""
    keys = ("head_dim", "causal", "seqlen_q")
    return {tuple(cell[OURS][key] for key in keys): cell for cell in cells(name)}


def grid(direction: str) -> Grid:
    return grid_of(f"bench_h100_{direction}_cuda.json")


def over(cell: Cell, *peers: str) -> float | None:
    """Our speed as a multiple of the fastest of the peers that are there."""
    times = [cell[peer]["ms"] for peer in peers if peer in cell]
    return min(times) / cell[OURS]["ms"] if times else None


def markdown(columns: Sequence[str], rows: Iterable[list[str]]) -> str:
    """Without a title: the pages have their own words."""
    return "\n".join(Table("", columns, list(rows)).markdown().splitlines()[2:])


def length(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 else str(n)


def digits(x: float, n: int) -> str:
    """n significant ones."""
    return f"{x:#.{n}g}".rstrip(".")


def by_length(found: Grid, text: Callable[[Cell], str], label: str = "") -> list[list[str]]:
    return [
        [f"{label}D{d} {'causal' if causal else 'full'}", *(text(found[d, causal, n]) for n in LENGTHS)]
        for d in (64, 128, 256)
        for causal in (False, True)
    ]


def h100() -> str:
    """TFLOP/s, over cuDNN, over the fastest of all peers of the run."""

    def text(cell: Cell) -> str:
        return f"{cell[OURS]['tflops']:.0f}, {times(over(cell, 'cudnn'))}, {times(over(cell, *PEERS))}"

    rows = [*by_length(grid("fwd"), text, "forward "), *by_length(grid("bwd"), text, "backward ")]
    return markdown(["sequence", *map(length, LENGTHS)], rows)


def summary() -> str:
    """Geometric mean of the multiples of a peer's speed over all cells, least and most, cells at 1 or above."""
    names = {"cudnn": "cuDNN", "fa2": "FlashAttention-2", "fa3": "FlashAttention-3", "fa4": "FlashAttention-4"}
    grids = {
        "forward": grid("fwd"),
        "backward": grid("bwd"),
        "backward, deterministic": grid_of("bench_h100_deterministic_cuda.json"),
    }

    def text(found: Grid, peer: str) -> str:
        ratios = [ratio for cell in found.values() if (ratio := over(cell, peer)) is not None]
        if not ratios:
            return ""
        at_least = sum(ratio >= 1 for ratio in ratios)
        spread = f"{min(ratios):.3f} to {max(ratios):.2f}"
        return f"{statistics.geometric_mean(ratios):.2f} ({spread}), {at_least} of {len(ratios)}"

    lines = [[name, *(text(found, peer) for peer in names)] for name, found in grids.items()]
    return markdown(["", *names.values()], lines)


def by_shape(record: str, *peers: str) -> str:
    """TFLOP/s and the multiples of the peers' speed; PyTorch gives cuDNN no windows."""
    keys = ("head_dim", "seqlen_q", "batch", "heads", "heads_kv", "window")
    rows: dict[tuple, dict[str, str]] = {}
    for cell in cells(record):
        ours, ratios = cell[OURS], [over(cell, peer) for peer in peers]
        text = ", ".join([f"{ours['tflops']:.0f}", *(times(ratio) for ratio in ratios if ratio)])
        rows.setdefault(tuple(ours[key] for key in keys), {})[ours["direction"]] = text

    def name(head_dim: int, n: int, batch: int, heads: int, heads_kv: int, window: int | None) -> str:
        grouped = f", {heads_kv} of keys" if heads_kv != heads else ""
        masked = f", window {window}" if window else ""
        return f"D{head_dim}, {length(n)}, batch {batch}, {heads} head{'s'[: heads > 1]}{grouped}{masked}"

    lines = [[name(*key), text["fwd"], text["bwd"]] for key, text in rows.items()]
    return markdown(["", "forward", "backward"], lines)


def decode() -> str:
    """Microseconds a call, bytes of K and V over them, and the multiples of the peers' speed."""
    lines = []
    for cell in cells("bench_decode_cuda.json"):
        ours = cell[OURS]
        elements = 2 * ours["batch"] * ours["heads_kv"] * ours["seqlen_k"] * ours["head_dim"]
        name = (
            f"batch {ours['batch']}, {length(ours['seqlen_k'])} keys, {ours['heads']} heads, {ours['heads_kv']} of keys"
        )
        ratios = (times(over(cell, peer)) for peer in ("cudnn", "fa2"))
        lines.append([name, f"{ours['ms'] * 1e3:.1f}", f"{2 * elements / ours['ms'] / 1e9:.2f}", *ratios])
    return markdown(["", "us", "TB/s", "over cuDNN", "over FlashAttention-2"], lines)


def fp32() -> str:
    """TFLOP/s and the multiple of the speed of PyTorch's memory-efficient attention."""
    columns = [(direction, causal) for direction in ("fwd", "bwd") for causal in (False, True)]
    rows: dict[tuple[int, int], dict[tuple[str, bool], str]] = {}
    for cell in cells("bench_fp32_cuda.json"):
        ours = cell[OURS]
        text = f"{ours['tflops']:.0f}, {times(over(cell, 'efficient'))}"
        rows.setdefault((ours["head_dim"], ours["seqlen_q"]), {})[ours["direction"], ours["causal"]] = text
    lines = [[f"S {length(n)} D{d}", *(by[column] for column in columns)] for (d, n), by in rows.items()]
    return markdown(["", "forward full", "forward causal", "backward full", "backward causal"], lines)


def sm80() -> str:
    """TFLOP/s and the multiple of FlashAttention-2's speed."""
    lines = []
    for direction, label in (("fwd", "forward "), ("bwd", "backward ")):
        found = grid_of(f"bench_sm80_{direction}_cuda.json")
        lines += by_length(found, lambda cell: f"{cell[OURS]['tflops']:.0f}, {times(over(cell, 'fa2'))}", label)
    return markdown(["sequence", *map(length, LENGTHS)], lines)


def deterministic() -> str:
    """TFLOP/s, and the multiple of FlashAttention-4's, which is deterministic as well."""
    found = grid_of("bench_h100_deterministic_cuda.json")
    return markdown(
        ["", *map(length, LENGTHS)],
        by_length(found, lambda cell: f"{cell[OURS]['tflops']:.0f}, {times(over(cell, 'fa4'))}"),
    )


def train_step() -> str:
    """Milliseconds a step."""
    names = {OURS: "ours", "deterministic": "deterministic", "cudnn": "cuDNN", "fa2": "FlashAttention-2"}
    ms: dict[tuple[int, str], dict[int, float]] = {}
    for row in figures("train_step_cuda.json"):
        ms.setdefault((row["head_dim"], row["impl"]), {})[row["seq_len"]] = row["ms"]
    seqlens = sorted({n for by_length in ms.values() for n in by_length})
    lines = [[f"D{d}, {names[impl]}", *(f"{by[n]:.0f}" for n in seqlens)] for (d, impl), by in ms.items()]
    return markdown(["", *map(length, seqlens)], lines)


def origin() -> str:
    """Microseconds a call, and how many times naive's speed; in a graph the GPU alone counts."""
    ms: dict[tuple[int, ...], dict[str, dict[str, float]]] = {}
    for row in figures("origin_tables_cuda.json", "time"):
        ms.setdefault(tuple(row["shape"]), {})[row["protocol"]] = row["ms"]

    def text(by: dict[str, float]) -> list[str]:
        us = ", ".join(digits(by[impl] * 1e3, 3) for impl in ("naive", "v1", "v2"))
        return [us, ", ".join(times(by["naive"] / by[impl]) for impl in ("v1", "v2"))]

    protocols = ("original's: 100 calls, one sync", "CUDA graph of 20 calls")
    lines = [[str(shape), *(x for protocol in protocols for x in text(by[protocol]))] for shape, by in ms.items()]
    ratio = "v1, v2 over naive"
    return markdown(
        ["(B, S, D)", "naive, v1, v2 as plain calls", ratio, "naive, v1, v2 in a graph", ratio],
        lines,
    )


def call_cost() -> str:
    """Microseconds; the samples spread, so the least stands beside the median."""
    wanted = (
        "flash_attention, no gradient wanted",
        "flash_attention, graph recorded",
        "operator below autograd",
        "backward alone, autograd.grad",
        "SDPA, no gradient wanted",
        "SDPA, graph recorded",
        "SDPA, backward alone, autograd.grad",
    )
    rows = {row["call"]: row for row in figures("call_cost_cuda.json")}
    lines = [[call, f"{rows[call]['us']:.1f}", f"{rows[call]['us_min']:.1f}"] for call in wanted]
    return markdown(["call", "us, median", "least"], lines)


def traffic(batch: int) -> str:
    """Version 1: milliseconds, and GB by the profiler beside the formula's."""
    rows = [row for row in figures("v1_traffic_cuda.json") if row["batch"] == batch]

    def gb(count: int) -> str:
        return digits(count / 1e9, 4)

    lines = []
    for row in rows:
        formula, hbm = row["formula_read"] + row["formula_write"], row["dram_read"] + row["dram_write"]
        lines.append(
            [
                "{} x {}".format(*row["block_size"]),
                digits(row["ms"], 4),
                f"{gb(row['l2_read'])}, {gb(row['formula_read'])}",
                f"{gb(row['l2_write'])}, {gb(row['formula_write'])}",
                f"{(row['l2_read'] + row['l2_write']) / formula:.3f}",
                gb(hbm),
                f"{hbm / formula:.3f}",
            ]
        )
    first = "B {batch}, H {heads}, S {seqlen}, D {head_dim}; G {groups}".format(**rows[0])
    columns = [first, "ms", "read, formula", "written, formula", "sum over formula", "HBM", "HBM over formula"]
    return markdown(columns, lines)


def detail(direction: str) -> str:
    """The grid with every peer, power and use of the tensor cores."""
    names = {"cudnn": "cuDNN", "fa2": "FA2", "fa3": "FA3", "fa4": "FA4", "deterministic": "deterministic"}

    def text(cell: Cell) -> str:
        ours = cell[OURS]
        ratios = [f"{names[peer]} {over(cell, peer):.3f}" for peer in names if peer in cell]
        use = ours["tflops"] / (SMS * TENSOR_FLOP_PER_CLOCK_AND_SM / 1e6 * ours["clock_mhz"])
        return f"{ours['tflops']:.0f}; {', '.join(ratios)}; {ours['power_w']:.0f} W, {100 * use:.0f} %"

    return markdown(["", *map(length, LENGTHS)], by_length(grid(direction), text))


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "h100": ("README.md", h100),
    "h100-summary": ("README.md", summary),
    "beyond": ("README.md", lambda: by_shape("bench_beyond_cuda.json", "cudnn")),
    "grouped": ("README.md", lambda: by_shape("bench_grouped_cuda.json", "cudnn", "fa2")),
    "decode": ("README.md", decode),
    "train-step": ("README.md", train_step),
    "fp32": ("README.md", fp32),
    "origin": ("README.md", origin),
    "call-cost-h100": ("README.md", call_cost),
    "sm80": ("docs/kernels/sm80.md", sm80),
    "v1-traffic-16": ("docs/kernels/sm80.md", lambda: traffic(16)),
    "v1-traffic-1": ("docs/kernels/sm80.md", lambda: traffic(1)),
    "grid-forward": ("docs/kernels/sm90-forward.md", lambda: detail("fwd")),
    "grid-backward": ("docs/kernels/sm90-backward.md", lambda: detail("bwd")),
    "grid-deterministic": ("docs/kernels/sm90-backward.md", deterministic),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into the pages")
    write = parser.parse_args().write
    for name, (page, table) in TABLES.items():
        if not write:
            print(f"{page}, {name}\n\n{table()}\n")
            continue
        path = ROOT / page
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        place = re.search(f"{begin}(.*?){end}", text := path.read_text(), flags=re.DOTALL)
        if place is None:
            raise SystemExit(f"{page} has no place for {name}")
        path.write_text(text[: place.start(1)] + table() + "\n" + text[place.end(1) :])


if __name__ == "__main__":
    main()
