"""The tables of the README and of docs/kernels/ that show records of an H100, from the records themselves.

    python benchmarks/tables.py            prints them
    python benchmarks/tables.py --write    puts them where the pages have <!-- NAME:begin --> and <!-- NAME:end -->

tests/test_docs.py holds the pages against the records.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OURS, PEERS = "flash_attn_ext", ("cudnn", "fa2", "fa3", "fa4")
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
PEAK_TFLOPS_PER_MHZ = 0.5407  # 132 SMs, 4096 FLOP a clock each

Row = dict[str, Any]
Cell = dict[str, Row]  # one row for each implementation


def load(name: str) -> list[Row]:
    return json.loads((RESULTS / name).read_text())["rows"]


def cells(rows: Iterable[Row], *keys: str) -> dict[tuple, Cell]:
    found: dict[tuple, Cell] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), {})[row["impl"]] = row
    return found


def grid(direction: str) -> dict[tuple[int, bool, int], Cell]:
    """(head_dim, causal, seqlen): what each implementation made of it."""
    return cells(load(f"bench_h100_{direction}_cuda.json"), "head_dim", "causal", "seqlen_q")


def over(cell: Cell, *peers: str) -> float | None:
    """Our speed as a multiple of the fastest of the peers that are there."""
    times = [cell[peer]["ms"] for peer in peers if peer in cell]
    return min(times) / cell[OURS]["ms"] if times else None


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def lengths() -> list[str]:
    return [f"{n // 1024}k" if n >= 1024 else str(n) for n in LENGTHS]


def by_length(direction: str, text: Callable[[Cell], str], label: str = "") -> list[list[str]]:
    found = grid(direction)
    return [
        [f"{label}D{d} {'causal' if causal else 'full'}", *(text(found[d, causal, n]) for n in LENGTHS)]
        for d in (64, 128, 256)
        for causal in (False, True)
    ]


def h100() -> str:
    """TFLOP/s, over cuDNN, over the fastest of all peers of the run."""

    def text(cell: Cell) -> str:
        return f"{cell[OURS]['tflops']:.0f}, {over(cell, 'cudnn'):.2f}x, {over(cell, *PEERS):.2f}x"

    rows = [*by_length("fwd", text, "forward "), *by_length("bwd", text, "backward ")]
    return markdown(["sequence", *lengths()], rows)


def beyond() -> str:
    """TFLOP/s and the multiple of cuDNN's speed, which PyTorch gives no windows."""
    keys = ("head_dim", "seqlen_q", "batch", "heads", "heads_kv", "window")
    rows = load("bench_beyond_cuda.json")
    both = {direction: cells((r for r in rows if r["direction"] == direction), *keys) for direction in ("fwd", "bwd")}

    def text(cell: Cell) -> str:
        ratio = over(cell, "cudnn")
        return f"{cell[OURS]['tflops']:.0f}" + (f", {ratio:.2f}x" if ratio else "")

    def name(head_dim: int, n: int, batch: int, heads: int, heads_kv: int, window: int | None) -> str:
        grouped = f", {heads_kv} of keys" if heads_kv != heads else ""
        masked = f", window {window}" if window else ""
        return f"D{head_dim}, {n // 1024}k, batch {batch}, {heads} head{'s'[: heads > 1]}{grouped}{masked}"

    lines = [[name(*key), *(text(both[direction][key]) for direction in both)] for key in both["fwd"]]
    return markdown(["", "forward", "backward"], lines)


def detail(direction: str) -> str:
    """The grid with every peer, power and use of the tensor cores."""
    names = {"cudnn": "cuDNN", "fa2": "FA2", "fa3": "FA3", "fa4": "FA4", "deterministic": "deterministic"}

    def text(cell: Cell) -> str:
        ours = cell[OURS]
        ratios = [f"{names[peer]} {over(cell, peer):.3f}" for peer in names if peer in cell]
        use = ours["tflops"] / (PEAK_TFLOPS_PER_MHZ * ours["clock_mhz"])
        return f"{ours['tflops']:.0f}; {', '.join(ratios)}; {ours['power_w']:.0f} W, {100 * use:.0f} %"

    return markdown(["", *lengths()], by_length(direction, text))


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "h100": ("README.md", h100),
    "beyond": ("README.md", beyond),
    "grid-forward": ("docs/kernels/sm90-forward.md", lambda: detail("fwd")),
    "grid-backward": ("docs/kernels/sm90-backward.md", lambda: detail("bwd")),
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
