"""What nvcc makes of the Hopper kernels: no spill, no serialised wgmma; debug builds compile. Needs nvcc and no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import Future
from pathlib import Path

import background
import pytest

ROOT = Path(__file__).resolve().parent.parent
INSTANCES = sorted((ROOT / "csrc" / "cuda" / "instances").glob("sm90_*.cu"))
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="no nvcc")]


# What a kernel's mangled name begins with: the bytes that it may spill.
SPILLS = {
    # Producer, turns and statistics have 24 registers a thread: once for each tile, not for each step.
    r"\w*backward_(v2|dkv)_kernelI\w+": 56,
    # In turn there are two threads more of that kind.
    r"\w*backward_v2_kernelI\w+DqSumE1E": 96,
    # D 96, in any order and in turn: once for each tile as well, in the warpgroups.
    r"\w*backward_v2_kernelI\w+Li2ELNS0_5DqSumE[01]E": 152,
    # D 64 apart, where two tiles of scores take 128 registers.
    r"\w*backward_v2_kernelI\w+Li0ELNS0_5DqSumE2E": 136,
}


def may_spill(name: str) -> int:
    return max((most for pattern, most in SPILLS.items() if re.match(pattern, name)), default=0)


def compile_(source: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Two to twelve seconds a file."""
    command = [str(NVCC), "-std=c++17", "-O3", "--expt-relaxed-constexpr", *flags]
    command += ["-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v", "-cubin", "-o", "/dev/null", str(source)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


def start_background(items: list[pytest.Item]) -> None:
    for item in items if NVCC else []:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if "source" in parameters:
            start(parameters["source"])
        elif "macro" in parameters:
            start(instance(parameters["name"]), f"-D{parameters['macro']}")


def start(source: Path, *flags: str) -> Future:
    return background.start((source, flags), compile_, source, *flags)


def said_by_ptxas(source: Path, *flags: str) -> str:
    done = start(source, *flags).result()
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def instance(name: str) -> Path:
    return ROOT / "csrc" / "cuda" / "instances" / f"sm90_{name}_16bit.cu"


def test_there_are_instances() -> None:
    """Else the tests below say nothing."""
    assert len([path for path in INSTANCES if "forward" in path.name]) == 7


@pytest.mark.parametrize("source", INSTANCES, ids=lambda path: path.stem)
def test_no_spill_and_no_serialised_wgmma(source: Path) -> None:
    """C7510 and its kin: ptxas waits for each product where it cannot follow the registers of several."""
    said = said_by_ptxas(source)
    kernels = re.findall(r"properties for (\w+)\s+\d+ bytes stack frame, (\d+) bytes spill stores", said)
    assert len(kernels) >= 2
    assert [(name, spilled) for name, spilled in kernels if int(spilled) > may_spill(name)] == [], said
    assert (warning := re.search(r"C75\d\d.*", said)) is None, warning[0]


@pytest.mark.parametrize("arch, has_code", [("sm_80", "false"), ("sm_90a", "true")])
def test_a_build_knows_whether_it_has_code_for_hopper(arch: str, has_code: str, tmp_path: Path) -> None:
    """Else a build for 8.0 alone would run empty kernels on a Hopper GPU, and dependent ones that cannot wait."""
    source = tmp_path / "has_code.cu"
    source.write_text(f'#include "cuda/shared/launch.h"\nstatic_assert(fae::cuda::has_hopper_code() == {has_code});\n')
    command = [str(NVCC), "-std=c++17", f"-arch={arch}", "-I", str(ROOT / "csrc"), "-c", "-o", "/dev/null", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("macro", ["FAE_DEBUG_BARRIERS", "FAE_DEBUG_DELAYS"])
@pytest.mark.parametrize("name", ["forward_v2_d64", "backward_v2_d128"])
def test_debug_builds_compile(name: str, macro: str) -> None:
    """Delays have to leave the products in parallel, or they would hide what they are to show."""
    said = said_by_ptxas(instance(name), f"-D{macro}")
    assert macro == "FAE_DEBUG_BARRIERS" or "C75" not in said, said
