"""Draws the figures of the README and of docs/algorithms.md, and prints the latter's table of memory traffic.

    python docs/make_figures.py            # writes docs/figures/*.png
    python docs/make_figures.py --table    # prints the traffic table in Markdown

Nothing here is measured, but for what measured() takes from the records in benchmarks/results/. The traffic functions
are the formulas of the page; tests/test_docs.py counts the same bytes with plain loops and compares.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from math import ceil
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

FIGURES = Path(__file__).resolve().parent / "figures"
ORANGE, BLUE, GREY, INK = "#d1603d", "#1f6f8b", "#8a8a8a", "#222222"
PALE_BLUE, PALE_ORANGE, PAPER = "#cfe3ea", "#f6d9cd", "#f2f2f2"
FP32 = 4  # bytes of a statistic or an accumulator

# ---- bytes that cross the border of the fast memory, for one head with Sq = Sk = n and Dv = d ------------------------


def naive_forward_bytes(n: int, d: int, e: int = 2) -> int:
    """Three kernels: S is written, read for the softmax, written as P, and P is read again."""
    return 4 * e * n * d + 4 * e * n * n


def smallest_forward_bytes(n: int, d: int, e: int = 2) -> int:
    """Q, K and V in, O and lse out, each once: no exact algorithm moves less."""
    return 4 * e * n * d + FP32 * n


def v1_forward_bytes(n: int, d: int, bc: int, e: int = 2, e_o: int = FP32) -> int:
    """Algorithm 1: K and V once; per key block all of Q in, all of O, l and m in and out; O, l and m set up once."""
    per_block = n * (e * d + 2 * e_o * d + 4 * FP32)
    return 2 * e * n * d + ceil(n / bc) * per_block + n * (e_o * d + 2 * FP32)


def v2_forward_bytes(n: int, d: int, br: int, e: int = 2) -> int:
    """Q in, O and lse out once; per row block all of K and V in."""
    return 2 * e * n * d + FP32 * n + ceil(n / br) * 2 * e * n * d


def naive_backward_bytes(n: int, d: int, e: int = 2) -> int:
    """Five kernels over n x n matrices: P, dP and dS are written or read seven times in all."""
    return 8 * e * n * d + 7 * e * n * n


def v2_backward_bytes(n: int, d: int, bc: int, e: int = 2) -> int:
    """Key blocks outside: K, V in and dK, dV out once; per key block Q, dO, lse, delta in and fp32 dQ in and out."""
    delta_pass = n * (2 * e * d + FP32)
    per_block = n * (2 * e * d + 2 * FP32 * d + 2 * FP32)
    set_up_and_round_dq = n * d * (2 * FP32 + e)
    return delta_pass + 4 * e * n * d + ceil(n / bc) * per_block + set_up_and_round_dq


def square_backward_bytes(n: int, d: int, chunk: int, e: int = 2) -> int:
    """The CPU engine's squares: four operands, lse and delta in, three fp32 gradients in and out, for every square."""
    prepare = n * (2 * e * d + 3 * FP32)
    per_square = 4 * e * chunk * d + 2 * FP32 * chunk + 6 * FP32 * chunk * d
    return prepare + ceil(n / chunk) ** 2 * per_square + 3 * n * d * (2 * FP32 + e)


def traffic_table() -> str:
    """The worked numbers of docs/algorithms.md."""
    n = 4096
    lines = [
        "| N = 4096, bf16, one head | d = 64 | FLOP/byte | d = 128 | FLOP/byte |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    rows: list[tuple[str, int, Callable[[int], int]]] = [
        ("naive forward", 4, lambda d: naive_forward_bytes(n, d)),
        ("v1 forward, $B_c$ = 128, O in fp32", 4, lambda d: v1_forward_bytes(n, d, 128)),
        ("v2 forward, $B_r$ = 128", 4, lambda d: v2_forward_bytes(n, d, 128)),
        ("v2 forward, $B_r$ = 512", 4, lambda d: v2_forward_bytes(n, d, 512)),
        ("inputs and outputs once", 4, lambda d: smallest_forward_bytes(n, d)),
        ("naive backward", 10, lambda d: naive_backward_bytes(n, d)),
        ("v2 backward, $B_c$ = 128", 10, lambda d: v2_backward_bytes(n, d, 128)),
        ("squares of the CPU engine", 10, lambda d: square_backward_bytes(n, d, 256 if d <= 64 else 128)),
    ]
    for name, products, count in rows:
        cells = []
        for d in (64, 128):
            moved = count(d)
            cells.append(f"{moved / 1e6:.1f} MB | {products * n * n * d / moved:.0f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- figures ---------------------------------------------------------------------------------------------------------


def save(figure: plt.Figure, name: str) -> None:
    """Write without a date or a version, so that the same script gives the same file."""
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / name, dpi=150, metadata={"Software": None}, bbox_inches="tight", pad_inches=0.12)
    plt.close(figure)
    print(f"wrote {FIGURES / name}")


def bare(axes: Axes, columns: float, rows: float) -> None:
    """A grid of unit cells, row 0 on top, no frame."""
    axes.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def loop_orders() -> None:
    """Which tile follows which, and what a step moves."""
    count = 4
    figure, panels = plt.subplots(1, 2, figsize=(8.6, 5.0))
    for axes, version in zip(panels, (1, 2), strict=True):
        bare(axes, count, count)
        path = [(i, j) for j in range(count) for i in range(count)]
        if version == 2:
            path = [(i, j) for i in range(count) for j in range(count)]
        for step, (i, j) in enumerate(path):
            outer = j if version == 1 else i
            colour = (PALE_ORANGE, PAPER)[outer % 2] if version == 1 else (PALE_BLUE, PAPER)[outer % 2]
            axes.add_patch(Rectangle((j, i), 1, 1, facecolor=colour, edgecolor="white", linewidth=3))
            axes.text(j + 0.5, i + 0.5, str(step + 1), ha="center", va="center", fontsize=14, color=INK)
        for k in range(count):
            axes.text(k + 0.5, -0.14, f"$K_{k + 1}, V_{k + 1}$", ha="center", fontsize=11)
            axes.text(-0.12, k + 0.5, f"$Q_{k + 1}$", ha="right", va="center", fontsize=11)
        colour = ORANGE if version == 1 else BLUE
        arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 2.2, "mutation_scale": 16}
        for k in range(count):
            start, end = ((k + 0.83, 0.15), (k + 0.83, 3.85)) if version == 1 else ((0.15, k + 0.83), (3.85, k + 0.83))
            axes.annotate("", xy=end, xytext=start, arrowprops=arrow)
    panels[0].set_title("version 1: keys outside, rows inside", fontsize=13, pad=34, color=ORANGE)
    panels[1].set_title("version 2: rows outside, keys inside", fontsize=13, pad=34, color=BLUE)
    below = {"ha": "center", "va": "top", "fontsize": 11, "linespacing": 1.5}
    panels[0].text(
        2, 4.15, "stays: $K_j, V_j$\neach step reads $Q_i, O_i, \\ell_i, m_i$\nand writes $O_i, \\ell_i, m_i$", **below
    )
    panels[1].text(
        2,
        4.15,
        "stays: $Q_i, O_i, \\ell_i, m_i$\neach step reads $K_j, V_j$\n$O_i$ and lse are written once per row block",
        **below,
    )
    figure.tight_layout(w_pad=4)
    save(figure, "loop_orders.png")


def online_softmax() -> None:
    """One row over eight blocks: the maximum, the factor, the sum, and both versions' output."""
    blocks, width = 8, 8
    rng = np.random.default_rng(11)
    scores = rng.normal(0.0, 1.0, (blocks, width))
    scores[2, 3], scores[5, 5] = 2.9, 3.9
    values = rng.normal(0.6, 1.0, (blocks, width))
    values[2, 3], values[5, 5] = -0.5, 1.7
    exact_p = np.exp(scores - scores.max())
    exact = float((exact_p * values).sum() / exact_p.sum())

    m, l, o = -np.inf, 0.0, 0.0
    maxima, factors, sums, raw, normalised = [], [], [], [], []
    for s, v in zip(scores, values, strict=True):
        m_new = max(m, s.max())
        factor = float(np.exp(m - m_new))
        p = np.exp(s - m_new)
        l, o, m = l * factor + p.sum(), o * factor + (p * v).sum(), m_new
        for history, x in zip((maxima, factors, sums, raw, normalised), (m, factor, l, o, o / l), strict=True):
            history.append(x)

    x = np.arange(1, blocks + 1)
    figure, panels = plt.subplots(4, 1, figsize=(8.2, 8.4), sharex=True, height_ratios=(1.5, 1, 1, 1.2))
    positions = x[:, None] + (np.arange(width) - (width - 1) / 2) * 0.09
    panels[0].plot(positions.ravel(), scores.ravel(), "o", color=GREY, markersize=4, label="scores $s_{ij}$")
    edges = np.append(x - 0.5, blocks + 0.5)
    panels[0].stairs(maxima, edges, baseline=None, color=ORANGE, linewidth=2.2, label="running maximum $m_i$")
    panels[0].set_ylabel("score")
    panels[1].bar(x, factors, width=0.5, color=[BLUE if f == 1.0 else ORANGE for f in factors])
    panels[1].set(ylabel=r"factor $\alpha$", ylim=(0, 1.25))
    for block, factor in zip(x, factors, strict=True):
        panels[1].text(block, factor + 0.04, f"{factor:.2f}".rstrip("0").rstrip("."), ha="center", fontsize=10)
    panels[2].plot(x, sums, "o-", color=INK, label=r"$\ell_i \leftarrow \alpha \ell_i + \sum_j e^{s_{ij} - m_i}$")
    panels[2].set(ylabel=r"sum $\ell_i$", ylim=(0, None))
    panels[3].plot(x, raw, "o-", color=BLUE, label="$O_i$ of version 2, not normalised")
    panels[3].plot(x, normalised, "s-", color=ORANGE, label="$O_i$ of version 1, normalised at every step")
    panels[3].axhline(exact, color=GREY, linestyle="--", linewidth=1.3, label="softmax of the whole row")
    panels[3].plot(
        blocks + 0.33, raw[-1] / sums[-1], "*", color=BLUE, markersize=13, label=r"version 2 after $O_i / \ell_i$"
    )
    panels[3].set(ylabel="output (one column)", xlabel="key block $j$", xticks=x)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (panels[0], panels[2]):
        axes.legend(frameon=False, fontsize=10, loc="upper left", ncols=2)
    panels[0].set_ylim(scores.min() - 0.4, scores.max() + 2.0)
    panels[2].set_ylim(0, max(sums) * 1.35)
    panels[3].set_ylim(min(0, *raw, *normalised) - 0.5, max(*raw, *normalised) * 1.9)
    panels[3].legend(frameon=False, fontsize=10, loc="upper left", ncols=2)
    figure.align_ylabels(panels)
    figure.tight_layout()
    save(figure, "online_softmax.png")


def mask_tiles() -> None:
    """Tiles that the forward skips, runs without a mask, and runs with one."""
    far, tile = 10**6, 4
    cases = (
        ("causal", 16, 16, far, 0),
        ("window=(5, 2)", 16, 16, 5, 2),
        ("causal, 8 queries, 16 keys", 8, 16, far, 0),
        ("causal, 16 queries, 10 keys", 16, 10, far, 0),
    )
    figure, panels = plt.subplots(1, 4, figsize=(13, 3.9), width_ratios=[sk for _, _, sk, _, _ in cases])
    for axes, (title, sq, sk, left, right) in zip(panels, cases, strict=True):
        shift = sk - sq
        lo, hi = shift - left, shift + right + 1
        begin = [max(0, q + lo) for q in range(sq)]
        end = [min(sk, q + hi) for q in range(sq)]
        bare(axes, sk, 16)
        for m0 in range(0, sq, tile):
            for n0 in range(0, sk, tile):
                m1, n1 = min(m0 + tile, sq), min(n0 + tile, sk)
                visited = max(begin[m0], n0) < min(end[m1 - 1], n1)
                full = begin[m1 - 1] <= n0 and n1 <= end[m0]
                colour = PAPER if not visited else PALE_BLUE if full else PALE_ORANGE
                axes.add_patch(
                    Rectangle((n0, m0), n1 - n0, m1 - m0, facecolor=colour, edgecolor="white", linewidth=2.5)
                )
        for q in range(sq):
            for k in range(begin[q], end[q]):
                axes.plot(k + 0.5, q + 0.5, "s", color=BLUE, markersize=3.2)
            if end[q] <= begin[q]:
                axes.text(sk + 0.3, q + 0.55, "empty", fontsize=8, va="center", color=ORANGE)
        axes.set_title(title, fontsize=11)
    panels[0].set_ylabel("query row", fontsize=10)
    keys = [
        Patch(facecolor=PAPER, label="tile skipped"),
        Patch(facecolor=PALE_ORANGE, label="tile visited, masked"),
        Patch(facecolor=PALE_BLUE, label="tile visited, no mask needed"),
        plt.Line2D([], [], marker="s", linestyle="", color=BLUE, markersize=4, label="visible key"),
    ]
    figure.legend(handles=keys, loc="lower center", ncols=4, frameon=False, fontsize=10.5)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    save(figure, "mask_tiles.png")


def latin_rectangle() -> None:
    """Step numbers of the squares, and the squares of the first steps."""
    colours = ["#1f6f8b", "#d1603d", "#e0b04a", "#6b9a5b", "#8d6a9f", "#8a8a8a"]
    cases = (
        ("4 row chunks, 4 key chunks", 4, 4, False),
        ("two query heads of 3 row chunks,\none key/value head of 4 key chunks", 6, 4, False),
        ("4 row chunks, 4 key chunks, causal", 4, 4, True),
    )
    figure, panels = plt.subplots(1, 3, figsize=(11.4, 5.4))
    for axes, (title, rows, keys, causal) in zip(panels, cases, strict=True):
        steps = max(rows, keys)
        bare(axes, keys, 6)
        for step in range(steps):
            for j in range(keys):
                r = (j + step) % steps
                if r >= rows:
                    continue
                skipped = causal and r < j
                axes.add_patch(
                    Rectangle(
                        (j, r), 1, 1, facecolor=PAPER if skipped else colours[step], edgecolor="white", linewidth=3
                    )
                )
                axes.text(
                    j + 0.5,
                    r + 0.5,
                    "skipped" if skipped else f"step {step}",
                    ha="center",
                    va="center",
                    fontsize=8 if skipped else 10,
                    color=GREY if skipped else "white",
                )
        for j in range(keys):
            axes.text(j + 0.5, -0.12, f"{j}", ha="center", fontsize=10)
        for r in range(rows):
            label = f"{r}" if rows == 4 else f"head {r // 3}, {r % 3}"
            axes.text(-0.12, r + 0.5, label, ha="right", va="center", fontsize=10)
        axes.text(keys / 2, -0.45, "key chunk: its dK, dV", ha="center", fontsize=10, color=INK)
        axes.set_title(title, fontsize=11, pad=42)
    panels[0].text(-0.75, 2, "row chunk: its dQ", rotation=90, ha="center", va="center", fontsize=10)
    figure.tight_layout(w_pad=2)
    save(figure, "latin_rectangle.png")


def hbm_traffic() -> None:
    """Bytes against the sequence length, forward and backward."""
    d, block = 64, 128
    lengths = 2 ** np.arange(8, 16)
    series = (
        (
            ("naive", GREY, naive_forward_bytes),
            (f"v1, $B_c$ = {block}", ORANGE, lambda n, d: v1_forward_bytes(n, d, block)),
            (f"v2, $B_r$ = {block}", BLUE, lambda n, d: v2_forward_bytes(n, d, block)),
            ("inputs and outputs once", INK, smallest_forward_bytes),
        ),
        (
            ("naive", GREY, naive_backward_bytes),
            (f"v2, $B_c$ = {block}", BLUE, lambda n, d: v2_backward_bytes(n, d, block)),
        ),
    )
    figure, panels = plt.subplots(1, 2, figsize=(10.4, 4.3), sharey=True)
    for axes, curves, title in zip(panels, series, ("forward", "backward"), strict=True):
        for name, colour, count in curves:
            style = "--" if colour == INK else "-"
            axes.plot(
                lengths, [count(int(n), d) / 1e6 for n in lengths], style, color=colour, linewidth=2.2, label=name
            )
        axes.set(xscale="log", yscale="log", xlabel="sequence length N", title=f"{title}, one head, d = {d}, bf16")
        axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
        axes.minorticks_off()
        axes.grid(color="#e5e5e5", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=10, loc="upper left")
    panels[0].set_ylabel("MB moved (calculated)")
    figure.tight_layout()
    save(figure, "hbm_traffic.png")


# ---- measured --------------------------------------------------------------------------------------------------------

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
SHOWN = {  # implementation: name, colour
    "flash_attn_ext": ("flash_attn_ext", ORANGE),
    "cudnn": ("cuDNN", BLUE),
    "fa4": ("FlashAttention-4", INK),
    "fa3": ("FlashAttention-3", GREY),
    "fa2": ("FlashAttention-2", "#c9b458"),
}


def measured() -> None:
    dims, lengths = (64, 128, 256), (512, 1024, 2048, 4096, 8192, 16384)
    kinds = [(direction, causal) for direction in ("fwd", "bwd") for causal in (False, True)]
    figure, panels = plt.subplots(len(kinds), len(dims), figsize=(12, 13), sharex=True, sharey="row")
    for row, (direction, causal) in zip(panels, kinds, strict=True):
        record = json.loads((RESULTS / f"bench_h100_{direction}_cuda.json").read_text())["rows"]
        for axes, d in zip(row, dims, strict=True):
            cells = [x for x in record if x["head_dim"] == d and x["causal"] == causal]
            for implementation, (name, colour) in reversed(SHOWN.items()):
                speed = {x["seqlen_q"]: x["tflops"] for x in cells if x["impl"] == implementation}
                if speed:
                    width = 2.6 if implementation == "flash_attn_ext" else 1.6
                    axes.plot(
                        lengths, [speed[n] for n in lengths], "o-", color=colour, linewidth=width, ms=4, label=name
                    )
            words = "forward" if direction == "fwd" else "backward"
            axes.set(xscale="log", title=f"{words}, {'causal' if causal else 'full'}, head dimension {d}")
            axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
            axes.minorticks_off()
            axes.grid(color="#e5e5e5", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set(ylabel="TFLOP/s", ylim=(0, None))
    for axes in panels[-1]:
        axes.set_xlabel("sequence length")
    lines, names = panels[0][0].get_legend_handles_labels()
    figure.legend(lines[::-1], names[::-1], frameon=False, ncols=len(names), loc="upper center")
    figure.tight_layout(rect=(0, 0, 1, 0.975))
    save(figure, "h100.png")


FIGURE_FUNCTIONS = (loop_orders, online_softmax, mask_tiles, latin_rectangle, hbm_traffic, measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the traffic table instead")
    if parser.parse_args().table:
        print(traffic_table())
        return
    for draw in FIGURE_FUNCTIONS:
        draw()


if __name__ == "__main__":
    main()
