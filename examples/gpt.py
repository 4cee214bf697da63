"""A small GPT whose attention is an argument: everything else is the same code whichever kernel it is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (q, k, v, scale=None, causal=False) -> out, all (B, H, S, D); causal is bottom-right: the last query sees every key.
Attention = Callable[..., Tensor]
KeyValue = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the model: `width = heads * head_dim`, and `head_dim` is even because rotary embedding turns pairs."""

    vocabulary: int
    seq_len: int
    layers: int
    heads: int
    width: int

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding (Su et al. 2021, eq. 34) to `x`, (B, S, H, D); `cos`, `sin` are (S, 1, D/2)."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, low * sin + high * cos), dim=-1).to(x.dtype)


class Block(nn.Module):
    """Pre-norm transformer block.

    No layer has a bias. For the keys this is more than taste: softmax ignores a shift common to all keys, so the true
    gradient of a key bias is zero and Adam would blow its rounding noise up to full steps, which differ by kernel.
    """

    def __init__(self, config: GPTConfig, attention: Attention) -> None:
        super().__init__()
        self.config, self.attention = config, attention
        self.norm_attention = nn.LayerNorm(config.width, bias=False)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.project = nn.Linear(config.width, config.width, bias=False)
        self.norm_mlp = nn.LayerNorm(config.width, bias=False)
        self.expand = nn.Linear(config.width, 4 * config.width, bias=False)
        self.contract = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """Map `x`, (B, S, width), to the same shape; also return all keys and values seen, (B, H, S_total, D)."""
        shape = (*x.shape[:2], self.config.heads, self.config.head_dim)
        q, k, v = (part.view(shape) for part in self.qkv(self.norm_attention(x)).chunk(3, dim=-1))
        # (B, S, H, D) -> (B, H, S, D) as views: the kernels take any strides, so no copy is made here.
        q, k, v = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2), v.transpose(1, 2)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        out = self.attention(q, k, v, causal=True)
        x = x + self.project(out.transpose(1, 2).reshape(x.shape))
        x = x + self.contract(F.gelu(self.expand(self.norm_mlp(x)), approximate="tanh"))
        return x, (k, v)


class GPT(nn.Module):
    """Decoder-only transformer with rotary positions.

    Parameters
    ----------
    config : GPTConfig
        Shape of the model.
    attention : callable
        `(q, k, v, causal=True) -> out` on (B, H, S, D).
    """

    def __init__(self, config: GPTConfig, attention: Attention) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        frequency = 10_000.0 ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        angle = torch.outer(torch.arange(config.seq_len), frequency)[:, None, :]
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        # Embeddings as large as what the blocks add: behind a layer norm, small ones would learn in large relative
        # steps, which is slow here and lets two runs that differ by rounding drift apart hundreds of times faster.
        nn.init.normal_(self.embed.weight, std=0.5)
        nn.init.normal_(self.head.weight, std=0.02)
        for name, weight in self.blocks.named_parameters():
            if weight.dim() == 2:
                # Layers that write to the residual stream start smaller, so that its variance does not grow with depth.
                residual = name.endswith(("project.weight", "contract.weight"))
                nn.init.normal_(weight, std=config.width**-0.5 / (math.sqrt(2 * config.layers) if residual else 1.0))

    def forward(self, tokens: Tensor, cache: list[KeyValue | None] | None = None) -> Tensor:
        """Predict the next character at every position.

        Parameters
        ----------
        tokens : Tensor
            (B, S), int64, with `S` plus the cached length at most `config.seq_len`.
        cache : list, optional
            One entry a layer, `None` at first; updated in place, so that only new tokens need be passed.

        Returns
        -------
        Tensor
            Logits, (B, S, vocabulary).
        """
        past_length = cache[0][0].shape[2] if cache is not None and cache[0] is not None else 0
        here = slice(past_length, past_length + tokens.shape[1])
        x, cos, sin = self.embed(tokens), self.cos[here], self.sin[here]
        for index, block in enumerate(self.blocks):
            x, key_value = block(x, cos, sin, None if cache is None else cache[index])
            if cache is not None:
                cache[index] = key_value
        return self.head(self.norm(x))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats a character, fp32, for (B, S) tokens and targets."""
        return F.cross_entropy(self(tokens).float().flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, prompt: Tensor, count: int, temperature: float, generator: torch.Generator) -> Tensor:
        """Continue a prompt.

        Parameters
        ----------
        prompt : Tensor
            1-D codes, int64. Prompt and continuation together fit in `config.seq_len`.
        count : int
            Characters to add.
        temperature : float
            Divides the logits before sampling.
        generator : torch.Generator
            CPU generator.

        Returns
        -------
        Tensor
            Prompt and continuation, 1-D, int64, on the CPU.
        """
        device = self.embed.weight.device
        cache: list[KeyValue | None] = [None] * self.config.layers
        text, new = prompt.cpu(), prompt
        for _ in range(count):
            # After the prompt, one query against all cached keys: the bottom-right causal rule lets it see every one.
            logits = self(new[None].to(device), cache)[0, -1].float().cpu()
            new = torch.multinomial((logits / temperature).softmax(dim=0), 1, generator=generator)
            text = torch.cat((text, new))
        return text
