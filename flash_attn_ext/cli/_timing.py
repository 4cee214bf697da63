"""How a call is timed: several implementations in turn, in rounds, so that a drifting machine meets all of them alike.

One *sample* is a few calls of one implementation and yields time a call. One *round* takes a sample of every
implementation; the order changes from round to round. What is reported is the median over rounds, with the spread.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Protocol

import torch

Call = Callable[[], object]
REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, ImportError, AssertionError, MemoryError)
"""What an implementation may raise instead of computing; NotImplementedError and out of memory are RuntimeErrors."""


@dataclass(frozen=True)
class Sample:
    """Time a call in milliseconds, and what the machine did meanwhile."""

    ms: float
    cpu_ms: float | None = None
    clock_mhz: float | None = None
    power_w: float | None = None


@dataclass
class Measurement:
    """The samples of one implementation, one a round, or why there are none."""

    samples: list[Sample] = field(default_factory=list)
    calls: int = 0
    error: str | None = None

    @property
    def ms(self) -> float:
        return median(s.ms for s in self.samples)

    @property
    def low(self) -> float:
        return min(s.ms for s in self.samples)

    @property
    def high(self) -> float:
        return max(s.ms for s in self.samples)

    @property
    def iqr(self) -> float:
        """Distance of the quartiles over rounds."""
        if len(self.samples) < 2:
            return 0.0
        first, _, third = quantiles((s.ms for s in self.samples), n=4, method="inclusive")
        return third - first

    def median_of(self, name: str) -> float | None:
        """Median of another field of the samples; None where it was not measured."""
        values = [value for s in self.samples if (value := getattr(s, name)) is not None]
        return median(values) if values else None


def order(names: Sequence[str], round_number: int) -> list[str]:
    """Who runs when in a round: rotated every second round, reversed in between.

    Rotation alone would leave everyone with the same predecessor, whose heat and cache contents it inherits.

    >>> [order("abc", r) for r in range(4)]
    [['a', 'b', 'c'], ['c', 'b', 'a'], ['b', 'c', 'a'], ['a', 'c', 'b']]
    """
    shift = (round_number // 2) % len(names) if names else 0
    turned = [*names[shift:], *names[:shift]]
    return turned[::-1] if round_number % 2 else turned


class Timer(Protocol):
    """What :func:`measure` needs of a clock."""

    def calls_for(self, call: Call) -> int: ...

    def sample(self, call: Call, calls: int) -> Sample: ...


def _calls(seconds: float, budget: float, most: int) -> int:
    return max(1, min(most, math.ceil(budget / max(seconds, 1e-9))))


class CpuTimer:
    """Wall time, and beside it the processor time of the whole process.

    Processor time counts every thread, so it shows work that another program's load on the machine hides; threads of
    OpenMP that wait for each other by spinning count as working.

    Parameters
    ----------
    budget : float
        Seconds that a sample should last at least; short calls are repeated.
    """

    def __init__(self, budget: float = 0.05) -> None:
        self.budget = budget

    def calls_for(self, call: Call) -> int:
        """How many calls make a sample, from a few untimed ones."""
        seconds = math.inf
        start = time.perf_counter()
        for attempt in range(3):
            before = time.perf_counter()
            call()
            seconds = min(seconds, time.perf_counter() - before)
            # The first call may have had to import and to compile: on its word alone a short call would be a sample.
            if attempt > 0 and time.perf_counter() - start > 4 * self.budget:
                break
        return _calls(seconds, self.budget, 1_000_000)

    def sample(self, call: Call, calls: int) -> Sample:
        if calls > 1:
            call()  # brings code and inputs back into the caches; a long call does that by itself
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(calls):
            call()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return Sample(wall * 1e3 / calls, cpu_ms=cpu * 1e3 / calls)


class Board:
    """SM clock and power of a GPU through the driver's management library (NVML); nothing where it is missing."""

    _SM_CLOCK = 1

    def __init__(self, device: torch.device) -> None:
        self._library: ctypes.CDLL | None = None
        self._handle = ctypes.c_void_p()
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
            if library.nvmlInit_v2() == 0 and library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(self._handle)) == 0:
                self._library = library
        except (OSError, AttributeError):
            pass

    def _read(self, function: str, *arguments: object) -> int | None:
        if self._library is None:
            return None
        value = ctypes.c_uint()
        status = getattr(self._library, function)(self._handle, *arguments, ctypes.byref(value))
        return value.value if status == 0 else None

    def read(self) -> tuple[float | None, float | None]:
        """SM clock in MHz and power in W, now."""
        clock = self._read("nvmlDeviceGetClockInfo", ctypes.c_int(self._SM_CLOCK))
        power = self._read("nvmlDeviceGetPowerUsage")
        return (None if clock is None else float(clock)), (None if power is None else power / 1e3)

    def driver(self) -> str | None:
        """Version of the driver."""
        if self._library is None:
            return None
        text = ctypes.create_string_buffer(80)
        return text.value.decode() if self._library.nvmlSystemGetDriverVersion(text, 80) == 0 else None


class CudaTimer:
    """Events around each call, the L2 cache overwritten before it, clock and power read while the GPU works.

    The overwriting also gives the processor a head start, so the call's Python and launch time shows only where it
    exceeds what the flush takes.

    Parameters
    ----------
    device : torch.device
        Which GPU.
    budget : float
        Seconds of GPU work that a sample should hold at least.
    flush : bool
        Overwrite the L2 cache before every call.
    """

    def __init__(self, device: torch.device, budget: float = 0.03, flush: bool = True) -> None:
        self.device, self.budget = device, budget
        self.board = Board(device)
        size = torch.cuda.get_device_properties(device).L2_cache_size if flush else 0
        self._cache = torch.empty(max(4 * size, 1), dtype=torch.uint8, device=device) if flush else None

    def _run(self, call: Call, calls: int) -> Sample:
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        for start, end in pairs:
            if self._cache is not None:
                self._cache.zero_()
            start.record()
            call()
            end.record()
        readings = [self.board.read()]
        while not pairs[-1][1].query():
            readings.append(self.board.read())
            time.sleep(0.001)
        torch.cuda.synchronize(self.device)
        clocks, powers = ([r[i] for r in readings if r[i] is not None] for i in (0, 1))
        return Sample(
            median(start.elapsed_time(end) for start, end in pairs),
            clock_mhz=median(clocks) if clocks else None,
            power_w=median(powers) if powers else None,
        )

    def calls_for(self, call: Call) -> int:
        self._run(call, 2)
        return _calls(self._run(call, 3).ms / 1e3, self.budget, 100)

    def sample(self, call: Call, calls: int) -> Sample:
        return self._run(call, calls)


def failure(error: Exception) -> str:
    """One line of what an implementation said when it refused."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def measure(
    calls: Mapping[str, Call],
    timer: Timer,
    rounds: int,
    contexts: Mapping[str, Callable[[], AbstractContextManager]] | None = None,
) -> dict[str, Measurement]:
    """Time several calls against each other.

    Parameters
    ----------
    calls : mapping
        Name to what is timed. One that raises is out from then on, with the reason in its measurement.
    timer : Timer
        Takes the samples.
    rounds : int
        Samples of each.
    contexts : mapping, optional
        Name to a factory of a context manager, entered around a whole sample and therefore not timed.

    Returns
    -------
    dict
        A :class:`Measurement` for every name, in the order given.
    """
    results = {name: Measurement() for name in calls}

    def calibrate(call: Call, result: Measurement) -> None:
        result.calls = timer.calls_for(call)

    def take(call: Call, result: Measurement) -> None:
        result.samples.append(timer.sample(call, result.calls))

    def attempt(work: Callable[[Call, Measurement], None], name: str) -> None:
        if results[name].error is not None:
            return
        try:
            with (contexts or {}).get(name, nullcontext)():
                work(calls[name], results[name])
        except REFUSALS as error:
            results[name].error = failure(error)
            results[name].samples.clear()

    for name in calls:
        attempt(calibrate, name)
    for round_number in range(rounds):
        for name in order(list(calls), round_number):
            attempt(take, name)
    return results


def make_timer(device: torch.device, budget: float | None = None) -> CpuTimer | CudaTimer:
    """The timer of a device."""
    if device.type == "cuda":
        return CudaTimer(device, **({} if budget is None else {"budget": budget}))
    return CpuTimer(**({} if budget is None else {"budget": budget}))
