"""out and lse of every case against the oracle, both versions, all tiles, on every device that has a kernel."""

from __future__ import annotations

import itertools

import cases
import harness
import pytest
import torch
from cases import Case
from torch.profiler import ProfilerActivity, profile

from flash_attn_ext import flash_attention, flash_attention_v1, flash_attention_v2

pytestmark = pytest.mark.usefixtures("poisoned")

# The pairwise combinations name CUDA's dtypes only; in fp64 all of them run where one head's work is small.
ALL = (*cases.CASES, *cases.in_dtype(cases.select(cases.PAIRWISE, max_work=2**23), "float64"))
V1 = [case for case in ALL if harness.v1_takes(case)]
BLOCKS = tuple(itertools.product((32, 64, 96, 128), repeat=2))
BLOCK_CASES = (
    Case(113, 203, 59, heads=2, heads_kv=1, causal=True),  # ragged against every tile
    Case(113, 203, 59, heads=2, heads_kv=1, causal=True, dtype="bfloat16"),
    Case(256, 128, 32, causal=True, layout="misaligned"),  # whole tiles, empty rows
    Case(130, 300, 40, head_dim_v=24, dtype="float16"),
    Case(97, 161, 16, dtype="float64"),
)


def dimensions_by_stride(t: torch.Tensor) -> list[int]:
    """Dimensions of more than one entry, outermost in memory first."""
    return sorted((i for i in range(t.dim()) if t.shape[i] > 1), key=lambda i: -t.stride(i))


def test_poison_reaches_outputs_and_workspace():
    """Without it, a result that was never written could pass by luck."""
    assert torch.empty(3).isnan().all() and (torch.empty(64, dtype=torch.uint8) == 0xFF).all()
    q, k, v = cases.make_inputs(Case(200, 200, 64))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as profiler:
        flash_attention(q, k, v)
    inside = {tuple(event.input_shapes[0]) for event in profiler.events() if event.name == "aten::fill_"}
    workspace = harness.flash_attn_ext.explain(q, k, v)["fwd"]["workspace_bytes"]
    assert inside == {(1, 1, 200, 64), (1, 1, 200), (workspace,)}


@pytest.mark.parametrize("device, case", harness.on_devices(ALL, "fwd"), indirect=["device"])
def test_v2(device, case):
    results = harness.run_forward(case, device)
    out, lse, q = results["out"], results["lse"], harness.inputs_of(case, device).q
    assert out.dtype == case.torch_dtype and lse.dtype == harness.stats_dtype(case.torch_dtype)
    assert out.shape == (*q.shape[:3], case.dim_v) and lse.shape == q.shape[:3] and lse.is_contiguous()
    if case.layout != "expanded":  # two equal strides have no order to keep
        assert dimensions_by_stride(out[..., 0]) == dimensions_by_stride(q[..., 0])
    assert torch.empty_like(out, memory_format=torch.preserve_format).stride() == out.stride()  # dense
    harness.compare(results, harness.expected_forward(case, device), case)


@pytest.mark.parametrize("device, case", harness.on_devices(V1, "fwd", 1), indirect=["device"])
def test_v1(device, case):
    x = harness.inputs_of(case, device)
    results = harness.run_forward(case, device, 1)
    assert torch.equal(flash_attention_v1(x.q, x.k, x.v, case.scale, case.causal), results["out"])
    harness.compare(results, harness.expected_forward(case, device), case)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"{b[0]}x{b[1]}")
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("case", BLOCK_CASES, ids=lambda case: case.id)
def test_every_block_size(case, version, block):
    """Of the CPU engine; test_cuda.py tries those of every CUDA kernel."""
    device = "cpu"
    x = harness.inputs_of(case, device)
    results = harness.run_forward(case, device, version, block)
    function = flash_attention_v1 if version == 1 else flash_attention_v2
    assert torch.equal(function(x.q, x.k, x.v, causal=case.causal, block_size=block), results["out"])
    harness.compare(results, harness.expected_forward(case, device), case)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_three_dimensions_are_one_head(device, dtype):
    case = Case(37, 53, 24, batch=3, dtype=dtype, causal=True)
    if not harness.has_kernel(case, device, "fwd"):
        pytest.skip(f"no kernel for {dtype} on {device}")
    q, k, v = cases.make_inputs(case, device)
    out, lse = flash_attention(q, k, v, causal=True, return_lse=True)
    out3, lse3 = flash_attention(q[:, 0], k[:, 0], v[:, 0], causal=True, return_lse=True)
    assert out3.shape == (3, 37, 24) and torch.equal(out3, out[:, 0]) and torch.equal(lse3, lse[:, 0])
    if harness.has_kernel(case, device, "fwd", 1):
        assert torch.equal(flash_attention_v1(q[:, 0], k[:, 0], v[:, 0]), flash_attention_v1(q, k, v)[:, 0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_large_scores(device, dtype):
    """Scores of +-10^4: what is subtracted before exp has to be the maximum of the row, seen late or early."""
    case = Case(64, 300, 64, dtype=dtype)
    if not harness.has_kernel(case, device, "fwd"):
        pytest.skip(f"no kernel for {dtype} on {device}")
    q, k, v = cases.make_inputs(case, device)
    for order in (torch.arange(300), torch.arange(299, -1, -1)):  # the maximum rises at every step, or at the first
        ramp = torch.linspace(-1, 1, 300, dtype=torch.float64).to(device, q.dtype)[order]
        sharp = torch.ones_like(q[..., :1]) * 4096, ramp[None, None, :, None].expand(1, 1, 300, 1)
        q2, k2 = (torch.cat((x[..., :63] * 0, y), -1) for x, y in zip((q, k), sharp, strict=True))
        ours = flash_attention(q2, k2, v, 2.0, return_lse=True)
        ref = harness.naive_attention(q2, k2, v, 2.0, return_lse=True, upcast=True)
        naive = harness.naive_attention(q2, k2, v, 2.0, return_lse=True)
        for name, *values in zip(("out", "lse"), ours, ref, naive, strict=True):
            harness.assert_close_to_oracle(*values, name=name)
