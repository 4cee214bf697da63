"""The attention functions: signatures, defaults, documentation. They know no tile and no architecture."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import autograd
from ._binary import _C, build_record

_is_functorch_active = torch._C._are_functorch_transforms_active
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_has_torch_function = torch.overrides.has_torch_function_variadic
_LARGEST = 2**62  # of an integer that is handed to an operator


def _not_implemented(function: str, option: str, value: str) -> None:
    raise NotImplementedError(f"{function}: {option}={value} is not implemented yet; naive_attention computes it")


def _require_number(function: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # NumPy's scalars are Real
        raise TypeError(f"{function}: {name} is {value!r}; it has to be a number")


def _reject_missing(
    function: str,
    softcap: float,
    alibi_slopes: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
) -> None:
    """Options of the contract that no kernel has yet raise, each under its own name; wrong values raise ValueError."""
    _require_number(function, "dropout_p", dropout_p)
    _require_number(function, "softcap", softcap)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{function}: dropout_p is {dropout_p}; it has to lie in [0, 1)")
    if not 0.0 <= softcap < float("inf"):
        raise ValueError(f"{function}: softcap is {softcap}; it has to be 0 (off) or a positive finite number")
    if softcap != 0.0:
        _not_implemented(function, "softcap", repr(softcap))
    if dropout_p != 0.0:
        _not_implemented(function, "dropout_p", repr(dropout_p))
    for name, value in (("alibi_slopes", alibi_slopes), ("mask", mask), ("bias", bias)):
        if value is not None:
            if not isinstance(value, Tensor):
                raise TypeError(f"{function}: {name} is {type(value).__name__}; it has to be a torch.Tensor or None")
            _not_implemented(function, name, f"<tensor {tuple(value.shape)}>")


def _window(function: str, window: tuple[int, int] | None, causal: bool) -> tuple[int, int]:
    """``window`` as (left, right) with -1 for open; causal sets right to 0."""
    left, right = -1, -1
    if window is not None:
        try:
            left, right = window
        except (TypeError, ValueError):
            raise ValueError(f"{function}: window is {window!r}; it has to be (left, right) or None") from None
        for end in (left, right):
            if end is not None and (isinstance(end, (bool, float)) or not isinstance(end, (int, torch.SymInt))):
                raise TypeError(f"{function}: window is {window!r}; both ends have to be integers")
        left = -1 if left is None or (isinstance(left, int) and abs(left) > _LARGEST) else left
        right = -1 if right is None or (isinstance(right, int) and abs(right) > _LARGEST) else right
    return left, 0 if causal else right


def _cast_for_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast outside the operator, so that what is saved for backward has the autocast dtype too. float64 stays."""
    device = q.device.type
    # Asking about the meta device raises: there is no autocast for it.
    if device == "meta" or not torch.is_autocast_enabled(device) or q.dtype == torch.float64:
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _refuse_jagged(function: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Jagged tensors raise before any kernel of ours is reached, with nothing but the operator's name as their text."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.is_nested:
            raise TypeError(f"{function}: {name} is a nested tensor; convert it to an ordinary dense one") from None


def _attend(
    version: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window_left: int,
    window_right: int,
    top_left: bool,
    deterministic: bool | None,
    block_size: tuple[int, int],
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        q, k, v = _cast_for_autocast(q, k, v)
    op = autograd.fwd_v1 if version == 1 else autograd.fwd
    options = (scale, window_left, window_right, top_left, deterministic, *block_size)
    try:
        if _is_compiling():
            return op(q, k, v, *options)
        if _is_functorch_active():
            return autograd.FlashAttention.apply(q, k, v, *options, version, with_lse)
        if forward_ad._current_level >= 0:
            return op(q, k, v, *options)
        if (q.requires_grad or k.requires_grad or v.requires_grad) and _is_grad_enabled():
            if _has_torch_function(q, k, v):
                return op(q, k, v, *options)
            return autograd.record(op, q, k, v, *options)
        with torch._C._AutoDispatchBelowAutograd():  # nothing to record: 4 of 9 microseconds saved
            return op(q, k, v, *options)
    except NotImplementedError:
        _refuse_jagged("flash_attention_v1" if version == 1 else "flash_attention", q, k, v)
        raise


def _block(function: str, block_size: tuple[int, int] | None) -> tuple[int, int]:
    if block_size is None:
        return 0, 0
    try:
        rows, columns = block_size
    except (TypeError, ValueError):
        raise ValueError(f"{function}: block_size is {block_size!r}; it has to be (rows, columns) or None") from None
    for size in (rows, columns):
        if isinstance(size, bool) or not isinstance(size, numbers.Integral):
            raise TypeError(f"{function}: block_size is {block_size!r}; rows and columns have to be integers")
    if not (0 < rows <= _LARGEST and 0 < columns <= _LARGEST):
        raise ValueError(f"{function}: block_size is {block_size!r}; both have to be positive and no larger than 2^62")
    return int(rows), int(columns)


def _top_left(function: str, causal_align: str) -> bool:
    if causal_align == "bottom-right":
        return False
    if causal_align == "top-left":
        return True
    raise ValueError(f"{function}: causal_align is {causal_align!r}; it has to be 'bottom-right' or 'top-left'")


def _require_tensors(function: str, q: Any, k: Any, v: Any) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{function}: {name} is {type(t).__name__}; it has to be a torch.Tensor")


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    causal: bool = False,
    *,
    causal_align: str = "bottom-right",
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Exact attention, :math:`O = \mathrm{softmax}(\mathrm{scale} \cdot Q K^\top) V`, without the S x S matrix.

    Version 2 of the algorithm (FlashAttention-2, Algorithms 1 and 2). Memory grows linearly with the sequence.

    Parameters
    ----------
    q : Tensor
        ``(B, Hq, Sq, D)``, or ``(B, Sq, D)`` for one head. float16, bfloat16, float32; float64 on the CPU.
    k : Tensor
        ``(B, Hk, Sk, D)`` or ``(B, Sk, D)``. ``Hq % Hk == 0``: each key/value head serves ``Hq / Hk`` query heads, and
        its gradient comes out at ``Hk`` heads with no expanded copy.
    v : Tensor
        ``(B, Hk, Sk, Dv)`` or ``(B, Sk, Dv)``. Any strides; a last dimension that is not contiguous costs one copy.
    scale : float, optional
        Multiplies the scores; any finite number. Default ``1 / sqrt(D)``.
    causal : bool
        Query ``i`` sees keys ``j <= i + shift``.
    causal_align : {"bottom-right", "top-left"}
        ``shift`` is ``Sk - Sq`` (the last query sees the last key) or 0. It also places ``window``.
    window : (int, int), optional
        Query ``i`` sees keys in ``[i + shift - left, i + shift + right]``, both ends included. ``None`` or a negative
        end is open. ``causal`` sets ``right`` to 0.
    softcap, alibi_slopes, mask, bias, dropout_p
        Part of the contract; no kernel has them yet, so a value other than the default raises ``NotImplementedError``.
    deterministic : bool, optional
        Of the gradients. Default: ``torch.are_deterministic_algorithms_enabled()``. The CPU engine always is; CUDA
        kernels pay for it. The forward is bit-reproducible everywhere.
    return_lse : bool
        Also return ``lse``.

    Returns
    -------
    out : Tensor
        ``(B, Hq, Sq, Dv)`` or ``(B, Sq, Dv)``, dtype and memory layout of ``q``. A row that sees no key is 0.
    lse : Tensor
        With ``return_lse``: ``logsumexp`` of the scaled scores, natural log, ``(B, Hq, Sq)`` or ``(B, Sq)``, float32
        (float64 for float64). ``-inf`` where a row sees no key. Differentiable.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes, devices or numbers that do not fit, with the values and the rule.
    NotImplementedError
        A meaningful call that this build cannot compute; double backward.
    """
    if softcap != 0.0 or dropout_p != 0.0 or alibi_slopes is not None or mask is not None or bias is not None:
        _reject_missing("flash_attention", softcap, alibi_slopes, mask, bias, dropout_p)
    return _flash_attention_v2(
        "flash_attention", q, k, v, scale, causal, causal_align, window, deterministic, return_lse, None
    )


def _flash_attention_v2(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    causal: bool,
    causal_align: str,
    window: tuple[int, int] | None,
    deterministic: bool | None,
    return_lse: bool,
    block_size: tuple[int, int] | None,
) -> Tensor | tuple[Tensor, Tensor]:
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        _require_tensors(function, q, k, v)
    top_left = causal_align != "bottom-right" and _top_left(function, causal_align)
    left, right = (-1, 0 if causal else -1) if window is None else _window(function, window, causal)
    block = (0, 0) if block_size is None else _block(function, block_size)
    out, lse = _attend(2, q, k, v, scale, left, right, top_left, deterministic, block, return_lse)
    return (out, lse) if return_lse else out


def flash_attention_v2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    causal: bool = False,
    *,
    causal_align: str = "bottom-right",
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool | None = None,
    return_lse: bool = False,
    block_size: tuple[int, int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`flash_attention` by its algorithm's name, with a choice of tile.

    Parameters
    ----------
    block_size : (int, int), optional
        Query rows and keys of a tile. On the CPU each is 32, 64, 96 or 128; on CUDA it is one of the built tiles, which
        ``supported_kernels()`` lists. ``None``: the best. All others as in :func:`flash_attention`.
    """
    if softcap != 0.0 or dropout_p != 0.0 or alibi_slopes is not None or mask is not None or bias is not None:
        _reject_missing("flash_attention_v2", softcap, alibi_slopes, mask, bias, dropout_p)
    return _flash_attention_v2(
        "flash_attention_v2", q, k, v, scale, causal, causal_align, window, deterministic, return_lse, block_size
    )


def flash_attention_v1(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    causal: bool = False,
    *,
    block_size: tuple[int, int] | None = None,
) -> Tensor:
    """Exact attention by version 1 of the algorithm (FlashAttention, Algorithm 1): keys in the outer loop, the output
    and its statistics read, rescaled and written at every step. For study and comparison; it trains through the
    version-2 backward.

    Parameters
    ----------
    q, k, v, scale, causal
        As in :func:`flash_attention` (causal is bottom-right).
    block_size : (int, int), optional
        Query rows and keys of a block. On the CPU each is 32, 64, 96 or 128; on CUDA it is one of the built blocks,
        which ``supported_kernels()`` lists. ``None``: the best.

    Returns
    -------
    Tensor
        ``(B, Hq, Sq, Dv)`` or ``(B, Sq, Dv)``.
    """
    _require_tensors("flash_attention_v1", q, k, v)
    block = _block("flash_attention_v1", block_size)
    return _attend(1, q, k, v, scale, -1, 0 if causal else -1, False, None, block, False)[0]


def supported_kernels() -> list[dict[str, Any]]:
    """What this binary can run: a dict for each device, arch, pass, version and dtype, with ``operand``,
    ``head_dim_max`` (None: any), ``features`` and ``tiles``, the kernels it is made of.

    ``operand`` of float32 on CUDA is ``fp32``; with ``torch.set_float32_matmul_precision`` it can become ``tf32``.
    """
    return _C.supported_kernels()


def build_info() -> dict[str, Any]:
    """What this binary is: PyTorch and CUDA it was built with, architectures, compiler, hash of its sources.

    ``cuda`` is a bool, ``cuda_version`` the toolkit's; what the binary says of itself wins over ``build.json``.
    """
    record = build_record()
    return {**record, "cuda_version": record.get("cuda"), **_C.build_info()}


def _cuda_plans(device: torch.device, deterministic: bool | None, call: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Both passes on this GPU, with the global switches as they stand now; ``{"why_not": text}`` where none serves."""
    try:
        index = device.index
        if index is None:  # of a fake tensor
            index = torch.cuda.current_device() if torch.cuda.is_available() else 0
        gpu = _C.cuda_device(index)
    except RuntimeError as error:
        return {"fwd": {"why_not": str(error)}}
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    fp32_exact = torch.get_float32_matmul_precision() == "highest"
    call = {**call, **gpu, "deterministic": deterministic, "fp32_exact": fp32_exact}
    return {pass_: _C.plan_cuda(pass_=pass_, **call) for pass_ in ("fwd", "bwd")}


def _address(t: Tensor) -> int:
    try:
        return t.data_ptr()
    except RuntimeError:  # a fake tensor
        return 0


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    causal: bool = False,
    *,
    causal_align: str = "bottom-right",
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool | None = None,
    return_lse: bool = False,
) -> dict[str, Any]:
    """Which kernels :func:`flash_attention` would run for this call, with tile, workspace and reason; or why none does.

    Nothing is computed: the call goes through the shape rules alone, then asks the binary for its plan.

    Returns
    -------
    dict
        ``{"runs": True, "fwd": plan, "bwd": plan}``, each plan a dict with ``kernel``, ``tile``, ``workspace_bytes``,
        ``why``, and ``passed_over`` where a faster kernel of this GPU cannot serve the call; or
        ``{"runs": False, "why_not": text}``.
    """
    try:
        _reject_missing("flash_attention", softcap, alibi_slopes, mask, bias, dropout_p)
        _require_tensors("flash_attention", q, k, v)
        top_left = _top_left("flash_attention", causal_align)
        left, right = _window("flash_attention", window, causal)
        for name, t in (("q", q), ("k", k), ("v", v)):
            if t.layout != torch.strided or t.is_nested or t.is_quantized:
                raise TypeError(f"flash_attention: {name} is not an ordinary dense tensor; convert it")
        q, k, v = _cast_for_autocast(q, k, v)
        fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in (q, k, v)]
        if len({t.device for t in (q, k, v)}) > 1:
            raise ValueError(f"flash_attention: q is on {q.device}, k on {k.device}, v on {v.device}")
        autograd.fwd(*fakes, scale, left, right, top_left, deterministic)
    except (ValueError, TypeError, NotImplementedError) as error:
        return {"runs": False, "why_not": str(error)}
    device = q.device.type
    if device not in ("cpu", "cuda") or (device == "cuda" and not hasattr(_C, "plan_cuda")):
        return {
            "runs": False,
            "why_not": f"flash_attention: no kernel for {device} tensors in this build; "
            "supported_kernels() lists what there is",
        }
    has_heads = q.dim() == 4
    call = {
        "version": 2,
        "dtype": str(q.dtype).removeprefix("torch."),
        "batch": q.shape[0],
        "heads": q.shape[1] if has_heads else 1,
        "heads_kv": k.shape[1] if has_heads else 1,
        "seqlen_q": q.shape[-2],
        "seqlen_k": k.shape[-2],
        "head_dim": q.shape[-1],
        "head_dim_v": v.shape[-1],
        "block_m": 0,
        "block_n": 0,
    }
    if device == "cpu":
        call["threads"] = torch.get_num_threads()
        plans = {pass_: _C.plan(pass_=pass_, **call) for pass_ in ("fwd", "bwd")}
    else:
        call |= {"window_left": left, "window_right": right, "top_left": top_left}
        layouts = [(_address(t), list(t.shape), list(t.stride())) for t in (q, k, v)]
        call["no_bulk_copy"] = _C.bulk_copy_obstacle(layouts, scale)
        plans = _cuda_plans(q.device, deterministic, call)
        for plan in plans.values():
            if "why_not" in plan:
                return {"runs": False, "why_not": f"flash_attention: {plan['why_not']}"}
    copies = [
        name for name, t in (("q", q), ("k", k), ("v", v)) if t.shape[-1] > 1 and t.stride(-1) != 1 and t.numel() > 0
    ]
    return {"runs": True, **plans, "copied_to_contiguous": copies}
