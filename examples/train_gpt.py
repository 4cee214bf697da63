"""Train a small GPT on the Python standard library, once with each attention, and compare.

The runs share seed, initial weights and batches, so their loss curves must agree: exact attention is a drop-in. What
differs is time and memory, which are measured and tabulated, and drawn against the sequence length.

    python examples/train_gpt.py                # CPU, under four minutes on two cores
    python examples/train_gpt.py --resume       # go on where an interrupted run stopped
    python examples/train_gpt.py --device cuda --dtype bf16 --seq-len 4096 --attention naive,ours,sdpa
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler complains on stderr where a CUDA build finds no GPU

import torch
import torch.nn.functional as F
from corpus import VOCABULARY, Corpus, decode, encode, load_corpus
from gpt import GPT, Attention, GPTConfig
from measure import attention_memory, peak_bytes
from report import Run, draw, largest_difference, print_memory, print_runs, write_json
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from flash_attn_ext import flash_attention, naive_attention

COMPARED_STEPS = 100
LIMIT = 1e-3  # fp32; over the first COMPARED_STEPS steps, before rounding has had time to grow
PROMPT = "    def __init__(self"
VALIDATION_BATCHES = 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def torch_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False) -> Tensor:
    """PyTorch's own attention. Its causal rule is top-left, right only for equal lengths; one query needs no mask."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal and q.shape[-2] > 1)


ATTENTIONS: dict[str, Attention] = {"naive": naive_attention, "ours": flash_attention, "sdpa": torch_attention}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the options; a bad one ends the program with status 2 and says what would be good."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="bf16 is autocast over fp32 weights")
    parser.add_argument("--attention", default="naive,ours", help=f"comma-separated, from {', '.join(ATTENTIONS)}")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/train_gpt"), help="folder for results and checkpoints")
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps; 0 writes none")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoints in --out")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument(
        "--memory-lengths", help="sequence lengths of the memory panel; default 256 to 4096 on cpu, 512 to 8192 on cuda"
    )
    options = parser.parse_args(arguments)

    for name in ("seq_len", "steps", "batch", "layers", "heads", "width"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, must be at least 1")
    for name in ("checkpoint_every", "threads", "seed"):
        if getattr(options, name) < 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, must not be negative")
    if not (options.lr > 0 and math.isfinite(options.lr)):
        parser.error(f"--lr is {options.lr}, must be positive and finite")
    head_dim, rest = divmod(options.width, options.heads)
    if rest:
        below, above = head_dim * options.heads, (head_dim + 1) * options.heads
        nearest = f"{below} or {above}" if below else f"{above}"
        parser.error(
            f"--width {options.width} does not divide into --heads {options.heads}: take a multiple, such as {nearest}"
        )
    if head_dim % 2:
        parser.error(
            f"--width {options.width} over --heads {options.heads} gives a head dimension of {head_dim}; "
            "rotary embedding turns pairs, so it must be even"
        )
    options.attention = [name.strip() for name in options.attention.split(",")]
    unknown = [name for name in options.attention if name not in ATTENTIONS]
    if unknown or len(set(options.attention)) != len(options.attention):
        parser.error(f"--attention {','.join(options.attention)}: name each of {', '.join(ATTENTIONS)} at most once")
    if options.device == "cuda" and not torch.cuda.is_available():
        why = f"is built for CUDA {torch.version.cuda} but finds no GPU" if torch.version.cuda else "is a CPU build"
        parser.error(f"--device cuda: this PyTorch ({torch.__version__}) {why}. Use --device cpu")
    try:
        default = [256 << i for i in range(5)] if options.device == "cpu" else [512 << i for i in range(5)]
        text = options.memory_lengths
        options.memory_lengths = default if text is None else sorted({int(length) for length in text.split(",")})
        if options.memory_lengths[0] < 1:
            raise ValueError
    except ValueError:
        parser.error(f"--memory-lengths {text}: expected positive numbers with commas between, such as 256,512,1024")
    return options


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    warmup = min(20, options.steps // 5 + 1)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, options.steps - warmup)
    return options.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


class Trainer:
    """One training run: model, optimizer and the order of the data, all a function of the options.

    Parameters
    ----------
    name : str
        Key into `ATTENTIONS`.
    options : argparse.Namespace
        As `parse` returns them.
    corpus : Corpus
        Text to train on.
    """

    def __init__(self, name: str, options: argparse.Namespace, corpus: Corpus) -> None:
        self.options, self.corpus, self.run = options, corpus, Run(name)
        self.device = torch.device(options.device)
        torch.manual_seed(options.seed)
        config = GPTConfig(VOCABULARY, options.seq_len, options.layers, options.heads, options.width)
        self.model = GPT(config, ATTENTIONS[name]).to(self.device)  # built on the CPU: the same weights on any device
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.order = torch.Generator().manual_seed(options.seed)
        self.batches = corpus.batches("train", options.batch, options.seq_len, self.order)
        self.folder = options.out / "checkpoints"

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Forward pass on the run's device, in its dtype."""
        dtype = DTYPES[self.options.dtype]
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=dtype is not torch.float32):
            return self.model.loss(tokens.to(self.device), targets.to(self.device))

    def train(self, on_step: Callable[[Run], object]) -> None:
        """Train up to the last step, calling `on_step` after each; then validate and measure memory."""
        every = self.options.checkpoint_every
        for step in range(len(self.run.losses), self.options.steps):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(step, self.options)
            start = time.perf_counter()
            loss = self.loss(*next(self.batches))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            value = loss.item()  # waits for the device, so that the clock sees the whole step
            self.run.seconds.append(time.perf_counter() - start)
            self.run.losses.append(value)
            if not math.isfinite(value):
                fail(f"{self.run.name}: the loss is {value} at step {step + 1}. Try an --lr below {self.options.lr}")
            if every and ((step + 1) % every == 0 or step + 1 == self.options.steps):
                self.save()
            on_step(self.run)
        self.run.validation = self.validate()
        # A step of its own, after training: the profiler that counts memory on the CPU would spoil the timings.
        tokens, targets = next(self.batches)
        self.run.peak = peak_bytes(lambda: self.loss(tokens, targets).backward(), self.device)
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the same held-out windows for every run."""
        generator = torch.Generator().manual_seed(self.options.seed)
        batches = self.corpus.batches("validation", self.options.batch, self.options.seq_len, generator)
        return sum(self.loss(*next(batches)).item() for _ in range(VALIDATION_BATCHES)) / VALIDATION_BATCHES

    def sample(self, prompt: str, count: int) -> str:
        """Let the model continue a prompt."""
        generator = torch.Generator().manual_seed(self.options.seed)
        dtype = DTYPES[self.options.dtype]
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=dtype is not torch.float32):
            return decode(self.model.generate(encode(prompt).long(), count, 0.6, generator))

    def configuration(self) -> dict[str, Any]:
        """All that decides the losses: a checkpoint fits only a run where every entry is the same."""
        names = ("device", "dtype", "seq_len", "steps", "batch", "layers", "heads", "width", "lr", "seed")
        return {name: getattr(self.options, name) for name in names} | {"corpus": self.corpus.fingerprint}

    def save(self) -> None:
        """Write a checkpoint, keep the one before it, delete older ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.run.name}-{len(self.run.losses):06d}.pt"
        state = {
            "configuration": self.configuration(),
            "threads": torch.get_num_threads(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": self.order.get_state(),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "losses": self.run.losses,
            "seconds": self.run.seconds,
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)  # atomic: an interrupted write never looks like a checkpoint
        for old in self.checkpoints()[:-2]:
            old.unlink()

    def checkpoints(self) -> list[Path]:
        """This run's checkpoints, oldest first."""
        return sorted(self.folder.glob(f"{self.run.name}-*.pt"))

    def restore(self) -> str | None:
        """Continue from the newest checkpoint if there is one.

        Returns
        -------
        str or None
            A warning, where the rest may differ in the last bits.
        """
        if not self.checkpoints():
            return None
        path = self.checkpoints()[-1]
        state = torch.load(path, map_location="cpu", weights_only=True)
        mine, theirs = self.configuration(), state["configuration"]
        differences = [f"{key} was {theirs.get(key)}, is {mine[key]}" for key in mine if theirs.get(key) != mine[key]]
        if differences:
            fail(
                f"{path} is a checkpoint of another configuration: {'; '.join(differences)}. "
                "Give the same options as then, another --out, or leave --resume away to start anew"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.order.set_state(state["order"])
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"]:
            torch.cuda.set_rng_state_all(state["rng_cuda"])
        self.run.losses, self.run.seconds = state["losses"], state["seconds"]
        if state["threads"] != torch.get_num_threads() and self.device.type == "cpu":
            now = torch.get_num_threads()
            return f"{path.name} was written with {state['threads']} threads: sums may round differently with {now}"
        return None


def fail(message: str) -> NoReturn:
    """End the program with status 1."""
    raise SystemExit(f"train_gpt.py: {message}")


def train_all(options: argparse.Namespace, corpus: Corpus, console: Console) -> tuple[list[Run], str, str]:
    """Train once with each attention, one after the other.

    Returns
    -------
    tuple
        The runs; text written by the model trained with our attention, or with the last one where ours is not among
        them; and the name of that attention.
    """
    runs, sample, writer = [], "", ""
    columns = (
        TextColumn("{task.description:>6}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        for name in options.attention:
            trainer = Trainer(name, options, corpus)
            if options.resume and (warning := trainer.restore()):
                console.print(f"warning: {warning}", markup=False)
            done = len(trainer.run.losses)
            task = progress.add_task(name, total=options.steps, completed=done, state="")

            def on_step(run: Run, task: Any = task) -> None:
                state = f"loss {run.losses[-1]:.3f}  {run.seconds[-1] * 1e3:4.0f} ms"
                progress.update(task, completed=len(run.losses), state=state)

            try:
                trainer.train(on_step)
            except torch.OutOfMemoryError as error:
                fail(
                    f"{name} attention does not fit in GPU memory at --seq-len {options.seq_len} --batch "
                    f"{options.batch} ({str(error).splitlines()[0]}). Lower them, or leave it out of --attention"
                )
            runs.append(trainer.run)
            if name == "ours" or "ours" not in options.attention:
                count = min(480, options.seq_len - len(PROMPT))
                sample, writer = (trainer.sample(PROMPT, count) if count > 0 else ""), name
            del trainer  # on a GPU the next run's memory must not stand on top of this one's
    return runs, sample, writer


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, compare, report. Returns the exit status: 1 if fp32 loss curves that must agree do not."""
    options = parse(arguments)
    console = Console(highlight=False)
    if options.threads:
        torch.set_num_threads(options.threads)
    started, old = time.perf_counter(), list((options.out / "checkpoints").glob("*.pt"))
    if options.resume and not old:
        fail(f"--resume: no checkpoint in {options.out / 'checkpoints'}. Leave --resume away, or name the run's --out")
    if not options.resume:
        for path in old:  # all at once: after an interruption, `--resume` must not find two runs' checkpoints mixed
            path.unlink()
    options.out.mkdir(parents=True, exist_ok=True)
    device, head_dim = torch.device(options.device), options.width // options.heads

    try:
        corpus = load_corpus()
        # Too long a window shows here, not after the training.
        next(corpus.batches("validation", 1, options.seq_len, torch.Generator()))
    except (RuntimeError, ValueError) as error:
        fail(str(error))
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    console.print(
        f"text: {corpus.files} files of Python {platform.python_version()}'s library, "
        f"{corpus.train.numel() / 1e6:.1f} MB to train on and {corpus.validation.numel() / 1e6:.1f} MB held out\n"
        f"on: {hardware}, {options.dtype}, PyTorch {torch.__version__}"
    )
    runs, sample, writer = train_all(options, corpus, console)

    with console.status("measuring the memory of attention"):
        shape = f"batch 1, {options.heads} heads of {head_dim}, {options.dtype}"
        sizes = (options.memory_lengths, options.heads, head_dim, device, DTYPES[options.dtype])
        memory = {name: attention_memory(ATTENTIONS[name], *sizes) for name in options.attention}

    compared = min(COMPARED_STEPS, options.steps)
    differences = {run.name: largest_difference(runs[0], run, compared) for run in runs[1:]}
    tokens = options.batch * options.seq_len
    print_runs(console, runs, tokens)
    print_memory(console, options.memory_lengths, memory, shape)
    draw(options.out / "train_gpt.png", runs, options.memory_lengths, memory, shape)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    write_json(
        options.out / "train_gpt.json",
        runs,
        tokens,
        settings=settings,
        software={"python": platform.python_version(), "torch": torch.__version__, "hardware": hardware},
        corpus={"files": corpus.files, "train_bytes": corpus.train.numel(), "fingerprint": corpus.fingerprint},
        comparison={"steps": compared, "baseline": runs[0].name, "largest_difference": differences},
        attention_memory={"lengths": options.memory_lengths, "peak_bytes": memory},
        sample=sample,
        total_seconds=time.perf_counter() - started,
    )
    if sample:
        console.rule(f"written by the model trained with {writer} attention")
        console.print(Text(sample), soft_wrap=True)  # wrapped trailing spaces would look like empty lines
        console.rule()
    written = f"{options.out / 'train_gpt.png'} and {options.out / 'train_gpt.json'}"
    console.print(f"wrote {written} after {time.perf_counter() - started:.0f} s", markup=False)

    apart = []
    for name, difference in differences.items():
        exact = options.dtype == "fp32"
        limit = f", limit {LIMIT:g}" if exact else f", no limit in {options.dtype}"
        pair = f"{name} and {runs[0].name}"
        console.print(f"largest difference of loss, {pair}, first {compared} steps: {difference:.2e}{limit}")
        if exact and not difference <= LIMIT:
            apart.append(f"{pair} by {difference:.2e}")
    if apart:
        fail(
            f"the loss curves differ by more than {LIMIT:g} over the first {compared} steps ({', '.join(apart)}): "
            "this is not the same attention"
        )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("train_gpt.py: interrupted. The same options with --resume continue from the last checkpoint")
