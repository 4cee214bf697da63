"""naive_attention against independent formulations; the random numbers; the case list; the tolerance rule."""

from __future__ import annotations

import dataclasses
import itertools
import math

import cases
import pytest
import tolerance
import torch
import torch.nn.functional as F

from flash_attn_ext.reference import (
    draw_philox_state,
    dropout_keep_mask,
    dropout_threshold,
    naive_attention,
    philox_4x32_10,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors here are tiny: on a busy machine, threads that wait for each other take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, grad: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def qkv(b=2, h=4, hk=2, sq=5, sk=7, d=3, dv=3, grad=False, dtype=torch.float64):
    shapes = ((b, h, sq, d), (b, hk, sk, d), (b, hk, sk, dv))
    return tuple(randn(*shape, seed=i, grad=grad, dtype=dtype) for i, shape in enumerate(shapes))


def loop_attention(
    q, k, v, scale=None, causal=False, *, causal_align="bottom-right", window=None, softcap=0.0, alibi_slopes=None,
    mask=None, bias=None,
):  # fmt: skip
    """Attention read off the definition, one score at a time, in Python floats."""
    (nb, nh, sq, d), (_, hk, sk, dv) = q.shape, v.shape
    scale = d**-0.5 if scale is None else scale
    shift = sk - sq if causal_align == "bottom-right" else 0
    mask = None if mask is None else mask.expand(nb, nh, sq, sk)
    bias = None if bias is None else bias.expand(nb, nh, sq, sk)
    out, lse = torch.zeros(nb, nh, sq, dv, dtype=torch.float64), torch.full((nb, nh, sq), -math.inf).double()
    for b, h, i in itertools.product(range(nb), range(nh), range(sq)):
        kv_head, scores = h // (nh // hk), {}
        for j in range(sk):
            if causal and j > i + shift:
                continue
            if window is not None:
                left, right = window
                if left is not None and left >= 0 and j < i + shift - left:
                    continue
                if right is not None and right >= 0 and j > i + shift + right:
                    continue
            if mask is not None and not mask[b, h, i, j]:
                continue
            s = scale * sum(x * y for x, y in zip(q[b, h, i].tolist(), k[b, kv_head, j].tolist(), strict=True))
            if softcap:
                s = softcap * math.tanh(s / softcap)
            if alibi_slopes is not None:
                slope = alibi_slopes[h] if alibi_slopes.dim() == 1 else alibi_slopes[b, h]
                s -= float(slope) * abs(i + shift - j)
            if bias is not None:
                s += float(bias[b, h, i, j])
            if s != -math.inf:
                scores[j] = s
        if scores:
            total = sum(math.exp(s) for s in scores.values())
            lse[b, h, i] = math.log(total)
            out[b, h, i] = sum(math.exp(s) / total * v[b, kv_head, j] for j, s in scores.items())
    return out, lse


def assert_equal_fp64(ours: torch.Tensor, ref: torch.Tensor, name: str = "result") -> None:
    tolerance.assert_close_to_oracle(ours, ref, None, name=name)


# --- naive_attention against independent formulations ---


@pytest.mark.parametrize("align", cases.ALIGNMENTS)
@pytest.mark.parametrize("geometry", cases.MASKS)
@pytest.mark.parametrize("sq, sk", [(5, 7), (7, 5), (1, 6), (6, 1), (4, 4)])
def test_geometry_against_loop(sq, sk, geometry, align):
    causal, window = cases.MASKS[geometry]
    small = None if window is None else tuple(None if x is None else min(x, 2) for x in window)
    inputs = qkv(sq=sq, sk=sk, dv=2)
    for w in (small, (1, -1), (-1, 1), (0, 3), (2**62, 2**62)):
        kwargs = dict(causal=causal, causal_align=align, window=w)
        for ours, ref in zip(
            naive_attention(*inputs, return_lse=True, **kwargs), loop_attention(*inputs, **kwargs), strict=True
        ):
            assert_equal_fp64(ours, ref, str(kwargs))


VARIANTS = {
    "scale": lambda: dict(scale=-0.7),
    "scale_zero": lambda: dict(scale=0.0),
    "softcap": lambda: dict(softcap=0.8),
    "alibi": lambda: dict(alibi_slopes=torch.tensor([0.5, 0.25, 0.1, 2.0])),
    "alibi_batch": lambda: dict(alibi_slopes=randn(2, 4).abs()),
    "mask_full": lambda: dict(mask=randn(2, 4, 5, 7) > 0.8),
    "mask_keys": lambda: dict(mask=randn(2, 1, 1, 7) > 0),
    "mask_rows": lambda: dict(mask=randn(5, 1) > 0),
    "bias_full": lambda: dict(bias=randn(2, 4, 5, 7)),
    "bias_head": lambda: dict(bias=randn(4, 1, 7)),
    "bias_inf": lambda: dict(bias=torch.where(randn(4, 5, 7) > 1.0, 0.3, -math.inf).double()),
    "everything": lambda: dict(
        scale=0.9, softcap=1.1, alibi_slopes=torch.rand(4), mask=randn(2, 1, 5, 7) > -1, bias=randn(5, 7), window=(3, 2)
    ),
}


@pytest.mark.parametrize("align", cases.ALIGNMENTS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_against_loop(variant, causal, align):
    inputs, kwargs = qkv(), dict(VARIANTS[variant](), causal=causal, causal_align=align)
    for ours, ref in zip(
        naive_attention(*inputs, return_lse=True, **kwargs), loop_attention(*inputs, **kwargs), strict=True
    ):
        assert_equal_fp64(ours, ref, variant)


@pytest.mark.parametrize("heads_kv", [4, 2, 1])
@pytest.mark.parametrize("extra", ["none", "causal", "mask", "bias"])
def test_against_pytorch_math(extra, heads_kv):
    q, k, v = qkv(hk=heads_kv, sq=33, sk=33, d=16, dv=16, grad=True)
    ours_args, sdpa_args = {"none": ({}, {}), "causal": (dict(causal=True), dict(is_causal=True))}.get(extra, ({}, {}))
    if extra == "mask":
        mask = (randn(2, 4, 33, 33) > 0) | torch.eye(33, dtype=torch.bool)
        ours_args, sdpa_args = dict(mask=mask), dict(attn_mask=mask)
    if extra == "bias":
        bias = randn(1, 4, 33, 33, grad=True)
        ours_args, sdpa_args = dict(bias=bias), dict(attn_mask=bias)
    leaves = (q, k, v) + ((bias,) if extra == "bias" else ())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        ref = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **sdpa_args)
    ours, dout = naive_attention(q, k, v, **ours_args), randn(*ref.shape, seed=9)
    assert_equal_fp64(ours, ref)
    for a, b in zip(torch.autograd.grad(ours, leaves, dout), torch.autograd.grad(ref, leaves, dout), strict=True):
        assert a.shape == b.shape
        assert_equal_fp64(a, b)


def test_lse_is_logsumexp_of_the_scores():
    q, k, v = qkv(hk=4)
    _, lse = naive_attention(q, k, v, 0.3, return_lse=True)
    assert_equal_fp64(lse, torch.logsumexp(0.3 * torch.einsum("bhid,bhjd->bhij", q, k), -1))


@pytest.mark.parametrize("kwargs", [dict(), dict(causal=True), dict(window=(1, 1)), dict(dropout_p=0.3)])
def test_three_dimensions_are_one_head(kwargs):
    q, k, v = (x[:, 0] for x in qkv())
    mask, bias = randn(2, 5, 7) > -1, randn(2, 5, 7, seed=4)
    kwargs = dict(kwargs, alibi_slopes=torch.tensor([0.2]), return_lse=True)
    torch.manual_seed(3)
    out, lse = naive_attention(q, k, v, mask=mask, bias=bias, **kwargs)
    torch.manual_seed(3)
    four = naive_attention(*(x[:, None] for x in (q, k, v)), mask=mask[:, None], bias=bias[:, None], **kwargs)
    assert torch.equal(out, four[0][:, 0]) and torch.equal(lse, four[1][:, 0])
    assert out.shape == (2, 5, 3) and lse.shape == (2, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_upcast(dtype):
    q, k, v = qkv(dtype=dtype)
    wide = torch.float32 if dtype.itemsize == 2 else torch.float64
    out, lse = naive_attention(q, k, v, return_lse=True)
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    out_up, lse_up = naive_attention(q, k, v, return_lse=True, upcast=True)
    assert out_up.dtype == lse_up.dtype == wide
    assert torch.equal(out_up, naive_attention(q.to(wide), k.to(wide), v.to(wide)))
    torch.testing.assert_close(out.to(wide), out_up, atol=0.03, rtol=0.03)


def test_large_negative_fp32_bias_in_fp16_is_an_empty_row():
    out, lse = naive_attention(*qkv(dtype=torch.float16), bias=torch.full((5, 7), -1e9), return_lse=True)
    assert not out.any() and torch.isneginf(lse).all()


# --- gradients and empty rows ---


@pytest.mark.parametrize("variant", ["none", *VARIANTS])
def test_gradcheck(variant):
    q, k, v = qkv(b=1, h=2, hk=1, sq=4, sk=3, d=2, dv=3, grad=True)
    kwargs = {} if variant == "none" else VARIANTS[variant]()
    for name in ("mask", "bias"):
        if name in kwargs:
            x = kwargs[name]
            shape = (1, 2, 4, 3)[4 - x.dim() :]
            kwargs[name] = x[tuple(slice(0, n) for n in shape)]
    if "alibi_slopes" in kwargs:
        kwargs["alibi_slopes"] = torch.tensor([0.5, 0.1])
    leaves = [q, k, v]
    if "bias" in kwargs:
        kwargs["bias"] = kwargs["bias"].clone().requires_grad_(variant != "bias_inf")
        leaves.append(kwargs["bias"])

    def function(q, k, v, *bias):
        torch.manual_seed(0)
        extra = {"bias": bias[0]} if bias else {}
        out, lse = naive_attention(
            q, k, v, causal=True, dropout_p=0.4, return_lse=True, **{**kwargs, **extra}
        )  # causal with Sq > Sk: the first row is empty
        return out, torch.where(lse.isfinite(), lse, 0.0)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(causal=True),
        dict(window=(0, 0), causal_align="top-left"),
        dict(mask=torch.zeros(9, 1, dtype=torch.bool)),
        dict(bias=torch.full((9, 4), -math.inf)),
        dict(causal=True, softcap=1.0, dropout_p=0.5),
    ],
)
def test_empty_rows(kwargs, dtype):
    q, k, v = qkv(sq=9, sk=4, grad=True, dtype=dtype)
    kwargs = dict(kwargs)
    leaves = [q, k, v]
    if "bias" in kwargs:
        kwargs["bias"] = kwargs["bias"].clone().requires_grad_()
        leaves.append(kwargs["bias"])
    out, lse = naive_attention(q, k, v, return_lse=True, **kwargs)
    empty = torch.isneginf(lse)
    assert empty.any() and not out.isnan().any() and not lse.isnan().any()
    assert not out[empty].any()
    grads = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))
    assert all(torch.isfinite(g).all() for g in grads)
    assert not grads[0][empty].any()
    if empty.all():
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize("b, sq, sk", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0)])
@pytest.mark.parametrize("kwargs", [{}, dict(causal=True), dict(dropout_p=0.5), dict(bias=torch.zeros(1, 1))])
def test_empty_tensors(b, sq, sk, kwargs):
    q, k, v = qkv(b=b, sq=sq, sk=sk, dv=5, grad=True)
    out, lse = naive_attention(q, k, v, return_lse=True, **kwargs)
    assert out.shape == (b, 4, sq, 5) and lse.shape == (b, 4, sq)
    if sk == 0:
        assert not out.any() and torch.isneginf(lse).all()
    grads = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
    assert all(torch.isfinite(g).all() and g.shape == x.shape for g, x in zip(grads, (q, k, v), strict=True))


# --- dropout ---


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The vectors of Random123's kat_vectors file."""
    words = philox_4x32_10(
        tuple(torch.tensor([int(x, 16)]) for x in counter.split()), [int(x, 16) for x in key.split()]
    )
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def philox_python(counter: list[int], key: list[int]) -> list[int]:
    """Philox with Python's unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize("seed, offset", [(0, 0), (2**62 + 12345, 8), (2**64 - 3, 2**40 + 4), (-7, 4)])
def test_keep_mask_is_the_scheme(seed, offset):
    """Entry by entry from the formulas of the specification."""
    nb, nh, rows, cols, p = 2, 3, 37, 35, 0.3
    mask = dropout_keep_mask(nb, nh, rows, cols, p, seed, offset)
    assert mask.shape == (nb, nh, rows, cols) and mask.dtype == torch.bool
    seed, offset = seed % 2**64, offset % 2**64
    for b, h, row, col in [(0, 0, 0, 0), (1, 2, 36, 34), *itertools.product((1,), (1,), range(0, 37, 3), range(35))]:
        counter = [(col // 16) * 4 + (col % 8) // 2, (row // 16) * 8 + row % 8, b * nh + h, offset % 2**32]
        words = philox_python(counter, [seed % 2**32, (seed >> 32) ^ (offset >> 32)])
        index = ((row >> 3) & 1) * 4 + ((col >> 3) & 1) * 2 + (col & 1)
        half = (words[index // 2] >> (16 * (index % 2))) & 0xFFFF
        assert mask[b, h, row, col].item() == (half >= round(p * 65536))


def test_keep_mask_uses_every_random_half_once():
    """No two entries share a (counter, half): a 32 x 32 block uses 32 * 32 distinct ones."""
    seen = {
        ((col // 16) * 4 + (col % 8) // 2, (row // 16) * 8 + row % 8, (row >> 3) & 1, (col >> 3) & 1, col & 1)
        for row, col in itertools.product(range(32), range(32))
    }
    assert len(seen) == 32 * 32


def test_keep_mask_is_independent_of_tile_and_size():
    whole = dropout_keep_mask(3, 4, 100, 90, 0.4, seed=77, offset=4)
    for rows, cols in ((1, 1), (16, 16), (17, 90), (100, 5), (64, 64)):
        assert torch.equal(dropout_keep_mask(3, 4, rows, cols, 0.4, seed=77, offset=4), whole[:, :, :rows, :cols])
    assert torch.equal(dropout_keep_mask(1, 4, 100, 90, 0.4, seed=77, offset=4), whole[:1])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keep_mask_statistics(p):
    n = 4 * 256 * 256
    a, b, c = (dropout_keep_mask(2, 2, 256, 256, p, *state) for state in ((1, 0), (2, 0), (1, 4)))
    sigma = math.sqrt(p * (1 - p) / n)
    for mask in (a, b, c):
        assert abs(mask.double().mean().item() - (1 - p)) < 5 * sigma
        for axis in (0, 1, 2, 3):  # neighbours in every direction are uncorrelated
            x = mask.double() - (1 - p)
            left, right = x.narrow(axis, 0, x.shape[axis] - 1), x.narrow(axis, 1, x.shape[axis] - 1)
            assert abs((left * right).mean().item()) < 5 * p * (1 - p) / math.sqrt(left.numel())
    for x, y in ((a, b), (a, c)):  # seeds and offsets are independent
        assert abs(((x.double() - (1 - p)) * (y.double() - (1 - p))).mean().item()) < 5 * p * (1 - p) / math.sqrt(n)


def test_dropout_threshold():
    pairs = {0.0: 0, 2**-16: 1, 0.5: 32768, 2**-18: 0, 1.5 * 2**-16: 2, 2.5 * 2**-16: 2, 0.9999999: 65535}
    assert {p: dropout_threshold(p) for p in pairs} == pairs
    assert dropout_keep_mask(1, 1, 8, 8, 1e-9, seed=5).all()


def test_dropout_is_repeatable_unbiased_and_leaves_lse():
    q, k, v = qkv(b=1, h=2, hk=2, sq=24, sk=40, d=8, dv=8)
    torch.manual_seed(5)
    first, lse = naive_attention(q, k, v, dropout_p=0.25, return_lse=True)
    second = naive_attention(q, k, v, dropout_p=0.25)
    torch.manual_seed(5)
    assert torch.equal(first, naive_attention(q, k, v, dropout_p=0.25)) and not torch.equal(first, second)
    plain, plain_lse = naive_attention(q, k, v, return_lse=True)
    assert torch.equal(lse, plain_lse)
    torch.manual_seed(5)
    keep = dropout_keep_mask(1, 2, 24, 40, 0.25, *draw_philox_state("cpu"))
    probs = torch.softmax(q @ k.transpose(-2, -1) * 8**-0.5, -1)
    assert_equal_fp64(first, (probs * keep / 0.75) @ v)
    mean = sum(naive_attention(q, k, v, dropout_p=0.25) for _ in range(400)) / 400
    spread = (probs**2 @ v**2 * (0.25 / 0.75) / 400).sqrt()
    assert ((mean - plain).abs() < 6 * spread + 1e-12).all()


def test_dropout_leaves_the_generator_alone_when_off():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    naive_attention(*qkv(), dropout_p=0.0)
    naive_attention(*qkv(), dropout_p=1e-9)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_dropout_state_on_cuda():
    torch.manual_seed(11)
    first, second = draw_philox_state("cuda"), draw_philox_state("cuda")
    assert first == (11, 0) and second == (11, 4)
    host, device = (dropout_keep_mask(2, 3, 33, 47, 0.3, *second, device=device) for device in ("cpu", "cuda"))
    assert torch.equal(host, device.cpu())


# --- errors ---


@pytest.mark.parametrize(
    "change, error, text",
    [
        (
            dict(k=torch.zeros(2, 3, 7, 3), v=torch.zeros(2, 3, 7, 3)),
            ValueError,
            r"k has 3 heads, which does not divide q's 4 heads.*\(2, 3, 7, 3\)",
        ),
        (dict(q=torch.zeros(2, 4, 5, 3, dtype=torch.half)), TypeError, r"share one dtype.*float16.*float32.*\.to\("),
        (dict(q=torch.zeros(2, 4, 5, 3, dtype=torch.int64)), TypeError, "share one dtype"),
        (dict(q=torch.zeros(5, 3)), ValueError, r"\(B, S, D\).*\(B, H, S, D\).*q \(5, 3\)"),
        (dict(q=torch.zeros(1, 4, 5, 3)), ValueError, "k has batch 2, q has 1"),
        (dict(q=torch.zeros(2, 4, 5, 8)), ValueError, "k has head dimension 3, q has 8"),
        (dict(v=torch.zeros(2, 2, 6, 3)), ValueError, "k and v must agree"),
        (dict(q=[1.0]), TypeError, "q is list; it has to be a torch.Tensor"),
        (dict(q=torch.zeros(2, 4, 5, 3, device="meta")), ValueError, "q is on meta, k on cpu"),
        (dict(scale=math.nan), ValueError, "scale must be finite, got nan"),
        (dict(causal_align="top_left"), ValueError, "causal_align.*'top_left'"),
        (dict(window=3), TypeError, r"pair \(left, right\), got 3"),
        (dict(window=(1, 2.0)), TypeError, r"int or None, got \(1, 2.0\)"),
        (dict(softcap=-1.0), ValueError, "softcap.*got -1.0"),
        (dict(dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        (dict(mask=torch.zeros(5, 7)), TypeError, "mask must be bool.*float32.*bias="),
        (
            dict(mask=torch.ones(5, 6, dtype=torch.bool)),
            ValueError,
            r"mask \(5, 6\) does not broadcast.*\(2, 4, 5, 7\)",
        ),
        (
            dict(bias=torch.ones(5, 7, dtype=torch.bool)),
            TypeError,
            "bias must be floating point, got torch.bool.*mask=",
        ),
        (dict(bias=torch.zeros(1, 2, 4, 5, 7)), ValueError, r"bias \(1, 2, 4, 5, 7\) does not broadcast"),
        (dict(bias=3.0), TypeError, "bias is float; it has to be a torch.Tensor or None"),
        (dict(alibi_slopes=torch.zeros(2)), ValueError, r"alibi_slopes must be \(4,\) or \(2, 4\), got \(2,\)"),
    ],
)
def test_errors(change, error, text):
    arguments = dict(zip("qkv", qkv(dtype=torch.float32), strict=True)) | change
    with pytest.raises(error, match="^naive_attention: .*" + text):
        naive_attention(**arguments)


# --- the case list ---


def test_cases_are_unique_readable_and_bounded():
    ids = [case.id for case in cases.CASES]
    assert len(ids) == len(set(ids))
    assert all(case.work <= 3 * cases.MAX_WORK for case in cases.CASES)
    assert all(case.work <= cases.MAX_WORK for case in cases.PAIRWISE + cases.VARIANTS)
    assert all(case.heads % case.heads_kv == 0 for case in cases.CASES)
    assert {(case.seqlen_q, case.seqlen_k) for case in cases.CORE + cases.PAIRWISE} >= set(cases.SEQLENS)
    assert {case.layout for case in cases.CORE} == set(cases.LAYOUTS)
    assert cases.Case(1, 1, 8, scale=0.0, mask="keys").variants == {"scale", "mask"}
    assert not any(case.variants for case in cases.CORE + cases.PAIRWISE)


@pytest.mark.parametrize("factors", [cases.BASE_FACTORS, cases.VARIANT_FACTORS])
def test_pairwise_covers_every_pair(factors):
    rows = cases.pairwise(factors, seed=1)
    assert rows == cases.pairwise(factors, seed=1)
    for a, b in itertools.combinations(factors, 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(factors[a], factors[b]))
    sizes = sorted((len(values) for values in factors.values()), reverse=True)
    assert len(rows) <= 2 * sizes[0] * sizes[1]


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_inputs_are_views_into_nan(layout):
    case = cases.Case(5, 7, 16, batch=2, heads=4, heads_kv=2, head_dim_v=8, layout=layout)
    tensors = cases.make_inputs(case, requires_grad=True)
    assert [tuple(x.shape) for x in tensors] == [(2, 4, 5, 16), (2, 2, 7, 16), (2, 2, 7, 8)]
    for x in tensors:
        assert x.is_leaf and x.requires_grad and x.stride(-1) == 1 and not x.isnan().any()
        storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        distinct = x.numel() if layout != "expanded" else x.numel() // 2
        assert (~storage.isnan()).sum() == distinct < storage.numel()
        assert storage[0].isnan() and storage[-1].isnan()
        aligned = x.storage_offset() * x.element_size() % 16 == 0
        assert aligned == (layout != "misaligned")
        assert (0 in x.stride()) == (layout == "expanded")
    if layout == "bshd_transposed":
        assert tensors[0].transpose(1, 2).is_contiguous()
    if layout != "expanded":
        plain = cases.make_inputs(dataclasses.replace(case, layout="contiguous"))
        assert all(torch.equal(x, y) for x, y in zip(tensors, plain, strict=True))
    naive_attention(*tensors).sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in tensors)


@pytest.mark.parametrize(
    "case", cases.select(cases.VARIANTS, dtypes=["float32"], variants=cases._OFF), ids=lambda c: c.id
)
def test_variant_cases_run(case):
    inputs, kwargs = cases.make_inputs(case, requires_grad=True), cases.make_kwargs(case, requires_grad=True)
    torch.manual_seed(0)
    out, lse = naive_attention(*inputs, **kwargs, return_lse=True)
    torch.manual_seed(0)
    ref, ref_lse = naive_attention(*inputs, **kwargs, return_lse=True, upcast=True)
    torch.testing.assert_close(out, ref.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse, ref_lse.float(), atol=1e-4, rtol=1e-4)
    out.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in inputs)
    assert kwargs.get("bias") is None or torch.isfinite(kwargs["bias"].grad).all()


# --- the tolerance rule ---


def test_tolerance_accepts_naive_and_rejects_twice_and_a_bit():
    ref = randn(4, 64, 8)
    naive = ref.to(torch.bfloat16)
    tolerance.assert_close_to_oracle(naive, ref, naive)
    n, a = (naive.double() - ref).abs(), tolerance.rounding(ref, torch.bfloat16)
    bound = 2 * n.max().item() + 2 * a.max().item()
    bad = naive.clone()
    bad[1, 2, 3] += 1.2 * bound + 0.02
    with pytest.raises(AssertionError, match=r"bad \(output.*max error .* allowed = 2 \* .*Worst at \(1, 2, 3\)"):
        tolerance.assert_close_to_oracle(bad, ref, naive, name="bad")
    drift = (ref + 1.5 * n.mean() + 2 * a.mean() + 0.004).to(torch.bfloat16)
    with pytest.raises(AssertionError, match="mean error"):
        tolerance.assert_close_to_oracle(drift, ref, naive)


def test_tolerance_of_few_elements():
    """Four roundings that all happen to be zero do not make the rule stricter than one rounding of the result."""
    ref = torch.tensor([-0.5, -1.28125, -0.53125, -0.875])
    assert not (((ref.half() + 0.3) - 0.3) - ref.half()).any()
    eps = torch.finfo(torch.float16).eps
    torch.testing.assert_close(tolerance.rounding(ref, torch.float16), ref.double().abs() * (eps / 2))
    assert not tolerance.rounding(ref.repeat(4), torch.float16).any()
    ours = ref.half()
    ours[1] = ours[1] * (1 + eps)
    tolerance.assert_close_to_oracle(ours, ref, ref.half())
    ours[1] = ref[1] * (1 + 3 * eps)
    with pytest.raises(AssertionError, match=r"Worst at \(1,\)"):
        tolerance.assert_close_to_oracle(ours, ref, ref.half())


def test_tolerance_gradient_factor_and_fp64():
    ref, naive = torch.zeros(100), torch.full((100,), 1e-3)
    ours = torch.full((100,), 1e-3)
    ours[7] = 2.9e-3
    tolerance.assert_close_to_oracle(ours, ref, naive, kind="gradient")
    with pytest.raises(AssertionError, match=r"Worst at \(7,\)"):
        tolerance.assert_close_to_oracle(ours, ref, naive, kind="output")
    big = randn(50) * 1e3
    tolerance.assert_close_to_oracle(big + 0.9e-12, big, None)
    with pytest.raises(AssertionError, match="1e-12"):
        tolerance.assert_close_to_oracle(big + 1e-8, big, None)
    with pytest.raises(ValueError, match="kind"):
        tolerance.assert_close_to_oracle(big, big, None, kind="lse")


@pytest.mark.parametrize("value, word", [(math.nan, "NaN"), (math.inf, r"\+inf"), (-math.inf, "-inf")])
def test_tolerance_special_values(value, word):
    ref = torch.zeros(2, 3)
    ref[1, 2] = value
    tolerance.assert_close_to_oracle(ref, ref.double(), ref)
    for ours, oracle in ((torch.zeros(2, 3), ref), (ref, torch.zeros(2, 3))):
        with pytest.raises(AssertionError, match=word + r" at different places.*\(1, 2\)"):
            tolerance.assert_close_to_oracle(ours, oracle, oracle)
    with pytest.raises(AssertionError, match="shape"):
        tolerance.assert_close_to_oracle(torch.zeros(3), ref, ref)


def test_zero_atol_counts_only_for_a_zero_reference():
    zero, tiny = torch.zeros(3), torch.full((3,), 1e-7)
    with pytest.raises(AssertionError):
        tolerance.assert_close_to_oracle(tiny, zero, zero)
    tolerance.assert_close_to_oracle(tiny, zero, zero, zero_atol=1e-6)
    with pytest.raises(AssertionError):
        tolerance.assert_close_to_oracle(zero + 1 + 1e-3, zero + 1, zero + 1, zero_atol=1.0)
    q, k, v = qkv(b=1, h=1, hk=1, sq=1, sk=1, d=64, dv=64, dtype=torch.float32)
    assert 0 < tolerance.cancellation_atol(v, q, k, scale=0.125) < 0.05


@pytest.mark.parametrize("kwargs", [{}, dict(causal=True), dict(window=(9, 4), causal_align="top-left", softcap=2.0)])
def test_oracle_in_blocks(kwargs):
    q, k, v = qkv(sq=33, sk=21, d=8, dv=4, grad=True)
    dout, dlse = randn(2, 4, 33, 4, seed=7), randn(2, 4, 33, seed=8)
    out, lse = naive_attention(q, k, v, return_lse=True, **kwargs)
    grads = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    blocks = tolerance.oracle_in_blocks(q, k, v, dout, dlse, block_rows=8, **kwargs)
    for name, ref in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True):
        assert_equal_fp64(blocks[name], ref, name)
    assert set(tolerance.oracle_in_blocks(q, k, v, **kwargs)) == {"out", "lse"}
