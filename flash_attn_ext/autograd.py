"""Gradients, in the two layers that PyTorch needs.

* The operators carry their own formula, a kernel at the dispatcher's Autograd key: eager training, ``torch.compile``,
  ``torch.export``, activation checkpointing and opcheck go through it.
* :class:`FlashAttention` is an ``autograd.Function`` with ``setup_context`` and ``vmap``: ``torch.func`` transforms
  (``grad``, ``vmap``, ``jacrev``) need one, and cannot use an operator's own formula. It costs more per call, so it is
  used only while such a transform is active.

Both call the same stateless operator ``bwd`` with the same arguments. There is no double backward: differentiating a
gradient raises ``NotImplementedError``.

The formula is what ``torch.library.register_autograd`` would install, written out: its generic wrapper walks the schema
once per argument on every call to fill in defaults, 27 of the 41 microseconds that a differentiable call on a tiny
problem took (torch 2.11, ten arguments).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._binary import _C  # noqa: F401  (registers the operators)

_ops = torch.ops.flash_attn_ext
fwd = _ops.fwd.default
fwd_v1 = _ops.fwd_v1.default
bwd = _ops.bwd.default

_DOUBLE_BACKWARD = (
    "flash_attention: double backward is not implemented (a gradient of flash_attention was differentiated again). "
    "Use naive_attention, or detach the first gradient"
)

# ---- the operators' own formula --------------------------------------------------------------------------------------

_below_autograd = torch._C._AutoDispatchBelowAutograd
_after_autograd = torch._C._after_autograd_keyset
_any_requires_grad = torch._C._any_requires_grad
_library = torch.library.Library("flash_attn_ext", "FRAGMENT")


class _OperatorFormula(torch.autograd.Function):
    """The node that a differentiable ``fwd`` or ``fwd_v1`` leaves in the graph."""

    @staticmethod
    def forward(ctx: Any, op: Any, keyset: Any, q: Tensor, k: Tensor, v: Tensor, *config: Any) -> tuple[Tensor, Tensor]:
        with _below_autograd():
            out, lse = op.redispatch(keyset & _after_autograd, q, k, v, *config)
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
    ) -> tuple[Tensor, Tensor]:
        config = (scale, window_left, window_right, top_left, deterministic, block_m, block_n)
        if torch.is_grad_enabled() and _any_requires_grad(q, k, v):
            return _OperatorFormula.apply(op, keyset, q, k, v, *config)
        with _below_autograd():
            return op.redispatch(keyset & _after_autograd, q, k, v, *config)

    _library.impl(name, formula, "Autograd", with_keyset=True)


class _NoDoubleBackward(torch.autograd.Function):
    """The node that a differentiable ``bwd`` leaves: going through it raises."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        with _below_autograd():
            return bwd.redispatch(keyset & _after_autograd, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        raise NotImplementedError(_DOUBLE_BACKWARD)


def _formula_of_bwd(keyset: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    if torch.is_grad_enabled() and _any_requires_grad(*args[:7]):
        return _NoDoubleBackward.apply(keyset, *args)
    with _below_autograd():
        return bwd.redispatch(keyset & _after_autograd, *args)


_install_forward_formula("fwd", fwd)
_install_forward_formula("fwd_v1", fwd_v1)
_library.impl("bwd", _formula_of_bwd, "Autograd", with_keyset=True)


# ---- torch.func ------------------------------------------------------------------------------------------------------


def _fold(t: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """Move the mapped axis to the front and merge it with the batch; an unmapped tensor is expanded, not copied."""
    if t is None:
        return None
    t = t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.flatten(0, 1)


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
    def vmap(info: Any, in_dims: tuple, q: Tensor, k: Tensor, v: Tensor, *config: Any) -> tuple:
        size = info.batch_size
        folded = (_fold(t, d, size) for t, d in zip((q, k, v), in_dims[:3], strict=True))
        out, lse = FlashAttention.apply(*folded, *config)
        return (out.unflatten(0, (size, -1)), lse.unflatten(0, (size, -1))), (0, 0)


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
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
        size = info.batch_size
        tensors = [_fold(t, d, size) for t, d in zip(args[:7], in_dims[:7], strict=True)]
        grads = FlashAttentionBackward.apply(*tensors, *args[7:])
        return tuple(g.unflatten(0, (size, -1)) for g in grads), (0, 0, 0)
