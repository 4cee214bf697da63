"""The same bits from run to run, at any number of threads, from any thread, whatever the workspace held before.

Instruction sets may round differently: each is right by the rule of tolerance.py, and reproducible in itself.
"""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import harness
import pytest
import torch
from cases import HEAD_DIMS, Case
from torch import Tensor

from flash_attn_ext import explain, supported_kernels

THREADS = (1, 2, 3, 5)
RUNS = 10
SCHEDULES = {"heads": "one task per key/value head", "squares": "Latin rectangle over row and key chunks"}
# B * Hk = 1 leaves the backward one head, and with more threads than that only the Latin rectangle; 4 and 6 heads
# divide by some of THREADS and not by others, so that both schedules are taken.
SHAPES = {
    "one_head": Case(600, 700, 64, causal=True),
    "one_head_wide": Case(300, 520, 160, head_dim_v=72),
    "mqa": Case(330, 290, 40, heads=3, heads_kv=1, window=(100, 40)),
    "four_heads": Case(300, 270, 64, batch=2, heads=4, heads_kv=2, causal=True, layout="strided"),
    "six_heads": Case(140, 300, 33, batch=3, heads=2, heads_kv=2),
}
CASES = [pytest.param(c, id=name) for name, c in SHAPES.items()]


def everything(case: Case) -> dict[str, Tensor]:
    """All results of one case: both forwards, and the backward of both out and lse."""
    results = {f"v2_{name}": t for name, t in harness.run_forward(case, "cpu").items()}
    results |= {f"v1_{name}": t for name, t in harness.run_forward(case, "cpu", 1).items()}
    return results | harness.run_backward(case, "cpu", deterministic=True)


def assert_same_bits(ours: dict[str, Tensor], expected: dict[str, Tensor], when: str) -> None:
    for name, result in ours.items():
        # torch.equal holds NaN unequal and -0 equal to 0, so the bytes are compared.
        same = torch.equal(result.contiguous().view(torch.uint8), expected[name].contiguous().view(torch.uint8))
        assert same, f"{name} differs {when}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_thread_counts(case, dtype):
    case = Case(**{**case.__dict__, "dtype": dtype})
    expected = None
    for count in THREADS:
        with harness.threads(count):
            assert torch.get_num_threads() == count
            results = everything(case)
        expected = results if expected is None else expected
        assert_same_bits(results, expected, f"between {THREADS[0]} and {count} threads")


def test_the_shapes_take_both_schedules():
    """Else the test above says nothing about one of them."""
    taken = set()
    for (name, case), count in itertools.product(SHAPES.items(), THREADS):
        x = harness.inputs_of(case)
        with harness.threads(count):
            plan = explain(x.q, x.k, x.v)["bwd"]
        taken.add((name, plan["schedule"]))
    both = {name for name in SHAPES if {(name, schedule) for schedule in SCHEDULES.values()} <= taken}
    assert {"one_head", "one_head_wide", "mqa", "four_heads", "six_heads"} == both


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_repeated_calls(dtype, head_dim):
    """At every head dimension, with several threads, so that who takes which task changes from run to run."""
    case = Case(130, 300, head_dim, batch=1, heads=3, heads_kv=3, causal=True, dtype=dtype)
    with harness.threads(2):
        expected = everything(case)
        for run in range(RUNS - 1):
            assert_same_bits(everything(case), expected, f"in run {run + 2}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_what_memory_held_before_does_not_matter(case, dtype):
    case = Case(**{**case.__dict__, "dtype": dtype})
    expected = everything(case)
    with harness.poisoned_memory():
        assert_same_bits(everything(case), expected, "in poisoned memory")


def test_concurrent_calls():
    """Several Python threads at once, each in its own order: no call's scratch is another's."""
    wanted = [Case(**{**case.__dict__, "dtype": d}) for case in SHAPES.values() for d in ("float32", "bfloat16")]
    with harness.threads(2):
        expected = [everything(case) for case in wanted]
        workers, rounds = 4, 3
        start = threading.Barrier(workers)

        def work(worker: int) -> int:
            start.wait(timeout=60)
            for step in range(rounds * len(wanted)):
                i = (step * (2 * worker + 1) + worker) % len(wanted)  # each in another order
                assert_same_bits(everything(wanted[i]), expected[i], f"in thread {worker} at step {step}")
            return worker

        with ThreadPoolExecutor(workers) as pool:
            assert sorted(pool.map(work, range(workers))) == list(range(workers))


def test_concurrent_calls_on_the_same_tensors():
    """Inputs are only read, and one graph may be walked by several threads."""
    case = SHAPES["four_heads"]
    x = harness.inputs_of(case, requires_grad=True)
    leaves = list(x.leaves.values())
    out, lse = harness.flash_attention(x.q, x.k, x.v, **x.kwargs, return_lse=True)
    expected = harness.run_backward(case, "cpu")

    def work(_: int) -> dict[str, Tensor]:
        grads = torch.autograd.grad((out, lse), leaves, (x.dout, x.dlse), retain_graph=True)
        return dict(zip(x.leaves, grads, strict=True))

    with ThreadPoolExecutor(3) as pool:
        for grads in pool.map(work, range(12)):
            assert_same_bits(grads, expected, "in another thread")


# A process takes its instruction set at its first call and keeps it.
IN_ONE_PROCESS = """
import torch, harness, test_determinism as t
from dataclasses import replace
from cases import Case
from flash_attn_ext import build_info
print("isa", build_info()["cpu_isa"], "bf16", build_info()["cpu_bf16_gemm"])
for dtype in ("float32", "bfloat16", "float16", "float64"):
    for case in (
        Case(113, 203, 64, batch=2, heads=2, heads_kv=1, causal=True, dtype=dtype),
        Case(130, 300, 59, head_dim_v=33, window=(70, 30), layout="misaligned", dtype=dtype),
        Case(70, 140, 160, dtype=dtype),
        Case(1, 147, 16, heads=4, heads_kv=2, dtype=dtype),
    ):
        with harness.poisoned_memory():
            harness.check_forward(case)
            if harness.v1_takes(case):
                harness.check_forward(case, version=1)
            harness.check_backward(case)
    case = replace(t.SHAPES["four_heads"], dtype=dtype)
    with harness.threads(1):
        expected = t.everything(case)
    with harness.threads(3):
        t.assert_same_bits(t.everything(case), expected, "between 1 and 3 threads")
print("all right")
"""
ISAS = ("default", "avx2", "avx512")


@pytest.mark.parametrize("wanted", ISAS)
def test_instruction_sets(wanted):
    here = ISAS.index(supported_kernels()[0]["arch"])
    if ISAS.index(wanted) > here:
        pytest.skip(f"this CPU, or ATEN_CPU_CAPABILITY, has {ISAS[here]} at most")
    said = harness.run_python(IN_ONE_PROCESS, ATEN_CPU_CAPABILITY=wanted)
    assert f"isa {wanted} " in said and "all right" in said


def test_without_bf16_instructions():
    """oneDNN told that there are none: bfloat16 goes through fp32 products."""
    said = harness.run_python(IN_ONE_PROCESS, ONEDNN_MAX_CPU_ISA="AVX2")
    assert "bf16 False" in said and "all right" in said
