"""``python -m flash_attn_ext kernels``: what this binary can run, from the binary itself, as text, JSON or markdown.

The table of the README is made here: ``--write README.md`` puts it between two marker comments, ``--check README.md``
says whether it is still true. It leaves out what depends on the machine (the CPU's instruction set), and a binary
without CUDA checks the CPU's rows alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..interface import build_info, supported_kernels

BEGIN, END = "<!-- support-table:begin -->", "<!-- support-table:end -->"
_HEADER = ("device", "architecture", "algorithm", "pass", "dtypes", "head dimension", "features")
_PASSES = {"fwd": "forward", "bwd": "backward"}
_DEVICES = {"cpu": "CPU", "cuda": "CUDA"}


def table_rows(kernels: Iterable[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Rows of the table, without the header: kernels that differ in their dtype alone share one."""
    dtypes: dict[tuple[str, ...], list[str]] = {}
    for row in kernels:
        device = _DEVICES.get(row["device"], row["device"])
        arch = "any" if row["device"] == "cpu" else str(row["arch"])  # the CPU's is this machine's, not the build's
        limit = row["head_dim_max"]
        head_dim = "any" if limit is None else f"up to {limit}"
        pass_ = _PASSES.get(row["pass"], row["pass"])
        key = (device, arch, f"v{row['version']}", pass_, head_dim, ", ".join(row["features"]))
        known = dtypes.setdefault(key, [])
        if row["dtype"] not in known:
            known.append(row["dtype"])
    return [(*key[:4], ", ".join(names), *key[4:]) for key, names in dtypes.items()]


def markdown(kernels: Iterable[dict[str, Any]]) -> str:
    """The table in markdown, one line per row."""
    rows = [_HEADER, tuple("---" for _ in _HEADER), *table_rows(kernels)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plain(kernels: Iterable[dict[str, Any]]) -> str:
    """The table in aligned columns; the last one, which is long, is not padded."""
    rows = [_HEADER, *table_rows(kernels)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER) - 1)]
    return "\n".join("  ".join([*(f"{c:<{w}}" for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows)


def split_at_markers(text: str) -> tuple[str, str, str] | None:
    """``(before, block, after)`` of a file; the markers belong to before and after. None where they are missing."""
    start, end = text.find(BEGIN), text.find(END)
    if start < 0 or end < start or text.count(BEGIN) != 1 or text.count(END) != 1:
        return None
    start += len(BEGIN)
    return text[:start], text[start:end], text[end:]


def with_table(text: str) -> str | None:
    """``text`` with this binary's table between its markers; None where they are missing."""
    parts = split_at_markers(text)
    return None if parts is None else f"{parts[0]}\n{markdown(supported_kernels())}\n{parts[2]}"


def difference(text: str) -> list[str] | None:
    """Lines that the table in ``text`` lacks (``+``) or has too many (``-``); None where the markers are missing."""
    parts = split_at_markers(text)
    if parts is None:
        return None
    found = [line.strip() for line in parts[1].splitlines() if line.strip()]
    if not build_info()["cuda"]:
        found = [line for line in found if not line.startswith("| CUDA ")]
    wanted = markdown(supported_kernels()).splitlines()
    lines = [f"- {line}" for line in found if line not in wanted] + [
        f"+ {line}" for line in wanted if line not in found
    ]
    return lines or (["the rows stand in another order"] if found != wanted else [])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``kernels`` on a parser."""
    parser.description = (
        "What this binary can run, from the binary itself. Kernels that differ in their dtype alone share a row."
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print a markdown table")
    form.add_argument("--json", action="store_true", help="print supported_kernels() as it is, one entry per kernel")
    form.add_argument(
        "--write", type=Path, metavar="FILE", help=f"put the markdown table into FILE between {BEGIN} and {END}"
    )
    form.add_argument("--check", type=Path, metavar="FILE", help="exit 1 if the table in FILE is not this binary's")


def _no_markers(path: Path) -> int:
    print(f"{path}: there is no pair of lines {BEGIN} and {END}", file=sys.stderr)
    return 1


def run(args: argparse.Namespace) -> int:
    """Print, write or check the table. 1: the file is missing, has no markers, or holds another table."""
    kernels = supported_kernels()
    path = args.write or args.check
    if path is None:
        print(json.dumps(kernels, indent=2) if args.json else markdown(kernels) if args.markdown else plain(kernels))
        return 0
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        print(f"{path}: {error.strerror}", file=sys.stderr)
        return 1
    if args.write:
        new = with_table(text)
        if new is None:
            return _no_markers(path)
        if new != text:
            path.write_text(new, encoding="utf-8")
        print(f"{path}: {'written' if new != text else 'already up to date'}")
        return 0
    lines = difference(text)
    if lines is None:
        return _no_markers(path)
    if lines:
        print(f"{path}: the support table is not this binary's; run `python -m flash_attn_ext kernels --write {path}`")
        print("\n".join(lines))
        return 1
    print(f"{path}: up to date")
    return 0
