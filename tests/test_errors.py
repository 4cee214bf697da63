"""Every row of the contract's errors: type and text, before any work, on real and on fake tensors.

A text names the offending values and the rule; no wrong call returns, writes or ends the process.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flash_attn_ext
from flash_attn_ext import (
    explain,
    flash_attention,
    flash_attention_v1,
    flash_attention_v2,
    naive_attention,
    scaled_dot_product_attention,
)

ops = torch.ops.flash_attn_ext


def zeros(*shape: int, **kwargs: Any) -> Tensor:
    return torch.zeros(shape, **kwargs)


Q = (2, 8, 6, 16)

# name: (q, k, v as shapes or tensors, error, text)
SHAPES: dict[str, tuple[Any, Any, Any, type, str]] = {
    "heads_do_not_divide": (
        Q, (2, 3, 6, 16), (2, 3, 6, 16), ValueError,
        r"k has 3 heads, which does not divide q's 8 heads \(q \(2, 8, 6, 16\), k \(2, 3, 6, 16\)\)",
    ),
    "more_kv_heads": (Q, (2, 16, 6, 16), (2, 16, 6, 16), ValueError, r"k has 16 heads, which does not divide q's 8"),
    "heads_of_v": (Q, (2, 4, 6, 16), (2, 2, 6, 16), ValueError, r"k has 4 heads and v 2 .*they have to be equal"),
    "no_heads": ((2, 0, 6, 16),) * 3 + (ValueError, r"at least one head is needed, got q \(2, 0, 6, 16\)"),
    "no_kv_heads": (Q, (2, 0, 6, 16), (2, 0, 6, 16), ValueError, r"at least one head is needed, .* k \(2, 0, 6, 16\)"),
    "rank_2": ((6, 16),) * 3 + (ValueError, r"q has 2 dimensions \(6, 16\); it has to be \(batch, seq, dim\) or"),
    "rank_1": ((6,),) * 3 + (ValueError, r"q has 1 dimensions \(6,\)"),
    "rank_0": ((),) * 3 + (ValueError, r"q has 0 dimensions \(\)"),
    "rank_5": ((1, 2, 8, 6, 16),) * 3 + (ValueError, r"q has 5 dimensions \(1, 2, 8, 6, 16\)"),
    "ranks_differ": (
        Q, (2, 6, 16), (2, 6, 16), ValueError, r"need the same number of dimensions, got q .*k \(2, 6, 16\)",
    ),
    "batch": (Q, (1, 8, 6, 16), (1, 8, 6, 16), ValueError, r"need the same batch size, got q .*k \(1, 8, 6, 16\)"),
    "batch_of_v": (Q, Q, (3, 8, 6, 16), ValueError, r"need the same batch size, .*v \(3, 8, 6, 16\)"),
    "head_dim": (Q, (2, 8, 6, 8), (2, 8, 6, 8), ValueError, r"k has head dimension 8 and q 16 .*have to be equal"),
    "head_dim_0": ((2, 8, 6, 0),) * 3 + (ValueError, r"head dimension has to be at least 1, got q \(2, 8, 6, 0\)"),
    "head_dim_v_0": (Q, Q, (2, 8, 6, 0), ValueError, r"head dimension has to be at least 1, .*v \(2, 8, 6, 0\)"),
    "head_dim_huge": ((1, 1, 1, 65537),) * 3 + (ValueError, r"head dimension is limited to 65536, .*65537"),
    "lengths": (Q, (2, 8, 6, 16), (2, 8, 7, 16), ValueError, r"k has 6 positions and v 7 .*they have to be equal"),
    "integers": ((zeros(*Q, dtype=torch.int32),) * 3) + (TypeError, r"q is Int; float16, bfloat16, float32 and"),
    "complex": ((zeros(*Q, dtype=torch.complex64),) * 3) + (TypeError, r"q is ComplexFloat; float16, bfloat16"),
    "bool": ((zeros(*Q, dtype=torch.bool),) * 3) + (TypeError, r"q is Bool; float16, bfloat16"),
    "float8": (
        (zeros(*Q).to(torch.float8_e4m3fn),) * 3 + (TypeError, r"q is Float8_e4m3fn; float16, bfloat16")
    ),
    "dtypes_of_k": (Q, zeros(*Q).half(), Q, TypeError, r"k is Half and q Float; all tensors need one dtype \(cast"),
    "dtypes_of_v": (Q, Q, zeros(*Q).double(), TypeError, r"v is Double and q Float; all tensors need one dtype"),
    "device_of_k": (Q, zeros(*Q, device="meta"), Q, ValueError, r"k is on meta and q on cpu; move them to one device"),
    "device_of_v": (Q, Q, zeros(*Q, device="meta"), ValueError, r"v is on meta and q on cpu; move them to one device"),
}  # fmt: skip
LAYOUTS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "sparse": (lambda: zeros(2, 6, 16).to_sparse(), "sparse"),
    "csr": (lambda: zeros(6, 16).to_sparse_csr(), "sparse"),
    "mkldnn": (lambda: zeros(2, 6, 16).to_mkldnn(), "oneDNN"),
    "nested": (lambda: torch.nested.nested_tensor([zeros(3, 16), zeros(5, 16)]), "nested"),
    "jagged": (lambda: torch.nested.nested_tensor([zeros(3, 16), zeros(5, 16)], layout=torch.jagged), "nested"),
    "quantized": (lambda: torch.quantize_per_tensor(zeros(2, 6, 16), 0.1, 0, torch.qint8), "quantized"),
}


def tensors(*of: Any) -> list[Tensor]:
    return [t if isinstance(t, Tensor) else zeros(*t) for t in of]


# ---- q, k, v ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function", [flash_attention, flash_attention_v1, flash_attention_v2], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("name", SHAPES)
def test_tensors_that_do_not_fit(name: str, function: Callable) -> None:
    *of, error, text = SHAPES[name]
    prefix = "flash_attention_v1" if function is flash_attention_v1 else "flash_attention"
    with pytest.raises(error, match=rf"^{prefix}: .*{text}"):
        function(*tensors(*of))


@pytest.mark.parametrize("name", SHAPES)
def test_operators_and_explain_say_the_same(name: str) -> None:
    *of, error, text = SHAPES[name]
    for op in (ops.fwd, ops.fwd_v1):
        with pytest.raises(error, match=text):
            op(*tensors(*of))
    if "device" not in name:  # explain() asks about shapes on no device at all
        answer = explain(*tensors(*of))
        assert not answer["runs"]
        assert re.search(text, answer["why_not"])


@pytest.mark.parametrize("name", [name for name in SHAPES if "device" not in name])
@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_tensors_without_data_meet_the_same_contract(name: str, mode: str) -> None:
    *of, error, text = SHAPES[name]
    real = tensors(*of)
    if mode == "meta":
        with pytest.raises(error, match=text):
            flash_attention(*(t.to("meta") for t in real))
    else:
        with torch._subclasses.FakeTensorMode() as fake, pytest.raises(error, match=text):
            flash_attention(*(fake.from_tensor(t) for t in real))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("place", range(3), ids=["q", "k", "v"])
def test_tensors_of_another_kind(name: str, place: int) -> None:
    make, word = LAYOUTS[name]
    arguments = [zeros(2, 6, 16)] * 3
    arguments[place] = make()
    for function in (flash_attention, flash_attention_v1):
        with pytest.raises(TypeError, match=rf"^flash_attention\S*: {'qkv'[place]} is a {word} tensor; convert it"):
            function(*arguments)


@pytest.mark.parametrize("value", [None, 1.0, [1.0], "q"], ids=repr)
@pytest.mark.parametrize("place", range(3), ids=["q", "k", "v"])
def test_no_tensor_at_all(value: Any, place: int) -> None:
    arguments: list[Any] = [zeros(*Q)] * 3
    arguments[place] = value
    for function in (flash_attention, flash_attention_v1, flash_attention_v2, naive_attention):
        with pytest.raises(TypeError, match=rf"{'qkv'[place]} is {type(value).__name__}; it has to be a torch.Tensor"):
            function(*arguments)


def test_lengths_beyond_32_bits_are_refused_before_any_work() -> None:
    q = zeros(1, 1, 1, 1)
    long = q.expand(1, 1, 2**30, 1)
    for arguments in ((long, q, q), (q, long, long)):
        with pytest.raises(ValueError, match=r"sequences are limited to 2\^30 - 1 positions, got q .*1073741824"):
            flash_attention(*arguments)
    heads = q.expand(1, 2**30, 1, 1)
    with pytest.raises(ValueError, match=r"heads are limited to 2\^30 - 1"):
        flash_attention(heads, heads, heads)


# ---- options ---------------------------------------------------------------------------------------------------------

OPTIONS: list[tuple[dict[str, Any], type, str]] = [
    ({"scale": float("nan")}, ValueError, r"scale is nan; it has to be finite"),
    ({"scale": float("inf")}, ValueError, r"scale is inf; it has to be finite"),
    ({"scale": -float("inf")}, ValueError, r"scale is -inf; it has to be finite"),
    ({"causal_align": "left"}, ValueError, r"causal_align is 'left'; it has to be 'bottom-right' or 'top-left'"),
    ({"causal_align": None}, ValueError, r"causal_align is None"),
    ({"window": 3}, ValueError, r"window is 3; it has to be \(left, right\) or None"),
    ({"window": (1, 2, 3)}, ValueError, r"window is \(1, 2, 3\); it has to be \(left, right\) or None"),
    ({"window": (1.5, 2)}, TypeError, r"window is \(1.5, 2\); both ends have to be integers"),
    ({"window": (True, 2)}, TypeError, r"window is \(True, 2\); both ends have to be integers"),
    ({"window": ("1", 2)}, TypeError, r"window is \('1', 2\); both ends have to be integers"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p is 1.0; it has to lie in \[0, 1\)"),
    ({"dropout_p": -0.1}, ValueError, r"dropout_p is -0.1; it has to lie in \[0, 1\)"),
    ({"dropout_p": float("nan")}, ValueError, r"dropout_p is nan; it has to lie in \[0, 1\)"),
    ({"dropout_p": "0.1"}, TypeError, r"dropout_p is '0.1'; it has to be a number"),
    ({"softcap": -1.0}, ValueError, r"softcap is -1.0; it has to be 0 \(off\) or a positive finite number"),
    ({"softcap": float("inf")}, ValueError, r"softcap is inf; it has to be 0 \(off\) or a positive finite number"),
    ({"softcap": None}, TypeError, r"softcap is None; it has to be a number"),
    ({"mask": [True]}, TypeError, r"mask is list; it has to be a torch.Tensor or None"),
    ({"bias": 1.0}, TypeError, r"bias is float; it has to be a torch.Tensor or None"),
    ({"alibi_slopes": (0.5,)}, TypeError, r"alibi_slopes is tuple; it has to be a torch.Tensor or None"),
    # What the contract has and no kernel yet: named, with what does compute it.
    ({"softcap": 30.0}, NotImplementedError, r"softcap=30.0 is not implemented yet; naive_attention computes it"),
    ({"dropout_p": 0.1}, NotImplementedError, r"dropout_p=0.1 is not implemented yet; naive_attention computes it"),
    ({"mask": zeros(6, 6, dtype=torch.bool)}, NotImplementedError, r"mask=<tensor \(6, 6\)> is not implemented yet"),
    ({"bias": zeros(6, 6)}, NotImplementedError, r"bias=<tensor \(6, 6\)> is not implemented yet"),
    ({"alibi_slopes": zeros(8)}, NotImplementedError, r"alibi_slopes=<tensor \(8,\)> is not implemented yet"),
]


@pytest.mark.parametrize(("option", "error", "text"), OPTIONS, ids=lambda o: str(o)[:40])
def test_options(option: dict[str, Any], error: type, text: str) -> None:
    q = zeros(*Q)
    for function in (flash_attention, flash_attention_v2):
        with pytest.raises(error, match=rf"^{function.__name__}: {text}|^flash_attention: {text}"):
            function(q, q, q, **option)
    answer = explain(q, q, q, **option)
    assert answer["runs"] is False and next(iter(option)) in answer["why_not"]


def test_a_scale_that_is_no_number() -> None:
    q = zeros(*Q)
    for function in (flash_attention, flash_attention_v1):
        with pytest.raises((TypeError, RuntimeError), match="scale"):
            function(q, q, q, scale="0.1")


BLOCKS: list[tuple[Any, type, str]] = [
    ((0, 64), ValueError, r"block_size is \(0, 64\); both have to be positive"),
    ((64, -1), ValueError, r"block_size is \(64, -1\); both have to be positive"),
    (64, ValueError, r"block_size is 64; it has to be \(rows, columns\) or None"),
    ((64, 64, 64), ValueError, r"block_size is \(64, 64, 64\); it has to be \(rows, columns\)"),
    ((64.0, 64), TypeError, r"block_size is \(64.0, 64\); rows and columns have to be integers"),
    ((True, 64), TypeError, r"block_size is \(True, 64\); rows and columns have to be integers"),
    ((48, 64), ValueError, r"block_size \(48, 64\) is not built; each way 32, 64, 96 or 128"),
    ((64, 256), ValueError, r"block_size \(64, 256\) is not built; each way 32, 64, 96 or 128"),
    ((2**40, 64), ValueError, r"block_size \(1099511627776, 64\) is not built"),
]


@pytest.mark.parametrize(("block", "error", "text"), BLOCKS, ids=str)
def test_block_sizes(block: Any, error: type, text: str) -> None:
    q = zeros(*Q)
    for function in (flash_attention_v1, flash_attention_v2):
        with pytest.raises(error, match=text):
            function(q, q, q, block_size=block)


def test_unknown_and_positional_options_are_type_errors() -> None:
    q = zeros(*Q)
    with pytest.raises(TypeError, match="unexpected keyword argument 'is_causal'"):
        flash_attention(q, q, q, is_causal=True)
    with pytest.raises(TypeError, match="positional argument"):
        flash_attention(q, q, q, None, False, "bottom-right")
    for function in (flash_attention, flash_attention_v1):
        with pytest.raises(TypeError, match=r"missing .* 'v'"):
            function(q, q)


def test_pytorchs_signature_raises_what_pytorch_does() -> None:
    """What PyTorch's own function refuses is refused: by it, with its text."""
    q = zeros(*Q)
    for arguments, kwargs in (((q, zeros(2, 3, 6, 16), zeros(2, 3, 6, 16)), {}), ((q, q, q), {"dropout_p": 2.0})):
        with pytest.raises(Exception) as theirs:  # noqa: PT011
            F.scaled_dot_product_attention(*arguments, **kwargs)
        with pytest.raises(type(theirs.value), match=re.escape(str(theirs.value)[:40])):
            scaled_dot_product_attention(*arguments, **kwargs)


# ---- the backward operator -------------------------------------------------------------------------------------------

BACKWARD: dict[str, tuple[dict[str, Any], type, str]] = {
    "dout_shape": ({"dout": (2, 8, 6, 8)}, ValueError, r"dout is \(2, 8, 6, 8\) and out \(2, 8, 6, 16\)"),
    "out_shape": ({"out": (2, 8, 5, 16)}, ValueError, r"out is \(2, 8, 5, 16\); q \(2, 8, 6, 16\) and v"),
    "lse_shape": ({"lse": (2, 8, 5)}, ValueError, r"lse is \(2, 8, 5\); q .* needs one value per query row"),
    "lse_rank": ({"lse": (2, 8, 6, 1)}, ValueError, r"lse is \(2, 8, 6, 1\); q .* needs one value per query row"),
    "dlse_shape": ({"dlse": (8, 6)}, ValueError, r"dlse is \(8, 6\); q .* needs one value per query row"),
    "dout_dtype": ({"dout": zeros(*Q).half()}, TypeError, r"dout is Half and q Float"),
    "out_dtype": ({"out": zeros(*Q).half()}, TypeError, r"out is Half and q Float"),
    "lse_dtype": ({"lse": zeros(2, 8, 6).half()}, TypeError, r"lse is Half; for q in Float it has to be Float"),
    "dlse_dtype": ({"dlse": zeros(2, 8, 6).double()}, TypeError, r"dlse is Double; for q in Float it has to be Float"),
    "lse_device": ({"lse": zeros(2, 8, 6, device="meta")}, ValueError, r"lse is on meta and q on cpu"),
    "dout_sparse": ({"dout": zeros(*Q).to_sparse()}, TypeError, r"dout is a sparse tensor; convert it"),
    "heads": ({"k": (2, 3, 6, 16), "v": (2, 3, 6, 16)}, ValueError, r"k has 3 heads, which does not divide q's 8"),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name: str) -> None:
    change, error, text = BACKWARD[name]
    arguments: dict[str, Any] = dict.fromkeys(("dout", "q", "k", "v", "out"), Q) | {"lse": Q[:3], "dlse": Q[:3]}
    arguments = {key: t if isinstance(t, Tensor) else zeros(*t) for key, t in (arguments | change).items()}
    order = ("dout", "dlse", "q", "k", "v", "out", "lse")
    with pytest.raises(error, match=rf"flash_attention backward: {text}"):
        ops.bwd(*(arguments[key] for key in order))


def test_backward_with_a_scale_that_is_not_finite() -> None:
    q, lse = zeros(*Q), zeros(*Q[:3])
    with pytest.raises(ValueError, match="scale is nan; it has to be finite"):
        ops.bwd(q, None, q, q, q, q, lse, float("nan"))


# ---- nothing is touched, nothing ends the process --------------------------------------------------------------------


def test_a_refused_call_leaves_its_arguments_alone() -> None:
    q = harness.randn(*Q, dtype=torch.float32).requires_grad_()
    k = harness.randn(2, 3, 6, 16, dtype=torch.float32)
    before, version = q.detach().clone(), q._version
    with pytest.raises(ValueError, match="does not divide"):
        flash_attention(q, k, k)
    assert torch.equal(q, before) and q._version == version and q.grad is None
    assert torch.isfinite(flash_attention(q, q, q)).all()  # and the next call is a good one


def test_a_refused_call_allocates_nothing() -> None:
    q, k = zeros(1, 8, 4096, 64), zeros(1, 3, 4096, 64)
    with torch.profiler.profile(profile_memory=True) as profile, pytest.raises(ValueError, match="does not divide"):
        flash_attention(q, k, k)
    assert max((event.cpu_memory_usage for event in profile.events()), default=0) < 4096


def test_everything_at_once_survives() -> None:
    """All refused calls in one fresh process, which then still computes: no abort, no corrupted state."""
    harness.run_python(
        """
import torch, test_errors as t
refused = 0
for *of, error, text in t.SHAPES.values():
    for function in (t.flash_attention, t.flash_attention_v1, t.ops.fwd, t.ops.fwd_v1):
        try:
            function(*t.tensors(*of))
        except error:
            refused += 1
assert refused == 4 * len(t.SHAPES), refused
q = torch.randn(2, 4, 70, 16, requires_grad=True)
out = t.flash_attention(q, q, q, causal=True)
out.sum().backward()
torch.testing.assert_close(out, t.naive_attention(q, q, q, causal=True))
"""
    )


@pytest.mark.gpu
def test_float64_on_cuda() -> None:
    q = torch.zeros(*Q, device="cuda", dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"float64 runs on the CPU only; cast to float32 for CUDA"):
        flash_attention(q, q, q)


@pytest.mark.gpu
@pytest.mark.skipif(
    any(row["device"] == "cuda" for row in flash_attn_ext.supported_kernels()), reason="there are CUDA kernels"
)
def test_cuda_without_kernels_says_what_to_do() -> None:
    q = torch.zeros(*Q, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match=r"^flash_attention: .*CUDA"):
        flash_attention(q, q, q)
