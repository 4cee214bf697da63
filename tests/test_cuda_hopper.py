"""What the Hopper kernels have to themselves: their gate, the copy engine's borders, a maximum that moves late, split
keys, dependent launches, the three ways in which dQ comes together. What holds for every kernel is in test_cuda.py,
test_forward.py and test_backward.py, which run them too."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import harness
import pytest
import torch
from cases import Case
from tolerance import assert_close_to_oracle
from torch import Tensor

import flash_attn_ext
from flash_attn_ext import explain, flash_attention, naive_attention

ops = harness.ops
DTYPES = ("float16", "bfloat16")
# The padded head dimension that each D runs on.
ROW_OF = {8: 64, 16: 64, 40: 64, 64: 64, 72: 80, 80: 80, 88: 96, 96: 96, 104: 112, 112: 112, 120: 128, 128: 128}
ROW_OF |= {136: 192, 192: 192, 200: 256, 256: 256}


@pytest.fixture
def hopper() -> None:
    if not any(row["arch"] == "sm90" for row in flash_attn_ext.supported_kernels() if row["device"] == "cuda"):
        pytest.skip("flash_attn_ext is built without the Hopper kernels")
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU of compute capability 9.x")


def shapes(head_dim: int, dtype: str) -> list[Case]:
    """Ragged ends on both sides, GQA, windows and both alignments, Dv apart from D, rows that see no key."""
    base = Case(333, 517, head_dim, batch=2, heads=6, heads_kv=2, dtype=dtype)
    return [
        base,
        replace(base, causal=True),
        replace(base, causal=True, causal_align="top-left", layout="bshd_transposed"),
        replace(base, seqlen_q=700, seqlen_k=300, causal=True),  # 400 rows without keys
        replace(base, seqlen_q=700, seqlen_k=300, window=(50, 20), causal_align="top-left"),
        replace(base, window=(100, 0), layout="expanded"),
        replace(base, window=(37, 21), heads_kv=1, scale=0.3),
        replace(base, head_dim_v=8, causal=True),
        replace(base, head_dim_v=head_dim // 2 // 8 * 8 or 8, seqlen_q=65, seqlen_k=1),
        replace(base, seqlen_q=768, seqlen_k=1024, causal=True, batch=3, heads=16, heads_kv=16),  # several tiles a CTA
    ]


def plan(case: Case) -> dict[str, Any]:
    x = harness.inputs_of(case, "cuda")
    return explain(x.q, x.k, x.v, **x.kwargs)["fwd"]


@pytest.mark.parametrize("head_dim", ROW_OF)
def test_the_copy_engine_takes_these_cases(head_dim: int) -> None:
    """On the CPU: else a run on Hopper would test sm80's kernels."""
    from flash_attn_ext._binary import _C

    if not hasattr(_C, "bulk_copy_obstacle"):
        pytest.skip("flash_attn_ext is built without CUDA")
    for case in shapes(head_dim, "bfloat16"):
        x = harness.inputs_of(case)
        layouts = [(t.data_ptr(), list(t.shape), list(t.stride())) for t in (x.q, x.k, x.v)]
        assert _C.bulk_copy_obstacle(layouts, case.scale) is None, case.id


for_every_head_dim = pytest.mark.parametrize("head_dim", ROW_OF)
for_both_dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.mark.gpu
@for_both_dtypes
@for_every_head_dim
def test_results(head_dim: int, dtype: str, hopper: None, poisoned: None) -> None:
    for case in shapes(head_dim, dtype):
        row = ROW_OF[head_dim]  # Dv is nowhere larger
        assert plan(case)["kernel"] == f"sm90_fwd_d{row}", case.id
        harness.check_forward(case, "cuda")


def moved(t: Tensor) -> Tensor:
    """The same values one element further on: no longer on 16 bytes."""
    memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    memory[1:] = t.flatten()
    return memory[1:].view(t.shape)


def padded(t: Tensor) -> Tensor:
    """Rows four elements apart from each other more than they are long."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 4), float("nan"), dtype=t.dtype, device=t.device)
    wide[..., :-4] = t
    return wide[..., :-4]


NOT_SERVED: dict[str, tuple[Callable[[Tensor], Tensor], float | None, str]] = {
    "pointer": (moved, None, "a tensor does not start on a multiple of 16 bytes"),
    "stride": (padded, None, "a stride is not a multiple of 16 bytes"),
    "head_dim": (lambda t: t[..., :59].contiguous(), None, "a head dimension is not a multiple of 8"),
    "scale 0": (lambda t: t, 0.0, "the scale is not positive"),
    "scale -0.3": (lambda t: t, -0.3, "the scale is not positive"),
}


@pytest.mark.gpu
@for_both_dtypes
@pytest.mark.parametrize("what", NOT_SERVED)
def test_what_falls_back(what: str, dtype: str, hopper: None, poisoned: None) -> None:
    """To sm80's kernels, and explain says why; each tensor alone is enough."""
    change, scale, why = NOT_SERVED[what]
    shape = (2, 4, 200, 64)
    whole = [harness.randn(*shape, dtype=getattr(torch, dtype), seed=i, device="cuda") for i in range(3)]
    assert explain(*whole)["fwd"]["kernel"] == "sm90_fwd_d64"
    for which in ([0, 1], [2]) if what == "head_dim" else ([0], [1], [2]):
        q, k, v = (change(t) if i in which else t for i, t in enumerate(whole))
        told = explain(q, k, v, scale)["fwd"]
        assert told["kernel"].startswith("sm80_fwd_d64") and told["passed_over"] == f"sm90_fwd_d64: {why}"
        out, lse = flash_attention(q, k, v, scale, causal=True, return_lse=True)
        ref, ref_lse = naive_attention(q.float(), k.float(), v.float(), scale, causal=True, return_lse=True)
        torch.testing.assert_close(out.float(), ref, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse, ref_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_a_last_dimension_that_is_copied_does_not_fall_back(hopper: None) -> None:
    q = harness.randn(2, 4, 64, 200, dtype=torch.bfloat16, device="cuda").mT
    assert explain(q, q, q)["fwd"]["kernel"] == "sm90_fwd_d64"
    out = flash_attention(q, q, q)
    assert torch.equal(out, flash_attention(*[q.contiguous()] * 3))


@pytest.mark.gpu
@for_both_dtypes
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("shape", ["rising", "falling", "one peak", "equal"])
def test_a_maximum_that_moves(shape: str, head_dim: int, dtype: str, hopper: None) -> None:
    """Tiles without a mask are tried without a maximum of their own, keys from the last to the first: scores that rise
    by hundreds on the way, in steps above and below the slack, and rows far below the first reference."""
    keys, typed = 1500, getattr(torch, dtype)
    at = torch.arange(keys, dtype=torch.float64)
    levels = {
        "rising": at * 0.2,
        "falling": -at * 0.2,
        "one peak": torch.where(at == 3, 300.0, at * 0.0),
        "equal": at * 0.0 + 100.0,
    }[shape]
    q = harness.randn(1, 2, 300, head_dim, seed=1)
    k = harness.randn(1, 2, keys, head_dim, seed=2)
    q[..., 0], k[..., 0] = 16.0, levels / 16.0
    v = harness.randn(1, 2, keys, head_dim, seed=3)
    q, k, v = (t.to("cuda", typed) for t in (q, k, v))
    assert explain(q, k, v, 1.0)["fwd"]["kernel"] == f"sm90_fwd_d{head_dim}"
    for scale in (1.0, 0.05):
        out, lse = flash_attention(q, k, v, scale, return_lse=True)
        ref, ref_lse = naive_attention(q.double(), k.double(), v.double(), scale, return_lse=True)
        assert_close_to_oracle(out, ref, naive_attention(q, k, v, scale), kind="output", name="out")
        torch.testing.assert_close(lse, ref_lse.float(), rtol=1e-5, atol=1e-4)


SPLIT = {
    "one tile": Case(100, 5000, 128, batch=2, heads=1, heads_kv=1),
    "causal": Case(300, 8200, 64, batch=2, heads=4, heads_kv=2, causal=True),
    "rows without keys": Case(4300, 4200, 96, heads=1, heads_kv=1, causal=True),
    "rows past a window": Case(4300, 4200, 64, heads=1, heads_kv=1, window=(50, 0), causal_align="top-left"),
    "Dv": Case(200, 4100, 256, batch=2, heads=2, heads_kv=1, head_dim_v=72, layout="bshd_transposed"),
}


@pytest.mark.gpu
@for_both_dtypes
@pytest.mark.parametrize("name", SPLIT)
def test_split_keys(name: str, dtype: str, hopper: None, poisoned: None) -> None:
    case = replace(SPLIT[name], dtype=dtype)
    told = plan(case)
    assert told["kernel"].startswith("sm90_fwd") and told["workspace_bytes"] > 256  # more than the counter of tiles
    harness.check_forward(case, "cuda")


def qkv(case: Case, seed: int = 0) -> list[Tensor]:
    lengths = ((case.heads, case.seqlen_q), (case.heads_kv, case.seqlen_k), (case.heads_kv, case.seqlen_k))
    return [
        harness.randn(case.batch, h, s, case.head_dim, dtype=case.torch_dtype, seed=seed + i, device="cuda")
        for i, (h, s) in enumerate(lengths)
    ]


def same_bits(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    pairs = [[t.contiguous().view(torch.uint8) for t in pair] for pair in zip(a, b, strict=True)]
    return all(torch.equal(x, y) for x, y in pairs)


MANY_TILES = Case(1000, 1000, 128, batch=3, heads=16, heads_kv=4, dtype="bfloat16", causal=True)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", sorted(set(ROW_OF.values())))
def test_ten_runs_of_tiles_drawn_from_a_counter(head_dim: int, hopper: None) -> None:
    """Which CTA gets which tile differs from run to run; bits must not."""
    for case in (replace(MANY_TILES, head_dim=head_dim), Case(100, 5000, head_dim, dtype="float16", causal=True)):
        x = qkv(case)
        expected = ops.fwd(*x, None, -1, 0)
        assert all(same_bits(ops.fwd(*x, None, -1, 0), expected) for _ in range(9))


@pytest.mark.gpu
def test_bits_of_split_rows_do_not_depend_on_the_batch(hopper: None) -> None:
    x = qkv(Case(200, 5000, 128, batch=7, heads=2, heads_kv=1, dtype="bfloat16"))
    assert explain(*x)["fwd"]["workspace_bytes"] > 256
    together = ops.fwd(*x)
    for b in range(7):
        assert same_bits(ops.fwd(*(t[b : b + 1] for t in x)), tuple(t[b : b + 1] for t in together))


@pytest.mark.gpu
def test_two_streams_at_once(hopper: None) -> None:
    """Each call has a counter of its own, and a dependent launch waits for its own stream."""
    inputs = [qkv(replace(MANY_TILES, head_dim=d), seed=d) for d in (64, 128)]
    expected = [ops.fwd(*x, None, -1, 0) for x in inputs]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in inputs], []
    for _ in range(20):
        for stream, x, reference in zip(streams, inputs, expected, strict=True):
            with torch.cuda.stream(stream):
                results.append((ops.fwd(*x, None, -1, 0), reference))
    torch.cuda.synchronize()
    assert all(same_bits(ours, reference) for ours, reference in results)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("what", ["one pass", "split keys"])
def test_calls_that_feed_each_other(what: str, dtype: str, hopper: None) -> None:
    """A dependent launch is on the SMs before its predecessor ends, and has to wait for what that one writes."""
    lengths = (1024, 1024) if what == "one pass" else (64 if dtype == "float32" else 1024, 8192)
    q, k, v = qkv(Case(*lengths, 64, batch=2, heads=2, heads_kv=2, dtype=dtype))
    assert (explain(q, k, v)["fwd"]["workspace_bytes"] > 4096) == (what == "split keys")

    def chain(wait: bool) -> Tensor:
        x = q
        for _ in range(16):
            x = ops.fwd(x, k, v)[0]
            if wait:
                torch.cuda.synchronize()
        return x

    assert torch.equal(chain(False), chain(True))


@pytest.mark.gpu
def test_a_graph_replayed_many_times(hopper: None) -> None:
    x = qkv(MANY_TILES)
    expected = ops.fwd(*x, None, -1, 0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ops.fwd(*x, None, -1, 0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [ops.fwd(*x, None, -1, 0) for _ in range(3)]
    for _ in range(10):
        for pair in captured:
            for t in pair:
                t.fill_(float("nan"))
        graph.replay()
        assert all(same_bits(pair, expected) for pair in captured)


# ---- how dQ comes together: dq_sum in launch_backward.cuh, of kernels up to a head dimension of 128 ----


H100 = {"compute_capability": 90, "sm_count": 132, "shared_bytes": 232448}


def way(case: Case, deterministic: bool) -> tuple[str, int]:
    """How dQ comes together on an H100, and how many CTAs share a key tile: what the workspace gives away."""
    from flash_attn_ext._binary import _C

    left, right = harness.operator_window(case)
    names = ("batch", "heads", "heads_kv", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v", "dtype")
    call = {name: getattr(case, name) for name in names} | {"block_m": 0, "block_n": 0, "fp32_exact": True}
    call["head_dim_v"] = call["head_dim_v"] or case.head_dim
    plan = _C.plan_cuda(
        pass_="bwd", version=2, deterministic=deterministic, window_left=left, window_right=right,
        top_left=case.causal_align == "top-left", **call, **H100,
    )  # fmt: skip

    def aligned(size: int) -> int:
        return -(-size // 256) * 256

    rows, d = plan["tile"][0], ROW_OF[case.head_dim]
    tiles = case.batch * case.heads * -(-case.seqlen_q // rows)
    keys = case.batch * case.heads_kv * -(-case.seqlen_k // 128) * 128
    stats = 256 + aligned(tiles * 4) + aligned(tiles * rows * 8)  # counters, words, lse and delta
    dq, turns = aligned(tiles * rows * d * 4), aligned(tiles * 4)
    for name, bytes_ in {"apart": stats, "any order": stats + dq, "in turn": stats + dq + turns}.items():
        for splits in range(1, 17) if name == "any order" else (1, 2, 4, 8):
            if plan["workspace_bytes"] == bytes_ + (splits > 1) * 2 * splits * keys * d * 4:
                return name, splits
    raise AssertionError(plan["workspace_bytes"])


def many(head_dim: int, dtype: str) -> dict[tuple[str, str, str], Case]:
    """More key tiles than SMs, but few for each: the way to dQ, the way if deterministic, what it is."""
    long = Case(1500, 1500, head_dim, batch=1, heads=12, heads_kv=12, dtype=dtype, causal=True)
    full = Case(333, 517, head_dim, batch=3, heads=12, heads_kv=12, dtype=dtype)
    grouped = "in turn" if ROW_OF[head_dim] <= 80 else "apart"
    return {
        ("any order", "in turn", "causal"): long,
        ("any order", "in turn", "window"): replace(long, seqlen_k=1700, causal=False, window=(900, 10)),
        ("in turn", "in turn", "some tiles for each SM"): replace(long, batch=3, heads=15, heads_kv=15, seqlen_q=1300),
        ("any order", "in turn", "full"): replace(long, seqlen_q=800, causal=False),
        ("apart", grouped, "groups"): replace(long, seqlen_q=700, seqlen_k=500, heads=24, heads_kv=12, batch=3),
        ("apart", grouped, "rows see no key in the mean"): replace(
            long, batch=3, heads=24, heads_kv=24, seqlen_q=2600, seqlen_k=256
        ),
        ("apart", "in turn", "full"): full,
        ("apart", "in turn", "window"): replace(full, window=(37, 21), scale=0.3),
        ("apart", "in turn", "causal"): replace(long, causal=False, window=(100, 0), causal_align="top-left"),
        ("apart", "in turn", "Dv"): replace(full, seqlen_q=700, heads=24, head_dim_v=8, layout="bshd_transposed"),
    }


def few(head_dim: int, dtype: str) -> dict[str, Case]:
    """Fewer key tiles than SMs and long columns: several CTAs share the query tiles of each."""
    full = Case(4200, 600, head_dim, batch=1, heads=4, heads_kv=2, dtype=dtype)
    return {
        "full": full,
        "one head, causal": replace(full, seqlen_q=4100, seqlen_k=4100, heads=1, heads_kv=1, causal=True),
        "grouped, causal": replace(full, seqlen_q=1030, seqlen_k=700, heads=16, heads_kv=1, causal=True),
        "window": replace(full, seqlen_q=5000, seqlen_k=4700, heads=2, heads_kv=1, window=(3000, 2000)),
        "Dv apart": replace(full, head_dim_v=8, layout="bshd_transposed", causal=True, causal_align="top-left"),
    }


def enough(head_dim: int) -> dict[tuple[str, str, str], Case]:
    """Eight key tiles and more for each SM: the way to dQ, the way if deterministic, what it is."""
    causal = Case(2048, 2048, head_dim, batch=5, heads=16, heads_kv=16, dtype="bfloat16", causal=True)
    few = "in turn" if ROW_OF[head_dim] <= 80 else "apart"  # keys of a row
    return {
        (few if few == "in turn" else "any order", "in turn", "causal"): causal,
        ("any order", "in turn", "full"): replace(causal, seqlen_q=1111, seqlen_k=2000, causal=False),
        (few, few, "window"): replace(causal, seqlen_q=3000, seqlen_k=2000, causal=False, window=(300, 100)),
        ("any order", "in turn", "rows that see no key"): replace(
            causal, seqlen_q=3000, seqlen_k=2000, causal=False, window=(200, None), causal_align="top-left"
        ),
    }


def many_heads(head_dim: int, dtype: str) -> dict[int, Case]:
    """Groups of more than four heads, and a mask that makes tiles unequal: how many CTAs share a key tile."""
    five = Case(800, 850, head_dim, batch=1, heads=25, heads_kv=5, dtype=dtype, causal=True)
    return {
        2: five,
        3 * 2: replace(five, seqlen_q=1300, seqlen_k=1500, heads=20, heads_kv=2),  # they share its queries as well
        4 * 2: replace(five, seqlen_q=1500, seqlen_k=1600, heads=13, heads_kv=1, causal=False, window=(1100, 30)),
    }


FUSED = [d for d, row in ROW_OF.items() if row <= 128]


@pytest.mark.parametrize("head_dim", FUSED)
def test_the_cases_take_these_ways(head_dim: int) -> None:
    """On the CPU: else a run on Hopper would not test what it says."""
    from flash_attn_ext._binary import _C

    if not hasattr(_C, "plan_cuda"):
        pytest.skip("flash_attn_ext is built without CUDA")
    for (usual, deterministic, what), case in many(head_dim, "bfloat16").items():
        assert (way(case, False), way(case, True)) == ((usual, 1), (deterministic, 1)), what
    huge = Case(2**20, 2**20, head_dim, batch=32, heads=8, heads_kv=8, dtype="bfloat16")  # 64 GB of sums
    assert way(huge, False) == way(huge, True) == ("apart", 1)
    for what, case in few(head_dim, "bfloat16").items():
        usual, deterministic = way(case, False), way(case, True)
        assert (usual[0], deterministic[0]) == ("any order", "apart") and min(usual[1], deterministic[1]) > 1, what
    for splits, case in many_heads(head_dim, "bfloat16").items():
        assert way(case, False) == ("any order", splits)
    for (usual, deterministic, what), case in enough(head_dim).items():
        assert (way(case, False), way(case, True)) == ((usual, 1), (deterministic, 1)), what


@pytest.mark.gpu
@for_both_dtypes
@for_every_head_dim
def test_gradients(head_dim: int, dtype: str, hopper: None, poisoned: None) -> None:
    """shapes() come in any order; if deterministic, in turn or apart."""
    for case in (*shapes(head_dim, dtype), *many(head_dim, dtype).values()):
        x = harness.inputs_of(case, "cuda")
        assert explain(x.q, x.k, x.v, **x.kwargs)["bwd"]["kernel"] == f"sm90_bwd_d{ROW_OF[head_dim]}", case.id
        for deterministic in (False, True):
            harness.check_backward(case, "cuda", deterministic=deterministic)


@pytest.mark.gpu
@for_both_dtypes
@pytest.mark.parametrize("head_dim", [64, 72, 96, 112, 128])
def test_key_tiles_that_are_shared(head_dim: int, dtype: str, hopper: None, poisoned: None) -> None:
    for case in (*few(head_dim, dtype).values(), *many_heads(head_dim, dtype).values()):
        for deterministic in (False, True):
            harness.check_backward(case, "cuda", deterministic=deterministic)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", sorted(set(ROW_OF.values())))
def test_ten_backwards_have_the_same_bits(head_dim: int, hopper: None, poisoned: None) -> None:
    """In turn and apart without being asked; asked for it, always. The other way comes to the same but for rounding."""
    groups = Case(1111, 2000, head_dim, batch=1, heads=16, heads_kv=4, dtype="bfloat16")
    long = replace(groups, seqlen_q=6000, seqlen_k=6000, batch=2, heads_kv=16, causal=True)
    # In turn, in many sections of which the last one goes the other way round; and four heads side by side.
    sections = replace(long, seqlen_q=15900, seqlen_k=16000, batch=1, heads=18, heads_kv=18)
    side_by_side = replace(sections, heads=9, heads_kv=9, causal=False)
    asked = (
        groups,
        long,
        sections,
        side_by_side,
        *many(head_dim, "float16").values(),
        *few(head_dim, "bfloat16").values(),
    )
    unasked = [(case, usual == "any order") for (usual, _, _), case in enough(head_dim).items()]
    for case, deterministic in [*unasked, *((case, True) for case in asked)]:
        x = harness.inputs_of(case, "cuda")
        options = (case.scale, *harness.operator_window(case), case.causal_align == "top-left")
        out, lse = ops.fwd(x.q, x.k, x.v, *options)
        inputs = (x.dout, x.dlse, x.q, x.k, x.v, out, lse, *options)
        runs = [ops.bwd(*inputs, deterministic) for _ in range(10)]
        assert all(same_bits(run, runs[0]) for run in runs[1:]), case.id
        for ours, other in zip(runs[0], ops.bwd(*inputs, not deterministic), strict=True):
            difference = (ours.float() - other.float()).norm()
            assert difference <= 1e-2 * other.float().norm().clamp_min(1e-3), case.id


@pytest.mark.gpu
def test_backwards_of_two_streams_at_once(hopper: None) -> None:
    """In turn, CTAs wait for CTAs of their own call alone, which may find few SMs free."""
    calls = []
    for head_dim in (64, 128):
        q, k, v = qkv(replace(MANY_TILES, seqlen_q=1500, seqlen_k=1500, heads_kv=16, head_dim=head_dim), seed=head_dim)
        out, lse = ops.fwd(q, k, v)
        calls.append((torch.randn_like(out), None, q, k, v, out, lse, None, -1, -1, False, True))
    expected = [ops.bwd(*call) for call in calls]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in calls], []
    for _ in range(20):
        for stream, call, reference in zip(streams, calls, expected, strict=True):
            with torch.cuda.stream(stream):
                results.append((ops.bwd(*call), reference))
    torch.cuda.synchronize()
    assert all(same_bits(ours, reference) for ours, reference in results)


@pytest.mark.gpu
def test_gradients_of_lse(hopper: None) -> None:
    """lse of this forward is what a backward reads."""
    case = Case(333, 517, 128, batch=2, heads=6, heads_kv=2, dtype="bfloat16", causal=True)
    assert plan(case)["kernel"] == "sm90_fwd_d128"
    harness.check_backward(case, "cuda", deterministic=True)


@pytest.mark.gpu
def test_a_thread_that_has_not_used_cuda(hopper: None) -> None:
    """The driver makes tensor maps and wants a context; autograd's threads may have none before our backward."""
    case = Case(300, 300, 128, batch=1, heads=2, heads_kv=2, dtype="bfloat16", causal=True)
    x = harness.inputs_of(case, "cuda")
    expected = flash_attention(x.q, x.k, x.v, causal=True)
    results = []
    thread = threading.Thread(target=lambda: results.append(flash_attention(x.q, x.k, x.v, causal=True)))
    thread.start()
    thread.join()
    assert torch.equal(results[0], expected)
