"""When is a result right? One rule for every test, never fitted to what a kernel gives.

With ``ref`` from the oracle (``naive_attention(..., upcast=True)``) and ``naive`` from PyTorch in the tested dtype::

    max |ours - ref|  <=  r * max |naive - ref| + 2 * max |ref + 0.3 - 0.3 - ref|        r = 2 outputs, 3 gradients
    mean|ours - ref|  <=  1.5 * mean|naive - ref| + 2 * mean|ref + 0.3 - 0.3 - ref|
    fp64:  max |ours - ref|  <=  1e-12 * max(1, max|ref|)

``ref + 0.3 - 0.3 - ref`` is computed in the output's dtype: it is what one rounding at the size of the result costs. It
is a sample of that cost and often zero. Over few elements the bound itself stands in for the sample: half an epsilon of
ref.
Infinities and NaNs must stand at the same places.
"""

from __future__ import annotations

from typing import Any

import torch

from flash_attn_ext.reference import naive_attention

FACTORS = {"output": 2.0, "gradient": 3.0}
MEAN_FACTOR = 1.5
FP64_TOLERANCE = 1e-12
FEW_ELEMENTS = 16  # below, a sample of roundings says little of their largest: of four it may well be zero


def rounding(ref: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``|ref + 0.3 - 0.3 - ref|`` in ``dtype``, as fp64; 0.3 itself is rounded to dtype, so that devices agree.

    Of fewer than `FEW_ELEMENTS`, no less than half an epsilon of each.
    """
    exact = ref.double().abs()
    ref, shift = ref.to(dtype), torch.full((), 0.3, dtype=dtype, device=ref.device)
    sampled = (((ref + shift) - shift) - ref).abs().double()
    return sampled if ref.numel() >= FEW_ELEMENTS else sampled.maximum(exact * (torch.finfo(dtype).eps / 2))


def _coordinates(flat_index: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat_index), shape))


def _check_special_values(ours: torch.Tensor, ref: torch.Tensor, name: str) -> None:
    expected = ref.to(ours.dtype)  # a finite oracle value may overflow fp16
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = test(ours) != test(expected)
        if wrong.any():
            where = _coordinates(int(wrong.flatten().int().argmax()), ours.shape)
            raise AssertionError(
                f"{name}: {kind} at different places, {int(wrong.sum())} of {ours.numel()}; first at {where} of shape "
                f"{tuple(ours.shape)}: ours {ours[where].item()!r}, ref {ref[where].item()!r}"
            )


def assert_close_to_oracle(
    ours: torch.Tensor,
    ref: torch.Tensor,
    naive: torch.Tensor | None,
    *,
    kind: str = "output",
    name: str = "result",
    zero_atol: float = 0.0,
) -> None:
    """Raise AssertionError, saying where, how much and how much was allowed, unless ``ours`` follows the rule above.

    Parameters
    ----------
    ours : the tested result, in the output's dtype.
    ref : the oracle, same shape, any floating dtype.
    naive : plain PyTorch in the tested dtype, same shape; may be None for fp64, where it plays no part.
    kind : ``"output"`` (out, lse) or ``"gradient"``.
    zero_atol : allowed error where the whole of ``ref`` is exactly zero. The rule then allows nothing, yet dq with one
        key is ``P (dP - delta)``, zero only by cancellation: pass :func:`cancellation_atol`. No effect otherwise.
    """
    if kind not in FACTORS:
        raise ValueError(f"assert_close_to_oracle: kind must be one of {tuple(FACTORS)}, got {kind!r}")
    fp64 = ours.dtype == torch.float64
    if naive is None and not fp64:
        raise ValueError(f"assert_close_to_oracle: naive is needed for {ours.dtype}")
    for other, x in (("ref", ref), ("naive", naive)):
        assert x is None or x.shape == ours.shape, f"{name}: shape {tuple(ours.shape)}, {other} has {tuple(x.shape)}"
    if naive is not None:
        assert naive.dtype == ours.dtype, f"{name}: dtype {ours.dtype}, naive has {naive.dtype}"
        naive = naive.detach().to(ours.device)
    if ours.numel() == 0:
        return
    ours, ref = ours.detach(), ref.detach().to(ours.device)
    _check_special_values(ours, ref, name)
    finite = torch.isfinite(ref.to(ours.dtype))
    if not finite.any():
        return

    def error(x: torch.Tensor) -> torch.Tensor:
        """|x - ref| in fp64 where both are finite, 0 elsewhere."""
        return torch.where(finite & torch.isfinite(x), (x.double() - ref.double()).abs(), 0.0)

    ours_error, count = error(ours), int(finite.sum())
    if fp64:
        largest = torch.where(finite, ref.double().abs(), 0.0).max().item()
        bounds = {"max": (FP64_TOLERANCE * max(1.0, largest), f"{FP64_TOLERANCE:g} * max(1, {largest:.4g})")}
    else:
        naive_error, atol = error(naive), torch.where(finite, rounding(ref, ours.dtype), 0.0)
        bounds = {}
        for statistic, factor in (("max", FACTORS[kind]), ("mean", MEAN_FACTOR)):
            n, a = (x.max().item() if statistic == "max" else x.sum().item() / count for x in (naive_error, atol))
            bounds[statistic] = (factor * n + 2 * a, f"{factor:g} * {n:.4g} (naive) + 2 * {a:.4g} (rounding)")
        if not torch.where(finite, ref, 0.0).any():
            bounds = {key: (bound + zero_atol, f"{text} + {zero_atol:g}") for key, (bound, text) in bounds.items()}
    measured = {"max": ours_error.max().item(), "mean": ours_error.sum().item() / count}
    failures = [
        f"{statistic} error {measured[statistic]:.4g} > {bound:.4g} allowed = {text}"
        for statistic, (bound, text) in bounds.items()
        if not measured[statistic] <= bound
    ]
    if failures:
        where = _coordinates(int(ours_error.flatten().argmax()), ours.shape)
        values = f"ours {ours[where].item():.8g}, ref {ref[where].item():.8g}"
        if naive is not None:
            values += f", naive {naive[where].item():.8g}"
        over = int((ours_error > bounds["max"][0]).sum())
        raise AssertionError(
            f"{name} ({kind}, {ours.dtype}, shape {tuple(ours.shape)}): {'; '.join(failures)}. Worst at {where}: "
            f"{values}; {over} of {ours.numel()} over the max bound, max|ref| {ref[finite].abs().max().item():.4g}"
        )


def cancellation_atol(
    v: torch.Tensor, dout: torch.Tensor, other: torch.Tensor, *, scale: float, rows: int = 1
) -> float:
    """A-priori bound of what rounding leaves of ``scale * P (dP - delta) other`` where it is zero by cancellation.

    dP and delta are sums of Dv products: each is off by at most ``Dv * 2^-24 * Dv * max|dout| max|v|``. ``other`` is k
    for dq (weights P sum to 1: ``rows=1``), q for dk (``rows`` = Sq times the query heads of a key/value head). For
    fp16 and bf16 delta comes from the rounded output: one more rounding, of the inputs' dtype, of each of its terms.
    """
    length = v.shape[-1]
    unit = length * 2.0**-24 + (0.0 if v.dtype in (torch.float32, torch.float64) else torch.finfo(v.dtype).eps)
    largest = [float(x.detach().abs().max()) if x.numel() else 0.0 for x in (v, dout, other)]
    return 2 * unit * length * largest[0] * largest[1] * largest[2] * abs(scale) * rows


def oracle_in_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor | None = None,
    dlse: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    causal_align: str = "bottom-right",
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    block_rows: int = 1024,
    dtype: torch.dtype = torch.float64,
) -> dict[str, torch.Tensor]:
    """The oracle for sizes whose Sq x Sk matrix does not fit: ``naive_attention`` on blocks of query rows.

    Returns ``out`` and ``lse`` in ``dtype``, and with ``dout`` (shape of out) or ``dlse`` (B, Hq, Sq) also ``dq``,
    ``dk``, ``dv``; 4-D inputs. The geometry of a block's rows is spelled out as a bool mask, written independently of
    ``naive_attention``'s own.
    """
    q, k, v = (x.detach().to(dtype) for x in (q, k, v))
    needs_grad = dout is not None or dlse is not None
    k, v = k.requires_grad_(needs_grad), v.requires_grad_(needs_grad)
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    shift = seqlen_k - seqlen_q if causal_align == "bottom-right" else 0
    left, right = window if window is not None else (None, None)
    right = 0 if causal else right
    columns = torch.arange(seqlen_k, device=q.device)
    results: dict[str, list[torch.Tensor]] = {"out": [], "lse": [], "dq": []}
    for start in range(0, max(seqlen_q, 1), block_rows):
        block = slice(start, min(start + block_rows, seqlen_q))
        distance = columns - (torch.arange(block.start, block.stop, device=q.device).unsqueeze(1) + shift)
        mask = torch.ones_like(distance, dtype=torch.bool)
        if left is not None and left >= 0:
            mask &= distance >= -left
        if right is not None and right >= 0:
            mask &= distance <= right
        rows = q[:, :, block].clone().requires_grad_(needs_grad)
        out, lse = naive_attention(
            rows, k, v, scale, mask=mask, softcap=softcap, return_lse=True, upcast=dtype == torch.float64
        )
        if needs_grad:
            loss = torch.zeros((), dtype=dtype, device=q.device)
            if dout is not None:
                loss = loss + (out * dout[:, :, block].to(dtype)).sum()
            if dlse is not None:
                loss = loss + (torch.where(lse.isfinite(), lse, 0.0) * dlse[:, :, block].to(dtype)).sum()
            loss.backward()
            results["dq"].append(rows.grad)
        results["out"].append(out.detach())
        results["lse"].append(lse.detach())
    oracle: dict[str, Any] = {name: torch.cat(blocks, dim=2) for name, blocks in results.items() if blocks}
    return {**oracle, "dk": k.grad, "dv": v.grad} if needs_grad else oracle
