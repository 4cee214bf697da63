"""One training step of a GPT, forward, backward and optimizer, with our attention and with PyTorch's.

    python benchmarks/train_step.py --device cuda [--json FILE]

The model is that of examples/train_gpt.py, by default of the size of a 350M GPT (24 layers, width 1024), at 16k tokens
a step. One model serves all attentions, which take turns; so weights, optimizer state and inputs are the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_attn_ext.cli import _record
from flash_attn_ext.cli._grids import Cell
from flash_attn_ext.cli._peers import IMPLEMENTATIONS, OURS, Attend
from flash_attn_ext.cli._report import Table, number
from flash_attn_ext.cli._timing import CpuTimer, CudaTimer, measure

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from gpt import GPT, GPTConfig

# Implementations of `python -m flash_attn_ext bench`.
NAMES = {"cpu": (OURS, "sdpa"), "cuda": (OURS, "deterministic", "cudnn", "fa2")}


def integers(text: str) -> list[int]:
    """A comma-separated list of positive integers."""
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: positive integers, comma-separated")
    return numbers


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="bf16 is autocast over fp32 weights")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--head-dims", type=integers, default=[64, 128], metavar="LIST", help="default 64,128")
    lengths = [2048, 4096, 8192, 16384]
    parser.add_argument("--seq-lens", type=integers, default=lengths, metavar="LIST", help="default 2048 to 16384")
    parser.add_argument("--tokens", type=int, default=16384, help="of a step; at least one sequence (default 16384)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    args = parser.parse_args(arguments)
    for head_dim in args.head_dims:
        if args.width % head_dim != 0 or head_dim % 2 != 0:
            parser.error(f"--head-dims {head_dim}: an even divisor of the width, {args.width}")
    if min(args.layers, args.vocabulary, args.tokens, args.rounds) < 1:
        parser.error("--layers, --vocabulary, --tokens and --rounds are positive")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here")
    return args


def steps(args: argparse.Namespace, head_dim: int, seq_len: int) -> tuple[dict[str, Callable[[], object]], int, int]:
    """A training step for each attention; batch and number of parameters."""
    device, batch = torch.device(args.device), max(1, args.tokens // seq_len)
    torch.manual_seed(0)
    with device:
        config = GPTConfig(args.vocabulary, seq_len, args.layers, args.width // head_dim, args.width)
        model = GPT(config, torch.nn.functional.scaled_dot_product_attention)  # each step has its own
        tokens = torch.randint(args.vocabulary, (batch, seq_len + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(attend: Attend) -> None:
        def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
            return attend(q, k, v)

        for block in model.blocks:
            block.attention = attention
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.dtype == "bf16"):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    cell = Cell(batch, config.heads, config.heads, seq_len, seq_len, head_dim, causal=True, dtype=args.dtype)
    calls = {name: partial(step, IMPLEMENTATIONS[name].make(cell, False)) for name in NAMES[args.device]}
    return calls, batch, sum(p.numel() for p in model.parameters())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table.

    Returns
    -------
    int
        0; 1 where a step with our attention fails.
    """
    args = parse(arguments)
    device = torch.device(args.device)
    timer = CudaTimer(device, 0.02, flush=False) if device.type == "cuda" else CpuTimer(0.02)
    names = NAMES[args.device]
    contexts = {name: IMPLEMENTATIONS[name].context for name in names}
    title = f"ms a step, {args.layers} layers, width {args.width}, {args.dtype}, {device.type}"
    table = Table(title, ["head dim", "S", "batch", *names, "best of PyTorch over ours"])
    rows: list[dict[str, Any]] = []
    for head_dim in args.head_dims:
        for seq_len in args.seq_lens:
            calls, batch, parameters = steps(args, head_dim, seq_len)
            found = measure(calls, timer, args.rounds, contexts)
            for name, m in found.items():
                shape = {"head_dim": head_dim, "seq_len": seq_len, "batch": batch, "parameters": parameters}
                times = {"ms": m.ms, "ms_min": m.low, "ms_max": m.high} if m.error is None else {"reason": m.error}
                rows.append(shape | {"impl": name} | times)
                if m.error is not None:
                    table.notes.append(f"D {head_dim}, S {seq_len}, {name}: {m.error}")
            theirs = [m.ms for name, m in found.items() if name not in (OURS, "deterministic") and m.error is None]
            ratio = f"{min(theirs) / found[OURS].ms:.3f}x" if theirs and found[OURS].error is None else ""
            cells = [number(m.ms) if m.error is None else "refused" for m in found.values()]
            table.add(str(head_dim), str(seq_len), str(batch), *cells, ratio)
            del calls
            if device.type == "cuda":
                torch.cuda.empty_cache()
    table.print()
    if args.json:
        options = {"device": args.device, "dtype": args.dtype, "layers": args.layers, "width": args.width}
        options |= {"vocabulary": args.vocabulary, "tokens": args.tokens, "rounds": args.rounds}
        options |= {"head-dims": ",".join(map(str, args.head_dims)), "seq-lens": ",".join(map(str, args.seq_lens))}
        command = " ".join(["python benchmarks/train_step.py", *(f"--{name} {x}" for name, x in options.items())])
        about = _record.provenance(device, command, [args.dtype])
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"provenance": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0 if all("reason" not in row for row in rows if row["impl"] == OURS) else 1


if __name__ == "__main__":
    sys.exit(main())
