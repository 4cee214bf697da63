"""Memory is linear in the sequence, is what the plan says, is seen by PyTorch's profiler, and comes back.

Peaks are measured with ``torch.profiler``: the largest sum of what had been taken and not yet returned, over the
allocator's own records.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import harness
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from flash_attn_ext import explain, flash_attention, flash_attention_v1, flash_attention_v2, naive_attention
from flash_attn_ext._binary import _C

D = 64
SLACK = 4096  # bytes: small change of autograd or of a later engine, and a thousandth of the smallest S x S here
SEQLENS = (1024, 2048, 4096)
DTYPES = ("float32", "bfloat16", "float16", "float64")


class Usage(NamedTuple):
    peak: int  # bytes above what was held before the call; results included
    kept: int  # bytes still held when the call has returned
    allocations: list[int]
    results: Any


def measure(function: Callable[[], Any]) -> Usage:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        results = function()
    records = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    records.sort(key=lambda e: e.start_ns())
    held = peak = 0
    for record in records:
        held += record.nbytes()
        peak = max(peak, held)
    return Usage(peak, held, [e.nbytes() for e in records if e.nbytes() > 0], results)


def bytes_of(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def make(seqlen: int, heads: int = 1, heads_kv: int | None = None, dtype: str = "float32", grad: bool = False) -> Any:
    shapes = (heads, *(heads if heads_kv is None else heads_kv,) * 2)
    for seed, h in enumerate(shapes):
        yield harness.randn(1, h, seqlen, D, dtype=getattr(torch, dtype), seed=seed).requires_grad_(grad)


def plan_of(q: Tensor, k: Tensor, v: Tensor, pass_: str, version: int = 2) -> dict[str, Any]:
    return _C.plan(
        pass_=pass_,
        version=version,
        dtype=str(q.dtype).removeprefix("torch."),
        batch=q.shape[0],
        heads=q.shape[1],
        heads_kv=k.shape[1],
        seqlen_q=q.shape[2],
        seqlen_k=k.shape[2],
        head_dim=q.shape[3],
        head_dim_v=v.shape[3],
        block_m=0,
        block_n=0,
        threads=torch.get_num_threads(),
    )


def measure_forward(q: Tensor, k: Tensor, v: Tensor, version: int = 2, **options: Any) -> Usage:
    op = harness.ops.fwd_v1 if version == 1 else harness.ops.fwd
    return measure(lambda: op(q, k, v, **options))


def measure_backward(q: Tensor, k: Tensor, v: Tensor) -> Usage:
    out = flash_attention(q, k, v)
    dout = torch.ones_like(out)
    return measure(lambda: torch.autograd.grad(out, (q, k, v), dout))


def test_the_measure_sees_a_quadratic_matrix():
    """The yardstick itself: plain PyTorch holds at least one S x S matrix, and four times as much at twice S."""
    peaks = [measure(lambda s=s: naive_attention(*make(s))).peak for s in (512, 1024)]
    assert peaks[1] >= 1024 * 1024 * 4 and peaks[1] > 3.5 * peaks[0]


# ---- peaks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("pass_", ["fwd", "fwd_v1", "bwd"])
def test_peak_is_linear_in_the_sequence(pass_, heads):
    peaks = []
    for seqlen in SEQLENS:
        q, k, v = make(seqlen, heads, grad=pass_ == "bwd")
        with torch.set_grad_enabled(pass_ == "bwd"):
            if pass_ == "bwd":
                usage, plan = measure_backward(q, k, v), plan_of(q, k, v, "bwd")
            else:
                version = 1 if pass_ == "fwd_v1" else 2
                usage, plan = measure_forward(q, k, v, version), plan_of(q, k, v, "fwd", version)
        expected = bytes_of(*usage.results) + plan["workspace_bytes"]
        assert expected <= usage.peak <= expected + SLACK
        peaks.append(usage.peak)
    for shorter, longer in itertools.pairwise(peaks):
        assert 1.3 < longer / shorter < 2.05  # below 2 by the scratch of a thread, which does not grow
    assert peaks[2] - peaks[1] < 2.05 * (peaks[1] - peaks[0])  # nor does what grows grow faster than the sequence
    assert peaks[-1] < heads * SEQLENS[-1] ** 2 * 4 / 7


@pytest.mark.parametrize("threads", [1, 2, 3, 64])
@pytest.mark.parametrize("pass_, version", [("fwd", 1), ("fwd", 2), ("bwd", 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_plans_are_linear_up_to_a_hundred_million_positions(dtype, pass_, version, threads):
    def workspace(seqlen: int, **sizes: int) -> int:
        call = {"batch": 1, "heads": 1, "heads_kv": 1, "head_dim": D, "head_dim_v": D} | sizes
        lengths = {"seqlen_q": seqlen, "seqlen_k": seqlen, "block_m": 0, "block_n": 0, "threads": threads}
        return _C.plan(pass_=pass_, version=version, dtype=dtype, **call, **lengths)["workspace_bytes"]

    long = [workspace(2**n) for n in range(20, 28)]
    for shorter, longer in itertools.pairwise(long):
        assert shorter <= longer <= 2 * shorter
    # Per position: at most fp32 (fp64) copies of what one position of q, k, v has, and its statistics.
    itemsize = 8 if dtype == "float64" else 4
    per_position = itemsize * (3 * D + 4) * (threads if pass_ == "bwd" and threads == 1 else 1)
    assert long[-1] - long[-2] <= 2**26 * per_position
    if pass_ == "fwd" and version == 2:
        assert long[-1] == long[0]  # nothing grows
        assert workspace(2**20, heads=64, heads_kv=8) <= threads * long[0]


@pytest.mark.parametrize("heads, heads_kv", [(1, 1), (6, 2), (8, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_workspace_is_the_plans_and_the_profiler_sees_it(dtype, heads, heads_kv, threads):
    """One allocation of exactly the planned size for each pass, and no other that is not a result."""
    with harness.threads(threads):
        q, k, v = make(300, heads, heads_kv, dtype, grad=True)
        told = explain(q, k, v)
        for version in (1, 2):
            with torch.no_grad():
                usage, plan = measure_forward(q, k, v, version), plan_of(q, k, v, "fwd", version)
            results = [bytes_of(t) for t in usage.results]
            assert sorted(usage.allocations) == sorted([*results, plan["workspace_bytes"]])
            assert version == 1 or plan["workspace_bytes"] == told["fwd"]["workspace_bytes"]
        backward = measure_backward(q, k, v)
    # dk and dv at their own number of heads: no expanded copies under GQA.
    gradients = [bytes_of(t) for t in (q, k, v)]
    assert sorted(backward.allocations) == sorted([*gradients, told["bwd"]["workspace_bytes"]])


@pytest.mark.parametrize("causal", [False, True])
def test_the_functions_allocate_what_the_operators_do(causal):
    """Nothing in Python on the way, with and without a graph."""
    q, k, v = make(300, 2)
    window_right = 0 if causal else -1
    for version, function in ((1, flash_attention_v1), (2, flash_attention), (2, flash_attention_v2)):
        expected = sorted(measure_forward(q, k, v, version, window_right=window_right).allocations)
        for grad in (False, True):
            leaves = [t.detach().requires_grad_(grad) for t in (q, k, v)]
            assert sorted(measure(lambda f=function, x=leaves: f(*x, causal=causal)).allocations) == expected


def test_options_take_no_memory():
    """A mask is two numbers: no Sq x Sk tensor of bools anywhere."""
    q, k, v = make(1024)
    plain = measure_forward(q, k, v).peak
    for window in ((-1, 0), (100, 0), (50, 60)):
        options = {"window_left": window[0], "window_right": window[1], "top_left": True}
        assert measure_forward(q, k, v, **options).peak == plain


def test_only_a_scattered_last_dimension_costs_a_copy():
    """Any other strides are read as they stand."""
    q, k, v = make(512, 4)
    plain = measure_forward(q, k, v).peak
    transposed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert measure_forward(*transposed).peak == plain
    expanded = [t[:, :1].expand(1, 4, 512, D) for t in (k, v)]
    assert measure_forward(q, *expanded).peak == plain
    scattered = k.mT.contiguous().mT
    assert explain(q, scattered, v)["copied_to_contiguous"] == ["k"]
    assert plain + bytes_of(k) <= measure_forward(q, scattered, v).peak <= plain + bytes_of(k) + SLACK


# ---- what stays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_a_call_keeps_its_results_alone(version):
    q, k, v = make(256, 2)
    usage = measure_forward(q, k, v, version)
    assert usage.kept == bytes_of(*usage.results)
    assert usage.allocations and usage.peak > usage.kept


def test_nothing_is_left_after_fifty_calls():
    """By the allocator's records: all that was taken has been returned."""
    q, k, v = make(200, 2, grad=True)

    def calls() -> None:
        for _ in range(50):
            flash_attention(q, k, v, causal=True, return_lse=True)
            out = flash_attention_v1(q, k, v)
            torch.autograd.grad(out, (q, k, v), out.detach())

    calls()
    usage = measure(calls)
    assert usage.kept == 0 and len(usage.allocations) >= 50 * 6


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_the_process_does_not_grow():
    """What no allocator records: threads' lists, kernels that oneDNN generates, Python objects."""
    q, k, v = make(256, 2, grad=True)
    workspace = explain(q, k, v)["bwd"]["workspace_bytes"]

    def calls(count: int) -> None:
        for _ in range(count):
            out = flash_attention(q, k, v)
            torch.autograd.grad(out, (q, k, v), out.detach())

    calls(20)  # kernels, pools, the allocator's caches
    before = resident()
    calls(50)
    assert resident() - before < 10 * workspace  # a lost one per call would be fifty


@pytest.mark.parametrize("function", [flash_attention, flash_attention_v1])
def test_a_graph_that_is_dropped_is_freed_at_once(function):
    """No cycle: it does not wait for the garbage collector."""
    q, k, v = make(64, grad=True)
    gc.collect()
    gc.disable()
    try:
        out = function(q * 1.0, k, v)
        saved = weakref.ref(out.grad_fn)
        out.sum().backward()
        del out
        assert saved() is None
    finally:
        gc.enable()


def saved_for_backward(function: Callable[..., Any], *leaves: Tensor) -> tuple[Any, list[Tensor]]:
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        results = function(*leaves)
    return results, saved


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_graph_saves_q_k_v_out_and_lse(dtype):
    """And nothing else, and no copy of them."""
    q, k, v = make(300, 4, 2, dtype, grad=True)
    (out, lse), saved = saved_for_backward(lambda *x: flash_attention(*x, causal=True, return_lse=True), q, k, v)
    expected = [q, k, v, out, lse]
    assert len(saved) == 5
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in expected}
    assert bytes_of(*saved) == bytes_of(*expected)


def test_the_graph_of_version_1_saves_as_much():
    q, k, v = make(300, 4, 2, grad=True)
    out, saved = saved_for_backward(flash_attention_v1, q, k, v)
    lse = [t for t in saved if t.shape == out.shape[:-1]]
    assert len(saved) == 5 and len(lse) == 1
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (q, k, v, out, lse[0])}


def test_nothing_is_saved_where_no_gradient_is_wanted():
    q, k, v = make(64)
    assert saved_for_backward(flash_attention, q, k, v)[1] == []
    with torch.no_grad():
        assert saved_for_backward(flash_attention, *make(64, grad=True))[1] == []
