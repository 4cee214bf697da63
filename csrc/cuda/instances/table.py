"""The only list of the CUDA kernels that are built.

    python csrc/cuda/instances/table.py            writes the .cu files and registry_rows.cpp beside it
    python csrc/cuda/instances/table.py --check    exit status 1 where they are not what it would write

A kernel is compiled for a named row of its architecture's config.h, once per dtype of the row's element size. The order
here is the order in which cuda/registry.cpp prefers rows of one head dimension: the first that the GPU has the shared
memory for (for several CTAs on an SM, where config.h says wants_company). Rows further down serve GPUs with less of it,
and calls that name their tile. What is written is committed, so that a build needs no step before it;
tests/test_architecture.py checks that they are fresh.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CUDA = HERE.parent
COLUMNS = 120
DTYPES = {2: (("__half", "fp16"), ("__nv_bfloat16", "bf16")), 4: (("float", "fp32"),)}  # by bytes of an element


@dataclass(frozen=True)
class Built:
    """A row of config.h by name. ``warps``: that many warps instead of the row's own (version 1 alone takes any)."""

    row: str
    warps: int | None = None
    for_short_problems: bool = False  # see KernelEntry of cuda/registry.h

    @property
    def name(self) -> str:
        return self.row if self.warps is None else f"{self.row}_w{self.warps}"


@dataclass(frozen=True)
class Kernel:
    """``NAME_entry<T, LOOKUP("row")>()`` of a header below csrc/cuda/."""

    arch: str
    name: str
    header: str
    lookup: str
    built: tuple[Built, ...]


BUILT = (
    Kernel(
        "sm90",
        "forward_v2",
        "launch_forward.cuh",
        "forward_row",
        tuple(Built(f"sm90_fwd_d{head_dim}") for head_dim in (64, 80, 96, 112, 128, 192, 256)),
    ),
    Kernel(
        "sm90",
        "backward_v2",
        "launch_backward.cuh",
        "backward_row",
        tuple(Built(f"sm90_bwd_d{head_dim}") for head_dim in (64, 80, 96, 112, 128)),
    ),
    Kernel(
        "sm90",
        "backward_split",
        "launch_backward.cuh",
        "dkv_row",
        tuple(Built(f"sm90_bwd_d{head_dim}") for head_dim in (192, 256)),
    ),
    Kernel(
        "sm80",
        "forward_v2",
        "launch_forward.cuh",
        "forward_row",
        (
            Built("sm80_fwd_d32"),
            Built("sm80_fwd_d64_n128"),
            Built("sm80_fwd_d64"),
            Built("sm80_fwd_d64_m16", for_short_problems=True),
            Built("sm80_fwd_d96"),
            Built("sm80_fwd_d128"),
            Built("sm80_fwd_d128_m16", for_short_problems=True),
            Built("sm80_fwd_d192"),
            Built("sm80_fwd_d256"),
            Built("sm80_fwd_d256_small"),
            Built("sm80_fwd_f32_d32"),
            Built("sm80_fwd_f32_d64"),
            Built("sm80_fwd_f32_d64_m16", for_short_problems=True),
            Built("sm80_fwd_f32_d128"),
            Built("sm80_fwd_f32_d256"),
            Built("sm80_fwd_f32_d256_small"),
        ),
    ),
    Kernel(
        "sm80",
        "forward_v1",
        "launch_forward_v1.cuh",
        "forward_v1_row",
        (
            *(Built("sm80_fwd_v1_d64_n128", warps) for warps in (None, 8, 2)),
            *(Built("sm80_fwd_v1_d64_n64", warps) for warps in (None, 8, 2)),
            *(Built("sm80_fwd_v1_d64_n32", warps) for warps in (None, 8, 2)),
            *(Built("sm80_fwd_v1_d128_n128", warps) for warps in (None, 2)),
            *(Built("sm80_fwd_v1_d128_n64", warps) for warps in (None, 8, 2)),
            *(Built("sm80_fwd_v1_d128_n32", warps) for warps in (None, 8, 2)),
            *(Built("sm80_fwd_v1_d256_n32", warps) for warps in (None, 8, 2)),
            *(Built("sm80_fwd_v1_f32_d64_n128", warps) for warps in (None, 8, 2)),
            *(Built("sm80_fwd_v1_f32_d64_n64", warps) for warps in (None, 8, 2)),
            *(Built("sm80_fwd_v1_f32_d64_n32", warps) for warps in (None, 8, 2)),
            *(Built("sm80_fwd_v1_f32_d128_n64", warps) for warps in (None, 2)),
            *(Built("sm80_fwd_v1_f32_d128_n32", warps) for warps in (None, 8, 2)),
            Built("sm80_fwd_v1_f32_d256_n32"),
        ),
    ),
    Kernel(
        "sm80",
        "backward_v2",
        "launch_backward.cuh",
        "backward_row",
        (
            Built("sm80_bwd_d32"),
            Built("sm80_bwd_d64"),
            Built("sm80_bwd_d96"),
            Built("sm80_bwd_d128_w8"),
            Built("sm80_bwd_d128_s1"),
            Built("sm80_bwd_d192_m128"),
            Built("sm80_bwd_d192_small"),
            Built("sm80_bwd_d256_m128"),
            Built("sm80_bwd_d256_s1"),
            Built("sm80_bwd_d256_small"),
            Built("sm80_bwd_f32_d32"),
            Built("sm80_bwd_f32_d64"),
            Built("sm80_bwd_f32_d128"),
            Built("sm80_bwd_f32_d128_s1"),
            Built("sm80_bwd_f32_d256_w8"),
            Built("sm80_bwd_f32_d256"),
        ),
    ),
)


@dataclass(frozen=True)
class Row:
    name: str
    element_bytes: int
    head_dim: int


def configured(arch: str) -> dict[str, Row]:
    """The rows of an architecture's config.h, by name: each begins ``{"name", element_bytes, head_dim,``."""
    text = (CUDA / arch / "config.h").read_text(encoding="utf-8")
    found = re.findall(r'\{\s*"(\w+)",\s*(\d+),\s*(\d+),', text)
    return {name: Row(name, int(element_bytes), int(head_dim)) for name, element_bytes, head_dim in found}


def one_line(line: str, *broken: str) -> list[str]:
    """As clang-format lays a function out: in one line where it fits."""
    return [line] if len(line) <= COLUMNS else list(broken)


def source(kernel: Kernel, built: list[Built], rows: dict[str, Row]) -> str:
    """One file: what is built of one kernel for a head dimension and an element size, for every dtype of that size."""
    lines = [
        "// Written by table.py: do not edit.",
        f'#include "../{kernel.arch}/{kernel.header}"',
        "",
        "namespace fae::cuda::rows {",
    ]
    for item in built:
        for type_, dtype in DTYPES[rows[item.row].element_bytes]:
            row = f'{kernel.arch}::{kernel.lookup}("{item.row}")'
            warps = "" if item.warps is None else f", {item.warps}"
            call = f"return {kernel.arch}::{kernel.name}_entry<{type_}, {row}{warps}>();"
            head = f"KernelEntry {item.name}_{dtype}() {{"
            lines += one_line(f"{head} {call} }}", head, f"  {call}", "}")
    return "\n".join([*lines, "}  // namespace fae::cuda::rows", ""])


def registry(entries: list[tuple[Built, str]]) -> str:
    def row(item: Built, dtype: str) -> str:
        short = ", true" if item.for_short_problems else ""
        return f'      row(rows::{item.name}_{dtype}(), "{item.name}"{short}),'

    lines = [
        "// Written by table.py: do not edit. All entries, in the order of preference.",
        '#include "../registry.h"',
        "",
        "namespace fae::cuda {",
        "",
        "namespace rows {",
        *(f"KernelEntry {item.name}_{dtype}();" for item, dtype in entries),
        "}  // namespace rows",
        "",
        "namespace {",
        "KernelEntry row(KernelEntry entry, const char* name, bool for_short_problems = false) {",
        "  entry.name = name;",
        "  entry.for_short_problems = for_short_problems;",
        "  return entry;",
        "}",
        "}  // namespace",
        "",
        "const KernelEntry* entries(int* count) {",
        "  static const KernelEntry kEntries[] = {",
        *(row(item, dtype) for item, dtype in entries),
        "  };",
        "  *count = static_cast<int>(sizeof(kEntries) / sizeof(kEntries[0]));",
        "  return kEntries;",
        "}",
        "",
        "}  // namespace fae::cuda",
        "",
    ]
    return "\n".join(lines)


def files() -> dict[str, str]:
    """Name and text of every file that is written."""
    texts: dict[str, str] = {}
    entries: list[tuple[Built, str]] = []
    for kernel in BUILT:
        rows = configured(kernel.arch)
        if unknown := [item.row for item in kernel.built if item.row not in rows]:
            sys.exit(f"table.py: {kernel.arch}/config.h has no row {', '.join(unknown)}")
        groups: dict[str, list[Built]] = {}
        for item in kernel.built:
            row = rows[item.row]
            bits = 8 * row.element_bytes
            groups.setdefault(f"{kernel.arch}_{kernel.name}_d{row.head_dim}_{bits}bit", []).append(item)
            entries += [(item, dtype) for _, dtype in DTYPES[row.element_bytes]]
        texts |= {f"{name}.cu": source(kernel, built, rows) for name, built in groups.items()}
    return texts | {"registry_rows.cpp": registry(entries)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a file is not fresh")
    check = parser.parse_args().check
    wanted = files()
    stale = []
    for name, text in wanted.items():
        path = HERE / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    for path in [*HERE.glob("*.cu"), *HERE.glob("*.cpp")]:
        if path.name not in wanted:
            stale.append(path.name)
            if not check:
                path.unlink()
    for name in sorted(stale):
        print(f"{name}: {'not what table.py writes' if check else 'written' if name in wanted else 'removed'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
