"""The problems that the benchmarks time: one :class:`Cell` is one problem, a grid is a named list of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
DIRECTIONS = ("fwd", "bwd")
FLOP_RULE = (
    "forward 4*B*H*Sq*Sk*D, half of it when causal, and with a window 4*B*H*D for each key that a row sees; "
    "backward 2.5 times the forward"
)


def mask_name(causal: bool, window: int | None) -> str:
    return ("causal" if causal else "full") + ("" if window is None else f" window {window}")


@dataclass(frozen=True)
class Cell:
    """One attention problem.

    Attributes
    ----------
    batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim : int
        Sizes; ``heads_kv`` divides ``heads``.
    causal : bool
        Bottom-right causal mask.
    dtype : {"fp16", "bf16", "fp32", "fp64"}
        Of q, k and v.
    case : str
        A name for problems outside the regular grids; ``"grid"`` for those on them.
    window : int, optional
        Keys visible to the left of a row's diagonal; None: all.
    """

    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    causal: bool
    dtype: str
    case: str = "grid"
    window: int | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def shape(self) -> str:
        """Sizes as people write them; key sizes only where they differ from the query's."""
        heads = f"H{self.heads}" if self.heads == self.heads_kv else f"H{self.heads}:{self.heads_kv}"
        length = f"S{self.seqlen_q}" if self.seqlen_q == self.seqlen_k else f"S{self.seqlen_q}:{self.seqlen_k}"
        return f"B{self.batch} {heads} {length} D{self.head_dim}"

    @property
    def label(self) -> str:
        return f"{self.shape} {mask_name(self.causal, self.window)}"

    @property
    def window_sides(self) -> tuple[int, int | None] | None:
        """As `flash_attention` takes it."""
        return None if self.window is None else (self.window, 0 if self.causal else None)

    def flops(self, direction: str) -> float:
        """Floating-point operations by :data:`FLOP_RULE`."""
        return 4.0 * self.batch * self.heads * self.head_dim * self._pairs() * (1.0 if direction == "fwd" else 2.5)

    def _pairs(self) -> float:
        """Of a row and a key that it sees, in one head."""
        if self.window is None:
            return self.seqlen_q * self.seqlen_k * (0.5 if self.causal else 1.0)
        diagonals = range(self.seqlen_k - self.seqlen_q, self.seqlen_k)
        ends = (min(self.seqlen_k, d + 1) if self.causal else self.seqlen_k for d in diagonals)
        return sum(max(0, end - max(0, d - self.window)) for d, end in zip(diagonals, ends, strict=True))

    def score_bytes(self) -> int:
        """Size of one score matrix, what an implementation that materialises it needs several times over."""
        return self.batch * self.heads * self.seqlen_q * self.seqlen_k * self.torch_dtype.itemsize

    def fields(self) -> dict[str, Any]:
        """Its part of a row of a record."""
        return asdict(self)


@dataclass(frozen=True)
class Grid:
    """A named list of shapes ``(B, H, S, D)`` with what is timed by default.

    Attributes
    ----------
    about : str
        One line for ``--help``.
    shapes : callable
        Device type to shapes.
    dtypes : dict
        Device type to dtype names.
    directions : tuple of str
        Which passes.
    peers : dict
        Device type to peer names; a device that is missing has its usual ones.
    causal : tuple of bool
        Which masks.
    problems : tuple of Cell
        In place of ``shapes`` and ``causal``.
    """

    about: str
    shapes: Callable[[str], list[tuple[int, int, int, int]]]
    dtypes: dict[str, tuple[str, ...]]
    directions: tuple[str, ...] = ("fwd",)
    peers: dict[str, tuple[str, ...]] | None = None
    causal: tuple[bool, ...] = (False, True)
    problems: tuple[Cell, ...] = ()


def _beyond() -> tuple[Cell, ...]:
    """Named as in tables of other projects: 16k tokens unless the name says otherwise."""
    shapes = {
        **{f"hd{d}": (4, 2048 // d, 2048 // d, 4096, d, None) for d in (80, 96, 112, 192)},
        "gqa": (4, 32, 8, 4096, 128, None),
        "window512": (1, 16, 16, 16384, 128, 512),
        "window4096": (1, 16, 16, 16384, 128, 4096),
        "few heads": (1, 8, 8, 4096, 128, None),
        "one head": (1, 1, 1, 16384, 128, None),
        "long": (1, 16, 16, 65536, 128, None),
        "tiny": (1, 16, 16, 1024, 128, None),
    }
    return tuple(
        Cell(batch, heads, heads_kv, s, s, d, causal=True, dtype="bf16", case=name, window=window)
        for name, (batch, heads, heads_kv, s, d, window) in shapes.items()
    )


def _tokens_16k(lengths: Sequence[int]) -> list[tuple[int, int, int, int]]:
    return [(16384 // s, 2048 // d, s, d) for d in (64, 128, 256) for s in lengths]


GRIDS: dict[str, Grid] = {
    "cpu": Grid(
        "B1 H8, S 512 2048 8192, D 64 128, and one head of S 4096: where the CPU engine is judged",
        lambda device: [*((1, 8, s, d) for d in (64, 128) for s in (512, 2048, 8192)), (1, 1, 4096, 64)],
        {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)},
    ),
    "cpu-quick": Grid(
        "B1 H8, S 512 and 2048, D 64: a minute",
        lambda device: [(1, 8, s, 64) for s in (512, 2048)],
        {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)},
    ),
    "naive": Grid(
        "S 2048 against the implementation that materialises the S x S matrix",
        lambda device: [(1, 8, 2048, d) for d in (64, 128)] if device == "cpu" else _tokens_16k([2048]),
        {"cpu": ("fp32", "bf16"), "cuda": ("bf16", "fp32")},
        peers={"cpu": ("naive",), "cuda": ("naive", "cudnn")},
        directions=DIRECTIONS,
    ),
    "h100": Grid(
        "16k tokens, hidden 2048, D 64 128 256, S 512 to 16384: the papers' grid",
        lambda device: _tokens_16k([512, 1024, 2048, 4096, 8192, 16384]),
        {"cpu": ("bf16",), "cuda": ("bf16",)},
        directions=DIRECTIONS,
    ),
    "beyond": Grid(
        "causal: other head dimensions, GQA, windows, few heads, 64k tokens",
        lambda device: [],
        {"cpu": ("bf16",), "cuda": ("bf16",)},
        directions=DIRECTIONS,
        causal=(True,),
        problems=_beyond(),
    ),
    "origin": Grid(
        "the shapes of the original project's tables, one head",
        lambda device: [(1, 1, 256, 64), (2, 1, 512, 64), (4, 1, 1024, 64)],
        {"cpu": ("fp32",), "cuda": ("fp32",)},
        peers={"cpu": ("naive", "v1", "sdpa"), "cuda": ("naive", "v1", "efficient")},
        causal=(False,),
    ),
}


def parse_shape(text: str) -> tuple[int, int, int, int, int, int]:
    """``B,H,S,D`` as (batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim); ``H`` may be ``Hq:Hk``, ``S`` ``Sq:Sk``.

    Raises
    ------
    ValueError
        What is wrong with the text, and the form it should have.
    """
    form = "write B,H,S,D with positive integers, for example 1,8,2048,64; Hq:Hk and Sq:Sk where they differ"
    parts = text.split(",")
    if len(parts) != 4:
        raise ValueError(f"shape {text!r} has {len(parts)} part(s): {form}")
    try:
        pairs = [[int(n) for n in part.split(":")] for part in parts]
    except ValueError:
        raise ValueError(f"shape {text!r} is not made of integers: {form}") from None
    if any(n < 1 for pair in pairs for n in pair) or [len(p) > 1 for p in pairs][::3] != [False, False]:
        raise ValueError(f"shape {text!r}: {form}")
    if any(len(pair) > 2 for pair in pairs):
        raise ValueError(f"shape {text!r}: {form}")
    (batch,), heads, lengths, (head_dim,) = pairs
    if heads[0] % heads[-1] != 0:
        raise ValueError(f"shape {text!r}: {heads[-1]} key/value heads do not divide {heads[0]} query heads")
    return batch, heads[0], heads[-1], lengths[0], lengths[-1], head_dim


def make_cells(
    shapes: Sequence[tuple[int, int, int, int, int, int]],
    dtypes: Sequence[str],
    causal: Sequence[bool],
    case: str = "grid",
) -> list[Cell]:
    """Every shape with every mask and dtype."""
    return [Cell(*shape, causal=c, dtype=d, case=case) for d in dtypes for shape in shapes for c in causal]


def grid_cells(grid: Grid, device: str, dtypes: Sequence[str] | None, causal: Sequence[bool] | None) -> list[Cell]:
    """The cells of a named grid on ``device``, with the grid's own dtypes and masks unless others are given."""
    if grid.problems:
        masks = causal or grid.causal
        return [
            replace(p, dtype=d, causal=c) for d in dtypes or grid.dtypes[device] for p in grid.problems for c in masks
        ]
    shapes = [(b, h, h, s, s, d) for b, h, s, d in grid.shapes(device)]
    return make_cells(shapes, dtypes or grid.dtypes[device], causal or grid.causal)
