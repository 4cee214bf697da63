"""One cell measured: every implementation on the same inputs, checked against ours, timed in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ._grids import Cell
from ._peers import AGREEMENT, IMPLEMENTATIONS, OURS, Inputs, Prepared, disagreement, prepare
from ._timing import REFUSALS, Measurement, Timer, failure, measure


@dataclass
class Outcome:
    """One cell in one direction: what each implementation took, or why it took nothing."""

    cell: Cell
    direction: str
    deterministic: bool
    measurements: dict[str, Measurement]
    disagrees: list[str] = field(default_factory=list)

    def seconds(self, name: str) -> float | None:
        m = self.measurements.get(name)
        return None if m is None or m.error is not None or not m.samples else m.ms / 1e3

    def ratio(self, peer: str) -> float | None:
        """Our speed as a multiple of the peer's."""
        ours, theirs = self.seconds(OURS), self.seconds(peer)
        return None if ours is None or theirs is None else theirs / ours

    def cpu_ratio(self, peer: str) -> float | None:
        """The same of processor time."""
        ours, theirs = (m.median_of("cpu_ms") if (m := self.measurements.get(n)) else None for n in (OURS, peer))
        return theirs / ours if ours and theirs else None

    @property
    def label(self) -> str:
        return f"{self.cell.label} {self.cell.dtype} {self.direction}"

    def identity(self, name: str) -> dict[str, Any]:
        head = {"case": self.cell.case, "impl": name, "direction": self.direction, "deterministic": self.deterministic}
        return head | self.cell.fields()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of the record."""
        for name, m in self.measurements.items():
            if m.error is None and m.samples:
                yield {
                    **self.identity(name),
                    "ms": m.ms,
                    "tflops": self.cell.flops(self.direction) / m.ms / 1e9,
                    "clock_mhz": m.median_of("clock_mhz"),
                    "power_w": m.median_of("power_w"),
                    "ms_min": m.low,
                    "ms_max": m.high,
                    "ms_iqr": m.iqr,
                    "cpu_ms": m.median_of("cpu_ms"),
                    "calls": m.calls,
                    "ms_rounds": [sample.ms for sample in m.samples],
                }

    def refused(self) -> Iterator[dict[str, Any]]:
        """Rows of the record for implementations that gave no time."""
        for name, m in self.measurements.items():
            if m.error is not None:
                yield {**self.identity(name), "reason": m.error}


def measure_cell(
    cell: Cell,
    direction: str,
    names: Sequence[str],
    device: torch.device,
    timer: Timer,
    rounds: int,
    deterministic: bool = False,
) -> Outcome:
    """Time the named implementations on one cell, interleaved, and check that they computed the same thing."""
    inputs = Inputs.make(cell, device)
    ready: dict[str, Prepared] = {}
    errors: dict[str, str] = {}
    for name in names:
        try:
            ready[name] = prepare(name, cell, direction, inputs, deterministic)
        except REFUSALS as error:
            errors[name] = failure(error).removeprefix("Refused: ")
    ours, disagrees = ready.get(OURS), []
    if ours is not None:
        for name, other in ready.items():
            if name != OURS and (worst := disagreement(ours.result, other.result)) > AGREEMENT[cell.dtype]:
                disagrees.append(f"{name} differs from {OURS} by {worst:.1e} of the largest entry")
    for one in ready.values():
        one.result = ()  # memory that the timed calls may need
    contexts = {name: IMPLEMENTATIONS[name].context for name in ready}
    found = measure({name: one.call for name, one in ready.items()}, timer, rounds, contexts)
    measurements = {name: found.get(name) or Measurement(error=errors[name]) for name in names}
    return Outcome(cell, direction, deterministic, measurements, disagrees)
