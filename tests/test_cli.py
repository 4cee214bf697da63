"""doctor, explain, kernels: what they say, in which form, with which exit status."""

from __future__ import annotations

import builtins
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import flash_attn_ext
from flash_attn_ext.__main__ import main
from flash_attn_ext.cli import doctor, explain, kernels

README = Path(__file__).resolve().parents[1] / "README.md"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit status and standard output of one command."""
    status = main(list(words))
    return status, capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What argparse says about a wrong command line; its status is 2."""
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code == 2
    return capsys.readouterr().err


# ---- the command itself ----------------------------------------------------------------------------------------------


def test_runs_as_a_module_and_imports_one_command_alone() -> None:
    code = (
        "import runpy, sys; sys.argv = ['flash-attn-ext', 'kernels', '--json'];\n"
        "try: runpy.run_module('flash_attn_ext', run_name='__main__')\n"
        "except SystemExit as stop: status = stop.code\n"
        "others = [m for m in sys.modules if m.startswith('flash_attn_ext.cli.')]\n"
        "print('|', status, others, sorted({'rich', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    printed, _, end = done.stdout.rpartition("|")
    assert json.loads(printed) == flash_attn_ext.supported_kernels()
    assert end.strip() == "0 ['flash_attn_ext.cli.kernels'] []"


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in ("doctor", "explain", "kernels"))])
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for expected in ("doctor", "explain", "kernels", "bench") if len(words) == 1 else ("--json", f"{words[0]} [-h]"):
        assert expected in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"flash_attn_ext {flash_attn_ext.__version__}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "required: COMMAND"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["explain"], "required: --shape"),
        (["explain", "--shape", "2,x"], "'2,x' is neither B,H,S,D nor B,S,D"),
        (["explain", "--shape", "2,3"], "neither B,H,S,D nor B,S,D"),
        (["explain", "--shape=2,2,-3,4"], "neither B,H,S,D nor B,S,D"),
        (["explain", "--shape", "2,2,3,4", "--dtype", "int8"], "'int8': choose from fp16, bf16"),
        (["explain", "--shape", "2,2,3,4", "--window", "3"], "'3' is not LEFT,RIGHT"),
        (["explain", "--shape", "2,2,3,4", "--kv-heads", "-1"], "--kv-heads"),
        (["explain", "--shape", "2,2,3,4", "--scale", "big"], "'big' is not a number"),
        (["explain", "--shape", "2,3,4", "--kv-heads", "1"], "--kv-heads needs a --shape with heads"),
        (["kernels", "--json", "--markdown"], "not allowed with argument"),
    ],
)
def test_wrong_command_lines_are_told_why(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refusal(capsys, *words)


# ---- explain ---------------------------------------------------------------------------------------------------------


def test_explain_says_what_the_function_says(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--shape 2,8,1024,64 --kv-heads 2 --seqlen-k 512 --head-dim-v 32 --dtype fp32 --causal --window=64,-1"
    status, text = run(capsys, "explain", *words.split(), "--json")
    said = json.loads(text)
    q, k, v = torch.empty(2, 8, 1024, 64), torch.empty(2, 2, 512, 64), torch.empty(2, 2, 512, 32)
    expected = flash_attn_ext.explain(q, k, v, causal=True, window=(64, -1))
    call = said.pop("call")
    assert status == 0
    assert said == json.loads(json.dumps(expected))
    assert (call["q"], call["k"], call["v"]) == ([2, 8, 1024, 64], [2, 2, 512, 64], [2, 2, 512, 32])


def test_explain_readably(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run(capsys, "explain", "--shape", "2,8,1024,64", "--causal", "--causal-align", "top-left")
    plan = flash_attn_ext.explain(*[torch.empty(2, 8, 1024, 64, dtype=torch.bfloat16)] * 3, causal=True)
    assert status == 0
    assert text.startswith("q (2, 8, 1024, 64), k (2, 8, 1024, 64), v (2, 8, 1024, 64), bfloat16 on cpu\n")
    assert "causal (top-left)" in text
    for title, key in (("forward", "fwd"), ("backward", "bwd")):
        assert f"\n{title}: {plan[key]['kernel']}\n" in text
        assert re.search(rf"^  why +{re.escape(plan[key]['why'])}$", text, re.MULTILINE)
        assert re.search(rf"^  tile +{plan[key]['tile'][0]} x {plan[key]['tile'][1]} ", text, re.MULTILINE)


def test_explain_three_dimensions_and_sizes_that_no_memory_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "explain", "--shape", "2,1024,64")[0] == 0
    status, text = run(capsys, "explain", "--shape", "4000,8000,1000000,64")
    assert status == 0
    assert "(4000, 8000, 1000000, 64)" in text


def test_explain_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run(capsys, "explain", "--shape", "2,8,64,64", "--kv-heads", "3")
    assert status == 1
    assert "does not run: flash_attention: k has 3 heads, which does not divide q's 8 heads" in text
    assert run(capsys, "explain", "--shape", "2,8,64,64", "--scale", "inf")[0] == 1


def test_explain_asks_about_the_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A CUDA call can be explained on a machine without a GPU."""
    seen = []
    monkeypatch.setattr(explain, "explain", lambda *a, **k: seen.append((a, k)) or {"runs": False, "why_not": "-"})
    assert (
        run(capsys, "explain", "--shape", "2,8,64,64", "--device", "cuda", "--dtype", "fp16", "--scale", "-2")[0] == 1
    )
    (q, _, _, scale, causal), options = seen[0]
    assert (q.device.type, q.dtype, scale, causal) == ("cuda", torch.float16, -2.0, False)
    assert options == {"causal_align": "bottom-right", "window": None}


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (2**20 * 3 // 2, "1.5 MiB"), (2**52, "4096.0 TiB")],
)
def test_bytes(count: int, text: str) -> None:
    assert explain._bytes(count) == text


# ---- kernels and the README's table ----------------------------------------------------------------------------------

ROW = {
    "device": "cuda",
    "arch": "sm80",
    "pass": "fwd",
    "version": 2,
    "dtype": "float16",
    "operand": "fp16",
    "head_dim_max": 256,
    "features": ["causal", "gqa"],
}


def test_kernels_share_a_row_if_only_the_dtype_differs() -> None:
    others = [{**ROW, "dtype": "bfloat16", "operand": "bf16"}, {**ROW, "pass": "bwd"}, {**ROW, "arch": "sm90"}]
    assert kernels.table_rows([ROW, *others]) == [
        ("CUDA", "sm80", "v2", "forward", "float16, bfloat16", "up to 256", "causal, gqa"),
        ("CUDA", "sm80", "v2", "backward", "float16", "up to 256", "causal, gqa"),
        ("CUDA", "sm90", "v2", "forward", "float16", "up to 256", "causal, gqa"),
    ]


def test_the_cpu_row_does_not_depend_on_the_machine() -> None:
    here = {**ROW, "device": "cpu", "arch": "avx512", "head_dim_max": None}
    there = {**here, "arch": "default", "operand": "fp32"}
    assert kernels.markdown([here]) == kernels.markdown([there])
    assert "| CPU | any | v2 | forward | float16 | any | causal, gqa |" in kernels.markdown([here])


def test_kernels_forms(capsys: pytest.CaptureFixture[str]) -> None:
    rows = kernels.table_rows(flash_attn_ext.supported_kernels())
    markdown = run(capsys, "kernels", "--markdown")[1].strip().splitlines()
    assert markdown[0].startswith("| device | architecture |")
    assert [tuple(line.strip("| ").split(" | ")) for line in markdown[2:]] == rows
    plain = run(capsys, "kernels")[1].strip().splitlines()
    assert [re.split(r" {2,}", line) for line in plain[1:]] == [list(row) for row in rows]


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(f"# Title\n\n{kernels.BEGIN}\n| old |\n{kernels.END}\n\nmore\n")
    return path


def test_write_then_check(readme: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run(capsys, "kernels", "--check", str(readme))
    assert status == 1
    assert "- | old |" in text
    assert f"kernels --write {readme}" in text
    assert run(capsys, "kernels", "--write", str(readme)) == (0, f"{readme}: written\n")
    written = readme.read_text()
    table = kernels.markdown(flash_attn_ext.supported_kernels())
    assert written == f"# Title\n\n{kernels.BEGIN}\n{table}\n{kernels.END}\n\nmore\n"
    assert run(capsys, "kernels", "--write", str(readme)) == (0, f"{readme}: already up to date\n")
    assert run(capsys, "kernels", "--check", str(readme)) == (0, f"{readme}: up to date\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [line for line in lines if "backward" not in line],
        lambda lines: [line.replace("gqa", "gqa, telepathy") for line in lines],
        lambda lines: [*lines, "| CPU | any | v3 | forward | float16 | any | |"],
        lambda lines: lines[::-1],
    ],
    ids=["lacks a row", "claims a feature", "claims a kernel", "other order"],
)
def test_check_finds_what_is_untrue(change: Callable[[list[str]], list[str]]) -> None:
    lines = kernels.markdown(flash_attn_ext.supported_kernels()).splitlines()
    assert kernels.difference("\n".join([kernels.BEGIN, *lines, kernels.END])) == []
    assert kernels.difference("\n".join([kernels.BEGIN, *change(lines), kernels.END]))


@pytest.mark.parametrize("cuda", [False, True])
def test_a_binary_without_cuda_checks_the_cpu_rows_alone(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = [row for row in flash_attn_ext.supported_kernels() if row["device"] == "cpu"]
    monkeypatch.setattr(kernels, "supported_kernels", lambda: cpu)
    monkeypatch.setattr(kernels, "build_info", lambda: {"cuda": cuda})
    text = "\n".join([kernels.BEGIN, kernels.markdown([*cpu, ROW]), kernels.END])
    assert kernels.difference(text) == ([f"- {kernels.markdown([ROW]).splitlines()[-1]}"] if cuda else [])


@pytest.mark.parametrize("mode", ["--write", "--check"])
def test_files_without_markers_are_refused(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.md"
    assert main(["kernels", mode, str(path)]) == 1
    assert "No such file" in capsys.readouterr().err
    for text in ("no markers", kernels.BEGIN, f"{kernels.END} {kernels.BEGIN}", (kernels.BEGIN + kernels.END) * 2):
        path.write_text(text)
        assert main(["kernels", mode, str(path)]) == 1
        assert kernels.BEGIN in capsys.readouterr().err
        assert path.read_text() == text


def test_the_readme_tells_the_truth() -> None:
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    if kernels.BEGIN not in text:
        pytest.skip("README.md has no support table yet")
    lines = kernels.difference(text)
    assert lines == [], "run `python -m flash_attn_ext kernels --write README.md`"


# ---- doctor ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    return doctor.facts()


def test_doctor_json(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run(capsys, "doctor", "--json")
    report = json.loads(text)
    failed = [check for check in report["checks"] if check["status"] == "FAIL"]
    assert (status, report["healthy"], failed) == (0, True, [])
    assert report["versions"]["torch"] == torch.__version__
    assert report["build"] == json.loads(json.dumps(flash_attn_ext.build_info()))
    assert report["kernels"] == flash_attn_ext.supported_kernels()
    names = {check["name"] for check in report["checks"]}
    assert {"PyTorch", "CUDA", "replace_sdpa"} <= names
    assert {f"cpu {row['dtype']}" for row in report["kernels"] if row["device"] == "cpu"} <= names


def test_doctor_plain_text_needs_no_rich(
    known: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    importer = builtins.__import__

    def without_rich(name: str, *args: Any) -> Any:
        if name.partition(".")[0] == "rich":
            raise ImportError(name)
        return importer(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr(doctor, "checks", lambda facts: [doctor.Check("knee", "ok", "bends")])
    status, text = run(capsys, "doctor")
    assert status == 0
    for line in ("versions", "build", "CPU", "kernels", "checks", "  ok    knee  bends", "all is well"):
        assert f"\n{line}\n" in f"\n{text}"
    assert torch.__version__ in text


def test_doctor_with_rich(known: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    doctor._print_rich(known, [doctor.Check("knee [x]", "FAIL", "does not bend [at all]")])
    text = capsys.readouterr().out
    for part in ("knee [x]", "does not bend [at all]", torch.__version__.split("+")[0]):
        assert part in text


def test_a_failed_check_is_exit_status_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "flash_attention", lambda *args, **kwargs: flash_attn_ext.naive_attention(*args) * 1.01)
    status, text = run(capsys, "doctor", "--plain")
    assert status == 1
    assert re.search(r"^  FAIL +cpu float32 +worst error [\d.]+ of what is allowed", text, re.MULTILINE)
    assert "failed: cpu float16, cpu bfloat16, cpu float32, cpu float64" in text


def test_a_check_that_raises_is_a_failed_one(known: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("engine on fire")

    monkeypatch.setattr(doctor, "flash_attention", broken)
    found = [check for check in doctor.checks(known) if check.status == "FAIL"]
    assert [(check.name, check.detail) for check in found] == [("results", "RuntimeError: engine on fire")]


def test_wrong_gradients_fail_the_self_test() -> None:
    def wrong_gradient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        return (
            flash_attn_ext.flash_attention(q, k * 1.0, v, causal=causal) + 0.0 * q.sum() + 0.01 * (v - v.detach()).sum()
        )

    assert doctor._self_test("cpu", torch.float32, flash_attn_ext.flash_attention).status == "ok"
    failed = doctor._self_test("cpu", torch.float32, wrong_gradient)
    assert failed.status == "FAIL"
    assert "(dv)" in failed.detail


def test_nan_fails_the_self_test() -> None:
    def nan(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        return flash_attn_ext.flash_attention(q, k, v, causal=causal) * float("nan")

    for dtype in (torch.float32, torch.float64):
        assert doctor._self_test("cpu", dtype, nan).status == "FAIL"


def test_replacement_that_does_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        def __enter__(self) -> None:
            pass

        def __exit__(self, *error: object) -> None:
            pass

    assert [check.status for check in doctor._check_replace_sdpa()] == ["ok"]
    monkeypatch.setattr(doctor, "replace_sdpa", Nothing)
    (check,) = doctor._check_replace_sdpa()
    assert (check.status, check.detail) == ("FAIL", "our operator did not run")


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("8.0+PTX;9.0a", (8, 0), "8.0"),
        ("8.0+PTX,9.0a", (8, 9), "8.0"),
        ("8.0+PTX;9.0a", (9, 0), "9.0a"),
        ("8.0+PTX;9.0a", (10, 0), "8.0+PTX, compiled when first used"),
        ("8.0+PTX;9.0a", (7, 5), None),
        ("8.0;9.0a", (10, 0), None),  # neither binary nor PTX
        ("8.0;8.6", (8, 6), "8.6"),
        ("8.6", (8, 0), None),
        ("9.0a", (9, 1), None),  # arch-specific code runs on that one alone
        ("", (9, 0), None),
    ],
)
def test_which_compiled_arch_a_gpu_runs(archs: str, capability: tuple[int, int], runs: str | None) -> None:
    assert doctor.arch_for(archs, capability) == runs


def statuses(checks: Any) -> list[str]:
    return [check.status for check in checks]


def test_gpu_checks(known: dict[str, Any]) -> None:
    gpu = {"name": "Imaginary", "capability": "7.5", "memory_gib": 8.0, "runs": None}
    cuda = {**known["build"], "cuda": True, "cuda_archs": "8.0+PTX;9.0a"}
    (check,) = doctor._check_gpus({**known, "gpus": [gpu], "build": cuda})
    assert check.status == "FAIL"
    assert "TORCH_CUDA_ARCH_LIST=7.5 pip install" in check.detail
    assert statuses(doctor._check_gpus({**known, "gpus": [{**gpu, "runs": "8.0"}], "build": cuda})) == ["ok"]
    assert statuses(doctor._check_gpus({**known, "gpus": [gpu], "build": {**cuda, "cuda": False}})) == ["warn"]
    assert statuses(doctor._check_gpus({**known, "gpus": []})) == ["skip"]


def test_version_checks(known: dict[str, Any]) -> None:
    def check(build: dict[str, Any], versions: dict[str, Any]) -> list[doctor.Check]:
        return [*doctor._check_versions({"build": build, "versions": versions})]

    build = {"torch": "2.11.0+cu130", "cuda": True, "cuda_version": "13.0"}
    assert statuses(check(build, {"torch": "2.11.0+cu130", "torch_cuda": "13.0"})) == ["ok", "ok"]
    assert statuses(check(build, {"torch": "2.11.1+cu130", "torch_cuda": "13.2"})) == ["warn", "ok"]
    assert statuses(check(build, {"torch": "2.11.0+cu128", "torch_cuda": "12.8"})) == ["warn", "FAIL"]
    assert statuses(check(build, {"torch": "2.11.0+cpu", "torch_cuda": None})) == ["warn", "FAIL"]
    reason = "no nvcc was found"
    found = check({"torch": "2.11.0", "cuda": False, "cuda_reason": reason}, {"torch": "2.11.0", "torch_cuda": None})
    assert statuses(found) == ["ok", "skip"]
    assert found[1].detail == f"built for the CPU only: {reason}"


def test_stale_sources_are_noticed(known: dict[str, Any]) -> None:
    found = [*doctor._check_sources({"build": {"csrc_sha256": "0" * 64}})]
    if not found:
        pytest.skip("no csrc/ beside the package")
    assert statuses(found) == ["warn"]


@pytest.mark.parametrize(("differences", "status"), [([], "ok"), (["probe 3: mask or dropout differs"], "FAIL")])
def test_core_check_on_cuda(differences: list[str], status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_C", type("Binary", (), {"check_core_on_cuda": staticmethod(lambda: differences)}))
    assert statuses(doctor._check_core_on_cuda({"gpus": [{}]})) == [status]
    assert statuses(doctor._check_core_on_cuda({"gpus": []})) == []
