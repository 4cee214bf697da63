"""FlashAttention-2's names: signatures, values and gradients against naive_attention, layouts, refusals."""

from __future__ import annotations

import inspect

import pytest
import torch
from tolerance import assert_close_to_oracle

import flash_attn_ext
from flash_attn_ext import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    naive_attention,
)

pytestmark = pytest.mark.usefixtures("one_thread")

_TAIL = "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
_TAIL += "deterministic=False, return_attn_probs=False"
_LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {  # of flash-attn 2.8
    "flash_attn_func": f"q, k, v, {_TAIL}",
    "flash_attn_kvpacked_func": f"q, kv, {_TAIL}",
    "flash_attn_qkvpacked_func": f"qkv, {_TAIL}",
    "flash_attn_varlen_func": f"q, k, v, {_LENGTHS}, {_TAIL}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {_LENGTHS}, {_TAIL}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {_TAIL}",
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, "
    "causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
    "return_softmax_lse=False",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_flash_attention_2s(name: str) -> None:
    parameters = inspect.signature(getattr(flash_attn_ext, name)).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    found = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
    assert found == SIGNATURES[name]
    assert name in flash_attn_ext.__all__


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


CALLS = [
    {},
    {"causal": True},
    {"softmax_scale": -0.4, "window_size": (7, 3)},
    {"causal": True, "window_size": (5, 9), "deterministic": True},  # causal sets right to 0
    {"window_size": (-1, 2)},
]


def naive(call: dict, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
    """naive_attention in flash-attn's layout."""
    heads_second = (t.transpose(1, 2) for t in (q, k, v))
    window, scale, causal = call.get("window_size"), call.get("softmax_scale"), call.get("causal", False)
    return naive_attention(*heads_second, scale, causal, window=window, **options)


def check(form: str, dtype: torch.dtype, call: dict, lengths: tuple[int, int], heads: tuple[int, int]) -> None:
    """Output, lse and the gradients of the caller's own tensors, packed or not, against the oracle."""
    (sq, sk), (hq, hk), d = lengths, heads, 24
    if form == "qkv":
        function, shapes = flash_attn_qkvpacked_func, [(2, sq, 3, hq, d)]
    elif form == "kv":
        function, shapes = flash_attn_kvpacked_func, [(2, sq, hq, d), (2, sk, 2, hk, d)]
    else:
        function, shapes = flash_attn_func, [(2, sq, hq, d), (2, sk, hk, d), (2, sk, hk, d)]
    values = [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    dout, dlse = random(2, sq, hq, d, dtype=dtype, seed=7), random(2, hq, sq, seed=8)

    def unpacked(t: list[torch.Tensor]) -> list[torch.Tensor]:
        if form == "qkv":
            return [t[0][:, :, i] for i in range(3)]
        return [t[0], t[1][:, :, 0], t[1][:, :, 1]] if form == "kv" else t

    def results(run) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in values]
        out, lse = run(leaves)
        loss = (out * dout.to(out.dtype)).sum() + (torch.where(lse.isfinite(), lse, 0.0) * dlse.to(lse.dtype)).sum()
        return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]

    def ours(leaves: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, s_dmask = function(*leaves, return_attn_probs=True, **call)
        assert out.is_contiguous()
        assert (s_dmask.shape, s_dmask.dtype) == ((0,), dtype)  # flash-attn 2.8 without dropout
        return out, lse

    def plain(leaves: list[torch.Tensor], **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = naive(call, *unpacked(leaves), return_lse=True, **options)
        return out.transpose(1, 2), lse

    names = ["out", "lse", *(f"gradient {i}" for i in range(len(values)))]
    triples = zip(names, results(ours), results(lambda x: plain(x, upcast=True)), results(plain), strict=True)
    for name, mine, exact, simple in triples:
        kind = "gradient" if name.startswith("gradient") else "output"
        assert_close_to_oracle(mine, exact, simple, kind=kind, name=f"{form} {name}")
    assert torch.equal(function(*values, **call), results(ours)[0])  # without return_attn_probs: the output alone


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("form", ["dense", "kv", "qkv"])
def test_values_and_gradients(form: str, call: dict) -> None:
    check(form, torch.float32, call, (33, 33) if form == "qkv" else (33, 50), (3, 3) if form == "qkv" else (4, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["dense", "kv", "qkv"])
def test_dtypes(form: str, dtype: torch.dtype) -> None:
    lengths, heads = ((40, 40), (2, 2)) if form == "qkv" else ((70, 40), (6, 2))  # Sq > Sk: rows without keys
    check(form, dtype, {"causal": True}, lengths, heads)


def test_causal_is_aligned_bottom_right() -> None:
    v = torch.eye(5).view(1, 5, 1, 5)  # the output is the row of probabilities
    zeros = torch.zeros(1, 5, 1, 4)
    out = flash_attn_func(zeros[:, :2], zeros, v, causal=True)[0, :, 0]
    assert torch.allclose(out, torch.tensor([[0.25] * 4 + [0.0], [0.2] * 5]))


def test_row_without_keys_gives_zero_and_minus_infinity() -> None:
    q, k = random(1, 3, 1, 8), random(1, 1, 1, 8)
    out, lse, _ = flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert torch.equal(out[0, :2], torch.zeros(2, 1, 8))
    assert lse[0, 0, :2].tolist() == [float("-inf")] * 2
    assert lse[0, 0, 2].isfinite()


def test_operator_gets_views_of_the_packed_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = flash_attn_ext.compat.flash_attention

    def spy(q, k, v, *args, **kwargs):
        seen.extend((q, k, v))
        return original(q, k, v, *args, **kwargs)

    monkeypatch.setattr(flash_attn_ext.compat, "flash_attention", spy)
    qkv = random(2, 5, 3, 4, 8)
    flash_attn_qkvpacked_func(qkv)
    assert [t.untyped_storage().data_ptr() for t in seen] == [qkv.untyped_storage().data_ptr()] * 3
    assert [t.storage_offset() for t in seen] == [0, 32, 64]
    assert [tuple(t.shape) for t in seen] == [(2, 4, 5, 8)] * 3


def test_compiles_in_one_graph() -> None:
    qkv = random(2, 17, 3, 4, 8).requires_grad_()
    compiled = torch.compile(
        lambda x: flash_attn_qkvpacked_func(x, causal=True, window_size=(4, 0)), fullgraph=True, backend="aot_eager"
    )
    out = compiled(qkv)
    expected = flash_attn_qkvpacked_func(qkv, causal=True, window_size=(4, 0))
    assert torch.equal(out, expected)
    assert out.is_contiguous()
    grads = [torch.autograd.grad(x.square().sum(), qkv)[0] for x in (out, expected)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("form", ["dense", "kv", "qkv"])
@pytest.mark.parametrize(
    "option", [{"dropout_p": 0.1}, {"softcap": 2.0}, {"alibi_slopes": torch.ones(2)}], ids=lambda o: next(iter(o))
)
def test_missing_options_raise_by_name(form: str, option: dict) -> None:
    q, kv, qkv = random(1, 4, 2, 8), random(1, 4, 2, 2, 8), random(1, 4, 3, 2, 8)
    function, tensors = {
        "dense": (flash_attn_func, (q, q, q)),
        "kv": (flash_attn_kvpacked_func, (q, kv)),
        "qkv": (flash_attn_qkvpacked_func, (qkv,)),
    }[form]
    with pytest.raises(NotImplementedError, match=f"^{function.__name__}: {next(iter(option))}"):
        function(*tensors, **option)


@pytest.mark.parametrize(
    ("function", "tensors", "instead"),
    [
        (flash_attn_varlen_func, 7, "flash_attn_func"),
        (flash_attn_varlen_kvpacked_func, 6, "flash_attn_kvpacked_func"),
        (flash_attn_varlen_qkvpacked_func, 3, "flash_attn_qkvpacked_func"),
        (flash_attn_with_kvcache, 3, "flash_attn_func"),
    ],
)
def test_functions_that_are_to_come_name_themselves(function, tensors: int, instead: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"^{function.__name__}: .*Meanwhile .*\b{instead}\b"):
        function(*[None] * tensors)


@pytest.mark.parametrize(
    ("shapes", "rule"),
    [
        (((2, 4, 8),) * 3, r"have to be \(batch, seq, heads, dim\)"),
        (((2, 4, 3, 8), (2, 4, 2, 8), (2, 4, 2, 8)), "2 heads, which does not divide q's 3 heads"),
        (((2, 4, 3, 8), (1, 4, 3, 8), (1, 4, 3, 8)), "q has batch 2 and k 1"),
        (((2, 4, 3, 8), (2, 4, 3, 16), (2, 4, 3, 8)), "q has head dimension 8 and k 16"),
        (((2, 4, 3, 8), (2, 5, 3, 8), (2, 4, 3, 8)), "k and v have to agree in batch, seq and heads"),
    ],
)
def test_wrong_shapes_are_told_in_the_callers_layout(shapes: tuple, rule: str) -> None:
    with pytest.raises(ValueError, match=f"^flash_attn_func: .*{rule}") as caught:
        flash_attn_func(*(torch.zeros(s) for s in shapes))
    assert str(shapes[0]) in str(caught.value)


@pytest.mark.parametrize("bad", [torch.zeros(2, 4, 2, 3, 8), torch.zeros(2, 4, 3, 8)])
def test_wrong_packing_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"^flash_attn_qkvpacked_func: qkv is .*\(batch, seq, 3, heads, dim\)"):
        flash_attn_qkvpacked_func(bad)
    with pytest.raises(ValueError, match=r"^flash_attn_kvpacked_func: kv is .*\(batch, seq, 2, heads, dim\)"):
        flash_attn_kvpacked_func(torch.zeros(2, 4, 3, 8), bad.transpose(1, 2) if bad.dim() == 5 else bad)


def test_no_tensor_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"^flash_attn_func: k is list"):
        flash_attn_func(torch.zeros(1, 1, 1, 8), [0.0], torch.zeros(1, 1, 1, 8))
    with pytest.raises(TypeError, match=r"^flash_attn_qkvpacked_func: qkv is NoneType"):
        flash_attn_qkvpacked_func(None)
