"""torch.compile, torch.export and make_fx: one opaque node, no graph break, no recompilation for a new length."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from flash_attn_ext import flash_attention, flash_attention_v1, flash_attention_v2

pytestmark = pytest.mark.usefixtures("one_thread")
ops = torch.ops.flash_attn_ext
LENGTHS = ((6, 7), (5, 5), (9, 4), (33, 70), (64, 64), (17, 300))  # Sq < Sk, equal, Sq > Sk, several tiles


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def qkv(sq: int, sk: int, *, dv: int = 8, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, sq, 8), (2, 2, sk, 8), (2, 2, sk, dv))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def finite_sum(lse: Tensor) -> Tensor:
    return torch.where(lse.isfinite(), lse, 0.0).sum()


def run(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """Results and gradients."""
    results = function(*inputs)
    results = [results] if isinstance(results, Tensor) else list(results)
    loss = (results[0].float() ** 2).sum() + sum(finite_sum(r) for r in results[1:])
    return [*(r.detach() for r in results), *torch.autograd.grad(loss, inputs)]


def assert_equal(ours: list[Tensor], expected: list[Tensor]) -> None:
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)  # the same kernel ran: not close, equal
        assert a.stride() == b.stride()


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "plain": lambda q, k, v: flash_attention(q, k, v),
    "causal_lse": lambda q, k, v: flash_attention(q, k, v, causal=True, return_lse=True),
    "window_top_left": lambda q, k, v: flash_attention(q, k, v, 0.3, window=(5, 2), causal_align="top-left"),
    "v1": lambda q, k, v: flash_attention_v1(q, k, v, causal=True, block_size=(32, 64)),
    "v2": lambda q, k, v: flash_attention_v2(q, k, v, block_size=(64, 32), return_lse=True),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_fullgraph_forward_and_backward(name: str) -> None:
    function, inputs = FUNCTIONS[name], qkv(6, 7)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    assert_equal(run(compiled, inputs), run(function, inputs))
    assert counter.frame_count == 1
    targets = [node.target for node in counter.graphs[0].graph.nodes if node.op == "call_function"]
    op = ops.fwd_v1.default if name == "v1" else ops.fwd.default
    assert targets.count(op) == 1, "one opaque node is what checkpoint policies and export see"


@pytest.mark.parametrize("name", ["causal_lse", "window_top_left"])
def test_dynamic_lengths_compile_once(name: str) -> None:
    function = FUNCTIONS[name]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    # dynamic=True makes symbols of the default arguments that are floats, and starts the first trace over without them:
    # two calls of the backend, one compiled frame.
    run(compiled, qkv(*LENGTHS[0], dv=5))
    first = counter.frame_count
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in LENGTHS:
            inputs = qkv(*lengths, dv=5)
            assert_equal(run(compiled, inputs), run(function, inputs))
    assert counter.frame_count == first <= 2


def test_marked_length_compiles_once_in_inference() -> None:
    # mark_dynamic raises where a dimension was specialised, so this also says that no length was.
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(FUNCTIONS["causal_lse"], fullgraph=True, backend=counter)
    for sq, sk in LENGTHS:
        inputs = [t.detach() for t in qkv(sq, sk)]
        for t in inputs:
            torch._dynamo.mark_dynamic(t, 2)
        with torch.no_grad():
            for a, b in zip(compiled(*inputs), FUNCTIONS["causal_lse"](*inputs), strict=True):
                assert torch.equal(a, b)
    assert counter.frame_count == 1


def test_automatic_dynamic_needs_two_graphs_at_most() -> None:
    # What a user gets without asking: the second length makes the dimension dynamic, and that is the last compilation.
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(FUNCTIONS["plain"], fullgraph=True, backend=counter)
    with torch.no_grad():
        for n in (5, 6, 9, 12, 40, 77):
            inputs = qkv(n, n)
            assert torch.equal(compiled(*inputs), FUNCTIONS["plain"](*inputs))
    assert counter.frame_count == 2


def test_dynamic_window() -> None:
    # The window is SymInt in the schema: as int, each of its values would be a graph of its own.
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v, left: flash_attention(q, k, v, window=(left, 3)), fullgraph=True, backend=counter, dynamic=True
    )
    inputs = qkv(40, 40)
    compiled(*inputs, 5)
    first = counter.frame_count  # the first trace may start over: see test_dynamic_lengths_compile_once
    for left in (4, 7, 11, 23):
        assert torch.equal(compiled(*inputs, left), flash_attention(*inputs, window=(left, 3)))
    assert counter.frame_count == first <= 2


def test_compiled_autocast() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return flash_attention(q, k, v, causal=True)

    inputs = qkv(6, 7)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert compiled(*inputs).dtype == torch.bfloat16
    assert_equal(run(compiled, inputs), run(function, inputs))


def test_wrong_call_raises_the_contract_under_compile() -> None:
    compiled = torch.compile(lambda q, k, v: flash_attention(q, k, v), fullgraph=True, backend="aot_eager")
    q, _, v = qkv(6, 7)
    with pytest.raises(Exception, match=r"k has head dimension 7 and q 8"):
        compiled(q, torch.zeros(2, 2, 7, 7), v)


class Block(torch.nn.Module):
    """Attention inside something that Inductor has to fuse around."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).transpose(1, 3).unbind(2)
        return torch.nn.functional.gelu(flash_attention(q, k, v, causal=True)).transpose(1, 2).flatten(-2).sin()


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="Inductor needs a compiler")
def test_inductor() -> None:
    torch.manual_seed(0)
    model = Block()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (6, 33):
            x = torch.randn(2, length, 16)
            out = compiled(x)
            ours = torch.autograd.grad(out.square().sum(), list(model.parameters()))
            expected = model(x)
            torch.testing.assert_close(out, expected)
            grads = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
            torch.testing.assert_close(ours, grads, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_inductor_cuda(device: str) -> None:
    inputs = [t.detach().to(device, torch.bfloat16).requires_grad_() for t in qkv(64, 96)]
    compiled = torch.compile(FUNCTIONS["causal_lse"], fullgraph=True, dynamic=True)
    for a, b in zip(compiled(*inputs), FUNCTIONS["causal_lse"](*inputs), strict=True):
        assert torch.equal(a, b)


# ---- export and make_fx ----------------------------------------------------------------------------------------------


class Attention(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return flash_attention(q, k, v, causal=True, return_lse=True)


def _flash_nodes(program: torch.export.ExportedProgram) -> list[Any]:
    return [node.target for node in program.graph.nodes if "flash_attn_ext" in str(node.target)]


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_export_round_trip_with_dynamic_lengths(strict: bool) -> None:
    queries, keys = torch.export.Dim("queries", min=2, max=4096), torch.export.Dim("keys", min=2, max=4096)
    program = torch.export.export(
        Attention(),
        tuple(t.detach() for t in qkv(6, 7)),
        dynamic_shapes=({2: queries}, {2: keys}, {2: keys}),
        strict=strict,
    )
    assert _flash_nodes(program) == [ops.fwd.default]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for lengths in LENGTHS:
        inputs = [t.detach() for t in qkv(*lengths)]
        for a, b in zip(loaded(*inputs), Attention()(*inputs), strict=True):
            assert torch.equal(a, b)


def test_exported_program_trains() -> None:
    # The node in the graph is the operator itself, so it has to be differentiable without our Python around it.
    inputs = qkv(6, 7)
    module = torch.export.export(Attention(), tuple(t.detach() for t in inputs)).module()
    assert_equal(run(module, inputs), run(Attention(), inputs))


def test_run_decompositions_keeps_the_operator() -> None:
    program = torch.export.export(Attention(), tuple(t.detach() for t in qkv(6, 7)))
    assert _flash_nodes(program.run_decompositions()) == [ops.fwd.default]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_forward_and_backward(mode: str) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = flash_attention(*leaves, causal=True)
        return (out, *torch.autograd.grad(out.square().sum(), leaves))

    inputs = [t.detach() for t in qkv(6, 7)]
    graph = make_fx(step, tracing_mode=mode)(*inputs)
    targets = [node.target for node in graph.graph.nodes]
    assert (targets.count(ops.fwd.default), targets.count(ops.bwd.default)) == (1, 1)
    others = inputs if mode != "symbolic" else [t.detach() for t in qkv(9, 4, seed=1)]
    for a, b in zip(graph(*others), step(*others), strict=True):
        assert torch.equal(a, b)
