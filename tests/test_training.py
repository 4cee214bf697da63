"""What training needs around the kernel: gradcheck, autocast, checkpointing, DDP, a loop that learns."""

from __future__ import annotations

import copy
import io
import json

import harness
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flash_attn_ext import flash_attention, flash_attention_v1, naive_attention

pytestmark = pytest.mark.usefixtures("one_thread")
ops = torch.ops.flash_attn_ext

# ---- gradcheck -------------------------------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "scale": {"scale": -0.4},
    "causal": {"causal": True},
    "causal_top_left": {"causal": True, "causal_align": "top-left"},
    "window": {"window": (2, 1)},
    "window_top_left": {"window": (2, 3), "causal_align": "top-left"},
    "window_open_left": {"window": (None, 1)},
    "causal_window": {"causal": True, "window": (3, 0)},
    "nothing_visible": {"window": (0, 0), "causal_align": "top-left"},
    "deterministic": {"causal": True, "deterministic": True},
}
# (B, Hq, Hk, Sq, Sk, D, Dv)
SHAPES = {"mha": (1, 2, 2, 4, 5, 3, 3), "gqa": (2, 4, 2, 5, 3, 2, 4), "mqa": (1, 3, 1, 3, 3, 4, 1)}


def leaves(shape: tuple[int, ...], three_d: bool = False) -> list[Tensor]:
    b, h, hk, sq, sk, d, dv = shape
    shapes = ((b, h, sq, d), (b, hk, sk, d), (b, hk, sk, dv))
    tensors = [harness.randn(*s, seed=i) for i, s in enumerate(shapes)]
    return [(t[:, 0] if three_d else t).clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant: str, shape: str) -> None:
    """Both results, all three tensors, against finite differences in float64; also with one gradient wanted alone."""
    inputs = leaves(SHAPES[shape])

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, lse = flash_attention(q, k, v, **VARIANTS[variant], return_lse=True)
        return out, lse.masked_fill(lse == -float("inf"), 0.0)  # finite differences of -inf are NaN

    assert torch.autograd.gradcheck(function, inputs)
    for wanted in range(3):
        some = [t if i == wanted else t.detach() for i, t in enumerate(inputs)]
        assert torch.autograd.gradcheck(function, some, fast_mode=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck_version_1(shape: str, causal: bool) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention_v1(q, k, v, causal=causal, block_size=(32, 32))

    assert torch.autograd.gradcheck(function, leaves(SHAPES[shape]))
    assert torch.autograd.gradcheck(function, leaves(SHAPES[shape], three_d=True))


def test_gradcheck_across_tiles() -> None:
    """More rows and keys than one chunk of the backward holds."""
    assert torch.autograd.gradcheck(
        lambda *t: flash_attention(*t, causal=True, return_lse=True), leaves((1, 1, 1, 300, 530, 2, 2)), fast_mode=True
    )


# ---- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    q, k, v = (harness.randn(2, 2, 9, 8, dtype=torch.float32, seed=i).requires_grad_() for i in range(3))
    mixed = k.detach().to(dtype).requires_grad_()
    for attention in (flash_attention, flash_attention_v1):
        with torch.autocast("cpu", dtype):
            out = attention(q, mixed, v, causal=True)
        assert out.dtype == dtype
        grads = torch.autograd.grad(out, (q, mixed, v), torch.ones_like(out))  # outside of autocast, as in training
        assert [g.dtype for g in grads] == [torch.float32, dtype, torch.float32]
        cast = [t.detach().to(dtype).requires_grad_() for t in (q, mixed, v)]
        plain = attention(*cast, causal=True)
        assert torch.equal(out, plain)
        expected = torch.autograd.grad(plain, cast, torch.ones_like(plain))
        assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(grads, expected, strict=True))


def test_autocast_leaves_float64_and_disabled_regions_alone() -> None:
    q = harness.randn(1, 1, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert flash_attention(q, q, q).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert flash_attention(q.float(), q.float(), q.float()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="k is Float and q Double"):
        flash_attention(q, q.float(), q)


# ---- checkpointing ---------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A transformer block: what a model puts around attention."""

    def __init__(self, dim: int, heads: int, heads_kv: int, attention=flash_attention) -> None:
        super().__init__()
        self.heads, self.heads_kv, self.attention = heads, heads_kv, attention
        width = dim // heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, (heads + 2 * heads_kv) * width)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1] // self.heads
        heads = self.qkv(self.norm(x)).unflatten(-1, (-1, width)).transpose(1, 2)
        q, k, v = heads.split((self.heads, self.heads_kv, self.heads_kv), 1)
        return x + self.out(self.attention(q, k, v, causal=True).transpose(1, 2).flatten(-2))


def model_and_input(attention=flash_attention) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(*(Block(16, 4, 2, attention) for _ in range(3)))
    return model, harness.randn(2, 11, 16, dtype=torch.float32)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    """Recomputed in the backward: the gradients are the same bits."""
    model, x = model_and_input()
    expected = gradients(model, model(x).square().sum())
    y = x.clone().requires_grad_()
    for block in model:
        y = checkpoint(block, y, use_reentrant=use_reentrant)
    y.square().sum().backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, grad)


class CountForward(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func == ops.fwd.default
        return func(*args, **(kwargs or {}))


def test_selective_checkpointing_saves_the_operator_by_name() -> None:
    """A policy that keeps attention and recomputes the rest: ``fwd`` is one node, and runs once per block."""
    model, x = model_and_input()
    expected = gradients(model, model(x).square().sum())

    def calls(saved: bool) -> int:
        def policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
            keep = saved and op == ops.fwd.default
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        counter = CountForward()  # below the policy's own modes: it sees what really runs
        with counter:
            y = x
            for block in model:
                y = checkpoint(
                    block, y, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
                )
            grads = gradients(model, y.square().sum())
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
        return counter.count

    assert (calls(saved=False), calls(saved=True)) == (6, 3)


def test_models_copy_and_save() -> None:
    model, x = model_and_input()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), model(x))
    del other


def test_hooks_and_inference_mode() -> None:
    q = harness.randn(1, 2, 5, 4).requires_grad_()
    (plain,) = torch.autograd.grad(naive_attention(q, q, q).sum(), q)
    seen: list[Tensor] = []
    out = flash_attention(q, q, q)
    out.register_hook(seen.append)
    q.register_hook(lambda g: g * 2)
    out.sum().backward()
    assert torch.equal(seen[0], torch.ones_like(out))
    torch.testing.assert_close(q.grad, 2 * plain)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert torch.equal(flash_attention(q, q, q), out) and not flash_attention(q, q, q).requires_grad
    assert flash_attention(q.detach(), q.detach(), q.detach()).grad_fn is None


def test_retained_graphs_and_versions_of_saved_tensors() -> None:
    q = harness.randn(1, 1, 5, 4).requires_grad_()
    out = flash_attention(q * 1, q, q)
    grads = [torch.autograd.grad(out.sum(), q, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads)
    out.data_ptr()
    with torch.no_grad():
        out.mul_(2)  # out is saved for the backward: changing it in place may not go unnoticed
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# ---- several processes -----------------------------------------------------------------------------------------------

DDP = """
import json, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import torch.multiprocessing as mp
from test_training import model_and_input

def work(rank, port, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, x = model_and_input()
    model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        model(x[rank : rank + 1] * (step + 1)).square().mean().backward()
        optimizer.step()
    results[rank] = [p.detach().double().sum().item() for p in model.parameters()]
    dist.destroy_process_group()

if __name__ == "__main__":
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("fork")
    results = context.Manager().dict()
    workers = [context.Process(target=work, args=(rank, port, results)) for rank in range(2)]
    for worker in workers: worker.start()
    for worker in workers: worker.join(90)
    assert all(worker.exitcode == 0 for worker in workers), [worker.exitcode for worker in workers]
    print(json.dumps([results[0], results[1]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_ddp_on_gloo_with_two_processes() -> None:
    """Each process has one half of the batch; the parameters are those of one process with the whole batch."""
    first, second = json.loads(harness.run_python(DDP, OMP_NUM_THREADS="1").splitlines()[-1])
    assert first == second
    model, x = model_and_input()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        model(x * (step + 1)).square().mean().backward()
        optimizer.step()
    expected = [p.detach().double().sum().item() for p in model.parameters()]
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)


# ---- a loop that learns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_follows_naive_attention(dtype: torch.dtype) -> None:
    """Copy what stood five positions before: only attention can. Both learn it, on the same curve."""

    def curve(attention) -> list[float]:
        torch.manual_seed(0)
        embed, unembed = nn.Embedding(8, 32), nn.Linear(32, 8)
        model = nn.Sequential(Block(32, 2, 1, attention), Block(32, 2, 2, attention))
        position = nn.Parameter(torch.randn(24, 32))
        parameters = [*embed.parameters(), *unembed.parameters(), *model.parameters(), position]
        optimizer = torch.optim.Adam(parameters, lr=3e-3)
        generator = torch.Generator().manual_seed(1)
        losses = []
        for _ in range(150):
            tokens = torch.randint(8, (16, 24), generator=generator)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits = unembed(model(embed(tokens) + position))
                loss = nn.functional.cross_entropy(logits[:, 5:].flatten(0, 1).float(), tokens[:, :-5].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    ours, naive = curve(flash_attention), curve(naive_attention)
    assert ours[0] > 1.8 and ours[-1] < 0.5, "it did not learn"
    limit = 1e-3 if dtype == torch.float32 else 0.05
    assert max(abs(a - b) for a, b in zip(ours[:100], naive[:100], strict=True)) <= limit
