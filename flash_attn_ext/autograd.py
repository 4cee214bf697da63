"""Gradients and ``vmap`` of the operators, as kernels at the dispatcher's own keys.

* Autograd: a formula for ``fwd`` and ``fwd_v1``, and one for ``bwd`` that refuses. Eager training, ``torch.compile``,
  ``torch.export``, activation checkpointing, opcheck and ``torch.func.grad`` all go through it.
* Batching: rules that merge the mapped axis with the batch, for ``torch.vmap`` and what is built on it (``jacrev``).

The formula is what ``torch.library.register_autograd`` would install, written out, for two reasons. Its generic wrapper
walks the schema once per argument on every call to fill in defaults, 27 of the 41 microseconds that a differentiable
call on a tiny problem took (torch 2.11, ten arguments). And its node has no ``setup_context``, which ``torch.func``
refuses; a node of a single level, as here, is what the C++ operators of PyTorch have, and needs none.

There is no double backward and no forward mode: both raise ``NotImplementedError``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from ._binary import _C  # noqa: F401  (registers the operators)

_ops = torch.ops.flash_attn_ext
fwd = _ops.fwd.default
fwd_v1 = _ops.fwd_v1.default
bwd = _ops.bwd.default

_DOUBLE_BACKWARD = (
    "flash_attention: double backward is not implemented (a gradient of flash_attention was differentiated again). "
    "Use naive_attention, or detach the first gradient"
)
_FORWARD_MODE = (
    "flash_attention: forward-mode differentiation (jvp, jacfwd, hessian, dual tensors) is not implemented. "
    "Use naive_attention, or reverse mode (grad, vjp, jacrev)"
)

_below_autograd = torch._C._AutoDispatchBelowAutograd
_after_autograd = torch._C._after_autograd_keyset
_any_requires_grad = torch._C._any_requires_grad
_is_functorch_active = torch._C._are_functorch_transforms_active
_library = torch.library.Library("flash_attn_ext", "FRAGMENT")

# ---- reverse mode ----------------------------------------------------------------------------------------------------


def _redispatch(op: Any, keyset: Any, *args: Any) -> tuple[Tensor, ...]:
    """What lies below the formula: the next ``torch.func`` level where there is one, else the device's kernel."""
    with _below_autograd():
        return op.redispatch(keyset & _after_autograd, *args)


def _redispatch_from_node(op: Any, keyset: Any, *args: Any) -> tuple[Tensor, ...]:
    """The same from inside a node, where PyTorch has switched gradients off; ``torch.func`` levels below need them."""
    if not _is_functorch_active():
        return _redispatch(op, keyset, *args)
    with torch.enable_grad():
        return _redispatch(op, keyset, *args)


def _record(node: Any, *args: Any) -> tuple[Tensor, ...]:
    if not _is_functorch_active():
        return node.apply(*args)
    with enable_single_level_autograd_function():  # the dispatcher has already chosen the level
        return node.apply(*args)


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """Forward mode would otherwise lose its tangents without a word."""
    if any(t is not None and forward_ad.unpack_dual(t, level=0).tangent is not None for t in tensors):
        raise NotImplementedError(_FORWARD_MODE)


class _OperatorFormula(torch.autograd.function._SingleLevelFunction):
    """The node that a differentiable ``fwd`` or ``fwd_v1`` leaves in the graph."""

    @staticmethod
    def forward(ctx: Any, op: Any, keyset: Any, q: Tensor, k: Tensor, v: Tensor, *config: Any) -> tuple[Tensor, ...]:
        out, lse = _redispatch_from_node(op, keyset, q, k, v, *config)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = config[:5]  # scale, windows, alignment, deterministic: what bwd takes
        ctx.set_materialize_grads(False)  # an unused lse then costs nothing
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
        q, k, v, out, lse = ctx.saved_tensors
        if dout is None:  # only lse was used
            dout = torch.zeros_like(out)
        dq, dk, dv = bwd(dout, dlse, q, k, v, out, lse, *ctx.options)
        return None, None, dq, dk, dv, None, None, None, None, None, None, None


def _install_forward_formula(name: str, op: Any) -> None:
    def formula(
        keyset: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        window_left: int = -1,
        window_right: int = -1,
        top_left: bool = False,
        deterministic: bool | None = None,
        block_m: int = 0,
        block_n: int = 0,
    ) -> tuple[Tensor, ...]:
        config = (scale, window_left, window_right, top_left, deterministic, block_m, block_n)
        if forward_ad._current_level >= 0:
            _refuse_tangents(q, k, v)
        if torch.is_grad_enabled() and _any_requires_grad(q, k, v):
            return _record(_OperatorFormula, op, keyset, q, k, v, *config)
        return _redispatch(op, keyset, q, k, v, *config)

    _library.impl(name, formula, "Autograd", with_keyset=True)


class _NoDoubleBackward(torch.autograd.function._SingleLevelFunction):
    """The node that a differentiable ``bwd`` leaves: going through it raises."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, ...]:
        return _redispatch_from_node(bwd, keyset, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        raise NotImplementedError(_DOUBLE_BACKWARD)


def _formula_of_bwd(keyset: Any, *args: Any) -> tuple[Tensor, ...]:
    if forward_ad._current_level >= 0:
        _refuse_tangents(*args[:7])
    if torch.is_grad_enabled() and _any_requires_grad(*args[:7]):
        return _record(_NoDoubleBackward, keyset, *args)
    return _redispatch(bwd, keyset, *args)


_install_forward_formula("fwd", fwd)
_install_forward_formula("fwd_v1", fwd_v1)
_library.impl("bwd", _formula_of_bwd, "Autograd", with_keyset=True)

# ---- vmap ------------------------------------------------------------------------------------------------------------


def _install_batching(op: Any, names: tuple[str, ...]) -> None:
    """``names``: the operator's tensors, which come first. All outputs have the batch in front."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple:
        size, batch, folded = info.batch_size, 0, []
        for name, t, dim in zip(names, args, in_dims, strict=False):
            if t is not None:
                # An unmapped tensor is expanded, not copied, until flatten has to.
                t = t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
                if t.dim() == 1:  # no batch to merge with; the operator names every other misfit
                    raise ValueError(
                        f"flash_attention: {name} has 0 dimensions under vmap; it has to be (batch, seq, dim) or "
                        "(batch, heads, seq, dim) for each mapped entry"
                    )
                batch = t.shape[1] if name == "q" else batch
                t = t.flatten(0, 1)
            folded.append(t)
        results = op(*folded, *args[len(names) :])
        return tuple(t.unflatten(0, (size, batch)) for t in results), (0,) * len(results)

    torch.library.register_vmap(op, rule, lib=_library)


_install_batching(fwd, ("q", "k", "v"))
_install_batching(fwd_v1, ("q", "k", "v"))
_install_batching(bwd, ("dout", "dlse", "q", "k", "v", "out", "lse"))
