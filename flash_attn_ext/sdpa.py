"""PyTorch's ``scaled_dot_product_attention`` on our kernels, and the switch that puts it into PyTorch.

    with flash_attn_ext.replace_sdpa():
        model(x)                    # every F.scaled_dot_product_attention inside is ours

The result is always what PyTorch gives, errors included: a call that these kernels do not cover goes to PyTorch's own
function, and a :class:`FlashAttentionFallback` warning says why, once per reason and process. Warnings filters apply:
``warnings.simplefilter("error", FlashAttentionFallback)`` makes every such call raise instead. Under ``torch.compile``
the warning comes while compiling.

Two things PyTorch's function can do on some paths and ours cannot are not seen in advance: differentiating twice
(``NotImplementedError`` from the second backward), and ``torch.jit.script``, which cannot compile Python.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack, has_torch_function
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .interface import flash_attention, supported_kernels

__all__ = ["FlashAttentionFallback", "SdpaReplacement", "replace_sdpa", "scaled_dot_product_attention"]

_torch_sdpa = torch._C._nn.scaled_dot_product_attention


class FlashAttentionFallback(UserWarning):
    """A call of ``scaled_dot_product_attention`` that PyTorch's own function computed. Given once per reason."""


# ---- which calls are ours --------------------------------------------------------------------------------------------


def _coverage(kernels: list[dict[str, Any]]) -> dict[tuple[str, torch.dtype], tuple[float, frozenset[str]]]:
    """``(device, dtype) -> (largest head dimension, features)`` that v2 has in both passes."""
    passes: dict[tuple[str, torch.dtype], dict[str, tuple[float, frozenset[str]]]] = {}
    for row in kernels:
        if row["version"] != 2:
            continue
        key = row["device"], getattr(torch, row["dtype"])
        limit, features = row["head_dim_max"] or math.inf, frozenset(row["features"])
        known = passes.setdefault(key, {}).get(row["pass"])
        if known is not None:  # several kernels share the pass: what any of them covers, features of the common part
            limit, features = max(limit, known[0]), features & known[1]
        passes[key][row["pass"]] = (limit, features)
    return {
        key: (min(both["fwd"][0], both["bwd"][0]), both["fwd"][1] & both["bwd"][1])
        for key, both in passes.items()
        if {"fwd", "bwd"} <= both.keys()
    }


_covered = _coverage(supported_kernels())
_covered_devices = frozenset(device for device, _ in _covered)
_PLAIN = (Tensor, FakeTensor)
_disabled = torch._C._disabled_torch_function_impl
# Modules of torch-function modes that let attention be: torch.set_default_device, tracing, export.
_NEUTRAL_MODES = ("torch.utils._device", "torch.fx.", "torch._export.", "torch.export.")
_AUTOCAST_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _is_overridden(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a tensor subclass or a torch-function mode may define attention itself."""
    if has_torch_function((query, key, value)):
        if any(type(t) not in _PLAIN and type(t).__torch_function__ is not _disabled for t in (query, key, value)):
            return True
        return not all(type(mode).__module__.startswith(_NEUTRAL_MODES) for mode in _get_current_function_mode_stack())
    return any(is_traceable_wrapper_subclass(t) for t in (query, key, value))


def _why_not(query: Any, key: Any, value: Any, dropout_p: Any, causal: Any, scale: Any, enable_gqa: Any) -> str | None:
    """The reason why PyTorch's function has to take a call without a mask; None where ours gives the same result."""
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        return "an argument that is not a tensor"
    if _is_overridden(query, key, value):
        return "a tensor subclass or a torch-function mode, which may define attention itself"
    if dropout_p != 0.0:
        return "dropout"
    if not (isinstance(causal, bool) and isinstance(enable_gqa, bool)):
        return "is_causal or enable_gqa is not a bool"
    device = query.device.type
    if device not in _covered_devices:
        return f"no kernel for {device} tensors in this build"
    if not query.device == key.device == value.device:
        return "tensors on several devices"
    for t in (query, key, value):
        if t.is_nested or t.layout != torch.strided:
            return "a nested or sparse tensor"
    dtype = query.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        if not all(t.dtype in _AUTOCAST_DTYPES for t in (query, key, value)):
            return "dtypes that autocast does not unify"
        dtype = torch.get_autocast_dtype(device)
    elif not dtype == key.dtype == value.dtype:
        return "tensors of several dtypes"
    if (device, dtype) not in _covered:
        return f"no {device} kernel for {dtype} in this build"
    dim = query.dim()
    if dim < 2 or not dim == key.dim() == value.dim():
        return "unequal numbers of dimensions"
    if query.numel() == 0 or key.numel() == 0 or value.numel() == 0:
        return "an empty tensor"
    head_dim_max, features = _covered[device, dtype]
    head_dim, head_dim_v = query.shape[-1], value.shape[-1]
    if head_dim != key.shape[-1]:
        return "head dimensions that do not fit"
    if head_dim > head_dim_max or head_dim_v > head_dim_max:
        return f"a head dimension above {head_dim_max}"
    if head_dim != head_dim_v and "head_dim_v" not in features:
        return "a head dimension of value that differs from query's"
    if causal and not {"causal", "causal_align"} <= features:
        return "is_causal"
    if enable_gqa:
        if dim < 3 or "gqa" not in features or query.shape[-3] % key.shape[-3] != 0:
            return "head counts that do not fit"
        if query.shape[:-3] != key.shape[:-3] or key.shape[:-2] != value.shape[:-2]:
            return "batch dimensions to be broadcast"
    elif query.shape[:-2] != key.shape[:-2] or key.shape[:-2] != value.shape[:-2]:
        return "batch dimensions to be broadcast, or unequal heads without enable_gqa"
    if scale is not None and not (isinstance(scale, (float, int, torch.SymFloat)) and abs(scale) < math.inf):
        return "a scale that is no finite number"
    if not torch._C._get_flash_sdp_enabled():
        return "flash kernels are switched off (sdpa_kernel, torch.backends.cuda.enable_flash_sdp)"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return None


def _is_causal_bias(attn_mask: Any) -> bool:
    """``torch.nn.attention.bias.CausalBias``, recognised by name: importing its module imports torch._dynamo."""
    kind = type(attn_mask)
    return kind.__name__ == "CausalBias" and kind.__module__ == "torch.nn.attention.bias"


def _require_a_value_for_each_key(key: Any, value: Any) -> None:
    """PyTorch's CPU flash kernel takes the number of keys from ``value`` alone: it reads past the end of a shorter
    ``key``, and leaves keys out of a longer one. Nothing that we hand on may get there, with a mask or without."""
    if not (isinstance(key, Tensor) and isinstance(value, Tensor)) or key.is_nested or value.is_nested:
        return
    if key.dim() >= 2 and value.dim() >= 2 and key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"scaled_dot_product_attention: key has {key.shape[-2]} positions and value has {value.shape[-2]} "
            f"(key {tuple(key.shape)}, value {tuple(value.shape)}); each key needs its value"
        )


_noted: set[str] = set()


def _note(reason: str) -> None:
    if reason not in _noted:
        # The caller of scaled_dot_product_attention: warn, _note, _sdpa, the public function.
        warnings.warn(
            f"scaled_dot_product_attention: {reason}: PyTorch's own function computes this (said once per reason)",
            FlashAttentionFallback,
            stacklevel=4,
        )
        _noted.add(reason)  # after the warning: a filter that turns it into an error gets every call


# What torch.compiler.assume_constant_result sets, without its import of torch._dynamo: compiled code runs _note once,
# while it is traced, and its graph does not break.
_note._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _sdpa(
    original: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    _require_a_value_for_each_key(key, value)
    causal, align, why_not = is_causal, "top-left", None
    is_causal_bias = attn_mask is not None and _is_causal_bias(attn_mask)
    if is_causal_bias and is_causal is False:
        causal = True
        if attn_mask.variant.name == "LOWER_RIGHT" and attn_mask.seq_len_q != attn_mask.seq_len_kv:
            align = "bottom-right"
    elif attn_mask is not None:
        why_not = "attn_mask"
    why_not = why_not or _why_not(query, key, value, dropout_p, causal, scale, enable_gqa)
    if why_not is None and align == "bottom-right":
        lengths_fit = attn_mask.seq_len_q == query.shape[-2] and attn_mask.seq_len_kv == key.shape[-2]
        why_not = None if lengths_fit else "a causal bias made for other lengths"
    if why_not is not None:
        _note(why_not)
        options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        if is_causal_bias:  # it knows its own rule, and compares the function with the one that F has at the moment
            kind, arguments = type(attn_mask), (query, key, value, attn_mask)
            return kind.__torch_function__(F.scaled_dot_product_attention, (kind,), arguments, options)
        return original(query, key, value, attn_mask, **options)
    dim = query.dim()
    if dim == 4 or (dim == 3 and not enable_gqa):
        return flash_attention(query, key, value, scale, causal, causal_align=align)
    if dim < 4:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        return flash_attention(query, key, value, scale, causal, causal_align=align).squeeze(0)
    batch = query.shape[:-3]
    query, key, value = query.flatten(0, -4), key.flatten(0, -4), value.flatten(0, -4)
    return flash_attention(query, key, value, scale, causal, causal_align=align).unflatten(0, batch)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, on our kernels where they cover the call.

    Parameters
    ----------
    query : Tensor
        ``(..., Hq, Sq, E)``, two dimensions or more. float16, bfloat16, float32; float64 on the CPU. More than one
        leading dimension is flattened, which copies where its strides do not allow a view.
    key, value : Tensor
        ``(..., Hk, Sk, E)`` and ``(..., Hk, Sk, Ev)``, dtype of ``query`` (autocast casts first).
    attn_mask : Tensor, optional
        ``torch.nn.attention.bias.causal_upper_left`` and ``causal_lower_right`` are ours; any other mask is PyTorch's.
    dropout_p : float
        Other than 0: PyTorch's.
    is_causal : bool
        **Top-left**: query ``i`` sees keys ``j <= i``, also where ``Sq != Sk``.
    scale : float, optional
        Default ``1 / sqrt(E)``. Keyword only, as in PyTorch.
    enable_gqa : bool
        ``Hk`` may divide ``Hq``; otherwise they are equal. Keyword only, as in PyTorch.

    Returns
    -------
    Tensor
        ``(..., Hq, Sq, Ev)``, dtype of ``query`` or of autocast.

    Raises
    ------
    ValueError
        ``key`` and ``value`` of different lengths, on every path. PyTorch's CPU kernel reads past the end of a shorter
        ``key`` and drops the end of a longer one.
    RuntimeError, TypeError
        Those of PyTorch's function, from PyTorch's function.

    Warns
    -----
    FlashAttentionFallback
        PyTorch's own function computed the call: masks, dropout, devices and dtypes without a kernel, broadcast batch
        dimensions, empty tensors, tensor subclasses, forward-mode differentiation, flash kernels switched off with
        ``torch.nn.attention.sdpa_kernel``.
    """
    return _sdpa(_torch_sdpa, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


# ---- replacing PyTorch's ---------------------------------------------------------------------------------------------

_lock = threading.Lock()
_replacements = 0  # how many are active
_is_replaced = False  # _replacements > 0: a bool of its own, since compiled code guards on it
_replaced: Callable[..., Tensor] = _torch_sdpa  # what F had before the first of them


@wraps(scaled_dot_product_attention)
def _in_place_of_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if not _is_replaced:  # a reference that outlived the replacement
        return _replaced(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return _sdpa(_replaced, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


class SdpaReplacement:
    """What :func:`replace_sdpa` returns: a context manager with :meth:`restore`."""

    def __init__(self) -> None:
        self._active = False
        self._entered = 0
        self._activate()

    def _activate(self) -> None:
        global _replacements, _is_replaced, _replaced
        with _lock:
            if self._active:
                return
            current = F.scaled_dot_product_attention
            if _replacements == 0 and current is not _in_place_of_torch:
                _replaced = current
                F.scaled_dot_product_attention = _in_place_of_torch
            _replacements += 1
            self._active = _is_replaced = True

    def restore(self) -> None:
        """End this replacement. PyTorch gets its function back with the last active one; twice does no harm."""
        global _replacements, _is_replaced
        with _lock:
            if not self._active:
                return
            self._active = False
            _replacements -= 1
            if _replacements > 0:
                return
            _is_replaced = False
            # Another patch may have come on top: then it stays, and what it wraps leads to _replaced from now on.
            if F.scaled_dot_product_attention is _in_place_of_torch:
                F.scaled_dot_product_attention = _replaced

    def __enter__(self) -> SdpaReplacement:
        self._activate()
        self._entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered -= 1
        if self._entered == 0:
            self.restore()

    def __repr__(self) -> str:
        return f"<replace_sdpa(): {'active' if self._active else 'restored'}>"


def replace_sdpa() -> SdpaReplacement:
    """Make ``torch.nn.functional.scaled_dot_product_attention`` ours: until the block ends, or until ``.restore()``.

    ::

        with replace_sdpa():
            model(x)

        replacement = replace_sdpa()    # for the whole program
        replacement.restore()

    Everything that looks the function up in ``torch.nn.functional`` when it runs gets ours: ``nn.MultiheadAttention``,
    ``nn.TransformerEncoderLayer``, model libraries. Calls that our kernels do not cover go to the function that was
    there before, with a :class:`FlashAttentionFallback` warning.

    Replacements nest, can be entered again, and may be restored in any order: PyTorch's function is back when the last
    one has ended, exceptions or not. The switch concerns all threads of the process.

    Not reached:

    * modules that did ``from torch.nn.functional import scaled_dot_product_attention`` before;
    * the fused inference path of ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` (eval mode without
      gradients), which does not call the function at all: ``torch.backends.mha.set_fastpath_enabled(False)``.

    Code compiled by ``torch.compile`` is compiled again when a replacement begins or ends.

    Returns
    -------
    SdpaReplacement
        Active already.
    """
    return SdpaReplacement()
