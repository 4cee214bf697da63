"""Gradients, in the two layers that PyTorch needs.

* The operators carry their own formula (``register_autograd``): eager training, ``torch.compile``, ``torch.export``,
  activation checkpointing and opcheck go through it.
* :class:`FlashAttention` is an ``autograd.Function`` with ``setup_context`` and ``vmap``: ``torch.func`` transforms
  (``grad``, ``vmap``, ``jacrev``) need one, and cannot use an operator's own formula. It costs more per call, so it is
  used only while such a transform is active.

Both call the same stateless operator ``bwd`` with the same arguments. There is no double backward: differentiating a
gradient raises ``NotImplementedError``.
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


def _raise_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(_DOUBLE_BACKWARD)


def _no_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    pass


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *options = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.options = tuple(options[:5])  # scale, windows, alignment, deterministic: what bwd takes


def _save_for_op(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs, output)
    ctx.set_materialize_grads(False)  # an unused lse then costs nothing


def _backward_of_op(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    q, k, v, out, lse = ctx.saved_tensors
    if dout is None:  # only lse was used
        dout = torch.zeros_like(out)
    return (*bwd(dout, dlse, q, k, v, out, lse, *ctx.options), None, None, None, None, None, None, None)


for _op in ("fwd", "fwd_v1"):
    torch.library.register_autograd(f"flash_attn_ext::{_op}", _backward_of_op, setup_context=_save_for_op)
torch.library.register_autograd("flash_attn_ext::bwd", _raise_double_backward, setup_context=_no_context)


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
        _save(ctx, inputs, output)

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
