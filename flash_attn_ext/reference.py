"""Attention in plain PyTorch: the executable specification, the baseline of the benchmarks and the oracle of the tests.

Read :func:`naive_attention` from top to bottom: it is the definition of every argument of ``flash_attention``. It
materialises the ``Sq x Sk`` matrix, needs no compiled extension, and leaves the backward to autograd.
"""

from __future__ import annotations

import math
from typing import NoReturn

import torch

from ._philox import draw_philox_state, dropout_keep_mask, dropout_threshold, philox_4x32_10

__all__ = ["draw_philox_state", "dropout_keep_mask", "dropout_threshold", "naive_attention", "philox_4x32_10"]

_UPCAST = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float64,
    torch.float64: torch.float64,
}
Window = tuple[int | None, int | None]


def naive_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    causal: bool = False,
    *,
    causal_align: str = "bottom-right",
    window: Window | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool | None = None,
    return_lse: bool = False,
    upcast: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact attention, ``O = dropout(softmax(S)) V``, ``S = scale * Q K^T`` (FlashAttention, arXiv:2205.14135, 2.2).

    Parameters
    ----------
    q : (B, Hq, Sq, D) or (B, Sq, D), fp16, bf16, fp32 or fp64.
    k, v : (B, Hk, Sk, D) and (B, Hk, Sk, Dv), or the same without the head axis; q's dtype. ``Hq % Hk == 0``; query
        head h reads key/value head ``h // (Hq // Hk)``.
    scale : any finite number, default ``1 / sqrt(D)``.
    causal : query i sees the keys ``j <= i + shift``.
    causal_align : ``"bottom-right"``: ``shift = Sk - Sq``; ``"top-left"``: ``shift = 0``. One shift serves causal,
        window and ALiBi.
    window : ``(left, right)``: keys in ``[i + shift - left, i + shift + right]``, ends included; None or a negative
        bound is open; causal sets right to 0.
    softcap : c > 0 replaces S by ``c * tanh(S / c)``; 0 is off.
    alibi_slopes : (Hq,) or (B, Hq), floating: adds ``-slope * |i + shift - j|``.
    mask : bool, True = attend, broadcast to the shape of S: (B, Hq, Sq, Sk), or (B, Sq, Sk) for 3-D inputs.
    bias : floating, the same broadcast; added after scale, softcap and ALiBi. -inf masks. Differentiable.
    dropout_p : in [0, 1), rounded to a multiple of 2^-16; the random numbers are specified in ``_philox.py``.
    deterministic : accepted for symmetry, nothing to do: these PyTorch operations are deterministic, backward included.
    return_lse : also return the log-sum-exp of the scores.
    upcast : the oracle: compute in fp64 (for fp32 and fp64) or fp32 (for fp16 and bf16) *and return out in that dtype*.
        False: every step in q's dtype, as in a plain model; ``torch.softmax`` has fp32 statistics for fp16 and bf16.

    Returns
    -------
    out : (B, Hq, Sq, Dv) or (B, Sq, Dv), q's dtype, or the upcast dtype.
    lse : (B, Hq, Sq) or (B, Sq), only with ``return_lse``: natural logarithm, fp32, or fp64 where computed in fp64. It
        ignores dropout. Both results are differentiable. A query without keys: out 0, lse -inf, zero gradients.

    Raises
    ------
    ValueError, TypeError : shapes, devices and values that do not fit; dtypes and objects of the wrong kind.
    """
    _check_tensors(q, k, v)
    _check_options(scale, causal_align, window, softcap, dropout_p)
    _check_extras(q, k, {"alibi_slopes": alibi_slopes, "mask": mask, "bias": bias})
    three_d = q.dim() == 3
    if three_d:  # one head
        q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
        mask, bias = (x.unsqueeze(1) if x is not None and x.dim() == 3 else x for x in (mask, bias))
    dtype = _UPCAST[q.dtype] if upcast else q.dtype
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    (batch, heads, seqlen_q, head_dim), (_, heads_kv, seqlen_k, _) = q.shape, k.shape
    shift = seqlen_k - seqlen_q if causal_align == "bottom-right" else 0
    if heads != heads_kv:
        k, v = (x.repeat_interleave(heads // heads_kv, dim=1) for x in (k, v))

    # S = scale * Q K^T, then softcap, ALiBi, bias
    scores = (q * (1.0 / math.sqrt(head_dim) if scale is None else scale)) @ k.transpose(-2, -1)
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        i = torch.arange(seqlen_q, device=q.device, dtype=statistics).unsqueeze(1)
        j = torch.arange(seqlen_k, device=q.device, dtype=statistics)
        scores = scores - (alibi_slopes.to(statistics)[..., None, None] * (i + shift - j).abs()).to(dtype)
    left, right = window or (None, None)
    visible = _interval(seqlen_q, seqlen_k, shift, left, 0 if causal else right, q.device)
    if mask is not None:
        visible = mask if visible is None else visible & mask
    if bias is not None:
        bias = bias.to(dtype)
        finite = bias != -math.inf  # taken as a mask, so that a row of -inf is an empty row and not NaN
        visible = finite if visible is None else visible & finite
        scores = scores + bias.masked_fill(~finite, 0.0)

    # Masks. An empty row keeps its scores: softmax and its gradient stay finite, and its results are replaced below.
    empty = None
    if visible is not None:
        empty = ~visible.any(dim=-1, keepdim=True)
        scores = scores.masked_fill(~(visible | empty), -math.inf)

    # P = softmax(S), dropout, O = P V
    probs = torch.softmax(scores, dim=-1)
    threshold = dropout_threshold(dropout_p)
    if threshold > 0:
        seed, offset = draw_philox_state(q.device)
        keep = dropout_keep_mask(batch, heads, seqlen_q, seqlen_k, dropout_p, seed, offset, device=q.device)
        probs = probs.masked_fill(~keep, 0.0) * (65536 / (65536 - threshold))
    out = probs @ v
    if empty is not None:
        out = out.masked_fill(empty, 0.0)
    if not return_lse:
        return out.squeeze(1) if three_d else out
    lse = torch.logsumexp(scores.to(statistics), dim=-1)
    if empty is not None:
        lse = lse.masked_fill(empty.squeeze(-1), -math.inf)
    return (out.squeeze(1), lse.squeeze(1)) if three_d else (out, lse)


def _interval(
    sq: int, sk: int, shift: int, left: int | None, right: int | None, device: torch.device
) -> torch.Tensor | None:
    """Bool (sq, sk): True iff ``i + shift - left <= j <= i + shift + right``; None where that hides nothing."""
    hides_left = left is not None and 0 <= left < sq - 1 + shift  # the last row starts latest
    hides_right = right is not None and 0 <= right < sk - 1 - shift  # the first row ends earliest
    if not (hides_left or hides_right):
        return None
    visible = torch.ones(sq, sk, dtype=torch.bool, device=device)
    if hides_left:
        visible = visible.triu(shift - left)
    return visible.tril(shift + right) if hides_right else visible


def _fail(error: type[Exception], message: str) -> NoReturn:
    raise error(f"naive_attention: {message}")


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            _fail(TypeError, f"{name} is {type(x).__name__}; it has to be a torch.Tensor")
    if q.dtype not in _UPCAST or not q.dtype == k.dtype == v.dtype:
        dtypes = f"got q {q.dtype}, k {k.dtype}, v {v.dtype}: convert with .to(dtype)"
        _fail(TypeError, f"q, k and v must share one dtype out of float16, bfloat16, float32, float64, {dtypes}")
    if not q.device == k.device == v.device:
        _fail(ValueError, f"q is on {q.device}, k on {k.device}, v on {v.device}: move them to one with .to(device)")
    rule = None
    if q.dim() not in (3, 4) or not q.dim() == k.dim() == v.dim():
        rule = "q, k and v must all be (B, S, D) or all (B, H, S, D): add axes with .unsqueeze"
    elif k.shape[:-1] != v.shape[:-1]:
        rule = "k and v must agree in all but the last dimension: slice or expand one of them"
    elif k.shape[0] != q.shape[0]:
        rule = f"k has batch {k.shape[0]}, q has {q.shape[0]}: repeat the smaller one with .expand"
    elif k.shape[-1] != q.shape[-1] or q.shape[-1] == 0:
        rule = f"k has head dimension {k.shape[-1]}, q has {q.shape[-1]}: they must be equal and at least 1"
    elif q.dim() == 4 and (k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0):
        rule = f"k has {k.shape[1]} heads, which does not divide q's {q.shape[1]} heads: is it (B, H, S, D)?"
    if rule is not None:
        _fail(ValueError, f"{rule} (q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)})")


def _check_options(scale: float | None, align: str, window: Window | None, softcap: float, dropout_p: float) -> None:
    if scale is not None and not math.isfinite(scale):
        _fail(ValueError, f"scale must be finite, got {scale}: None gives 1 / sqrt(D)")
    if align not in ("bottom-right", "top-left"):
        _fail(ValueError, f'causal_align must be "bottom-right" or "top-left", got {align!r}')
    if not (math.isfinite(softcap) and softcap >= 0.0):
        _fail(ValueError, f"softcap must be finite and not negative, got {softcap}: 0.0 switches it off")
    if not 0.0 <= dropout_p < 1.0:
        _fail(ValueError, f"dropout_p must be in [0, 1), got {dropout_p}: 0.0 switches it off")
    if window is not None and (not isinstance(window, (tuple, list)) or len(window) != 2):
        _fail(TypeError, f"window must be None or a pair (left, right), got {window!r}")
    if any(type(bound) not in (int, type(None)) for bound in window or ()):
        _fail(TypeError, f"the bounds of window must be int or None, got {window!r}: None or -1 is open")


def _check_extras(q: torch.Tensor, k: torch.Tensor, extras: dict[str, torch.Tensor | None]) -> None:
    for name, x in ((name, x) for name, x in extras.items() if x is not None):
        if not isinstance(x, torch.Tensor):
            _fail(TypeError, f"{name} is {type(x).__name__}; it has to be a torch.Tensor or None")
        if x.device != q.device:
            _fail(ValueError, f"{name} is on {x.device}, q on {q.device}: move it with .to({str(q.device)!r})")
        if name == "mask" and x.dtype != torch.bool:
            _fail(TypeError, f"mask must be bool (True = attend), got {x.dtype}: additive scores go to bias=")
        if name != "mask" and not x.dtype.is_floating_point:
            _fail(TypeError, f"{name} must be floating point, got {x.dtype}: convert it, or pass a bool mask as mask=")
        shape, scores = tuple(x.shape), (*q.shape[:-1], k.shape[-2])
        if name == "alibi_slopes":
            allowed = ((scores[1],), scores[:2]) if q.dim() == 4 else ((1,), (scores[0], 1))
            if shape not in allowed:
                _fail(ValueError, f"alibi_slopes must be {allowed[0]} or {allowed[1]}, got {shape}: one per query head")
        elif len(shape) > len(scores) or any(n not in (1, m) for n, m in zip(shape[::-1], scores[::-1], strict=False)):
            _fail(ValueError, f"{name} {shape} does not broadcast to the scores {scores}: give axes to repeat size 1")
