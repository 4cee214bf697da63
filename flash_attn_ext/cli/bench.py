"""``python -m flash_attn_ext bench``: this package and its peers, timed beside each other on a named grid.

Prints a table, and on request leaves a record in JSON, the table in markdown and a picture of the ratios. How to read
them, and why the protocol is what it is, stands in ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import _record, _report
from ._grids import DIRECTIONS, DTYPES, FLOP_RULE, GRIDS, Cell, grid_cells, make_cells, parse_shape
from ._outcome import Outcome, measure_cell
from ._peers import IMPLEMENTATIONS, OURS, default_peers
from ._timing import Measurement, make_timer

MIN_ROUNDS = 7
TENSOR_FLOP_PER_CLOCK_AND_SM = 4096  # bf16 and fp16, compute capability 9.0


class UsageError(ValueError):
    """Arguments that cannot be used together, or here."""


# ---- arguments -------------------------------------------------------------------------------------------------------


def _listed(allowed: Sequence[str]) -> Any:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in allowed]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(allowed)}, separated by commas")
        return list(dict.fromkeys(names))

    return parse


def _shape(text: str) -> tuple[int, int, int, int, int, int]:
    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``bench`` on a parser."""
    grids = "; ".join(f"{name}: {grid.about}" for name, grid in GRIDS.items())
    peers = "; ".join(f"{name}: {i.about}" for name, i in IMPLEMENTATIONS.items() if name != OURS)
    parser.description = (
        "Time flash_attention and its peers beside each other: several rounds, the order changed from round to round, "
        f"median and spread. FLOPs: {FLOP_RULE}."
    )
    what = parser.add_argument_group("what is timed")
    what.add_argument("--grid", choices=list(GRIDS), help=f"a named grid. {grids}")
    what.add_argument(
        "--shape",
        type=_shape,
        action="append",
        metavar="B,H,S,D",
        help="one problem instead of a grid; Hq:Hk and Sq:Sk where they differ; may be repeated",
    )
    what.add_argument("--case", default="grid", help="name of the --shape problems in the record (default: grid)")
    what.add_argument("--mask", choices=("full", "causal", "both"), help="default: both, or what the grid says")
    what.add_argument("--dtype", type=_listed(list(DTYPES)), metavar="LIST", help=f"of {', '.join(DTYPES)}")
    what.add_argument("--directions", type=_listed(DIRECTIONS), metavar="LIST", help="of fwd, bwd")
    what.add_argument("--deterministic", action="store_true", help="reproducible gradients, of everyone")
    what.add_argument(
        "--peers", type=_listed(["none", *(n for n in IMPLEMENTATIONS if n != OURS)]), metavar="LIST", help=peers
    )
    how = parser.add_argument_group("how")
    how.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    how.add_argument("--rounds", type=_positive, default=MIN_ROUNDS, help=f"at least {MIN_ROUNDS} for figures to quote")
    how.add_argument("--threads", type=_positive, help="CPU threads (default: PyTorch's)")
    how.add_argument("--sample-ms", type=_positive, help="least length of one sample (default: 50 on CPU, 30 on CUDA)")
    out = parser.add_argument_group("results")
    out.add_argument("--out", type=Path, metavar="DIR", help="write bench_NAME_DEVICE.json, .md and .png there")
    out.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    out.add_argument("--compare", type=Path, metavar="OLD.json", help="an older record: exit 1 if we became slower")
    out.add_argument("--threshold", type=float, default=0.95, help="slower: below this times the old speed")


def _command(args: argparse.Namespace) -> str:
    """The options that decide what is measured, as a command line. Where results went is nobody's business."""
    parts = ["python -m flash_attn_ext bench"]
    if args.grid:
        parts.append(f"--grid {args.grid}")
    for b, h, hk, s, sk, d in args.shape or ():
        parts.append(f"--shape {b},{h if h == hk else f'{h}:{hk}'},{s if s == sk else f'{s}:{sk}'},{d}")
    if args.case != "grid":
        parts.append(f"--case {shlex.quote(args.case)}")
    parts.append(f"--device {args.device}")
    for name in ("mask", "dtype", "directions", "peers", "threads", "sample_ms"):
        value = getattr(args, name)
        if value is not None:
            text = ",".join(value) if isinstance(value, list) else value
            parts.append(f"--{name.replace('_', '-')} {text}")
    if args.deterministic:
        parts.append("--deterministic")
    return " ".join([*parts, f"--rounds {args.rounds}"])


@contextmanager
def _settings(device: torch.device, threads: int | None, deterministic: bool) -> Iterator[None]:
    """Set PyTorch's global switches, and put them back."""
    old_threads, old_fill = torch.get_num_threads(), torch.utils.deterministic.fill_uninitialized_memory
    old_deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        if deterministic:
            torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.set_num_threads(old_threads)
        torch.utils.deterministic.fill_uninitialized_memory = old_fill
        torch.use_deterministic_algorithms(old_deterministic)


# ---- tables ----------------------------------------------------------------------------------------------------------


def tensor_use(tflops: float, clock_mhz: float | None, device: torch.device) -> float | None:
    """Share of the tensor cores' rate at the clock that was read: TFLOP/s / (0.5407 * MHz) on 132 SMs."""
    if clock_mhz is None or device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    per_mhz = torch.cuda.get_device_properties(device).multi_processor_count * TENSOR_FLOP_PER_CLOCK_AND_SM / 1e6
    return tflops / (per_mhz * clock_mhz)


def _time_text(m: Measurement) -> str:
    if m.error is not None or not m.samples:
        return "refused"
    text = _report.number(m.ms, 4)
    cpu = m.median_of("cpu_ms")
    return f"{text} / {_report.number(cpu, 4)}" if cpu is not None else text


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def result_table(outcomes: Sequence[Outcome], names: Sequence[str], device: torch.device, title: str) -> _report.Table:
    """One row a cell and direction, our time first, then each peer's with the ratio."""
    cpu = device.type == "cpu"
    unit = "GFLOP/s" if cpu else "TFLOP/s"
    peers = [name for name in names if name != OURS]
    columns = ["cell", "dtype", "pass", "ours ms / cpu ms" if cpu else "ours ms", "min .. max", unit]
    columns += [] if cpu else ["MHz", "W", "tensor use"]
    for peer in peers:
        columns += [f"{peer} ms", f"vs {peer}"]
    table = _report.Table(title, columns)
    for o in outcomes:
        m, seconds = o.measurements[OURS], o.seconds(OURS)
        rate = None if seconds is None else o.cell.flops(o.direction) / seconds / (1e9 if cpu else 1e12)
        row = [o.cell.label, o.cell.dtype, o.direction + (" det" if o.deterministic else ""), _time_text(m)]
        row.append("-" if seconds is None else f"{_report.number(m.low, 4)} .. {_report.number(m.high, 4)}")
        row.append(_report.number(rate))
        if not cpu:
            clock = None if seconds is None else m.median_of("clock_mhz")
            half = rate is not None and o.cell.dtype in ("bf16", "fp16")
            use = tensor_use(rate, clock, device) if half and rate is not None else None
            power = None if seconds is None else m.median_of("power_w")
            row += [_report.number(clock, 4), _report.number(power), "-" if use is None else f"{use:.0%}"]
        for peer in peers:
            of_cpu = f" ({times})" if (times := _report.times(o.cpu_ratio(peer))) != "-" else ""
            row += [_time_text(o.measurements[peer]), _report.times(o.ratio(peer)) + of_cpu]
        table.add(*row)
    table.notes += _notes(outcomes, peers, cpu)
    return table


def _notes(outcomes: Sequence[Outcome], peers: Sequence[str], cpu: bool) -> list[str]:
    notes = ["vs PEER: our speed as a multiple of the peer's, of medians; above 1 ours is faster"]
    if cpu:
        notes[0] += "; in brackets the same of the process's CPU time (all threads)"
    for direction in DIRECTIONS:
        for dtype in DTYPES:
            for peer in peers:
                cells = [o for o in outcomes if (o.direction, o.cell.dtype) == (direction, dtype)]
                ratios = [r for o in cells if (r := o.ratio(peer)) is not None]
                if ratios:
                    met = f"{sum(r >= 1 for r in ratios)} of {len(ratios)} cells at least as fast as {peer}"
                    spread = f"geometric mean {_mean(ratios):.2f}x, {min(ratios):.2f}x to {max(ratios):.2f}x"
                    notes.append(f"{direction} {dtype}: {met}; {spread}")
    reasons: dict[str, list[str]] = {}
    for o in outcomes:
        for name, m in o.measurements.items():
            if m.error is not None:
                reasons.setdefault(f"{name} refused: {m.error}", []).append(o.label)
    for reason, labels in reasons.items():
        notes.append(f"{reason} [{len(labels)}: {', '.join(labels[:4])}{', ...' if len(labels) > 4 else ''}]")
    notes += [f"WRONG: {o.label}: {text}" for o in outcomes for text in o.disagrees]
    return notes


def panels(outcomes: Sequence[Outcome], peers: Sequence[str]) -> list[_report.Panel]:
    """The picture's panels: one for each direction and dtype."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for o in outcomes:
        groups.setdefault((o.direction, o.cell.dtype), []).append(o)
    return [
        (
            {"fwd": "forward", "bwd": "backward"}[direction] + f", {dtype}",
            [o.cell.label for o in group],
            {peer: [o.ratio(peer) for o in group] for peer in peers},
        )
        for (direction, dtype), group in groups.items()
    ]


# ---- comparison with an older record ---------------------------------------------------------------------------------

_REFERENCES = ("cudnn", "sdpa", "fa2", "efficient", "naive")


def compare_records(new: Mapping[str, Any], old: Mapping[str, Any], threshold: float) -> tuple[_report.Table, int]:
    """Our speed now over our speed then, each taken relative to a peer of its own run.

    Machines drift; the ratio to a peer that ran at the same time does not. Where the two records share no peer in a
    cell, plain times are compared, and the row says so.

    Returns
    -------
    table : Table
        A row for each cell that both records have.
    slower : int
        Cells below `threshold`.
    """
    table = _report.Table("now against the older record", ["cell", "ms then", "ms now", "relative to", "speed", ""])
    then, slower = _record.by_cell(old["rows"]), 0
    for key, rows in _record.by_cell(new["rows"]).items():
        before = then.get(key, {})
        if OURS not in rows or OURS not in before:
            continue
        peer = next((name for name in _REFERENCES if name in rows and name in before), None)
        speed = before[OURS]["ms"] / rows[OURS]["ms"]
        if peer is not None:
            speed *= rows[peer]["ms"] / before[peer]["ms"]
        slower += speed < threshold
        table.add(
            _record.describe(rows[OURS]),
            _report.number(before[OURS]["ms"], 4),
            _report.number(rows[OURS]["ms"], 4),
            peer or "time",
            _report.times(speed),
            "SLOWER" if speed < threshold else "",
        )
    if not table.rows:
        table.notes.append("the two records have no cell in common")
    table.notes.append(f"{slower} of {len(table.rows)} cells below {threshold:g} of the old speed")
    return table, slower


# ---- the command -----------------------------------------------------------------------------------------------------


def _choose_peers(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Names of the peers to time, and a line for each usual one that is not installed."""
    grid = GRIDS[args.grid] if args.grid else None
    if args.peers is not None:
        names = [name for name in args.peers if name != "none"]
        for name in names:
            if args.device not in IMPLEMENTATIONS[name].devices:
                here = ", ".join(n for n, i in IMPLEMENTATIONS.items() if args.device in i.devices and n != OURS)
                raise UsageError(f"--peers {name}: does not run on {args.device}; there are {here}")
            if missing := IMPLEMENTATIONS[name].missing():
                raise UsageError(f"--peers {name}: {missing} is installed".replace("no module", "no module named"))
        return names, []
    usual = (grid.peers or {}).get(args.device) if grid else None
    names = list(usual or default_peers(args.device))
    absent = {name: why for name in names if (why := IMPLEMENTATIONS[name].missing())}
    return [name for name in names if name not in absent], [f"{name} left out: {why}" for name, why in absent.items()]


def _cells(args: argparse.Namespace) -> tuple[str, list[Cell], list[str]]:
    """Name of the run, its cells and directions."""
    causal = {None: None, "full": [False], "causal": [True], "both": [False, True]}[args.mask]
    if args.shape:
        if args.grid:
            raise UsageError("--grid and --shape exclude each other")
        dtypes = args.dtype or ["fp32" if args.device == "cpu" else "bf16"]
        cells = make_cells(args.shape, dtypes, causal or [False, True], args.case)
        return "shapes", cells, args.directions or ["fwd"]
    if not args.grid:
        raise UsageError(f"say what to time: --grid ({', '.join(GRIDS)}) or --shape B,H,S,D")
    grid = GRIDS[args.grid]
    return args.grid, grid_cells(grid, args.device, args.dtype, causal), args.directions or list(grid.directions)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark.

    Returns
    -------
    int
        0; 1 where a result was wrong or, with ``--compare``, slower; 2 for arguments that cannot be used.
    """
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: PyTorch sees no CUDA device here")
        if args.threshold <= 0.0:
            raise UsageError(f"--threshold {args.threshold:g} is not positive")
        name, cells, directions = _cells(args)
        peers, absent = _choose_peers(args)
        old = _record.load(args.compare) if args.compare else None
    except (UsageError, _record.RecordError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    with _settings(device, args.threads, args.deterministic):
        return _measure_and_report(args, device, name, cells, directions, peers, absent, old)


def _measure_and_report(
    args: argparse.Namespace,
    device: torch.device,
    name: str,
    cells: Sequence[Cell],
    directions: Sequence[str],
    peers: Sequence[str],
    absent: Sequence[str],
    old: Mapping[str, Any] | None,
) -> int:
    about = _record.provenance(device, _command(args), list(dict.fromkeys(cell.dtype for cell in cells)))
    about |= {"grid": name, "rounds": args.rounds, "protocol": _protocol(device, args.rounds), "left_out": list(absent)}
    lines = [
        f"{about['gpu'] or about['cpu']}, torch {about['torch']}, {about['threads']} CPU threads, "
        f"plain matrix product {_report.number(about['gemm_tflops'])} TFLOP/s",
        f"FLOPs: {FLOP_RULE}. {about['protocol']}",
        *absent,
    ]
    if args.rounds < MIN_ROUNDS:
        lines.append(f"{args.rounds} rounds are fewer than {MIN_ROUNDS}: not for quoting")
    if _record.stale(about):
        lines.append("the binary was built from other sources than csrc/ holds now: rebuild before quoting")
    print("\n".join(lines))

    timer = make_timer(device, None if args.sample_ms is None else args.sample_ms / 1e3)
    names, outcomes = [OURS, *peers], []
    total = len(cells) * len(directions)
    for cell in cells:
        for direction in directions:
            outcome = measure_cell(cell, direction, names, device, timer, args.rounds, args.deterministic)
            outcomes.append(outcome)
            ratios = ", ".join(f"{_report.times(outcome.ratio(peer))} {peer}" for peer in peers)
            print(f"[{len(outcomes)}/{total}] {outcome.label}: {ratios}", file=sys.stderr)
    table = result_table(outcomes, names, device, f"bench {name}, {device.type}")
    table.print()

    record = {
        "provenance": about,
        "rows": [row for o in outcomes for row in o.rows()],
        "refused": [row for o in outcomes for row in o.refused()],
    }
    if args.out:
        stem, heading = args.out / f"bench_{name}_{device.type}", f"bench {name}, {device.type}"
        _record.save(record, stem.with_suffix(".json"))
        _report.write_markdown(stem.with_suffix(".md"), heading, [table], [*lines, f"`{about['command']}`"])
        complaint = "no peers: no picture"
        if peers:
            title = f"flash_attn_ext, {name}, {about['gpu'] or about['cpu']}"
            complaint = _report.draw_ratios(stem.with_suffix(".png"), title, panels(outcomes, peers))
        print(f"wrote {stem}.json, .md" + (f" ({complaint})" if complaint else ", .png"))
    if args.json:
        _record.save(record, args.json)
    slower = 0
    if old is not None:
        comparison, slower = compare_records(record, old, args.threshold)
        comparison.print()
    return 1 if slower or any(o.disagrees for o in outcomes) else 0


def _protocol(device: torch.device, rounds: int) -> str:
    parts = [
        f"{rounds} rounds, all implementations in each, order rotated and reversed",
        "median over rounds",
        "random normal inputs",
        "wall time and process CPU time of back-to-back calls",
        "backward: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True) alone, forward not timed",
    ]
    if device.type == "cuda":
        parts[3] = "CUDA events around each call, L2 overwritten before it, SM clock and power read meanwhile"
    return "; ".join(parts)
