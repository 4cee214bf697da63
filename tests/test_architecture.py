"""Rules of the source tree: who includes whom, where a number may stand, what no file may contain. ``make lint`` runs
this file too, so it needs neither the compiled package nor a GPU."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "flash_attn_ext"
EXTENSIONS = {".h", ".cpp", ".cu", ".cuh"}
FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in EXTENSIONS)
HEADERS = [path for path in FILES if path.suffix in {".h", ".cuh"}]

TORCH = ("ATen/", "c10/", "torch/")
CUDA = ("cuda", "cublas", "cooperative_groups", "mma.h", "nv/")
# folder: (folders of csrc/ it may include, prefixes of outside headers beside the standard library's)
RULES: dict[str, tuple[set[str], tuple[str, ...]]] = {
    "core": ({"core"}, ()),
    "cpu": ({"core", "cpu"}, ("ATen/Parallel.h", "ATen/native/CPUBlas.h", "c10/util/", "immintrin.h")),
    "cuda": ({"core", "cuda"}, CUDA),
    "ops": ({"core", "cpu", "cuda", "ops"}, TORCH),
    "library.cpp": (set(), ("torch/library.h",)),
    "bindings.cpp": ({"core", "cpu", "cuda"}, ("pybind11/",)),
}
# Below csrc/cuda/ arrows point one way too: instances -> sm80 | sm90 -> shared -> tile -> ptx. Files of csrc/cuda/
# itself know none of these: kernels reach the registry as rows of a table.
CUDA_LAYERS = {"ptx": 0, "tile": 1, "shared": 2, "sm80": 3, "sm90": 3, "instances": 4}


def room(path: Path) -> str:
    """The folder of csrc/ that a file lives in, or its name where it lives in none."""
    return path.relative_to(CSRC).parts[0]


def includes(path: Path) -> list[tuple[str, bool]]:
    """(header, whether it is quoted)"""
    found = re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text(), re.MULTILINE)
    return [(name, bracket == '"') for bracket, name in found]


def code(path: Path) -> str:
    """The text without comments and string literals."""
    text = re.sub(r"/\*.*?\*/", " ", path.read_text(), flags=re.DOTALL)
    text = re.sub(r'"(?:\\.|[^"\\\n])*"', '""', text)
    return re.sub(r"//[^\n]*", "", text)


def of(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


def test_the_rules_know_every_room() -> None:
    assert len(FILES) > 25
    assert {room(path) for path in FILES} == set(RULES)


# ---- include rules ---------------------------------------------------------------------------------------------------


@of(FILES)
def test_includes(path: Path) -> None:
    folders, outside = RULES[room(path)]
    for name, quoted in includes(path):
        if quoted:
            target = (path.parent / name).resolve()
            assert target.is_file(), f"{name} does not exist"
            assert room(target) in folders | {room(path)}, f"{room(path)} may not include {room(target)}: {name}"
            here, there = path.relative_to(CSRC).parts, target.relative_to(CSRC).parts
            if here[0] == there[0] == "cuda" and len(here) > 2 and len(there) > 2:
                up = CUDA_LAYERS[there[1]] > CUDA_LAYERS[here[1]]
                sideways = here[1] != there[1] and CUDA_LAYERS[here[1]] == CUDA_LAYERS[there[1]]
                assert not (up or sideways), f"{here[1]} may not include {there[1]}"
            assert not (here[0] == "cuda" and len(here) == 2 < len(there) and there[0] == "cuda"), (
                f"{here[1]} may not include {there[1]}"
            )
        elif "/" in name or name.endswith(".h"):
            assert name.startswith(outside), f"{room(path)} may not include <{name}>"


def test_the_include_rule_finds_a_breach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule above is one that can fail."""
    monkeypatch.setattr("test_architecture.CSRC", tmp_path)
    for folder in ("core", "cpu"):
        (tmp_path / folder).mkdir()
    (tmp_path / "cpu" / "engine.h").touch()
    guilty = tmp_path / "core" / "mask.h"
    for line in ('#include "../cpu/engine.h"', "#include <ATen/ATen.h>", "#include <cuda_runtime.h>"):
        guilty.write_text(line + "\n")
        with pytest.raises(AssertionError, match="may not include"):
            test_includes(guilty)


def test_the_include_rule_holds_below_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_architecture.CSRC", tmp_path)
    for name in ("ptx/mma.cuh", "tile/copy.cuh", "sm80/config.h", "sm90/config.h", "instances/a.cu", "registry.h"):
        (tmp_path / "cuda" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cuda" / name).touch()
    for guilty, line in (
        ("ptx/mma.cuh", '#include "../tile/copy.cuh"'),
        ("sm80/config.h", '#include "../sm90/config.h"'),
        ("sm80/config.h", '#include "../instances/a.cu"'),
        ("registry.h", '#include "sm80/config.h"'),
        ("tile/copy.cuh", "#include <c10/cuda/CUDAStream.h>"),
    ):
        path = tmp_path / "cuda" / guilty
        path.write_text(line + "\n")
        with pytest.raises(AssertionError, match="may not include"):
            test_includes(path)
        path.write_text("")
    for good, line in (("sm80/config.h", '#include "../ptx/mma.cuh"'), ("instances/a.cu", '#include "../registry.h"')):
        path = tmp_path / "cuda" / good
        path.write_text(line + "\n")
        test_includes(path)


@of(HEADERS)
def test_headers_are_guarded(path: Path) -> None:
    if path.name.endswith("_impl.h"):  # compiled once per instruction set, on purpose
        assert "No include guard" in path.read_text()
        return
    assert re.search(r"^#pragma once$", path.read_text(), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_each_header_of_core_and_cpu_compiles_alone() -> None:
    """Those that need no PyTorch; with C++17 and C++20, which are what PyTorch's releases build extensions with."""
    alone = [p for p in HEADERS if room(p) in {"core", "cpu"} and not p.name.endswith("_impl.h")]
    seen: dict[Path, bool] = {}

    def needs_torch(path: Path) -> bool:
        if path not in seen:
            seen[path] = any(
                needs_torch((path.parent / name).resolve()) if quoted else name.startswith(TORCH)
                for name, quoted in includes(path)
            )
        return seen[path]

    alone = [path for path in alone if not needs_torch(path)]
    assert {"params.h", "mask.h", "softmax.h", "philox.h", "engine.h", "tile_ops.h", "config.h"} <= {
        path.name for path in alone
    }

    def compile_(job: tuple[Path, str]) -> str:
        path, standard = job
        command = ["g++", f"-std={standard}", "-fsyntax-only", "-Wall", "-Wextra", "-Wno-psabi", "-xc++", str(path)]
        done = subprocess.run(
            [*command, "-Wno-pragma-once-outside-header"], capture_output=True, text=True, check=False
        )
        return done.stderr if done.returncode else ""

    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(compile_, [(path, standard) for path in alone for standard in ("c++17", "c++20")]))
    assert not any(errors), "\n".join(errors)


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.mark.slow
@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
def test_each_header_of_cuda_compiles_alone() -> None:
    """Both sides of it, down to what no template holds back: code for the GPU as PTX, for the host as an object."""
    alone = [path for path in HEADERS if room(path) == "cuda"]
    assert {"registry.h", "config.h", "forward_v2.cuh"} <= {path.name for path in alone}

    def compile_(path: Path) -> str:
        command = [nvcc(), "-std=c++17", "-arch=sm_80", "--expt-relaxed-constexpr", "-O0", "-x", "cu", "-c"]
        done = subprocess.run([*command, "-o", "/dev/null", str(path)], capture_output=True, text=True, check=False)
        return f"{path}\n{done.stderr}" if done.returncode else ""

    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(compile_, alone))
    assert not any(errors), "\n".join(errors)


# ---- what stands where -----------------------------------------------------------------------------------------------


@of([path for path in FILES if path.name != "config.h" and room(path) in {"cpu", "ops", "cuda"}])
def test_tile_numbers_stand_in_config_h_alone(path: Path) -> None:
    """No other file sets one of the numbers of a tile to a literal."""
    names = r"(?:tile_[mnk]|block_[mnk]|rows_per_task|rows_per_product|chunk|kTile[MNK]|kBlock[MNK]|kStages)"
    literal = re.search(rf"\b{names}\s*=\s*(\d{{2,}})\b", code(path))
    assert literal is None, f"{literal[0]}: a tile number outside config.h" if literal else None


@of(FILES)
def test_inline_assembly_stands_in_ptx_alone(path: Path) -> None:
    if "ptx" not in path.relative_to(CSRC).parts:
        assert not re.search(r"\b(?:asm|__asm__)\b", code(path))


@of(FILES)
def test_nothing_ends_the_process_or_writes_to_the_console(path: Path) -> None:
    forbidden = r"\b(?:std::)?(?:exit|abort|terminate|quick_exit|printf|puts)\s*\(|\bstd::c(?:out|err)\b|\bassert\s*\("
    debug_builds = r"#if defined\(FAE_DEBUG_BARRIERS\)(?s:.*?)#(?:else|endif)"  # name the barrier that hangs
    text = re.sub(debug_builds, "", code(path)).replace("static_assert", "")
    assert (found := re.search(forbidden, text)) is None, found[0]


@of([path for path in FILES if room(path) in {"core", "cpu", "cuda"} and path.name != "core_check.cu"])
def test_engines_allocate_nothing_themselves(path: Path) -> None:
    """Memory comes from the caller, who takes it from PyTorch's allocators. The self-test of core/ is no engine."""
    calls = r"\b(?:malloc|calloc|realloc|aligned_alloc|cudaMalloc\w*|cudaFree\w*)\s*\("
    assert not re.search(rf"{calls}|\bnew\s+\w", code(path))


TABLE = CSRC / "cuda" / "instances" / "table.py"
WGMMA_FORMS = CSRC / "cuda" / "ptx" / "wgmma_forms.py"


def table(*words: str, script: Path = TABLE) -> tuple[int, str]:
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_wgmma_is_what_its_script_writes() -> None:
    assert subprocess.run([sys.executable, str(WGMMA_FORMS), "--check"], check=False).returncode == 0


def test_written_files_are_fresh() -> None:
    """csrc/cuda/instances/ holds what table.py writes, and nothing else."""
    status, text = table("--check")
    assert status == 0, text + "run python csrc/cuda/instances/table.py"
    assert all("do not edit" in path.read_text() for path in FILES if path.parent == TABLE.parent)


def test_stale_files_are_found_and_mended(tmp_path: Path) -> None:
    """--check changes nothing and finds a change, a file too few and one too many; writing twice is writing once."""
    shutil.copytree(CSRC / "cuda", tmp_path / "cuda")
    folder = tmp_path / "cuda" / "instances"
    script, written = folder / TABLE.name, sorted(folder.glob("*.cu"))
    whole = {path.name: path.read_text() for path in [*written, folder / "registry_rows.cpp"]}
    written[0].write_text(written[0].read_text() + "// edited\n")
    written[1].unlink()
    (folder / "left_over.cu").write_text("// Written by table.py: do not edit.\n")
    status, text = table("--check", script=script)
    assert status == 1 and {written[0].name, written[1].name, "left_over.cu"} <= set(re.findall(r"[\w.]+\.cu", text))
    assert (folder / "left_over.cu").exists() and not written[1].exists()
    for _ in range(2):
        assert table(script=script)[0] == 0
        assert table("--check", script=script) == (0, "")
    now = {path.name: path.read_text() for path in [*folder.glob("*.cu"), *folder.glob("*.cpp")]}
    assert now == whole


def test_schemas_stand_in_library_cpp_alone() -> None:
    assert [path.name for path in FILES if re.search(r"\bTORCH_LIBRARY\(", code(path))] == ["library.cpp"]


def test_every_operator_has_a_meta_kernel_in_cpp() -> None:
    operators = set(re.findall(r'm\.def\(\s*"(\w+)\(', (CSRC / "library.cpp").read_text()))
    meta = (CSRC / "ops/op_meta.cpp").read_text()
    assert operators == {"fwd_v1", "fwd", "bwd"}
    assert "TORCH_LIBRARY_IMPL(flash_attn_ext, Meta" in meta
    assert set(re.findall(r'm\.impl\("(\w+)"', meta)) == operators
    assert not any("register_fake" in path.read_text() for path in PACKAGE.rglob("*.py"))


def test_every_row_of_a_configuration_says_why() -> None:
    for config in CSRC.rglob("config.h"):
        # The reason is the last string of a row, written in one piece or several.
        found = re.findall(r'\{\s*"(\w+)",[^{}"]*?((?:"(?:[^"\\]|\\.)*"\s*)+)\}', config.read_text())
        rows = [(name, "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', pieces))) for name, pieces in found]
        assert rows, config
        for name, why in rows:
            twin = re.fullmatch(r"as (d\d+)", why)  # the reason of another row
            if twin is not None:
                assert any(re.search(rf"_{twin[1]}(_|$)", other) for other, _ in rows), f"{name}: no row {twin[1]}"
            else:
                assert len(why.split()) > 2, f"{name} has no reason"


# ---- the build -------------------------------------------------------------------------------------------------------


def test_compiler_flags() -> None:
    """No -std (each PyTorch names its own), no -ffast-math (it flips the process to flush-to-zero), no -march."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    flags = [text for text in strings if text.startswith("-")]
    assert "-fopenmp" in flags
    for flag in flags:
        assert not flag.startswith(("-std", "-march", "-mtune", "-Ofast")) and "fast" not in flag, flag
    for path in FILES:
        assert not re.search(r"\b(?:fast-math|Ofast|fast_math)\b", code(path)), path


def test_the_build_asks_nobody() -> None:
    """No network, no git, nothing generated while building."""
    text = (ROOT / "setup.py").read_text()
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])
    }
    assert imported.isdisjoint({"urllib", "requests", "socket", "http"}) and '"git"' not in text


@of([path for path in sorted(PACKAGE.rglob("*.py")) if "cli" not in path.parts])
def test_the_library_needs_pytorch_alone(path: Path) -> None:
    """rich and matplotlib belong to the commands; importing the package loads neither."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        for name in names:
            assert name.split(".")[0] not in {"numpy", "rich", "matplotlib", "pytest", "hypothesis"}, name


def test_interface_knows_no_tile_and_no_architecture() -> None:
    text = (PACKAGE / "interface.py").read_text()
    assert not re.search(r"\bsm_?\d\d\b|wgmma|compute_capability|get_device_capability|tile_[mn]", text)


def test_files_stay_readable() -> None:
    """Beyond 450 lines a file wants to be split by role."""
    for path in FILES + sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        assert len(text.splitlines()) <= 450 or text.startswith("// Written by"), path


def test_every_source_opens_with_what_it_is() -> None:
    for path in FILES:
        first = path.read_text().splitlines()[0]
        told_in_its_header = path.suffix != ".h" and (f"{path.stem}.h", True) in includes(path)
        assert first.startswith("//") or told_in_its_header, f"{path}: {first}"
    for path in sorted(PACKAGE.rglob("*.py")):
        assert ast.get_docstring(ast.parse(path.read_text())), path
