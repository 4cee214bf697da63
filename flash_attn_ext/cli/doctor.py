"""``python -m flash_attn_ext doctor``: what is installed, how the binary was built, and whether it computes correctly.

Facts first (versions, build, CPU, GPUs, kernels), then checks. A check is ``ok``, ``FAIL``, ``warn`` (worth knowing,
nothing broken) or ``skip`` (does not apply here, with the reason); any ``FAIL`` makes the exit status 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from .. import __version__
from .._binary import _C, REINSTALL
from ..interface import build_info, flash_attention, supported_kernels
from ..reference import naive_attention
from ..sdpa import replace_sdpa
from . import kernels as kernel_table


@dataclass(frozen=True)
class Check:
    """One result: ``status`` is ok, FAIL, warn or skip."""

    name: str
    status: str
    detail: str


# ---- facts -----------------------------------------------------------------------------------------------------------


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def arch_for(archs: str, capability: tuple[int, int]) -> str | None:
    """Which of the compiled ``archs`` (``"8.0+PTX;9.0a"``) a GPU of this capability runs; None: none of them.

    The arch-specific one (``9.0a``) runs on that capability alone, ``8.0`` on every 8.x from it, ``+PTX`` on all later.
    """
    best: tuple[tuple[int, ...], str] | None = None
    for entry in re.split(r"[;, ]+", archs.strip()):
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if found is None:
            continue
        arch, specific = (int(found[1]), int(found[2])), found[3] != ""
        name = f"{arch[0]}.{arch[1]}{found[3]}"
        if specific:
            runs = capability == arch
        elif capability >= arch and capability[0] == arch[0]:
            runs = True
        else:
            runs = found[4] is not None and capability >= arch
            name += "+PTX, compiled when first used"
        rank = (*arch, int(specific))
        if runs and (best is None or rank > best[0]):
            best = rank, name
    return None if best is None else best[1]


def _gpus(archs: str) -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{capability[0]}.{capability[1]}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "runs": arch_for(archs, capability),
            }
        )
    return gpus


def facts() -> dict[str, Any]:
    """Versions, build, CPU, GPUs and kernels, as plain data."""
    build = build_info()
    return {
        "versions": {
            "flash_attn_ext": __version__,
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "build": build,
        "cpu": {
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "isa": build.get("cpu_isa"),
            "torch_isa": torch.backends.cpu.get_cpu_capability(),
            "bf16_gemm": build.get("cpu_bf16_gemm"),
        },
        "gpus": _gpus(build.get("cuda_archs") or ""),
        "kernels": supported_kernels(),
    }


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_versions(known: dict[str, Any]) -> Iterator[Check]:
    build, versions = known["build"], known["versions"]
    same = build.get("torch") == versions["torch"]
    text = f"built with {build.get('torch')}, running {versions['torch']}"
    # Another minor version does not even load; a patch version keeps the ABI.
    yield Check("PyTorch", "ok" if same else "warn", text if same else f"{text}: fits, as far as versions can tell")
    if not build.get("cuda"):
        reason = build.get("cuda_reason") or "no reason was recorded"
        yield Check("CUDA", "skip", f"built for the CPU only: {reason}")
    elif versions["torch_cuda"] is None:
        yield Check("CUDA", "FAIL", f"built with CUDA {build['cuda']}, and this PyTorch has none. {REINSTALL}")
    else:
        built_with = str(build.get("cuda_version") or build["cuda"])
        same_major = built_with.split(".")[0] == versions["torch_cuda"].split(".")[0]
        text = f"built with {built_with}, PyTorch has {versions['torch_cuda']}"
        yield Check("CUDA", "ok" if same_major else "FAIL", text if same_major else f"{text}. Rebuild: {REINSTALL}")


def _check_sources(known: dict[str, Any]) -> Iterator[Check]:
    """In a source checkout: whether the binary was built from the sources that lie beside it."""
    sources = Path(__file__).resolve().parents[2] / "csrc"
    built_from = known["build"].get("csrc_sha256")
    if not (sources / "library.cpp").is_file() or built_from is None:
        return
    digest = hashlib.sha256()
    for path in sorted(sources.rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(sources.parent)).encode() + b"\0" + path.read_bytes())
    same = digest.hexdigest() == built_from
    text = "the binary was built from csrc/ as it is" if same else f"csrc/ has changed since the build. {REINSTALL}"
    yield Check("sources", "ok" if same else "warn", text)


def _check_gpus(known: dict[str, Any]) -> Iterator[Check]:
    archs = known["build"].get("cuda_archs") or "none"
    if not known["gpus"]:
        yield Check("GPU", "skip", "PyTorch sees no CUDA device")
    elif not known["build"].get("cuda"):
        yield Check("GPU", "warn", f"{len(known['gpus'])} seen, and this binary is built for the CPU only. {REINSTALL}")
    else:
        for index, gpu in enumerate(known["gpus"]):
            text = f"{gpu['name']}, compute capability {gpu['capability']}"
            fix = f"TORCH_CUDA_ARCH_LIST={gpu['capability']} {REINSTALL}"
            good = gpu["runs"] is not None
            detail = f"{text}, runs {gpu['runs']}" if good else f"{text}: not among the compiled {archs}. {fix}"
            yield Check(f"GPU {index}", "ok" if good else "FAIL", detail)


def _check_core_on_cuda(known: dict[str, Any]) -> Iterator[Check]:
    """The rules of masks, softmax and dropout, evaluated on the GPU and on the host."""
    check = getattr(_C, "check_core_on_cuda", None)
    if check is None or not known["gpus"]:
        return
    differences = check()
    detail = "; ".join(differences[:3]) if differences else "masks, softmax rules and dropout agree with the host"
    yield Check("core on CUDA", "FAIL" if differences else "ok", detail)


def _worst(ours: torch.Tensor, naive: torch.Tensor, exact: torch.Tensor, factor: float) -> float:
    """Error of ours over what is allowed: ``factor`` times that of plain PyTorch in this dtype, plus one rounding."""
    difference = (ours.double() - exact.double()).abs().max().item()
    if ours.dtype == torch.float64:
        return difference / 1e-12
    allowed = factor * (naive.double() - exact.double()).abs().max().item()
    allowed += 2 * torch.finfo(ours.dtype).eps * max(1.0, exact.abs().max().item())
    return difference / allowed if difference == difference else float("inf")


def _self_test(device: str, dtype: torch.dtype, attention: Callable[..., torch.Tensor]) -> Check:
    """Forward and backward of one small causal GQA problem with ragged tiles, against plain PyTorch."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 113, 40), (2, 2, 203, 40), (2, 2, 203, 40))
    q, k, v, dout = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (*shapes, shapes[0]))

    def run(function: Callable[..., torch.Tensor], **options: Any) -> tuple[torch.Tensor, ...]:
        leaves = [t.to(device, dtype).requires_grad_() for t in (q, k, v)]
        out = function(*leaves, causal=True, **options)
        return out.detach(), *torch.autograd.grad(out, leaves, dout.to(device, dtype).to(out.dtype))

    names = ("out", "dq", "dk", "dv")
    ours, naive, exact = run(attention), run(naive_attention), run(naive_attention, upcast=True)
    ratios = {
        name: _worst(*triple, 2.0 if name == "out" else 3.0)
        for name, *triple in zip(names, ours, naive, exact, strict=True)
    }
    name = max(ratios, key=lambda key: ratios[key])
    detail = f"worst error {ratios[name]:.2f} of what is allowed ({name})"
    short = str(dtype).removeprefix("torch.")
    return Check(f"{device} {short}", "ok" if ratios[name] <= 1.0 else "FAIL", detail)


def _check_results(known: dict[str, Any]) -> Iterator[Check]:
    pairs = dict.fromkeys((row["device"], row["dtype"]) for row in known["kernels"])
    for device, dtype in pairs:
        if device == "cuda" and not known["gpus"]:
            continue
        try:
            yield _self_test(device, getattr(torch, dtype), flash_attention)
        except NotImplementedError as error:  # a GPU that no kernel runs on: the others are checked all the same
            yield Check(f"{device} {dtype}", "FAIL", str(error))
    if known["gpus"] and known["build"].get("cuda") and all(device != "cuda" for device, _ in pairs):
        yield Check("cuda attention", "skip", "supported_kernels() lists no CUDA kernel; calls on CUDA tensors raise")


class _Operators(TorchDispatchMode):
    """Notes which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def _check_replace_sdpa() -> Iterator[Check]:
    before = F.scaled_dot_product_attention
    q, k, v = (torch.randn(1, 2, 16, 32, generator=torch.Generator().manual_seed(i)) for i in range(3))
    expected = before(q, k, v, is_causal=True)
    with replace_sdpa(), _Operators() as operators:
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    ran = "flash_attn_ext::fwd" in operators.names
    close = torch.allclose(found, expected, atol=1e-5)
    restored = F.scaled_dot_product_attention is before
    wrong = [
        text
        for good, text in (
            (ran, "our operator did not run"),
            (close, "the result differs from PyTorch's"),
            (restored, "PyTorch's function was not restored"),
        )
        if not good
    ]
    detail = "; ".join(wrong) or "F.scaled_dot_product_attention ran our operator, agreed, and is PyTorch's again"
    yield Check("replace_sdpa", "FAIL" if wrong else "ok", detail)


def checks(known: dict[str, Any]) -> list[Check]:
    """All checks. One that raises is a failed one: its exception is the detail."""
    results: list[Check] = []
    for name, check in (
        ("versions", lambda: _check_versions(known)),
        ("sources", lambda: _check_sources(known)),
        ("GPU", lambda: _check_gpus(known)),
        ("core on CUDA", lambda: _check_core_on_cuda(known)),
        ("results", lambda: _check_results(known)),
        ("replace_sdpa", _check_replace_sdpa),
    ):
        try:
            results.extend(check())
        except Exception as error:  # the doctor reports what is broken, whatever it is
            results.append(Check(name, "FAIL", f"{type(error).__name__}: {error}"))
    return results


# ---- report ----------------------------------------------------------------------------------------------------------


def _sections(known: dict[str, Any]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    versions, build, cpu = known["versions"], known["build"], known["cpu"]
    yield "versions", [(name.replace("_", " "), str(value)) for name, value in versions.items() if value is not None]
    cuda = f"CUDA {build.get('cuda_version', '')} for {build['cuda_archs']}" if build.get("cuda") else "CPU only"
    yield (
        "build",
        [
            ("torch", str(build.get("torch"))),
            ("kind", f"{cuda} ({build.get('cuda_reason', 'reason not recorded')})"),
            ("compiler", str(build.get("compiler"))),
            ("python", str(build.get("python", "not recorded"))),
            ("flags", " ".join(build.get("cxx_flags", []))),
            ("sources", str(build.get("csrc_sha256", "not recorded"))[:16]),
        ],
    )
    bf16 = "native bf16 products" if cpu["bf16_gemm"] else "no bf16 products on this CPU: converted to fp32"
    yield (
        "CPU",
        [
            ("model", f"{cpu['model']}, {cpu['cores']} cores, PyTorch uses {cpu['threads']} threads"),
            ("kernels", f"{cpu['isa']} (PyTorch: {cpu['torch_isa']})"),
            ("bf16", bf16),
        ],
    )
    if known["gpus"]:
        yield (
            "GPUs",
            [
                (str(i), f"{g['name']}, {g['capability']}, {g['memory_gib']} GiB, runs {g['runs'] or 'nothing'}")
                for i, g in enumerate(known["gpus"])
            ],
        )


def _print_plain(known: dict[str, Any], results: list[Check]) -> None:
    for title, lines in _sections(known):
        width = max(len(name) for name, _ in lines)
        print(f"{title}\n" + "\n".join(f"  {name:<{width}}  {value}" for name, value in lines) + "\n")
    print("kernels\n  " + kernel_table.plain(known["kernels"]).replace("\n", "\n  ") + "\n")
    width = max(len(check.name) for check in results)
    print("checks\n" + "\n".join(f"  {c.status:<4}  {c.name:<{width}}  {c.detail}" for c in results))


def _print_rich(known: dict[str, Any], results: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for title, lines in _sections(known):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in lines:
            table.add_row(Text(name), Text(value))
        console.print(table, "")
    table = Table(title="kernels", title_justify="left")
    for name in kernel_table._HEADER:
        table.add_column(name)
    for row in kernel_table.table_rows(known["kernels"]):
        table.add_row(*map(Text, row))
    console.print(table, "")
    colours = {"ok": "green", "FAIL": "bold red", "warn": "yellow", "skip": "dim"}
    table = Table(title="checks", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for check in results:
        table.add_row(Text(check.status, style=colours[check.status]), Text(check.name), Text(check.detail))
    console.print(table)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``doctor`` on a parser."""
    parser.description = (
        "What is installed, how the binary was built (and why for the CPU only, if so), what it runs here; then a "
        "self-test of about a second. Exit status 1 if a check fails. Paste its output into a bug report."
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--plain", action="store_true", help="no colours or boxes, also where rich is installed")


def run(args: argparse.Namespace) -> int:
    """Print facts and checks. 1 if a check failed."""
    known = facts()
    results = checks(known)
    failed = [check.name for check in results if check.status == "FAIL"]
    if args.json:
        print(json.dumps({"healthy": not failed, **known, "checks": [asdict(check) for check in results]}, indent=2))
        return 1 if failed else 0
    has_rich = False
    if not args.plain and sys.stdout.isatty():
        try:
            import rich  # noqa: F401

            has_rich = True
        except ImportError:
            pass
    (_print_rich if has_rich else _print_plain)(known, results)
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nall is well")
    return 1 if failed else 0
