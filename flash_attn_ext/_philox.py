"""Dropout's random numbers: the specification that every kernel follows bit for bit.

The mask is a pure function of (seed, offset, batch, head, row, column). It knows no tile, no grid and no device, so
CPU, every CUDA kernel and every tile size drop the same entries. One Philox4x32-10 call (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011) yields eight 16-bit halves. They serve the eight entries of a 16x16 tile
that one thread owns in the accumulator fragment of ``mma``/``wgmma``: rows r and r + 8, columns c, c + 1, c + 8, c + 9
with c even. So a kernel needs one call per eight entries and wastes none::

    key     = (seed_lo32, seed_hi32 XOR offset_hi32)
    counter = ((col // 16) * 4 + (col % 8) // 2,  (row // 16) * 8 + row % 8,  batch * Hq + head,  offset_lo32)
    halves  : h[2 * i] = low 16 bits of word i,  h[2 * i + 1] = high 16 bits of word i
    entry   : h[((row >> 3) & 1) * 4 + ((col >> 3) & 1) * 2 + (col & 1)]
    t       = min(round(p * 65536), 65535)         (a tie rounds to the even integer: rint in C)
    keep iff  half >= t;  a kept entry is scaled by 65536 / (65536 - t);  t == 0 is no dropout and draws no state
"""

from __future__ import annotations

import torch

_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # multipliers of words 0 and 2
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # what the two key words grow by each round: golden ratio, sqrt(3) - 1
_U32 = 0xFFFFFFFF

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _mulhilo(m: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of the 64-bit product m * x, in 16-bit steps: the product may not fit a signed int64."""
    low, high = m * (x & 0xFFFF), m * (x >> 16)  # both < 2^48; m * x = low + high * 2^16
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _U32


def philox_4x32_10(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32 with ten rounds, vectorised: four int64 tensors of the counters' broadcast shape.

    ``counter`` is four int64 tensors whose shapes broadcast, ``key`` two integers; all values are in [0, 2^32).
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        (hi0, lo0), (hi1, lo1) = _mulhilo(_M0, c0), _mulhilo(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _U32, (k1 + _W1) & _U32
    return c0, c1, c2, c3


def dropout_threshold(p: float) -> int:
    """``t``: an entry is dropped with probability t / 65536 exactly, a kept one is scaled by 65536 / (65536 - t)."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_threshold: p must be in [0, 1), got {p}")
    return min(round(p * 65536), 65535)


def dropout_keep_mask(
    batch: int, heads: int, rows: int, cols: int, p: float, seed: int, offset: int = 0, *,
    device: torch.device | str | None = None,
) -> torch.Tensor:  # fmt: skip
    """Bool ``(batch, heads, rows, cols)``, True where the entry of P is kept; ``heads`` counts query heads.

    ``seed`` and ``offset`` are 64-bit, a negative one is its two's complement. ValueError for p outside [0, 1).
    """
    threshold = dropout_threshold(p)
    row_tiles, col_tiles = (rows + 15) // 16, (cols + 15) // 16
    # Axes: (batch * head, counter of the row, counter of the column).
    c0 = torch.arange(col_tiles * 4, device=device).view(1, 1, -1)
    c1 = torch.arange(row_tiles * 8, device=device).view(1, -1, 1)
    c2 = torch.arange(batch * heads, device=device).view(-1, 1, 1)
    c3 = torch.full((1, 1, 1), offset & _U32, device=device)
    key = (seed & _U32, ((seed >> 32) ^ (offset >> 32)) & _U32)
    words = philox_4x32_10((c0, c1, c2, c3), key)
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    keep = (halves >= threshold).view(batch, heads, row_tiles, 8, col_tiles, 4, 2, 2, 2)
    # (b, h, row tile, row % 8, col tile, col pair, row bit 3, col bit 3, col bit 0) -> rows and columns in order
    keep = keep.permute(0, 1, 2, 6, 3, 4, 7, 5, 8).reshape(batch, heads, row_tiles * 16, col_tiles * 16)
    return keep[:, :, :rows, :cols]


def draw_philox_state(device: torch.device | str) -> tuple[int, int]:
    """``(seed, offset)`` of one call, from the device's default generator: ``torch.manual_seed`` repeats a run.

    CPU: the seed is one int64 draw, ``torch.randint(0, 2**63 - 1, ())``, and the offset is 0. CUDA: the generator's
    initial seed and its Philox offset, which then advances by 4.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")), 0
    torch.cuda.init()
    generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    offset = generator.get_offset()
    generator.set_offset(offset + 4)  # CUDA generators move in multiples of 4
    return generator.initial_seed(), offset
