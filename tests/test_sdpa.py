"""scaled_dot_product_attention and replace_sdpa(): PyTorch's results, errors and state, on our operators."""

from __future__ import annotations

import inspect
import itertools
import math
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close_to_oracle
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils._python_dispatch import TorchDispatchMode

import flash_attn_ext
from flash_attn_ext import FlashAttentionFallback, replace_sdpa, scaled_dot_product_attention
from flash_attn_ext import sdpa as module

TORCHS = torch._C._nn.scaled_dot_product_attention

pytestmark = pytest.mark.usefixtures("one_thread", "clean")


@pytest.fixture
def clean() -> Iterator[None]:
    """No note has been given yet; afterwards PyTorch has its own function and nothing is active."""
    module._noted.clear()
    assert F.scaled_dot_product_attention is TORCHS
    yield
    left, F.scaled_dot_product_attention = F.scaled_dot_product_attention, TORCHS
    active, module._replacements, module._is_replaced = module._replacements, 0, False
    assert left is TORCHS
    assert active == 0


class Operators(TorchDispatchMode):
    """Counts our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    @property
    def ours(self) -> int:
        return self.names.count("flash_attn_ext::fwd")


def ran_ours(call: Callable[[], Any]) -> bool:
    with Operators() as operators:
        call()
    return operators.ours > 0


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def with_gradients(function: Callable[..., Tensor], tensors: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves, **options)
    dout = random(*out.shape, seed=9).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def assert_same(ours: list[Tensor], torchs: list[Tensor]) -> None:
    """For float32."""
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, torchs, strict=False):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


# ---- the calls that are ours -----------------------------------------------------------------------------------------

SHAPES = {
    "4-D": ((2, 3, 33, 20), (2, 3, 50, 20), (2, 3, 50, 20)),
    "Sq > Sk": ((2, 3, 50, 20), (2, 3, 33, 20), (2, 3, 33, 20)),
    "Ev != E": ((2, 3, 33, 20), (2, 3, 50, 20), (2, 3, 50, 12)),
    "2-D": ((33, 20), (50, 20), (50, 20)),
    "3-D": ((4, 33, 20), (4, 50, 20), (4, 50, 12)),
    "5-D": ((2, 2, 3, 33, 20), (2, 2, 3, 50, 20), (2, 2, 3, 50, 20)),
    "6-D": ((1, 2, 2, 3, 9, 8), (1, 2, 2, 3, 7, 8), (1, 2, 2, 3, 7, 8)),
    "gqa 3-D": ((6, 33, 20), (2, 50, 20), (2, 50, 20)),
    "gqa 4-D": ((2, 6, 33, 20), (2, 3, 50, 20), (2, 3, 50, 20)),
    "gqa 5-D": ((2, 1, 4, 33, 20), (2, 1, 1, 50, 20), (2, 1, 1, 50, 20)),
}


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def in_four_dimensions(t: Tensor) -> Tensor:
    """There PyTorch computes P again from lse in the backward, with its rounding, as we do; else it keeps P."""
    return t.reshape(-1, *t.shape[-3:]) if t.dim() > 2 else t[None, None]


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_pytorch(shape: str, is_causal: bool) -> None:
    """As near to PyTorch in float64 as PyTorch is in the same dtype, by the rule of tolerance.py."""
    for dtype, scale in itertools.product(DTYPES, (None, 0.7)):
        tensors = inputs(*SHAPES[shape], dtype=dtype)
        options = {"is_causal": is_causal, "scale": scale, "enable_gqa": "gqa" in shape}
        ours = with_gradients(scaled_dot_product_attention, tensors, **options)
        exact = with_gradients(TORCHS, [t.double() for t in tensors], **options)
        torchs = with_gradients(TORCHS, [in_four_dimensions(t) for t in tensors], **options)
        torchs = [theirs.reshape_as(x) for theirs, x in zip(torchs, ours, strict=True)]
        for name, *triple in zip(("out", "dq", "dk", "dv"), ours, exact, torchs, strict=True):
            kind = "output" if name == "out" else "gradient"
            assert_close_to_oracle(*triple, kind=kind, name=f"{name}, {dtype}, scale {scale}")
        assert ran_ours(lambda t=tensors, o=options: scaled_dot_product_attention(*t, **o))
    assert not module._noted


def test_negative_scale_and_causal() -> None:
    """PyTorch's CPU kernel masks before it scales and gives NaN; its math path is the reference."""
    tensors = inputs(*SHAPES["4-D"])
    with sdpa_kernel(SDPBackend.MATH):
        expected = with_gradients(TORCHS, tensors, is_causal=True, scale=-0.7)
    assert_same(with_gradients(scaled_dot_product_attention, tensors, is_causal=True, scale=-0.7), expected)


def test_causal_is_top_left() -> None:
    zeros, v = torch.zeros(2, 4), torch.eye(5)
    out = scaled_dot_product_attention(zeros, torch.zeros(5, 4), v, is_causal=True)
    assert out.tolist() == [[1.0, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0]]


def test_output_has_the_layout_of_query() -> None:
    q = random(2, 17, 4, 8).transpose(1, 2)
    out = scaled_dot_product_attention(q, q, q)
    assert out.stride() == q.stride() == TORCHS(q, q, q).stride()


def test_signature_is_pytorchs() -> None:
    """PyTorch's takes six positional arguments; scale and enable_gqa are keyword-only, whatever its page shows."""
    q = random(1, 1, 4, 8)
    names = [*inspect.signature(scaled_dot_product_attention).parameters]
    assert names == ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    assert torch.equal(
        scaled_dot_product_attention(q, q, q, None, 0.0, True), scaled_dot_product_attention(q, q, q, is_causal=True)
    )
    for function in (scaled_dot_product_attention, TORCHS):
        with pytest.raises(TypeError, match="positional arguments"):
            function(q, q, q, None, 0.0, True, 0.3)


@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right], ids=lambda f: f.__name__)
@pytest.mark.parametrize("replaced", [False, True], ids=["direct", "replaced"])
def test_causal_bias(bias: Callable[..., Tensor], replaced: bool) -> None:
    """PyTorch's subclass compares the called function with F's: it has to work under the replacement, too."""
    tensors, mask = inputs((2, 4, 9, 16), (2, 4, 14, 16), (2, 4, 14, 16)), bias(9, 14)
    narrow = [tensors[0], tensors[1][:, :1], tensors[2][:, :1]]
    plain, wrong = mask._materialize(), bias(8, 14)
    expected = with_gradients(TORCHS, tensors, attn_mask=plain), TORCHS(*narrow, plain)
    with warnings.catch_warnings(record=True), replace_sdpa() if replaced else nullcontext():
        function = F.scaled_dot_product_attention if replaced else scaled_dot_product_attention
        assert_same(with_gradients(function, tensors, attn_mask=mask), expected[0])
        assert ran_ours(lambda: function(*tensors, mask))
        assert_same([function(*narrow, mask)], [expected[1]])  # falls back
        with pytest.raises(ValueError, match="should not be used with causal=True"):
            function(*tensors, mask, is_causal=True)
        if bias is causal_lower_right:
            with pytest.raises(RuntimeError):
                function(*tensors, wrong)


# ---- the calls that are PyTorch's ------------------------------------------------------------------------------------

Q = (2, 4, 9, 8)
MASK = torch.rand(9, 9, generator=torch.Generator().manual_seed(0)) < 0.7


class Subclass(torch.Tensor):
    pass


FALLBACKS: dict[str, tuple[Callable[[], tuple[tuple, dict]], str]] = {
    "bool mask": (lambda: (inputs(Q, Q, Q), {"attn_mask": MASK}), "attn_mask"),
    "float mask": (lambda: (inputs(Q, Q, Q), {"attn_mask": random(9, 9, seed=5)}), "attn_mask"),
    "mask and causal": (lambda: (inputs(Q, Q, Q), {"attn_mask": MASK, "is_causal": True}), "attn_mask"),
    "dropout": (lambda: (inputs(Q, Q, Q), {"dropout_p": 0.3}), "dropout"),
    "negative dropout": (lambda: (inputs(Q, Q, Q), {"dropout_p": -0.3}), "dropout"),
    "integers": (lambda: ([t.int() for t in inputs(Q, Q, Q)], {}), "torch.int32"),
    "mixed dtypes": (lambda: ([random(*Q), random(*Q).double(), random(*Q)], {}), "several dtypes"),
    "broadcast heads": (lambda: (inputs(Q, (2, 1, 9, 8), (2, 1, 9, 8)), {}), "broadcast"),
    "broadcast batch": (lambda: (inputs(Q, (1, 4, 9, 8), (1, 4, 9, 8)), {}), "broadcast"),
    "broadcast batch, gqa": (lambda: (inputs(Q, (1, 2, 9, 8), (1, 2, 9, 8)), {"enable_gqa": True}), "broadcast"),
    "unequal heads": (lambda: (inputs(Q, (2, 2, 9, 8), (2, 2, 9, 8)), {}), "unequal heads"),
    "gqa 3 of 4": (lambda: (inputs(Q, (2, 3, 9, 8), (2, 3, 9, 8)), {"enable_gqa": True}), "head counts"),
    "gqa, v has others": (lambda: (inputs(Q, (2, 2, 9, 8), (2, 1, 9, 8)), {"enable_gqa": True}), "broadcast"),
    "gqa 2-D": (lambda: (inputs((9, 8), (9, 8), (9, 8)), {"enable_gqa": True}), "head counts"),
    "1-D": (lambda: (inputs((8,), (8,), (8,)), {}), "numbers of dimensions"),
    "3-D and 4-D": (lambda: (inputs(Q, (4, 9, 8), (4, 9, 8)), {}), "numbers of dimensions"),
    "E differs": (lambda: (inputs(Q, (2, 4, 9, 7), Q), {}), "head dimensions"),
    "no keys": (lambda: (inputs(Q, (2, 4, 0, 8), (2, 4, 0, 8)), {}), "empty"),
    "no batch": (lambda: (inputs(*((0, 4, 9, 8),) * 3), {}), "empty"),
    "infinite scale": (lambda: (inputs(Q, Q, Q), {"scale": math.inf}), "scale"),
    "nan scale": (lambda: (inputs(Q, Q, Q), {"scale": math.nan}), "scale"),
    "tensor scale": (lambda: (inputs(Q, Q, Q), {"scale": torch.tensor(0.3)}), "scale"),
    "text scale": (lambda: (inputs(Q, Q, Q), {"scale": "0.3"}), "scale"),
    "int is_causal": (lambda: (inputs(Q, Q, Q), {"is_causal": 1}), "not a bool"),
    "no tensor": (lambda: ([random(*Q), None, random(*Q)], {}), "not a tensor"),
    "meta": (lambda: ([t.to("meta") for t in inputs(Q, Q, Q)], {}), "meta tensors"),
    "two devices": (lambda: ([random(*Q), random(*Q).to("meta"), random(*Q)], {}), "several devices"),
    "sparse": (lambda: ([random(*Q).to_sparse() for _ in range(3)], {}), "sparse"),
    "subclass": (lambda: ([random(*Q).as_subclass(Subclass), random(*Q), random(*Q)], {}), "subclass"),
}


@pytest.mark.parametrize("name", FALLBACKS)
@pytest.mark.parametrize("replaced", [False, True], ids=["direct", "replaced"])
def test_everything_else_is_pytorchs(name: str, replaced: bool) -> None:
    """The same result bit by bit, or the same error; the reason is said."""
    make, reason = FALLBACKS[name]
    tensors, options = make()

    def outcome(function: Callable[..., Tensor]) -> Any:
        torch.manual_seed(3)
        try:
            return function(*tensors, **options)
        except Exception as error:
            return error

    expected = outcome(TORCHS)
    with (
        pytest.warns(FlashAttentionFallback, match=reason) as notes,
        replace_sdpa() if replaced else nullcontext(),
    ):
        found = outcome(F.scaled_dot_product_attention if replaced else scaled_dot_product_attention)
    assert len(notes) == 1
    assert notes[0].filename == __file__  # it points at the caller
    assert type(found) is type(expected), found
    if isinstance(expected, Exception):
        assert str(found) == str(expected)
    elif expected.device.type == "meta":
        assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


UNEQUAL_LENGTHS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict]] = {
    "plain": (Q, Q, {}),
    "causal": (Q, Q, {"is_causal": True}),
    "bool mask": (Q, Q, {"attn_mask": torch.ones(9, 1, dtype=torch.bool)}),  # fits keys of any number
    "causal bias": (Q, Q, {"attn_mask": causal_upper_left(9, 9)}),
    "dropout": (Q, Q, {"dropout_p": 0.3}),
    "3-D": ((4, 9, 8), (4, 9, 8), {}),
    "gqa": (Q, (2, 2, 9, 8), {"enable_gqa": True}),
    "broadcast heads": (Q, (2, 1, 9, 8), {}),
}


@pytest.mark.parametrize("name", UNEQUAL_LENGTHS)
@pytest.mark.parametrize("keys", [7, 0, 11])
@pytest.mark.parametrize("replaced", [False, True], ids=["direct", "replaced"])
def test_key_and_value_of_different_lengths_raise(
    name: str, keys: int, replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's CPU kernel would read past the end of the key, or leave keys out: it must not get the call at all."""

    def torchs(*args: Any, **options: Any) -> Tensor:
        pytest.fail("PyTorch's function was called")

    q_shape, v_shape, options = UNEQUAL_LENGTHS[name]
    q, v = inputs(q_shape, v_shape)
    k = random(*v_shape[:-2], keys, 8, seed=2)
    text = re.escape(
        f"scaled_dot_product_attention: key has {keys} positions and value has 9 "
        f"(key {tuple(k.shape)}, value {tuple(v.shape)}); each key needs its value"
    )
    monkeypatch.setattr(module, "_torch_sdpa", torchs)
    with replace_sdpa() if replaced else nullcontext():
        if replaced:
            monkeypatch.setattr(module, "_replaced", torchs)
        function = F.scaled_dot_product_attention if replaced else scaled_dot_product_attention
        with pytest.raises(ValueError, match=text):
            function(q, k, v, **options)
        monkeypatch.undo()
    assert not module._noted


def test_cuda_is_left_to_pytorch_where_there_is_no_kernel() -> None:
    rows = [{**row, "device": "cuda", "head_dim_max": 64} for row in flash_attn_ext.supported_kernels()]
    assert ("cuda", torch.float32) not in module._coverage([row for row in rows if row["pass"] == "fwd"])
    limit, features = module._coverage(rows)["cuda", torch.float32]
    assert limit == 64
    assert "gqa" in features
    assert module._covered_devices == {row["device"] for row in flash_attn_ext.supported_kernels()}


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({"head_dim_max": 16}, {}, "head dimension above 16"),
        ({"features": ["causal", "causal_align"]}, {"enable_gqa": True}, "head counts"),
        ({"features": ["gqa"]}, {"is_causal": True}, "is_causal"),
        ({"features": ["gqa"]}, {"narrow": True}, "head dimension of value"),
    ],
)
def test_limits_of_a_kernel_are_heeded(
    change: dict, options: dict, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no CPU kernel lacks, a CUDA kernel may: the registry's columns decide."""
    q = random(1, 2, 5, 24)
    v = q[..., :8] if options.pop("narrow", False) else q
    rows = [{**row, **change} for row in flash_attn_ext.supported_kernels()]
    monkeypatch.setattr(module, "_covered", module._coverage(rows))
    with pytest.warns(FlashAttentionFallback, match=reason):
        found = scaled_dot_product_attention(q, q, v, **options)
    assert torch.equal(found, TORCHS(q, q, v, **options))


def test_nested_tensors_are_pytorchs() -> None:
    nested = torch.nested.nested_tensor([random(3, 2, 8), random(5, 2, 8)], layout=torch.jagged).transpose(1, 2)
    with pytest.warns(FlashAttentionFallback), replace_sdpa():
        found = F.scaled_dot_product_attention(nested, nested, nested)
    for a, b in zip(found.unbind(), TORCHS(nested, nested, nested).unbind(), strict=True):
        torch.testing.assert_close(a, b)


def test_switched_off_flash_kernels_are_heeded() -> None:
    q = random(*Q)
    with pytest.warns(FlashAttentionFallback, match="switched off"), sdpa_kernel(SDPBackend.MATH):
        assert not ran_ours(lambda: scaled_dot_product_attention(q, q, q))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert ran_ours(lambda: scaled_dot_product_attention(q, q, q))


def test_torch_function_modes_see_the_call() -> None:
    class Mode(torch.overrides.TorchFunctionMode):
        seen = 0

        def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            self.seen += func is TORCHS
            return func(*args, **(kwargs or {}))

    q = random(*Q)
    with pytest.warns(FlashAttentionFallback, match="torch-function mode"), Mode() as mode:
        scaled_dot_product_attention(q, q, q)
    assert mode.seen == 1
    with torch.device("cpu"):  # a mode as well, but none that concerns attention
        assert ran_ours(lambda: scaled_dot_product_attention(q, q, q))


def test_forward_mode_is_pytorchs() -> None:
    q = random(*Q)
    with (
        sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]),
        pytest.warns(FlashAttentionFallback, match="forward-mode"),
        pytest.raises(NotImplementedError, match="_scaled_dot_product_flash_attention_for_cpu"),
    ):
        torch.func.jvp(lambda x: scaled_dot_product_attention(x, q, q), (q,), (q,))


def test_a_note_comes_once_per_reason() -> None:
    q = random(*Q)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        for _ in range(3):
            scaled_dot_product_attention(q, q, q, MASK)
            scaled_dot_product_attention(q, q, q, dropout_p=0.1)
    assert [n.category for n in notes] == [FlashAttentionFallback] * 2
    assert [str(n.message).split(": ")[1] for n in notes] == ["attn_mask", "dropout"]


def test_a_note_turned_into_an_error_raises_every_time() -> None:
    q = random(*Q)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FlashAttentionFallback)
        for _ in range(2):
            with pytest.raises(FlashAttentionFallback, match="attn_mask"):
                scaled_dot_product_attention(q, q, q, MASK)


# ---- autocast, torch.func, compile, export ---------------------------------------------------------------------------


def test_autocast() -> None:
    mixed = [random(*Q), random(*Q, dtype=torch.bfloat16, seed=1), random(*Q, dtype=torch.float16, seed=2)]
    doubles = inputs(Q, Q, Q, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        ours, torchs = (with_gradients(f, mixed) for f in (scaled_dot_product_attention, TORCHS))
        assert ran_ours(lambda: scaled_dot_product_attention(*mixed))
        assert scaled_dot_product_attention(*doubles).dtype == TORCHS(*doubles).dtype == torch.float64
        with (
            pytest.warns(FlashAttentionFallback, match="autocast"),
            pytest.raises(RuntimeError, match="same dtype"),
        ):
            scaled_dot_product_attention(mixed[0], doubles[1], mixed[2])
    assert ours[0].dtype == torch.bfloat16
    for a, b in zip(ours, torchs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=4e-2, rtol=4e-2)


def test_vmap() -> None:
    x = random(3, 2, 4, 9, 8)
    found = torch.vmap(lambda t: scaled_dot_product_attention(t, t, t))(x)
    torch.testing.assert_close(found, TORCHS(x, x, x))


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)


class Recorder:
    """A backend that notes, at every run of a graph, the functions that the graph calls."""

    def __init__(self) -> None:
        self.graphs = 0
        self.ran: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        names = " ".join(str(node.target) for node in graph.graph.nodes)

        def run(*args: Any) -> Any:
            self.ran.append("ours" if "flash_attn_ext.fwd" in names else "torch")
            return graph.forward(*args)

        return run


def compiled(function: Callable[..., Tensor], backend: Any = "aot_eager", **options: Any) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def test_compiled_code_follows_the_replacement() -> None:
    tensors, recorder = inputs(Q, Q, Q), Recorder()
    call, expected = compiled(Attention(), recorder), TORCHS(*tensors, is_causal=True)
    for _ in range(2):  # the second round finds both versions compiled
        torch.testing.assert_close(call(*tensors), expected)
        with replace_sdpa():
            torch.testing.assert_close(call(*tensors), expected)
    assert recorder.ran == ["torch", "ours"] * 2
    assert recorder.graphs == 2


def test_gradients_of_compiled_code() -> None:
    tensors, call = inputs(Q, Q, Q), compiled(Attention())
    with replace_sdpa():
        assert_same(with_gradients(call, tensors), with_gradients(TORCHS, tensors, is_causal=True))


def test_fallback_compiles_in_one_graph_and_says_so() -> None:
    tensors, call = inputs(Q, Q, Q), compiled(Attention())
    with warnings.catch_warnings(record=True) as notes, replace_sdpa():
        warnings.simplefilter("always", FlashAttentionFallback)
        found = call(*tensors, MASK)
        call(*tensors, MASK)
    assert ["attn_mask" in str(n.message) for n in notes if n.category is FlashAttentionFallback] == [True]
    torch.testing.assert_close(found, TORCHS(*tensors, MASK))


def test_dynamic_shapes_and_scale_compile() -> None:
    call = compiled(lambda q, scale: scaled_dot_product_attention(q, q, q, scale=scale, is_causal=True), dynamic=True)
    for length, scale in ((5, 0.3), (9, 0.7), (33, 0.7)):
        q = random(2, 4, length, 8)
        torch.testing.assert_close(call(q, scale), TORCHS(q, q, q, is_causal=True, scale=scale))


def test_compiles_under_autocast() -> None:
    tensors, recorder = inputs(Q, Q, Q), Recorder()
    call = compiled(Attention(), recorder)
    with replace_sdpa(), torch.autocast("cpu", torch.bfloat16):
        assert call(*tensors).dtype == torch.bfloat16
        assert recorder.ran == ["ours"]
        assert torch.equal(call(*tensors), F.scaled_dot_product_attention(*tensors, is_causal=True))


@pytest.mark.parametrize("strict", [True, False])
def test_export_names_our_operator(strict: bool) -> None:
    with replace_sdpa():
        program = torch.export.export(Attention(), tuple(inputs(Q, Q, Q)), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert "flash_attn_ext.fwd.default" in targets
    assert not any("scaled_dot_product" in target for target in targets)


# ---- replace_sdpa ----------------------------------------------------------------------------------------------------


def is_ours() -> bool:
    q = random(1, 1, 4, 8)
    return ran_ours(lambda: F.scaled_dot_product_attention(q, q, q))


def test_context_manager() -> None:
    assert not is_ours()
    with replace_sdpa() as replacement:
        assert is_ours()
        assert "active" in repr(replacement)
    assert F.scaled_dot_product_attention is TORCHS
    assert "restored" in repr(replacement)


def test_plain_call() -> None:
    replacement = replace_sdpa()
    assert is_ours()
    replacement.restore()
    replacement.restore()  # twice does no harm
    assert F.scaled_dot_product_attention is TORCHS


def test_exception_restores() -> None:
    with pytest.raises(KeyError), replace_sdpa():
        raise KeyError
    assert F.scaled_dot_product_attention is TORCHS


def test_nesting() -> None:
    with replace_sdpa():
        with replace_sdpa():
            assert is_ours()
        assert is_ours()
    assert F.scaled_dot_product_attention is TORCHS


def test_one_object_can_be_entered_again() -> None:
    replacement = replace_sdpa()
    with replacement:
        with replacement:
            pass
        assert is_ours()
    assert F.scaled_dot_product_attention is TORCHS
    with replacement:
        assert is_ours()
    assert F.scaled_dot_product_attention is TORCHS


def test_restoring_inside_the_block() -> None:
    with replace_sdpa() as replacement:
        replacement.restore()
        assert not is_ours()
    assert F.scaled_dot_product_attention is TORCHS


def test_restoring_out_of_order() -> None:
    first, second = replace_sdpa(), replace_sdpa()
    first.restore()
    assert is_ours()
    second.restore()
    assert F.scaled_dot_product_attention is TORCHS


def test_a_reference_that_outlives_the_replacement_is_pytorchs() -> None:
    with replace_sdpa():
        kept = F.scaled_dot_product_attention
    q = random(1, 1, 4, 8)
    assert not ran_ours(lambda: kept(q, q, q))
    assert torch.equal(kept(q, q, q), TORCHS(q, q, q))


def test_fallback_calls_what_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def foreign(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return TORCHS(*args, **kwargs)

    q = random(*Q)
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", foreign)
        with warnings.catch_warnings(record=True), replace_sdpa(), replace_sdpa():
            assert is_ours()
            assert not calls
            F.scaled_dot_product_attention(q, q, q, MASK)
            assert len(calls) == 1
        assert F.scaled_dot_product_attention is foreign


def test_a_patch_on_top_stays_and_ends_at_pytorchs() -> None:
    with replace_sdpa():
        inner = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = lambda *args, **kwargs: inner(*args, **kwargs)
        on_top = F.scaled_dot_product_attention
        assert is_ours()
    assert F.scaled_dot_product_attention is on_top
    assert not is_ours()
    F.scaled_dot_product_attention = inner  # the other patch takes itself back, to what it found
    assert not is_ours()
    with replace_sdpa():
        assert is_ours()
    F.scaled_dot_product_attention = TORCHS


def test_threads_share_one_switch() -> None:
    errors, barrier = [], threading.Barrier(4)

    def work() -> None:
        try:
            barrier.wait()
            for _ in range(200):
                with replace_sdpa():
                    if F.scaled_dot_product_attention is TORCHS:
                        errors.append("inactive inside")
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    assert F.scaled_dot_product_attention is TORCHS


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (lambda: nn.MultiheadAttention(16, 4, batch_first=True), [(2, 7, 16)] * 3),
        (lambda: nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), [(2, 7, 16)]),
        (lambda: nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True), [(2, 7, 16), (2, 9, 16)]),
    ],
    ids=["MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer"],
)
def test_modules_of_pytorch_pick_it_up(make: Callable[[], nn.Module], shapes: list) -> None:
    torch.manual_seed(0)
    layer, tensors = make(), inputs(*shapes)
    options = {"need_weights": False} if isinstance(layer, nn.MultiheadAttention) else {}

    def run() -> list[Tensor]:
        layer.zero_grad()
        out = layer(*tensors, **options)
        out = out[0] if isinstance(out, tuple) else out
        out.square().sum().backward()
        return [out.detach(), *(p.grad for p in layer.parameters())]

    expected = run()
    with replace_sdpa():
        assert ran_ours(run)
        found = run()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_fused_inference_path_is_not_ours() -> None:
    """The documented limit, and the documented way round it."""
    layer, x = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval(), random(2, 7, 16)
    with replace_sdpa(), torch.no_grad():
        with Operators() as operators:
            fused = layer(x)
        assert operators.ours == 0
        assert any("_transformer_encoder_layer_fwd" in name for name in operators.names)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            assert ran_ours(lambda: layer(x))
            torch.testing.assert_close(layer(x), fused, atol=1e-5, rtol=1e-5)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


def test_import_stays_light() -> None:
    """Importing the package loads no plotting, no terminal library and no compiler."""
    code = (
        "import sys, torch; before = set(sys.modules); import flash_attn_ext;"
        "heavy = {'rich', 'matplotlib', 'numpy', 'torch._dynamo', 'torch._inductor', 'flash_attn_ext.cli.bench'};"
        "print(sorted(heavy & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
