"""The operators as PyTorch sees them: schemas, opcheck, fake tensors, aliasing. Numbers are tested elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from flash_attn_ext import flash_attention, flash_attention_v1, flash_attention_v2, naive_attention

pytestmark = pytest.mark.usefixtures("one_thread")
ops = torch.ops.flash_attn_ext

SCHEMAS = {
    "fwd": "flash_attn_ext::fwd(Tensor q, Tensor k, Tensor v, float? scale=None, SymInt window_left=-1, "
    "SymInt window_right=-1, bool top_left=False, bool? deterministic=None, int block_m=0, int block_n=0) "
    "-> (Tensor out, Tensor lse)",
    "fwd_v1": "flash_attn_ext::fwd_v1(Tensor q, Tensor k, Tensor v, float? scale=None, SymInt window_left=-1, "
    "SymInt window_right=-1, bool top_left=False, bool? deterministic=None, int block_m=0, int block_n=0) "
    "-> (Tensor out, Tensor lse)",
    "bwd": "flash_attn_ext::bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "float? scale=None, SymInt window_left=-1, SymInt window_right=-1, bool top_left=False, "
    "bool? deterministic=None) -> (Tensor dq, Tensor dk, Tensor dv)",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name: str) -> None:
    # Saved graphs and checkpoint policies name these strings: a change here breaks files that users keep.
    schema = getattr(ops, name).default._schema
    assert str(schema) == SCHEMAS[name]
    assert not schema.is_mutable, "functional: nothing is written in place"
    assert all(argument.alias_info is None for argument in (*schema.arguments, *schema.returns))
    assert not any(argument.kwarg_only for argument in schema.arguments), "register_autograd refuses such tensors"


def test_operators_are_these_and_every_key_has_a_kernel() -> None:
    assert set(dir(ops)) >= set(SCHEMAS)
    for name in SCHEMAS:
        # Sparse and nested keys have one too: it raises the contract's sentence instead of the dispatcher's.
        for key in ("CPU", "CUDA", "Meta", "AutogradCPU", "FuncTorchBatched", "SparseCPU", "NestedTensorCPU"):
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"flash_attn_ext::{name}", key), key


# ---- inputs ----------------------------------------------------------------------------------------------------------


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# name -> a (b, h, s, d) tensor made of ``values``, in one layout
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "bshd": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "packed": lambda x: torch.stack([x, x, x], 2).transpose(1, 3).contiguous()[:, :, 1].transpose(1, 2),
    "expanded_batch": lambda x: x[:1].expand(x.shape),
    "expanded_heads": lambda x: x[:, :1].expand(x.shape),
    "last_dim_transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "last_dim_strided": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "last_dim_expanded": lambda x: x[..., :1].expand(x.shape),
    "overlapping": lambda x: x.flatten().as_strided(x.shape, (*x.stride()[:2], 1, 1)),
}


def test_layouts_are_what_they_say() -> None:
    x = randn(2, 4, 6, 8)
    strides = {name: make(x).stride() for name, make in LAYOUTS.items()}
    assert strides["contiguous"] == (192, 48, 8, 1)
    assert strides["bshd"] == (192, 8, 32, 1)
    assert strides["packed"] == (576, 8, 96, 1)
    assert strides["expanded_batch"][0] == 0
    assert strides["expanded_heads"][1] == 0
    assert strides["last_dim_transposed"] == (192, 48, 1, 6)
    assert strides["last_dim_strided"][-1] == 2
    assert strides["last_dim_expanded"][-1] == 0


def qkv(
    layout: str = "contiguous",
    *,
    hk: int = 2,
    sq: int = 6,
    sk: int = 7,
    dv: int = 8,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    make = LAYOUTS[layout]
    shapes = ((2, 4, sq, 8), (2, hk, sk, 8), (2, hk, sk, dv))
    q, k, v = (make(randn(*shape, dtype=dtype, seed=i)) for i, shape in enumerate(shapes))
    return q, k, v


# ---- opcheck ---------------------------------------------------------------------------------------------------------

# name -> (inputs, the operators' options). Few, since opcheck traces each one several times.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "causal": ({}, {"window_right": 0}),
    "causal_top_left": ({"sq": 9}, {"window_right": 0, "top_left": True, "deterministic": True}),
    "window_scale": ({"hk": 4}, {"window_left": 2, "window_right": 1, "scale": -0.3}),
    "head_dim_v": ({"dv": 5, "layout": "bshd"}, {}),
    "packed_bf16": ({"layout": "packed", "dtype": torch.bfloat16}, {"window_right": 0}),
    "last_dim_fp16": ({"layout": "last_dim_transposed", "dtype": torch.float16}, {}),
    "expanded_fp64": ({"layout": "expanded_batch", "dtype": torch.float64}, {}),
}


def _three_d(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t[:, 0] for t in tensors)


def _opcheck(op: Any, args: tuple, kwargs: dict[str, Any], **options: Any) -> None:
    result = torch.library.opcheck(op, args, kwargs, **options)
    assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["fwd", "fwd_v1"])
def test_opcheck_forward(name: str, variant: str) -> None:
    inputs, options = VARIANTS[variant]
    if name == "fwd_v1" and variant not in ("causal", "head_dim_v"):
        pytest.skip("fwd_v1 shares contract, shapes and formula with fwd: two variants are enough")
    tensors = [t.detach().requires_grad_() for t in qkv(**inputs)]
    _opcheck(getattr(ops, name).default, tuple(tensors), options)


def test_opcheck_forward_3d_some_inputs_without_gradient() -> None:
    q, k, v = _three_d(*qkv())
    _opcheck(ops.fwd.default, (q, k.requires_grad_(), v), {"window_right": 0})


def _backward_args(with_dlse: bool, three_d: bool = False, options: Any = None, **inputs: Any) -> tuple:
    q, k, v = _three_d(*qkv(**inputs)) if three_d else qkv(**inputs)
    out, lse = ops.fwd(q, k, v, **(options or {}))
    dout = randn(*out.shape, dtype=out.dtype, seed=5)
    return dout, torch.ones_like(lse) if with_dlse else None, q, k, v, out, lse


@pytest.mark.parametrize("with_dlse", [False, True], ids=["no_dlse", "dlse"])
@pytest.mark.parametrize("variant", ["causal", "causal_top_left", "head_dim_v", "packed_bf16", "last_dim_fp16"])
def test_opcheck_backward(variant: str, with_dlse: bool) -> None:
    inputs, options = VARIANTS[variant]
    _opcheck(ops.bwd.default, _backward_args(with_dlse, options=options, **inputs), options)


def test_opcheck_backward_3d() -> None:
    _opcheck(ops.bwd.default, _backward_args(True, three_d=True), {"window_left": 2})


def test_opcheck_backward_that_requires_grad() -> None:
    # Everything but the AOT test, which would differentiate the gradient; and that one fails with our sentence.
    dout, dlse, q, *rest = _backward_args(True)
    args = (dout, dlse, q.requires_grad_(), *rest)
    _opcheck(ops.bwd.default, args, {}, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    with pytest.raises(Exception, match="double backward is not implemented"):
        _opcheck(ops.bwd.default, args, {}, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_opcheck_cuda(device: str) -> None:
    q, k, v = (t.to(device, torch.bfloat16).requires_grad_() for t in qkv())
    _opcheck(ops.fwd.default, (q, k, v), {"window_right": 0})


# ---- fake tensors ----------------------------------------------------------------------------------------------------


def facts(t: Tensor) -> tuple:
    return tuple(t.shape), tuple(t.stride()), t.dtype, t.storage_offset(), t.device.type


def assert_same_facts(real: Any, fake: Any) -> None:
    real, fake = ([x] if isinstance(x, Tensor) else list(x) for x in (real, fake))
    assert [facts(t) for t in fake] == [facts(t) for t in real]


PUBLIC: dict[str, Callable[..., Any]] = {
    "flash_attention": lambda q, k, v: flash_attention(q, k, v, causal=True),
    "flash_attention_lse": lambda q, k, v: flash_attention(q, k, v, window=(2, 1), return_lse=True),
    "flash_attention_v2": lambda q, k, v: flash_attention_v2(q, k, v, block_size=(32, 64), return_lse=True),
    "flash_attention_v1": lambda q, k, v: flash_attention_v1(q, k, v),
    "naive_attention": lambda q, k, v: naive_attention(q, k, v, causal=True, return_lse=True),
}


def layout_cases() -> Iterator[Any]:
    for layout in LAYOUTS:
        for dv in (8, 5):
            yield pytest.param(layout, dv, id=f"{layout}-dv{dv}")


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("three_d", [False, True], ids=["4d", "3d"])
@pytest.mark.parametrize("layout, dv", list(layout_cases()))
def test_fake_equals_real(name: str, layout: str, dv: int, three_d: bool) -> None:
    if name == "naive_attention" and layout in ("expanded_heads", "overlapping"):
        pytest.skip("naive_attention is made of PyTorch's operators: their fakes are PyTorch's matter")
    tensors = qkv(layout, dv=dv)
    tensors = _three_d(*tensors) if three_d else tensors
    real = PUBLIC[name](*tensors)
    with FakeTensorMode() as mode:
        fake = PUBLIC[name](*(mode.from_tensor(t) for t in tensors))
    assert_same_facts(real, fake)
    first = real if isinstance(real, Tensor) else real[0]
    assert first.stride(-1) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout, dv", list(layout_cases()))
def test_fake_backward_equals_real(layout: str, dv: int, dtype: torch.dtype) -> None:
    q, k, v = qkv(layout, dv=dv, dtype=dtype)
    out, lse = ops.fwd(q, k, v)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    args = (torch.ones_like(out), torch.zeros_like(lse), q, k, v, out, lse)
    real = ops.bwd(*args)
    with FakeTensorMode() as mode:
        fake = ops.bwd(*(mode.from_tensor(t) for t in args))
    assert_same_facts(real, fake)
    assert [g.shape for g in real] == [q.shape, k.shape, v.shape]
    assert [g.dtype for g in real] == [dtype] * 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_meta_equals_real(layout: str) -> None:
    tensors = qkv(layout, dv=5)
    metas = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors]
    for real, meta in zip(
        flash_attention(*tensors, return_lse=True), flash_attention(*metas, return_lse=True), strict=True
    ):
        assert facts(meta)[:4] == facts(real)[:4]
        assert meta.device.type == "meta"


def test_fake_with_symbolic_lengths() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    q, k, v = (mode.from_tensor(t) for t in qkv("bshd", dv=5))
    with mode:
        out, lse = flash_attention(q, k, v, causal=True, return_lse=True)
    assert out.shape[2] is not None
    assert str(out.shape[2]) == str(q.shape[2])
    assert str(lse.shape[2]) == str(q.shape[2])
    assert isinstance(out.shape[2], torch.SymInt), "a length turned into a number: every new length would recompile"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dv", [8, 5])
@pytest.mark.parametrize("function", [flash_attention, flash_attention_v1], ids=lambda f: f.__name__)
def test_values_in_every_layout(function: Callable[..., Tensor], layout: str, dv: int) -> None:
    # The fake's strides may be right while the kernel writes along others: the numbers have to agree too.
    tensors = qkv(layout, dv=dv, dtype=torch.float64)
    for three_d in (False, True):
        inputs = [t.detach().requires_grad_() for t in (_three_d(*tensors) if three_d else tensors)]
        expected = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in inputs]
        out, ref = function(*inputs, causal=True), naive_attention(*expected, causal=True)
        torch.testing.assert_close(out, ref, rtol=1e-12, atol=1e-12)
        dout = randn(*out.shape, dtype=torch.float64, seed=9)
        grads, refs = torch.autograd.grad(out, inputs, dout), torch.autograd.grad(ref, expected, dout)
        for grad, grad_ref in zip(grads, refs, strict=True):
            torch.testing.assert_close(grad, grad_ref, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dv", [8, 5])
def test_out_has_the_layout_of_q(dv: int) -> None:
    for layout in ("contiguous", "bshd"):
        q, k, v = qkv(layout, dv=dv)
        out = flash_attention(q, k, v)
        order = sorted(range(4), key=lambda i: -q.stride(i))
        assert out.permute(order).is_contiguous(), (layout, out.stride())


# ---- aliasing --------------------------------------------------------------------------------------------------------


def _storages(tensors: Any) -> list[int]:
    return [t.untyped_storage().data_ptr() for t in tensors if t is not None and t.numel() > 0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_never_alias(layout: str) -> None:
    # An operator that returns an input, or two views of one buffer, breaks functionalization.
    q, k, v = qkv(layout)
    for op in (ops.fwd, ops.fwd_v1):
        results = op(q, k, v)
        assert len({*_storages(results), *_storages((q, k, v))}) == 2 + len(set(_storages((q, k, v))))
    out, lse = results
    args = (torch.ones_like(out), torch.zeros_like(lse), q, k, v, out, lse)
    before = [t.clone() for t in args]
    grads = ops.bwd(*args)
    assert len({*_storages(grads), *_storages(args)}) == 3 + len(set(_storages(args)))
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True)), "an input was written"


@pytest.mark.parametrize("shape", [(0, 2, 4, 8), (2, 2, 0, 8), (2, 2, 4, 8)], ids=str)
def test_empty_inputs(shape: tuple[int, ...]) -> None:
    q = torch.zeros(shape, requires_grad=True)
    k = torch.zeros((shape[0], 2, 0, 8), requires_grad=True)
    out, lse = flash_attention(q, k, k, return_lse=True)
    assert out.shape == shape
    assert torch.equal(out, torch.zeros(shape)), "a query without keys gives 0"
    assert torch.equal(lse, torch.full(shape[:3], -math.inf))
    out.sum().backward()
    assert torch.equal(q.grad, torch.zeros(shape))
    assert k.grad.shape == k.shape
