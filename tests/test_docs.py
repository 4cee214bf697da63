"""The documentation names things that exist, its links resolve, its tables are the code's, its examples run."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from math import ceil
from pathlib import Path
from types import ModuleType

import pytest
import torch

import flash_attn_ext

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")], key=lambda page: str(page.relative_to(ROOT))
)
ELSEWHERE = {"build.json", "OLD.json", "torch/library.h"}  # named in the text, not in the repository

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
# A marker may hold brackets, so these links are matched as a whole.
MARKED = re.compile(r"\[`(?P<path>[^`]+)` at `(?P<marker>[^`]+)`\]\((?P<target>[^)\s]+)\)")
FILE = re.compile(r"[\w.-]+(?:/[\w.-]+)*\.(?:py|pyi|cpp|h|cuh|cu|md|toml|png|sh|json|txt)")
FOLDER = re.compile(r"(?:[\w-]+/)+")

pages = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


def prose(page: Path) -> str:
    """The text outside fenced blocks, and without the sample that shows what a marked link looks like."""
    return FENCE.sub("", page.read_text()).replace("``[`path` at `text`](path)``", "")


@lru_cache
def repository() -> frozenset[str]:
    """Every file below the root, build products and hidden folders left out."""
    skipped = {"build", "dist", "runs", "__pycache__"}
    files = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return frozenset(
        str(path) for path in files if not any(part in skipped or part.startswith(".") for part in path.parts[:-1])
    )


def exists(name: str, page: Path) -> bool:
    """From the root, from the page's folder, or the end of exactly one path: `mask.h` for `csrc/core/mask.h`."""
    if name in ELSEWHERE or (ROOT / name).exists() or (page.parent / name).exists():
        return True
    return sum(path.endswith("/" + name) for path in repository()) == 1


def marked_links(page: Path) -> Iterator[tuple[str, str, str]]:
    """(path, marker, target) of every link that quotes a text."""
    for match in MARKED.finditer(prose(page)):
        yield match["path"], match["marker"], match["target"]


def anchor(heading: str) -> str:
    """GitHub's identifier of a heading."""
    kept = "".join(c for c in heading.strip().lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


# ---- links and names -------------------------------------------------------------------------------------------------


@pages
def test_relative_links_resolve(page: Path):
    for match in (*MARKED.finditer(prose(page)), *LINK.finditer(MARKED.sub("", prose(page)))):
        target, _, fragment = match["target"].partition("#")
        if target.startswith(("http://", "https://")):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name}: {match[0]} leads nowhere"
        assert file.is_relative_to(ROOT), f"{page.name}: {match[0]} leaves the repository"
        if fragment:
            lines = FENCE.sub("", file.read_text()).splitlines()
            anchors = {anchor(line.lstrip("#")) for line in lines if line.startswith("#")}
            assert fragment in anchors, f"{page.name}: {match[0]}: {file.name} has no such heading"


@pages
def test_code_links_lead_to_the_file_they_name(page: Path):
    for match in LINK.finditer(MARKED.sub("", prose(page))):
        name, target = match["text"].strip("`"), match["target"].partition("#")[0]
        if FILE.fullmatch(name):
            assert (page.parent / target).resolve().as_posix().endswith("/" + name.lstrip("./")), match[0]
    for path, _, target in marked_links(page):
        assert (page.parent / target).resolve() == ROOT / path, f"{page.name}: `{path}` links to {target}"


@pages
def test_quoted_markers_are_in_their_files(page: Path):
    for path, marker, _ in marked_links(page):
        assert marker in (ROOT / path).read_text(), f"{page.name}: {path} has no text {marker!r}"


@pages
def test_every_link_with_a_marker_was_read(page: Path):
    """A link that is broken over two lines, or has another form, would escape the checks above."""
    assert prose(page).count("` at `") == sum(1 for _ in marked_links(page))


@pages
def test_named_files_and_folders_exist(page: Path):
    text = MARKED.sub(lambda match: f"`{match['path']}`", prose(page))
    for span in re.findall(r"`([^`\n]+)`", text):
        for word in span.split():
            if FILE.fullmatch(word) or (FOLDER.fullmatch(word) and not word.startswith(("runs/", "build/"))):
                assert exists(word, page), f"{page.name}: there is no {word}"


@pages
def test_files_in_diagrams_exist(page: Path):
    """Text and mermaid blocks; commands and code are other tests' business."""
    for block in re.findall(r"^```(?:text|mermaid)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        for name in FILE.findall(block):
            assert exists(name, page), f"{page.name}: there is no {name}"


@pages
def test_make_targets_exist(page: Path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", page.read_text(), re.MULTILINE))
    assert named <= targets, f"{page.name}: the Makefile has no {sorted(named - targets)}"


@pages
def test_named_functions_are_exported(page: Path):
    """`flash_...` in code spans, and what the README's tables of functions list."""
    for name in re.findall(r"`((?:flash_attention|flash_attn|naive_attention|replace_sdpa)\w*)`", prose(page)):
        assert name == "flash_attn_ext" or hasattr(flash_attn_ext, name), f"{page.name}: flash_attn_ext has no {name}"


def test_readme_has_the_blocks_that_are_filled_in():
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- support-table:begin -->") == text.count("<!-- support-table:end -->") == 1
    opened = re.findall(r"<!-- results:([\w-]+) -->", text)
    assert opened == re.findall(r"<!-- /results:([\w-]+) -->", text)
    assert "cpu-speed" in opened


def test_readme_example_runs():
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


@pages
def test_pages_name_no_machine(page: Path):
    """Absolute paths of one machine have no place in the documentation."""
    assert re.search(r"(?<![\w.>-])/(?:work|home|root|tmp|mnt)/", page.read_text()) is None


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_figures_are_shown_and_drawn():
    shown = set()
    for page in PAGES:
        for match in LINK.finditer(prose(page)):
            if match["target"].endswith(".png"):
                file = (page.parent / match["target"]).resolve()
                assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n"), file
                assert len(match["text"].split()) > 3, f"{file.name} needs a description for readers who do not see it"
                shown.add(file)
    assert shown == set((DOCS / "figures").glob("*.png")), "a figure that no page shows, or the reverse"
    script = (DOCS / "make_figures.py").read_text()
    assert {file.name for file in shown} == set(re.findall(r'save\(figure, "([^"]+)"\)', script))


# ---- numbers ---------------------------------------------------------------------------------------------------------


def between(page: Path, name: str) -> str:
    return re.search(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", page.read_text(), re.DOTALL)[1].strip()


def rows_of(table: str) -> list[list[str]]:
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip(" `") for cell in line] for line in lines]


def test_tiles_are_those_of_config_h():
    source = (ROOT / "csrc/cpu/config.h").read_text()
    rows = re.findall(r'\{"(cpu_(?:fwd|bwd)\w+)", (\d+|1 << 30), (\d+), (\d+)(?:, (\d+), (\d+))?', source)
    limits = {"1 << 30": "any"}
    expected = {name: [limits.get(dim, dim), *filter(None, rest)] for name, dim, *rest in rows}
    expected["cpu_fwd_v1"][-2] = "all"
    rows = rows_of(between(DOCS / "kernels/cpu.md", "tiles"))
    written = {name: rest for name, *rest in rows if name.startswith("cpu_")}
    assert written == expected


def test_scratch_is_what_plans_say():
    from flash_attn_ext._binary import _C

    has_bf16 = flash_attn_ext.build_info()["cpu_bf16_gemm"]

    def per_thread(kind: str, dtype: str, dim: int) -> float:
        sizes = {"seqlen_q": 8192, "seqlen_k": 8192, "head_dim": dim, "head_dim_v": dim, "block_m": 0, "block_n": 0}
        heads, few, many = (1, 2, 3) if kind == "square" else (4, 1, 2)
        pass_, version = ("bwd", 2) if kind == "square" else ("fwd", int(kind[1]))
        workspace = [
            _C.plan(pass_=pass_, version=version, dtype=dtype, batch=1, heads=heads, heads_kv=heads, threads=n, **sizes)
            for n in (few, many)
        ]
        return (workspace[1]["workspace_bytes"] - workspace[0]["workspace_bytes"]) / 1024

    header, *rows = rows_of(between(DOCS / "kernels/cpu.md", "scratch"))
    for row in rows:
        for column, cell in zip(header[1:], row[1:], strict=True):
            kind, dtype = column.split()
            if dtype == "fp32" or has_bf16:
                value = per_thread(kind, {"fp32": "float32", "bf16": "bfloat16"}[dtype], int(row[0]))
                assert float(cell) == pytest.approx(value, abs=0.051), (row[0], column)


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("make_figures", DOCS / "make_figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_traffic_table_is_current(figures: ModuleType):
    assert between(DOCS / "algorithms.md", "traffic-table") == figures.traffic_table()


def test_tables_of_records_are_current():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for name, (page, table) in tables.TABLES.items():
        assert between(ROOT / page, name) == table(), f"python benchmarks/tables.py --write ({name})"


def blocks(n: int, size: int) -> list[int]:
    return [min(size, n - at) for at in range(0, n, size)]


@pytest.mark.parametrize(("n", "d", "block", "e"), [(64, 16, 32, 2), (96, 8, 40, 4), (130, 64, 64, 2)])
def test_traffic_formulas_count_what_the_loops_move(figures: ModuleType, n: int, d: int, block: int, e: int):
    """The loops of each algorithm, with every load and store of a block counted where it happens."""
    fp32, other = 4, 24  # `other`: the block size that the formula says has cancelled

    v1 = n * (fp32 * d + 2 * fp32)  # line 2
    for columns in blocks(n, block):
        v1 += 2 * e * columns * d  # line 6
        for rows in blocks(n, other):
            v1 += rows * (e * d + fp32 * d + 2 * fp32)  # line 8
            v1 += rows * (fp32 * d + 2 * fp32)  # lines 12 and 13
    assert figures.v1_forward_bytes(n, d, block, e) == v1

    v2 = 0
    for rows in blocks(n, block):
        v2 += e * rows * d
        for columns in blocks(n, other):
            v2 += 2 * e * columns * d
        v2 += e * rows * d + fp32 * rows
    assert figures.v2_forward_bytes(n, d, block, e) == v2

    backward = n * (2 * e * d + fp32)  # delta
    backward += fp32 * n * d  # dQ = 0
    for columns in blocks(n, block):
        backward += 2 * e * columns * d
        for rows in blocks(n, other):
            backward += rows * (2 * e * d + 2 * fp32)  # Q, dO, lse, delta
            backward += 2 * fp32 * rows * d  # dQ
        backward += 2 * e * columns * d
    backward += (fp32 + e) * n * d  # dQ rounded
    assert figures.v2_backward_bytes(n, d, block, e) == backward

    if n % block == 0:
        squares = n * (2 * e * d + 3 * fp32) + 3 * fp32 * n * d
        for rows in blocks(n, block):
            for columns in blocks(n, block):
                squares += 2 * e * (rows + columns) * d + 2 * fp32 * rows
                squares += 2 * fp32 * (rows + 2 * columns) * d
        squares += 3 * (fp32 + e) * n * d
        assert figures.square_backward_bytes(n, d, block, e) == squares

    assert figures.naive_forward_bytes(n, d, e) == e * (2 * n * d + n * n) + 2 * e * n * n + e * (n * n + 2 * n * d)
    assert ceil(n / block) == len(blocks(n, block))


def test_help_lists_the_readme_targets():
    """`make help` runs where make is installed, and names both commands of the README."""
    try:
        listed = subprocess.run(["make", "-s", "-C", str(ROOT), "help"], capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("make is not installed")
    assert listed.returncode == 0, listed.stderr
    assert {"demo", "test"} <= {line.split()[0] for line in listed.stdout.splitlines() if line}
