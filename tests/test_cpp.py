"""Configures, builds and runs the C++ tests in ``tests/cpp`` through CTest."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cpp"
INSTALL = "apt-get install libgtest-dev cmake"


def run(*command: str) -> tuple[bool, str]:
    """Whether a command succeeded, and all that it printed."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"


@pytest.mark.slow
def test_cpp() -> None:
    """Unchanged sources are not compiled again: the second run takes seconds."""
    if shutil.which("cmake") is None or shutil.which("ctest") is None:
        pytest.skip(INSTALL)
    ok, output = run("cmake", "-S", "tests/cpp", "-B", str(BUILD))
    if not ok and "GTest" in output:
        pytest.skip(INSTALL)
    if ok:
        ok, output = run("cmake", "--build", str(BUILD), f"-j{len(os.sched_getaffinity(0))}")
    if ok:
        ok, output = run("ctest", "--test-dir", str(BUILD), "--output-on-failure", "--no-tests=error")
    if not ok:
        pytest.fail(output, pytrace=False)
