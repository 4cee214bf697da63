"""The CUDA kernels from C++ without PyTorch: the example, and the driver that compute-sanitizer watches."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "example"
CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))


def run(*command: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}"
    return done.stdout


def objects() -> list[str]:
    """Of the last CUDA build that kept them (make build): registry and instances."""
    folder = Path(os.environ.get("FLASH_ATTN_EXT_BUILD_DIR", ROOT / "build" / "objects")) / "csrc" / "cuda"
    return [str(path) for path in [*folder.glob("registry.o"), *sorted(folder.glob("instances/*.o"))]]


def configure_example() -> None:
    nvcc = shutil.which("nvcc") or shutil.which(str(CUDA_HOME / "bin" / "nvcc"))
    if nvcc is None or shutil.which("cmake") is None:
        pytest.skip("needs nvcc and cmake")
    architecture, compiler = "-DCMAKE_CUDA_ARCHITECTURES=80", f"-DCMAKE_CUDA_COMPILER={nvcc}"
    run("cmake", "-S", "examples/cpp", "-B", str(BUILD), architecture, compiler)  # 8.0 with PTX, for every later GPU


@pytest.mark.slow
def test_the_example_links_without_pytorch(tmp_path: Path) -> None:
    """CMake would compile every kernel once more, which takes minutes; their objects are there."""
    configure_example()
    if len(objects()) < 3:
        pytest.skip("no objects of a CUDA build below build/objects: make build")
    program, library = str(tmp_path / "attention"), str(CUDA_HOME / "lib64")
    includes = ["-I", "csrc", "-I", str(CUDA_HOME / "include")]
    link = ["-L", library, f"-Wl,-rpath,{library}", "-lcudart", "-o", program]
    run("g++", "-std=c++17", "-Wall", "-Werror", *includes, "examples/cpp/attention.cpp", *objects(), *link)
    libraries = run("ldd", program)
    assert "libcudart" in libraries and "torch" not in libraries and "python" not in libraries
    if not torch.cuda.is_available():  # and says what is missing where there is no GPU
        done = subprocess.run([program], capture_output=True, text=True, check=False)
        assert done.returncode == 77 and done.stderr.startswith("no CUDA device: ")


@pytest.mark.gpu
def test_the_example_builds_and_runs() -> None:
    """Its exit status is its own comparison with fp64. Unchanged sources are not compiled again."""
    configure_example()
    run("cmake", "--build", str(BUILD), f"-j{len(os.sched_getaffinity(0))}")
    said = run(str(BUILD / "attention"))
    assert "sm80_fwd_" in said and "sm80_bwd_" in said


@pytest.mark.gpu
def test_every_kernel_from_cpp() -> None:
    """What compute-sanitizer watches (make gpu-sanitize), without it: results against fp64 on the host."""
    if len(objects()) < 3:
        pytest.skip("no objects of a CUDA build below build/objects: make build")
    run("bash", "tools/compute_sanitizer.sh", "--build-only")
    assert " 0 problems wrong" in run(str(ROOT / "build" / "cuda_driver"))


@pytest.mark.gpu
@pytest.mark.parametrize("build", ["delays", "barriers"])
def test_debug_builds_of_the_hopper_kernels(build: str) -> None:
    """With random delays at every barrier results have to stay right; with bounded waits nothing may hang."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU of compute capability 9.x")
    driver = ROOT / "build" / f"cuda_driver_{build}"
    if not driver.exists():
        if len(objects()) < 3:
            pytest.skip("no objects of a CUDA build below build/objects: make build")
        run("bash", "tools/debug_driver.sh", build)
    assert " 0 problems wrong" in run(str(driver), "--many", "20" if build == "delays" else "1")
