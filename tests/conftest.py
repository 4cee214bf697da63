"""Devices. ``-m gpu`` runs the CUDA half of every parametrised test; without a GPU it is skipped, with a reason."""

from __future__ import annotations

import os
from types import ModuleType

import background
import harness
import pytest
import torch

import flash_attn_ext


def _why_no_gpu() -> str | None:
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "no CUDA device"


def _why_no_cuda_attention() -> str | None:
    if any(row["device"] == "cuda" for row in harness.KERNELS):
        return None
    if not flash_attn_ext.build_info()["cuda"]:
        return "flash_attn_ext is built without CUDA"
    return "supported_kernels() lists no CUDA kernel for attention"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _why_no_gpu()
    for item in items:
        if reason is not None and item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly or "PYTEST_XDIST_WORKER" in os.environ:  # each of them would start everything
        return
    items: dict[ModuleType, list[pytest.Item]] = {}
    for item in session.items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("skip") is None:
            items.setdefault(item.module, []).append(item)
    for module, of_module in items.items():
        if hasattr(module, "start_background"):
            module.start_background(of_module)


def pytest_sessionfinish() -> None:
    background.stop()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the test computes: "cpu", or "cuda" if there is an attention kernel for it."""
    if request.param == "cuda" and (reason := _why_no_cuda_attention()) is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def poisoned():
    """Outputs and workspaces are NaN before they are written (harness.poisoned_memory)."""
    with harness.poisoned_memory():
        yield


@pytest.fixture(scope="module")
def one_thread():
    """For tiny tensors: threads that wait for each other on a busy machine take ten times as long."""
    with harness.threads(1):
        yield
