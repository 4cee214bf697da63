"""Long work of other processes, compilers above all: it starts when tests are collected, and runs beside the first.

A module that has such work defines ``start_background(items)``, which conftest.py calls with the tests of it that will
run. One piece of work runs at a time: most tests leave a core to it, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

_pool = ThreadPoolExecutor(1)
_started: dict[Hashable, Future] = {}


def start(key: Hashable, work: Callable[..., Any], *args: Any) -> Future:
    """The future of ``work(*args)``: what was started under this key, or a new one."""
    if key not in _started:
        _started[key] = _pool.submit(work, *args)
    return _started[key]


def stop() -> None:
    """What has not begun will not."""
    _pool.shutdown(wait=False, cancel_futures=True)
