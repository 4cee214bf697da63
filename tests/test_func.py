"""torch.func through the public functions, the operators and torch.compile; what is refused says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap

from flash_attn_ext import flash_attention, flash_attention_v1, naive_attention

ops = torch.ops.flash_attn_ext
pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = dict(rtol=1e-12, atol=1e-12)


def qkv(batch: int = 2, heads: int = 4, heads_kv: int = 2, sq: int = 5, sk: int = 7, d: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, heads, sq, d), (batch, heads_kv, sk, d), (batch, heads_kv, sk, d))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def loss_of_out(attention: Callable, **kwargs: Any) -> Callable[..., Tensor]:
    return lambda q, k, v: attention(q, k, v, causal=True, **kwargs).square().sum()


def loss_of_both(attention: Callable, **kwargs: Any) -> Callable[..., Tensor]:
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = attention(q, k, v, causal=True, return_lse=True, **kwargs)
        return out.square().sum() + lse.sin().sum()

    return loss


LOSSES = pytest.mark.parametrize("loss", [loss_of_out, loss_of_both], ids=["out", "out_lse"])


def close(ours: Any, expected: Any) -> None:
    torch.testing.assert_close(ours, expected, **EXACT)


# ---- grad and its relatives ------------------------------------------------------------------------------------------


@LOSSES
@pytest.mark.parametrize("argnums", [0, 1, 2, (0, 1, 2)], ids=str)
def test_grad(loss: Callable, argnums: Any) -> None:
    close(grad(loss(flash_attention), argnums)(*qkv()), grad(loss(naive_attention), argnums)(*qkv()))


def test_grad_of_options_and_versions() -> None:
    for kwargs in ({"window": (2, 0)}, {"scale": -0.7}, {"causal_align": "top-left"}, {"deterministic": True}):
        expected = {name: value for name, value in kwargs.items() if name != "deterministic"}
        close(
            grad(loss_of_out(flash_attention, **kwargs), (0, 1, 2))(*qkv()),
            grad(loss_of_out(naive_attention, **expected), (0, 1, 2))(*qkv()),
        )
    close(
        grad(loss_of_out(flash_attention_v1, block_size=(32, 64)), (0, 1, 2))(*qkv()),
        grad(loss_of_out(naive_attention), (0, 1, 2))(*qkv()),
    )


def test_grad_and_value_and_vjp() -> None:
    inputs = qkv()
    close(
        grad_and_value(loss_of_both(flash_attention))(*inputs), grad_and_value(loss_of_both(naive_attention))(*inputs)
    )
    results = []
    for attention in (flash_attention, naive_attention):
        (out, lse), pull = vjp(lambda *t, f=attention: f(*t, return_lse=True), *inputs)
        results.append((out, lse, pull((out.cos(), lse.cos()))))
    close(*results)


def test_jacrev_maps_the_backward() -> None:
    q, k, v = qkv(1, 2, 1, 3, 4, 2)
    for argnums in (0, 2):
        close(jacrev(flash_attention, argnums)(q, k, v), jacrev(naive_attention, argnums)(q, k, v))


def test_stateless_module() -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = torch.nn.Linear(6, 18, dtype=torch.float64)

        def forward(self, x: Tensor, attention: Callable) -> Tensor:
            q, k, v = self.project(x).chunk(3, -1)
            return attention(q, k, v, causal=True)

    torch.manual_seed(0)
    module, x = Attention(), torch.randn(3, 2, 5, 6, dtype=torch.float64)
    parameters = dict(module.named_parameters())

    def per_sample(attention: Callable) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(module, parameters, (x, attention)).square().sum()

        return vmap(grad(loss), (None, 0))(parameters, x)

    close(per_sample(flash_attention), per_sample(naive_attention))


# ---- vmap ------------------------------------------------------------------------------------------------------------

IN_DIMS = [(0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0), (1, 2, 3), (None, -1, 0), (4, None, -2)]


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@pytest.mark.parametrize("three_d", [False, True], ids=["4d", "3d"])
def test_vmap_over_each_argument(in_dims: tuple, three_d: bool) -> None:
    tensors = [t[:, 0] for t in qkv()] if three_d else qkv()
    if three_d:  # axes from the end stay where they are; those from the front have one less to pass
        in_dims = tuple(min(dim, 3) if dim is not None else None for dim in in_dims)
    mapped = [t if dim is None else torch.stack([t, 2 * t, -t], dim) for t, dim in zip(tensors, in_dims, strict=True)]

    def function(attention: Callable) -> Callable:
        return lambda q, k, v: attention(q, k, v, causal=True, return_lse=True)

    ours = vmap(function(flash_attention), in_dims)(*mapped)
    close(ours, vmap(function(naive_attention), in_dims)(*mapped))
    close(vmap(lambda *t: flash_attention_v1(*t, causal=True), in_dims)(*mapped), ours[0])
    close(vmap(lambda *t: ops.fwd(*t, None, -1, 0), in_dims)(*mapped), ours)


@LOSSES
def test_vmap_of_grad(loss: Callable) -> None:
    q, k, v = qkv()
    mapped = torch.stack([q, 2 * q]), k, torch.stack([v, -v], 1)
    dims = (0, None, 1)
    ours = vmap(grad(loss(flash_attention), (0, 1, 2)), dims)(*mapped)
    close(ours, vmap(grad(loss(naive_attention), (0, 1, 2)), dims)(*mapped))


def test_nested_vmap_and_vmap_in_a_recorded_graph() -> None:
    q, k, v = qkv()
    both = torch.stack([torch.stack([q, -q]), torch.stack([3 * q, q / 2])]).requires_grad_()

    def twice(attention: Callable) -> Tensor:
        return vmap(vmap(lambda q: attention(q, k, v)))(both)

    close(twice(flash_attention), twice(naive_attention))
    grads = [torch.autograd.grad(twice(f).square().sum(), both)[0] for f in (flash_attention, naive_attention)]
    close(*grads)


def test_batched_gradients() -> None:
    """``is_grads_batched`` maps the backward alone, outside torch.func's own entry points."""
    q, k, v = qkv(1, 2, 1, 3, 4, 2)
    q.requires_grad_()
    out = flash_attention(q, k, v)
    basis = torch.eye(out.numel(), dtype=out.dtype).view(-1, *out.shape)
    (ours,) = torch.autograd.grad(out, q, basis, is_grads_batched=True)
    (expected,) = torch.autograd.grad(naive_attention(q, k, v), q, basis, is_grads_batched=True)
    close(ours, expected)
    vectorised = torch.autograd.functional.jacobian(lambda q: flash_attention(q, k, v), q, vectorize=True)
    close(vectorised, ours.view(*out.shape, *q.shape))


def test_the_backward_operator_maps_over_each_tensor() -> None:
    q, k, v = qkv()
    out, lse = ops.fwd(q, k, v)
    tensors = [out.sin(), lse.sin(), q, k, v, out, lse]
    for mapped in range(len(tensors)):
        dims = tuple(0 if i == mapped else None for i in range(len(tensors)))
        stacked = [torch.stack([t, t / 2]) if i == mapped else t for i, t in enumerate(tensors)]
        ours = vmap(ops.bwd, dims)(*stacked)
        for entry in range(2):
            one = [t[entry] if i == mapped else t for i, t in enumerate(stacked)]
            close([t[entry] for t in ours], list(ops.bwd(*one)))


# ---- under torch.compile ---------------------------------------------------------------------------------------------


@LOSSES
def test_compiled_grad(loss: Callable) -> None:
    compiled = torch.compile(lambda *t: grad(loss(flash_attention), (0, 1, 2))(*t), fullgraph=True, backend="aot_eager")
    close(compiled(*qkv()), grad(loss(naive_attention), (0, 1, 2))(*qkv()))


def test_compiled_vmap() -> None:
    q, k, v = qkv()
    mapped = torch.stack([q, 2 * q])
    compiled = torch.compile(
        lambda q, k, v: vmap(flash_attention, (0, None, None))(q, k, v), fullgraph=True, backend="aot_eager"
    )
    close(compiled(mapped, k, v), vmap(naive_attention, (0, None, None))(mapped, k, v))


# ---- what is refused -------------------------------------------------------------------------------------------------

FORWARD_MODE = r"^flash_attention: forward-mode differentiation \(jvp, .*\) is not implemented"
DOUBLE = r"^flash_attention: double backward is not implemented"


def test_forward_mode_raises() -> None:
    q, k, v = qkv()
    for refused in (
        lambda: jvp(lambda q: flash_attention(q, k, v), (q,), (q,)),
        lambda: jacfwd(lambda q: flash_attention(q, k, v))(q),
        lambda: hessian(lambda q: flash_attention(q, k, v).sum())(q),
        lambda: jvp(lambda v: flash_attention_v1(q, k, v), (v,), (v,)),
        lambda: jvp(lambda q: ops.fwd(q, k, v)[0], (q,), (q,)),
    ):
        with pytest.raises(NotImplementedError, match=FORWARD_MODE):
            refused()


def test_dual_tensors_raise() -> None:
    q, k, v = qkv()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        for refused in (flash_attention, flash_attention_v1, ops.fwd):
            with pytest.raises(NotImplementedError, match=FORWARD_MODE):
                refused(dual, k, v)
        close(flash_attention(q, k, v), naive_attention(q, k, v))  # without a tangent there is nothing to lose


def test_double_backward_raises() -> None:
    q, k, v = (t.requires_grad_() for t in qkv())
    for attention in (flash_attention, flash_attention_v1):
        (dq,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match=DOUBLE):
            dq.sum().backward()
    with pytest.raises(NotImplementedError, match=DOUBLE):
        grad(lambda q: grad(loss_of_out(flash_attention))(q, k.detach(), v.detach()).sum())(q.detach())


def test_vmap_of_nothing_to_merge_with_raises() -> None:
    q = torch.zeros(3)
    with pytest.raises(ValueError, match=r"^flash_attention: q has 0 dimensions under vmap"):
        vmap(flash_attention)(q, q, q)
