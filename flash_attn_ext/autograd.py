"""Gradients and ``vmap``, in the two layers that PyTorch has.

* The operators carry their own formula, a kernel at the dispatcher's Autograd key: ``torch.compile``, ``torch.export``,
  opcheck and operators that are called directly go through it. The functions of interface.py, in eager code, leave the
  same node in the graph by :func:`record`, which saves the dispatcher's call back into Python.
* :class:`FlashAttention` is an ``autograd.Function`` with ``setup_context`` and ``vmap``, PyTorch's documented way into
  ``torch.func``. It costs more per call, so it is used only while such a transform is active in eager code.

Both call the same stateless operator ``bwd`` with the same arguments, and one rule maps them: the mapped axis is merged
with the batch. There is no double backward and no forward mode: both raise ``NotImplementedError``.

The formula is what ``torch.library.register_autograd`` would install, written out, for two reasons. Its generic wrapper
walks the schema once per argument on every call to fill in defaults, 27 of the 41 microseconds that a differentiable
call on a tiny problem took (torch 2.11, ten arguments). And its node has no ``setup_context``, which ``torch.func``
refuses inside ``torch.compile``; a node of a single level, as here, is what the C++ operators of PyTorch have, and
needs none.
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
        if keyset is None:  # from record(), not from the dispatcher
            with _below_autograd():
                out, lse = op(q, k, v, *config)
        else:
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


def record(op: Any, q: Tensor, k: Tensor, v: Tensor, *config: Any) -> tuple[Tensor, ...]:
    """What the dispatcher would come to for a differentiable call in eager code, without the way there and back.

    ``config`` is complete. Only outside ``torch.func``, forward mode and ``torch.compile``, and for tensors without a
    ``__torch_function__`` of their own.
    """
    return _OperatorFormula.apply(op, None, q, k, v, *config)


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

# ---- torch.func ------------------------------------------------------------------------------------------------------


def _merge_batches(call: Any, names: tuple[str, ...], info: Any, in_dims: tuple, args: tuple) -> tuple:
    """The ``vmap`` rule: ``call`` with the mapped axis merged with the batch. ``names``: the tensors, which come first.

    The mapped axis is in front in all results, which all have the batch in front themselves.
    """
    size, batch, merged = info.batch_size, 0, []
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
        merged.append(t)
    results = call(*merged, *args[len(names) :])
    return tuple(t.unflatten(0, (size, batch)) for t in results), (0,) * len(results)


_FORWARD_TENSORS = ("q", "k", "v")
_BACKWARD_TENSORS = ("dout", "dlse", "q", "k", "v", "out", "lse")


class FlashAttention(torch.autograd.Function):
    """``(q, k, v, scale, window_left, window_right, top_left, deterministic, block_m, block_n, version, with_lse)``
    -> ``(out, lse)``, as ``torch.func`` wants it. ``with_lse`` False marks ``lse`` as not differentiable."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *config: Any) -> tuple[Tensor, Tensor]:
        *options, version, _ = config
        return (fwd_v1 if version == 1 else fwd)(q, k, v, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.with_lse = inputs[-1]
        if not ctx.with_lse:
            ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:3], *output)
        ctx.options = inputs[3:8]

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple:
        q, k, v, out, lse = ctx.saved_tensors
        # Without with_lse the engine hands a dlse of zeros over, which would only cost time.
        grads = FlashAttentionBackward.apply(dout, dlse if ctx.with_lse else None, q, k, v, out, lse, *ctx.options)
        return (*grads, None, None, None, None, None, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple:
        raise NotImplementedError(_FORWARD_MODE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
        return _merge_batches(FlashAttention.apply, _FORWARD_TENSORS, info, in_dims, args)


class FlashAttentionBackward(torch.autograd.Function):
    """The operator ``bwd`` for ``torch.func``: mappable (``jacrev`` maps the backward), not differentiable again."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return bwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        raise NotImplementedError(_DOUBLE_BACKWARD)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple:
        raise NotImplementedError(_FORWARD_MODE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
        return _merge_batches(FlashAttentionBackward.apply, _BACKWARD_TENSORS, info, in_dims, args)


def _install_batching(op: Any, names: tuple[str, ...]) -> None:
    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple:
        return _merge_batches(op, names, info, in_dims, args)

    torch.library.register_vmap(op, rule, lib=_library)


_install_batching(fwd, _FORWARD_TENSORS)
_install_batching(fwd_v1, _FORWARD_TENSORS)
_install_batching(bwd, _BACKWARD_TENSORS)
