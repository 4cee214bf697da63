"""From the sdist into an environment of its own, built for the CPU only: what a user without nvcc gets.

The environment sees this one's PyTorch (a download of 2 GB would test nothing of ours) and nothing of the source tree.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

import background
import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
MUST_HAVE = {
    "setup.py", "pyproject.toml", "README.md", "LICENSE", "CONTRIBUTING.md", "Makefile", "csrc/library.cpp",
    "csrc/core/mask.h", "csrc/cpu/tile_ops_impl.h", "csrc/cuda/core_check.cu", "csrc/cuda/instances/table.py",
    "csrc/cuda/registry.h", "examples/cpp/CMakeLists.txt", "flash_attn_ext/py.typed",
    "flash_attn_ext/_C.pyi", "flash_attn_ext/cli/doctor.py", "tests/cases.py", "tests/cpp/CMakeLists.txt",
    "examples/train_gpt.py", "benchmarks/origin_tables.py", "docs/algorithms.md", "tools/lint.sh",
}  # fmt: skip


def run(*command: str, cwd: Path, **environment: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "FLASH_ATTN_EXT_BUILD_DIR")}
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=400, check=False, env=clean | environment
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout


def pack(folder: Path) -> Path:
    """Packed from a copy, so that no egg-info appears in the tree."""
    source = folder / "source"
    ignore = shutil.ignore_patterns(".*", "venv*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignore)
    code = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"
    run(sys.executable, "-c", code, cwd=source)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def install(folder: Path) -> tuple[Path, str, Path]:
    """The sdist, and the interpreter and site-packages of an environment into which it has been installed."""
    archive = pack(folder)
    environment = folder / "env"
    venv.create(environment, with_pip=False)
    python = str(environment / "bin" / "python")
    # What this interpreter can import, PyTorch and pip among it, but no editable install of ours.
    packages = [p for p in sys.path if p.endswith("site-packages")]
    site = next((environment / "lib").glob("python*/site-packages"))
    (site / "outer.pth").write_text("\n".join(packages) + "\n")
    (site / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"
    )
    run(
        python, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index",
        "--ignore-installed", "--target", str(site), str(archive), cwd=folder, FLASH_ATTN_EXT_CUDA="0", MAX_JOBS="1",
    )  # fmt: skip
    return archive, python, site


FOLDER = tempfile.TemporaryDirectory(prefix="flash_attn_ext_")  # as long as this process


def start_background(items: list[pytest.Item]) -> None:
    if any("installed" in item.fixturenames for item in items):
        background.start("install", install, Path(FOLDER.name))


@pytest.fixture(scope="module")
def installed() -> tuple[Path, str, Path]:
    return background.start("install", install, Path(FOLDER.name)).result()


def test_the_sdist_has_everything_and_no_binary(installed: tuple[Path, str, Path]) -> None:
    with tarfile.open(installed[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= MUST_HAVE, MUST_HAVE - names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc")) or "__pycache__" in name]
    for folder in ("csrc", "tests", "docs", "tools"):  # nothing that git tracks is missing
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert str(path.relative_to(ROOT)) in names, path


USE = """
import json, torch, flash_attn_ext as fae
q, k, v = (torch.randn(2, 4, 70, 16, requires_grad=True) for _ in range(3))
out = fae.flash_attention(q, k, v, causal=True)
torch.testing.assert_close(out, fae.naive_attention(q, k, v, causal=True))
out.sum().backward()
info = fae.build_info()
devices = {row["device"] for row in fae.supported_kernels()}
print(json.dumps([fae.__file__, info["cuda"], sorted(devices), info["cuda_reason"]]))
"""


def test_install_from_the_sdist_for_the_cpu_only(installed: tuple[Path, str, Path], tmp_path: Path) -> None:
    _, python, site = installed
    assert {"_ops.so", "build.json", "py.typed", "_C.pyi"} <= {p.name for p in (site / "flash_attn_ext").iterdir()}
    said = run(python, "-c", USE, cwd=tmp_path).splitlines()[-1]
    assert said.startswith(f'["{site / "flash_attn_ext"}') and said.endswith('false, ["cpu"], "FLASH_ATTN_EXT_CUDA=0"]')
    doctor = run(python, "-m", "flash_attn_ext", "doctor", cwd=tmp_path)
    assert "CPU" in doctor and "all is well" in doctor


def test_wrong_values_of_the_switch_are_refused() -> None:
    for value, words in (("yes", "it has to be auto, 1 or 0"), ("1", "FLASH_ATTN_EXT_CUDA=1, but")):
        done = subprocess.run(
            [sys.executable, "setup.py", "--version"],
            cwd=ROOT, capture_output=True, text=True, check=False,
            env=os.environ | {"FLASH_ATTN_EXT_CUDA": value, "CUDA_HOME": "/nonexistent", "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        assert done.returncode != 0 and words in done.stderr
