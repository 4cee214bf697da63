"""Hold a record against targets: each cell's ratio to cuDNN in the same run, and to the fastest peer.

    python benchmarks/compare.py RECORD.json [TARGETS.json]

Targets say how much faster than cuDNN the fastest peer was on the machine where all of them were installed
(`fastest_over_cudnn`). Times this run's cuDNN, that is the bar here, whatever this machine's clock does. Without
targets, or without cuDNN in the run, cells are compared with the peers of the run alone (`sdpa` on a CPU).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash_attn_ext.cli import _record
from flash_attn_ext.cli._peers import OURS
from flash_attn_ext.cli._report import Table, number, times

REFERENCES = ("cudnn", "sdpa")
OUR_OWN = (OURS, "deterministic", "v1")  # no peers


@dataclass
class Verdict:
    """One cell held against its bars. Speeds are TFLOP/s of the record; a bar that is not known is None.

    Attributes
    ----------
    label : str
        The cell in words.
    ours : float or None
        Our speed; None where we refused the cell.
    reference : float or None
        cuDNN's or SDPA's in this run.
    bar : float or None
        Of the fastest peer: the targets' multiple of cuDNN times this run's cuDNN, or a peer of this run that is
        faster still.
    holder : str
        Who holds the bar.
    """

    label: str
    ours: float | None
    reference: float | None
    bar: float | None
    holder: str = "-"

    @property
    def over_reference(self) -> float | None:
        return None if self.ours is None or not self.reference else self.ours / self.reference

    @property
    def over_bar(self) -> float | None:
        return None if self.ours is None or not self.bar else self.ours / self.bar


def read_targets(path: Path) -> list[dict[str, Any]]:
    """Rows of a targets file that lie on a regular grid.

    Raises
    ------
    _record.RecordError
        The file cannot be read or has no such rows.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except OSError as error:
        raise _record.RecordError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise _record.RecordError(f"{path} is no targets file: it has no list `rows`") from None
    needed = {"head_dim", "direction", "causal", "seqlen", "batch", "heads", "dtype", "fastest_over_cudnn"}
    regular = [row for row in rows if needed <= set(row)]
    if not regular:
        raise _record.RecordError(f"{path} has no row with {', '.join(sorted(needed))}")
    return regular


def _target_key(row: Mapping[str, Any]) -> tuple:
    return tuple(row[name] for name in ("direction", "dtype", "head_dim", "causal", "batch", "heads", "seqlen"))


def _row_key(row: Mapping[str, Any]) -> tuple | None:
    """Key of a record's row among the targets; None for what no target describes."""
    regular = row["heads"] == row["heads_kv"] and row["seqlen_q"] == row["seqlen_k"] and row["case"] == "grid"
    if not regular or row["deterministic"]:
        return None
    return _target_key({**row, "seqlen": row["seqlen_q"]})


def judge(record: Mapping[str, Any], targets: Sequence[Mapping[str, Any]]) -> tuple[list[Verdict], int]:
    """Hold every cell of a record against its bars.

    Returns
    -------
    verdicts : list of Verdict
        In the order of the record, cells that we refused included.
    unmeasured : int
        Targets that the record has no cell for.
    """
    wanted = {_target_key(row): row for row in targets}
    our_refusals = [row for row in record.get("refused", []) if row["impl"] == OURS]
    seen, verdicts = set(), []
    for rows in _record.by_cell([*record["rows"], *our_refusals]).values():
        ours = rows.get(OURS)
        if ours is None:
            continue  # peers alone
        key = _row_key(ours)
        target = wanted.get(key) if key is not None else None
        seen.add(key)
        speeds = {name: row["tflops"] for name, row in rows.items() if name not in OUR_OWN}
        reference = next((speeds[name] for name in REFERENCES if name in speeds), None)
        bars = dict(speeds)
        if target is not None and "cudnn" in speeds:
            expected = target["fastest_over_cudnn"] * speeds["cudnn"]
            holder = str(target.get("fastest", "fastest"))
            bars[holder] = max(expected, bars.get(holder, 0.0))
        holder = max(bars, key=lambda name: bars[name]) if bars else "-"
        verdicts.append(Verdict(_record.describe(ours), ours.get("tflops"), reference, bars.get(holder), holder))
    return verdicts, len(set(wanted) - seen)


def counts(verdicts: Sequence[Verdict], unmeasured: int) -> list[str]:
    """The summary below the table."""
    lines = []
    for name, ratios in (
        ("cuDNN or SDPA of this run", [v.over_reference for v in verdicts]),
        ("the fastest peer", [v.over_bar for v in verdicts]),
    ):
        known = [r for r in ratios if r is not None]
        refused = sum(v.ours is None for v in verdicts)
        text = f"{sum(r >= 1.0 for r in known)} of {len(ratios)} cells at least as fast as {name}"
        if known:
            text += f", least {min(known):.3f}x"
        if refused:
            text += f"; {refused} refused by us"
        if len(known) + refused < len(ratios):
            text += f"; {len(ratios) - len(known) - refused} without that figure"
        lines.append(text)
    if unmeasured:
        lines.append(f"{unmeasured} targets are not in the record")
    return lines


def table(verdicts: Sequence[Verdict], unmeasured: int, name: str) -> Table:
    """The verdicts as a table."""
    unit = 1e3 if all((v.ours or 0) < 10 for v in verdicts) else 1.0
    result = Table(
        f"{name}, {'GFLOP/s' if unit > 1 else 'TFLOP/s'}",
        ["cell", "ours", "cuDNN/SDPA", "ratio", "fastest", "by", "ratio", ""],
    )
    for v in verdicts:
        ours, reference, bar = (None if x is None else x * unit for x in (v.ours, v.reference, v.bar))
        mark = "refused" if v.ours is None else "" if v.over_bar is None or v.over_bar >= 1.0 else "below"
        figures = (number(reference, 4), times(v.over_reference), number(bar, 4), v.holder, times(v.over_bar), mark)
        result.add(v.label, number(ours, 4), *figures)
    result.notes += counts(verdicts, unmeasured)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table.

    Returns
    -------
    int
        0, or 2 for files that cannot be used; 1 with ``--strict`` where a cell is below its bar.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("targets", type=Path, nargs="?")
    parser.add_argument(
        "--strict", action="store_true", help="exit 1 where a cell is refused or below the fastest peer"
    )
    parser.add_argument("--markdown", action="store_true", help="print markdown")
    args = parser.parse_args(arguments)
    try:
        record = _record.load(args.record)
        targets = read_targets(args.targets) if args.targets else []
    except _record.RecordError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    verdicts, unmeasured = judge(record, targets)
    result = table(verdicts, unmeasured, args.record.name)
    if args.markdown:
        print(result.markdown())
    else:
        result.print()
    return int(args.strict and any(v.ours is None or (v.over_bar or 0.0) < 1.0 for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
