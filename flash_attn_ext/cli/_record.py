"""The record that a benchmark leaves: what was measured, of which sources, on which machine."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .. import __version__, build_info
from ._grids import DTYPES, FLOP_RULE, mask_name
from ._timing import Board, make_timer

PROVENANCE_FIELDS = (
    "commit",
    "csrc_sha256",
    "gpu",
    "driver",
    "cuda",
    "torch",
    "cudnn",
    "command",
    "date",
    "gemm_tflops",
)
CELL_FIELDS: dict[str, type] = {
    "case": str,
    "deterministic": bool,
    "dtype": str,
    "head_dim": int,
    "causal": bool,
    "batch": int,
    "heads": int,
    "heads_kv": int,
    "seqlen_q": int,
    "seqlen_k": int,
}
ROW_FIELDS: dict[str, type | tuple[type, ...]] = {
    **CELL_FIELDS,
    "impl": str,
    "direction": str,
    "ms": float,
    "tflops": float,
    "clock_mhz": (float, type(None)),
    "power_w": (float, type(None)),
}
REFUSED_FIELDS: dict[str, type] = {**CELL_FIELDS, "impl": str, "direction": str, "reason": str}

Row = Mapping[str, Any]


class RecordError(ValueError):
    """A file is no record of these benchmarks; the message says what is wrong with it."""


def problems(record: Any) -> list[str]:
    """What a record lacks; empty for a sound one."""
    if not isinstance(record, dict) or not isinstance(record.get("rows"), list):
        return ["it is not an object with a list `rows`"]
    provenance = record.get("provenance")
    if not isinstance(provenance, dict):
        return ["it has no object `provenance`"]
    found = [f"provenance lacks {name}" for name in PROVENANCE_FIELDS if name not in provenance]
    for key, fields in (("rows", ROW_FIELDS), ("refused", REFUSED_FIELDS)):
        for number, row in enumerate(record.get(key, [])):
            for name, kind in fields.items():
                if name not in row:
                    found.append(f"{key}[{number}] lacks {name}")
                elif not isinstance(row[name], kind) or (kind is not bool and isinstance(row[name], bool)):
                    found.append(f"{key}[{number}].{name} is {row[name]!r}")
            if row.get("direction") not in ("fwd", "bwd"):
                found.append(f"{key}[{number}].direction is {row.get('direction')!r}")
    return found


def load(path: str | Path) -> dict[str, Any]:
    """Read a record.

    Raises
    ------
    RecordError
        The file cannot be read, or is no record.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RecordError(f"{path} is not JSON: {error}") from None
    if found := problems(record):
        raise RecordError(f"{path} is no benchmark record: {'; '.join(found[:3])}")
    return record


def save(record: Mapping[str, Any], path: str | Path) -> None:
    """Write a record, one row a line, so that two of them can be compared by eye."""
    lists = {key: value for key, value in record.items() if isinstance(value, list)}
    parts = [f"{json.dumps(key)}: {json.dumps(value, indent=1)}" for key, value in record.items() if key not in lists]
    for key, rows in lists.items():
        body = ",\n ".join(json.dumps(row) for row in rows)
        parts.append(f"{json.dumps(key)}: [{chr(10) + ' ' + body + chr(10) if body else ''}]")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")


def cell_key(row: Row) -> tuple:
    """What two rows share that measure the same problem."""
    return (row["direction"], row.get("window"), *(row[name] for name in CELL_FIELDS))  # old records know no window


def by_cell(rows: Iterable[Row]) -> dict[tuple, dict[str, Row]]:
    """Rows as cell -> implementation -> row, cells in the order of the file."""
    cells: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(cell_key(row), {})[row["impl"]] = row
    return cells


def describe(row: Row) -> str:
    """A cell in words."""
    heads = f"H{row['heads']}" if row["heads"] == row["heads_kv"] else f"H{row['heads']}:{row['heads_kv']}"
    same = row["seqlen_q"] == row["seqlen_k"]
    length = f"S{row['seqlen_q']}" if same else f"S{row['seqlen_q']}:{row['seqlen_k']}"
    name = "" if row["case"] == "grid" else f"{row['case']}: "
    mask = mask_name(row["causal"], row.get("window"))
    suffix = " det" if row["deterministic"] else ""
    return f"{name}B{row['batch']} {heads} {length} D{row['head_dim']} {mask} {row['dtype']} {row['direction']}{suffix}"


# ---- provenance ------------------------------------------------------------------------------------------------------


def source_tree() -> Path | None:
    """The checkout that the package was imported from, or None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "csrc").is_dir() and (root / "setup.py").is_file() else None


def _git(root: Path, *arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def csrc_sha256(root: Path) -> str:
    """The hash that ``setup.py`` writes into the build, of the sources as they lie in the tree now."""
    digest = hashlib.sha256()
    for path in sorted((root / "csrc").rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def cpu_model() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def gemm_tflops(device: torch.device, dtype: str, rounds: int = 5) -> float | None:
    """What a plain matrix product reaches here, a machine's yardstick: 8192 cubed on a GPU, 1024 cubed on a CPU."""
    n = 8192 if device.type == "cuda" else 1024
    try:
        a, b = (torch.randn(n, n, device=device, dtype=torch.float32).to(DTYPES[dtype]) for _ in range(2))
        timer = make_timer(device)
        calls = timer.calls_for(lambda: a @ b)
        return 2 * n**3 / median(timer.sample(lambda: a @ b, calls).ms for _ in range(rounds)) / 1e9
    except RuntimeError:
        return None


def provenance(device: torch.device, command: str, dtypes: Sequence[str]) -> dict[str, Any]:
    """Who measured what: sources, machine, versions and time. Takes a second, for the matrix product.

    Parameters
    ----------
    device : torch.device
        What was measured.
    command : str
        How to run it again.
    dtypes : sequence of str
        Dtypes whose matrix product is timed; the first gives ``gemm_tflops``.
    """
    root, build, cuda = source_tree(), build_info(), device.type == "cuda"
    tree = {
        "commit": _git(root, "rev-parse", "HEAD") if root else None,
        "csrc_sha256": build.get("csrc_sha256"),
        "csrc_sha256_tree": csrc_sha256(root) if root else None,
        "csrc_git_tree": _git(root, "rev-parse", "HEAD:csrc") if root else None,
        "uncommitted": None,
    }
    if root and (status := _git(root, "status", "--porcelain", "--", "csrc", "flash_attn_ext", "setup.py")) is not None:
        tree["uncommitted"] = bool(status)
    gemm = {dtype: gemm_tflops(device, dtype) for dtype in dict.fromkeys(dtypes)}
    return {
        **tree,
        "version": __version__,
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "driver": Board(device).driver() if cuda else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "cpu": cpu_model(),
        "cpu_isa": build.get("cpu_isa"),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gemm_tflops": next(iter(gemm.values()), None),
        "gemm_tflops_by_dtype": gemm,
        "flop_rule": FLOP_RULE,
    }


def stale(record_provenance: Mapping[str, Any]) -> bool:
    """Whether the binary that ran was built from other sources than the tree holds."""
    built, tree = record_provenance.get("csrc_sha256"), record_provenance.get("csrc_sha256_tree")
    return built is not None and tree is not None and built != tree
