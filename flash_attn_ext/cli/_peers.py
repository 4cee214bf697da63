"""The implementations that are timed against each other, each as one function on the same inputs."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import flash_attention, flash_attention_v1, naive_attention
from ._grids import Cell
from ._memory import free_bytes

OURS = "flash_attn_ext"
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Call = Callable[[], object]


class Refused(RuntimeError):
    """An implementation cannot compute this cell; the message is what the tables show."""


@dataclass(frozen=True)
class Implementation:
    """Something that computes attention.

    Attributes
    ----------
    about : str
        What it is, for ``--help`` and the tables.
    devices : tuple of str
        Device types it runs on.
    make : callable
        ``(cell, deterministic) -> attend(q, k, v)``; raises :class:`Refused` where it cannot.
    layout : {"bhsd", "bshd"}
        Order of axes that it takes; its inputs are made contiguous in that order, outside the timing.
    context : callable
        Makes the context manager it runs under.
    module : str, optional
        Package that has to be importable.
    default : bool
        Timed unless ``--peers`` says otherwise.
    """

    about: str
    devices: tuple[str, ...]
    make: Callable[[Cell, bool], Attend]
    layout: str = "bhsd"
    context: Callable[[], AbstractContextManager] = nullcontext
    module: str | None = None
    default: bool = False

    def missing(self) -> str | None:
        """Why it cannot run here at all; None where it can."""
        if self.module is None:
            return None
        try:
            found = importlib.util.find_spec(self.module)
        except (ImportError, ValueError):
            found = None
        return None if found else f"no module {self.module}"


def _ours(cell: Cell, deterministic: bool) -> Attend:
    # None follows PyTorch's global switch, as a user's call does.
    options = {"causal": cell.causal, "window": cell.window_sides, "deterministic": deterministic or None}
    return lambda q, k, v: flash_attention(q, k, v, **options)


def _ours_deterministic(cell: Cell, deterministic: bool) -> Attend:
    return _ours(cell, True)


def _v1(cell: Cell, deterministic: bool) -> Attend:
    if cell.window is not None:
        raise Refused("version 1 has no window")
    return lambda q, k, v: flash_attention_v1(q, k, v, causal=cell.causal)


def _naive(cell: Cell, deterministic: bool) -> Attend:
    return lambda q, k, v: naive_attention(q, k, v, causal=cell.causal, window=cell.window_sides)


def _sdpa(cell: Cell, deterministic: bool) -> Attend:
    if cell.window is not None:
        raise Refused("PyTorch has no window")
    if cell.causal and cell.seqlen_q != cell.seqlen_k:
        raise Refused("is_causal of PyTorch is top-left: another problem where Sq and Sk differ")
    grouped = cell.heads != cell.heads_kv
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=cell.causal, enable_gqa=grouped)


def _fa3(cell: Cell, deterministic: bool) -> Attend:
    from flash_attn_interface import flash_attn_func

    return _flash_attn(flash_attn_func, cell, deterministic, -1)


def _fa4(cell: Cell, deterministic: bool) -> Attend:
    from flash_attn.cute import flash_attn_func

    return _flash_attn(flash_attn_func, cell, deterministic, None)


def _flash_attn(
    function: Callable[..., Tensor | tuple], cell: Cell, deterministic: bool, open_end: int | None
) -> Attend:
    options: dict[str, object] = {"causal": cell.causal, "deterministic": deterministic}
    if cell.window is not None:
        options["window_size"] = (cell.window, 0 if cell.causal else open_end)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = function(q, k, v, **options)
        return result[0] if isinstance(result, tuple) else result  # versions differ in whether they return lse too

    return attend


_compiled_flex: Callable[..., Tensor] | None = None


def _flex(cell: Cell, deterministic: bool) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    global _compiled_flex
    if _compiled_flex is None:
        _compiled_flex = torch.compile(flex_attention, dynamic=False)
    compiled, mask, shift = _compiled_flex, None, cell.seqlen_k - cell.seqlen_q
    if cell.causal or cell.window is not None:
        left = cell.seqlen_k if cell.window is None else cell.window
        right = 0 if cell.causal else cell.seqlen_k
        mask = create_block_mask(
            lambda b, h, i, j: (j <= i + shift + right) & (j >= i + shift - left),
            None,
            None,
            cell.seqlen_q,
            cell.seqlen_k,
            device="cuda",
        )
    grouped = cell.heads != cell.heads_kv
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=grouped)


def _backend(backend: SDPBackend) -> Callable[[], AbstractContextManager]:
    return lambda: sdpa_kernel([backend])


IMPLEMENTATIONS: dict[str, Implementation] = {
    OURS: Implementation("flash_attention of this package", ("cpu", "cuda"), _ours),
    "deterministic": Implementation(
        "flash_attention of this package, deterministic=True", ("cpu", "cuda"), _ours_deterministic
    ),
    "v1": Implementation("flash_attention_v1 of this package, forward only", ("cpu", "cuda"), _v1),
    "sdpa": Implementation(
        "torch SDPA, flash backend", ("cpu",), _sdpa, context=_backend(SDPBackend.FLASH_ATTENTION), default=True
    ),
    "cudnn": Implementation(
        "torch SDPA, cuDNN backend", ("cuda",), _sdpa, context=_backend(SDPBackend.CUDNN_ATTENTION), default=True
    ),
    "fa2": Implementation(
        "torch SDPA, flash backend (FlashAttention-2)",
        ("cuda",),
        _sdpa,
        context=_backend(SDPBackend.FLASH_ATTENTION),
        default=True,
    ),
    "efficient": Implementation(
        "torch SDPA, memory-efficient backend",
        ("cuda",),
        _sdpa,
        context=_backend(SDPBackend.EFFICIENT_ATTENTION),
        default=True,
    ),
    "fa3": Implementation(
        "FlashAttention-3", ("cuda",), _fa3, layout="bshd", module="flash_attn_interface", default=True
    ),
    "fa4": Implementation("FlashAttention-4", ("cuda",), _fa4, layout="bshd", module="flash_attn.cute", default=True),
    "flex": Implementation("torch.compile(flex_attention)", ("cuda",), _flex),
    "naive": Implementation("naive_attention of this package: S x S in memory", ("cpu", "cuda"), _naive),
}
CPU_DEFAULTS = ("sdpa", "naive")


def default_peers(device: str) -> tuple[str, ...]:
    """Peers that are timed on a device when neither the grid nor the user names any."""
    if device == "cpu":
        return CPU_DEFAULTS
    return tuple(name for name, i in IMPLEMENTATIONS.items() if i.default and device in i.devices)


@dataclass
class Inputs:
    """Random normal q, k, v and output gradient of a cell, (B, H, S, D).

    Zeros would run faster on a GPU: they draw less power.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @classmethod
    def make(cls, cell: Cell, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(cell.seqlen_q * 1000 + cell.head_dim)
        query = (cell.batch, cell.heads, cell.seqlen_q, cell.head_dim)
        key = (cell.batch, cell.heads_kv, cell.seqlen_k, cell.head_dim)
        return cls(
            *(
                torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(cell.torch_dtype)
                for shape in (query, key, key, query)
            )
        )


@dataclass
class Prepared:
    """One implementation on one cell, ready to be timed: ``call`` does the work, ``result`` what it computed once."""

    call: Call
    result: tuple[Tensor, ...]


@contextmanager
def _reasons() -> Iterator[None]:
    """Turn the warnings in which SDPA says why a backend refuses into the message of its error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            said = [str(w.message).split(" (Triggered internally")[0] for w in caught]
            said = [text for text in said if not text.endswith("because:") and "disabled" not in text]
            raise Refused("; ".join(said) or "no available kernel") from None


def prepare(name: str, cell: Cell, direction: str, inputs: Inputs, deterministic: bool) -> Prepared:
    """Build the call of an implementation and run it once.

    The forward is one call on tensors that need no gradient. The backward is ``torch.autograd.grad(out, (q, k, v),
    dout, retain_graph=True)`` alone, on a graph that is built here, once.

    Raises
    ------
    Exception
        Whatever the implementation raises, :class:`Refused` with the reason among it.
    """
    implementation = IMPLEMENTATIONS[name]
    if name == "v1" and direction == "bwd":
        raise Refused("version 1 has no backward of its own")
    if name == "naive":
        needed = (4 if direction == "fwd" else 6) * cell.score_bytes()
        free = free_bytes(inputs.q.device)
        if needed > 0.8 * free:
            raise Refused(f"needs about {needed / 2**30:.1f} GiB for S x S matrices, {free / 2**30:.1f} GiB are free")
    tensors = (inputs.q, inputs.k, inputs.v, inputs.dout)
    if implementation.layout == "bshd":
        tensors = tuple(t.transpose(1, 2).contiguous() for t in tensors)
    q, k, v, dout = tensors
    with implementation.context(), _reasons():
        attend = implementation.make(cell, deterministic)
        if direction == "fwd":

            def call() -> object:
                return attend(q, k, v)

            result = (attend(q, k, v),)
        else:
            leaves = tuple(t.detach().requires_grad_() for t in (q, k, v))
            out = attend(*leaves)

            def call() -> object:
                return torch.autograd.grad(out, leaves, dout, retain_graph=True)

            result = call()
    if inputs.q.is_cuda:
        torch.cuda.synchronize(inputs.q.device)  # an error of a kernel shows here and not in somebody else's sample
    if implementation.layout == "bshd":
        result = tuple(t.transpose(1, 2) for t in result)
    return Prepared(call, result)


AGREEMENT = {"fp16": 0.05, "bf16": 0.05, "fp32": 1e-3, "fp64": 1e-6}


def disagreement(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    """Largest difference, relative to the largest entry: a guard against timing a wrong result, not a test."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        scale = b.abs().max().clamp_min(1e-30).double()
        difference = ((a.double() - b.double()).abs().max() / scale).item()
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst
