"""FlashAttention-2's functions by their own names, arguments, order and defaults (flash-attn 2.8).

    from flash_attn_ext import flash_attn_func          # was: from flash_attn import flash_attn_func

Tensors are ``(B, S, H, D)``; ``causal`` and ``window_size`` are aligned bottom-right. The operators see transposed
views, so that nothing is copied on the way in, and ``out`` has the memory layout of ``q`` (contiguous for contiguous or
packed inputs). What differs from flash-attn 2.8:

* They run wherever :func:`flash_attention` runs (the CPU, float32, float64, any head dimension, ``Dv != D``).
* A row that sees no key has ``softmax_lse = -inf``; flash-attn has ``+inf``.
* ``softmax_lse`` is differentiable.
* ``dropout_p``, ``softcap`` and ``alibi_slopes`` other than off raise ``NotImplementedError``, and so do the varlen
  functions and ``flash_attn_with_kvcache``: no kernel has them yet.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from .interface import _reject_missing, flash_attention

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def _refuse(function: str, q: Any, k: Any, v: Any) -> NoReturn:
    """The error for tensors that are not (B, S, H, D), (B, Sk, Hk, D), (B, Sk, Hk, Dv), in the caller's layout."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{function}: {name} is {type(t).__name__}; it has to be a torch.Tensor")
    if not q.dim() == k.dim() == v.dim() == 4:
        rule = "q, k and v have to be (batch, seq, heads, dim)"
    elif k.shape[:3] != v.shape[:3]:
        rule = "k and v have to agree in batch, seq and heads"
    elif q.shape[0] != k.shape[0]:
        rule = f"q has batch {q.shape[0]} and k {k.shape[0]}; they have to be equal"
    elif q.shape[3] != k.shape[3]:
        rule = f"q has head dimension {q.shape[3]} and k {k.shape[3]}; they have to be equal"
    else:
        rule = f"k has {k.shape[2]} heads, which does not divide q's {q.shape[2]} heads"
    raise ValueError(f"{function}: {rule} (q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)})")


def _fits(q: Any, k: Any, v: Any) -> bool:
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return False
    if not q.dim() == k.dim() == v.dim() == 4:
        return False
    (batch, _, heads, dim), (batch_k, _, heads_k, dim_k) = q.shape, k.shape
    fits = batch == batch_k and dim == dim_k and k.shape[:3] == v.shape[:3]
    return fits and heads_k > 0 and heads % heads_k == 0


def _unpack(function: str, name: str, packed: Any, parts: int) -> tuple[Tensor, ...]:
    """The views along axis 2 of ``packed`` (B, S, parts, H, D). Their gradients come back in one stack."""
    if not isinstance(packed, Tensor):
        raise TypeError(f"{function}: {name} is {type(packed).__name__}; it has to be a torch.Tensor")
    if packed.dim() != 5 or packed.shape[2] != parts:
        raise ValueError(f"{function}: {name} is {tuple(packed.shape)}; it has to be (batch, seq, {parts}, heads, dim)")
    return packed.unbind(2)


def _dense(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    if softcap != 0.0 or dropout_p != 0.0 or alibi_slopes is not None:
        _reject_missing(function, softcap, alibi_slopes, None, None, dropout_p)
    if not _fits(q, k, v):
        _refuse(function, q, k, v)
    result = flash_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        softmax_scale,
        causal,
        window=None if window_size == (-1, -1) else window_size,
        deterministic=deterministic or None,  # False is FlashAttention-2's default: PyTorch's global switch decides
        return_lse=return_attn_probs,
    )
    if not return_attn_probs:
        return result.transpose(1, 2)
    out, lse = result
    return out.transpose(1, 2), lse, q.new_empty(0)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    r"""FlashAttention-2's dense attention, :math:`\mathrm{softmax}(\mathrm{scale} \cdot Q K^\top) V`.

    Parameters
    ----------
    q : Tensor
        ``(B, Sq, Hq, D)``; float16, bfloat16, float32, and float64 on the CPU.
    k, v : Tensor
        ``(B, Sk, Hk, D)`` and ``(B, Sk, Hk, Dv)``, dtype of ``q``. ``Hq % Hk == 0``.
    dropout_p, softcap, alibi_slopes
        Only off (0.0, 0.0, None) runs in this build.
    softmax_scale : float, optional
        Default ``1 / sqrt(D)``.
    causal : bool
        Query ``i`` sees keys ``j <= i + Sk - Sq``.
    window_size : (int, int)
        Query ``i`` sees keys in ``[i + Sk - Sq - left, i + Sk - Sq + right]``, both ends included; a negative end is
        open. ``causal`` sets ``right`` to 0.
    deterministic : bool
        True: bit-reproducible gradients. False: as ``torch.are_deterministic_algorithms_enabled()`` says.
    return_attn_probs : bool
        Also return ``softmax_lse`` and ``S_dmask``.

    Returns
    -------
    out : Tensor
        ``(B, Sq, Hq, Dv)``, dtype and memory layout of ``q``.
    softmax_lse : Tensor
        ``(B, Hq, Sq)``, float32 (float64 for float64); natural logarithm. Only with ``return_attn_probs``.
    S_dmask : Tensor
        Only with ``return_attn_probs``. flash-attn 2.8 fills it with the dropout pattern when ``dropout_p > 0`` and
        returns an empty tensor of shape ``(0,)`` otherwise. So it is always that empty tensor here.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes, devices or numbers that do not fit, with the values and the rule.
    NotImplementedError
        An option that no kernel has yet, by its name.
    """
    return _dense(
        "flash_attn_func",
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """:func:`flash_attn_func` with keys and values in one tensor, which is sliced, not copied.

    Parameters
    ----------
    q : Tensor
        ``(B, Sq, Hq, D)``.
    kv : Tensor
        ``(B, Sk, 2, Hk, D)``: keys, then values. Its gradient has the same shape.

    All others, results and errors as in :func:`flash_attn_func`.
    """
    k, v = _unpack("flash_attn_kvpacked_func", "kv", kv, 2)
    return _dense(
        "flash_attn_kvpacked_func",
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """:func:`flash_attn_func` with queries, keys and values in one tensor, which is sliced, not copied.

    Parameters
    ----------
    qkv : Tensor
        ``(B, S, 3, H, D)``: queries, keys, values. Its gradient has the same shape.

    All others, results and errors as in :func:`flash_attn_func`.
    """
    q, k, v = _unpack("flash_attn_qkvpacked_func", "qkv", qkv, 3)
    return _dense(
        "flash_attn_qkvpacked_func",
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def _no_varlen(function: str, dense: str) -> NoReturn:
    raise NotImplementedError(
        f"{function}: packed sequences of different lengths are not implemented yet. Meanwhile call {dense} on one "
        "sequence after another (slice with cu_seqlens, add a batch axis with unsqueeze(0))"
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Attention over packed sequences, ``q (total_q, Hq, D)``, ``k`` and ``v (total_k, Hk, D)``. Not implemented yet.

    Raises
    ------
    NotImplementedError
        Always; use :func:`flash_attn_func` per sequence.
    """
    _no_varlen("flash_attn_varlen_func", "flash_attn_func")


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Attention over packed sequences, ``q (total_q, Hq, D)``, ``kv (total_k, 2, Hk, D)``. Not implemented yet.

    Raises
    ------
    NotImplementedError
        Always; use :func:`flash_attn_kvpacked_func` per sequence.
    """
    _no_varlen("flash_attn_varlen_kvpacked_func", "flash_attn_kvpacked_func")


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Attention over packed sequences, ``qkv (total, 3, H, D)``. Not implemented yet.

    Raises
    ------
    NotImplementedError
        Always; use :func:`flash_attn_qkvpacked_func` per sequence.
    """
    _no_varlen("flash_attn_varlen_qkvpacked_func", "flash_attn_qkvpacked_func")


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Decoding against a cache, ``q (B, Sq, Hq, D)``, ``k_cache`` and ``v_cache (B, S, Hk, D)``. Not implemented yet.

    Raises
    ------
    NotImplementedError
        Always; write the new keys into the cache and use :func:`flash_attn_func` on its filled part.
    """
    raise NotImplementedError(
        "flash_attn_with_kvcache: attention over a key/value cache is not implemented yet. Meanwhile write the new "
        "keys and values into the cache and call "
        "flash_attn_func(q, k_cache[:, :length], v_cache[:, :length], causal=...)"
    )
