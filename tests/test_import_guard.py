"""A binary that is missing, was built for another PyTorch, or lacks a CUDA library: three sentences, three remedies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import harness
import pytest
import torch

import flash_attn_ext
from flash_attn_ext import _binary

PACKAGE = Path(flash_attn_ext.__file__).resolve().parent
REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps ."


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package that a test may break."""
    ignore = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(PACKAGE, tmp_path / "flash_attn_ext", ignore=ignore))


def import_it(package: Path, before: str = "") -> str:
    """What ``import flash_attn_ext`` says there: the type and the text of the error, or "fine"."""
    return harness.run_python(
        f"""
import sys
sys.path.insert(0, {str(package.parent)!r})
{before}
try:
    import flash_attn_ext
    assert flash_attn_ext.__file__.startswith({str(package)!r}), flash_attn_ext.__file__
    print("fine")
except ImportError as error:
    print(type(error).__name__, error)
"""
    )


def set_record(package: Path, **change: object) -> None:
    file = package / "build.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def test_an_unbroken_copy_imports(package: Path) -> None:
    assert import_it(package) == "fine\n"


def test_never_built(package: Path) -> None:
    (package / "_ops.so").unlink()
    text = import_it(package)
    assert text.startswith("BinaryError flash_attn_ext was never built: there is no _ops.so in the package folder")
    assert REINSTALL in text and "pip install --no-build-isolation -e ." in text


def test_another_pytorch_is_refused_before_it_is_loaded(package: Path) -> None:
    set_record(package, torch="2.9.1+cu128")
    (package / "_ops.so").write_bytes(b"not even a library: it may not be opened")
    text = import_it(package)
    assert text.startswith(
        f"BinaryError flash_attn_ext was built for PyTorch 2.9.1+cu128 and this is PyTorch {torch.__version__}"
    )
    assert REINSTALL in text


def test_another_patch_release_is_fine(package: Path) -> None:
    major, minor, *_ = torch.__version__.split(".")
    set_record(package, torch=f"{major}.{minor}.99+cpu")
    assert import_it(package) == "fine\n"


def test_missing_cuda_library(package: Path) -> None:
    """The loader's own words for it, raised where the library is opened."""
    set_record(package, cuda="13.0")
    said = "libcudart.so.13: cannot open shared object file: No such file or directory"
    before = f"""
import torch
def refuse(path): raise OSError({said!r})
torch.ops.load_library = refuse
"""
    text = import_it(package, before)
    assert text.startswith("BinaryError flash_attn_ext was built with CUDA 13.0 and a CUDA library is missing here")
    assert said in text and f"FLASH_ATTN_EXT_CUDA=0 {REINSTALL}" in text


def test_a_damaged_binary(package: Path) -> None:
    (package / "_ops.so").write_bytes(b"\x7fELF and no more")
    text = import_it(package)
    assert text.startswith("BinaryError flash_attn_ext's binary did not load (") and REINSTALL in text


def test_a_missing_record_does_not_stop_a_good_binary(package: Path) -> None:
    (package / "build.json").unlink()
    assert import_it(package) == "fine\n"
    (package / "build.json").write_text("{ damaged")
    assert import_it(package) == "fine\n"


def test_the_remedy_is_the_readmes() -> None:
    assert "pip install --no-build-isolation" in (PACKAGE.parent / "README.md").read_text()
    assert issubclass(_binary.BinaryError, ImportError)


def test_the_record_says_what_was_built() -> None:
    record = json.loads((PACKAGE / "build.json").read_text())
    assert record["torch"] == torch.__version__ and len(record["csrc_sha256"]) == 64
    assert not any("fast-math" in flag or flag.startswith("-std") for flag in record["cxx_flags"])
    info = flash_attn_ext.build_info()
    assert info["cuda"] is (record["cuda"] is not None)
