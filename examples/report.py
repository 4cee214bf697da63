"""What the training run leaves behind: tables on the terminal, one picture, one JSON file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Column, Table

MIB = 2**20
_COLOURS = {"naive": "#d1603d", "ours": "#1f6f8b", "sdpa": "#8a8a8a"}


@dataclass
class Run:
    """What one training run yields.

    Attributes
    ----------
    name : str
        Which attention.
    losses : list of float
        Training loss of every step, nats a byte.
    seconds : list of float
        Wall time of every step.
    validation : float
        Mean loss on held-out files after the last step.
    peak : int
        Bytes by which tensor memory rose during one forward and backward pass.
    """

    name: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    validation: float = float("nan")
    peak: int = 0

    def step_seconds(self) -> float:
        """Median time of a step; the first three warm caches and allocators up and do not count."""
        return median(self.seconds[3:] or self.seconds)


def largest_difference(a: Run, b: Run, steps: int) -> float:
    """Largest distance between two loss curves over their first `steps` steps."""
    return max(abs(x - y) for x, y in zip(a.losses[:steps], b.losses[:steps], strict=True))


def print_runs(console: Console, runs: Sequence[Run], tokens_per_step: int) -> None:
    """Print losses, time and memory of every run."""
    rows: dict[str, Callable[[Run], str]] = {
        "loss, first step": lambda run: f"{run.losses[0]:.4f}",
        "loss, step 100": lambda run: f"{run.losses[99]:.4f}" if len(run.losses) >= 100 else "-",
        "loss, last step": lambda run: f"{run.losses[-1]:.4f}",
        "loss, validation": lambda run: f"{run.validation:.4f}",
        "ms a step, median": lambda run: f"{run.step_seconds() * 1e3:.1f}",
        "tokens a second": lambda run: f"{tokens_per_step / run.step_seconds():,.0f}",
        "peak MiB of a step": lambda run: f"{run.peak / MIB:,.1f}",
    }
    # One column a run: the terminal may be 80 wide.
    table = Table("", *(Column(run.name, justify="right") for run in runs), title="Training, same seed and batches")
    for label, text in rows.items():
        table.add_row(label, *map(text, runs))
    console.print(table)
    console.print("loss in nats a byte; peak: activations and gradients of one step, above the weights")


def print_memory(
    console: Console, lengths: Sequence[int], memory: Mapping[str, Sequence[int | None]], shape: str
) -> None:
    """Print the peak memory of attention alone, one row a sequence length."""
    table = Table(title=f"Peak MiB of attention alone, forward and backward\n{shape}", min_width=52)
    table.add_column("sequence", justify="right")
    for name in memory:
        table.add_column(name, justify="right")
    for index, length in enumerate(lengths):
        peaks = (peaks[index] for peaks in memory.values())
        table.add_row(f"{length:,}", *("did not fit" if peak is None else f"{peak / MIB:,.2f}" for peak in peaks))
    console.print(table)


def draw(
    path: Path, runs: Sequence[Run], lengths: Sequence[int], memory: Mapping[str, Sequence[int | None]], shape: str
) -> None:
    """Write the picture: loss curves on the left, memory of attention against sequence length on the right."""
    import matplotlib

    matplotlib.use("Agg")  # before pyplot: the machine may have no display
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for index, run in enumerate(runs):
        # Equal curves hide each other: draw the first broad and pale, the later ones thin on top of it.
        style: dict[str, Any] = {"linewidth": 5, "alpha": 0.4} if index == 0 else {"linewidth": 1.2}
        steps = range(1, len(run.losses) + 1)
        left.plot(steps, run.losses, color=_COLOURS[run.name], label=f"{run.name}, {run.losses[-1]:.3f}", **style)
    left.set(title="Training loss", xlabel="step", ylabel="nats a byte")
    for name, peaks in memory.items():
        known = [(length, peak / MIB) for length, peak in zip(lengths, peaks, strict=True) if peak is not None]
        right.plot(*zip(*known, strict=True), marker="o", color=_COLOURS[name], label=name)
    right.set(title=f"Peak memory of attention, forward and backward\n{shape}", xlabel="sequence length", ylabel="MiB")
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xticks(lengths, [f"{length:,}" for length in lengths])
    right.minorticks_off()
    right.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_json(path: Path, runs: Sequence[Run], tokens_per_step: int, **others: Any) -> None:
    """Write everything that the tables and the picture show, with the full loss curves."""
    rows = {
        run.name: {
            "first_loss": run.losses[0],
            "step_100_loss": run.losses[99] if len(run.losses) >= 100 else None,
            "last_loss": run.losses[-1],
            "validation_loss": run.validation,
            "median_step_ms": run.step_seconds() * 1e3,
            "tokens_per_second": tokens_per_step / run.step_seconds(),
            "peak_bytes": run.peak,
            "losses": run.losses,
        }
        for run in runs
    }
    path.write_text(json.dumps({**others, "runs": rows}, indent=2) + "\n", encoding="utf-8")
