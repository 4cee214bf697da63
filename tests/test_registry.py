"""supported_kernels() is true: every row runs and is right, feature by feature, and what no row claims raises.

The rows below are read from the binary, so a kernel that is registered later is tested without a change here, and a
feature that has no test here fails.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from cases import DTYPES, Case

import flash_attn_ext
from flash_attn_ext import (
    build_info,
    explain,
    flash_attention,
    flash_attention_v1,
    flash_attention_v2,
    supported_kernels,
)
from flash_attn_ext._binary import _C

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = Path(__file__).resolve().parents[1] / "csrc" / "cpu" / "config.h"
KEYS = {"device", "arch", "pass", "version", "dtype", "operand", "head_dim_max", "features", "tiles"}
TILE_KEYS = {"name", "head_dim_max", "tile", "why"}
CUDA_TILE_KEYS = TILE_KEYS | {"threads", "stages", "shared_bytes", "for_short_problems", "shared_bytes_unasked"}
BASE = Case(113, 203, 40, batch=2, heads=2, heads_kv=2)
# What asks for each feature, and for nothing else besides.
CASES_OF_FEATURE = {
    "causal": replace(BASE, causal=True),
    "causal_align": replace(BASE, causal=True, causal_align="top-left"),
    "window": replace(BASE, window=(37, 21)),
    "gqa": replace(BASE, heads=4),
    "lse": BASE,
    "dlse": BASE,
    "strides": replace(BASE, layout="strided"),
    "head_dim_v": replace(BASE, head_dim_v=24),
    "deterministic": BASE,
}
OPTIONS: dict[str, Any] = {
    "softcap": 2.5,
    "alibi_slopes": torch.ones(2),
    "mask": torch.ones(113, 203, dtype=torch.bool),
    "bias": torch.zeros(113, 203),
    "dropout_p": 0.17,
}
FEATURE_OF_OPTION = {"alibi_slopes": "alibi", "dropout_p": "dropout"}
FUNCTIONS = (flash_attention, flash_attention_v2)


def name_of(row: dict[str, Any]) -> str:
    return f"{row['device']}-{row['pass']}_v{row['version']}-{row['dtype']}"


ROWS = [
    pytest.param(row, id=name_of(row), marks=[pytest.mark.gpu] if row["device"] == "cuda" else [])
    for row in supported_kernels()
]
CPU_ROWS = [row for row in supported_kernels() if row["device"] == "cpu"]


def plan(row: dict[str, Any], **sizes: int) -> dict[str, Any]:
    call = {"batch": 1, "heads": 2, "heads_kv": 1, "seqlen_q": 300, "seqlen_k": 500, "head_dim": 64, "head_dim_v": 64}
    call |= {"block_m": 0, "block_n": 0, "threads": 2} | sizes
    return _C.plan(pass_=row["pass"], version=row["version"], dtype=row["dtype"], **call)


# ---- the list --------------------------------------------------------------------------------------------------------


def test_rows_are_well_formed_and_unique():
    rows = supported_kernels()
    assert rows and all(set(row) == KEYS for row in rows)
    names = [(row["device"], row["arch"], row["pass"], row["version"], row["dtype"]) for row in rows]
    assert len(set(names)) == len(names)
    for row in rows:
        assert row["device"] in ("cpu", "cuda") and row["pass"] in ("fwd", "bwd") and row["version"] in (1, 2)
        assert row["dtype"] in DTYPES and row["operand"] in ("fp16", "bf16", "fp32", "fp64", "tf32")
        assert row["head_dim_max"] is None or row["head_dim_max"] >= 256
        assert len(set(row["features"])) == len(row["features"])
        assert row["tiles"] and all(
            set(tile) == (CUDA_TILE_KEYS if row["device"] == "cuda" else TILE_KEYS) for tile in row["tiles"]
        )
        limits = [tile["head_dim_max"] for tile in row["tiles"]]
        assert row["head_dim_max"] == (None if None in limits else max(limits))
    rows[0]["features"].clear()  # a caller's list is the caller's
    assert supported_kernels()[0]["features"]


def test_the_cpu_has_every_dtype_and_pass():
    """The contract's list, so that a row cannot get lost together with its tests."""
    have = {(row["pass"], row["version"], row["dtype"]) for row in CPU_ROWS}
    assert have == {(p, version, dtype) for p, version in (("fwd", 1), ("fwd", 2), ("bwd", 2)) for dtype in DTYPES}


@pytest.mark.parametrize("row", CPU_ROWS, ids=name_of)
def test_tiles_are_those_that_plans_name(row):
    """The first whose head dimensions reach, as in plan(): the list and the choice cannot drift apart."""
    for tile in row["tiles"]:
        told = plan(row, head_dim=tile["head_dim_max"] or 1000)
        assert (told["kernel"], list(told["tile"]), told["why"]) == (tile["name"], tile["tile"], tile["why"])


def test_every_feature_has_a_case():
    known = set(CASES_OF_FEATURE) | {FEATURE_OF_OPTION.get(name, name) for name in OPTIONS}
    assert {feature for row in supported_kernels() for feature in row["features"]} <= known


# ---- what is claimed runs --------------------------------------------------------------------------------------------


def run_and_check(case: Case, row: dict[str, Any], deterministic: bool | None = None) -> None:
    """Version 1 by its operator, which takes what flash_attention_v1 has no argument for."""
    if row["pass"] == "fwd":
        harness.check_forward(case, row["device"], row["version"])
    else:
        harness.check_backward(case, row["device"], row["version"], deterministic)


@pytest.mark.parametrize("row", ROWS)
def test_every_row_runs(row, poisoned):
    """Plainly, and at its largest head dimension, or where there is none far past what other kernels end at."""
    run_and_check(replace(BASE, dtype=row["dtype"]), row)
    largest = row["head_dim_max"] or 520
    run_and_check(replace(BASE, seqlen_q=20, head_dim=largest, dtype=row["dtype"]), row)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("feature", [name for name in CASES_OF_FEATURE if name not in ("lse", "dlse", "deterministic")])
def test_every_feature_of_every_row(feature, row, poisoned):
    if feature not in row["features"]:
        pytest.skip("not claimed: test_what_no_row_claims_raises")
    case = replace(CASES_OF_FEATURE[feature], dtype=row["dtype"])
    assert harness.features_of(case) <= {feature, "causal"}
    assert harness.has_kernel(case, row["device"], row["pass"], row["version"])
    run_and_check(case, row)


@pytest.mark.parametrize("row", ROWS)
def test_lse_and_its_gradient(row):
    """lse is given and, where dlse is claimed, alone moves q and k by what the oracle says, and v not at all."""
    case = replace(BASE, dtype=row["dtype"], heads=4)
    x = harness.inputs_of(case, row["device"], requires_grad=True)
    op = harness.ops.fwd_v1 if row["version"] == 1 else harness.ops.fwd
    _, lse = op(x.q, x.k, x.v)
    assert "lse" in row["features"] and lse.dtype == harness.stats_dtype(case.torch_dtype)
    assert "dlse" in row["features"]
    dq, dk, dv = torch.autograd.grad(lse, (x.q, x.k, x.v), x.dlse)
    assert not dv.any()
    wide = [t.detach().double().requires_grad_() for t in (x.q, x.k, x.v)]
    _, ref = harness.naive_attention(*wide, return_lse=True)
    expected = torch.autograd.grad(ref, wide[:2], x.dlse.double())
    # lse's gradient is a mean of rows: relative to the largest entry a few roundings of the inputs' dtype.
    for ours, grad in zip((dq, dk), expected, strict=True):
        allowed = 8 * torch.finfo(case.torch_dtype).eps * float(grad.abs().max())
        assert float((ours.double() - grad).abs().max()) <= max(allowed, 1e-12)


@pytest.mark.parametrize("row", [p for p in ROWS if p.values[0]["pass"] == "bwd"])
def test_deterministic_is_claimed_and_kept(row):
    case = replace(BASE, dtype=row["dtype"], heads=4, causal=True)
    assert "deterministic" in row["features"]
    first, second = (harness.run_backward(case, row["device"], deterministic=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    run_and_check(case, row, deterministic=True)


# ---- what is not claimed raises --------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_no_row_claims_raises(dtype, option):
    feature = FEATURE_OF_OPTION.get(option, option)
    if any(feature in row["features"] for row in CPU_ROWS if row["dtype"] == dtype):
        pytest.fail(f"{feature} is claimed now: move it to CASES_OF_FEATURE")
    x = harness.inputs_of(replace(BASE, dtype=dtype))
    for function in FUNCTIONS:
        with pytest.raises(NotImplementedError, match=option):
            function(x.q, x.k, x.v, **{option: OPTIONS[option]})
    told = explain(x.q, x.k, x.v, **{option: OPTIONS[option]})
    assert told["runs"] is False and option in told["why_not"]


UNCLAIMED_DTYPES = sorted(
    {"int32", "int64", "bool", "uint8", "complex64", "float8_e4m3fn", "float16", "bfloat16", "float32", "float64"}
    - {row["dtype"] for row in CPU_ROWS}
)


@pytest.mark.parametrize("dtype", UNCLAIMED_DTYPES)
def test_dtypes_without_a_row_raise(dtype):
    x = torch.zeros(1, 1, 4, 8).to(getattr(torch, dtype))
    for function in (*FUNCTIONS, flash_attention_v1):
        with pytest.raises((TypeError, NotImplementedError), match="float16"):
            function(x, x, x)
    told = explain(x, x, x)
    assert told["runs"] is False and "float16" in told["why_not"]
    with pytest.raises(ValueError, match=dtype):
        plan({"pass": "fwd", "version": 2, "dtype": dtype})


def test_mixed_dtypes_have_no_row():
    x = torch.zeros(1, 1, 4, 8)
    for function in (*FUNCTIONS, flash_attention_v1):
        with pytest.raises(TypeError):
            function(x, x.half(), x.half())


@pytest.mark.parametrize("block", [(16, 64), (64, 16), (48, 64), (64, 160), (256, 256)])
@pytest.mark.parametrize("function", [flash_attention_v1, flash_attention_v2])
def test_tiles_that_are_not_built_raise(function, block):
    x = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match="block_size"):
        function(x, x, x, block_size=block)


def test_devices_without_a_row_raise():
    """The meta device computes shapes alone; explain() says so rather than naming a kernel."""
    x = torch.zeros(1, 1, 4, 8, device="meta")
    assert flash_attention(x, x, x).device.type == "meta"
    told = explain(x, x, x)
    assert told["runs"] is False and "meta" in told["why_not"]


def test_what_explain_runs_runs_and_what_it_does_not_raises():
    """One call after the other: the answer and the function agree."""
    q, k, v = torch.zeros(2, 4, 8, 16), torch.zeros(2, 2, 9, 16), torch.zeros(2, 2, 9, 5)
    good = [{}, {"causal": True}, {"window": (3, None)}, {"scale": 0.0}, {"causal_align": "top-left"}]
    bad = [{"scale": float("inf")}, {"window": 3}, {"causal_align": "middle"}, {"dropout_p": 1.0}, {"softcap": -1.0}]
    for options in good:
        assert explain(q, k, v, **options)["runs"] is True
        flash_attention(q, k, v, **options)
    wrong = [(q, k, v, options) for options in bad] + [(q, k[:, :1], v, {}), (q[0], k, v, {}), (q, k[:1], v, {})]
    for *tensors, options in wrong:
        told = explain(*tensors, **options)
        with pytest.raises((ValueError, TypeError, NotImplementedError)) as raised:
            flash_attention(*tensors, **options)
        assert told["runs"] is False and told["why_not"] == str(raised.value)


# ---- plans and the configuration -------------------------------------------------------------------------------------


def configured() -> dict[str, tuple[float, tuple[int, int]]]:
    """Name: (largest head dimension, tile), as config.h has them."""
    rows = re.findall(r'\{"(cpu_\w+)", ([\w <]+), (\d+), (\d+)', CONFIG.read_text(encoding="utf-8"))
    return {name: (float("inf") if "<<" in largest else int(largest), (int(m), int(n))) for name, largest, m, n in rows}


@pytest.mark.parametrize("row", CPU_ROWS, ids=name_of)
@pytest.mark.parametrize("head_dim", [1, 64, 65, 128, 129, 256, 257, 1000])
def test_plans_name_kernels_of_the_configuration(row, head_dim):
    """Of this pass and version, the first whose head dimensions reach, with its tile; D and Dv count alike."""
    table = configured()
    kind = "bwd" if row["pass"] == "bwd" else "fwd_v1" if row["version"] == 1 else "fwd"
    if kind == "fwd" and row["operand"] == "bf16":
        kind = "fwd_bf16"
    fitting = [
        name
        for name, (largest, _) in table.items()
        if largest >= head_dim and re.fullmatch(rf"cpu_{kind}(_wide|_d\d+)?", name)
    ]
    expected = min(fitting, key=lambda name: table[name][0])
    for dims in ((head_dim, head_dim), (1, head_dim), (head_dim, 1)):
        told = plan(row, head_dim=dims[0], head_dim_v=dims[1])
        assert told["kernel"] == expected and told["tile"] == table[expected][1]
        assert (told["pass"], told["version"], told["dtype"]) == (row["pass"], row["version"], row["dtype"])
        assert (told["device"], told["arch"], told["operand"]) == (row["device"], row["arch"], row["operand"])
        assert told["workspace_bytes"] > 0 and told["why"]


def test_every_kernel_of_the_configuration_is_reached():
    borders = {int(largest) for largest, _ in configured().values() if largest != float("inf")}
    dims = {1, *borders, *(border + 1 for border in borders)}
    reached = {plan(row, head_dim=d, head_dim_v=d)["kernel"] for row in CPU_ROWS for d in dims}
    bf16 = build_info()["cpu_bf16_gemm"]
    assert reached == {name for name in configured() if bf16 or "_bf16_" not in name}
    assert len(configured()) >= 5  # the expression still reads the file


@pytest.mark.parametrize("dtype", DTYPES)
def test_explain_names_rows(dtype):
    """Both passes of a call are rows of the list."""
    x = harness.inputs_of(replace(BASE, dtype=dtype))
    told = explain(x.q, x.k, x.v)
    names = {name_of(row): row for row in CPU_ROWS}
    for pass_ in ("fwd", "bwd"):
        row = names[name_of(told[pass_])]
        assert told[pass_]["kernel"] in configured() and told[pass_]["operand"] == row["operand"]


def test_plans_of_nonsense_raise():
    with pytest.raises(ValueError, match="sideways"):
        plan({"pass": "sideways", "version": 2, "dtype": "float32"})


# ---- the command line ------------------------------------------------------------------------------------------------


def command(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "flash_attn_ext", "kernels", *words],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=True,
        cwd=Path(flash_attn_ext.__file__).resolve().parents[1],
    )
    return done.stdout


def test_the_command_prints_the_same_rows():
    assert json.loads(command("--json")) == supported_kernels()


def test_the_table_has_every_row_and_no_other():
    """Read back from the printed columns, which are two blanks or more apart."""
    header, *lines = [re.split(r" {2,}", line.strip()) for line in command().splitlines()]
    printed = set()
    for line in lines:
        cell = dict(zip(header, line, strict=True))
        for dtype in cell["dtypes"].split(", "):
            printed.add(
                (
                    cell["device"].lower(),
                    int(cell["algorithm"].removeprefix("v")),
                    {"forward": "fwd", "backward": "bwd"}[cell["pass"]],
                    dtype,
                    None if cell["head dimension"] == "any" else int(cell["head dimension"].removeprefix("up to ")),
                    cell["features"],
                )
            )
    assert printed == {
        (row["device"], row["version"], row["pass"], row["dtype"], row["head_dim_max"], ", ".join(row["features"]))
        for row in supported_kernels()
    }
