"""``python -m flash_attn_ext explain``: the answer of :func:`flash_attn_ext.explain` for a call described by options.

No tensor is allocated: the call is described with fake tensors, so that any size can be asked for.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..interface import explain

_DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
_DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES.values()}
_TITLES = {"fwd": "forward", "bwd": "backward"}


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) not in (3, 4) or min(sizes) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is neither B,H,S,D nor B,S,D, for example 2,8,1024,64")
    return sizes


def _window(text: str) -> tuple[int, int]:
    try:
        left, right = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LEFT,RIGHT, for example 128,0 (-1: open)") from None
    return left, right


def _dtype(text: str) -> torch.dtype:
    if text not in _DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(_DTYPES)}")
    return _DTYPES[text]


def _size(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a size")
    return int(text)


def _scale(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``explain`` on a parser."""
    parser.description = (
        "Which kernels flash_attention runs for a call, forward and backward, with tile, workspace and reason; or why "
        "none does (exit status 1). Nothing is computed or allocated."
    )
    parser.epilog = "example: python -m flash_attn_ext explain --shape 2,8,1024,64 --kv-heads 2 --dtype bf16 --causal"
    call = parser.add_argument_group("the call")
    call.add_argument(
        "--shape", type=_shape, required=True, metavar="B,H,S,D", help="shape of q; B,S,D is a call without a head axis"
    )
    call.add_argument("--kv-heads", type=_size, metavar="H", help="heads of k and v (default: those of q)")
    call.add_argument("--seqlen-k", type=_size, metavar="S", help="positions of k and v (default: those of q)")
    call.add_argument("--head-dim-v", type=_size, metavar="D", help="head dimension of v (default: that of q)")
    call.add_argument("--dtype", type=_dtype, default="bf16", metavar="DTYPE", help="fp16, bf16 (default), fp32, fp64")
    call.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    call.add_argument("--causal", action="store_true", help="a query does not see later keys")
    call.add_argument(
        "--causal-align", choices=("bottom-right", "top-left"), default="bottom-right", help="default: bottom-right"
    )
    call.add_argument(
        "--window", type=_window, metavar="LEFT,RIGHT", help="keys seen on either side; -1 is open (--window=-1,0)"
    )
    call.add_argument("--scale", type=_scale, help="of the scores (default: 1/sqrt(D))")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")


def answer(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`explain` says about the call that the options describe, with the call itself under ``"call"``."""
    *lead, seqlen_q, head_dim = args.shape
    lead_kv = list(lead)
    if args.kv_heads is not None:
        if len(lead) == 1:
            raise argparse.ArgumentTypeError("--kv-heads needs a --shape with heads: B,H,S,D")
        lead_kv[1] = args.kv_heads
    seqlen_k = seqlen_q if args.seqlen_k is None else args.seqlen_k
    head_dim_v = head_dim if args.head_dim_v is None else args.head_dim_v
    with FakeTensorMode():
        q = torch.empty((*lead, seqlen_q, head_dim), dtype=args.dtype, device=args.device)
        k = torch.empty((*lead_kv, seqlen_k, head_dim), dtype=args.dtype, device=args.device)
        v = torch.empty((*lead_kv, seqlen_k, head_dim_v), dtype=args.dtype, device=args.device)
    call = {
        "q": tuple(q.shape),
        "k": tuple(k.shape),
        "v": tuple(v.shape),
        "dtype": str(args.dtype).removeprefix("torch."),
        "device": args.device,
        "causal": args.causal,
        "causal_align": args.causal_align,
        "window": args.window,
        "scale": args.scale,
    }
    options = {name: call[name] for name in ("causal_align", "window")}
    return {"call": call, **explain(q, k, v, args.scale, args.causal, **options)}


def _bytes(count: int) -> str:
    if count < 1024:
        return f"{count} B"
    power = min(int(math.log2(count) // 10), 4)
    return f"{count / 1024**power:.1f} {'KMGT'[power - 1]}iB"


def _value(name: str, value: Any) -> str:
    if name == "workspace_bytes":
        return _bytes(value)
    if name == "tile":
        return " x ".join(map(str, value)) + " (rows x keys)"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def as_text(said: dict[str, Any]) -> str:
    """The answer as lines for a reader."""
    call = said["call"]
    lines = [f"q {call['q']}, k {call['k']}, v {call['v']}, {call['dtype']} on {call['device']}"]
    words = [f"causal ({call['causal_align']})"] if call["causal"] else []
    words += [f"window {call['window']}"] if call["window"] is not None else []
    words += [f"scale {call['scale']:g}"] if call["scale"] is not None else []
    lines += [", ".join(words)] if words else []
    if not said["runs"]:
        return "\n".join([*lines, "", f"does not run: {said['why_not']}"])
    for key in ("fwd", "bwd"):
        plan = said[key]
        lines += ["", f"{_TITLES[key]}: {plan['kernel']}"]
        # What the call or the title says already is left out; a field that a later kernel adds is printed.
        fields = [name for name in plan if name not in ("kernel", "why", "device", "pass", "dtype")]
        fields += ["why"] if "why" in plan else []
        width = max(map(len, fields), default=0)
        lines += [f"  {name:<{width}}  {_value(name, plan[name])}" for name in fields]
    if said.get("copied_to_contiguous"):
        lines += ["", f"copied first, since the last dimension is strided: {', '.join(said['copied_to_contiguous'])}"]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Print the answer. 0: the call runs; 1: no kernel runs it."""
    said = answer(args)
    print(json.dumps(said, indent=2) if args.json else as_text(said))
    return 0 if said["runs"] else 1
