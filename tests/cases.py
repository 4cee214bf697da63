"""The one list of test cases: a hand-picked core, then seeded pairwise combinations. CPU and CUDA read the same list.

``CASES = CORE + PAIRWISE + VARIANTS``; :func:`select` filters it, :func:`in_dtype` runs all of it in one dtype.
:func:`make_inputs` and :func:`make_kwargs` build a case's arguments as views into larger buffers that are NaN
everywhere else, so that a read outside a tensor shows in the result.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

HEAD_DIMS = (1, 16, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)
LARGE_SEQLENS = ((2048, 2048), (4224, 4224))  # only in the core: one head, few head dimensions
SEQLENS = (
    *((1, 1), (1, 147), (1, 239), (3, 799), (64, 128), (113, 203), (128, 217), (113, 211), (108, 256), (127, 512)),
    *((239, 1), (256, 512), (512, 256), (1023, 1024), (1024, 1023), (1024, 1024)),
    *LARGE_SEQLENS,
)
HEADS = {"mha": (2, 2), "gqa": (4, 2), "gqa3": (6, 2), "mqa": (3, 1)}  # query heads, key/value heads
DTYPES = ("float32", "float16", "bfloat16", "float64")
CUDA_DTYPES = DTYPES[:3]  # the pairwise lists use these alone, so that the CUDA run loses no pair; CPU: in_dtype
LAYOUTS = ("contiguous", "bshd_transposed", "strided", "expanded", "misaligned")
ALIGNMENTS = ("bottom-right", "top-left")
Window = tuple[int | None, int | None]
MASKS: dict[str, tuple[bool, Window | None]] = {  # causal, window
    "full": (False, None),
    "causal": (True, None),
    "window": (False, (37, 21)),
    "window_diagonal": (False, (0, 0)),
    "window_left": (False, (64, None)),
    "window_right": (False, (None, 16)),
    "causal_window": (True, (100, None)),
}
MAX_WORK = 2**30  # of batch * heads * Sq * Sk * D, per case

_SHORT_DTYPE = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}
_SHORT_LAYOUT = {"contiguous": "", "bshd_transposed": "bshd"}


@dataclass(frozen=True)
class Case:
    """One call of ``flash_attention``. The fields after ``layout`` are variants, off by default."""

    seqlen_q: int
    seqlen_k: int
    head_dim: int
    batch: int = 1
    heads: int = 1
    heads_kv: int = 1
    dtype: str = "float32"
    causal: bool = False
    causal_align: str = "bottom-right"
    window: Window | None = None
    layout: str = "contiguous"
    scale: float | None = None
    head_dim_v: int | None = None  # None: head_dim
    softcap: float = 0.0
    alibi: str | None = None  # "head": (Hq,), "batch": (B, Hq)
    mask: str | None = None  # "full": (B, Hq, Sq, Sk), "keys": (B, 1, 1, Sk), "rows": (Sq, 1), hides whole rows
    bias: str | None = None  # "full", "head": (Hq, Sq, Sk), "keys"; shapes in make_kwargs
    dropout: float = 0.0

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def dim_v(self) -> int:
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def work(self) -> int:
        return self.batch * self.heads * self.seqlen_q * self.seqlen_k * max(self.head_dim, self.dim_v)

    @property
    def variants(self) -> frozenset[str]:
        """Names of the variants that are on, out of scale, head_dim_v, softcap, alibi, mask, bias, dropout."""
        names = [field.name for field in fields(self)]
        variants = names[names.index("layout") + 1 :]
        values = {name: getattr(self, name) for name in variants}
        return frozenset(name for name, x in values.items() if x is not None and (name == "scale" or x != 0.0))

    @property
    def id(self) -> str:
        """For pytest: ``bf16-d64-s113x203-b2-h4x2-causal-tl-w100_inf-bshd``; defaults are left out."""
        parts = [_SHORT_DTYPE[self.dtype], f"d{self.head_dim}" + (f"v{self.dim_v}" if self.head_dim_v else "")]
        parts += [f"s{self.seqlen_q}x{self.seqlen_k}", f"b{self.batch}", f"h{self.heads}x{self.heads_kv}"]
        parts += ["causal"] if self.causal else []
        parts += ["tl"] if self.causal_align == "top-left" else []
        if self.window is not None:
            parts.append("w" + "_".join("inf" if bound is None else str(bound) for bound in self.window))
        parts.append(_SHORT_LAYOUT.get(self.layout, self.layout))
        parts += [f"scale{self.scale:g}"] if self.scale is not None else []
        parts += [f"cap{self.softcap:g}"] if self.softcap else []
        parts += [f"{name}_{getattr(self, name)}" for name in ("alibi", "mask", "bias") if getattr(self, name)]
        parts += [f"p{self.dropout:g}"] if self.dropout else []
        return "-".join(part for part in parts if part)


def pairwise(factors: Mapping[str, Sequence[Any]], seed: int) -> list[dict[str, Any]]:
    """Rows in which every pair of values of every two factors occurs at least once: greedy, deterministic.

    Each row starts from the first pair not yet covered; every other factor takes the value that covers most new pairs
    with what the row has so far, ties broken by the seeded generator.
    """
    rng, names = random.Random(seed), list(factors)
    # A dict is used as an ordered set: the order of a set of strings changes from run to run.
    missing = {
        ((a, i), (b, j)): None
        for a, b in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(factors[a])), range(len(factors[b])))
    }
    order = {name: position for position, name in enumerate(names)}

    def new_pairs(row: dict[str, int], name: str, value: int) -> list[tuple[tuple[str, int], tuple[str, int]]]:
        new = (name, value)
        pairs = [(new, old) if order[name] < order[old[0]] else (old, new) for old in row.items()]
        return [pair for pair in pairs if pair in missing]

    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for name in rng.sample(names, len(names)):
            if name not in row:
                gains = [len(new_pairs(row, name, value)) for value in range(len(factors[name]))]
                row[name] = rng.choice([value for value, gain in enumerate(gains) if gain == max(gains)])
        for a, b in itertools.combinations(names, 2):
            missing.pop(((a, row[a]), (b, row[b])), None)
        rows.append({name: factors[name][row[name]] for name in names})
    return rows


def _core() -> Iterator[Case]:
    """What a new kernel is brought up on, simplest first; each line says what breaks without it."""
    yield Case(64, 128, 64)  # whole tiles, no mask
    yield Case(128, 217, 128, batch=2, heads=2, heads_kv=2)  # a ragged tail of keys; strides of batch and head
    yield Case(113, 203, 64, causal=True)  # ragged both ways, diagonal through tiles
    yield Case(113, 203, 64, causal=True, causal_align="top-left")
    yield Case(512, 256, 64, causal=True)  # Sq > Sk: the first 256 rows see nothing
    yield Case(256, 512, 128, causal=True, causal_align="top-left")  # keys that nobody sees
    yield Case(239, 1, 64, causal=True)  # all rows empty but the last
    yield Case(239, 1, 64)  # softmax of one key: gradients of q and k vanish
    yield Case(1, 1, 64)
    yield Case(1, 239, 128, batch=2, heads=4, heads_kv=2)  # decode
    yield Case(3, 799, 96, heads=6, heads_kv=1, causal=True)  # decode with several queries
    yield Case(127, 512, 128, heads=4, heads_kv=2, causal=True, layout="bshd_transposed")
    yield Case(108, 256, 40, batch=2, heads=3, heads_kv=1, layout="strided")
    yield Case(113, 211, 59, heads=2, heads_kv=2, layout="misaligned")  # odd head dimension, no vector loads
    yield Case(128, 217, 111, batch=2, heads=2, heads_kv=1, causal=True, layout="expanded")  # stride 0
    yield Case(113, 203, 1, causal=True)
    yield Case(113, 203, 256, causal=True)
    yield Case(128, 128, 160, heads=2, heads_kv=2)
    yield Case(1023, 1024, 64, causal=True)
    yield Case(1024, 1023, 128, causal=True)
    yield Case(1024, 1024, 192, causal=True)
    yield Case(256, 512, 64, window=(37, 21))
    yield Case(512, 256, 64, window=(37, 21), causal_align="top-left")  # the last rows see nothing
    yield Case(512, 256, 64, window=(0, 0))  # one key or none
    yield Case(1024, 1024, 64, window=(100, 0))  # whole tiles skipped on the left
    yield Case(1024, 1024, 64, window=(128, 128))  # borders on tile borders
    yield Case(2048, 2048, 128, causal=True)
    yield Case(2048, 2048, 64)
    yield Case(4224, 4224, 64, causal=True)
    yield Case(4224, 4224, 128, window=(511, 0))


def _fit(case: Case) -> Case:
    """Shrinks batch, then heads, until the case's work is under MAX_WORK."""
    if case.work > MAX_WORK:
        case = replace(case, batch=1)
    while case.work > MAX_WORK and case.heads > case.heads_kv:
        case = replace(case, heads=case.heads - case.heads_kv)
    return case


def _from_row(row: dict[str, Any]) -> Case:
    row = dict(row)
    (seqlen_q, seqlen_k), (heads, heads_kv) = row.pop("seqlens"), HEADS[row.pop("heads")]
    causal, window = MASKS[row.pop("geometry")]
    return _fit(Case(seqlen_q, seqlen_k, heads=heads, heads_kv=heads_kv, causal=causal, window=window, **row))


BASE_FACTORS: dict[str, Sequence[Any]] = {
    "head_dim": HEAD_DIMS,
    "seqlens": tuple(pair for pair in SEQLENS if pair not in LARGE_SEQLENS),
    "geometry": tuple(MASKS),
    "layout": LAYOUTS,
    "heads": tuple(HEADS),
    "dtype": CUDA_DTYPES,
    "causal_align": ALIGNMENTS,
    "batch": (1, 2),
}
VARIANT_FACTORS: dict[str, Sequence[Any]] = {
    "head_dim": (32, 64, 111, 128),
    "seqlens": ((1, 147), (64, 128), (113, 203), (512, 256)),
    "geometry": tuple(MASKS),
    "dtype": CUDA_DTYPES,
    "heads": ("mha", "gqa", "mqa"),
    "layout": ("contiguous", "bshd_transposed", "expanded"),
    "causal_align": ALIGNMENTS,
    "batch": (1, 2),
    "scale": (None, -0.3, 0.0),
    "softcap": (0.0, 2.5),
    "alibi": (None, "head", "batch"),
    "mask": (None, "full", "keys", "rows"),
    "bias": (None, "full", "head", "keys"),
    "dropout": (0.0, 0.17),
}
_OFF = {"scale": None, "softcap": 0.0, "alibi": None, "mask": None, "bias": None, "dropout": 0.0}


def _single_variants() -> Iterator[Case]:
    """Each variant alone, causal and not: a kernel that has one variant finds its cases here."""
    for name, off in _OFF.items():
        for on, causal in itertools.product((x for x in VARIANT_FACTORS[name] if x != off), (False, True)):
            yield Case(113, 203, 64, batch=2, heads=4, heads_kv=2, causal=causal, **{name: on})
    yield Case(113, 203, 64, batch=2, heads=4, heads_kv=2, head_dim_v=32)
    yield Case(113, 203, 192, heads=2, heads_kv=2, causal=True, head_dim_v=128)


def _unique(cases: Iterable[Case]) -> tuple[Case, ...]:
    return tuple(dict.fromkeys(cases))


CORE = _unique(replace(case, dtype=dtype) for case in _core() for dtype in DTYPES)
PAIRWISE = _unique(_from_row(row) for row in pairwise(BASE_FACTORS, seed=1))
VARIANTS = _unique(
    itertools.chain(
        (replace(case, dtype=dtype) for case in _single_variants() for dtype in DTYPES),
        (_from_row(row) for row in pairwise(VARIANT_FACTORS, seed=2)),
    )
)
CASES = _unique((*CORE, *PAIRWISE, *VARIANTS))


def select(
    cases: Iterable[Case] = CASES,
    *,
    dtypes: Iterable[str] = DTYPES,
    variants: Iterable[str] = (),
    max_work: int | None = None,
) -> list[Case]:
    """The cases of these dtypes whose variants are all among ``variants``, and whose work is at most ``max_work``."""
    dtypes, variants = frozenset(dtypes), frozenset(variants)
    return [
        case
        for case in cases
        if case.dtype in dtypes and case.variants <= variants and (max_work is None or case.work <= max_work)
    ]


def in_dtype(cases: Iterable[Case], dtype: str) -> tuple[Case, ...]:
    """All of ``cases`` in one dtype, each once."""
    return _unique(replace(case, dtype=dtype) for case in cases)


def poisoned(values: torch.Tensor, layout: str = "contiguous", expand: tuple[int, ...] | None = None) -> torch.Tensor:
    """A view that holds ``values`` (B, H, S, D), in a larger buffer that is NaN elsewhere; its last stride is 1.

    - ``contiguous``: strides of a contiguous tensor, 128-byte aligned start.
    - ``bshd_transposed``: memory is (B, S, H, D).
    - ``strided``: gaps after every row, head and batch; where D is a multiple of 8 all rows stay 16-byte aligned.
    - ``expanded``: as contiguous, then expanded with stride 0 to ``expand``.
    - ``misaligned``: contiguous, starting one element after an aligned address.
    """
    batch, heads, seqlen, dim = values.shape
    if layout == "strided":
        buffer = values.new_full((batch + 1, heads + 2, seqlen + 3, dim + 16), float("nan"))
        view = buffer[1:, 1:-1, 1:-2, 8:-8]
    else:
        pad, shift = 1024, 1 if layout == "misaligned" else 0
        flat = values.new_full((values.numel() + 2 * pad,), float("nan"))[pad + shift :][: values.numel()]
        if layout == "bshd_transposed":
            view = flat.view(batch, seqlen, heads, dim).transpose(1, 2)
        else:
            view = flat.view(batch, heads, seqlen, dim)
    view.copy_(values)
    return view.expand(expand) if expand is not None else view


def make_inputs(
    case: Case, device: torch.device | str = "cpu", seed: int = 0, requires_grad: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``q (B, Hq, Sq, D)``, ``k (B, Hk, Sk, D)``, ``v (B, Hk, Sk, Dv)``: standard normal leaves in NaN.

    Values come from a CPU generator, so they are the same on every device, and for every layout but ``expanded``:
    there q repeats one batch entry (one head where B = 1), k and v one head (one batch entry where Hk = 1).
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (case.batch, case.heads, case.seqlen_q, case.head_dim),
        (case.batch, case.heads_kv, case.seqlen_k, case.head_dim),
        (case.batch, case.heads_kv, case.seqlen_k, case.dim_v),
    )
    tensors = []
    for name, shape in zip("qkv", shapes, strict=True):
        expand = shape if case.layout == "expanded" else None
        if expand is not None:
            repeat_batch = case.batch > 1 if name == "q" else case.heads_kv == 1
            shape = (1, *shape[1:]) if repeat_batch else (shape[0], 1, *shape[2:])
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, case.torch_dtype)
        tensors.append(poisoned(values, case.layout, expand).detach().requires_grad_(requires_grad))
    return tensors[0], tensors[1], tensors[2]


def make_kwargs(
    case: Case, device: torch.device | str = "cpu", seed: int = 0, requires_grad: bool = False
) -> dict[str, Any]:
    """The keyword arguments of ``flash_attention`` for a case; ``requires_grad`` concerns bias, its only other leaf."""
    generator = torch.Generator().manual_seed(seed + 1)
    batch, heads, seqlen_q, seqlen_k = case.batch, case.heads, case.seqlen_q, case.seqlen_k
    shapes = {
        "full": (batch, heads, seqlen_q, seqlen_k),
        "head": (heads, seqlen_q, seqlen_k),
        "keys": (batch, 1, 1, seqlen_k),
        "rows": (seqlen_q, 1),
    }
    kwargs: dict[str, Any] = {"scale": case.scale, "causal": case.causal, "causal_align": case.causal_align}
    kwargs |= {"window": case.window, "softcap": case.softcap, "dropout_p": case.dropout}
    if case.alibi is not None:
        slopes = torch.rand((heads,) if case.alibi == "head" else (batch, heads), generator=generator) * 0.3
        kwargs["alibi_slopes"] = slopes.to(device)
    if case.mask is not None:
        kwargs["mask"] = (torch.rand(shapes[case.mask], generator=generator) < 0.7).to(device)
    if case.bias is not None:
        shape = shapes[case.bias]
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, case.torch_dtype)
        bias = poisoned(values.view((1,) * (4 - len(shape)) + shape)).view(shape)
        kwargs["bias"] = bias.detach().requires_grad_(requires_grad)
    return kwargs
