"""Loads the compiled part, and says what to do when it cannot.

Three different things go wrong here and look alike from outside: the binary was never built, it was built for another
PyTorch, or a CUDA library it needs is missing. Each gets its own sentence and the line that fixes it.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import torch

_PACKAGE = Path(__file__).resolve().parent
REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps ."


class BinaryError(ImportError):
    """The compiled part of flash_attn_ext is missing or does not fit this PyTorch."""


def build_record() -> dict:
    """``build.json`` beside the binary: what it was built with. Empty where there is none."""
    try:
        return json.loads((_PACKAGE / "build.json").read_text())
    except (OSError, ValueError):
        return {}


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split("+")[0].split(".")[:2])


def explain_failure(error: Exception | None, *, torch_version: str | None = None) -> str:
    """The sentence for a binary that is missing (``error`` None) or that failed to load with ``error``."""
    torch_version = torch_version or torch.__version__
    record = build_record()
    built_with = record.get("torch")
    if error is None:
        return (
            f"flash_attn_ext was never built: there is no _ops.so in the package folder. In the source folder run\n"
            f"    {REINSTALL}\n(or `make build`). If you are in the source folder now, python may have imported the "
            "sources instead of the installed package: `pip install --no-build-isolation -e .` serves both."
        )
    if built_with and _minor(built_with) != _minor(torch_version):
        return (
            f"flash_attn_ext was built for PyTorch {built_with} and this is PyTorch {torch_version}. A binary fits one "
            f"minor version. Rebuild it with\n    {REINSTALL}\n({error})"
        )
    text = str(error)
    if "libcud" in text or "libcublas" in text or "libc10_cuda" in text or "libtorch_cuda" in text:
        return (
            f"flash_attn_ext was built with CUDA {record.get('cuda')} and a CUDA library is missing here "
            f"({text}). Install the PyTorch build with that CUDA, or build for the CPU only:\n"
            f"    FLASH_ATTN_EXT_CUDA=0 {REINSTALL}"
        )
    return f"flash_attn_ext's binary did not load ({text}). Rebuild it with\n    {REINSTALL}"


def load() -> ModuleType:
    """Register the operators and return the introspection module ``_C``."""
    library = _PACKAGE / "_ops.so"
    if not library.exists():
        raise BinaryError(explain_failure(None))
    built_with = build_record().get("torch")
    if built_with and _minor(built_with) != _minor(torch.__version__):
        # Refused before it is loaded: another minor's ATen may load and then crash.
        raise BinaryError(explain_failure(ImportError("not loaded")))
    try:
        torch.ops.load_library(str(library))
        return importlib.import_module("flash_attn_ext._C")
    except (OSError, ImportError) as error:
        raise BinaryError(explain_failure(error)) from error


_C = load()
