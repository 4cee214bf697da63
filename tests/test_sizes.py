"""Sizes and values at the edges: nothing, one, one more than a tile, too much for 32 bits; huge, infinite, NaN."""

from __future__ import annotations

import itertools
import math
import mmap
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import cases
import harness
import pytest
import torch
from cases import Case
from torch import Tensor

from flash_attn_ext import flash_attention, flash_attention_v1, naive_attention
from flash_attn_ext._binary import _C

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

INF, NAN = math.inf, math.nan
DTYPES = cases.DTYPES


def attend(version: int, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    """out and lse; of version 1 through its operator."""
    if version == 1:
        return harness.ops.fwd_v1(q, k, v, None, -1, 0 if causal else -1)
    return flash_attention(q, k, v, causal=causal, return_lse=True)


def gradients(tensors: tuple[Tensor, ...], causal: bool = False) -> tuple[Tensor, ...]:
    """Of a loss in which every entry of out has another weight."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = flash_attention(*leaves, causal=causal)
    dout = harness.randn(*out.shape, dtype=out.dtype, seed=5)
    return torch.autograd.grad(out, leaves, dout)


def tensors_of(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    return cases.make_inputs(case)


# ---- nothing, and one ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch, seqlen_q, seqlen_k", list(itertools.product((0, 2), (0, 1, 70), (0, 1, 70))))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("causal", [False, True])
def test_empty_sizes(batch, seqlen_q, seqlen_k, dtype, causal):
    q = harness.randn(batch, 4, seqlen_q, 16, dtype=getattr(torch, dtype), seed=1)
    k = harness.randn(batch, 2, seqlen_k, 16, dtype=q.dtype, seed=2)
    v = harness.randn(batch, 2, seqlen_k, 24, dtype=q.dtype, seed=3)
    for version in (1, 2):
        out, lse = attend(version, q, k, v, causal)
        assert out.shape == (batch, 4, seqlen_q, 24) and lse.shape == (batch, 4, seqlen_q)
        assert out.dtype == q.dtype and lse.dtype == torch.float32
        if seqlen_k == 0:
            assert not out.any() and lse.isneginf().all()
        elif batch and seqlen_q:
            rows = seqlen_q if not causal else min(seqlen_q, seqlen_k)
            assert out[:, :, -rows:].any(-1).all() and lse[:, :, -rows:].isfinite().all()
            assert not out[:, :, : seqlen_q - rows].any() and lse[:, :, : seqlen_q - rows].isneginf().all()
    for t, grad in zip((q, k, v), gradients((q, k, v), causal), strict=True):
        assert grad.shape == t.shape and grad.isfinite().all()
        if 0 in (seqlen_q, seqlen_k):
            assert not grad.any()  # poisoned memory would show


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_of_everything(dtype):
    q, k, v = (torch.full((1, 1, 1, 1), x, dtype=getattr(torch, dtype)) for x in (3.0, -2.0, 5.0))
    for version in (1, 2):
        out, lse = attend(version, q, k, v, True)
        assert out.item() == 5.0
        assert lse.item() == pytest.approx(-6.0, rel=1e-6)
    dq, dk, dv = gradients((q, k, v))
    dout = harness.randn(1, 1, 1, 1, dtype=q.dtype, seed=5).item()
    assert dv.item() == pytest.approx(dout, rel=torch.finfo(q.dtype).eps * 4)  # P is 1 but for the rounding of lse
    assert abs(dq.item()) < 1e-2 and abs(dk.item()) < 1e-2


def test_no_head_dimension_and_no_heads_are_refused():
    x = torch.zeros(1, 1, 4, 8)
    for function in (flash_attention, flash_attention_v1):
        with pytest.raises(ValueError, match="head dimension"):
            function(x[..., :0], x[..., :0], x)
        with pytest.raises(ValueError, match="head dimension"):
            function(x, x, x[..., :0])
        with pytest.raises(ValueError, match="head"):
            function(x[:, :0], x[:, :0], x[:, :0])


# ---- head dimensions -------------------------------------------------------------------------------------------------

DIMENSIONS = ((1, 1), (1, 257), (257, 1), (2, 3), (7, 33), (31, 65), (255, 256), (257, 257), (320, 512), (1000, 1000))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim, head_dim_v", DIMENSIONS)
def test_head_dimensions(head_dim, head_dim_v, dtype):
    """Past what the list of cases has, and D unlike Dv in every order; the tile is chosen by the larger of the two."""
    case = Case(70, 150, head_dim, heads=2, heads_kv=1, causal=True, head_dim_v=head_dim_v, dtype=dtype)
    for version in (1, 2):
        harness.check_forward(case, version=version)
    harness.check_backward(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(16, 16), (33, 20), (160, 7)])
def test_three_dimensions_are_four_with_one_head(dims, dtype):
    q, k, v = tensors_of(Case(70, 150, dims[0], batch=3, head_dim_v=dims[1], dtype=dtype))
    flat = tuple(t[:, 0] for t in (q, k, v))
    for version, causal in itertools.product((1, 2), (False, True)):
        for one, four in zip(attend(version, *flat, causal), attend(version, q, k, v, causal), strict=True):
            assert one.dim() == four.dim() - 1 and torch.equal(one, four[:, 0])
    for one, four in zip(gradients(flat, True), gradients((q, k, v), True), strict=True):
        assert one.dim() == 3 and torch.equal(one, four[:, 0])


# ---- lengths around tiles --------------------------------------------------------------------------------------------


def tile_of(pass_: str, version: int, head_dim: int, dtype: str) -> tuple[int, int, set[int]]:
    """Rows and keys of the tile, rows of a product and of a task: lengths so long that nothing is narrowed."""
    lengths = {"batch": 1, "heads": 1, "heads_kv": 1, "seqlen_q": 2**20, "seqlen_k": 2**20}
    dims = {"head_dim": head_dim, "head_dim_v": head_dim, "block_m": 0, "block_n": 0, "threads": 1}
    plan = _C.plan(pass_=pass_, version=version, dtype=dtype, **lengths, **dims)
    if pass_ == "bwd":  # its squares are chunk x chunk
        return plan["tile"][0], plan["tile"][0], {plan["tile"][1]}
    groups = {plan["rows_per_product"], plan["rows_per_task"]} if version == 2 else {plan["tile"][0]}
    return *plan["tile"], groups


def around(size: int) -> tuple[int, int, int]:
    return size - 1, size, size + 1


def tile_cases(pass_: str, version: int) -> Iterator[Any]:
    for head_dim, (i, dtype) in itertools.product((16, 160, 300), enumerate(("float32", "bfloat16"))):
        rows, keys, groups = tile_of(pass_, version, head_dim, dtype)
        lengths = list(itertools.product(around(rows), around(keys)))
        lengths += [(s, keys + 1) for group in sorted(groups) for s in around(group)]
        lengths += [(rows + 1, s) for s in around(2 * keys)]
        lengths += [(17, s) for s in around(32)]  # columns are narrowed in steps of 32
        for j, (seqlen_q, seqlen_k) in enumerate(dict.fromkeys(lengths)):
            case = Case(seqlen_q, seqlen_k, head_dim, dtype=dtype, causal=(i + j) % 2 == 0)
            yield pytest.param(case, id=case.id)


@pytest.mark.parametrize("case", list(tile_cases("fwd", 1)))
def test_lengths_around_tiles_v1(case):
    harness.check_forward(case, version=1)


@pytest.mark.parametrize("case", list(tile_cases("fwd", 2)))
def test_lengths_around_tiles_v2(case):
    harness.check_forward(case)


@pytest.mark.parametrize("case", list(tile_cases("bwd", 2)))
def test_lengths_around_squares(case):
    harness.check_backward(case)


@pytest.mark.parametrize("distance", [*around(32), *around(64), *around(256)])
def test_windows_that_end_around_tiles(distance):
    case = Case(300, 600, 16, window=(distance, distance - 1))
    harness.check_forward(case)
    harness.check_backward(case)
    harness.check_forward(replace(case, seqlen_q=600, seqlen_k=300, causal_align="top-left"))


# ---- too much for 32 bits --------------------------------------------------------------------------------------------

FAR = 2**31 + 8  # elements


@pytest.fixture(scope="module")
def far_memory() -> Tensor:
    """9 GB of addresses in fp16 with no memory behind but for the pages that are written."""
    if sys.platform != "linux":
        pytest.skip("how to reserve addresses without memory is known for Linux alone")
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.13 on
    try:
        memory = mmap.mmap(-1, 2 * (FAR + 2**21), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    except OSError as error:
        pytest.skip(f"no {2 * FAR / 1e9:.0f} GB of addresses: {error}")
    return torch.frombuffer(memory, dtype=torch.float16)


# Strides of batch, head, sequence: each in turn alone reaches past 2^31 elements, and so the last index is far out.
FAR_STRIDES = {
    "batch": (FAR, 4096, 32),
    "head": (8192, FAR, 32),
    "sequence": (8192, 4096, FAR // 40 + 1),
}


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("stride", FAR_STRIDES)
def test_offsets_past_32_bits(far_memory, stride, which):
    case = Case(41, 41, 32, batch=2, heads=2, heads_kv=2, dtype="float16", causal=True)
    near = dict(zip("qkv", tensors_of(case), strict=True))
    far = torch.as_strided(far_memory, near[which].shape, (*FAR_STRIDES[stride], 1))
    last = sum((n - 1) * s for n, s in zip(far.shape, far.stride(), strict=True))
    assert 2**31 < last < far_memory.numel()
    far.copy_(near[which])
    wide = near | {which: far}
    for version in (1, 2):
        for ours, expected in zip(attend(version, **wide), attend(version, **near), strict=True):
            assert torch.equal(ours, expected)
    for ours, expected in zip(gradients((*wide.values(),)), gradients((*near.values(),)), strict=True):
        assert torch.equal(ours, expected)


def test_gradients_of_far_out_and_dout(far_memory):
    """What the backward reads besides q, k and v."""
    case = Case(41, 41, 32, batch=2, heads=2, heads_kv=2, dtype="float16")
    q, k, v = tensors_of(case)
    out, lse = attend(2, q, k, v)
    dout = harness.randn(*out.shape, dtype=out.dtype, seed=5)
    far = torch.as_strided(far_memory, out.shape, (*FAR_STRIDES["batch"], 1))
    expected = harness.ops.bwd(dout, None, q, k, v, out, lse)
    for near in (dout, out):
        far.copy_(near)
        dout_or_far, out_or_far = (far, out) if near is dout else (dout, far)
        for ours, grad in zip(harness.ops.bwd(dout_or_far, None, q, k, v, out_or_far, lse), expected, strict=True):
            assert torch.equal(ours, grad)


def test_more_than_2_to_31_elements_by_expansion():
    """k and v of 2^31 keys' worth of elements: one row in memory, read again and again."""
    seqlen_k, heads = 2048, 2**31 // (2048 * 512) + 1
    one = [harness.randn(1, 1, 1, 512, dtype=torch.float32, seed=s) for s in (1, 2)]
    k, v = (t.expand(1, heads, seqlen_k, 512) for t in one)
    assert k.numel() > 2**31
    q = torch.zeros(1, 1, 1, 512).expand(1, heads, 1, 512)
    out, lse = flash_attention(q[:, :, :, :1], k[..., :1], v[..., :1], return_lse=True)  # of each head one column
    assert torch.allclose(out, v[:, :, :1, :1], rtol=1e-5) and torch.allclose(lse, torch.tensor(math.log(seqlen_k)))


def test_strides_of_zero_everywhere():
    """All keys are one key, all rows one row, and all gradients are finite and equal to those of copies."""
    q, k, v = (harness.randn(1, 1, 1, 24, dtype=torch.float64, seed=s).expand(2, 3, 300, 24) for s in (1, 2, 3))
    copies = tuple(t.contiguous() for t in (q, k, v))
    for version in (1, 2):
        for ours, expected in zip(attend(version, q, k, v, True), attend(version, *copies, True), strict=True):
            assert torch.equal(ours, expected)
    for ours, expected in zip(gradients((q, k, v), True), gradients(copies, True), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("batch, heads", [(70_000, 1), (1, 70_000), (300, 300)])
def test_more_heads_than_16_bits(batch, heads):
    q, k, v = (harness.randn(batch, heads, n, 2, dtype=torch.float64, seed=n) for n in (1, 2, 2))
    for version in (1, 2):
        ours = attend(version, q, k, v)
        for result, expected in zip(ours, naive_attention(q, k, v, return_lse=True), strict=True):
            harness.assert_close_to_oracle(result, expected, None)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    dout = harness.randn(*q.shape, dtype=q.dtype, seed=5)
    expected = torch.autograd.grad(naive_attention(*leaves), leaves, dout)
    for grad, ref in zip(gradients((q, k, v)), expected, strict=True):
        harness.assert_close_to_oracle(grad, ref, None, kind="gradient")


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("largest", [1e4, -1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_ten_thousand(dtype, largest, version):
    """The winner takes all, wherever its tile stands; in the gradients too, and nothing overflows."""
    rows, keys, bits = 70, 300, 64
    type_ = getattr(torch, dtype)
    winner = torch.arange(rows) * 4 % keys  # in the first tile of keys and in the second
    codes = harness.randn(1, 1, keys, bits).sign()
    assert ((codes @ codes.mT)[0, 0] - bits * torch.eye(keys)).max() < 50  # no two keys are alike: P is e^-2000
    # One more column moves all scores of a row: the largest is 1e4, or -1e4 with the others far below.
    column = torch.ones(1, 1, keys, 1) * (0.0 if largest > 0 else -128.0)
    k = torch.cat((codes, column), -1).to(type_)
    q = torch.cat((codes[:, :, winner], torch.ones(1, 1, rows, 1)), -1).to(type_)
    v, scale = harness.randn(1, 1, keys, 16, dtype=type_), 1e4 / bits
    tolerance = max(torch.finfo(type_).eps, 1e-12) * 4
    leaves = [t.requires_grad_() for t in (q, k, v)]
    op = harness.ops.fwd_v1 if version == 1 else harness.ops.fwd
    out, lse = op(*leaves, scale)
    torch.testing.assert_close(out, v[:, :, winner], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        lse, torch.full_like(lse, largest), rtol=1e-6 if lse.dtype == torch.float32 else 1e-12, atol=0
    )
    dout = harness.randn(*out.shape, dtype=type_, seed=5)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    # P is recomputed from lse, whose own rounding at 1e4 is half of 2^-10 in fp32.
    expected = torch.zeros_like(v).index_put((torch.tensor(0), torch.tensor(0), winner), dout[0, 0])
    torch.testing.assert_close(dv, expected, rtol=max(tolerance, 1e-11 if dtype == "float64" else 2e-3), atol=0)
    assert dq.isfinite().all() and dk.isfinite().all()


@pytest.mark.parametrize("version", [1, 2])
def test_large_fp16_values(version):
    """Scores past 65504 are held in fp32, and a mean of the largest number is that number, not infinity."""
    q, k, v = tensors_of(Case(70, 300, 64, dtype="float16"))
    q, k = q.sign() * 4096, k.sign() * 1024
    out, lse = attend(version, q, k, v)
    ref, ref_lse = naive_attention(q.float(), k.float(), v.float(), return_lse=True, upcast=True)
    assert ref_lse.min() > 2**23 and out.isfinite().all()
    torch.testing.assert_close(lse.double(), ref_lse, rtol=1e-6, atol=0)
    # Scores are multiples of 2^20, so that no rounding of them moves a weight between keys that are not equal.
    torch.testing.assert_close(out.double(), ref, rtol=2e-3, atol=2e-3)
    largest = torch.full_like(v, torch.finfo(torch.float16).max)
    for queries in (q, q * 0, harness.randn(*q.shape, dtype=q.dtype)):
        assert torch.equal(attend(version, queries, k, largest)[0], torch.full_like(q, 65504.0))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_enormous_finite_scores(dtype, version):
    """Of any size that fp32 holds, all of them equal: the mean of v, as from plain PyTorch in fp32."""
    type_ = getattr(torch, dtype)
    v = torch.arange(4, dtype=type_).repeat(8).view(1, 1, 32, 1)
    for factor in (1.1, 1.3, 1.7, 1.9):
        q, k = torch.full((1, 1, 1, 1), 5e4 * factor / 2, dtype=type_), torch.full((1, 1, 32, 1), 6e4, dtype=type_)
        op = harness.ops.fwd_v1 if version == 1 else harness.ops.fwd
        out, lse = op(q, k, v, 100.0)
        assert naive_attention(q.float(), k.float(), v.float(), 100.0).item() == 1.5
        assert out.item() == 1.5 and lse.isfinite().all()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_values_of_any_size(dtype, size, version):
    """v may be as small or as large as its sum over keys allows."""
    q, k, v = tensors_of(Case(70, 300, 24, dtype=dtype))
    power = 2.0 ** round(math.log2(size))
    assert torch.equal(attend(version, q, k, v * power)[0], attend(version, q, k, v)[0] * power)


def specials(t: Tensor) -> Tensor:
    """0 for finite, 1 and 2 for the infinities, 3 for NaN."""
    return t.isposinf() * 1 + t.isneginf() * 2 + t.isnan() * 3


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_reach_the_rows_that_read_them(dtype, where, value, version):
    """One entry: out is NaN or infinite at the places where plain PyTorch's is, in no other row, column or head.

    In a wider type: PyTorch's bf16 product on AMX reads the end of a row of P up to a multiple of 32 keys, that is the
    start of the next one, times 0, so that a row of NaN spoils the row before it as well.
    """
    tensors = dict(zip("qkv", tensors_of(Case(150, 300, 24, batch=2, heads=2, heads_kv=2, dtype=dtype)), strict=True))
    tensors[where][1, 0, 70, 5] = value
    out, lse = attend(version, **tensors)
    ref, ref_lse = naive_attention(**tensors, return_lse=True, upcast=True)
    assert not ref.isfinite().all()
    assert torch.equal(specials(out), specials(ref))
    assert torch.equal(lse.isfinite(), ref_lse.isfinite())
    if value is NAN or where == "v":
        assert torch.equal(specials(lse), specials(ref_lse))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_under_a_causal_mask(dtype, where, version):
    """Every row that sees the key is NaN. Of those that do not, q's and k's stay clean; for v that is not promised (a
    weight of 0 times NaN), but no more rows suffer than in plain PyTorch."""
    tensors = dict(zip("qkv", tensors_of(Case(300, 300, 24, dtype=dtype)), strict=True))
    tensors[where][0, 0, 140, 5] = NAN
    out, lse = attend(version, **tensors, causal=True)
    bad, bad_lse = out[0, 0].isnan(), lse[0, 0].isnan()
    ref = naive_attention(**tensors, causal=True)[0, 0].isnan()
    if where == "q":
        assert bad[140].all() and bad.any(-1).sum() == 1 and bad_lse.sum() == 1
    elif where == "k":
        assert bad[140:].all() and not bad[:140].any()
        assert bad_lse[140:].all() and not bad_lse[:140].any()
    else:
        assert bad[140:, 5].all() and not bad[:, torch.arange(24) != 5].any() and not bad_lse.any()
        assert (ref | ~bad).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_nan_in_one_head_stays_there(dtype):
    """Gradients as well: of the other heads and batches, bit for bit what they are without it."""
    tensors = tensors_of(Case(150, 300, 24, batch=2, heads=4, heads_kv=2, dtype=dtype))
    expected = gradients(tensors)
    tensors[0][0, 1, 70, 5] = NAN
    dq, dk, dv = gradients(tensors)
    assert dq[0, 1, 70].isnan().all() and dk[0, 0].isnan().any() and dv[0, 0].isnan().any()
    for ours, grad, head in zip((dq, dk, dv), expected, (1, 0, 0), strict=True):
        others = torch.ones(ours.shape[:2], dtype=torch.bool)
        others[0, head] = False
        assert torch.equal(ours[others], grad[others])
    assert torch.equal(dq[0, 1, :70], expected[0][0, 1, :70])  # nor do the other rows of its head suffer


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("where", ["q", "k"])
def test_lse_of_an_infinite_score(where, version):
    tensors = dict(zip("qkv", tensors_of(Case(5, 7, 3, dtype="float64")), strict=True))
    tensors[where][0, 0, 2, 1] = INF
    lse, ref = attend(version, **tensors)[1], naive_attention(**tensors, return_lse=True)[1]
    assert ref.isposinf().any() and torch.equal(specials(lse), specials(ref))


@pytest.mark.parametrize("version", [1, 2])
def test_infinitely_low_scores_are_no_keys(version):
    """A key of -inf score weighs exactly 0, first or last; that is how padding by -inf in k would look."""
    q, k, v = tensors_of(Case(70, 300, 24, dtype="float64"))
    q = q.abs()
    hidden = torch.arange(300) % 3 == 0
    k[0, 0, hidden] = -INF
    out, lse = attend(version, q, k, v)
    ref, ref_lse = naive_attention(q, k[:, :, ~hidden], v[:, :, ~hidden], return_lse=True)
    harness.assert_close_to_oracle(out, ref, None)
    harness.assert_close_to_oracle(lse, ref_lse, None)
