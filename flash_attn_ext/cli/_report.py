"""Tables on the terminal (rich where it is installed) and in markdown, and the picture of ratios."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Panel = tuple[str, Sequence[str], Mapping[str, Sequence[float | None]]]
"""Name, labels of the cells, and for each peer our speed over its, None where one of us did not compute the cell."""


@dataclass
class Table:
    """A titled table of text.

    Attributes
    ----------
    title : str
        Printed above it.
    columns : list of str
        Headings; the first column is set flush left, the others flush right.
    rows : list of list of str
        Cells, as many as there are columns.
    notes : list of str
        Printed below it.
    """

    title: str
    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """Append a row."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        self.rows.append(list(cells))

    def markdown(self) -> str:
        """The table as GitHub's markdown."""
        lines = [f"**{self.title}**", ""]
        for cells in (self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows):
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"

    def plain(self) -> str:
        """The table in aligned columns."""
        widths = [max(len(row[i]) for row in (self.columns, *self.rows)) for i in range(len(self.columns))]
        lines = [self.title]
        for cells in (self.columns, *self.rows):
            aligned = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
            lines.append("  ".join(aligned).rstrip())
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)]) + "\n"

    def print(self) -> None:
        """Print it, as wide as it needs to be."""
        try:
            from rich.console import Console
            from rich.table import Column
            from rich.table import Table as RichTable
        except ImportError:
            print(self.plain())
            return
        headings = [Column(c, justify="right" if i else "left", no_wrap=True) for i, c in enumerate(self.columns)]
        table = RichTable(*headings, title=self.title, title_justify="left")
        for row in self.rows:
            table.add_row(*(cell.replace("[", "\\[") for cell in row))
        # Wider than the terminal is better than cells cut short.
        console = Console(width=max(Console().width, Console(width=10_000).measure(table).maximum))
        console.print(table)
        for note in self.notes:
            console.print(f"  {note}", markup=False, highlight=False, soft_wrap=True)
        console.print()


def number(value: float | None, digits: int = 3) -> str:
    """A figure with that many significant digits and no exponent."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    size = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    if size:
        return f"{value:.{max(0, digits - size)}f}"
    leading_zeros = len(f"{abs(value):.12f}"[2:]) - len(f"{abs(value):.12f}"[2:].lstrip("0"))
    return f"{value:.{min(12, digits + leading_zeros)}f}"


def times(ratio: float | None) -> str:
    """A ratio, to two places."""
    return "-" if ratio is None else f"{ratio:.2f}x"


def draw_ratios(path: Path, title: str, panels: Sequence[Panel]) -> str | None:
    """Draw our speed over each peer's, a panel for each direction and dtype.

    Parameters
    ----------
    path : Path
        PNG to write.
    title : str
        Of the whole picture.
    panels : sequence of Panel
        Drawn below each other. A ratio of None becomes a cross.

    Returns
    -------
    str or None
        Why there is no picture; None where it was written.
    """
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed: no picture"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = sum(max(2, len(labels)) for _, labels, _ in panels)
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(9, 1.6 + 1.1 * len(panels) + 0.28 * rows),
        squeeze=False,
        sharex=True,
        gridspec_kw={"height_ratios": [max(2, len(labels)) + 2 for _, labels, _ in panels]},
        layout="constrained",
    )
    colours = ["#1f6f8b", "#d1603d", "#6a994e", "#8a6fb0", "#c9a227", "#5c5c5c", "#b56576"]
    every = [v for _, _, ratios in panels for values in ratios.values() for v in values if v is not None]
    wide = bool(every) and max(every) > 3.0
    peers = list(dict.fromkeys(peer for _, _, ratios in panels for peer in ratios))
    for axis, (name, labels, ratios) in zip(axes[:, 0], panels, strict=True):
        heights = range(len(labels))
        for peer, values in ratios.items():
            colour = colours[peers.index(peer) % len(colours)]
            known = [(v, y) for v, y in zip(values, heights, strict=True) if v is not None]
            axis.plot(*(zip(*known, strict=True) if known else ([], [])), "o", color=colour, label=peer, markersize=5)
            absent = [y for v, y in zip(values, heights, strict=True) if v is None]
            axis.plot([1.0] * len(absent), absent, "x", color=colour, markersize=5)
        axis.axvline(1.0, color="black", linewidth=0.8)
        if wide:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.tick_params(axis="x", labelbottom=True)
        axis.set_yticks(list(heights), labels, fontsize=8)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.set_title(name, loc="left", fontsize=10)
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes[-1, 0].set_xlabel("our speed as a multiple of the peer's (right of 1: ours is faster); cross: not computed")
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return None


def write_markdown(path: Path, heading: str, tables: Iterable[Table], lines: Iterable[str] = ()) -> None:
    """Write tables to a markdown file."""
    parts = [f"# {heading}\n", *(f"{line}  " for line in lines), "", *(table.markdown() for table in tables)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")
