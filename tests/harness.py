"""What the numerics tests share: run a case, get its oracle and what plain PyTorch gives, compare. See tolerance.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cases
import pytest
import torch
from cases import Case
from tolerance import assert_close_to_oracle, cancellation_atol, oracle_in_blocks
from torch import Tensor

import flash_attn_ext
from flash_attn_ext import flash_attention, flash_attention_v1, naive_attention

TESTS = Path(__file__).resolve().parent
ops = torch.ops.flash_attn_ext
KERNELS = flash_attn_ext.supported_kernels()
ORACLE_BLOCKS_FROM = 2**22  # scores of one head; larger ones go through the oracle in blocks of rows
SMALL_ROWS = 2048  # query rows over all heads: below, the largest error of naive is a small sample
SEED = 7  # of dropout
UNIT = 2.0**-24  # half a unit in the last place of fp32

# What a case may ask for, in the registry's words. Every kernel has scale.
_FEATURE_OF_VARIANT = {name: name for name in ("head_dim_v", "softcap", "alibi", "mask", "bias", "dropout")}


# ---- which cases run where -------------------------------------------------------------------------------------------


def features_of(case: Case) -> set[str]:
    """What a kernel needs besides lse to run this case, as supported_kernels() names it."""
    features = {_FEATURE_OF_VARIANT[name] for name in case.variants if name != "scale"}
    features |= {"causal"} if case.causal else set()
    features |= {"window"} if case.window is not None else set()
    features |= {"gqa"} if case.heads != case.heads_kv else set()
    features |= {"strides"} if case.layout != "contiguous" else set()
    return features | ({"causal_align"} if case.causal_align == "top-left" else set())


def has_kernel(case: Case, device: str, pass_: str, version: int = 2) -> bool:
    """Whether a row of the registry covers this case."""
    return any(
        (row["device"], row["pass"], row["version"], row["dtype"]) == (device, pass_, version, case.dtype)
        and (row["head_dim_max"] is None or max(case.head_dim, case.dim_v) <= row["head_dim_max"])
        and features_of(case) <= set(row["features"])
        for row in KERNELS
    )


def v1_takes(case: Case) -> bool:
    """Whether the options of flash_attention_v1 can say this case."""
    return case.window is None and case.causal_align == "bottom-right" and case.variants <= {"scale", "head_dim_v"}


def _on_cpu(case: Case) -> Case:
    """Large fp16 cases in bf16: PyTorch's own products, of which the tolerance is made, are slow in fp16 on a CPU."""
    return replace(case, dtype="bfloat16") if case.dtype == "float16" and case.work > 2**29 else case


def on_devices(wanted: Iterable[Case], pass_: str, version: int = 2) -> list[Any]:
    """(device, case) for ``parametrize("device, case", ..., indirect=["device"])``.

    A variant that no kernel of a device has yet gives no test there: the case list is longer than any one version. On
    CUDA without any kernel all cases stay, so that the skip can say why.
    """
    wanted, params = list(wanted), []
    for device in ("cpu", "cuda"):
        registered = any(row["device"] == device for row in KERNELS)
        for case in dict.fromkeys(map(_on_cpu, wanted)) if device == "cpu" else wanted:
            if device == "cuda" and case.dtype == "float64":
                continue
            known = has_kernel(case, device if registered else "cpu", pass_, version)
            if known:
                marks = [pytest.mark.gpu] if device == "cuda" else []
                params.append(pytest.param(device, case, id=f"{device}-{case.id}", marks=marks))
    return params


# ---- running ---------------------------------------------------------------------------------------------------------


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN, for integer dtypes all ones (bytes: 0xff, which is NaN too in every float of the engine).

    That holds for outputs and workspaces alike, since the engine takes both from at::empty. What PyTorch itself has no
    deterministic version of only warns.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu") -> Tensor:
    """Standard normal from a CPU generator: the same values on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of lse and dlse."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    kwargs: dict[str, Any]
    dout: Tensor
    dlse: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gradients are taken of, by the gradient's name."""
        leaves = {"dq": self.q, "dk": self.k, "dv": self.v}
        return leaves | ({"dbias": self.kwargs["bias"]} if "bias" in self.kwargs else {})


def inputs_of(case: Case, device: str = "cpu", seed: int = 0, requires_grad: bool = False) -> Inputs:
    """The arguments of a case and the gradients of its results, all of them views in NaN."""
    q, k, v = cases.make_inputs(case, device, seed, requires_grad)
    kwargs = cases.make_kwargs(case, device, seed, requires_grad)
    shape = (case.batch, case.heads, case.seqlen_q)
    layout = "contiguous" if case.layout == "expanded" else case.layout
    dout = cases.poisoned(randn(*shape, case.dim_v, dtype=case.torch_dtype, seed=seed + 11, device=device), layout)
    dlse = randn(*shape, dtype=stats_dtype(case.torch_dtype), seed=seed + 12, device=device)
    return Inputs(q, k, v, kwargs, dout, cases.poisoned(dlse.unsqueeze(2), layout).squeeze(2))


def run_forward(case: Case, device: str, version: int = 2, block: tuple[int, int] = (0, 0)) -> dict[str, Tensor]:
    """out and lse of the engine. Version 1 and tiles go through the operators, which return lse for both versions."""
    x = inputs_of(case, device)
    torch.manual_seed(SEED)
    if version == 2 and block == (0, 0):
        out, lse = flash_attention(x.q, x.k, x.v, **x.kwargs, return_lse=True)
    else:
        out, lse = run_operator(case, x, version, block)
    return {"out": out, "lse": lse}


def run_operator(case: Case, x: Inputs, version: int, block: tuple[int, int] = (0, 0)) -> tuple[Tensor, Tensor]:
    op = ops.fwd_v1 if version == 1 else ops.fwd
    return op(x.q, x.k, x.v, case.scale, *operator_window(case), case.causal_align == "top-left", None, *block)


def operator_window(case: Case) -> tuple[int, int]:
    """(window_left, window_right) as the operators take them: -1 is open."""
    left, right = (-1 if x is None else x for x in case.window or (None, None))
    return left, 0 if case.causal else right


def run_backward(
    case: Case, device: str, version: int = 2, deterministic: bool | None = None, attention: Callable | None = None
) -> dict[str, Tensor]:
    """Gradients of ``<out, dout> + <lse, dlse>`` through autograd, by name; version 1 has no lse to differentiate."""
    x = inputs_of(case, device, requires_grad=True)
    leaves = x.leaves
    torch.manual_seed(SEED)
    if version == 1:
        out = flash_attention_v1(x.q, x.k, x.v, case.scale, case.causal)
        grads = torch.autograd.grad(out, list(leaves.values()), x.dout)
    else:
        extra = {} if attention is not None else {"deterministic": deterministic}
        results = (attention or flash_attention)(x.q, x.k, x.v, **x.kwargs, return_lse=True, **extra)
        grads = torch.autograd.grad(results, list(leaves.values()), (x.dout, x.dlse))
    return dict(zip(leaves, grads, strict=True))


# ---- oracle and comparison -------------------------------------------------------------------------------------------


class Expected(NamedTuple):
    ref: dict[str, Tensor]
    naive: dict[str, Tensor]
    zero_atol: dict[str, float]  # what cancellation leaves of a gradient that is exactly zero: tolerance.py
    largest_lse: float  # in absolute value: the size of the scores
    score_rounding: float  # of scale * <q, k> in fp32
    cancellation: dict[str, float]  # of scale * (dP - delta) times k or q in fp32


def _oracle_dtype(case: Case) -> torch.dtype:
    return torch.float32 if case.torch_dtype.itemsize == 2 else torch.float64


@lru_cache(maxsize=2)  # the versions and tiles of one case run one after the other
def expected_forward(case: Case, device: str) -> Expected:
    x = inputs_of(case, device)

    def naive(**upcast: bool) -> dict[str, Tensor]:
        torch.manual_seed(SEED)
        out, lse = naive_attention(x.q, x.k, x.v, **x.kwargs, return_lse=True, **upcast)
        return {"out": out, "lse": lse}

    if case.seqlen_q * case.seqlen_k < ORACLE_BLOCKS_FROM:
        ref = naive(upcast=True)
    else:
        ref = oracle_in_blocks(x.q, x.k, x.v, **_geometry(case), dtype=_oracle_dtype(case))
    naive_results = ref if case.dtype == "float64" else naive()
    return Expected(ref, naive_results, {}, _largest_lse(case, x), abs(_scale(case)) * _dot_rounding(x.q, x.k), {})


def _longest(t: Tensor) -> float:
    """The largest norm of a row."""
    return float(torch.linalg.vector_norm(t.detach().double(), dim=-1).max()) if t.numel() else 0.0


def _dot_rounding(a: Tensor, b: Tensor) -> float:
    """The size of the error of <a_i, b_j> in fp32, by the random walk of D roundings at the size of |a| |b|."""
    return UNIT * a.shape[-1] ** 0.5 * _longest(a) * _longest(b)


def _scale(case: Case) -> float:
    return case.head_dim**-0.5 if case.scale is None else case.scale


def _largest_lse(case: Case, x: Inputs) -> float:
    """Only small problems ask for it."""
    if case.batch * case.heads * case.seqlen_q >= SMALL_ROWS:
        return 0.0
    with torch.no_grad():
        lse = naive_attention(x.q, x.k, x.v, **x.kwargs, return_lse=True, upcast=True)[1]
    return float(lse.masked_fill(~lse.isfinite(), 0.0).abs().max()) if lse.numel() else 0.0


def _geometry(case: Case) -> dict[str, Any]:
    return {name: getattr(case, name) for name in ("scale", "causal", "causal_align", "window", "softcap")}


@lru_cache(maxsize=2)
def expected_backward(case: Case, device: str, with_lse: bool = True) -> Expected:
    x = inputs_of(case, device, requires_grad=True)
    leaves = x.leaves

    def naive(**upcast: bool) -> dict[str, Tensor]:
        torch.manual_seed(SEED)
        out, lse = naive_attention(x.q, x.k, x.v, **x.kwargs, return_lse=True, **upcast)
        results, grads = ((out, lse), (x.dout.to(out.dtype), x.dlse.to(lse.dtype))) if with_lse else (out, x.dout)
        if not with_lse:
            grads = grads.to(out.dtype)
        return dict(zip(leaves, torch.autograd.grad(results, list(leaves.values()), grads), strict=True))

    if case.seqlen_q * case.seqlen_k < ORACLE_BLOCKS_FROM and case.torch_dtype.itemsize > 2:
        ref = naive(upcast=True)
    elif case.seqlen_q * case.seqlen_k < ORACLE_BLOCKS_FROM:
        ref = _upcast_leaves_backward(case, x, with_lse)
    else:
        dlse = x.dlse if with_lse else None
        ref = oracle_in_blocks(x.q, x.k, x.v, x.dout, dlse, **_geometry(case), dtype=_oracle_dtype(case))
    scale = _scale(case)
    rows = case.seqlen_q * (case.heads // case.heads_kv)
    zero_atol = {
        "dq": cancellation_atol(x.v, x.dout, x.k, scale=scale),
        "dk": cancellation_atol(x.v, x.dout, x.q, scale=scale, rows=rows),
    }
    difference = abs(scale) * _dot_rounding(x.dout, x.v)
    cancellation = {
        "dq": difference * (float(x.k.detach().abs().max()) if x.k.numel() else 0.0),
        "dk": difference * (float(x.q.detach().abs().max()) if x.q.numel() else 0.0) * max(rows, 1) ** 0.5,
    }
    naive_results = ref if case.dtype == "float64" else naive()
    score_rounding = abs(scale) * _dot_rounding(x.q, x.k)
    return Expected(ref, naive_results, zero_atol, _largest_lse(case, x), score_rounding, cancellation)


def _upcast_leaves_backward(case: Case, x: Inputs, with_lse: bool) -> dict[str, Tensor]:
    """The oracle's gradients in its own dtype: through leaves of 16 bits autograd would round them to 16 bits."""
    wide = {name: t.detach().float().requires_grad_() for name, t in x.leaves.items()}
    kwargs = x.kwargs | ({"bias": wide["dbias"]} if "dbias" in wide else {})
    torch.manual_seed(SEED)
    out, lse = naive_attention(wide["dq"], wide["dk"], wide["dv"], **kwargs, return_lse=True)
    results, grads = ((out, lse), (x.dout.float(), x.dlse)) if with_lse else ((out,), (x.dout.float(),))
    return dict(zip(wide, torch.autograd.grad(results, list(wide.values()), grads), strict=True))


def few_roundings(expected: Expected, name: str, case: Case) -> float:
    """An a-priori bound for problems too small for plain PyTorch to be a yardstick; 0 for all others.

    The rule measures naive's rounding error by its maximum. Over a handful of rows that is luck, and where naive is
    exact (one key, scale 0) the rule leaves nothing for a logarithm. An engine that keeps scores in base 2 rounds the
    score itself (expected.score_rounding: a sum of D products), scale * log2(e), its product with the score, the
    running maximum and maximum * ln(2): four more roundings in fp32 at the size of a score, of which lse is the
    measure. Relative to P that is the same number, and so it is to out. In a gradient P appears once and the
    difference dP - delta, which is rounded again, once: twice as much, and in dq and dk what the cancellation of two
    sums of Dv products leaves (expected.cancellation).
    """
    if case.batch * case.heads * case.seqlen_q >= SMALL_ROWS or case.dtype == "float64":
        return 0.0
    roundings = 4 * UNIT * max(1.0, expected.largest_lse) + expected.score_rounding
    if name == "lse":
        return roundings
    size = float(expected.ref[name].abs().max())
    return roundings * size if name == "out" else 2 * roundings * size + expected.cancellation.get(name, 0.0)


def compare(ours: Mapping[str, Tensor], expected: Expected, case: Case) -> None:
    """Every result by the rule of tolerance.py; where the problem is small, few_roundings() is enough as well."""
    for name, result in ours.items():
        ref, naive = expected.ref[name], expected.naive[name].to(result.dtype)
        floor = few_roundings(expected, name, case)
        if floor > 0.0 and result.shape == ref.shape and result.numel() > 0:
            finite = ref.isfinite()  # elsewhere infinities have to agree: equal signs, no NaN
            difference = (result.double() - ref.double()).abs()[finite]
            if torch.equal(result[~finite].double(), ref[~finite].double()) and bool((difference <= floor).all()):
                continue
        kind = "output" if name in ("out", "lse") else "gradient"
        zero_atol = expected.zero_atol.get(name, 0.0)
        assert_close_to_oracle(result, ref, naive, kind=kind, name=name, zero_atol=zero_atol)


def check_forward(case: Case, device: str = "cpu", version: int = 2, block: tuple[int, int] = (0, 0)) -> None:
    compare(run_forward(case, device, version, block), expected_forward(case, device), case)


def check_backward(case: Case, device: str = "cpu", version: int = 2, deterministic: bool | None = None) -> None:
    grads = run_backward(case, device, version, deterministic)
    assert all(g.dtype == case.torch_dtype for g in grads.values())
    compare(grads, expected_backward(case, device, version != 1), case)


# ---- other processes -------------------------------------------------------------------------------------------------


def run_python(code: str, timeout: float = 120, **environment: str) -> str:
    """Run ``code`` in a fresh interpreter that sees this package and tests/; its output, or AssertionError with it."""
    package = str(Path(flash_attn_ext.__file__).resolve().parents[1])
    paths = [str(TESTS), package, os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | environment,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout
