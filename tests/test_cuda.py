"""What only a GPU shows: streams, devices, graphs, bits, memory, sizes past 32 bits, every kernel launched.

Whether results are right is for test_forward.py and test_backward.py, which run the same cases on every device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import harness
import pytest
import torch
from cases import CUDA_DTYPES, HEAD_DIMS, Case
from torch import Tensor

import flash_attn_ext
from flash_attn_ext import explain, flash_attention, flash_attention_v1, flash_attention_v2, naive_attention

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*cudagraph.*:UserWarning")]

ROWS = [row for row in flash_attn_ext.supported_kernels() if row["device"] == "cuda"]
ops = harness.ops
RUNS = 10
KIB = 1024


@pytest.fixture(autouse=True)
def kernels() -> None:
    if not ROWS:
        pytest.skip("flash_attn_ext is built without CUDA")


def tensors(case: Case, seed: int = 0, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
    shapes = (
        (case.batch, case.heads, case.seqlen_q, case.head_dim),
        (case.batch, case.heads_kv, case.seqlen_k, case.head_dim),
        (case.batch, case.heads_kv, case.seqlen_k, case.dim_v),
    )
    q, k, v = (harness.randn(*s, dtype=case.torch_dtype, seed=seed + i, device=device) for i, s in enumerate(shapes))
    return q, k, v


def dout_for(q: Tensor, v: Tensor) -> Tensor:
    return harness.randn(*q.shape[:3], v.shape[-1], dtype=q.dtype, seed=11, device=q.device)


def everything(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, version: int = 2, dout: Tensor | None = None
) -> dict[str, Tensor]:
    """out, lse and all gradients, by the operators, deterministic. With ``dout`` given nothing comes from the host."""
    op = ops.fwd_v1 if version == 1 else ops.fwd
    right = 0 if causal else -1
    dout = dout_for(q, v) if dout is None else dout
    out, lse = op(q, k, v, None, -1, right)
    dq, dk, dv = ops.bwd(dout, torch.ones_like(lse), q, k, v, out, lse, None, -1, right, False, True)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def assert_same_bits(ours: dict[str, Tensor], expected: dict[str, Tensor], when: str) -> None:
    for name, result in ours.items():
        same = torch.equal(result.contiguous().view(torch.uint8), expected[name].contiguous().view(torch.uint8))
        assert same, f"{name} differs {when}"


SMALL = Case(300, 520, 64, batch=2, heads=4, heads_kv=2, dtype="bfloat16")


# ---- poison, streams, devices, graphs --------------------------------------------------------------------------------


def test_poison_reaches_cuda_memory(poisoned: None) -> None:
    """What the cases of test_forward.py and test_backward.py rest on: outputs and workspaces come from at::empty."""
    assert torch.empty(3, device="cuda").isnan().all()
    assert torch.empty_like(torch.zeros(2, 3, device="cuda").mT).isnan().all()
    assert (torch.empty(64, dtype=torch.uint8, device="cuda") == 0xFF).all()


@pytest.mark.parametrize("version", [1, 2])
def test_a_stream_that_is_not_the_default(version: int) -> None:
    """Inputs are NaN until the stream has worked off what stands before our call; another stream would read those."""
    values = tensors(SMALL)
    dout = dout_for(values[0], values[2])
    expected = everything(*values, causal=True, version=version, dout=dout)
    late = [torch.full_like(t, float("nan")) for t in values]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for t, value in zip(late, values, strict=True):
            t.copy_(value)
        results = everything(*late, causal=True, version=version, dout=dout)
        assert not stream.query(), "the calls waited for the GPU"
    stream.synchronize()
    assert_same_bits(results, expected, "on another stream")


def test_nothing_waits_for_the_gpu() -> None:
    q, k, v = (t.requires_grad_() for t in tensors(SMALL))
    dout = torch.randn_like(q)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):  # the switch sees what waits
            dout.sum().item()
        out, lse = flash_attention(q, k, v, causal=True, return_lse=True)
        torch.autograd.grad((out, lse), (q, k, v), (dout, torch.ones_like(lse)))
        flash_attention_v1(q.detach(), k.detach(), v.detach())
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("version", [1, 2])
def test_a_device_that_is_not_the_current_one(version: int) -> None:
    expected = everything(*tensors(SMALL), version=version)
    assert torch.cuda.current_device() == 0
    results = everything(*tensors(SMALL, device="cuda:1"), version=version)
    assert torch.cuda.current_device() == 0
    assert {t.device.index for t in results.values()} == {1}
    if torch.cuda.get_device_properties(0).name == torch.cuda.get_device_properties(1).name:
        assert_same_bits({name: t.to("cuda:0") for name, t in results.items()}, expected, "on another device")
    far = [t.requires_grad_() for t in tensors(SMALL, device="cuda:1")]
    flash_attention(*far).float().square().sum().backward()  # autograd's threads have another current device
    assert far[0].grad is not None and far[0].grad.isfinite().all()
    assert explain(*far)["fwd"]["kernel"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_two_devices_are_refused() -> None:
    q, k, v = tensors(SMALL)
    with pytest.raises(ValueError, match="k is on cuda:1 and q on cuda:0"):
        flash_attention(q, k.to("cuda:1"), v)


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize(
    "case", [SMALL, Case(1, 2048, 128, heads=2, heads_kv=1), Case(70, 90, 256, heads=2, heads_kv=2)], ids=lambda c: c.id
)
def test_graph_capture_and_replay(case: Case, dtype: str) -> None:
    """The second case splits its keys, the third asks for much shared memory."""
    case = replace(case, dtype=dtype)
    q, k, v = tensors(case)
    dout = dout_for(q, v)

    def step() -> dict[str, Tensor]:
        results = everything(q, k, v, causal=True, dout=dout) | {"v1": ops.fwd_v1(q, k, v, None, -1, 0)[0]}
        return results | {"fast_dk": ops.bwd(results["out"], None, q, k, v, results["out"], results["lse"])[1]}

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (100, 200):
        for t, value in zip((q, k, v), tensors(case, seed), strict=True):
            t.copy_(value)
        for t in captured.values():
            t.fill_(float("nan"))
        graph.replay()
        eager = step()
        approximate = captured.pop("fast_dk"), eager.pop("fast_dk")
        assert_same_bits(captured, eager, "in a replay")
        torch.testing.assert_close(*approximate)  # not deterministic: the same up to the order of sums
        captured["fast_dk"] = approximate[0]


# ---- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
def test_repeated_calls(dtype: str, head_dim: int) -> None:
    case = Case(333, 700, head_dim, batch=2, heads=6, heads_kv=2, dtype=dtype)
    q, k, v = tensors(case)
    expected = everything(q, k, v, causal=True)
    expected_v1 = everything(q, k, v, causal=True, version=1)
    for run in range(RUNS - 1):
        with torch.cuda.stream(torch.cuda.Stream()):  # beside other work, in other memory
            noise = torch.randn(2048, 2048, device="cuda") @ torch.randn(2048, 2048, device="cuda")
        assert_same_bits(everything(q, k, v, causal=True), expected, f"in run {run + 2}")
        assert_same_bits(everything(q, k, v, causal=True, version=1), expected_v1, f"in run {run + 2} of version 1")
        del noise


def test_the_global_switch_makes_gradients_deterministic() -> None:
    """deterministic=None follows it, and says so."""
    q, k, v = tensors(Case(1024, 1024, 64, batch=2, heads=8, heads_kv=2, dtype="bfloat16"))
    out, lse = ops.fwd(q, k, v)
    expected = ops.bwd(out, None, q, k, v, out, lse, None, -1, -1, False, True)
    assert explain(q, k, v)["bwd"]["deterministic"] is False
    assert explain(q, k, v, deterministic=True)["bwd"]["deterministic"] is True
    torch.use_deterministic_algorithms(True)
    try:
        assert explain(q, k, v)["bwd"]["deterministic"] is True
        for _ in range(RUNS):
            for ours, ref in zip(ops.bwd(out, None, q, k, v, out, lse), expected, strict=True):
                assert torch.equal(ours, ref)
    finally:
        torch.use_deterministic_algorithms(False)


BATCH_CASES = {
    "prefill": Case(700, 700, 64, batch=5, heads=4, heads_kv=2, causal=True),
    "decode": Case(1, 5000, 128, batch=5, heads=2, heads_kv=1),  # keys split across CTAs
    "few rows": Case(17, 3000, 96, batch=3, heads=1, heads_kv=1, causal=True),
    "many rows": Case(2048, 512, 256, batch=3, heads=3, heads_kv=3),
}


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", BATCH_CASES)
def test_bits_do_not_depend_on_the_batch(name: str, version: int, dtype: str) -> None:
    case = replace(BATCH_CASES[name], dtype=dtype)
    q, k, v = tensors(case)
    op = ops.fwd_v1 if version == 1 else ops.fwd
    right = 0 if case.causal else -1
    together = op(q, k, v, None, -1, right)
    repeated = op(*(t.repeat(40, 1, 1, 1) for t in (q, k, v)), None, -1, right)  # enough to fill any GPU
    for b in range(case.batch):
        alone = op(*(t[b : b + 1] for t in (q, k, v)), None, -1, right)
        for one, all_, many in zip(alone, together, repeated, strict=True):
            assert torch.equal(one[0], all_[b]) and torch.equal(one[0], many[b + case.batch])


def test_keys_are_split_where_rows_are_few() -> None:
    """Else the test above says nothing about splits: they need a workspace for their parts."""
    q, k, v = tensors(replace(BATCH_CASES["decode"], dtype="bfloat16"))
    assert explain(q, k, v)["fwd"]["workspace_bytes"] > 0


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("top_left", [False, True], ids=["bottom-right", "top-left"])
@pytest.mark.parametrize("left, right", [(-1, -1), (-1, 0), (700, -1), (2500, 900), (0, 0)])
def test_one_row_a_head_is_one_head_of_rows(left: int, right: int, top_left: bool, dtype: str) -> None:
    """The heads of a group run as the rows of one head, over the keys that their position sees: the same bits."""
    case = Case(1, 6000, 128, batch=2, heads=15, heads_kv=3, dtype=dtype, head_dim_v=72)
    q, k, v = tensors(case)
    position = 0 if top_left else case.seqlen_k - 1
    begin = 0 if left < 0 else max(0, position - left)
    end = case.seqlen_k if right < 0 else min(case.seqlen_k, position + right + 1)
    out, lse = ops.fwd(q, k, v, None, left, right, top_left)
    rows, rows_lse = ops.fwd(q.view(2, 3, 5, 128), k[:, :, begin:end], v[:, :, begin:end])
    assert torch.equal(out.view(2, 3, 5, 72), rows) and torch.equal(lse.view(2, 3, 5), rows_lse)
    expected = naive_attention(
        q.float(), k.float(), v.float(), causal=right == 0, causal_align="top-left" if top_left else "bottom-right",
        window=(None if left < 0 else left, None if right < 0 else right),
    )  # fmt: skip
    assert (out.float() - expected).abs().max() < {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-4}[dtype]


# ---- every kernel of the registry ------------------------------------------------------------------------------------

TILES = [
    pytest.param(row, tile, id=f"{tile['name']}-{row['dtype']}-{row['pass']}_v{row['version']}")
    for row in ROWS
    for tile in row["tiles"]
]


def too_large(tile: dict[str, Any]) -> str | None:
    gpu = flash_attn_ext._binary._C.cuda_device(0)
    if tile["name"].startswith("sm90") and gpu["compute_capability"] // 10 != 9:
        return f"needs compute capability 9.x, not {gpu['compute_capability']}"
    limit = gpu["shared_bytes"]
    return None if tile["shared_bytes"] <= limit else f"needs {tile['shared_bytes']} bytes of shared memory of {limit}"


def cases_of(row: dict[str, Any], tile: dict[str, Any]) -> Iterator[Case]:
    rows, keys = tile["tile"]
    largest, dtype = tile["head_dim_max"], row["dtype"]
    base = Case(2 * rows + 17, 3 * keys + 5, largest, batch=2, heads=4, heads_kv=2, dtype=dtype)
    yield base
    yield replace(base, seqlen_q=3 * rows, seqlen_k=4 * keys, head_dim=largest, causal=True)  # whole tiles
    if row["arch"] == "sm80":
        yield replace(base, head_dim=largest - 3, causal=True, layout="misaligned")  # no vector loads
    if row["version"] == 2:
        yield replace(base, head_dim=largest - 8, head_dim_v=largest // 2, window=(keys, 7), layout="bshd_transposed")


@pytest.mark.parametrize("row, tile", TILES)
def test_every_kernel_runs(row: dict[str, Any], tile: dict[str, Any], monkeypatch: Any, poisoned: None) -> None:
    """By its name, so that no other one can stand in for it."""
    if reason := too_large(tile):
        pytest.skip(reason)
    monkeypatch.setenv("FLASH_ATTN_EXT_KERNEL", tile["name"])
    for case in cases_of(row, tile):
        if row["version"] == 2:
            assert explain(*harness.inputs_of(case, "cuda")[:3])[row["pass"]]["kernel"] == tile["name"]
        if row["pass"] == "fwd":
            harness.check_forward(case, "cuda", row["version"])
        else:
            for deterministic in (False, True):
                harness.check_backward(case, "cuda", deterministic=deterministic)


@pytest.mark.parametrize("row, tile", [p for p in TILES if p.values[0]["pass"] == "fwd"])
def test_every_tile_by_block_size(row: dict[str, Any], tile: dict[str, Any]) -> None:
    if reason := too_large(tile):
        pytest.skip(reason)
    case = Case(150, 300, tile["head_dim_max"], heads=2, heads_kv=2, dtype=row["dtype"], causal=True)
    function = flash_attention_v1 if row["version"] == 1 else flash_attention_v2
    q, k, v = tensors(case)
    out = function(q, k, v, causal=True, block_size=tuple(tile["tile"]))
    results = harness.run_forward(case, "cuda", row["version"], tuple(tile["tile"]))
    assert out.isfinite().all()
    harness.compare(results, harness.expected_forward(case, "cuda"), case)


# ---- fp32 ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def matmul_precision(value: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("version", [1, 2])
def test_fp32_follows_the_matmul_precision(version: int, head_dim: int) -> None:
    """Full accuracy by default; TF32 products, with their error and no more, where PyTorch's switch allows them."""
    q, k, v = tensors(Case(300, 500, head_dim, heads=2, heads_kv=2))
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    ref_out = naive_attention(*wide)
    dout = harness.randn(*ref_out.shape, dtype=torch.float32, seed=11, device="cuda")
    ref = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(ref_out, wide, dout.double()), strict=True))
    ref["out"] = ref_out.detach()
    errors: dict[str, dict[str, float]] = {}
    for precision, operand in (("highest", "fp32"), ("high", "tf32"), ("medium", "tf32")):
        with matmul_precision(precision):
            results = everything(q, k, v, version=version)
            out, lse = ops.fwd(q, k, v)
            results |= dict(zip(("dq", "dk", "dv"), ops.bwd(dout, None, q, k, v, out, lse), strict=True))
            for pass_ in ("fwd", "bwd"):
                assert explain(q, k, v)[pass_]["operand"] == operand
        errors[precision] = {name: float((results[name] - t).abs().max() / t.abs().max()) for name, t in ref.items()}
    for name in ref:
        assert errors["highest"][name] < 4e-6, (name, errors)
        assert 20 * errors["highest"][name] < errors["high"][name] < 1e-2, (name, errors)
        assert errors["medium"][name] < 1e-2, (name, errors)


# ---- memory ----------------------------------------------------------------------------------------------------------


def peak_of(call: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes asked of the caching allocator at the highest point, results included, above what was held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_stats()["requested_bytes.all.current"]
    results = call()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - held, results


def bytes_of(results: Any) -> int:
    return sum(t.numel() * t.element_size() for t in results)


def test_the_measure_sees_a_quadratic_matrix() -> None:
    x = tensors(Case(1024, 1024, 64))
    assert peak_of(lambda: naive_attention(*x))[0] >= 1024 * 1024 * 4


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
def test_memory_is_what_explain_says_and_linear(dtype: str, head_dim: int, deterministic: bool) -> None:
    """The backward's way depends on the length, but none takes more than dQ and three row vectors in fp32, in tiles,
    and parts of dK and dV for two key tiles an SM."""
    sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    batch, heads, columns = 2, 16, 64 if head_dim == 40 else head_dim
    for seqlen in (1024, 2048, 4096):
        q, k, v = tensors(Case(seqlen, seqlen, head_dim, batch=batch, heads=heads, heads_kv=4, dtype=dtype))
        plan = explain(q, k, v, deterministic=deterministic)
        peak, (out, lse) = peak_of(lambda q=q, k=k, v=v: ops.fwd(q, k, v))
        assert peak == bytes_of((out, lse)) + plan["fwd"]["workspace_bytes"]
        assert plan["fwd"]["workspace_bytes"] <= 64 * KIB
        options = (None, -1, -1, False, deterministic)
        peak_bwd, grads = peak_of(lambda x=(out, None, q, k, v, out, lse), o=options: ops.bwd(*x, *o))
        workspace = plan["bwd"]["workspace_bytes"]
        assert peak_bwd == bytes_of(grads) + workspace
        parts = 2 * sms * 2 * 128 * columns * 4
        assert workspace <= batch * heads * (seqlen + 128) * (4 * columns + 3 * 4) + parts + 64 * KIB
    assert max(peak, peak_bwd) < batch * heads * seqlen**2 * 2 / 2  # half of one S x S matrix in 16 bits


def test_split_keys_take_what_explain_says() -> None:
    q, k, v = tensors(Case(1, 8192, 64, batch=3, heads=4, heads_kv=2, dtype="float16"))
    plan = explain(q, k, v)["fwd"]
    peak, results = peak_of(lambda: ops.fwd(q, k, v))
    assert plan["workspace_bytes"] > 0 and peak == bytes_of(results) + plan["workspace_bytes"]


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("batch, heads", [(70_000, 1), (1, 70_000), (300, 300)])
def test_more_heads_than_16_bits(batch: int, heads: int, dtype: str, version: int) -> None:
    case = Case(2, 3, 8, batch=batch, heads=heads, heads_kv=heads, dtype=dtype)
    q, k, v = tensors(case)
    ours = everything(q, k, v, version=version)
    flat = [t.reshape(-1, 1, *t.shape[2:]) for t in (q, k, v)]
    leaves = [t.double().requires_grad_() for t in flat]
    out, lse = naive_attention(*leaves, return_lse=True)
    dout = harness.randn(*q.shape, dtype=q.dtype, seed=11, device="cuda").reshape(out.shape).double()
    grads = torch.autograd.grad((out, lse), leaves, (dout, torch.ones_like(lse)))
    tolerance = {"float16": 2e-2, "float32": 2e-5}[dtype]
    for name, ref in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True):
        result = ours[name].reshape(ref.shape).double()
        torch.testing.assert_close(result, ref.detach(), rtol=tolerance, atol=tolerance)


FAR = 2**31 + 8  # elements
FAR_STRIDES = {
    "batch": (FAR, 8192, 32),
    "head": (16384, FAR, 32),
    "sequence": (16384, 8192, (FAR // 149 + 1 + 7) // 8 * 8),
}


def needs_memory(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free:.0f} are free")


@pytest.fixture(scope="module")
def far_memory() -> Iterator[Tensor]:
    needs_memory(8)
    memory = torch.empty(FAR + 2**22, dtype=torch.float16, device="cuda")
    yield memory
    del memory
    torch.cuda.empty_cache()


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("stride", FAR_STRIDES)
def test_offsets_past_32_bits(far_memory: Tensor, stride: str, which: str) -> None:
    case = Case(150, 150, 32, batch=2, heads=2, heads_kv=2, dtype="float16")
    near = dict(zip("qkv", tensors(case), strict=True))
    far = torch.as_strided(far_memory, near[which].shape, (*FAR_STRIDES[stride], 1))
    last = sum((n - 1) * s for n, s in zip(far.shape, far.stride(), strict=True))
    assert 2**31 < last < far_memory.numel()
    far.copy_(near[which])
    for version in (1, 2):
        expected = everything(*near.values(), causal=True, version=version)
        ours = everything(*(near | {which: far}).values(), causal=True, version=version)
        assert_same_bits(ours, expected, "far out in memory")


def test_gradients_of_far_out_and_dout(far_memory: Tensor) -> None:
    q, k, v = tensors(Case(150, 150, 32, batch=2, heads=2, heads_kv=2, dtype="float16"))
    out, lse = ops.fwd(q, k, v)
    dout = harness.randn(*out.shape, dtype=out.dtype, seed=5, device="cuda")
    far = torch.as_strided(far_memory, out.shape, (*FAR_STRIDES["batch"], 1))
    expected = ops.bwd(dout, None, q, k, v, out, lse, deterministic=True)
    for pair in ((far, out), (dout, far)):
        far.copy_(dout if pair[0] is far else out)
        grads = ops.bwd(pair[0], None, q, k, v, pair[1], lse, deterministic=True)
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_results_of_more_than_2_to_31_elements() -> None:
    """out, and then dq with its fp32 accumulator, are larger than 32 bits can count; a few rows are compared."""
    needs_memory(40)
    rows, heads, dim = 2**20, 33, 64
    q = harness.randn(1, 1, rows, dim, dtype=torch.float16, device="cuda").expand(1, heads, rows, dim)
    k, v = (harness.randn(1, heads, 16, dim, dtype=torch.float16, seed=s, device="cuda") for s in (1, 2))
    assert q.numel() > 2**31
    out, lse = ops.fwd(q, k, v)
    some = torch.tensor([0, 1, rows // 2 + 1, rows - 1], device="cuda")
    few = q[:, :, some].contiguous()
    expected, expected_lse = ops.fwd(few, k, v)
    torch.testing.assert_close(out[:, :, some], expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse[:, :, some], expected_lse, rtol=1e-5, atol=1e-5)
    grads = ops.bwd(out, None, q, k, v, out, lse)
    few_grads = ops.bwd(expected, None, few, k, v, expected, expected_lse)
    torch.testing.assert_close(grads[0][:, :, some], few_grads[0], rtol=2e-2, atol=2e-3)
    del out, grads
    torch.cuda.empty_cache()


@pytest.mark.parametrize("version", [1, 2])
def test_empty_calls(version: int) -> None:
    op = ops.fwd_v1 if version == 1 else ops.fwd
    for q_shape, k_shape in (((2, 2, 0, 16), (2, 2, 5, 16)), ((2, 2, 5, 16), (2, 2, 0, 16)), ((0, 2, 5, 16),) * 2):
        q = torch.randn(q_shape, device="cuda", dtype=torch.bfloat16)
        k = torch.randn(k_shape, device="cuda", dtype=torch.bfloat16)
        out, lse = op(q, k, k)
        assert out.shape == q.shape and not out.any() and lse.isneginf().all()
        grads = ops.bwd(torch.ones_like(out), None, q, k, k, out, lse)
        assert [g.shape for g in grads] == [q.shape, k.shape, k.shape] and not any(g.any() for g in grads)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_refusals_name_the_limit_and_explain_says_the_same() -> None:
    x = torch.zeros(1, 2, 8, 64, device="cuda")
    wide = torch.zeros(1, 2, 8, 257, device="cuda", dtype=torch.float16)
    for tensor, words in ((x.double(), "float64 runs on the CPU only"), (wide, "head dimensions up to 256, got 257")):
        for function in (flash_attention, flash_attention_v1, flash_attention_v2):
            with pytest.raises(NotImplementedError, match=words) as raised:
                function(tensor, tensor, tensor)
        with pytest.raises(NotImplementedError, match=words) as raised:
            flash_attention(tensor, tensor, tensor)
        assert explain(tensor, tensor, tensor) == {"runs": False, "why_not": str(raised.value)}
    lse = torch.zeros(1, 2, 8, device="cuda")
    with pytest.raises(NotImplementedError, match=r"flash_attention backward: .*up to 256, got 257"):
        ops.bwd(wide, None, wide, wide, wide, wide, lse)


def test_mixed_devices_are_refused() -> None:
    x = torch.zeros(1, 2, 8, 64, device="cuda")
    with pytest.raises((ValueError, NotImplementedError), match="cpu"):
        flash_attention(x, x.cpu(), x)
    told = explain(x, x.cpu(), x)
    assert told["runs"] is False and "cpu" in told["why_not"]


@pytest.mark.parametrize("function", [flash_attention_v1, flash_attention_v2])
@pytest.mark.parametrize("block", [(48, 7), (2**40, 2**40)])
def test_tiles_that_are_not_built_raise(function: Callable[..., Tensor], block: tuple[int, int]) -> None:
    x = torch.zeros(1, 2, 8, 64, device="cuda", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"block_size \(.* is not built for .*; it has \(\d+, \d+\)"):
        function(x, x, x, block_size=block)


def test_a_forced_kernel_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 2, 8, 64, device="cuda", dtype=torch.float16)
    monkeypatch.setenv("FLASH_ATTN_EXT_KERNEL", "nonsense")
    with pytest.raises(NotImplementedError, match="FLASH_ATTN_EXT_KERNEL names 'nonsense'"):
        flash_attention(x, x, x)


# ---- the callers above -----------------------------------------------------------------------------------------------


def test_sdpa_replacement_runs_ours() -> None:
    q, k, v = (t.requires_grad_() for t in tensors(replace(SMALL, seqlen_k=300)))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    with flash_attn_ext.replace_sdpa(), torch.profiler.profile() as profiler:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert any(event.key == "flash_attn_ext::fwd" for event in profiler.key_averages())
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def test_autocast() -> None:
    q, k, v = (t.requires_grad_() for t in tensors(replace(SMALL, dtype="float32")))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = flash_attention(q, k, v)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32


def test_compiled_training_step() -> None:
    x = [t.requires_grad_() for t in tensors(SMALL)]

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q * 0.5, k, v, causal=True, deterministic=True).float().square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    ours = torch.autograd.grad(compiled(*x), x)
    for grad, expected in zip(ours, torch.autograd.grad(loss(*x), x), strict=True):
        torch.testing.assert_close(grad, expected, rtol=2e-2, atol=2e-2)
